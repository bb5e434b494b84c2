package traffic

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/coder/websocket"
	"github.com/gobwas/ws"
)

// Seen is what an odd client saw.
type Seen struct {
	Accepted  int            // handshakes
	Refused   map[string]int // handshakes by HTTP status, messages by code, dials that failed as "dial"
	Bytes     int64          // read after the handshake
	Frames    int
	CloseCode int // the last one; 0: still open; -1: it ended without a close frame
	Err       string
}

// Odd is the handle of a misbehaving client. Its methods may be called from any goroutine.
type Odd struct {
	mu   sync.Mutex
	seen Seen
	conn net.Conn // nil when the handshake was refused
	rest *bufio.Reader
	stop context.CancelFunc
	wg   sync.WaitGroup
}

// Seen copies what was seen until now.
func (o *Odd) Seen() Seen {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := o.seen
	s.Refused = make(map[string]int, len(o.seen.Refused))
	for k, n := range o.seen.Refused {
		s.Refused[k] = n
	}
	return s
}

// Close ends the client and waits for it.
func (o *Odd) Close() {
	o.stop()
	if o.conn != nil {
		_ = o.conn.Close()
	}
	o.wg.Wait()
}

func (o *Odd) update(f func(*Seen)) {
	o.mu.Lock()
	f(&o.seen)
	o.mu.Unlock()
}

// dialOdd upgrades over a plain connection with the smallest receive buffer the system grants when
// small. A refused handshake is in Seen, not an error.
func dialOdd(ctx context.Context, addr, token string, small bool) (*Odd, error) {
	o := &Odd{seen: Seen{Refused: make(map[string]int)}, stop: func() {}}
	d := ws.Dialer{
		Timeout: dialTimeout,
		Header:  ws.HandshakeHeaderHTTP(http.Header{"Authorization": {"Bearer " + token}}),
		NetDial: func(ctx context.Context, network, addr string) (net.Conn, error) {
			var nd net.Dialer
			if small {
				nd.Control = smallBuffer
			}
			return nd.DialContext(ctx, network, addr)
		},
	}
	conn, br, _, err := d.Dial(ctx, wsURL(addr, false, "", ""))
	var status ws.StatusError
	if errors.As(err, &status) {
		o.seen.Refused[fmt.Sprint(int(status))]++
		return o, nil
	}
	if err != nil {
		return nil, fmt.Errorf("odd client: %w", err)
	}
	if br == nil {
		br = bufio.NewReaderSize(conn, 16)
	}
	o.conn, o.rest = conn, br
	o.seen.Accepted = 1
	return o, nil
}

func smallBuffer(_, _ string, c syscall.RawConn) error {
	var serr error
	if err := c.Control(func(fd uintptr) {
		serr = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 1024)
	}); err != nil {
		return err
	}
	return serr
}

// NeverReads connects and reads nothing more than the handshake. ReadRest tells how it was closed.
func NeverReads(ctx context.Context, addr, token string) (*Odd, error) {
	return dialOdd(ctx, addr, token, true)
}

// ReadRest reads what a client that did not read still gets, until the end or the timeout.
func (o *Odd) ReadRest(timeout time.Duration) {
	if o.conn == nil {
		return
	}
	if err := o.conn.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return // closed: nothing to read
	}
	o.readFrames(o.rest)
}

// DripReader connects and reads one byte a second.
func DripReader(ctx context.Context, addr, token string) (*Odd, error) {
	o, err := dialOdd(ctx, addr, token, true)
	if err != nil || o.conn == nil {
		return o, err
	}
	ctx, o.stop = context.WithCancel(ctx)
	o.wg.Go(func() { o.readFrames(&drip{ctx, o.rest}) })
	return o, nil
}

// drip reads one byte a second from r.
type drip struct {
	ctx context.Context
	r   io.Reader
}

func (d *drip) Read(p []byte) (int, error) {
	sleep(d.ctx, time.Second)
	if err := d.ctx.Err(); err != nil {
		return 0, err
	}
	return d.r.Read(p[:min(1, len(p))])
}

