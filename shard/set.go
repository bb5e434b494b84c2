package shard

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"im-gateway/codec"
)

// Bounds of a shard's queues, in batches or calls.
const (
	ingressQueue  = 64
	resultQueue   = 64
	deliveryQueue = 16
	presenceQueue = 64
	controlQueue  = 64
	publishQueue  = 1024
)

// Limits that follow from the layout of a session and of the wheel.
const (
	maxInterval        = time.Hour
	maxEgressBudget    = 1 << 30
	MaxSessionInFlight = 1<<16 - 1 // the most that Options.MaxSessionInFlight can be
	maxUserSessions    = 64
)

// Options configure a Set. Every field but Logger is required unless a default is named.
type Options struct {
	Shards    int
	Loops     int // event loops of the transport
	GatewayID string
	Nonce     uint64 // of session names
	Topic     string // the upstream topic, named in acks

	Settings Settings // until others are applied

	Heartbeat       time.Duration // between pings
	RefreshInterval time.Duration // of presence
	ClaimTimeout    time.Duration // how long `connected` waits for presence; 1 s
	AckDeadline     time.Duration // then OUTCOME_UNKNOWN
	DeliveryTimeout time.Duration // how long a frame may wait for the kernel to take it; 30 s
	AckTimeout      time.Duration // how long a client may take to acknowledge a delivery; 30 s
	MaxSessions     int           // of one user; 1: a newer session replaces the older; 1
	ReplaceKind     bool          // a newer session replaces one of the same kind of device
	RecentMessages  int           // names of accepted messages remembered for retries; 0: none

	Egress    Egress
	Publisher Publisher
	Presence  Presence
	Events    Events
	// Replaced is told of a session on another gateway that a claim here has replaced. It must not
	// block.
	Replaced func(user, gatewayID, session string)
	// Traced is told of a message with a span once its fate, u.Result, is known. It must not block and
	// keeps nothing of the record but the span; nil: nobody is told.
	Traced func(u *codec.Upstream)

	Logger     zerolog.Logger
	Registerer prometheus.Registerer
	Now        func() time.Time // time.Now
}

func (o *Options) validate() error {
	o.ClaimTimeout = orDefault(o.ClaimTimeout, time.Second)
	o.DeliveryTimeout = orDefault(o.DeliveryTimeout, 30*time.Second)
	o.AckTimeout = orDefault(o.AckTimeout, 30*time.Second)
	o.MaxSessions = orDefault(o.MaxSessions, 1)
	if o.Now == nil {
		o.Now = time.Now
	}
	switch {
	case o.Shards < 1 || o.Shards > codec.MaxShards:
		return fmt.Errorf("shards: %d, must be 1 to %d", o.Shards, codec.MaxShards)
	case o.Loops < 1 || o.Loops > codec.MaxLoops:
		return fmt.Errorf("loops: %d, must be 1 to %d", o.Loops, codec.MaxLoops)
	case o.Heartbeat < tickLength || o.RefreshInterval < tickLength || o.AckDeadline < tickLength:
		return fmt.Errorf("heartbeat %s, presence refresh %s, ack deadline %s: each must be at least %s",
			o.Heartbeat, o.RefreshInterval, o.AckDeadline, tickLength)
	case o.ClaimTimeout < 0 || o.DeliveryTimeout < 0:
		return fmt.Errorf("claim timeout %s, delivery timeout %s: neither may be negative", o.ClaimTimeout, o.DeliveryTimeout)
	case max(o.Heartbeat, o.RefreshInterval, o.ClaimTimeout, o.DeliveryTimeout) > maxInterval:
		return fmt.Errorf("heartbeat %s, presence refresh %s, claim timeout %s, delivery timeout %s: each must be at most %s",
			o.Heartbeat, o.RefreshInterval, o.ClaimTimeout, o.DeliveryTimeout, maxInterval)
	case o.AckTimeout < tickLength || o.AckTimeout > maxInterval:
		return fmt.Errorf("ack timeout: %s, must be %s to %s", o.AckTimeout, tickLength, maxInterval)
	case o.MaxSessions < 1 || o.MaxSessions > maxUserSessions:
		return fmt.Errorf("sessions of a user: %d, must be 1 to %d", o.MaxSessions, maxUserSessions)
	case o.RecentMessages < 0:
		return fmt.Errorf("remembered messages: %d, must not be negative", o.RecentMessages)
	case o.Egress == nil || o.Publisher == nil || o.Presence == nil || o.Events == nil ||
		o.Replaced == nil || o.Registerer == nil:
		return errors.New("a port is missing")
	}
	return nil
}

