package broker

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/IBM/sarama"
	"github.com/rs/zerolog"

	"im-gateway/codec"
)

const (
	// queueBatches is the room in the queue per shard. When it is full a shard keeps its batch and
	// tries again: the credits bound what it can have.
	queueBatches = 4
	// watchInterval is how often the watch looks for an outage.
	watchInterval = 250 * time.Millisecond
	settlePoll    = 2 * time.Millisecond
	// abandonGrace is what sarama gets to give everything back once its link is cut, and what the
	// shards get to hand in what they had admitted before.
	abandonGrace = 3 * time.Second
	lateGrace    = 500 * time.Millisecond
)

// Producer stores client messages and the gateway's own records. NewProducer, then Run on a goroutine
// of its own, then Close. The other methods may be called from any goroutine at any time.
//
// A record is answered exactly once, by the results function, in batches by shard; the records of
// one session are handed over, and stored, in the order in which they were queued.
type Producer struct {
	// Immutable after NewProducer.
	opts      Options
	gatewayID []byte
	shards    int
	results   func(*codec.UpstreamBatch)
	log       zerolog.Logger
	link      *link
	metrics   producerMetrics

	credits  credits
	progress atomic.Uint64             // batches of answers with a success among them
	queue    chan *codec.UpstreamBatch // from the shards; never closed
	side     chan *sideRecord          // from the consumer; never closed
	events   chan userEvent            // from the shards; never closed; drops when full
	records  sync.Pool                 // *upstreamRecord
	batches  sync.Pool                 // *codec.UpstreamBatch
	quiet    quiet                     // the collector's

	started   atomic.Bool
	ready     chan struct{} // closed by Run once connected
	closing   chan struct{} // closed by Close
	stopFeeds chan struct{} // closed by Run when everything admitted is answered, or given up
	done      chan struct{} // closed by Run
	closeOnce sync.Once
}

// NewProducer validates and allocates. results gets every answer; it may block until the shard has
// room, and must return when the shards have stopped. It is called from two goroutines of the
// producer, and the batch becomes its own. shards is the number of shards.
func NewProducer(opts Options, results func(*codec.UpstreamBatch), shards int) (*Producer, error) {
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	if shards < 1 || shards > codec.MaxShards {
		return nil, fmt.Errorf("broker: %d shards", shards)
	}
	p := &Producer{
		opts:      opts,
		gatewayID: []byte(opts.GatewayID),
		shards:    shards,
		results:   results,
		log:       opts.Logger,
		link:      newLink(),
		queue:     make(chan *codec.UpstreamBatch, queueBatches*shards),
		side:      make(chan *sideRecord, sideQueue),
		events:    make(chan userEvent, eventsQueue),
		records:   sync.Pool{New: func() any { return new(upstreamRecord) }},
		batches:   sync.Pool{New: func() any { return new(codec.UpstreamBatch) }},
		ready:     make(chan struct{}),
		closing:   make(chan struct{}),
		stopFeeds: make(chan struct{}),
		done:      make(chan struct{}),
	}
	p.credits.maxRecords = int64(opts.MaxInFlightRecords)
	p.credits.maxBytes = int64(opts.MaxInFlightBytes)
	if err := opts.producerConfig(p.link, sideMetadataRetries, sideRetries).Validate(); err != nil {
		return nil, fmt.Errorf("broker: %w", err)
	}
	if p.metrics, err = newProducerMetrics(p, opts.Registerer); err != nil {
		return nil, err
	}
	return p, nil
}

// Admit asks for room for one record of so many bytes (codec.Upstream.Size). A refusal comes with
// its code and a hint, in milliseconds, when to try again. Room that is not used is given back by
// Cancel; used room is given back by the producer when it answers.
func (p *Producer) Admit(bytes int) (codec.Code, int32) { return p.credits.take(bytes, &p.metrics) }

// Cancel gives back room that was admitted and not used.
func (p *Producer) Cancel(records, bytes int) { p.credits.give(int64(records), int64(bytes)) }

// Queue takes the batches of a shard, admitted records all of them; a batch becomes the producer's.
// It is full while Kafka is away or slow: the shard tries again. One shard's batches keep their order.
func (p *Producer) Queue(int) chan<- *codec.UpstreamBatch { return p.queue }

// Ready is closed once the producer is connected; before, Admit refuses.
func (p *Producer) Ready() <-chan struct{} { return p.ready }

// Healthy reports whether client messages are admitted.
func (p *Producer) Healthy() bool { return p.credits.gate.Load() == gateOpen }

func (p *Producer) abandoned() bool { return p.link.ctx.Err() != nil }

// Run connects, however long that takes, and produces until Close; it returns after all that it
// started has ended. The end of ctx is an immediate stop: what is in flight is answered
// OUTCOME_UNKNOWN. The error is one that trying again cannot mend, such as a refused login.
func (p *Producer) Run(ctx context.Context) error {
	p.started.Store(true)
	defer close(p.done)
	defer p.link.cut()
	defer context.AfterFunc(ctx, p.link.cut)()

	upstream, side, err := p.connect()
	if err != nil || upstream == nil {
		p.credits.gate.Store(gateClosed)
		return err
	}
	var feeds, collectors sync.WaitGroup
	collectors.Go(func() { p.collect(upstream.producer.Successes(), upstream.producer.Errors()) })
	collectors.Go(func() { p.collectSide(side.producer.Successes(), side.producer.Errors()) })
	feeds.Go(func() { p.feed(upstream.producer.Input()) })
	feeds.Go(func() { p.feedSide(side.producer.Input()) })
	p.credits.gate.CompareAndSwap(gateClosed, gateOpen)
	close(p.ready)

	p.watch() // until Close, or the end of ctx
	p.credits.gate.Store(gateClosed)
	p.settle()

	close(p.stopFeeds)
	feeds.Wait() // nothing may be sent to Input any more: sarama closes it
	upstream.producer.AsyncClose()
	side.producer.AsyncClose()
	collectors.Wait()
	p.link.cut() // everything is answered; a metadata refresh must not hold the clients up
	_ = upstream.client.Close()
	_ = side.client.Close()
	p.refuseLate()
	return nil
}

