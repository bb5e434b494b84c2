package transport

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/lestrrat-go/jwx/v2/jwt"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"im-gateway/codec"
)

func TestMain(m *testing.M) {
	if os.Getenv(serverProcess) != "" {
		os.Exit(serveAlone())
	}
	goleak.VerifyTestMain(m,
		// gnet's byte-buffer pool and its worker pool live as long as the process.
		goleak.IgnoreAnyFunction("github.com/panjf2000/ants/v2.(*poolCommon).purgeStaleWorkers"),
		goleak.IgnoreAnyFunction("github.com/panjf2000/ants/v2.(*poolCommon).ticktock"))
}

const patience = 60 * time.Second

var secret = []byte("0123456789abcdef0123456789abcdef")

// fakeSink takes what the loops send; offers are refused while full is set.
type fakeSink struct {
	shards  int
	full    atomic.Bool
	events  chan codec.Event
	returns chan *codec.EgressBatch
}

func newFakeSink() *fakeSink {
	return &fakeSink{shards: 2, events: make(chan codec.Event, 1<<16), returns: make(chan *codec.EgressBatch, 1024)}
}

func (f *fakeSink) N() int { return f.shards }

func (f *fakeSink) Offer(_ int, b *codec.IngressBatch) bool {
	if f.full.Load() {
		return false
	}
	for _, e := range b.Events {
		f.events <- e
	}
	b.Release()
	return true
}

func (f *fakeSink) Return(b *codec.EgressBatch) { f.returns <- b }

// next returns the next event of the kind; others are dropped.
func (f *fakeSink) next(t testing.TB, kind codec.EventKind) codec.Event {
	t.Helper()
	late := time.After(patience)
	for {
		select {
		case e := <-f.events:
			if e.Kind == kind {
				return e
			}
		case <-late:
			t.Fatalf("no event of kind %d came", kind)
		}
	}
}

func (f *fakeSink) returned(t testing.TB) *codec.EgressBatch {
	t.Helper()
	select {
	case b := <-f.returns:
		return b
	case <-time.After(patience):
		t.Fatal("the batch did not come back")
		return nil
	}
}

func start(t testing.TB, change func(*Options)) (*Server, *fakeSink) {
	t.Helper()
	sink := newFakeSink()
	v, err := NewVerifier(VerifierOptions{Algorithm: "HS256", Secret: secret})
	if err != nil {
		t.Fatal(err)
	}
	o := Options{
		Addr: "127.0.0.1:0", Loops: 2, GatewayID: "g", Nonce: 7, Sink: sink, Settings: Settings{Verifier: v},
		API: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			fmt.Fprintf(w, "%s %s %s", r.Method, r.URL.Path, body)
		}),
		Logger: zerolog.Nop(), Registerer: prometheus.NewRegistry(),
	}
	if change != nil {
		change(&o)
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Error(err)
		}
		http.DefaultClient.CloseIdleConnections()
	})
	return s, sink
}

func token(t testing.TB, user string, expires time.Duration) string {
	t.Helper()
	tok, err := jwt.NewBuilder().Claim("user_id", user).Expiration(time.Now().Add(expires)).Build()
	if err != nil {
		t.Fatal(err)
	}
	b, err := jwt.Sign(tok, jwt.WithKey(jwa.HS256, secret))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// client is a raw connection.
type client struct {
	t testing.TB
	net.Conn
	r *bufio.Reader
}

func dial(t testing.TB, s *Server) *client {
	t.Helper()
	c, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return &client{t, c, bufio.NewReader(c)}
}

const upgradeLines = "Host: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
	"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"

func (c *client) send(parts ...string) {
	c.t.Helper()
	if _, err := io.WriteString(c.Conn, strings.Join(parts, "")); err != nil {
		c.t.Fatal(err)
	}
}

// answer reads an HTTP answer's head and body.
func (c *client) answer() (*http.Response, string) {
	c.t.Helper()
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return resp, ""
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	_ = resp.Body.Close()
	return resp, string(body)
}

// connect opens a WebSocket session of the user.
func connect(t testing.TB, s *Server, user string) *client {
	t.Helper()
	c := dial(t, s)
	c.send("GET /ws HTTP/1.1\r\n", upgradeLines, "Authorization: Bearer ", token(t, user, time.Hour), "\r\n\r\n")
	if resp, body := c.answer(); resp.StatusCode != 101 {
		t.Fatalf("upgrade: %s %s", resp.Status, body)
	}
	return c
}

// frame builds a masked client frame.
func frame(fin bool, op ws.OpCode, payload string) string {
	f := ws.NewFrame(op, fin, []byte(payload))
	var b bytes.Buffer
	if err := ws.WriteFrame(&b, ws.MaskFrame(f)); err != nil {
		panic(err)
	}
	return b.String()
}

func text(payload string) string { return frame(true, ws.OpText, payload) }

// read returns the next frame.
func (c *client) read() ws.Frame {
	c.t.Helper()
	f, err := ws.ReadFrame(c.r)
	if err != nil {
		c.t.Fatalf("read a frame: %v", err)
	}
	return f
}

// closed reads frames until a close frame and returns its code.
func (c *client) closed() ws.StatusCode {
	c.t.Helper()
	for {
		f := c.read()
		if f.Header.OpCode == ws.OpClose {
			code, _ := ws.ParseCloseFrameData(f.Payload)
			return code
		}
	}
}