func orDefault[T time.Duration | int](v, def T) T {
	if v == 0 {
		return def
	}
	return v
}

// Set is the shards. Its methods may be called from any goroutine.
type Set struct {
	opts    Options // but for its Settings, which rules hold
	rules   atomic.Pointer[rules]
	shards  []*shard
	metrics *metrics
	egress  atomic.Int64  // bytes that wait for all sessions, as the shards last said
	done    chan struct{} // closed when Run's ctx has ended: nobody empties the queues any more

	measuring chan struct{} // capacity 1: held by the Measure that is under way

	// sending is held for reading by Deliver, a batch at a time: once Run has had it for writing, no
	// delivery comes in any more.
	sending sync.RWMutex
	stopped bool // under sending
}

// ErrStopped is returned by calls that reach a Set whose Run has ended.
var ErrStopped = errors.New("the shards have stopped")

// New validates the options and allocates the shards; Run starts them.
func New(opts Options) (*Set, error) {
	if err := opts.validate(); err != nil {
		return nil, fmt.Errorf("shard options: %w", err)
	}
	r, err := newRules(opts.Settings)
	if err != nil {
		return nil, fmt.Errorf("shard options: %w", err)
	}
	set := &Set{opts: opts, done: make(chan struct{}), measuring: make(chan struct{}, 1)}
	set.opts.Settings = Settings{}
	set.rules.Store(r)
	m, err := newMetrics(set, opts.Registerer)
	if err != nil {
		return nil, err
	}
	set.metrics = m
	for i := range opts.Shards {
		set.shards = append(set.shards, newShard(set, i, m))
	}
	return set, nil
}

// Run runs the shards until ctx ends and all have returned; every delivery that is unsettled then
// ends EndShutdown. It can be called once.
func (set *Set) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, s := range set.shards {
		wg.Go(func() { s.run(ctx) })
	}
	<-ctx.Done()
	close(set.done)
	wg.Wait()
	set.sending.Lock()
	set.stopped = true
	set.sending.Unlock()
	for _, s := range set.shards {
		s.settleAll(codec.EndShutdown)
	}
	return nil
}

// N is the number of shards.
func (set *Set) N() int { return len(set.shards) }

// Offer hands a loop's events to a shard. It never blocks; false: the queue is full, the loop keeps
// the batch and is told by Egress.Resume when there is room. Called by event loops.
func (set *Set) Offer(shard int, b *codec.IngressBatch) bool {
	s := set.shards[shard]
	select {
	case s.ingress <- b:
		return true
	default:
	}
	// The flag is set before the second try: either this try finds room, or the shard has yet to
	// receive a batch, and looks at the flag when it does.
	s.stalled[b.Loop].Store(true)
	select {
	case s.ingress <- b:
		return true
	default:
		set.metrics.ingressFull.Inc()
		return false
	}
}

// Return gives a batch back to its shard with the outcomes. It never blocks: one batch per loop
// and shard is under way, and there is room for each.
func (set *Set) Return(b *codec.EgressBatch) {
	s := set.shards[b.Shard]
	o := &s.out[b.Loop]
	o.back.Store(b)
	if o.wake.Load() {
		select {
		case s.returned <- struct{}{}:
		default: // the shard will look anyway
		}
	}
}

// Results gives records back to their shard with the broker's results. It blocks while the shard's
// queue is full, which a shard never lets last.
func (set *Set) Results(b *codec.UpstreamBatch) {
	select {
	case set.shards[b.Shard].results <- b:
	case <-set.done:
	}
}

// Deliver hands deliveries to a shard and blocks while its queue is full, until ctx ends. When it
// returns nil each of them will end; otherwise none has been taken.
func (set *Set) Deliver(ctx context.Context, shard int, b *codec.DeliveryBatch) error {
	set.sending.RLock()
	defer set.sending.RUnlock()
	if set.stopped {
		return ErrStopped
	}
	select {
	case set.shards[shard].deliveries <- b:
		return nil
	case <-set.done:
		return ErrStopped
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// PresenceResults gives results back to their shard; blocks as Results does.
func (set *Set) PresenceResults(shard int, r []PresenceResult) {
	select {
	case set.shards[shard].presence <- r:
	case <-set.done:
	}
}

// do runs f on the shard's goroutine and waits for it.
func (set *Set) do(ctx context.Context, n int, f func(*shard)) error {
	ran := make(chan struct{})
	call := func(s *shard) {
		defer close(ran)
		f(s)
	}
	select {
	case set.shards[n].control <- call:
	case <-set.done:
		return ErrStopped
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case <-ran:
		return nil
	case <-set.done:
		return ErrStopped
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
