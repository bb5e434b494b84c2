// Package attack is the abusive side of the abuse suite. One process runs all attackers of a row, each a
// goroutine with one raw connection and small buffers, and counts what each attempt came to: the status,
// the close code, or the lack of either.
package attack

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/gobwas/ws"
	"golang.org/x/sys/unix"
)

// Spec describes the attackers of one process. It is sent to it as JSON.
type Spec struct {
	Kind   string // a key of kinds
	N      int    // attackers at once
	Addr   string // the gateway's
	Tokens []string
	// Again: an attacker whose attempt has ended begins the next one, after Rest.
	Again bool
	Rest  time.Duration
	// Total is the bound of all attempts; 0: none.
	Total int
	// Pace is the time between two writes of an attacker.
	Pace time.Duration
	// From is where attackers come from: each from an address of its own (the default), or all from
	// OneAddress, or each from an address of OneSubnet.
	From string
}

// Values of Spec.From.
const (
	OneAddress = "one address"
	OneSubnet  = "one subnet"
)

// Result is what the attempts came to: "HTTP 431", "close 1002", "refused RATE_LIMITED", "reset", ...
type Result struct {
	Attempts int
	Seconds  float64
	Outcomes map[string]int
}

// The outcomes without a code.
const (
	stillOpen   = "open at the end"
	reset       = "reset"
	ended       = "ended without a code"
	vanished    = "vanished"
	unreachable = "not connected"
)

// dials is how many connects are under way at once; more overflow the listener's backlog.
const dials = 64

type run struct {
	spec     Spec
	begin    time.Time
	attempts atomic.Int64
	ready    sync.WaitGroup // attackers whose first attempt has not got far
	dialling chan struct{}

	mu       sync.Mutex
	outcomes map[string]int
}

// attacker is one goroutine.
type attacker struct {
	*run
	i, attempt int // attempt counts those of all
	once       sync.Once
}

// begun says that the first attempt has got as far as it is meant to.
func (a *attacker) begun() { a.once.Do(a.ready.Done) }

func (r *run) count(outcome string) {
	r.mu.Lock()
	r.outcomes[outcome]++
	r.mu.Unlock()
}

// Run attacks until ctx ends or the attempts are used up. ready is called when every attacker has got as
// far as it is meant to, or has failed to.
func Run(ctx context.Context, spec Spec, ready func()) (Result, error) {
	attempt, ok := kinds[spec.Kind]
	if !ok {
		return Result{}, fmt.Errorf("no abuse is called %q", spec.Kind)
	}
	r := &run{spec: spec, begin: time.Now(), dialling: make(chan struct{}, dials), outcomes: map[string]int{}}
	var wg sync.WaitGroup
	r.ready.Add(spec.N)
	for i := range spec.N {
		a := &attacker{run: r, i: i}
		wg.Go(func() {
			defer a.begun()
			for ctx.Err() == nil {
				n := int(r.attempts.Add(1))
				if spec.Total > 0 && n > spec.Total {
					r.attempts.Add(-1)
					return
				}
				a.attempt = n - 1
				if outcome := attempt(ctx, a); outcome != "" {
					r.count(outcome)
				}
				a.begun()
				if !spec.Again {
					return
				}
				wait(ctx, spec.Rest)
			}
		})
	}
	wg.Go(func() { r.ready.Wait(); ready() })
	wg.Wait()
	return Result{Attempts: int(r.attempts.Load()), Seconds: time.Since(r.begin).Seconds(), Outcomes: maps.Clone(r.outcomes)}, nil
}

func wait(ctx context.Context, d time.Duration) {
	if d == 0 {
		return
	}
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// source is the address that an attacker comes from.
func (a *attacker) source() netip.Addr {
	switch a.spec.From {
	case OneAddress:
		return netip.AddrFrom4([4]byte{127, 3, 3, 3})
	case OneSubnet:
		return netip.AddrFrom4([4]byte{127, 4, 4, byte(a.i%250 + 1)})
	}
	return netip.AddrFrom4([4]byte{127, 5, byte(a.i / 250 % 250), byte(a.i%250 + 1)})
}

// segment is the largest TCP segment, that of an Ethernet: with loopback's own of 64 KiB the kernel would
// take megabytes for each connection that does not read.
const segment = 1460

// dialer leaves the choice of the local port to connect(2), so that each address has all ports.
func (a *attacker) dialer(receive int) *net.Dialer {
	return &net.Dialer{
		Timeout: 10 * time.Second, KeepAlive: -1,
		LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(a.source(), 0)),
		Control: func(_, _ string, rc syscall.RawConn) error {
			var err error
			if cerr := rc.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
				if err == nil {
					err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG, segment)
				}
				if err == nil && receive > 0 {
					err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, receive)
				}
			}); cerr != nil {
				return cerr
			}
			return err
		},
	}
}

// conn is one connection, cut when the attack ends.
type conn struct {
	*net.TCPConn
	a        *attacker
	ctx      context.Context
	r        *bufio.Reader
	detach   func() bool
	upgraded bool
	text     func(payload []byte) // called with each text message; nil: none
}

