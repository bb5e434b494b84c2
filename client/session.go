package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"
)

const (
	readLimit        = 16 << 20 // bytes of one message
	defaultHeartbeat = 30 * time.Second
	closeTimeout     = time.Second // for the gateway's answer to our close
	writeErrorWait   = time.Second // for the close code that explains a failed write

	// Deliveries handled within ackDelay are acknowledged together, since each frame counts against the
	// gateway's rate; so many of them at once, since it waits for the acks of 256 at most.
	ackDelay = 20 * time.Millisecond
	ackBatch = 64
)

var (
	errNoAnswer = errors.New("client: a message was not answered in time")
	errMoved    = errors.New("client: the gateway asked to connect elsewhere")
	errSilence  = errors.New("client: nothing was heard for 2.5 heartbeats")
)

// unavailableError is a handshake refused for the time being.
type unavailableError struct {
	status int
	after  time.Duration
}

func (e *unavailableError) Error() string {
	return fmt.Sprintf("client: the gateway answered %d, retry after %s", e.status, e.after)
}

// session is one connection, from its connected frame on.
type session struct {
	c        *Client
	ws       *websocket.Conn
	gateway  string
	id       string
	degraded bool
	maxBytes int
	expires  time.Time     // of the token it began with; zero: not known
	stored   atomic.Bool   // a message was
	silence  time.Duration // bound of it

	ctx   context.Context // ends when the session should; its cause says why
	end   context.CancelCauseFunc
	io    context.Context // of reads and writes; its end cuts the connection
	cut   context.CancelFunc
	raw   net.Conn // below ws; nil: a transport of the caller's does not tell it
	start time.Time
	heard atomic.Int64 // ns after start of the last byte; -1 while Handle keeps us from reading

	acked   atomic.Uint64 // the last delivery that was handled
	told    uint64        // the last one that the gateway was told of; acks's, then run's
	handled chan struct{} // one element: acked has changed

	mu        sync.Mutex
	leave     time.Time         // when to move on; zero: no hint came
	refreshed chan refreshReply // not nil while refresh waits
}

type refreshReply struct {
	expires time.Time
	err     error
}

type inbound struct {
	s        *session
	m        Message
	delivery uint64
}

// connect makes a connection and waits for its connected frame. It returns the token that it used, if it got
// so far.
func (c *Client) connect(ctx context.Context, address string, refused *refusal) (*session, string, error) {
	token, err := c.tokenToConnect(ctx, refused)
	if err != nil {
		return nil, "", err
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	s, err := c.dial(ctx, address, token)
	if err != nil {
		return nil, token, err
	}
	refused.token = ""
	return s, token, nil
}

func (c *Client) dial(ctx context.Context, address, token string) (*session, error) {
	s := &session{c: c, start: time.Now(), expires: expiry(token), handled: make(chan struct{}, 1)}
	traced := httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(i httptrace.GotConnInfo) { s.raw = i.Conn },
	})
	o := &websocket.DialOptions{
		HTTPClient:     c.http,
		Subprotocols:   []string{c.opts.Format.subprotocol()},
		OnPingReceived: func(context.Context, []byte) bool { s.hear(); return true },
	}
	switch c.opts.TokenIn {
	case InHeader:
		o.HTTPHeader = http.Header{"Authorization": {"Bearer " + token}}
	case InSubprotocol:
		o.Subprotocols = append(o.Subprotocols, "bearer."+token)
	case InQuery:
		u, err := url.Parse(address)
		if err != nil {
			return nil, fmt.Errorf("client: connect: %w", err) // New has parsed it
		}
		q := u.Query()
		q.Set("token", token)
		u.RawQuery = q.Encode()
		address = u.String()
	}
	ws, resp, err := websocket.Dial(traced, address, o)
	if err != nil {
		return nil, dialError(resp, err, token)
	}
	if got := ws.Subprotocol(); got != c.opts.Format.subprotocol() {
		_ = ws.CloseNow() // nothing was said
		return nil, fmt.Errorf("client: the gateway speaks %q, not %s", got, c.opts.Format.subprotocol())
	}
	ws.SetReadLimit(readLimit)
	s.ws = ws
	if err := s.awaitConnected(ctx); err != nil {
		_ = ws.CloseNow() // the connection is given up
		return nil, err
	}
	s.ctx, s.end = context.WithCancelCause(context.Background())
	s.io, s.cut = context.WithCancel(context.Background())
	return s, nil
}

