package transport

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/panjf2000/gnet/v2"

	"im-gateway/codec"
)

// Bounds of connections handed to net/http.
const (
	bridgeInput  = 256 << 10 // bytes read from the socket and not by net/http; beyond it: an error to the reader
	bridgeOutput = 64 << 10  // bytes that wait for a slow reader; beyond it: writes wait
	acceptQueue  = 1024      // connections handed over and not taken yet; beyond it: 503
)

// httpFront serves the connections that are no WebSockets by net/http.
type httpFront struct {
	s       *Server
	server  *http.Server
	accepts chan net.Conn
	closed  chan struct{}
	once    sync.Once
}

func newHTTPFront(s *Server) *httpFront {
	f := &httpFront{s: s, accepts: make(chan net.Conn, acceptQueue), closed: make(chan struct{})}
	f.server = &http.Server{
		Handler: f,
		BaseContext: func(net.Listener) context.Context {
			return context.WithValue(context.Background(), forwardingKey{}, &s.rules)
		},
		ReadHeaderTimeout: s.opts.HandshakeTimeout,
		ReadTimeout:       s.opts.HTTPReadTimeout,
		WriteTimeout:      s.opts.HTTPWriteTimeout,
		IdleTimeout:       s.opts.HTTPIdleTimeout,
		ConnState:         noteIdle,
		MaxHeaderBytes:    s.opts.HeadBytes, // net/http adds 4 KiB
		ErrorLog:          log.New(httpLog{s}, "", 0),
	}
	return f
}

// noteIdle lets a connection know whether it waits for its next request.
func noteIdle(c net.Conn, state http.ConnState) {
	if b, ok := c.(*bridge); ok {
		b.idle.Store(state == http.StateIdle)
	}
}

// httpLog carries net/http's complaints, mostly about clients, to our log.
type httpLog struct{ s *Server }

// Write implements io.Writer.
func (h httpLog) Write(p []byte) (int, error) {
	detail := string(bytes.TrimSpace(p))
	if strings.HasPrefix(detail, "http: panic") {
		h.s.metrics.panics.Inc()
		h.s.opts.Logger.Error().Str("detail", detail).Msg("panic in an HTTP handler; its connection is closed")
		return len(p), nil
	}
	h.s.log.Debug().Str("detail", detail).Msg("http")
	return len(p), nil
}

func (f *httpFront) serve() {
	if err := f.server.Serve(f); err != nil && !errors.Is(err, http.ErrServerClosed) {
		f.s.opts.Logger.Error().Err(err).Msg("the HTTP server ended")
	}
}

// stop lets the requests under way end, until ctx does.
func (f *httpFront) stop(ctx context.Context) {
	if err := f.server.Shutdown(ctx); err != nil {
		_ = f.server.Close() // what is left is cut with its connections
	}
}

// Accept implements net.Listener.
func (f *httpFront) Accept() (net.Conn, error) {
	select {
	case c := <-f.accepts:
		return c, nil
	case <-f.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (f *httpFront) Close() error {
	f.once.Do(func() { close(f.closed) })
	return nil
}

// Addr implements net.Listener.
func (f *httpFront) Addr() net.Addr { return f.s.addr }

// ServeHTTP implements http.Handler: an upgrade of /ws, and GET /sse, go back to the event loop.
func (f *httpFront) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case f.s.pressed.Load():
		f.s.metrics.pressed.requests.Inc()
		w.Header().Set("Retry-After", retryAfterShed)
		w.Header().Set("Connection", "close")
		refuseHTTP(w, http.StatusServiceUnavailable, string(codec.Overloaded), "the gateway is short of memory")
	case r.URL.Path == ssePath:
		f.serveStream(w, r)
	case r.URL.Path != wsPath:
		f.s.opts.API.ServeHTTP(w, r)
	case r.Method == http.MethodGet && asksForWebSocket(r):
		f.handBack(w, r)
	case r.Method == http.MethodGet:
		f.s.metrics.handshake.malformed.Inc()
		w.Header().Set("Connection", "Upgrade")
		w.Header().Set("Upgrade", "websocket")
		w.Header().Set("Sec-WebSocket-Version", "13")
		refuseHTTP(w, http.StatusUpgradeRequired, "UPGRADE_REQUIRED", "this is a WebSocket, version 13")
	default:
		f.s.metrics.handshake.malformed.Inc()
		w.Header().Set("Allow", http.MethodGet)
		refuseHTTP(w, http.StatusMethodNotAllowed, "METHOD_NOT_ALLOWED", "only GET opens a WebSocket")
	}
}