// dial connects, with a receive buffer of so many bytes (0: the system's). No connection: outcome says why.
func (a *attacker) dial(ctx context.Context, receive int) (c *conn, outcome string) {
	select {
	case a.dialling <- struct{}{}:
		defer func() { <-a.dialling }()
	case <-ctx.Done():
		return nil, ""
	}
	nc, err := a.dialer(receive).DialContext(ctx, "tcp", a.spec.Addr)
	if err != nil {
		return nil, outcomeOf(ctx, err, unreachable)
	}
	tcp, ok := nc.(*net.TCPConn)
	if !ok {
		return nil, unreachable
	}
	_ = tcp.SetLinger(0) // a reset frees both ends' ports at once
	c = &conn{TCPConn: tcp, a: a, ctx: ctx, r: bufio.NewReaderSize(tcp, 512)}
	c.detach = context.AfterFunc(ctx, func() { _ = tcp.SetDeadline(time.Unix(1, 0)) })
	return c, ""
}

// hangUp ends a connection.
func (c *conn) hangUp() {
	c.detach()
	_ = c.Close()
}

// outcomeOf names what a failed call on a connection means.
func outcomeOf(ctx context.Context, err error, other string) string {
	switch {
	case ctx.Err() != nil, errors.Is(err, os.ErrDeadlineExceeded):
		return stillOpen
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return ended
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return reset
	}
	return other
}

const key = "dGhlIHNhbXBsZSBub25jZQ==" // RFC 6455, section 1.3

// head is an upgrade request without its last line.
func (a *attacker) head(more string) string {
	h := "GET /ws HTTP/1.1\r\nHost: gateway\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + key + "\r\n"
	return h + "Authorization: Bearer " + a.token() + "\r\n" + more
}

func (a *attacker) token() string {
	if len(a.spec.Tokens) == 0 {
		return "none"
	}
	return a.spec.Tokens[a.i%len(a.spec.Tokens)]
}

// open connects and upgrades; no connection: outcome says why.
func (a *attacker) open(ctx context.Context, receive int, more string) (c *conn, outcome string) {
	if c, outcome = a.dial(ctx, receive); c == nil {
		return nil, outcome
	}
	_, err := c.Write([]byte(a.head(more) + "\r\n"))
	if err == nil {
		if outcome = c.response(); outcome == "HTTP 101" {
			c.upgraded = true
			return c, ""
		}
	} else {
		outcome = outcomeOf(ctx, err, reset)
	}
	c.hangUp()
	return nil, outcome
}

// response reads an answer's head and says its status.
func (c *conn) response() string {
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return outcomeOf(c.ctx, err, "unreadable answer")
	}
	return fmt.Sprintf("HTTP %d", resp.StatusCode)
}

// outcome reads until the connection has come to something.
func (c *conn) outcome() string {
	if !c.upgraded {
		return c.response()
	}
	var small [125]byte
	for {
		h, err := ws.ReadHeader(c.r)
		if err != nil {
			return outcomeOf(c.ctx, err, "unreadable frame")
		}
		switch {
		case h.OpCode == ws.OpClose && h.Length >= 2 && h.Length <= 125:
			if _, err := io.ReadFull(c.r, small[:h.Length]); err != nil {
				return outcomeOf(c.ctx, err, "unreadable frame")
			}
			return fmt.Sprintf("close %d", int(small[0])<<8|int(small[1]))
		case h.OpCode == ws.OpText && c.text != nil && h.Length <= 64<<10:
			b := make([]byte, h.Length)
			if _, err := io.ReadFull(c.r, b); err != nil {
				return outcomeOf(c.ctx, err, "unreadable frame")
			}
			c.text(b)
		default:
			if _, err := io.CopyN(io.Discard, c.r, h.Length); err != nil {
				return outcomeOf(c.ctx, err, "unreadable frame")
			}
		}
	}
}

// streamOutcome reads an event stream until the event that closes it, or its end.
func (c *conn) streamOutcome() string {
	closing := false
	for {
		line, err := c.r.ReadSlice('\n')
		switch {
		case err != nil && !errors.Is(err, bufio.ErrBufferFull): // of a long line the rest comes next
			return outcomeOf(c.ctx, err, "unreadable stream")
		case bytes.HasPrefix(line, []byte("event: close")):
			closing = true
		case closing:
			if _, code, ok := bytes.Cut(line, []byte(`"code":`)); ok {
				return "close " + string(code[:min(4, len(code))])
			}
		}
	}
}

// press writes chunk after chunk at the spec's pace while it reads, until the connection has come to
// something. chunk returns nil when there is no more to write.
func (c *conn) press(chunk func() []byte) string {
	stop := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() {
		tick := time.NewTicker(max(c.a.spec.Pace, time.Millisecond))
		defer tick.Stop()
		for b := chunk(); b != nil; b = chunk() {
			if _, err := c.Write(b); err != nil {
				return // the reader says what became of it
			}
			c.a.begun()
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	})
	outcome := c.outcome()
	close(stop)
	c.hangUp()
	writer.Wait()
	return outcome
}

// frame is a masked frame.
func frame(op ws.OpCode, fin bool, payload []byte) []byte {
	f := ws.MaskFrameWith(ws.NewFrame(op, fin, payload), [4]byte{0x37, 0xfa, 0x21, 0x3d})
	b, err := ws.CompileFrame(f)
	if err != nil {
		panic(err) // it writes to memory
	}
	return b
}

func text(s string) []byte { return frame(ws.OpText, true, []byte(s)) }

// Known tells whether there is an abuse of that kind.
func Known(kind string) bool { return kinds[kind] != nil }
