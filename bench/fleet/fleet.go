// Package fleet holds very many WebSocket client connections on one event loop, without a
// goroutine or a buffer of its own for each. A load generator that wants more than one core runs
// several processes.
package fleet

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/panjf2000/gnet/v2"
	"github.com/panjf2000/gnet/v2/pkg/logging"
	"golang.org/x/sys/unix"
)

// Handler is what a scenario does with its connections. Every method runs on the loop and must
// not block; slices are valid until it returns.
type Handler interface {
	// Upgraded is called when the handshake is done, before any message.
	Upgraded(c *Conn, now time.Time)
	// Message is called for each text or binary message.
	Message(c *Conn, payload []byte, now time.Time)
	// Turn is called once after the messages of one read, for answers that go out in one write.
	Turn(c *Conn, now time.Time)
	// Closed is called once for each connection that was begun; code is the close frame's, 0
	// where none came. err tells why a connection never opened.
	Closed(c *Conn, code int, err error, now time.Time)
}

// Options describe a fleet.
type Options struct {
	URLs    []string           // ws://host:port/path; user n connects to URLs[n % len]
	Token   func(n int) string // of user n; nil: none. Called by a dialling goroutine
	Sources []netip.Addr       // local addresses, taken in turn; empty: the system's choice
	Dialers int                // connects in flight; 64
	Timeout time.Duration      // of a TCP connect; 10 s
	Handler Handler
}

// Conn is one user's connection. Its fields belong to the loop.
type Conn struct {
	User    int
	Mark    uint64    // the scenario's own
	Begun   time.Time // when the connect was scheduled
	URL     int       // index into Options.URLs
	state   state
	code    uint16
	partial *[]byte // of a fragmented message
	g       gnet.Conn
}

type state uint8

const (
	dialling state = iota
	upgrading
	open
	closed
)

// maxBacklog is how many unsent bytes a connection may hold before it is given up.
const maxBacklog = 4 << 20

// maxMessage is the longest message from a server, in bytes, its fragments together.
const maxMessage = 16 << 20

// maxRefusal is how many bytes of a refused handshake's body are told.
const maxRefusal = 200

// ErrBacklog ends a connection whose server stopped reading.
var ErrBacklog = errors.New("the server does not read: too many unsent bytes")

// Fleet is a set of connections. Start it, then call its methods; those that name the loop may be
// called on it only.
type Fleet struct {
	gnet.BuiltinEventEngine
	opts    Options
	targets []target
	client  *gnet.Client
	loop    gnet.EventLoop
	anchor  net.Conn
	dials   chan *Conn
	dialers sync.WaitGroup
	ctx     context.Context
	cancel  context.CancelFunc
	next    atomic.Uint64
	scratch []byte
	stopped atomic.Bool
}

type target struct{ addr, host, path string }

// New prepares a fleet; Start runs it.
func New(o Options) (*Fleet, error) {
	if o.Dialers == 0 {
		o.Dialers = 64
	}
	if o.Timeout == 0 {
		o.Timeout = 10 * time.Second
	}
	if len(o.URLs) == 0 {
		return nil, errors.New("no URL to connect to")
	}
	f := &Fleet{opts: o, dials: make(chan *Conn, 1<<17)}
	for _, s := range o.URLs {
		u, err := url.Parse(s)
		if err != nil {
			return nil, fmt.Errorf("url %q: %w", s, err)
		}
		if u.Scheme != "ws" || u.Port() == "" {
			return nil, fmt.Errorf("url %q: give ws://HOST:PORT/PATH", s)
		}
		f.targets = append(f.targets, target{addr: u.Host, host: u.Host, path: u.RequestURI()})
	}
	return f, nil
}

// Start runs the loop and the dialling goroutines until Stop.
func (f *Fleet) Start() error {
	f.ctx, f.cancel = context.WithCancel(context.Background())
	client, err := gnet.NewClient(f, gnet.WithNumEventLoop(1), gnet.WithTCPNoDelay(gnet.TCPNoDelay),
		gnet.WithReadBufferCap(64<<10), gnet.WithLogger(quiet{}))
	if err != nil {
		return fmt.Errorf("make the client loop: %w", err)
	}
	if err := client.Start(); err != nil {
		return fmt.Errorf("start the client loop: %w", err)
	}
	f.client = client
	if err := f.findLoop(); err != nil {
		return errors.Join(err, client.Stop())
	}
	for range f.opts.Dialers {
		f.dialers.Go(f.dialAll)
	}
	return nil
}

