package shards

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"im-gateway/codec"
	"im-gateway/shard"
)

// patience is the longest wait for the shards to get something done.
const patience = time.Minute

// outstandingBatches is how many batches may be under way to a shard, less than any of its queues holds.
const outstandingBatches = 8

// driver is everything around the shards, on one goroutine.
type driver struct {
	opts     Options
	set      *shard.Set
	registry *prometheus.Registry
	builder  *codec.Builder
	message  codec.ClientMessage
	content  []byte
	random   *rand.Rand

	links []link // by shard and loop

	egress   chan *codec.EgressBatch
	upstream chan *codec.UpstreamBatch
	presence chan presenceOps
	online   atomic.Int64 // user.online
	idle     []*push      // not under way
	flying   []*push

	// What the shards have asked for so far.
	frames, acks, pings, closes, batches, refreshes, offset int64
}

// link is the slots that a shard and a loop share.
type link struct {
	shard, loop int
	users       []string // by slot
}

type presenceOps struct {
	shard int
	ops   []shard.PresenceOp
}

// push is records on their way through one shard, used again and again.
type push struct {
	records []codec.Downstream
	batch   codec.DeliveryBatch
	open    atomic.Int64 // deliveries that have not ended
	failed  atomic.Int64 // that did not end delivered
}

// Ends implements codec.EndSink.
func (p *push) Ends(list []codec.Ended) {
	for i := range list {
		if list[i].End != codec.EndDelivered {
			p.failed.Add(1)
		}
	}
	p.open.Add(-int64(len(list)))
}

func newDriver(o Options) (*driver, error) {
	d := &driver{
		opts:     o,
		registry: prometheus.NewRegistry(),
		builder:  codec.NewBuilder("bench", 1, nil),
		random:   rand.New(rand.NewPCG(1, 2)),
		content:  []byte(`"` + strings.Repeat("x", o.Size) + `"`),
		links:    make([]link, o.Shards*o.Loops),
		egress:   make(chan *codec.EgressBatch, o.Shards*o.Loops),
		upstream: make(chan *codec.UpstreamBatch, 16*o.Shards),
		presence: make(chan presenceOps, 16*o.Shards),
	}
	d.message = codec.ClientMessage{
		Type: []byte("message"), ClientMsgID: []byte("c-0123456789abcdef"), Data: d.content, Timestamp: time.Now().UnixMilli(),
	}
	var err error
	d.set, err = shard.New(shard.Options{
		Shards: o.Shards, Loops: o.Loops, GatewayID: "bench", Nonce: 1, Topic: "im-upstream-topic",
		Heartbeat: o.Heartbeat, RefreshInterval: o.Heartbeat, AckDeadline: 10 * time.Second,
		ClaimTimeout: patience, Settings: shard.Settings{EgressBudget: 1 << 20, MaxMessageBytes: 1 << 16},
		Egress: loops{d}, Publisher: broker{d}, Presence: redis{d}, Events: d,
		Replaced: func(string, string, string) {},
		Logger:   zerolog.Nop(), Registerer: d.registry,
	})
	if err != nil {
		return nil, fmt.Errorf("make the shards: %w", err)
	}
	for i := range d.links {
		d.links[i].shard, d.links[i].loop = i/o.Loops, i%o.Loops
	}
	counts := make([]int, len(d.links))
	for n := range o.Sessions {
		counts[d.linkOf(n, userName(n))]++
	}
	for i, n := range counts {
		d.links[i].users = make([]string, 0, n)
	}
	return d, nil
}

func userName(n int) string { return fmt.Sprintf("user-%09d", n) }

func (d *driver) linkOf(n int, user string) int {
	return codec.ShardOf(user, d.opts.Shards)*d.opts.Loops + n%d.opts.Loops
}

func (l *link) session(slot int) codec.SessionID {
	return codec.MakeSessionID(l.shard, l.loop, uint32(slot), 1)
}

// The ports. They only hand over; the driver's goroutine does the work.

type loops struct{ *driver }

// Submit implements shard.Egress.
func (l loops) Submit(b *codec.EgressBatch) { l.egress <- b }

// Resume implements shard.Egress: the driver offers again by itself.
func (loops) Resume(int, int) {}

type broker struct{ *driver }

// Admit implements shard.Publisher.
func (broker) Admit(int) (codec.Code, int32) { return codec.OK, 0 }

// Queue implements shard.Publisher.
func (b broker) Queue(int) chan<- *codec.UpstreamBatch { return b.upstream }

