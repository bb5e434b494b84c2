package fleet

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// gnet's pool of goroutines is the process's and has no end.
		goleak.IgnoreAnyFunction("github.com/panjf2000/ants/v2.(*poolCommon).purgeStaleWorkers"),
		goleak.IgnoreAnyFunction("github.com/panjf2000/ants/v2.(*poolCommon).ticktock"))
}

// recorder keeps what a fleet tells. turn may be set to answer.
type recorder struct {
	mu       sync.Mutex
	up       map[int]*Conn
	messages []string
	closed   []string
	upgraded func(c *Conn)
}

func (r *recorder) Upgraded(c *Conn, _ time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.up == nil {
		r.up = map[int]*Conn{}
	}
	r.up[c.User] = c
	if r.upgraded != nil {
		r.upgraded(c)
	}
}

func (r *recorder) Message(_ *Conn, payload []byte, _ time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.messages = append(r.messages, string(payload))
}

func (r *recorder) Turn(*Conn, time.Time) {}

func (r *recorder) Closed(c *Conn, code int, err error, _ time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = append(r.closed, fmt.Sprintf("%d: %d %v", c.User, code, err))
}

func (r *recorder) await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		r.mu.Lock()
		done := ok()
		r.mu.Unlock()
		if done {
			return
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	t.Fatalf("waited for %s: %d up, %d messages, closed %q", what, len(r.up), len(r.messages), r.closed)
}

func start(t *testing.T, o Options) *Fleet {
	t.Helper()
	f, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Stop(); err != nil {
			t.Error(err)
		}
	})
	return f
}

func wsURL(srv *httptest.Server) string { return "ws" + strings.TrimPrefix(srv.URL, "http") + "/ws" }

// echoServer echoes every message by a WebSocket library that is not ours.
func echoServer(t *testing.T) *httptest.Server {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer conn.CloseNow() //nolint:errcheck // the client may be gone
		conn.SetReadLimit(1 << 20)
		for {
			kind, b, err := conn.Read(r.Context())
			if err != nil {
				return
			}
			if string(b) == "ping me" {
				go conn.Read(r.Context()) //nolint:errcheck // it takes the pong
				if err := conn.Ping(r.Context()); err != nil {
					return
				}
				b = []byte("ponged")
			}
			if string(b) == "close me" {
				_ = conn.Close(4002, "as asked")
				return
			}
			if err := conn.Write(r.Context(), kind, b); err != nil {
				return
			}
		}
	}))
	t.Cleanup(srv.Close)
	return srv
}

func TestEcho(t *testing.T) {
	r := &recorder{}
	f := start(t, Options{URLs: []string{wsURL(echoServer(t))}, Handler: r})
	f.Connect(0, time.Now())
	r.await(t, "the upgrade", func() bool { return len(r.up) == 1 })
	var want []string
	for _, n := range []int{0, 1, 125, 126, 65535, 65536, 300_000} {
		want = append(want, strings.Repeat("é", n/2)+strings.Repeat("x", n%2))
	}
	f.DoWait(func() {
		for _, s := range want {
			if err := f.Write(r.up[0], AppendText(nil, []byte(s))); err != nil {
				t.Error(err)
			}
		}
	})
	r.await(t, "the echoes", func() bool { return len(r.messages) == len(want) })
	for i, s := range want {
		if r.messages[i] != s {
			t.Errorf("message %d of %d bytes came back as %d bytes", i, len(s), len(r.messages[i]))
		}
	}
	f.DoWait(func() { _ = f.Write(r.up[0], AppendText(nil, []byte("ping me"))) })
	r.await(t, "the pong's effect", func() bool { return r.messages[len(r.messages)-1] == "ponged" })
}

