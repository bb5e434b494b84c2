package broker

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/IBM/sarama"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"im-gateway/codec"
)

const (
	rejoinBackoffMin = 100 * time.Millisecond
	rejoinBackoffMax = 5 * time.Second
	// steadySession is how long a session must have lasted for the back-off to begin anew.
	steadySession = 30 * time.Second
	// leaveGrace is what the last commit gets.
	leaveGrace = time.Second
	drainPoll  = 5 * time.Millisecond
)

// ErrFenced is returned by Run when another member has joined the group under this gateway's id: it
// owns the topic now, and this process must not read it again.
var ErrFenced = errors.New("kafka consumer: another gateway has taken the topic over")

// Consumer reads this gateway's downstream topic. NewConsumer, then Run on a goroutine of its own;
// Stop, or the end of Run's context, ends it. All methods may be called from any goroutine.
type Consumer struct {
	// Immutable after NewConsumer.
	opts       Options
	producer   *Producer
	dispatch   func(ctx context.Context, shard int, b *codec.DeliveryBatch) error
	beforeJoin func(context.Context) error
	shards     int
	log        zerolog.Logger
	link       *link
	metrics    consumerMetrics
	ends       [codec.NumEnds]prometheus.Counter

	started   atomic.Bool
	readyOnce sync.Once
	ready     chan struct{} // closed when partitions are claimed for the first time
	stopOnce  sync.Once
	draining  chan struct{} // closed by Stop: read no further
	left      chan struct{} // closed by Stop: leave the group
	done      chan struct{} // closed by Run

	adopted    bool         // the topic is another gateway's
	active     atomic.Int64 // Unix ms when a record was read or open last, or a claim began or ended
	inSession  atomic.Bool
	endSession atomic.Pointer[context.CancelCauseFunc] // ends the session under way
	claims     atomic.Int32                            // claims that are running
	idle       atomic.Int32                            // of these, told to drain and with nothing open
}

// NewConsumer validates and allocates. dispatch hands deliveries to a shard and may block until the
// shard has room; the records' Owner is told of their ends. Undelivered and dead-letter records go
// through producer, which must outlive the consumer. beforeJoin, when not nil, is called before each
// time the group is joined; its ErrFenced ends Run, another error is tried again.
func NewConsumer(opts Options, producer *Producer, shards int,
	dispatch func(ctx context.Context, shard int, b *codec.DeliveryBatch) error,
	beforeJoin func(context.Context) error,
) (*Consumer, error) {
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	if shards < 1 || shards > codec.MaxShards {
		return nil, fmt.Errorf("broker: %d shards", shards)
	}
	if beforeJoin == nil {
		beforeJoin = func(context.Context) error { return nil }
	}
	c := &Consumer{
		opts: opts, producer: producer, dispatch: dispatch, beforeJoin: beforeJoin, shards: shards,
		log:      opts.Logger,
		link:     newLink(),
		ready:    make(chan struct{}),
		draining: make(chan struct{}),
		left:     make(chan struct{}),
		done:     make(chan struct{}),
	}
	if err := opts.consumerConfig(c.link).Validate(); err != nil {
		return nil, fmt.Errorf("broker: %w", err)
	}
	if c.metrics, err = newConsumerMetrics(&c.opts, opts.Registerer); err != nil {
		return nil, err
	}
	for end := codec.EndDelivered; end < codec.NumEnds; end++ {
		c.ends[end] = c.metrics.ends.WithLabelValues(end.String())
	}
	return c, nil
}

// Adopt returns a consumer of another gateway's topic, which is read in its stead: under its group and
// its member's id. What it shares with c is c's to close. beforeJoin is as NewConsumer's.
func (c *Consumer) Adopt(gatewayID string, beforeJoin func(context.Context) error) *Consumer {
	opts := c.opts
	opts.GatewayID, opts.Begin = gatewayID, nil
	return &Consumer{
		opts: opts, producer: c.producer, dispatch: c.dispatch, beforeJoin: beforeJoin, shards: c.shards,
		log:     opts.Logger,
		link:    newLink(),
		metrics: c.metrics, ends: c.ends,
		ready:    make(chan struct{}),
		draining: make(chan struct{}),
		left:     make(chan struct{}),
		done:     make(chan struct{}),
		adopted:  true,
	}
}