func asksForWebSocket(r *http.Request) bool {
	for _, v := range r.Header["Upgrade"] {
		if strings.EqualFold(v, "websocket") {
			return true
		}
	}
	return false
}

func refuseHTTP(w http.ResponseWriter, status int, code, message string) {
	body := failure(code, message)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body) // who has gone needs no answer
}

// handBack returns a connection to its loop with the request's head and what was read behind it.
func (f *httpFront) handBack(w http.ResponseWriter, r *http.Request) {
	hijacker, ok := w.(http.Hijacker)
	if !ok {
		http.Error(w, "this connection cannot be upgraded", http.StatusInternalServerError)
		return
	}
	conn, rw, err := hijacker.Hijack()
	if err != nil {
		f.s.log.Warn().Err(err).Msg("connection not taken back from HTTP")
		return
	}
	b, ok := conn.(*bridge)
	if !ok {
		_ = conn.Close()
		return
	}
	rest, err := buffered(rw.Reader)
	if err != nil {
		_ = conn.Close()
		return
	}
	head := requestHead(r)
	cn := b.cn
	events := r.URL.Path == ssePath
	if !cn.l.executeFor(cn, func() { cn.takeBack(b, head, rest, events) }) {
		_ = conn.Close()
	}
}

func buffered(r *bufio.Reader) ([]byte, error) {
	b, err := r.Peek(r.Buffered())
	return append([]byte(nil), b...), err
}

// requestHead writes a parsed request as it may have stood on the wire, for the one upgrade path.
func requestHead(r *http.Request) []byte {
	var b bytes.Buffer
	b.WriteString(r.Method + " " + r.RequestURI + " " + r.Proto + "\r\nHost: " + r.Host + "\r\n")
	_ = r.Header.Write(&b) // a bytes.Buffer takes everything
	b.WriteString("\r\n")
	return b.Bytes()
}

// handOver gives a connection and its unread bytes to net/http; on the loop.
func (cn *conn) handOver() {
	l := cn.l
	if l.s.http == nil {
		cn.respond(badRequestResponse)
		return
	}
	b := newBridge(cn)
	b.http = true
	if int(l.s.bridged.Load()) >= l.rules.MaxHTTPConnections {
		l.s.metrics.handshake.shed.Inc()
		cn.respond(shedResponse)
		return
	}
	select {
	case l.s.http.accepts <- b:
	default:
		l.s.metrics.handshake.shed.Inc()
		cn.respond(shedResponse)
		return
	}
	l.s.bridged.Add(1)
	l.s.metrics.handovers.Inc()
	cn.finishHead()
	cn.own().bridge = b
	cn.state = stateBridged
	cn.feedBridge()
}

// feedBridge passes input on to net/http; on the loop.
func (cn *conn) feedBridge() {
	b, err := cn.peek()
	if err != nil && len(b) == 0 {
		return
	}
	dropped := cn.bridge.feed(b)
	if err := cn.discard(-1); err != nil || dropped > lingerBytes {
		cn.bridge.hangUp()
		cn.cut()
	}
}