// findLoop enrols one end of a socket pair, which is how gnet's client gives its loop away.
func (f *Fleet) findLoop() error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return fmt.Errorf("socket pair: %w", err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		file := os.NewFile(uintptr(fd), "anchor")
		ends[i], err = net.FileConn(file)
		_ = file.Close() // FileConn has a copy
		if err != nil {
			return fmt.Errorf("socket pair: %w", err)
		}
	}
	g, err := f.client.EnrollContext(ends[0], nil)
	if err != nil {
		return fmt.Errorf("enrol in the client loop: %w", err)
	}
	f.loop, f.anchor = g.EventLoop(), ends[1]
	return nil
}

// Stop closes every connection and ends the goroutines.
func (f *Fleet) Stop() error {
	f.stopped.Store(true)
	f.cancel()
	f.dialers.Wait()
	err := f.client.Stop()
	if cerr := f.anchor.Close(); err == nil {
		err = cerr
	}
	return err
}

// Do runs fn on the loop. Any goroutine may call it; after Stop nothing happens.
func (f *Fleet) Do(fn func()) {
	if f.stopped.Load() {
		return
	}
	_ = f.loop.Execute(f.ctx, gnet.RunnableFunc(func(context.Context) error {
		fn()
		return nil
	}))
}

// DoWait runs fn on the loop and waits until it has run or the fleet has stopped.
func (f *Fleet) DoWait(fn func()) {
	done := make(chan struct{})
	f.Do(func() { fn(); close(done) })
	select {
	case <-done:
	case <-f.ctx.Done():
	}
}

// Connect begins the connection of user n; the connection's life is told to the Handler. due is
// the time that its connect counts from. It blocks only while 131,072 others wait.
func (f *Fleet) Connect(n int, due time.Time) {
	f.ConnectTo(n, n%len(f.targets), due)
}

// ConnectTo is Connect to a URL of choice.
func (f *Fleet) ConnectTo(n, u int, due time.Time) {
	select {
	case f.dials <- &Conn{User: n, Begun: due, URL: u}:
	case <-f.ctx.Done():
	}
}

func (f *Fleet) dialAll() {
	for {
		select {
		case c := <-f.dials:
			f.dial(c)
		case <-f.ctx.Done():
			return
		}
	}
}

func (f *Fleet) dial(c *Conn) {
	d := net.Dialer{Timeout: f.opts.Timeout, KeepAlive: -1}
	if k := len(f.opts.Sources); k > 0 {
		a := f.opts.Sources[f.next.Add(1)%uint64(k)]
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(a, 0))
		d.Control = latePort
	}
	nc, err := d.DialContext(f.ctx, "tcp", f.targets[c.URL].addr)
	if err == nil {
		_, err = f.client.EnrollContext(nc, c)
	}
	if err != nil && f.ctx.Err() == nil {
		f.Do(func() {
			if c.state != closed {
				c.state = closed
				f.opts.Handler.Closed(c, 0, err, time.Now())
			}
		})
	}
}

// OnOpen sends the upgrade request.
func (f *Fleet) OnOpen(g gnet.Conn) ([]byte, gnet.Action) {
	c, ok := g.Context().(*Conn)
	if !ok {
		return nil, gnet.None
	}
	c.g, c.state = g, upgrading
	t := f.targets[c.URL]
	b := append(f.scratch[:0], "GET "...)
	b = append(b, t.path...)
	b = append(b, " HTTP/1.1\r\nHost: "...)
	b = append(b, t.host...)
	b = append(b, "\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"...)
	if f.opts.Token != nil {
		if tok := f.opts.Token(c.User); tok != "" {
			b = append(b, "Authorization: Bearer "...)
			b = append(b, tok...)
			b = append(b, "\r\n"...)
		}
	}
	b = append(b, "\r\n"...)
	f.scratch = b
	return b, gnet.None
}

