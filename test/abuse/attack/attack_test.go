package attack

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve answers each connection by f until the test ends.
func serve(t *testing.T, f func(c net.Conn, r *bufio.Reader)) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				f(c, bufio.NewReader(c))
			})
		}
	})
	t.Cleanup(func() { _ = ln.Close(); wg.Wait() })
	return ln.Addr().String()
}

// upgrade takes an upgrade and answers with what comes next.
func upgrade(next string) func(net.Conn, *bufio.Reader) {
	return func(c net.Conn, r *bufio.Reader) {
		if _, err := http.ReadRequest(r); err != nil {
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"+next)
		_, _ = io.CopyN(io.Discard, r, 1) // what the attacker sends
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.CloseWrite() // what it goes on to send must not turn the end into a reset
		}
		_, _ = io.Copy(io.Discard, r)
	}
}

func closeFrame(code ws.StatusCode) string {
	b, err := ws.CompileFrame(ws.NewCloseFrame(ws.NewCloseFrameBody(code, "why")))
	if err != nil {
		panic(err)
	}
	return string(b)
}

func textFrame(s string) string {
	b, err := ws.CompileFrame(ws.NewTextFrame([]byte(s)))
	if err != nil {
		panic(err)
	}
	return string(b)
}

// TestOutcomes holds that what a server does to an attacker is named for what it is.
func TestOutcomes(t *testing.T) {
	const answer = "HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n"
	for name, c := range map[string]struct {
		kind   string
		server func(net.Conn, *bufio.Reader)
		want   string
	}{
		"status of a slow head": {"slow heads", func(c net.Conn, r *bufio.Reader) {
			_, _ = r.ReadByte()
			_, _ = fmt.Fprintf(c, answer, 408)
			_, _ = io.Copy(io.Discard, r)
		}, "HTTP 408"},
		"refused upgrade": {"app pings", func(c net.Conn, r *bufio.Reader) {
			_, _ = http.ReadRequest(r)
			_, _ = fmt.Fprintf(c, answer, 429)
		}, "HTTP 429"},
		"close code": {"invalid frames", upgrade(closeFrame(1002)), "close 1002"},
		"code behind frames": {"app pings",
			upgrade(textFrame(`{"type":"error","data":{"code":"RATE_LIMITED"}}`) + closeFrame(1008)), "close 1008"},
		"no code": {"pings", upgrade(""), ended},
		"code of a stream": {"dead streams", func(c net.Conn, r *bufio.Reader) {
			_, _ = http.ReadRequest(r)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\ndata: \"event: close\"\n\ndata: {"+strings.Repeat("x", 2000)+
				"}\n\nevent: close\nretry: 1\ndata: {\"code\":4000,\"reason\":\"why\"}\n\n")
			_, _ = io.Copy(io.Discard, r)
		}, "close 4000"},
		"reset": {"hold", func(c net.Conn, r *bufio.Reader) { // a write would be told of the reset first
			_, _ = http.ReadRequest(r)
			_, _ = io.WriteString(c, "HTTP/1.1 101 X\r\n\r\n")
			time.Sleep(20 * time.Millisecond)
			if tcp, ok := c.(*net.TCPConn); ok {
				_ = tcp.SetLinger(0)
			}
		}, reset},
		"nonsense": {"pings", upgrade("\x88\x01\x00"), ended},
		"held": {"hold", func(c net.Conn, r *bufio.Reader) {
			_, _ = http.ReadRequest(r)
			_, _ = io.WriteString(c, "HTTP/1.1 101 X\r\n\r\n")
			_, _ = io.Copy(io.Discard, r)
		}, stillOpen},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			ready := func() {}
			if c.want == stillOpen || c.kind == "dead streams" {
				ready = cancel
			}
			got, err := Run(ctx, Spec{Kind: c.kind, N: 1, Addr: serve(t, c.server), Pace: time.Millisecond}, ready)
			if err != nil || got.Attempts != 1 || got.Outcomes[c.want] != 1 {
				t.Errorf("%+v, %v; want %q", got, err, c.want)
			}
			if c.kind == "app pings" && c.want == "close 1008" && got.Outcomes["refused RATE_LIMITED"] != 1 {
				t.Errorf("the refusal was not counted: %+v", got)
			}
		})
	}
}

// TestTotal holds that attempts are counted once, over all attackers.
func TestTotal(t *testing.T) {
	addr := serve(t, upgrade(closeFrame(1002)))
	got, err := Run(t.Context(), Spec{Kind: "invalid frames", N: 3, Total: 10, Again: true, Addr: addr}, func() {})
	if err != nil || got.Attempts != 10 || got.Outcomes["close 1002"] != 10 {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := Run(t.Context(), Spec{Kind: "nothing", N: 1}, func() {}); err == nil {
		t.Error("an unknown abuse was begun")
	}
}

// TestBomb holds that the bomb is small, and large when it goes off.
func TestBomb(t *testing.T) {
	if n := len(bomb()); n > 60<<10 {
		t.Errorf("%d bytes: more than a message may have", n)
	}
	f, err := ws.ReadFrame(bytes.NewReader(frame(ws.OpText, true, bomb())))
	if err != nil || !f.Header.Masked || len(f.Payload) != len(bomb()) {
		t.Errorf("%+v, %v", f.Header, err)
	}
}
