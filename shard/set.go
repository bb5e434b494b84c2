package shard

import (
	"context"
	"errors"
	"fmt"
	"sync"
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

// Options configure a Set. Every field but Logger is required unless a default is named.
type Options struct {
	Shards    int
	Loops     int // event loops of the transport
	GatewayID string
	Nonce     uint64 // of session names
	Topic     string // the upstream topic, named in acks

	Heartbeat          time.Duration // between pings
	RefreshInterval    time.Duration // of presence
	ClaimTimeout       time.Duration // how long `connected` waits for presence; 1 s
	AckDeadline        time.Duration // then OUTCOME_UNKNOWN
	DeliveryTimeout    time.Duration // how long a frame may wait for the kernel to take it; 30 s
	EgressBudget       int           // bytes that may wait for one session
	MaxMessageBytes    int           // told to clients
	MaxSessionInFlight int           // upstream messages without a result, per session; 256

	Egress    Egress
	Publisher Publisher
	Presence  Presence
	Events    Events
	// Replaced is told of a session on another gateway that a claim here has replaced. It must not
	// block.
	Replaced func(user, gatewayID, session string)

	Logger     zerolog.Logger
	Registerer prometheus.Registerer
	Now        func() time.Time // time.Now
}

func (o *Options) validate() error {
	o.ClaimTimeout = orDefault(o.ClaimTimeout, time.Second)
	o.DeliveryTimeout = orDefault(o.DeliveryTimeout, 30*time.Second)
	o.MaxSessionInFlight = orDefault(o.MaxSessionInFlight, 256)
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
	case o.EgressBudget < 1:
		return fmt.Errorf("egress budget: %d bytes", o.EgressBudget)
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
	opts   Options
	shards []*shard
	done   chan struct{} // closed when Run's ctx has ended: nobody empties the queues any more
}

// ErrStopped is returned by calls that reach a Set whose Run has ended.
var ErrStopped = errors.New("the shards have stopped")

// New validates the options and allocates the shards; Run starts them.
func New(opts Options) (*Set, error) {
	if err := opts.validate(); err != nil {
		return nil, fmt.Errorf("shard options: %w", err)
	}
	set := &Set{opts: opts, done: make(chan struct{})}
	m, err := newMetrics(set, opts.Registerer)
	if err != nil {
		return nil, err
	}
	for i := range opts.Shards {
		set.shards = append(set.shards, newShard(set, i, m))
	}
	return set, nil
}

// Run runs the shards until ctx ends; every delivery that is unsettled then ends EndShutdown.
func (set *Set) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, s := range set.shards {
		wg.Go(func() { s.run(ctx) })
	}
	<-ctx.Done()
	close(set.done)
	wg.Wait()
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
		return false
	}
}

// Return gives a batch back to its shard with the outcomes. It never blocks: one batch per loop
// and shard is under way, and there is room for each.
func (set *Set) Return(b *codec.EgressBatch) { set.shards[b.Shard].returns <- b }

// Results gives records back to their shard with the broker's results. It blocks while the shard's
// queue is full, which a shard never lets last.
func (set *Set) Results(b *codec.UpstreamBatch) {
	select {
	case set.shards[b.Shard].results <- b:
	case <-set.done:
	}
}

// Deliver hands deliveries to a shard and blocks while its queue is full, until ctx ends.
func (set *Set) Deliver(ctx context.Context, shard int, b *codec.DeliveryBatch) error {
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