// OnClose tells the handler.
func (f *Fleet) OnClose(g gnet.Conn, err error) gnet.Action {
	if c, ok := g.Context().(*Conn); ok && c.state != closed {
		was := c.state
		c.state, c.g, c.partial = closed, nil, nil
		if was != open {
			err = errors.Join(errors.New("closed before the handshake was done"), err)
			b, _ := g.Peek(-1) // none: there is no more to say
			if _, herr := handshake(b, true); herr != nil {
				err = herr
			}
		}
		f.opts.Handler.Closed(c, int(c.code), err, time.Now())
	}
	return gnet.None
}

// OnTraffic reads the frames that have arrived.
func (f *Fleet) OnTraffic(g gnet.Conn) gnet.Action {
	c, ok := g.Context().(*Conn)
	if !ok || c.state == closed {
		return gnet.None
	}
	now := time.Now()
	buf, err := g.Peek(-1)
	if err != nil {
		return gnet.Close
	}
	at := 0
	if c.state == upgrading {
		n, err := handshake(buf, false)
		if err != nil {
			f.fail(c, err, now)
			return gnet.Close
		}
		if n == 0 {
			return gnet.None
		}
		at, c.state = n, open
		f.opts.Handler.Upgraded(c, now)
	}
	n, err := f.frames(c, buf[at:], now)
	if err != nil {
		f.fail(c, err, now)
		return gnet.Close
	}
	if c.state != open {
		return gnet.Close
	}
	if at+n > 0 { // gnet takes 0 for all
		if _, err := g.Discard(at + n); err != nil {
			return gnet.Close
		}
	}
	f.opts.Handler.Turn(c, now)
	return gnet.None
}

// fail ends a connection that has not ended yet: an answer that cannot be written ends it first.
func (f *Fleet) fail(c *Conn, err error, now time.Time) {
	if c.state == closed {
		return
	}
	code := int(c.code)
	c.state, c.partial = closed, nil
	f.opts.Handler.Closed(c, code, err, now)
}

// handshake returns the length of a complete answer that upgrades, 0 while it is incomplete. The
// beginning of a refusal's body is waited for, unless the connection has ended.
func handshake(b []byte, ended bool) (int, error) {
	s := string(b[:min(len(b), 8<<10)])
	end := strings.Index(s, "\r\n\r\n")
	if end < 0 {
		if len(b) > 8<<10 {
			return 0, errors.New("handshake: the answer's head is longer than 8 KiB")
		}
		return 0, nil
	}
	line, _, _ := strings.Cut(s, "\r\n")
	if !strings.HasPrefix(line, "HTTP/1.1 101") {
		body := s[end+4:]
		body = body[:min(len(body), maxRefusal)]
		resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(s)), nil)
		if err == nil && !ended && int64(len(body)) < min(resp.ContentLength, maxRefusal) && len(b) < 8<<10 {
			return 0, nil
		}
		return 0, fmt.Errorf("handshake: %s %s", line, body)
	}
	// The key is RFC 6455's example, section 1.3.
	if !strings.Contains(s[:end], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=") {
		return 0, errors.New("handshake: wrong Sec-WebSocket-Accept")
	}
	return end + 4, nil
}

// frames reads whole frames (RFC 6455, section 5.2) and returns the bytes consumed.
func (f *Fleet) frames(c *Conn, b []byte, now time.Time) (int, error) {
	at := 0
	for len(b)-at >= 2 && c.state == open {
		head, n := 2, int(b[at+1]&0x7f)
		switch n {
		case 126:
			head = 4
			if len(b)-at < head {
				return at, nil
			}
			n = int(b[at+2])<<8 | int(b[at+3])
		case 127:
			head = 10
			if len(b)-at < head {
				return at, nil
			}
			n = 0
			for _, x := range b[at+2 : at+10] {
				n = n<<8 | int(x)
			}
		}
		if b[at]&0x70 != 0 || b[at+1]&0x80 != 0 || n < 0 || n > maxMessage {
			return at, fmt.Errorf("bad frame from the server: header % x", b[at:at+2])
		}
		if len(b)-at < head+n {
			return at, nil
		}
		payload := b[at+head : at+head+n]
		if err := f.frame(c, b[at], payload, now); err != nil {
			return at, err
		}
		at += head + n
	}
	return at, nil
}