func TestCloseCode(t *testing.T) {
	r := &recorder{}
	f := start(t, Options{URLs: []string{wsURL(echoServer(t))}, Handler: r})
	f.Connect(3, time.Now())
	r.await(t, "the upgrade", func() bool { return len(r.up) == 1 })
	f.DoWait(func() { _ = f.Write(r.up[3], AppendText(nil, []byte("close me"))) })
	r.await(t, "the close", func() bool { return len(r.closed) > 0 })
	time.Sleep(20 * time.Millisecond) // a second word would come now
	r.await(t, "one close", func() bool { return len(r.closed) == 1 && r.closed[0] == "3: 4002 <nil>" })
	f.DoWait(func() {
		if err := f.Write(r.up[3], AppendText(nil, []byte("x"))); !errors.Is(err, net.ErrClosed) {
			t.Errorf("a write after the close: %v", err)
		}
	})
}

// rawServer speaks to one connection after its upgrade.
func rawServer(t *testing.T, talk func(c net.Conn)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var done sync.WaitGroup
	done.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			done.Go(func() {
				defer c.Close() //nolint:errcheck // the test's end
				buf := make([]byte, 4096)
				n := 0
				for !bytes.Contains(buf[:n], []byte("\r\n\r\n")) {
					k, err := c.Read(buf[n:])
					if err != nil {
						return
					}
					n += k
				}
				talk(c)
			})
		}
	})
	t.Cleanup(func() { _ = ln.Close(); done.Wait() })
	return "ws://" + ln.Addr().String() + "/"
}

const switching = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"

// Everything byte by byte: the head, a fragmented message with a ping in its middle, the close.
func TestSplitAtEveryByte(t *testing.T) {
	stream := switching + "\x81\x01a" + "\x01\x03bcd" + "\x89\x02hi" + "\x00\x00" + "\x80\x01e" + "\x82\x7e\x00\x80" + strings.Repeat("z", 128) + "\x88\x02\x0f\xa0"
	pong := make(chan []byte, 1)
	u := rawServer(t, func(c net.Conn) {
		for i := range len(stream) {
			if _, err := c.Write([]byte{stream[i]}); err != nil {
				return
			}
			runtime.Gosched()
		}
		b, _ := io.ReadAll(c)
		pong <- b
	})
	r := &recorder{}
	f := start(t, Options{URLs: []string{u}, Handler: r})
	f.Connect(0, time.Now())
	r.await(t, "the close", func() bool { return len(r.closed) == 1 })
	if want := []string{"a", "bcde", strings.Repeat("z", 128)}; fmt.Sprint(r.messages) != fmt.Sprint(want) || r.closed[0] != "0: 4000 <nil>" {
		t.Errorf("messages %q, closed %q", r.messages, r.closed)
	}
	b := <-pong
	if len(b) < 8 || b[0] != 0x8a || b[1] != 0x82 || b[6]^mask[0] != 'h' || b[7]^mask[1] != 'i' {
		t.Errorf("the answer to the ping and the close: % x", b)
	}
}

func TestBadServers(t *testing.T) {
	for want, stream := range map[string]string{
		"401":                       "HTTP/1.1 401 Unauthorized\r\nContent-Length: 11\r\n\r\nAUTH_FAILED",
		"AUTH_FAILED":               "HTTP/1.1 401 Unauthorized\r\nContent-Length: 11\r\n\r\nAUTH_FAILED",
		"Sec-WebSocket-Accept":      strings.Replace(switching, "s3pP", "xxxx", 1),
		"longer than 8 KiB":         "HTTP/1.1 101 x\r\n" + strings.Repeat("a: b\r\n", 2000),
		"bad frame":                 switching + "\xf1\x00",
		"bad frame from the server": switching + "\x81\x81aaaab",
		"opcode 3":                  switching + "\x83\x00",
		"of nothing":                switching + "\x80\x01a",
		"before the handshake":      "",
	} {
		t.Run(want, func(t *testing.T) {
			u := rawServer(t, func(c net.Conn) {
				_, _ = io.WriteString(c, stream)
				if stream != "" {
					_, _ = io.Copy(io.Discard, c)
				}
			})
			r := &recorder{}
			f := start(t, Options{URLs: []string{u}, Handler: r})
			f.Connect(0, time.Now())
			r.await(t, "the end", func() bool { return len(r.closed) == 1 })
			if !strings.Contains(r.closed[0], want) {
				t.Errorf("%q says nothing of %q", r.closed[0], want)
			}
		})
	}
}

