package client

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"im-gateway/codec/clientpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 60 * time.Second // a deadline for what should happen soon

// gateway is a server whose every connection runs a script.
type gateway struct {
	*httptest.Server
	script func(n int, p *peer)                                     // of the nth connection, from 1
	refuse func(n int, w http.ResponseWriter, r *http.Request) bool // answers instead of upgrading

	only string // the one subprotocol; empty: both

	mu       sync.Mutex
	n        int
	accepted []string // ids, in the order of acceptance
	running  sync.WaitGroup
}

func newGateway(t *testing.T, script func(n int, p *peer)) *gateway {
	g := &gateway{script: script}
	g.Server = httptest.NewServer(http.HandlerFunc(g.serve))
	t.Cleanup(func() {
		g.Close()
		g.running.Wait()
	})
	return g
}

func (g *gateway) url() string { return "ws" + strings.TrimPrefix(g.URL, "http") + "/ws" }

func (g *gateway) serve(w http.ResponseWriter, r *http.Request) {
	g.running.Add(1)
	defer g.running.Done()
	g.mu.Lock()
	g.n++
	n := g.n
	g.mu.Unlock()
	if g.refuse != nil && g.refuse(n, w, r) {
		return
	}
	h := &hijacker{ResponseWriter: w}
	speaks := []string{JSON.subprotocol(), Protobuf.subprotocol()}
	if g.only != "" {
		speaks = []string{g.only}
	}
	ws, err := websocket.Accept(h, r, &websocket.AcceptOptions{Subprotocols: speaks})
	if err != nil {
		return
	}
	defer ws.CloseNow()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	g.script(n, &peer{g: g, ctx: ctx, ws: ws, raw: h.conn, r: r})
}

func (g *gateway) order() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.accepted)
}

func (g *gateway) connections() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.n
}

type hijacker struct {
	http.ResponseWriter
	conn net.Conn
}

func (h *hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := h.ResponseWriter.(http.Hijacker).Hijack()
	h.conn = c
	return c, rw, err
}

// peer is the server's end of one connection. Its errors are ignored: the client may be gone.
type peer struct {
	g   *gateway
	ctx context.Context
	ws  *websocket.Conn
	raw net.Conn
	r   *http.Request
}

// send writes a frame that is given as JSON, in the connection's format.
func (p *peer) send(format string, args ...any) {
	b := fmt.Appendf(nil, format, args...)
	if !p.protobuf() {
		_ = p.ws.Write(p.ctx, websocket.MessageText, b)
		return
	}
	var f frame
	if err := json.Unmarshal(b, &f); err != nil {
		panic(err)
	}
	b, err := proto.Marshal(&clientpb.ServerFrame{
		Type: f.Type, MessageId: f.MessageID, Data: f.Data, Timestamp: f.Timestamp, DeliveryId: f.DeliveryID})
	if err != nil {
		panic(err)
	}
	_ = p.ws.Write(p.ctx, websocket.MessageBinary, b)
}

func (p *peer) protobuf() bool { return p.ws.Subprotocol() == Protobuf.subprotocol() }

func (p *peer) hello() { p.helloEvery(30_000) }

func (p *peer) helloEvery(heartbeatMs int) {
	p.send(`{"type":"connected","data":{"gateway_id":"gw","session_id":"s%d","heartbeat_ms":%d,"max_message_bytes":1000}}`,
		p.g.connections(), heartbeatMs)
}

// next is the client's next frame; false when the connection has ended.
func (p *peer) next() (frame, bool) {
	kind, b, err := p.ws.Read(p.ctx)
	if err != nil {
		return frame{}, false
	}
	if p.protobuf() != (kind == websocket.MessageBinary) {
		panic("a message of the wrong kind")
	}
	var f frame
	if p.protobuf() {
		var c clientpb.ClientFrame
		if err := proto.Unmarshal(b, &c); err != nil {
			panic(err)
		}
		return frame{Type: c.Type, MessageID: c.MessageId, Data: c.Data, Timestamp: c.Timestamp}, true
	}
	if err := json.Unmarshal(b, &f); err != nil {
		panic(err)
	}
	return f, true
}

