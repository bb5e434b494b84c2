package traffic

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"
)

const (
	readLimit      = 4 << 20                // bytes of a frame
	writeTimeout   = 5 * time.Second        // of one frame
	dialTimeout    = 10 * time.Second       // of one handshake
	firstFrame     = 15 * time.Second       // for `connected` after the handshake
	retryDefault   = 200 * time.Millisecond // after a refusal that names no time
	backoffLow     = 50 * time.Millisecond
	backoffHigh    = 500 * time.Millisecond
	answerLimit    = 30 * time.Second // a living connection's time to answer a message, three times what is documented
	silenceDefault = 10 * time.Second
)

// ClientOptions describe one user's client.
type ClientOptions struct {
	User string
	// Addrs are the host:port of the gateways, or of proxies before them, tried in turn from First on.
	Addrs []string
	First int
	// Token returns the user's token; called for each handshake.
	Token func(user string) (string, error)
	// Ack asks for delivery acks and answers each push after it was logged.
	Ack bool
	// DeviceID and Device go into the query; several clients of one user need different ids.
	DeviceID, Device string
	// Every is the least time between two new messages; 0: the client only receives.
	Every time.Duration
	// Window is how many messages may be outstanding. With 0 or 1 the order in Kafka is the order of
	// sending; with more, refused ones are sent again out of order.
	Window int
	// Content is the length of data.content in bytes.
	Content int
	// Silence is how long a connection may say nothing, not even pong, before the client gives it up;
	// 0: 10 s.
	Silence time.Duration
	// Reconnect decides after a close by code (-1: no close frame); nil: all but 45xx.
	Reconnect func(code int) bool
}

// Client is one user's client: it stays connected and sends numbered messages until stopped.
// Run once; the other methods may be called from any goroutine.
type Client struct {
	o    ClientOptions
	rec  *Recorder
	http *http.Client
	wake chan struct{} // capacity 1; the pump looks at the state again

	mu      sync.Mutex
	open    []*message // not acknowledged, at most Window
	seq     int64      // of the newest
	nextNew time.Time
	stopped bool // no new messages
	ended   bool // Run returned, or will not reconnect
}

type message struct {
	id     string
	seq    int64
	frame  []byte
	sum    uint64
	due    time.Time // when to send it again; zero while an answer is awaited
	sentAt time.Time
}

type frameOut struct {
	Type      string `json:"type"`
	MessageID string `json:"message_id,omitempty"`
	Data      any    `json:"data,omitempty"`
	Timestamp int64  `json:"timestamp,omitempty"`
}

type messageData struct {
	ConversationID string `json:"conversation_id"`
	Seq            int64  `json:"seq"`
	Content        string `json:"content"`
}

type frameIn struct {
	Type       string          `json:"type"`
	MessageID  string          `json:"message_id"`
	DeliveryID *int64          `json:"delivery_id"`
	Data       json.RawMessage `json:"data"`
}

// NewClient adds a client to the log. The HTTP client may be shared; nil: a new one.
func NewClient(o ClientOptions, log *Log, hc *http.Client) *Client {
	o.Window = max(o.Window, 1)
	if o.Silence == 0 {
		o.Silence = silenceDefault
	}
	if o.Reconnect == nil {
		o.Reconnect = func(code int) bool { return code < 4500 || code > 4599 }
	}
	if hc == nil {
		hc = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	}
	rec := log.Client(ClientLog{User: o.User, Device: o.DeviceID, Ack: o.Ack, Ordered: o.Window == 1, Every: o.Every})
	return &Client{o: o, rec: rec, http: hc, wake: make(chan struct{}, 1)}
}

// Run stays connected until ctx ends or a close forbids to reconnect.
func (c *Client) Run(ctx context.Context) {
	defer func() {
		c.mu.Lock()
		c.ended = true
		c.mu.Unlock()
	}()
	for i := c.o.First; ctx.Err() == nil; i++ {
		again := c.connection(ctx, c.o.Addrs[i%len(c.o.Addrs)])
		if !again {
			return
		}
		sleep(ctx, backoffLow+rand.N(backoffHigh-backoffLow))
	}
}

// StopSending ends new messages; those outstanding are still sent again until acknowledged.
func (c *Client) StopSending() {
	c.mu.Lock()
	c.stopped = true
	c.mu.Unlock()
}

// Outstanding is how many messages wait for their success.
func (c *Client) Outstanding() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.open)
}

