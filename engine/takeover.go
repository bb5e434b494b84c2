package engine

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	clientv3 "go.etcd.io/etcd/client/v3"

	"im-gateway/broker"
	"im-gateway/registry"
)

const (
	// takeoverJitter is the part of takeover.after by which gateways differ in when they try, so that
	// one does not get all.
	takeoverJitter = 8
	// slowLook is how long etcd may take to list the topics.
	slowLook = 5 * time.Second
	// adoptionLook is how often an adopted topic is looked after.
	adoptionLook = time.Second
	// adoptionStop is how long what is open of an adopted topic has to end when it is given up.
	adoptionStop = 5 * time.Second
)

// Takeover reads the downstream topics of gateways that have died, until they return or, for ids that
// nobody returns under, until the topic has been empty for long enough to be removed.
type Takeover struct {
	o        TakeoverOptions
	log      zerolog.Logger
	topics   prometheus.Gauge
	waiting  prometheus.Gauge
	crowded  atomic.Bool // more topics are without an owner than may be taken over
	outcomes *prometheus.CounterVec

	seen    map[string]sighting // by gateway_id; owned by Run
	mu      sync.Mutex
	adopted map[string]bool // by gateway_id; under mu
}

// TakeoverOptions configure a Takeover.
type TakeoverOptions struct {
	Etcd       *clientv3.Client
	Consumer   *broker.Consumer // the gateway's own
	Admin      *broker.Admin
	GatewayID  string
	Instance   string        // unique per process
	LeaseTTL   time.Duration // of the ownership
	After      time.Duration // without an owner, until a topic is taken over
	Quiet      time.Duration // without a record, until the topic of a random id is removed
	MaxTopics  int           // taken over at a time
	Logger     zerolog.Logger
	Registerer prometheus.Registerer
}

var errNoTopic = errors.New("the topic does not exist")

// sighting is since when a topic has been seen without an owner.
type sighting struct {
	revision int64
	since    time.Time
	after    time.Duration
}

// NewTakeover registers the metrics; Run does the work.
func NewTakeover(o TakeoverOptions) (*Takeover, error) {
	t := &Takeover{
		o: o, log: o.Logger, seen: map[string]sighting{}, adopted: map[string]bool{},
		topics: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "im_gateway_takeover_topics", Help: "Downstream topics of dead gateways that this one reads.",
		}),
		waiting: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "im_gateway_takeover_waiting", Help: "Downstream topics of dead gateways that nobody reads, beyond what this one may take over.",
		}),
		outcomes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "im_gateway_takeovers_total",
			Help: "Dead gateways' topics: taken over; and how that ended: returned (its owner is back, or another gateway has " +
				"it), removed (empty for long enough), made_room (quiet, and others wait), handed_over (this gateway stopped), failed.",
		}, []string{"event"}),
	}
	for _, event := range []string{"taken", "returned", "removed", "made_room", "handed_over", "failed"} {
		t.outcomes.WithLabelValues(event)
	}
	if err := registerGauge(o.Registerer, "takeover_topics_bound", "How many topics this gateway may take over at a time (takeover.max_topics).",
		func() int { return o.MaxTopics }); err != nil {
		return nil, err
	}
	for _, c := range []prometheus.Collector{t.topics, t.waiting, t.outcomes} {
		if err := o.Registerer.Register(c); err != nil {
			return nil, fmt.Errorf("register the takeover's metrics: %w", err)
		}
	}
	return t, nil
}

// Run looks for topics without an owner until ctx ends, and returns when those that were taken over have
// been given up.
func (t *Takeover) Run(ctx context.Context) {
	if t.o.MaxTopics == 0 {
		return
	}
	var adoptions sync.WaitGroup
	defer adoptions.Wait()
	every := min(max(t.o.After/8, 100*time.Millisecond), 5*time.Second)
	look := time.NewTicker(every)
	defer look.Stop()
	for looked := time.Now(); ; looked = time.Now() {
		select {
		case <-look.C:
		case <-ctx.Done():
			return
		}
		orphans, err := registry.Orphans(ctx, t.o.Etcd)
		if time.Since(looked) > t.o.After/2+every+slowLook {
			clear(t.seen) // this process was stopped: it has not watched them meanwhile
		}
		if err != nil {
			clear(t.seen)
			continue
		}
		left := 0
		for _, o := range t.due(orphans, time.Now()) {
			if !t.begin(o.GatewayID) {
				left++
				continue
			}
			adoptions.Go(func() {
				defer t.end(o.GatewayID)
				t.adopt(ctx, o)
			})
		}
		t.waiting.Set(float64(left))
		t.crowded.Store(left > 0)
	}
}

// due returns the orphans that have been without an owner for long enough.
func (t *Takeover) due(orphans []registry.Orphan, now time.Time) (due []registry.Orphan) {
	seen := make(map[string]sighting, len(orphans))
	for _, o := range orphans {
		if o.GatewayID == t.o.GatewayID {
			continue // our own key was lost: the owner puts it back
		}
		s, again := t.seen[o.GatewayID]
		if !again || s.revision != o.Revision {
			s = sighting{o.Revision, now, t.o.After + rand.N(t.o.After/takeoverJitter+1)} // #nosec G404 -- spreads load
		}
		seen[o.GatewayID] = s
		if now.Sub(s.since) >= s.after {
			due = append(due, o)
		}
	}
	t.seen = seen
	return due
}