// connected is a sarama producer and its client.
type connected struct {
	client   sarama.Client
	producer sarama.AsyncProducer
}

// connect returns nils when the producer is stopped first.
func (p *Producer) connect() (upstream, side *connected, err error) {
	stop := make(chan struct{})
	defer close(stop)
	go func() { // nothing is in flight yet: Close need not wait for Kafka
		select {
		case <-p.closing:
			p.link.cut()
		case <-stop:
		}
	}()
	upstream, err = p.dial(p.opts.producerConfig(p.link, upstreamMetadataRetries, upstreamRetries))
	if err != nil || upstream == nil {
		return nil, nil, err
	}
	side, err = p.dial(p.opts.producerConfig(p.link, sideMetadataRetries, sideRetries))
	if err != nil || side == nil {
		upstream.producer.AsyncClose()
		drain(upstream.producer)
		_ = upstream.client.Close()
		return nil, nil, err
	}
	return upstream, side, nil
}

func drain(p sarama.AsyncProducer) {
	go func() {
		for range p.Successes() {
		}
	}()
	for range p.Errors() {
	}
}

func (p *Producer) dial(conf *sarama.Config) (*connected, error) {
	var quiet quiet
	for {
		client, err := sarama.NewClient(p.opts.Brokers, conf)
		if err == nil {
			var producer sarama.AsyncProducer
			if producer, err = sarama.NewAsyncProducerFromClient(client); err == nil {
				return &connected{client, producer}, nil
			}
			_ = client.Close()
		}
		switch {
		case p.abandoned():
			return nil, nil
		case permanent(err):
			return nil, fmt.Errorf("kafka producer: %w", err)
		}
		if n, ok := quiet.allow(); ok {
			p.log.Warn().Err(err).Int("suppressed", n).Msg("kafka: cannot start the producer yet")
		}
		p.link.wait(retryBackoffMax)
	}
}

// permanent reports whether trying again is of no use.
func permanent(err error) bool {
	var conf sarama.ConfigurationError
	return errors.As(err, &conf) || errors.Is(err, sarama.ErrSASLAuthenticationFailed) ||
		errors.Is(err, sarama.ErrClusterAuthorizationFailed) || errors.Is(err, sarama.ErrUnsupportedSASLMechanism)
}

// watch closes the gate when nothing was answered for too long while something is in flight, and
// opens it again when nothing is in flight, so that a client's message may try. A success opens it too.
func (p *Producer) watch() {
	t := time.NewTicker(watchInterval)
	defer t.Stop()
	since, seen := time.Now(), p.progress.Load()
	for {
		select {
		case <-p.closing:
			return
		case <-p.link.ctx.Done():
			return
		case now := <-t.C:
			n := p.progress.Load()
			switch {
			case n != seen || p.credits.records.Load() == 0:
				since, seen = now, n
				if p.credits.gate.CompareAndSwap(gateOutage, gateOpen) {
					p.log.Info().Msg("kafka: client messages are admitted again")
				}
			case now.Sub(since) >= p.opts.UnavailableAfter:
				if p.credits.gate.CompareAndSwap(gateOpen, gateOutage) {
					p.log.Error().Dur("for", now.Sub(since)).Int64("in_flight", p.credits.records.Load()).
						Msg("kafka answers nothing: client messages are refused until it does")
				}
			}
		}
	}
}

// settle waits until everything admitted is answered or cancelled, or the link is cut.
func (p *Producer) settle() {
	t := time.NewTicker(settlePoll)
	defer t.Stop()
	for p.credits.records.Load() > 0 {
		select {
		case <-p.link.ctx.Done():
			return
		case <-t.C:
		}
	}
}

// refuseLate answers what shards had admitted before the gate closed and queue only now.
func (p *Producer) refuseLate() {
	end := time.NewTimer(lateGrace)
	defer end.Stop()
	t := time.NewTicker(settlePoll)
	defer t.Stop()
	for p.credits.records.Load() > 0 {
		select {
		case b := <-p.queue:
			p.refuse(b, b.Records)
		case <-t.C:
		case <-end.C:
			p.log.Warn().Int64("records", p.credits.records.Load()).
				Msg("kafka: messages were admitted and never queued or answered")
			return
		}
	}
}

// Close stops the producer: nothing more is admitted, what is in flight is waited for until ctx ends.
// Then the connections are cut and what was not answered is answered OUTCOME_UNKNOWN. It returns when
// Run has returned, at most a few seconds after the end of ctx, with an error if the flush was cut short.
func (p *Producer) Close(ctx context.Context) error {
	p.closeOnce.Do(func() { close(p.closing) })
	if !p.started.Load() {
		return nil
	}
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
	}
	left := p.credits.records.Load()
	p.link.cut()
	select {
	case <-p.done:
	case <-time.After(abandonGrace):
		return fmt.Errorf("kafka producer: did not end, %d messages unanswered: %w", left, ctx.Err())
	}
	return fmt.Errorf("kafka producer: closed with %d messages unanswered: %w", left, ctx.Err())
}

func (p *Producer) noteError(err error) {
	if n, ok := p.quiet.allow(); ok {
		p.log.Warn().Err(err).Int("suppressed", n).Msg("kafka: client message without success")
	}
}