// Ended tells that the client will not reconnect: its outstanding messages stay unsettled.
func (c *Client) Ended() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended
}

// Online tells whether a session is open.
func (c *Client) Online() bool {
	c.rec.mu.Lock()
	defer c.rec.mu.Unlock()
	_, ok := c.rec.log.Online()
	return ok
}

func wsURL(addr string, ack bool, deviceID, device string) string {
	q := url.Values{}
	if ack {
		q.Set("ack", "1")
	}
	if deviceID != "" {
		q.Set("device_id", deviceID)
	}
	if device != "" {
		q.Set("device", device)
	}
	u := url.URL{Scheme: "ws", Host: addr, Path: "/ws", RawQuery: q.Encode()}
	return u.String()
}

// connection is one handshake and, when it succeeds, its session. It returns whether to reconnect.
func (c *Client) connection(ctx context.Context, addr string) bool {
	token, err := c.o.Token(c.o.User)
	if err != nil {
		c.rec.fail(Failure{What: "dial", Err: err.Error(), At: time.Now()})
		return true
	}
	dctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	ws, resp, err := websocket.Dial(dctx, wsURL(addr, c.o.Ack, c.o.DeviceID, c.o.Device), &websocket.DialOptions{
		HTTPClient: c.http,
		HTTPHeader: http.Header{"Authorization": {"Bearer " + token}},
	})
	if err != nil {
		if ctx.Err() == nil {
			f := Failure{What: "dial", Err: err.Error(), At: time.Now()}
			f.Status, f.Code = refusal(resp)
			c.rec.fail(f)
		}
		return true
	}
	defer func() { _ = ws.CloseNow() }()
	ws.SetReadLimit(readLimit)
	s := &session{c: c, ws: ws, addr: addr}
	return s.run(ctx)
}

// refusal reads the status and the code of a handshake that was answered otherwise than by 101.
func refusal(resp *http.Response) (int, string) {
	if resp == nil {
		return 0, ""
	}
	var body struct {
		Code string `json:"code"`
	}
	if resp.Body != nil {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 4096)) // what is readable; the status says the rest
		_ = resp.Body.Close()
		_ = json.Unmarshal(b, &body)
	}
	return resp.StatusCode, body.Code
}

// session is one connection of a Client.
type session struct {
	c    *Client
	ws   *websocket.Conn
	addr string

	mu    sync.Mutex
	id    string // of the gateway's; empty until `connected`
	heard time.Time
	leave time.Time // when a hint asks to reconnect; zero: no hint
	ours  bool      // the client ends it
}

func (s *session) run(ctx context.Context) bool {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.heard = time.Now()
	fctx, fcancel := context.WithTimeout(ctx, firstFrame)
	err := s.readOne(fctx)
	fcancel()
	if err == nil && s.id == "" {
		err = errors.New("the first frame is not `connected`")
		s.c.rec.fail(Failure{What: "protocol", Err: err.Error(), At: time.Now()})
		return true
	}
	if err != nil {
		if ctx.Err() == nil {
			s.c.rec.fail(Failure{What: "dial", Code: fmt.Sprint(int(websocket.CloseStatus(err))), Err: err.Error(), At: time.Now()})
		}
		return s.c.o.Reconnect(int(websocket.CloseStatus(err)))
	}
	s.c.dueNow()
	pumped := make(chan struct{})
	go func() {
		defer close(pumped)
		s.pump(ctx)
	}()
	for err == nil {
		err = s.readOne(ctx)
	}
	code := int(websocket.CloseStatus(err))
	s.mu.Lock()
	d := Disconnect{Session: s.id, Code: code, Err: err.Error(), Ours: s.ours || ctx.Err() != nil, At: time.Now()}
	s.mu.Unlock()
	s.c.rec.disconnect(d)
	cancel()
	_ = s.ws.CloseNow() // the pump may be in a write
	<-pumped
	return d.Ours || s.c.o.Reconnect(code)
}

// dueNow makes every outstanding message due: the connection it waited on is gone.
func (c *Client) dueNow() {
	now := time.Now()
	c.mu.Lock()
	for _, m := range c.open {
		m.due = now
	}
	c.mu.Unlock()
}