// takeBack makes the connection the loop's again, with the head of a request for a session; on the loop.
func (cn *conn) takeBack(b *bridge, head, rest []byte, events bool) {
	if cn.state != stateBridged || cn.bridge != b {
		return
	}
	more, whole := b.take()
	rest = append(rest, more...)
	b.hangUp()
	cn.own().bridge = nil
	cn.state = stateHead
	if !whole {
		cn.respond(badRequestResponse)
		return
	}
	if len(rest) > 0 {
		cn.assemble().rest = rest
	}
	var h upgradeHead
	h.read(head)
	h.wish.events = events
	cn.upgrade(head, &h, 0)
}

// bridge is the net.Conn by which net/http, or a TLS handshake, reads and writes a connection that its
// loop owns. The loop calls feed, take and hangUp; its user calls the rest.
type bridge struct {
	cn            *conn
	local, remote net.Addr
	wake          chan struct{} // capacity 1: input has come
	gone          chan struct{} // closed by hangUp
	readBy        *bridgeDeadline
	writeBy       *bridgeDeadline
	held          *bridgeWrite // owned by the loop: the Write that waits for a slow reader
	http          bool         // net/http's; else a TLS handshake's
	idle          atomic.Bool  // between two requests

	mu      sync.Mutex
	in      []byte
	dropped int // bytes that came beyond the bound
	ended   bool
}

func newBridge(cn *conn) *bridge {
	return &bridge{cn: cn, local: cn.c.LocalAddr(), remote: cn.remote(), wake: make(chan struct{}, 1),
		gone: make(chan struct{}), readBy: newBridgeDeadline(), writeBy: newBridgeDeadline()}
}

// errOverflow is what a reader gets that lets more than bridgeInput wait.
var errOverflow = errors.New("too much input at once")

// feed takes input in. Beyond its bound the rest is dropped and the reader told so: it may have an
// answer for the peer yet, such as 413. It returns how much was dropped in all.
func (b *bridge) feed(p []byte) (dropped int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.ended:
		return 0
	case b.dropped > 0 || len(b.in)+len(p) > bridgeInput:
		b.dropped += len(p)
		b.cn.l.s.metrics.httpDropped.Add(float64(len(p)))
	default:
		b.in = append(b.in, p...)
	}
	select {
	case b.wake <- struct{}{}:
	default:
	}
	return b.dropped
}

// take returns the input that nobody has read; whole is false when some was dropped.
func (b *bridge) take() (in []byte, whole bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	in, b.in = b.in, nil
	return in, b.dropped == 0
}

// hangUp ends the bridge: what was fed can still be read, writes fail.
func (b *bridge) hangUp() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.ended {
		b.ended = true
		close(b.gone)
		if b.http {
			b.cn.l.s.bridged.Add(-1)
		}
	}
}

// Read implements net.Conn.
func (b *bridge) Read(p []byte) (int, error) {
	for {
		expired := b.readBy.expired()
		select {
		case <-expired:
			return 0, b.late(b.readBy)
		default:
		}
		b.mu.Lock()
		n := copy(p, b.in)
		if b.in = b.in[n:]; len(b.in) == 0 {
			b.in = nil
		}
		ended, overflow := b.ended, b.dropped > 0
		b.mu.Unlock()
		switch {
		case n > 0 || len(p) == 0:
			return n, nil
		case overflow:
			return 0, errOverflow
		case ended:
			return 0, io.EOF
		}
		select {
		case <-b.wake:
		case <-b.gone:
		case <-expired:
			return 0, b.late(b.readBy)
		}
	}
}

// Write implements net.Conn. It returns when the loop has passed the bytes to the kernel or to the
// connection's buffer, whose size is bounded.
func (b *bridge) Write(p []byte) (int, error) {
	expired := b.writeBy.expired()
	select {
	case <-b.gone:
		return 0, net.ErrClosed
	case <-expired:
		return 0, b.late(b.writeBy)
	default:
	}
	cn := b.cn
	w := &bridgeWrite{p: append([]byte(nil), p...), done: make(chan struct{})} // the loop may hold it longer
	if !cn.l.executeFor(cn, func() { cn.writeBridged(b, w) }) {
		return 0, net.ErrClosed
	}
	select {
	case <-w.done:
		return len(p), nil
	case <-b.gone:
		return 0, net.ErrClosed
	case <-expired:
		return 0, b.late(b.writeBy)
	}
}