// begin reserves a place; false: it is being read already, or there are too many.
func (t *Takeover) begin(gatewayID string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.adopted[gatewayID] || len(t.adopted) >= t.o.MaxTopics {
		return false
	}
	t.adopted[gatewayID] = true
	t.topics.Inc()
	return true
}

func (t *Takeover) end(gatewayID string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.adopted, gatewayID)
	t.topics.Dec()
}

// adopt takes a topic over and reads it until it is given back, removed, or ctx ends.
func (t *Takeover) adopt(ctx context.Context, orphan registry.Orphan) {
	log := t.log.With().Str("dead_gateway", orphan.GatewayID).Logger()
	owner := registry.NewOwner(registry.OwnerOptions{
		Client: t.o.Etcd, GatewayID: orphan.GatewayID, Instance: t.o.Instance, LeaseTTL: t.o.LeaseTTL, Logger: log,
	})
	if err := owner.TakeOver(ctx, orphan); err != nil {
		if !errors.Is(err, registry.ErrNoOrphan) && ctx.Err() == nil {
			log.Warn().Err(err).Msg("a dead gateway's topic could not be taken over")
		}
		return
	}
	t.outcomes.WithLabelValues("taken").Inc()
	event, err := t.read(ctx, owner, orphan)
	t.outcomes.WithLabelValues(event).Inc()
	if err != nil {
		log.Warn().Err(err).Str("event", event).Msg("no longer reads a dead gateway's topic")
		return
	}
	log.Info().Str("event", event).Msg("no longer reads a dead gateway's topic")
}

// read reads the topic that owner has taken over, and returns how that ended.
func (t *Takeover) read(ctx context.Context, owner *registry.Owner, orphan registry.Orphan) (event string, err error) {
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var parts sync.WaitGroup
	end := func() { cancel(); parts.Wait() }
	defer end()
	release := func() error {
		end() // first, or what is given up would be put back
		releaseCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), adoptionStop)
		defer cancel()
		return owner.Release(releaseCtx)
	}
	exists, err := t.o.Admin.HasTopic(ctx, orphan.GatewayID)
	switch {
	case err != nil:
		return "failed", errors.Join(err, release())
	case !exists && orphan.Random:
		return "removed", owner.Remove(ctx)
	case !exists:
		return "failed", errors.Join(errNoTopic, release())
	}

	gone := make(chan struct{}, 1)
	consumer := t.o.Consumer.Adopt(orphan.GatewayID, func(ctx context.Context) error {
		if err := checkOwner(ctx, owner); err != nil {
			return err
		}
		exists, err := t.o.Admin.HasTopic(ctx, orphan.GatewayID)
		if err != nil || exists {
			return err
		}
		select {
		case gone <- struct{}{}:
		default:
		}
		return errNoTopic
	})
	ended := make(chan error, 2)
	parts.Go(func() { ended <- consumer.Run(work) })
	parts.Go(func() {
		if err := owner.Run(work); err != nil {
			ended <- err
		}
	})
	stop := func() error {
		stopCtx, cancel := context.WithTimeout(work, adoptionStop)
		defer cancel()
		return consumer.Stop(stopCtx)
	}
	look := time.NewTicker(adoptionLook)
	defer look.Stop()
	for {
		select {
		case err := <-ended:
			stopErr := stop()
			if errors.Is(err, broker.ErrFenced) || errors.Is(err, registry.ErrNotOwner) {
				return "returned", nil
			}
			return "failed", errors.Join(err, stopErr, release())
		case <-gone: // somebody has deleted it
			err := stop()
			if !orphan.Random {
				return "failed", errors.Join(errNoTopic, err, release())
			}
			end()
			return "removed", errors.Join(err, owner.Remove(ctx))
		case <-ctx.Done():
			return "handed_over", errors.Join(stop(), release())
		case <-look.C:
		}
		if errors.Is(owner.Check(ctx), registry.ErrNotOwner) {
			return "returned", stop()
		}
		if !orphan.Random && t.crowded.Load() && consumer.Quiet() >= t.o.Quiet {
			return "made_room", errors.Join(stop(), release())
		}
		if orphan.Random && consumer.Quiet() >= t.o.Quiet {
			if err := stop(); err != nil {
				return "failed", errors.Join(err, release())
			}
			if err := t.o.Admin.RemoveTopic(ctx, orphan.GatewayID); err != nil {
				return "failed", errors.Join(err, release())
			}
			end()
			return "removed", owner.Remove(ctx)
		}
	}
}

// checkOwner asks etcd whether the topic may be read, in the consumer's terms.
func checkOwner(ctx context.Context, owner *registry.Owner) error {
	err := owner.Check(ctx)
	if errors.Is(err, registry.ErrNotOwner) {
		return fmt.Errorf("%w: %w", broker.ErrFenced, err)
	}
	return err
}