// Quiet is how long the topic has had nothing to read, while it was read; 0: it is not read at present.
func (c *Consumer) Quiet() time.Duration {
	if !c.inSession.Load() || c.claims.Load() == 0 {
		return 0
	}
	return time.Since(time.UnixMilli(c.active.Load()))
}

// Ready is closed once the group is joined and partitions are claimed.
func (c *Consumer) Ready() <-chan struct{} { return c.ready }

// Run joins the group and reads until Stop or the end of ctx, through rebalances, outages and the
// topic's absence. It returns nil after a stop, ErrFenced, or an error that trying again cannot mend.
func (c *Consumer) Run(ctx context.Context) error {
	c.started.Store(true)
	defer close(c.done)
	defer c.link.cut()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// The last commit needs the network for a moment more, but not for ever.
	defer context.AfterFunc(ctx, func() {
		if c.inSession.Load() {
			c.link.wait(leaveGrace)
		}
		c.link.cut()
	})()
	go func() {
		select {
		case <-c.left:
		case <-ctx.Done():
		}
		cancel()
	}()

	group, client, err := c.client()
	if err != nil {
		return err
	}
	errorsLogged := make(chan struct{})
	go func() {
		defer close(errorsLogged)
		c.logErrors(group.Errors())
	}()
	err = c.sessions(ctx, group)
	c.link.cut() // a static member does not leave, yet Close looks for the coordinator first
	_ = group.Close()
	_ = client.Close()
	<-errorsLogged
	return err
}

// client makes sarama's objects; none of them connects yet.
func (c *Consumer) client() (sarama.ConsumerGroup, sarama.Client, error) {
	client, err := sarama.NewClient(c.opts.Brokers, c.opts.consumerConfig(c.link))
	if err != nil {
		return nil, nil, fmt.Errorf("kafka consumer: %w", err)
	}
	group, err := sarama.NewConsumerGroupFromClient(c.opts.Group(), client)
	if err != nil {
		_ = client.Close()
		return nil, nil, fmt.Errorf("kafka consumer: %w", err)
	}
	return group, client, nil
}

// sessions joins the group again and again.
func (c *Consumer) sessions(ctx context.Context, group sarama.ConsumerGroup) error {
	topics := []string{c.opts.DownstreamTopic()}
	backoff := rejoinBackoffMin
	for ctx.Err() == nil {
		h := &handler{c: c}
		begun := time.Now()
		err := c.beforeJoin(ctx)
		if err != nil {
			err = fmt.Errorf("before joining: %w", err)
		} else {
			sessionCtx, end := context.WithCancelCause(ctx)
			c.endSession.Store(&end)
			err = group.Consume(sessionCtx, topics, h)
			c.inSession.Store(false)
			if ctx.Err() == nil && sessionCtx.Err() != nil {
				err = errors.Join(err, context.Cause(sessionCtx))
			}
			end(nil)
		}
		switch {
		case errors.Is(err, ErrFenced), errors.Is(err, sarama.ErrFencedInstancedId),
			errors.Is(h.cause, sarama.ErrFencedInstancedId):
			return ErrFenced
		case ctx.Err() != nil:
			return nil
		case permanent(err) && !c.joined():
			return fmt.Errorf("kafka consumer: %w", err)
		case c.refused(err):
			return fmt.Errorf("kafka consumer: needs READ on topic %s and on group %s: %w", topics[0], c.opts.Group(), err)
		}
		if time.Since(begun) > steadySession {
			backoff = rejoinBackoffMin
		}
		c.log.Warn().AnErr("cause", h.cause).Err(err).Str("topic", topics[0]).Dur("retry_in", backoff).
			Msg("kafka: the consumer's session has ended, joining again")
		c.pause(ctx, backoff)
		backoff = min(2*backoff, rejoinBackoffMax)
	}
	return nil
}