// late counts what was not done in time and returns the error that says so. net/http sets a deadline
// long past to wake its own reader: nothing is late then.
func (b *bridge) late(by *bridgeDeadline) error {
	if m := b.cn.l.s.metrics; b.http && by.reached() {
		switch {
		case by == b.writeBy:
			m.httpLate.write.Inc()
		case b.idle.Load():
			m.httpLate.idle.Inc()
		default:
			m.httpLate.read.Inc()
		}
	}
	return os.ErrDeadlineExceeded
}

// bridgeWrite is one Write on its way through the loop.
type bridgeWrite struct {
	p    []byte
	done chan struct{} // closed when there is room for the next
}

func (cn *conn) writeBridged(b *bridge, w *bridgeWrite) {
	if cn.bridge != b || cn.state != stateBridged {
		return // b is gone
	}
	cn.write(w.p)
	if cn.state != stateBridged {
		return
	}
	if cn.c.OutboundBuffered() > bridgeOutput {
		b.held = w // until tickBacklog finds room
		return
	}
	close(w.done)
}

// release lets a Write return that waits for room; on the loop.
func (b *bridge) release() {
	if b.held != nil {
		close(b.held.done)
		b.held = nil
	}
}

// Close implements net.Conn: what was written still reaches the peer.
func (b *bridge) Close() error {
	b.hangUp()
	b.readBy.set(time.Time{})
	b.writeBy.set(time.Time{})
	cn := b.cn
	cn.l.executeFor(cn, func() {
		if cn.bridge == b && cn.state == stateBridged {
			cn.own().bridge = nil
			cn.state = stateClosing
			cn.startLinger()
		}
	})
	return nil
}

// LocalAddr implements net.Conn.
func (b *bridge) LocalAddr() net.Addr { return b.local }

// RemoteAddr implements net.Conn.
func (b *bridge) RemoteAddr() net.Addr { return b.remote }

// SetDeadline implements net.Conn.
func (b *bridge) SetDeadline(t time.Time) error {
	b.readBy.set(t)
	b.writeBy.set(t)
	return nil
}

// SetReadDeadline implements net.Conn.
func (b *bridge) SetReadDeadline(t time.Time) error {
	b.readBy.set(t)
	return nil
}

// SetWriteDeadline implements net.Conn.
func (b *bridge) SetWriteDeadline(t time.Time) error {
	b.writeBy.set(t)
	return nil
}

// bridgeDeadline is a deadline that may be moved while somebody waits for it.
type bridgeDeadline struct {
	mu    sync.Mutex
	timer *time.Timer
	over  chan struct{} // closed when the deadline has passed
	ahead bool          // it was not past when it was set
}

func newBridgeDeadline() *bridgeDeadline { return &bridgeDeadline{over: make(chan struct{})} }

func (d *bridgeDeadline) expired() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.over
}

// reached tells, once, whether the deadline passed with time.
func (d *bridgeDeadline) reached() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	was := d.ahead
	d.ahead = false
	return was
}

func (d *bridgeDeadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil && !d.timer.Stop() {
		<-d.over // the timer's function is about to close it
	}
	d.timer = nil
	select {
	case <-d.over:
		d.over = make(chan struct{})
	default:
	}
	d.ahead = false
	if t.IsZero() {
		return
	}
	over := d.over
	if left := time.Until(t); left > 0 {
		d.ahead = true
		d.timer = time.AfterFunc(left, func() { close(over) })
		return
	}
	close(over)
}

var (
	_ net.Conn          = (*bridge)(nil)
	_ net.Listener      = (*httpFront)(nil)
	_ gnet.Runnable     = (*egressTask)(nil)
	_ gnet.EventHandler = (*Server)(nil)
)