// readOne reads a frame, logs it and acts on it.
func (s *session) readOne(ctx context.Context) error {
	_, b, err := s.ws.Read(ctx)
	if err != nil {
		return err
	}
	now := time.Now()
	s.mu.Lock()
	s.heard = now
	s.mu.Unlock()
	var f frameIn
	if err := json.Unmarshal(b, &f); err != nil {
		s.c.rec.fail(Failure{What: "protocol", Err: fmt.Sprintf("frame %.100q: %v", b, err), At: now})
		return nil
	}
	switch f.Type {
	case "connected":
		var d struct {
			Gateway  string `json:"gateway_id"`
			Session  string `json:"session_id"`
			Presence string `json:"presence"`
		}
		s.decode(f, &d)
		s.mu.Lock()
		s.id = d.Session
		s.mu.Unlock()
		s.c.rec.connect(Connect{Addr: s.addr, Gateway: d.Gateway, Session: d.Session, Degraded: d.Presence == "degraded", At: now})
	case "message-ack":
		s.c.acked(s.decodeAck(f, now))
	case "pong", "token-refreshed":
	case "reconnect":
		var d struct {
			RetryAfter int64 `json:"retry_after_ms"`
		}
		s.decode(f, &d)
		s.c.rec.hint(Hint{Session: s.id, RetryAfter: d.RetryAfter, At: now})
		s.mu.Lock()
		s.leave = now.Add(time.Duration(d.RetryAfter) * time.Millisecond)
		s.mu.Unlock()
		s.c.poke()
	case "error":
		var d struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		}
		s.decode(f, &d)
		s.c.rec.fail(Failure{What: "frame", Code: d.Code, Err: d.Message, At: now})
	default:
		return s.pushed(ctx, f, now)
	}
	return nil
}

func (s *session) decode(f frameIn, v any) {
	if err := json.Unmarshal(f.Data, v); err != nil {
		s.c.rec.fail(Failure{What: "protocol", Err: fmt.Sprintf("data of %s: %v", f.Type, err), At: time.Now()})
	}
}

func (s *session) decodeAck(f frameIn, now time.Time) Ack {
	var d struct {
		ID         string `json:"client_msg_id"`
		Status     string `json:"status"`
		Code       string `json:"code"`
		Topic      string `json:"topic"`
		Partition  int32  `json:"partition"`
		Offset     *int64 `json:"offset"`
		RetryAfter int64  `json:"retry_after_ms"`
	}
	s.decode(f, &d)
	a := Ack{ID: d.ID, Status: d.Status, Code: d.Code, Topic: d.Topic, Partition: d.Partition, Offset: -1, RetryAfter: d.RetryAfter, At: now}
	if d.Offset != nil {
		a.Offset = *d.Offset
	}
	return a
}

func (s *session) pushed(ctx context.Context, f frameIn, now time.Time) error {
	var d struct {
		Seq int64 `json:"seq"`
	}
	_ = json.Unmarshal(f.Data, &d) // data of other senders need not be an object
	p := Push{MessageID: f.MessageID, Seq: d.Seq, Data: f.Data, Session: s.id, At: now}
	if f.DeliveryID != nil {
		p.DeliveryID = *f.DeliveryID
	}
	s.c.rec.push(p)
	if !s.c.o.Ack {
		return nil
	}
	if f.DeliveryID == nil {
		s.c.rec.fail(Failure{What: "protocol", ID: f.MessageID, Err: "a push without delivery_id on an acking session", At: now})
		return nil
	}
	return s.write(ctx, frameOut{Type: "delivery-ack", Data: map[string]int64{"delivery_id": p.DeliveryID}})
}

func (s *session) write(ctx context.Context, f frameOut) error {
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	return s.writeBytes(ctx, b)
}

func (s *session) writeBytes(ctx context.Context, b []byte) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	return s.ws.Write(ctx, websocket.MessageText, b)
}

// acked logs an ack and settles or reschedules its message.
func (c *Client) acked(a Ack) {
	c.rec.ack(a)
	c.mu.Lock()
	for i, m := range c.open {
		if m.id != a.ID {
			continue
		}
		switch {
		case a.Success(), permanent(a.Code):
			c.open = append(c.open[:i], c.open[i+1:]...)
		default:
			wait := retryDefault
			if a.RetryAfter > 0 {
				wait = time.Duration(a.RetryAfter) * time.Millisecond
			}
			m.due = a.At.Add(wait)
		}
		break
	}
	c.mu.Unlock()
	c.poke()
}

// permanent tells the refusals that a resend does not mend.
func permanent(code string) bool { return code == "INVALID_MESSAGE" || code == "MESSAGE_TOO_LARGE" }

func (c *Client) poke() {
	select {
	case c.wake <- struct{}{}:
	default: // it will look anyway
	}
}