func dialError(resp *http.Response, err error, token string) error {
	// An address with the token in it is quoted.
	if text := strings.NewReplacer(token, "[token]", url.QueryEscape(token), "[token]").Replace(err.Error()); text != err.Error() {
		err = errors.New(text)
	}
	if resp == nil {
		return fmt.Errorf("client: connect: %w", err)
	}
	switch resp.StatusCode {
	case http.StatusUnauthorized:
		body, _ := io.ReadAll(resp.Body) // in memory; an empty one is as good
		var b struct{ Code, Message string }
		_ = json.Unmarshal(body, &b) // somebody else's 401 has another body
		code := codeTokenRefused
		if b.Code == "TOKEN_EXPIRED" {
			code = codeTokenExpired
		}
		return &CloseError{Code: code, Reason: b.Code + " " + b.Message}
	case http.StatusServiceUnavailable, http.StatusTooManyRequests:
		return &unavailableError{resp.StatusCode, retryAfter(resp.Header.Get("Retry-After"))}
	}
	return fmt.Errorf("client: connect: %w", err)
}

// retryAfter reads the header: seconds or a date; 0 when there is none.
func retryAfter(v string) time.Duration {
	if s, err := strconv.Atoi(v); err == nil {
		return min(time.Duration(max(s, 0))*time.Second, maxHint)
	}
	if t, err := http.ParseTime(v); err == nil {
		return min(max(time.Until(t), 0), maxHint)
	}
	return 0
}

// closeCode is the close code and reason in err; 0 when there is none.
func closeCode(err error) (int, string) {
	if ce, ok := errors.AsType[*CloseError](err); ok {
		return ce.Code, ce.Reason
	}
	if ce, ok := errors.AsType[websocket.CloseError](err); ok {
		return int(ce.Code), ce.Reason
	}
	return 0, ""
}

func (s *session) hear() { s.heard.Store(int64(time.Since(s.start))) }

// hearing counts every chunk as life.
type hearing struct {
	s *session
	r io.Reader
}

func (h hearing) Read(p []byte) (int, error) {
	n, err := h.r.Read(p)
	h.s.hear()
	return n, err
}

func (s *session) read(ctx context.Context) (frame, error) {
	for {
		kind, r, err := s.ws.Reader(ctx)
		if err != nil {
			return frame{}, fmt.Errorf("client: read: %w", err)
		}
		var buf bytes.Buffer
		if _, err := buf.ReadFrom(hearing{s, r}); err != nil {
			return frame{}, fmt.Errorf("client: read: %w", err)
		}
		if kind != s.c.opts.Format.kind() {
			continue // not of this subprotocol
		}
		return s.c.opts.Format.decode(buf.Bytes())
	}
}

func (s *session) awaitConnected(ctx context.Context) error {
	for {
		f, err := s.read(ctx)
		if err != nil {
			return err
		}
		if f.Type != typeConnected {
			continue
		}
		var d connected
		if err := json.Unmarshal(f.Data, &d); err != nil {
			return fmt.Errorf("client: connected frame: %w", err)
		}
		s.gateway, s.id, s.degraded, s.maxBytes = d.GatewayID, d.SessionID, d.Presence == "degraded", d.MaxMessageBytes
		heartbeat := defaultHeartbeat
		if d.HeartbeatMs > 0 {
			heartbeat = time.Duration(d.HeartbeatMs) * time.Millisecond
		}
		s.silence = heartbeat * 5 / 2
		return nil
	}
}