type redis struct{ *driver }

// Submit implements shard.Presence.
func (r redis) Submit(shard int, ops []shard.PresenceOp) bool {
	select {
	case r.presence <- presenceOps{shard, ops}:
		return true
	default:
		return false
	}
}

// UserEvent implements shard.Events.
func (d *driver) UserEvent(online bool, _ string, _ codec.SessionID, _ string, _ int64) {
	if online {
		d.online.Add(1)
	}
}

// pump does one piece of the loops', the broker's or Redis's work; false: there was none.
func (d *driver) pump() bool {
	select {
	case b := <-d.egress:
		d.write(b)
	case b := <-d.upstream:
		for _, u := range b.Records {
			d.offset++
			u.Result = codec.UpstreamResult{Code: codec.OK, Partition: 3, Offset: d.offset}
		}
		d.set.Results(b)
	case p := <-d.presence:
		results := make([]shard.PresenceResult, len(p.ops))
		for i, op := range p.ops {
			results[i] = shard.PresenceResult{Kind: op.Kind, Session: op.Session, Version: 1}
			if op.Kind == shard.Refresh {
				d.refreshes++
			}
		}
		d.set.PresenceResults(p.shard, results)
	default:
		return false
	}
	return true
}

var success = []byte(`"status":"success"`)

// write is a loop whose every connection takes everything at once.
func (d *driver) write(b *codec.EgressBatch) {
	d.batches++
	for i := range b.Commands {
		switch c := &b.Commands[i]; c.Kind {
		case codec.CommandFrame:
			c.Outcome = codec.OutcomeFlushed
			d.frames++
			if c.Delivery.Record == nil && bytes.Contains(c.Payload, success) {
				d.acks++
			}
		case codec.CommandPing:
			d.pings++
		case codec.CommandClose:
			d.closes++
		}
	}
	d.set.Return(b)
}

// until pumps until done holds.
func (d *driver) until(ctx context.Context, what string, done func() bool) error {
	deadline := time.Now().Add(patience)
	for n := 0; !done(); n++ {
		if d.pump() {
			continue
		}
		runtime.Gosched()
		if n%1024 == 0 {
			if err := ctx.Err(); err != nil {
				return context.Cause(ctx)
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("%s: not within %s", what, patience)
			}
		}
	}
	return nil
}

func (d *driver) offer(ctx context.Context, l *link, b *codec.IngressBatch) error {
	return d.until(ctx, "the shard takes a batch", func() bool { return d.set.Offer(l.shard, b) })
}

// open opens sessions from to to-1 and waits until all are connected.
func (d *driver) open(ctx context.Context, from, to int) error {
	pending := make([]*codec.IngressBatch, len(d.links))
	flush := func(i int) error {
		b := pending[i]
		pending[i] = nil
		if b == nil {
			return nil
		}
		return d.offer(ctx, &d.links[i], b)
	}
	start, now := d.frames, time.Now().UnixMilli()
	for n := from; n < to; n++ {
		user := userName(n)
		i := d.linkOf(n, user)
		l := &d.links[i]
		if pending[i] == nil {
			pending[i] = codec.NewIngressBatch(l.loop)
		}
		pending[i].Events = append(pending[i].Events, codec.Event{
			Kind: codec.EventOpen, Session: l.session(len(l.users)),
			Open: &codec.Open{User: user, ExpiresAt: now + (24 * time.Hour).Milliseconds(), ConnectedAt: now},
		})
		l.users = append(l.users, user)
		if len(pending[i].Events) == d.opts.Batch {
			if err := flush(i); err != nil {
				return err
			}
			for d.pump() {
			}
		}
	}
	for i := range pending {
		if err := flush(i); err != nil {
			return err
		}
	}
	return d.until(ctx, "all sessions are connected", func() bool { return d.frames-start == int64(to-from) })
}

// send offers one batch of n messages of random sessions of one link.
func (d *driver) send(ctx context.Context, n int) error {
	l := &d.links[d.random.IntN(len(d.links))]
	if len(l.users) == 0 {
		return nil
	}
	b := codec.NewIngressBatch(l.loop)
	now := time.Now().UnixMilli()
	for range n {
		slot := d.random.IntN(len(l.users))
		id := l.session(slot)
		b.Events = append(b.Events, codec.Event{
			Kind: codec.EventMessage, Session: id, Upstream: d.builder.Build(&d.message, l.users[slot], id, now),
		})
	}
	return d.offer(ctx, l, b)
}

