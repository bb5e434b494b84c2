package client

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
)

const (
	defaultOutbox     = 1000
	defaultAckTimeout = 30 * time.Second

	connectTimeout = 10 * time.Second // the handshake and the connected frame
	stableAfter    = 10 * time.Second // a session that lasted so long starts the back-off anew
	maxHint        = 5 * time.Minute  // bounds what a gateway may ask to wait
	tokenTries     = 2                // other tokens tried, in a row, after a refused one
	inboxSize      = 256              // messages between the reader and Handle
	seenSize       = 1024             // message ids remembered
)

var (
	// ErrOutboxFull is returned by Send when Options.Outbox messages are unsettled.
	ErrOutboxFull = errors.New("client: the outbox is full")
	// ErrDuplicateID is returned by Send for an id that is unsettled in the outbox.
	ErrDuplicateID = errors.New("client: a message of this id is in the outbox")
	// ErrClosed is what Send and Wait return once Run has returned. A message that was waiting may
	// or may not be stored.
	ErrClosed = errors.New("client: closed")
	// ErrCancelled is what Wait returns after Cancel.
	ErrCancelled = errors.New("client: cancelled")
	// ErrNotConnected is what Refresh returns without a session, or when it ends meanwhile.
	ErrNotConnected = errors.New("client: not connected")
)

// CloseError is a close by the gateway, or its refusal of a handshake, after which the client does not come
// back by itself.
type CloseError struct {
	Code   int // 4500 to 4599
	Reason string
}

func (e *CloseError) Error() string {
	return fmt.Sprintf("client: closed by the gateway with %d %s", e.Code, e.Reason)
}

// RefusedError is the gateway's final refusal of one message. It is not stored.
type RefusedError struct {
	ID   string
	Code string
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("client: message %s refused: %s", e.ID, e.Code)
}

// Options of a client. URLs and Token are required.
type Options struct {
	URLs []string // ws:// or wss:// addresses of gateways, tried in turn

	// Token returns a token that is good now. It is never called twice at once, and may take its time.
	Token   func(ctx context.Context, why TokenReason) (string, error)
	TokenIn TokenIn // how the token travels; default: in a header
	Format  Format  // of frames; default: JSON

	// Handle is called on one goroutine, in order. It must not wait for a Pending or for Refresh. While it
	// is slow by more than 256 messages nothing is read, and the gateway may close with 4000.
	Handle        func(Message)
	AckDeliveries bool // the gateway holds each message until Handle has returned

	DeviceID, Device string // the device and its kind; may be empty

	OnState func(State)                // called on Run's goroutine; must not block
	OnError func(code, message string) // an error frame of the gateway, or TOKEN: see Refresh; must not block

	Outbox     int           // messages that may be unsettled; default 1,000
	Window     int           // messages outstanding at a time; default 1, which keeps order across refusals
	AckTimeout time.Duration // a message unanswered so long means a dead session; default 30 s

	HTTPClient *http.Client // for TLS settings and proxies; default: one of its own
}

// Phase of a client.
type Phase int

const (
	Connecting   Phase = iota // URL
	Connected                 // URL, Gateway, Session, Degraded
	Reconnecting              // Err, Code, Reason; After
	Closed                    // Err; Code and Reason when the gateway closed for good
)

func (p Phase) String() string {
	return [...]string{"connecting", "connected", "reconnecting", "closed"}[p]
}

// State is what OnState is told; each Phase names its fields.
type State struct {
	Phase    Phase
	URL      string
	Gateway  string
	Session  string
	Degraded bool // presence was not claimed: messages from others may not arrive yet

	Err    error         // why the connection ended or was not made
	Code   int           // the WebSocket close code; 0: there was none
	Reason string        // the close reason
	After  time.Duration // the pause before the next attempt
}

// Client is one user's connection. All methods are safe for concurrent use.
type Client struct {
	opts    Options
	urls    []string
	http    *http.Client
	outbox  outbox
	inbox   chan inbound
	started atomic.Bool
	refresh chan struct{} // a lock: holds one element while a token is asked for, and refreshed by it

	mu      sync.Mutex
	session *session // nil while disconnected
}

// New checks the options. The client does nothing before Run.
func New(o Options) (*Client, error) {
	if len(o.URLs) == 0 || o.Token == nil {
		return nil, errors.New("client: URLs and Token are required")
	}
	if o.TokenIn < InHeader || o.TokenIn > InQuery || o.Format < JSON || o.Format > Protobuf {
		return nil, errors.New("client: TokenIn or Format is none of those that there are")
	}
	if o.Outbox < 0 || o.Window < 0 || o.AckTimeout < 0 {
		return nil, errors.New("client: Outbox, Window and AckTimeout must not be negative")
	}
	if o.Outbox == 0 {
		o.Outbox = defaultOutbox
	}
	if o.Window == 0 {
		o.Window = 1
	}
	if o.AckTimeout == 0 {
		o.AckTimeout = defaultAckTimeout
	}
	c := &Client{opts: o, http: o.HTTPClient, inbox: make(chan inbound, inboxSize), refresh: make(chan struct{}, 1)}
	for _, raw := range o.URLs {
		u, err := url.Parse(raw)
		if err != nil {
			return nil, fmt.Errorf("client: address %q: %w", raw, err)
		}
		if u.Scheme != "ws" && u.Scheme != "wss" || u.Host == "" {
			return nil, fmt.Errorf("client: address %q is not a ws:// or wss:// one", raw)
		}
		q := u.Query()
		if o.AckDeliveries {
			q.Set("ack", "1")
		}
		if o.DeviceID != "" {
			q.Set("device_id", o.DeviceID)
		}
		if o.Device != "" {
			q.Set("device", o.Device)
		}
		u.RawQuery = q.Encode()
		c.urls = append(c.urls, u.String())
	}
	c.outbox.init(o.Outbox, o.Window, o.AckTimeout)
	return c, nil
}