// pump sends what is due, pings a silent connection and gives it up; it returns when ctx ends or a
// write fails, and ends the connection in the latter case.
func (s *session) pump(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	pinged := time.Time{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.c.wake:
		case <-timer.C:
		}
		now := time.Now()
		s.mu.Lock()
		heard, leave := s.heard, s.leave
		s.mu.Unlock()
		leaving := !leave.IsZero() && !now.Before(leave)
		if quiet := now.Sub(heard); quiet >= s.c.o.Silence {
			s.end(ctx, fmt.Errorf("nothing heard for %v", quiet))
			return
		} else if quiet >= s.c.o.Silence/2 && now.Sub(pinged) >= s.c.o.Silence/4 {
			pinged = now
			if err := s.write(ctx, frameOut{Type: "ping"}); err != nil {
				s.end(ctx, err)
				return
			}
		}
		batch, next, waiting := s.c.due(now, s.addr, leaving)
		for _, b := range batch {
			if err := s.writeBytes(ctx, b); err != nil {
				s.end(ctx, err)
				return
			}
		}
		// A session that acknowledges loses nothing by leaving; another would lose what is on the
		// way, so it waits for the gateway's close.
		if leaving && s.c.o.Ack && !waiting {
			s.mu.Lock()
			s.ours = true
			s.mu.Unlock()
			_ = s.ws.Close(websocket.StatusNormalClosure, "") // the reader tells how it ended
			return
		}
		wait := s.c.o.Silence / 4
		if !next.IsZero() {
			wait = min(wait, next.Sub(now))
		}
		if !leave.IsZero() && !leaving {
			wait = min(wait, leave.Sub(now))
		}
		timer.Reset(max(wait, time.Millisecond))
	}
}

// end gives a connection up; the reader sees it fail.
func (s *session) end(ctx context.Context, why error) {
	if ctx.Err() != nil {
		return
	}
	s.c.rec.fail(Failure{What: "connection", Err: why.Error(), At: time.Now()})
	_ = s.ws.CloseNow()
}

// due logs and returns the frames to send now, when to look again (zero: no time known) and whether
// an answer is awaited. While leaving nothing is sent.
func (c *Client) due(now time.Time, addr string, leaving bool) (batch [][]byte, next time.Time, waiting bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	sooner := func(t time.Time) {
		if next.IsZero() || t.Before(next) {
			next = t
		}
	}
	send := func(m *message) {
		m.due, m.sentAt = time.Time{}, now
		c.rec.sent(Sent{Seq: m.seq, ID: m.id, Sum: m.sum, At: now, Addr: addr})
		batch = append(batch, m.frame)
		waiting = true
	}
	for _, m := range c.open {
		switch {
		case m.due.IsZero() && now.Sub(m.sentAt) >= answerLimit:
			c.rec.fail(Failure{What: "unanswered", ID: m.id, At: now})
			m.due = now
		case m.due.IsZero():
			waiting = true
			sooner(m.sentAt.Add(answerLimit))
			continue
		}
		switch {
		case leaving:
		case m.due.After(now):
			sooner(m.due)
		default:
			send(m)
		}
	}
	if c.o.Every <= 0 || c.stopped || leaving {
		return batch, next, waiting
	}
	for len(c.open) < c.o.Window && !c.nextNew.After(now) {
		m := c.newMessage(now)
		c.open = append(c.open, m)
		send(m)
		// From now, not from when it was due: a stall is not made up for by a burst.
		c.nextNew = now.Add(c.o.Every)
	}
	if len(c.open) < c.o.Window {
		sooner(c.nextNew)
	}
	return batch, next, waiting
}

func (c *Client) newMessage(now time.Time) *message {
	c.seq++
	name := c.o.User
	if c.o.DeviceID != "" {
		name += "." + c.o.DeviceID
	}
	return newMessage(name, c.seq, c.o.Content, now)
}

func newMessage(name string, seq int64, content int, now time.Time) *message {
	data, err := json.Marshal(messageData{"c", seq, strings.Repeat("x", content)})
	if err != nil {
		panic(err) // strings and numbers only
	}
	m := &message{id: fmt.Sprintf("%s-%d", name, seq), seq: seq, sum: Sum(data)}
	m.frame, err = json.Marshal(frameOut{Type: "send-message", MessageID: m.id, Data: json.RawMessage(data), Timestamp: now.UnixMilli()})
	if err != nil {
		panic(err)
	}
	return m
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