// nextAck is the next delivery that is acknowledged; nothing else may come.
func (p *peer) nextAck() (uint64, bool) {
	f, ok := p.next()
	if !ok {
		return 0, false
	}
	var d struct {
		ID uint64 `json:"delivery_id"`
	}
	if err := json.Unmarshal(f.Data, &d); err != nil || f.Type != typeDeliveryAck {
		panic(fmt.Sprintf("%s %s, %v", f.Type, f.Data, err))
	}
	return d.ID, true
}

func (p *peer) accept(id string) {
	p.g.mu.Lock()
	p.g.accepted = append(p.g.accepted, id)
	offset := len(p.g.accepted)
	p.g.mu.Unlock()
	p.send(`{"type":"message-ack","data":{"client_msg_id":%q,"status":"success","messageId":"m-%s","topic":"up","partition":3,"offset":%d}}`, id, id, offset)
}

func (p *peer) answer(id, code string, retryAfterMs int) {
	p.send(`{"type":"message-ack","data":{"client_msg_id":%q,"status":"error","code":%q,"retry_after_ms":%d}}`, id, code, retryAfterMs)
}

// acceptAll accepts until the connection ends.
func (p *peer) acceptAll() {
	for f, ok := p.next(); ok; f, ok = p.next() {
		p.accept(f.MessageID)
	}
}

func (p *peer) close(code int) { _ = p.ws.Close(websocket.StatusCode(code), "why") }

// running is a client whose Run goes on until the test ends.
type running struct {
	*Client
	stop   context.CancelFunc
	result chan error // of Run
	states chan State // those of Run so far; the test must not make more than fit
}

func token(context.Context, TokenReason) (string, error) { return "t", nil }

// formats runs a test in each format.
func formats(t *testing.T, f func(t *testing.T, format Format)) {
	for _, format := range []Format{JSON, Protobuf} {
		t.Run(format.subprotocol(), func(t *testing.T) { f(t, format) })
	}
}

func start(t *testing.T, o Options) *running {
	t.Helper()
	r := &running{result: make(chan error, 1), states: make(chan State, 1000)}
	if o.Token == nil {
		o.Token = token
	}
	o.OnState = func(s State) { r.states <- s }
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	r.Client = c
	ctx, cancel := context.WithCancel(context.Background())
	r.stop = cancel
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.result <- c.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return r
}

func (r *running) await(t *testing.T, p Phase) State {
	t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case s := <-r.states:
			if s.Phase == p {
				return s
			}
		case <-deadline:
			t.Fatalf("never %s", p)
		}
	}
}

func (r *running) ended(t *testing.T) error {
	t.Helper()
	select {
	case err := <-r.result:
		return err
	case <-time.After(patience):
		t.Fatal("Run did not return")
		return nil
	}
}

func (r *running) send(t *testing.T, ids ...string) []*Pending {
	t.Helper()
	var ps []*Pending
	for _, id := range ids {
		p, err := r.Send(Envelope{Type: "send-message", ID: id, Data: json.RawMessage(`{}`)})
		if err != nil {
			t.Fatal(err)
		}
		ps = append(ps, p)
	}
	return ps
}

func wait(t *testing.T, p *Pending) (Receipt, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r, err := p.Wait(ctx)
	if ctx.Err() != nil {
		t.Fatalf("message %s was never settled", p.Envelope.ID)
	}
	return r, err
}

func stored(t *testing.T, ps []*Pending) {
	t.Helper()
	for _, p := range ps {
		if _, err := wait(t, p); err != nil {
			t.Fatalf("message %s: %v", p.Envelope.ID, err)
		}
	}
}

func ids(from, to int) []string {
	var s []string
	for i := from; i <= to; i++ {
		s = append(s, fmt.Sprintf("m%d", i))
	}
	return s
}

func equal(t *testing.T, what string, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Fatalf("%s: got %v, want %v", what, got, want)
	}
}