// Vanisher connects through a proxy and reads normally, until the proxy drops its bytes without
// closing. It answers no ping, so that it is silent also for a gateway that can be heard.
func Vanisher(ctx context.Context, proxyAddr, token string) (*Odd, error) {
	o, err := dialOdd(ctx, proxyAddr, token, false)
	if err != nil || o.conn == nil {
		return o, err
	}
	o.wg.Go(func() { o.readFrames(o.rest) })
	return o, nil
}

// readFrames counts frames until the connection ends and notes the close code.
func (o *Odd) readFrames(r io.Reader) {
	for {
		h, err := ws.ReadHeader(r)
		var payload []byte
		if err == nil {
			if h.Length > readLimit {
				err = fmt.Errorf("a frame of %d bytes", h.Length)
			} else {
				payload = make([]byte, h.Length)
				_, err = io.ReadFull(r, payload)
			}
		}
		if err != nil {
			o.update(func(s *Seen) {
				if s.CloseCode == 0 && !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, net.ErrClosed) && !errors.Is(err, context.Canceled) {
					s.CloseCode = -1
				}
				s.Err = err.Error()
			})
			return
		}
		o.update(func(s *Seen) {
			s.Frames++
			s.Bytes += int64(ws.HeaderSize(h)) + h.Length
			if h.OpCode == ws.OpClose {
				s.CloseCode = int(ws.StatusNoStatusRcvd)
				if len(payload) >= 2 {
					s.CloseCode = int(binary.BigEndian.Uint16(payload))
				}
			}
		})
	}
}

// Crowd is many connections that come at once.
type Crowd struct {
	n     int
	addr  string
	token func(i int) (string, error)
	hc    *http.Client

	mu    sync.Mutex
	conns []*websocket.Conn
	seen  Seen
	wg    sync.WaitGroup
}

// Storm opens n connections at once and returns when each was accepted, refused or failed. Each reads
// until its end. Close it.
func Storm(ctx context.Context, n int, addr string, token func(i int) (string, error)) *Crowd {
	c := &Crowd{n: n, addr: addr, token: token, seen: Seen{Refused: make(map[string]int)},
		hc: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}}
	c.dial(ctx)
	return c
}

// Again drops every connection without a close frame and opens n new ones at once.
func (c *Crowd) Again(ctx context.Context) {
	c.Close()
	c.dial(ctx)
}

// Seen sums up all connections until now; Seen.Accepted counts all handshakes, also those of Again.
func (c *Crowd) Seen() Seen {
	o := Odd{}
	c.mu.Lock()
	o.seen = c.seen
	defer c.mu.Unlock()
	return o.Seen()
}

// Close drops every connection.
func (c *Crowd) Close() {
	c.mu.Lock()
	conns := c.conns
	c.conns = nil
	c.mu.Unlock()
	for _, conn := range conns {
		_ = conn.CloseNow()
	}
	c.wg.Wait()
}

func (c *Crowd) dial(ctx context.Context) {
	var dials sync.WaitGroup
	for i := range c.n {
		dials.Go(func() {
			conn, why := c.dialOne(ctx, i)
			c.mu.Lock()
			defer c.mu.Unlock()
			if conn == nil {
				c.seen.Refused[why]++
				return
			}
			c.seen.Accepted++
			c.conns = append(c.conns, conn)
			c.wg.Go(func() { c.read(conn) })
		})
	}
	dials.Wait()
}