func (f *Fleet) frame(c *Conn, b0 byte, payload []byte, now time.Time) error {
	fin, opcode := b0&0x80 != 0, b0&0x0f
	if opcode >= 8 && (!fin || len(payload) > 125) {
		return fmt.Errorf("bad frame from the server: opcode %d in pieces, or of %d bytes", opcode, len(payload))
	}
	switch opcode {
	case 1, 2:
		if c.partial != nil {
			return errors.New("bad frame from the server: a message within a message")
		}
		if !fin {
			p := append([]byte(nil), payload...)
			c.partial = &p
			return nil
		}
		f.opts.Handler.Message(c, payload, now)
	case 0:
		if c.partial == nil {
			return errors.New("bad frame from the server: a continuation of nothing")
		}
		if len(*c.partial)+len(payload) > maxMessage {
			return fmt.Errorf("bad frame from the server: a message of more than %d bytes", maxMessage)
		}
		*c.partial = append(*c.partial, payload...)
		if fin {
			p := *c.partial
			c.partial = nil
			f.opts.Handler.Message(c, p, now)
		}
	case 8:
		code := 1005
		if len(payload) >= 2 {
			code = int(payload[0])<<8 | int(payload[1])
		}
		c.code = uint16(code)
		c.state = closed // first: a write that fails ends the connection too
		f.scratch = appendFrame(f.scratch[:0], 8, payload[:min(len(payload), 2)])
		_, _ = c.g.Write(f.scratch) // the connection ends either way
		f.opts.Handler.Closed(c, code, nil, now)
	case 9:
		f.scratch = appendFrame(f.scratch[:0], 10, payload)
		return f.Write(c, f.scratch)
	case 10:
	default:
		return fmt.Errorf("bad frame from the server: opcode %d", opcode)
	}
	return nil
}

// AppendText appends payload to dst as one masked text frame.
func AppendText(dst, payload []byte) []byte { return appendFrame(dst, 1, payload) }

// mask is the key of every frame: a constant, since it defends no proxy here (RFC 6455, section
// 10.3), and not 0, so that servers do the work of unmasking.
var mask = [4]byte{0x37, 0xfa, 0x21, 0x3d}

func appendFrame(dst []byte, opcode byte, payload []byte) []byte {
	n := len(payload)
	dst = append(dst, 0x80|opcode)
	switch {
	case n < 126:
		dst = append(dst, 0x80|byte(n))
	case n < 1<<16:
		dst = append(dst, 0x80|126, byte(n>>8), byte(n))
	default:
		dst = append(dst, 0x80|127, 0, 0, 0, 0, byte(n>>24), byte(n>>16), byte(n>>8), byte(n))
	}
	dst = append(dst, mask[:]...)
	at := len(dst)
	dst = append(dst, payload...)
	for p := dst[at:]; len(p) > 0; p = p[min(4, len(p)):] {
		for i := range min(4, len(p)) {
			p[i] ^= mask[i]
		}
	}
	return dst
}

// Write sends frames that AppendText made. On the loop only. After an error the connection is
// closed and the Handler told.
func (f *Fleet) Write(c *Conn, frames []byte) error {
	if c.state != open {
		return net.ErrClosed
	}
	if _, err := c.g.Write(frames); err != nil {
		return err // gnet closes it and calls OnClose
	}
	if c.g.OutboundBuffered() > maxBacklog {
		f.Close(c, ErrBacklog)
		return ErrBacklog
	}
	return nil
}

// Open reports whether c may be written to. On the loop only.
func (c *Conn) Open() bool { return c.state == open }

// Close ends a connection without a close frame; the Handler is told. On the loop only.
func (f *Fleet) Close(c *Conn, why error) {
	if c.state == closed || c.g == nil {
		return
	}
	g := c.g
	c.state = closed
	f.opts.Handler.Closed(c, 0, why, time.Now())
	_ = f.loop.Close(g) // nothing is left to tell
}

type quiet struct{ logging.Logger }

func (quiet) Debugf(string, ...any) {}
func (quiet) Infof(string, ...any)  {}
func (quiet) Warnf(string, ...any)  {}
func (quiet) Errorf(string, ...any) {}
func (quiet) Fatalf(string, ...any) {}