// refused reports whether rights are missing at the start. Later they are waited for: it is better to
// serve without downstream records than not at all.
func (c *Consumer) refused(err error) bool {
	return !c.joined() &&
		(errors.Is(err, sarama.ErrGroupAuthorizationFailed) || errors.Is(err, sarama.ErrTopicAuthorizationFailed))
}

// joined reports whether the group has been joined once. From then on nothing but being fenced ends the
// consumer: a fault of Kafka's, credentials included, must not end every gateway.
func (c *Consumer) joined() bool {
	select {
	case <-c.ready:
		return true
	default:
		return false
	}
}

func (c *Consumer) pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// unknownMax is after how many reports in a row that the topic is not there, each within unknownSpan of
// the one before, it is taken to be gone: one may be a broker's that has not heard of it yet.
const (
	unknownMax  = 4
	unknownSpan = 5 * time.Second
)

var errTopicGone = errors.New("the topic is gone")

// logErrors logs sarama's errors. On a topic that was deleted sarama would go on for minutes: the session
// is ended, so that it is joined anew, with the topic made again.
func (c *Consumer) logErrors(errs <-chan error) {
	var quiet quiet
	unknown, last := 0, time.Time{}
	for err := range errs {
		if errors.Is(err, sarama.ErrUnknownTopicOrPartition) {
			if now := time.Now(); now.Sub(last) > unknownSpan {
				unknown, last = 1, now
			} else {
				unknown, last = unknown+1, now
			}
			if unknown == unknownMax {
				unknown = 0
				if end := c.endSession.Load(); end != nil {
					(*end)(errTopicGone)
				}
			}
		}
		if n, ok := quiet.allow(); ok {
			c.log.Warn().Err(err).Int("suppressed", n).Msg("kafka: consumer")
		}
	}
}

// Stop ends the consumer in order: it reads no further, waits until what is open has ended and is
// stored where it belongs, commits and leaves. At the end of ctx it leaves with what is open; the
// next reader reads that again. It returns when Run has, at most about leaveGrace after ctx.
func (c *Consumer) Stop(ctx context.Context) error {
	c.stopOnce.Do(func() { close(c.draining) })
	if !c.started.Load() {
		return nil
	}
	settled := c.drain(ctx)
	select {
	case <-c.left:
	default:
		close(c.left)
	}
	<-c.done // Run cuts the link when the last commit takes longer than leaveGrace
	if !settled {
		return fmt.Errorf("kafka consumer: left with records open: %w", ctx.Err())
	}
	return nil
}

// drain waits until every claim is idle; without a session nothing is open.
func (c *Consumer) drain(ctx context.Context) bool {
	t := time.NewTicker(drainPoll)
	defer t.Stop()
	for {
		if c.idle.Load() >= c.claims.Load() {
			return true
		}
		select {
		case <-t.C:
		case <-c.done:
			return true
		case <-ctx.Done():
			return false
		}
	}
}

// handler is sarama's view of one session.
type handler struct {
	c     *Consumer
	cause error // why the session ended
}

var _ sarama.ConsumerGroupHandler = (*handler)(nil)

// Setup is called by sarama when the group is joined.
func (h *handler) Setup(s sarama.ConsumerGroupSession) error {
	c := h.c
	n := len(s.Claims()[c.opts.DownstreamTopic()])
	c.active.Store(time.Now().UnixMilli())
	c.inSession.Store(true)
	c.metrics.sessions.Inc()
	c.log.Info().Str("topic", c.opts.DownstreamTopic()).Int("partitions", n).Int32("generation", s.GenerationID()).
		Msg("kafka: consumer group joined")
	if n > 0 {
		c.readyOnce.Do(func() { close(c.ready) })
	}
	return nil
}

// Cleanup is called by sarama when all claims have returned, before the last commit.
func (h *handler) Cleanup(s sarama.ConsumerGroupSession) error {
	h.cause = context.Cause(s.Context())
	return nil
}

// ConsumeClaim is called by sarama on a goroutine for each claimed partition.
func (h *handler) ConsumeClaim(s sarama.ConsumerGroupSession, in sarama.ConsumerGroupClaim) error {
	k := newClaim(h.c, s, in)
	defer k.close()
	return k.run()
}
