package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/cenkalti/backoff/v5"
	"github.com/oklog/ulid/v2"
)

const (
	unknownWait = time.Second     // after OUTCOME_UNKNOWN
	leaveGrace  = 2 * time.Second // for outstanding messages, when moving to another gateway
	forever     = time.Duration(math.MaxInt64)
)

// Envelope is a message to send.
type Envelope struct {
	Type string          // not one that the protocol keeps for itself
	ID   string          // 1 to 128 bytes without control characters; empty: a new ULID
	Data json.RawMessage // sent byte for byte; empty: null
}

// Receipt says where a message is stored.
type Receipt struct {
	MessageID string // of the record in Kafka
	Topic     string
	Partition int32
	Offset    int64 // -1: not known
}

// Pending is a message in the outbox.
type Pending struct {
	Envelope Envelope // with its id

	outbox  *outbox
	frame   []byte
	done    chan struct{} // closed when settled; receipt and err are set before
	receipt Receipt
	err     error

	// Under the outbox's lock.
	sent    bool // outstanding in the current session
	refused bool // at least once, retryably
	sentAt  time.Time
	retryAt time.Time
}

func newPending(e Envelope, format Format) (*Pending, error) {
	if e.ID == "" {
		e.ID = ulid.Make().String()
	}
	if !validName(e.ID) {
		return nil, errors.New("client: an id has 1 to 128 bytes of UTF-8 without control characters")
	}
	switch e.Type {
	case "", typePing, typeRefresh, typeDeliveryAck:
		return nil, fmt.Errorf("client: a message cannot be of type %q", e.Type)
	}
	if len(e.Data) == 0 {
		e.Data = json.RawMessage("null")
	}
	if !json.Valid(e.Data) || !utf8.Valid(e.Data) { // the gateway would close with 1007, each time
		return nil, errors.New("client: data is not valid JSON in UTF-8")
	}
	if !utf8.ValidString(e.Type) {
		return nil, errors.New("client: the type is not valid UTF-8")
	}
	b, err := format.encode(e.Type, e.ID, e.Data, time.Now().UnixMilli())
	if err != nil {
		return nil, err
	}
	return &Pending{Envelope: e, frame: b, done: make(chan struct{})}, nil
}

func validName(s string) bool {
	if len(s) == 0 || len(s) > 128 || !utf8.ValidString(s) {
		return false
	}
	for i := range len(s) {
		if s[i] < 0x20 || s[i] == 0x7f {
			return false
		}
	}
	return true
}

// Wait blocks until the message is settled: a Receipt, a *RefusedError, ErrCancelled or ErrClosed.
// When ctx ends first its error is returned and the message stays in the outbox.
func (p *Pending) Wait(ctx context.Context) (Receipt, error) {
	select {
	case <-p.done:
		return p.receipt, p.err
	default:
	}
	select {
	case <-p.done:
		return p.receipt, p.err
	case <-ctx.Done():
		return Receipt{}, ctx.Err()
	}
}

// Done is closed when the message is settled.
func (p *Pending) Done() <-chan struct{} { return p.done }

// Cancel takes the message out of the outbox, unless it is settled. If it was sent before, it may
// be stored.
func (p *Pending) Cancel() {
	p.outbox.mu.Lock()
	defer p.outbox.mu.Unlock()
	p.outbox.settle(p, Receipt{}, ErrCancelled)
}

// outbox holds the unsettled messages in the order of Send.
type outbox struct {
	limit, window int
	ackTimeout    time.Duration
	wake          chan struct{} // one element: the sender should look again

	mu          sync.Mutex
	closed      bool
	queue       []*Pending
	byID        map[string]*Pending
	outstanding int // with sent
	refused     int // with refused
	retry       *backoff.ExponentialBackOff
}

func (o *outbox) init(limit, window int, ackTimeout time.Duration) {
	o.limit, o.window, o.ackTimeout = limit, window, ackTimeout
	o.wake = make(chan struct{}, 1)
	o.byID = make(map[string]*Pending)
	o.retry = &backoff.ExponentialBackOff{
		InitialInterval: 500 * time.Millisecond, RandomizationFactor: 0.5, Multiplier: 2, MaxInterval: 10 * time.Second,
	}
	o.retry.Reset()
}

func (o *outbox) signal() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