func (c *Crowd) dialOne(ctx context.Context, i int) (*websocket.Conn, string) {
	token, err := c.token(i)
	if err != nil {
		return nil, "token"
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	conn, resp, err := websocket.Dial(ctx, wsURL(c.addr, false, "", ""), &websocket.DialOptions{
		HTTPClient: c.hc, HTTPHeader: http.Header{"Authorization": {"Bearer " + token}}})
	if err != nil {
		if status, _ := refusal(resp); status != 0 {
			return nil, fmt.Sprint(status)
		}
		return nil, "dial"
	}
	conn.SetReadLimit(readLimit)
	return conn, ""
}

func (c *Crowd) read(conn *websocket.Conn) {
	for {
		_, b, err := conn.Read(context.Background()) // ends by Close
		c.mu.Lock()
		if err != nil {
			if code := int(websocket.CloseStatus(err)); code > 0 {
				c.seen.CloseCode = code
			}
			c.mu.Unlock()
			_ = conn.CloseNow()
			return
		}
		c.seen.Frames++
		c.seen.Bytes += int64(len(b))
		c.mu.Unlock()
	}
}

// FloodOptions describe a flooder.
type FloodOptions struct {
	User, Addr, Token string
	PerSecond         int // messages
	Bytes             int // of data.content
}

// Flooder sends messages at a fixed rate without waiting for anything and reads its answers; what it
// sent and which acks came is in the log as any client's. It ends with the connection or by Close.
func Flooder(ctx context.Context, o FloodOptions, log *Log) (*Odd, error) {
	h := &Odd{seen: Seen{Refused: make(map[string]int)}}
	dctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	hc := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	conn, resp, err := websocket.Dial(dctx, wsURL(o.Addr, false, "", ""), &websocket.DialOptions{
		HTTPClient: hc, HTTPHeader: http.Header{"Authorization": {"Bearer " + o.Token}}})
	if err != nil {
		h.stop = func() {}
		if status, _ := refusal(resp); status != 0 {
			h.seen.Refused[fmt.Sprint(status)]++
			return h, nil
		}
		return nil, fmt.Errorf("flooder: %w", err)
	}
	conn.SetReadLimit(readLimit)
	ctx, h.stop = context.WithCancel(ctx)
	h.seen.Accepted = 1
	c := &Client{o: ClientOptions{User: o.User}, wake: make(chan struct{}, 1),
		rec: log.Client(ClientLog{User: o.User, Every: time.Second / time.Duration(o.PerSecond)})}
	h.wg.Go(func() { flood(ctx, c, conn, o) })
	h.wg.Go(func() { h.readFlood(ctx, &session{c: c, ws: conn, addr: o.Addr}) })
	return h, nil
}

// flood writes what is due each 10 ms.
func flood(ctx context.Context, c *Client, conn *websocket.Conn, o FloodOptions) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	begin := time.Now()
	for seq := int64(0); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for due := int64(time.Since(begin).Seconds() * float64(o.PerSecond)); seq < due; {
			seq++
			m := newMessage(o.User, seq, o.Bytes, time.Now())
			c.rec.sent(Sent{Seq: seq, ID: m.id, Sum: m.sum, At: time.Now(), Addr: o.Addr})
			if err := conn.Write(ctx, websocket.MessageText, m.frame); err != nil {
				return // the reader tells why
			}
		}
	}
}

func (o *Odd) readFlood(ctx context.Context, s *session) {
	defer o.stop()
	before := 0
	for {
		err := s.readOne(ctx)
		s.c.rec.mu.Lock()
		acks := s.c.rec.log.Acks[before:]
		before += len(acks)
		s.c.rec.mu.Unlock()
		o.update(func(seen *Seen) {
			seen.Frames++
			for _, a := range acks {
				if !a.Success() {
					seen.Refused[a.Code]++
				}
			}
			if err != nil {
				seen.Frames--
				seen.Err = err.Error()
				if ctx.Err() == nil {
					seen.CloseCode = int(websocket.CloseStatus(err))
				}
			}
		})
		if err != nil {
			if s.id != "" {
				s.c.rec.disconnect(Disconnect{Session: s.id, Code: int(websocket.CloseStatus(err)), Err: err.Error(), Ours: ctx.Err() != nil, At: time.Now()})
			}
			_ = s.ws.CloseNow()
			return
		}
	}
}

// LogTo adds the user to the log as one who received nothing and whose connection ended now: of the
// records for the user, those without an end then count as lost in the socket.
func (o *Odd) LogTo(log *Log, user string) {
	s := o.Seen()
	log.Client(ClientLog{User: user}).disconnect(Disconnect{Code: s.CloseCode, Err: s.Err, At: time.Now()})
}
