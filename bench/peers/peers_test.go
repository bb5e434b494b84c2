package peers

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"go.uber.org/goleak"
)

const patience = 60 * time.Second

var binaries string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "peers-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	binaries = dir
	build := exec.Command("go", "build", "-o", dir+string(filepath.Separator),
		"./centrifuge", "./gnetecho", "./gorilla", "./gws", "./nbio", "./rawwrite", "./sarama", "./seed")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%v\n%s", err, out)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if err := os.RemoveAll(dir); err != nil && code == 0 {
			code = 1
		}
		os.Exit(code)
	}))
}

// start runs a peer until the test ends, when it must stop on SIGTERM, and returns its address.
func start(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(filepath.Join(binaries, name), args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
		defer kill.Stop()
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s stopped with %v\n%s", name, err, stderr.String())
		}
	})
	kill := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	defer kill.Stop()
	line, err := bufio.NewReader(out).ReadString('\n')
	addr, ok := strings.CutPrefix(strings.TrimSpace(line), "listening on ")
	if err != nil || !ok {
		t.Fatalf("%s said %q, %v\n%s", name, line, err, stderr.String())
	}
	return addr
}

func dial(t *testing.T, url string, header http.Header) *websocket.Conn {
	t.Helper()
	// A write buffer this small cuts what is written through NextWriter into fragments.
	d := websocket.Dialer{HandshakeTimeout: patience, WriteBufferSize: 256}
	c, res, err := d.Dial(url, header)
	if err != nil {
		t.Fatalf("dial %s: %v", url, err)
	}
	_ = res.Body.Close()
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestEcho(t *testing.T) {
	for _, name := range []string{"gnetecho", "gws", "nbio", "gorilla"} {
		t.Run(name, func(t *testing.T) {
			url := "ws://" + start(t, name, "-addr", "127.0.0.1:0") + "/any/path?x=1"
			t.Run("messages", func(t *testing.T) { echoes(t, dial(t, url, nil)) })
			t.Run("control", func(t *testing.T) { control(t, dial(t, url, nil)) })
			t.Run("many clients", func(t *testing.T) {
				var wg sync.WaitGroup
				for i := range 100 {
					c := dial(t, url, nil)
					wg.Go(func() { pipelined(t, c, i) })
				}
				wg.Wait()
			})
		})
	}
}

func echoes(t *testing.T, c *websocket.Conn) {
	big := strings.Repeat("0123456789abcdef", 64<<10/16)
	for _, tc := range []struct {
		name string
		kind int
		data string
		one  bool // in one frame
	}{
		{"text", websocket.TextMessage, "grüß Gott", true},
		{"one byte", websocket.TextMessage, "x", true}, // nbio does not hand over an empty message
		{"binary", websocket.BinaryMessage, "\x00\xff\x80 bytes", true},
		{"126 bytes", websocket.BinaryMessage, big[:126], true},
		{"64 KiB in one frame", websocket.BinaryMessage, big, true},
		{"fragments", websocket.TextMessage, big[:5000], false},
		{"64 KiB in fragments", websocket.BinaryMessage, big, false},
	} {
		if err := send(c, tc.kind, []byte(tc.data), tc.one); err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		kind, data, err := c.ReadMessage()
		if err != nil || kind != tc.kind || string(data) != tc.data {
			t.Fatalf("%s: kind %d, %d bytes, %v; sent kind %d, %d bytes", tc.name, kind, len(data), err, tc.kind, len(tc.data))
		}
	}
}

func send(c *websocket.Conn, kind int, data []byte, one bool) error {
	if one {
		pm, err := websocket.NewPreparedMessage(kind, data)
		if err != nil {
			return err
		}
		return c.WritePreparedMessage(pm)
	}
	w, err := c.NextWriter(kind)
	if err != nil {
		return err
	}
	for len(data) > 0 { // in small writes: a large one would become one frame
		n := min(100, len(data))
		if _, err := w.Write(data[:n]); err != nil {
			return err
		}
		data = data[n:]
	}
	return w.Close()
}

// control checks the answers to a ping and to a close frame.
func control(t *testing.T, c *websocket.Conn) {
	pong := ""
	c.SetPongHandler(func(s string) error { pong = s; return nil })
	if err := c.WriteControl(websocket.PingMessage, []byte("p1"), time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if err := c.WriteMessage(websocket.TextMessage, []byte("after")); err != nil {
		t.Fatal(err)
	}
	if _, data, err := c.ReadMessage(); err != nil || string(data) != "after" {
		t.Fatalf("%q, %v", data, err)
	}
	bye := websocket.FormatCloseMessage(websocket.CloseNormalClosure, "bye")
	if err := c.WriteControl(websocket.CloseMessage, bye, time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.ReadMessage(); !websocket.IsCloseError(err, websocket.CloseNormalClosure) {
		t.Fatalf("after a close frame: %v", err)
	}
	if pong != "p1" {
		t.Fatalf("pong %q", pong)
	}
}

// pipelined sends a batch before it reads, and wants all of it back in order.
func pipelined(t *testing.T, c *websocket.Conn, who int) {
	const n = 50
	for i := range n {
		if err := c.WriteMessage(websocket.TextMessage, fmt.Appendf(nil, "%d/%d", who, i)); err != nil {
			t.Error(err)
			return
		}
	}
	for i := range n {
		want := fmt.Sprintf("%d/%d", who, i)
		if _, data, err := c.ReadMessage(); err != nil || string(data) != want {
			t.Errorf("%q, %v; want %q", data, err, want)
			return
		}
	}
}

func TestCentrifuge(t *testing.T) {
	c := dial(t, "ws://"+start(t, "centrifuge", "-addr", "127.0.0.1:0", "-ping", "1s")+"/any", nil)
	say := func(s string) {
		t.Helper()
		if err := c.WriteMessage(websocket.TextMessage, []byte(s)); err != nil {
			t.Fatal(err)
		}
	}
	hear := func() string {
		t.Helper()
		_, b, err := c.ReadMessage()
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	say(`{"id":1,"connect":{}}`)
	var connected struct {
		ID      int `json:"id"`
		Connect struct {
			Client string         `json:"client"`
			Subs   map[string]any `json:"subs"`
			Ping   int            `json:"ping"`
			Pong   bool           `json:"pong"`
		} `json:"connect"`
	}
	s := hear()
	if err := json.Unmarshal([]byte(s), &connected); err != nil || connected.ID != 1 || connected.Connect.Client == "" ||
		len(connected.Connect.Subs) != 1 || connected.Connect.Ping != 1 || !connected.Connect.Pong {
		t.Fatalf("%s, %v", s, err)
	}
	say(`{"id":2,"rpc":{"method":"echo","data":{"n":7}}}`)
	if s := hear(); s != `{"id":2,"rpc":{"data":{"n":7}}}` {
		t.Fatal(s)
	}
	if s := hear(); s != "{}" {
		t.Fatalf("ping %s", s)
	}
	say("{}")
}

func TestRawWrite(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(binaries, "rawwrite"), "-conns", "20", "-targets", "5", "-rounds", "4", "-rate", "1000", "-size", "100")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	lines.Scan()
	addr, found := strings.CutPrefix(lines.Text(), "listening on ")
	if !found {
		t.Fatalf("%q", lines.Text())
	}
	stranger, err := net.Dial("tcp", addr) // is no client
	if err != nil {
		t.Fatal(err)
	}
	_ = stranger.Close()
	var conns []*websocket.Conn
	for range 20 {
		c, _, err := websocket.DefaultDialer.DialContext(ctx, "ws://"+addr+"/", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		conns = append(conns, c)
	}
	lines.Scan()
	var res struct {
		Conns  int     `json:"conns"`
		Writes int     `json:"writes"`
		CPU    float64 `json:"cpu_us_per_write"`
	}
	lastLine(t, lines.Bytes(), &res)
	if res.Conns != 20 || res.Writes != 20 || res.CPU <= 0 {
		t.Fatalf("%s", lines.Text())
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	frames := 0
	for _, c := range conns {
		for {
			_, p, err := c.ReadMessage()
			if err != nil {
				break
			}
			if frames++; len(p) != 100 {
				t.Fatalf("a frame of %d bytes", len(p))
			}
		}
	}
	if frames != (10+4)*5 {
		t.Errorf("%d frames arrived, want %d", frames, (10+4)*5)
	}
}

func TestSarama(t *testing.T) {
	kafka := os.Getenv("IM_TEST_KAFKA")
	if kafka == "" {
		t.Skip("IM_TEST_KAFKA is not set: needs a Kafka")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, filepath.Join(binaries, "sarama"), "-kafka", kafka, "-rate", "200", "-seconds", "1").Output()
	if err != nil {
		t.Fatal(err)
	}
	var res struct {
		Sent     int `json:"sent"`
		Received int `json:"received"`
		P50      int `json:"p50_us"`
	}
	lastLine(t, out, &res)
	if res.Sent != 600 || res.Received != 600 || res.P50 <= 0 {
		t.Fatalf("%s", out)
	}
}

func lastLine(t *testing.T, out []byte, v any) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), v); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
}