// run serves the session until it ends and says why. Its goroutines have ended by then.
func (s *session) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { s.end(ctx.Err()) })
	defer stop()
	s.c.outbox.restart()

	var wg sync.WaitGroup
	wg.Go(func() { s.end(s.receive()) })
	wg.Go(s.send)
	wg.Go(s.watch)
	wg.Go(s.renew)
	acks := make(chan struct{})
	go func() { defer close(acks); s.acks() }()
	<-s.ctx.Done()

	err := context.Cause(s.ctx)
	if ctx.Err() != nil || errors.Is(err, errMoved) {
		// A proper close, after what was handled; answers that arrive meanwhile are still read.
		t := time.AfterFunc(closeTimeout, s.abandon) // who does not read cannot hold it
		<-acks
		_ = s.tellAcked() // the session ends either way
		_ = s.ws.Close(websocket.StatusNormalClosure, "")
		t.Stop()
	}
	s.cut()
	_ = s.ws.CloseNow() // closed already, or not worth a handshake
	<-acks
	wg.Wait()
	return err
}

// abandon ends what waits for the gateway: our own reads and writes, and those of a close under way, which
// else wait for 5 s.
func (s *session) abandon() {
	s.cut()
	if s.raw != nil {
		_ = s.raw.SetDeadline(time.Unix(1, 0)) // it is closed next, whatever this says
	}
}

func (s *session) receive() error {
	for {
		f, err := s.read(s.io)
		if err != nil {
			return err
		}
		if err := s.take(f); err != nil {
			return err
		}
	}
}

func (s *session) take(f frame) error {
	if f.MessageID != "" { // a record, whatever its type; the gateway's own frames have none
		s.deliver(f)
		return nil
	}
	switch f.Type {
	case typeMessageAck:
		var a ack
		if err := json.Unmarshal(f.Data, &a); err != nil {
			return fmt.Errorf("client: message-ack: %w", err)
		}
		if s.c.outbox.answer(a) {
			s.stored.Store(true)
		}
	case typeReconnect:
		var d struct {
			RetryAfterMs int64 `json:"retry_after_ms"`
		}
		if err := json.Unmarshal(f.Data, &d); err != nil {
			return fmt.Errorf("client: reconnect: %w", err)
		}
		s.mu.Lock()
		if s.leave.IsZero() {
			s.leave = time.Now().Add(rand.N(hint(d.RetryAfterMs) + 1)) // #nosec G404 -- spreads load
		}
		s.mu.Unlock()
		s.c.outbox.signal()
	case typeTokenRefreshed:
		var d struct {
			ExpiresAt int64 `json:"expires_at"`
		}
		if err := json.Unmarshal(f.Data, &d); err != nil {
			return fmt.Errorf("client: token-refreshed: %w", err)
		}
		s.reply(refreshReply{expires: time.UnixMilli(d.ExpiresAt)})
	case typeError:
		var d struct{ Code, Message string }
		if err := json.Unmarshal(f.Data, &d); err != nil {
			return fmt.Errorf("client: error frame: %w", err)
		}
		switch d.Code {
		case "AUTH_FAILED", "TOKEN_EXPIRED",
			"RATE_LIMITED", "OVERLOADED": // at worst for another frame: renew asks again
			s.reply(refreshReply{err: &RefusedError{ID: typeRefresh, Code: d.Code}})
		}
		s.c.report(d.Code, d.Message)
	case typeConnected, typePong:
	default:
		s.deliver(f)
	}
	return nil
}

// deliver queues a message for Handle and waits for room.
func (s *session) deliver(f frame) {
	in := inbound{s: s, m: Message{Type: f.Type, ID: f.MessageID, Data: f.Data, Time: time.UnixMilli(f.Timestamp)}, delivery: f.DeliveryID}
	select {
	case s.c.inbox <- in:
		return
	default:
	}
	s.heard.Store(-1)
	select {
	case s.c.inbox <- in:
	case <-s.ctx.Done():
	}
	s.hear()
}

func (s *session) write(b []byte) error { return s.ws.Write(s.io, s.c.opts.Format.kind(), b) }