func TestServerThatNeverReads(t *testing.T) {
	stop := make(chan struct{})
	u := rawServer(t, func(c net.Conn) {
		_, _ = io.WriteString(c, switching)
		<-stop
	})
	defer close(stop)
	r := &recorder{}
	f := start(t, Options{URLs: []string{u}, Handler: r})
	f.Connect(0, time.Now())
	r.await(t, "the upgrade", func() bool { return len(r.up) == 1 })
	frame := AppendText(nil, bytes.Repeat([]byte("x"), 60_000))
	for range 1000 {
		var err error
		c := r.up[0]
		f.DoWait(func() { err = f.Write(c, frame) })
		if err != nil {
			break
		}
	}
	r.await(t, "the end", func() bool { return len(r.closed) == 1 && strings.Contains(r.closed[0], ErrBacklog.Error()) })
}

func TestNobodyListens(t *testing.T) {
	r := &recorder{}
	f := start(t, Options{URLs: []string{"ws://127.0.0.1:1/"}, Handler: r})
	f.Connect(0, time.Now())
	r.await(t, "the refusal", func() bool { return len(r.closed) == 1 && strings.Contains(r.closed[0], "refused") })
	for _, bad := range []string{"http://127.0.0.1:1/", "ws://127.0.0.1/", "::"} {
		if _, err := New(Options{URLs: []string{bad}}); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	if _, err := New(Options{}); err == nil {
		t.Error("no URL was taken")
	}
}

// Connections cost neither goroutines nor much memory, and come from the addresses given.
func TestManyConnections(t *testing.T) {
	const many = 2000
	var mu sync.Mutex
	from := map[string]int{}
	var conns []net.Conn
	u := rawServer(t, func(c net.Conn) {
		_, _ = io.WriteString(c, switching)
		mu.Lock()
		defer mu.Unlock()
		host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
		from[host]++
		conns = append(conns, c)
		// The server's side stays open without a goroutine of ours: the file descriptor is kept.
		if tc, ok := c.(*net.TCPConn); ok {
			file, err := tc.File()
			if err == nil {
				t.Cleanup(func() { _ = file.Close() })
			}
		}
	})
	r := &recorder{}
	sources := []netip.Addr{netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("127.0.0.3")}
	f := start(t, Options{URLs: []string{u}, Handler: r, Sources: sources})
	goroutines := runtime.NumGoroutine()
	before := liveHeap()
	for n := range many {
		f.Connect(n, time.Now())
	}
	r.await(t, "all", func() bool { return len(r.up) == many })
	mu.Lock()
	conns = nil
	mu.Unlock()
	if n := runtime.NumGoroutine(); n > goroutines+100 { // some of the server's end only now
		t.Errorf("%d goroutines, %d before", n, goroutines)
	}
	// The server's half is in this process too, and so are the records of the test.
	if per := float64(liveHeap()-before) / many; per > 2048 {
		t.Errorf("%.0f bytes of heap a connection", per)
	}
	mu.Lock()
	defer mu.Unlock()
	if from["127.0.0.2"] != many/2 || from["127.0.0.3"] != many/2 {
		t.Errorf("connections came from %v", from)
	}
}

func liveHeap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// Stop with connects under way ends everything; goleak looks.
func TestStopWhileConnecting(t *testing.T) {
	srv := echoServer(t)
	f, err := New(Options{URLs: []string{wsURL(srv)}, Handler: &recorder{}})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Start(); err != nil {
		t.Fatal(err)
	}
	for n := range 200 {
		f.Connect(n, time.Now())
	}
	if err := f.Stop(); err != nil {
		t.Error(err)
	}
	f.Do(func() { t.Error("ran after Stop") })
	f.DoWait(func() {})
}