// messages routes at least n messages, keeping the shards busy, and returns how many.
func (d *driver) messages(ctx context.Context, n int) (int64, error) {
	window := int64(outstandingBatches * d.opts.Batch * d.opts.Shards)
	start, sent := d.acks, int64(0)
	for sent < int64(n) {
		if sent-(d.acks-start) < window {
			if err := d.send(ctx, d.opts.Batch); err != nil {
				return 0, err
			}
			sent += int64(d.opts.Batch)
		}
		for d.pump() {
		}
		if err := ctx.Err(); err != nil {
			return 0, context.Cause(ctx)
		}
	}
	return sent, d.until(ctx, "every message has its ack", func() bool { return d.acks-start == sent })
}

// trickle sends messages one by one, evenly spread.
func (d *driver) trickle(ctx context.Context, rate int, lasting time.Duration) (int64, error) {
	start, sent := d.acks, int64(0)
	began := time.Now()
	for time.Since(began) < lasting {
		due := int64(time.Since(began).Seconds() * float64(rate))
		if sent < due {
			if err := d.send(ctx, 1); err != nil {
				return 0, err
			}
			sent++
		}
		d.pump()
		if err := ctx.Err(); err != nil {
			return 0, context.Cause(ctx)
		}
	}
	return sent, d.until(ctx, "every message has its ack", func() bool { return d.acks-start == sent })
}

// pushes delivers at least n targets, records of fanout targets each, and returns how many.
func (d *driver) pushes(ctx context.Context, n, fanout int) (int64, error) {
	records := max(1, d.opts.Batch/fanout)
	d.idle, d.flying = nil, nil
	for range outstandingBatches {
		d.idle = append(d.idle, d.newPush(records, fanout))
	}
	start, sent := d.frames, int64(0)
	var failed int64
	collect := func() {
		kept := d.flying[:0]
		for _, p := range d.flying {
			if p.open.Load() > 0 {
				kept = append(kept, p)
				continue
			}
			failed += p.failed.Load()
			d.idle = append(d.idle, p)
		}
		d.flying = kept
	}
	for sent < int64(n) {
		if len(d.idle) > 0 {
			p := d.idle[len(d.idle)-1]
			d.idle = d.idle[:len(d.idle)-1]
			if err := d.deliver(ctx, p); err != nil {
				return 0, err
			}
			d.flying = append(d.flying, p)
			sent += int64(len(p.batch.Deliveries))
		}
		for d.pump() {
		}
		collect()
		if err := ctx.Err(); err != nil {
			return 0, context.Cause(ctx)
		}
	}
	err := d.until(ctx, "every push has ended", func() bool {
		collect()
		return len(d.flying) == 0
	})
	if err == nil && (failed > 0 || d.frames-start != sent) {
		err = fmt.Errorf("%d of %d pushes failed, %d frames", failed, sent, d.frames-start)
	}
	return sent, err
}

func (d *driver) newPush(records, fanout int) *push {
	p := &push{records: make([]codec.Downstream, records)}
	for i := range p.records {
		r := &p.records[i]
		*r = codec.Downstream{Type: "new-message", MessageID: "im-downstream-topic-bench-0-1", Data: d.content, Owner: p}
		r.Encode(time.Now().UnixMilli())
		r.Targets = make([]string, fanout)
	}
	return p
}

// deliver aims the records at random users of one shard and hands them over.
func (d *driver) deliver(ctx context.Context, p *push) error {
	at := d.random.IntN(d.opts.Shards) * d.opts.Loops
	links := d.links[at : at+d.opts.Loops]
	p.batch.Deliveries = p.batch.Deliveries[:0]
	for i := range p.records {
		r := &p.records[i]
		for j := range r.Targets {
			l := &links[d.random.IntN(len(links))]
			if len(l.users) == 0 {
				return fmt.Errorf("no session in loop %d of shard %d", l.loop, l.shard)
			}
			r.Targets[j] = l.users[d.random.IntN(len(l.users))]
			p.batch.Deliveries = append(p.batch.Deliveries, codec.Delivery{Record: r, Target: int32(j)})
		}
	}
	p.open.Store(int64(len(p.batch.Deliveries)))
	if err := d.set.Deliver(ctx, links[0].shard, &p.batch); err != nil {
		return fmt.Errorf("deliver: %w", err)
	}
	return nil
}
