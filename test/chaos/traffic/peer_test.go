package traffic

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/gobwas/ws/wsutil"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testTimeout = 60 * time.Second

// gateway is a server whose connections behave as a test's script says, one script per connection
// in the order of their coming; the last one serves all further ones.
type gateway struct {
	t    *testing.T
	addr string

	mu      sync.Mutex
	scripts []func(p *peer)
	conns   []net.Conn
	wg      sync.WaitGroup
}

// peer is the server's side of a connection. Its methods end the script by panicking with errGone
// when the client is gone.
type peer struct {
	g       *gateway
	conn    net.Conn
	request *http.Request
	writer  http.ResponseWriter
	id      string
}

type errGone struct{ error }

type inbound struct {
	Type      string `json:"type"`
	MessageID string `json:"message_id"`
	Data      struct {
		Seq        int64 `json:"seq"`
		DeliveryID int64 `json:"delivery_id"`
	} `json:"data"`
}

func newGateway(t *testing.T, scripts ...func(p *peer)) *gateway {
	g := &gateway{t: t, scripts: scripts}
	n := 0
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.wg.Add(1)
		defer g.wg.Done()
		g.mu.Lock()
		script := g.scripts[min(n, len(g.scripts)-1)]
		n++
		p := &peer{g: g, request: r, writer: w, id: fmt.Sprintf("s%d", n)}
		g.mu.Unlock()
		defer func() {
			if p.conn != nil {
				_ = p.conn.Close()
			}
			if r := recover(); r != nil {
				if _, gone := r.(errGone); !gone {
					panic(r)
				}
			}
		}()
		script(p)
	}))
	g.addr = strings.TrimPrefix(s.URL, "http://")
	t.Cleanup(func() {
		s.Close()
		g.mu.Lock()
		for _, c := range g.conns {
			_ = c.Close()
		}
		g.mu.Unlock()
		g.wg.Wait()
	})
	return g
}

func (p *peer) must(err error) {
	if err != nil {
		panic(errGone{err})
	}
}

// accept upgrades and sends `connected`.
func (p *peer) accept() {
	conn, _, _, err := ws.UpgradeHTTP(p.request, p.writer)
	p.must(err)
	p.conn = conn
	p.g.mu.Lock()
	p.g.conns = append(p.g.conns, conn)
	p.g.mu.Unlock()
	p.send("connected", `{"gateway_id":"gw","session_id":%q,"heartbeat_ms":30000,"max_message_bytes":65536}`, p.id)
}

func (p *peer) refuse(status int, code string) {
	p.writer.WriteHeader(status)
	fmt.Fprintf(p.writer, `{"success":false,"code":%q}`, code)
}

func (p *peer) send(typ, data string, args ...any) {
	p.raw(fmt.Sprintf(`{"type":%q,"data":%s}`, typ, fmt.Sprintf(data, args...)))
}

func (p *peer) raw(frame string) { p.must(wsutil.WriteServerText(p.conn, []byte(frame))) }

// receive returns the next message; pings are answered unseen.
func (p *peer) receive() inbound {
	for {
		b, err := wsutil.ReadClientText(p.conn)
		p.must(err)
		var m inbound
		if err := json.Unmarshal(b, &m); err != nil {
			p.g.t.Errorf("frame %s: %v", b, err)
		}
		if m.Type != "ping" {
			return m
		}
		p.raw(`{"type":"pong"}`)
	}
}

func (p *peer) success(id string, offset int) {
	p.send("message-ack", `{"client_msg_id":%q,"status":"success","topic":"up","partition":3,"offset":%d}`, id, offset)
}

func (p *peer) failed(id, code string, retry int) {
	p.send("message-ack", `{"client_msg_id":%q,"status":"error","code":%q,"retry_after_ms":%d}`, id, code, retry)
}

func (p *peer) push(id string, delivery, seq int) {
	p.raw(fmt.Sprintf(`{"type":"new-message","message_id":%q,"delivery_id":%d,"data":{"seq":%d}}`, id, delivery, seq))
}

// close sends a close frame and reads until the client is gone.
func (p *peer) close(code int) {
	p.must(ws.WriteFrame(p.conn, ws.NewCloseFrame(ws.NewCloseFrameBody(ws.StatusCode(code), "why"))))
	p.idle()
}

// idle reads until the client is gone.
func (p *peer) idle() {
	b := make([]byte, 1024)
	for {
		if _, err := p.conn.Read(b); err != nil {
			return
		}
	}
}

// serve acknowledges every message.
func serve(p *peer) {
	p.accept()
	for n := 0; ; n++ {
		p.success(p.receive().MessageID, n)
	}
}

// rig is a running client.
type rig struct {
	*Client
	t    *testing.T
	log  *Log
	ctx  context.Context
	done chan struct{} // closed when Run returned
}

func runClient(t *testing.T, o ClientOptions, gateways ...*gateway) *rig {
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	log := &Log{}
	o.User = "u"
	o.Token = func(user string) (string, error) { return "token-of-" + user, nil }
	for _, g := range gateways {
		o.Addrs = append(o.Addrs, g.addr)
	}
	r := &rig{Client: NewClient(o, log, nil), t: t, log: log, ctx: ctx, done: make(chan struct{})}
	go func() {
		defer close(r.done)
		r.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-r.done
	})
	return r
}

// until waits until the log is as wanted and returns it.
func (r *rig) until(what string, ok func(c *ClientLog) bool) *ClientLog {
	r.t.Helper()
	var c ClientLog
	if err := poll(r.ctx, func() error {
		if c = r.log.Snapshot().Clients[0]; ok(&c) {
			return nil
		}
		return fmt.Errorf("no %s: %+v", what, c)
	}); err != nil {
		r.t.Fatal(err)
	}
	return &c
}

func successes(c *ClientLog) int {
	n := 0
	for _, a := range c.Acks {
		if a.Success() {
			n++
		}
	}
	return n
}