func (o *outbox) add(p *Pending) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case o.closed:
		return ErrClosed
	case o.byID[p.Envelope.ID] != nil:
		return ErrDuplicateID
	case len(o.queue) >= o.limit:
		return ErrOutboxFull
	}
	o.queue = append(o.queue, p)
	o.byID[p.Envelope.ID] = p
	o.signal()
	return nil
}

// settle ends p, if it is not ended. The lock is held.
func (o *outbox) settle(p *Pending, r Receipt, err error) {
	if o.byID[p.Envelope.ID] != p {
		return
	}
	delete(o.byID, p.Envelope.ID)
	if o.queue[0] == p {
		o.queue[0] = nil
		o.queue = o.queue[1:]
	} else {
		i := slices.Index(o.queue, p)
		o.queue = slices.Delete(o.queue, i, i+1)
	}
	if p.sent {
		o.outstanding--
	}
	if p.refused {
		o.refused--
	}
	p.receipt, p.err = r, err
	close(p.done)
	o.signal()
}

// restart makes everything unsettled wait to be sent, for a new session.
func (o *outbox) restart() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, p := range o.queue {
		p.sent, p.retryAt = false, time.Time{}
	}
	o.outstanding = 0
}

// answer takes a message-ack and tells whether it settles a message as stored. One for an unknown id is a late
// or a second answer: nothing to do.
func (o *outbox) answer(a ack) (stored bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	p := o.byID[a.ClientMsgID]
	if p == nil {
		return false
	}
	if a.Status == "success" {
		r := Receipt{MessageID: a.MessageID, Topic: a.Topic, Partition: a.Partition, Offset: -1}
		if a.Offset != nil {
			r.Offset = *a.Offset
		}
		o.retry.Reset()
		o.settle(p, r, nil)
		return true
	}
	if !p.sent {
		return false // it is on its way again
	}
	after := hint(a.RetryAfterMs)
	switch a.Code {
	case "OUTCOME_UNKNOWN":
		if after == 0 {
			after = unknownWait
		}
	case "OVERLOADED", "BROKER_UNAVAILABLE", "RATE_LIMITED", "AUTH_FAILED", "TOKEN_EXPIRED":
	default:
		o.settle(p, Receipt{}, &RefusedError{ID: p.Envelope.ID, Code: a.Code})
		return false
	}
	if after > 0 {
		after += rand.N(after/5 + 1) // #nosec G404 -- spreads load
	} else {
		after = o.retry.NextBackOff()
	}
	p.sent, p.retryAt = false, time.Now().Add(after)
	o.outstanding--
	if !p.refused {
		p.refused = true
		o.refused++
	}
	o.signal()
	return false
}

// next is the frame to send now, or nil and how long to wait unless woken. It fails with
// errNoAnswer when the oldest outstanding message waited too long, and with errMoved when the
// session should end because leave (zero: never) has come.
func (o *outbox) next(maxBytes int, leave time.Time) ([]byte, time.Duration, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	now, wait := time.Now(), forever
	if o.outstanding > 0 {
		i := slices.IndexFunc(o.queue, func(p *Pending) bool { return p.sent })
		wait = o.queue[i].sentAt.Add(o.ackTimeout).Sub(now)
		if wait <= 0 {
			return nil, 0, errNoAnswer
		}
	}
	if !leave.IsZero() {
		if !now.Before(leave) {
			left := leave.Add(leaveGrace).Sub(now)
			if o.outstanding == 0 || left <= 0 {
				return nil, 0, errMoved
			}
			return nil, min(wait, left), nil
		}
		wait = min(wait, leave.Sub(now))
	}
	window := o.window
	if o.refused > 0 {
		window = 1
	}
	for o.outstanding < window {
		i := slices.IndexFunc(o.queue, func(p *Pending) bool { return !p.sent })
		if i < 0 {
			break
		}
		p := o.queue[i]
		if maxBytes > 0 && len(p.frame) > maxBytes {
			// The gateway would close the connection rather than answer.
			o.settle(p, Receipt{}, &RefusedError{ID: p.Envelope.ID, Code: "MESSAGE_TOO_LARGE"})
			continue
		}
		if d := p.retryAt.Sub(now); d > 0 {
			wait = min(wait, d)
			break
		}
		p.sent, p.sentAt = true, now
		o.outstanding++
		return p.frame, 0, nil
	}
	return nil, wait, nil
}

func (o *outbox) isClosed() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.closed
}

// close fails everything unsettled.
func (o *outbox) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed = true
	for len(o.queue) > 0 {
		o.settle(o.queue[0], Receipt{}, ErrClosed)
	}
}