// say writes a frame of the client's own.
func (s *session) say(kind string, data []byte) error {
	b, err := s.c.opts.Format.encode(kind, "", data, 0)
	if err != nil {
		return err
	}
	return s.write(b)
}

// acknowledge lets acks settle a delivery and those before it. After the session it does nothing: ids
// count per session.
func (s *session) acknowledge(delivery uint64) {
	if s.ctx.Err() != nil {
		return
	}
	s.acked.Store(delivery)
	select {
	case s.handled <- struct{}{}:
	default:
	}
}

// acks tells the gateway what was handled.
func (s *session) acks() {
	t := time.NewTimer(forever)
	defer t.Stop()
	for {
		select {
		case <-s.handled:
		case <-s.ctx.Done():
			return
		}
		t.Reset(ackDelay)
		for due := false; !due && s.acked.Load()-s.told < ackBatch; {
			select {
			case <-s.handled:
			case <-t.C:
				due = true
			case <-s.ctx.Done():
				return
			}
		}
		if err := s.tellAcked(); err != nil {
			s.failWrite(err)
			return
		}
	}
}

// tellAcked writes a delivery-ack, if there is something to acknowledge.
func (s *session) tellAcked() error {
	delivery := s.acked.Load()
	if delivery == s.told {
		return nil
	}
	s.told = delivery
	return s.say(typeDeliveryAck, fmt.Appendf(nil, `{"delivery_id":%d}`, delivery))
}

// failWrite ends the session for a failed write, unless the reader soon finds a better reason.
func (s *session) failWrite(err error) {
	t := time.NewTimer(writeErrorWait)
	defer t.Stop()
	select {
	case <-s.ctx.Done():
	case <-t.C:
		s.end(fmt.Errorf("client: write: %w", err))
	}
}

// send writes what the outbox gives.
func (s *session) send() {
	t := time.NewTimer(forever)
	defer t.Stop()
	for s.ctx.Err() == nil {
		s.mu.Lock()
		leave := s.leave
		s.mu.Unlock()
		b, wait, err := s.c.outbox.next(s.maxBytes, leave)
		switch {
		case err != nil:
			s.end(err)
			return
		case b != nil:
			if err := s.write(b); err != nil {
				s.failWrite(err)
				return
			}
			continue
		}
		t.Reset(wait)
		select {
		case <-s.c.outbox.wake:
		case <-t.C:
		case <-s.ctx.Done():
		}
	}
}

// watch ends the session after a silence.
func (s *session) watch() {
	t := time.NewTimer(s.silence)
	defer t.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-t.C:
		}
		left := s.silence
		if heard := s.heard.Load(); heard >= 0 {
			left -= time.Since(s.start) - time.Duration(heard)
		}
		if left <= 0 {
			s.end(errSilence)
			return
		}
		t.Reset(left)
	}
}

func (s *session) hinted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.leave.IsZero()
}

func (s *session) untilLeave() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return max(time.Until(s.leave), 0)
}

// refresh gives the gateway a token and waits for its answer. One call at a time.
func (s *session) refresh(ctx context.Context, token string) (time.Time, error) {
	data, err := json.Marshal(map[string]string{"token": token})
	if err != nil {
		return time.Time{}, fmt.Errorf("client: token: %w", err)
	}
	ch := make(chan refreshReply, 1)
	s.mu.Lock()
	s.refreshed = ch
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.refreshed = nil
		s.mu.Unlock()
	}()
	if err := s.say(typeRefresh, data); err != nil {
		return time.Time{}, fmt.Errorf("%w: %w", ErrNotConnected, err)
	}
	select {
	case r := <-ch:
		return r.expires, r.err
	case <-s.ctx.Done():
		return time.Time{}, fmt.Errorf("%w: %w", ErrNotConnected, context.Cause(s.ctx))
	case <-ctx.Done():
		return time.Time{}, ctx.Err()
	}
}

func (s *session) reply(r refreshReply) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refreshed != nil {
		s.refreshed <- r
		s.refreshed = nil
	}
}