// Send puts a message into the outbox. It never blocks and may be called before Run and while
// disconnected. Errors: ErrOutboxFull, ErrDuplicateID, ErrClosed, or what is wrong with e.
func (c *Client) Send(e Envelope) (*Pending, error) {
	p, err := newPending(e, c.opts.Format)
	if err != nil {
		return nil, err
	}
	p.outbox = &c.outbox
	if err := c.outbox.add(p); err != nil {
		return nil, err
	}
	return p, nil
}

// Run connects, and connects again, until ctx ends (its error is returned) or the gateway says not
// to come back (*CloseError). It may be called once. When it returns, the client's goroutines have
// ended and every unsettled message has failed with ErrClosed.
func (c *Client) Run(ctx context.Context) error {
	if c.started.Swap(true) {
		return errors.New("client: Run was called before")
	}
	if c.http == nil {
		t := &http.Transport{Proxy: http.ProxyFromEnvironment}
		if d, ok := http.DefaultTransport.(*http.Transport); ok { // else the program has wrapped it
			t = d.Clone()
		}
		defer t.CloseIdleConnections()
		c.http = &http.Client{Transport: t}
	}
	handled := make(chan struct{})
	go func() { defer close(handled); c.handleAll() }()

	err := c.connections(ctx)
	c.outbox.close()
	close(c.inbox)
	<-handled

	st := State{Phase: Closed, Err: err}
	if ce, ok := errors.AsType[*CloseError](err); ok {
		st.Code, st.Reason = ce.Code, ce.Reason
	}
	c.state(st)
	return err
}

// connections makes one session after another.
func (c *Client) connections(ctx context.Context) error {
	bo := &backoff.ExponentialBackOff{
		InitialInterval: 100 * time.Millisecond, RandomizationFactor: 0.5, Multiplier: 2, MaxInterval: 10 * time.Second,
	}
	bo.Reset()
	notBefore := make([]time.Time, len(c.urls)) // what each address asked for
	var refused refusal
	for at := 0; ; at++ {
		i := c.pick(at, notBefore)
		at = i
		c.state(State{Phase: Connecting, URL: c.opts.URLs[i]})
		s, token, err := c.connect(ctx, c.urls[i], &refused)
		if err == nil {
			c.setSession(s)
			c.state(State{Phase: Connected, URL: c.opts.URLs[i], Gateway: s.gateway, Session: s.id, Degraded: s.degraded})
			start := time.Now()
			err = s.run(ctx)
			c.setSession(nil)
			stable := time.Since(start) > stableAfter
			if stable || s.stored.Load() {
				bo.Reset()
			}
			if stable {
				refused.tries = 0
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}

		code, reason := closeCode(err)
		var after time.Duration
		switch {
		case refused.another(code, token, reason):
			if refused.tries > 1 {
				after = bo.NextBackOff()
			}
		case code >= 4500 && code <= 4599:
			return &CloseError{Code: code, Reason: reason}
		case s != nil && s.hinted():
			after = s.untilLeave()
		default:
			after = bo.NextBackOff()
		}
		if u, ok := errors.AsType[*unavailableError](err); ok {
			notBefore[i] = time.Now().Add(u.after + rand.N(u.after/5+1)) // #nosec G404 -- spreads load
		}
		after = max(after, time.Until(notBefore[c.pick(at+1, notBefore)]))
		c.state(State{Phase: Reconnecting, Err: err, Code: code, Reason: reason, After: after})
		if err := sleep(ctx, after); err != nil {
			return err
		}
	}
}

// pick is the first address from at on that may be tried now, else the one that may be first.
func (c *Client) pick(at int, notBefore []time.Time) int {
	now, best := time.Now(), at%len(c.urls)
	for k := range c.urls {
		i := (at + k) % len(c.urls)
		if !notBefore[i].After(now) {
			return i
		}
		if notBefore[i].Before(notBefore[best]) {
			best = i
		}
	}
	return best
}

// handleAll hands the inbox to Handle. What is left at the end is handed over too, unless the
// gateway still holds it unacknowledged.
func (c *Client) handleAll() {
	seen := newRecent(seenSize)
	for in := range c.inbox {
		if c.opts.AckDeliveries && c.outbox.isClosed() {
			continue
		}
		if c.opts.Handle != nil && seen.add(in.m.ID) {
			c.opts.Handle(in.m)
		}
		if c.opts.AckDeliveries && in.delivery > 0 {
			in.s.acknowledge(in.delivery)
		}
	}
}

func (c *Client) setSession(s *session) {
	c.mu.Lock()
	c.session = s
	c.mu.Unlock()
}

func (c *Client) report(code, message string) {
	if c.opts.OnError != nil {
		c.opts.OnError(code, message)
	}
}

func (c *Client) state(s State) {
	if c.opts.OnState != nil {
		c.opts.OnState(s)
	}
}

// sleep waits for d, or returns ctx's error when that ends first.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// recent is a set of the last ids.
type recent struct {
	ring []string
	next int
	set  map[string]struct{}
}

func newRecent(n int) *recent {
	return &recent{ring: make([]string, n), set: make(map[string]struct{}, n)}
}

// add reports whether id is new; an empty one always is.
func (r *recent) add(id string) bool {
	if id == "" {
		return true
	}
	if _, ok := r.set[id]; ok {
		return false
	}
	delete(r.set, r.ring[r.next])
	r.ring[r.next] = id
	r.set[id] = struct{}{}
	r.next = (r.next + 1) % len(r.ring)
	return true
}
