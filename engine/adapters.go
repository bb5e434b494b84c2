package engine

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"

	"im-gateway/broker"
	"im-gateway/codec"
	"im-gateway/engine/tracing"
	"im-gateway/registry"
	"im-gateway/shard"
	"im-gateway/transport"
)

// The adapters that join the parts: each implements an interface that one package declares by what
// another offers.

// lateEgress lets the shards be made before the transport, whose sink they are.
type lateEgress struct{ server *transport.Server }

var _ shard.Egress = (*lateEgress)(nil)

// Submit implements shard.Egress.
func (e *lateEgress) Submit(b *codec.EgressBatch) { e.server.Submit(b) }

// Resume implements shard.Egress.
func (e *lateEgress) Resume(loop, shard int) { e.server.Resume(loop, shard) }

const (
	// presenceBatches is how many batches of presence operations may wait per shard. When it is full
	// the shard keeps the operations and offers them again.
	presenceBatches = 16
	// presenceRound is how many operations are gathered for one round with Redis.
	presenceRound = 4096
	// lateClaim is how long after its session connected a claim is late: Redis was away, and the user
	// may have connected elsewhere meanwhile.
	lateClaim = 2 * time.Second
	// presenceTimeout bounds one round with Redis.
	presenceTimeout = 3 * time.Second
)

// presenceBridge carries the shards' presence operations to Redis and the results back: one
// goroutine per shard, so the operations of a user keep their order.
type presenceBridge struct {
	nonce  uint64
	queues []chan []shard.PresenceOp // never closed
	store  *registry.Presence        // set before run
	// fenced, set before run, tells whether this process may not write presence: another has its
	// gateway_id. It is asked before each round.
	fenced  func(context.Context) error
	results func(shard int, r []shard.PresenceResult)
}

var _ shard.Presence = (*presenceBridge)(nil)

func newPresenceBridge(shards int, nonce uint64) *presenceBridge {
	b := &presenceBridge{nonce: nonce}
	for range shards {
		b.queues = append(b.queues, make(chan []shard.PresenceOp, presenceBatches))
	}
	return b
}

var (
	presenceDepth = prometheus.NewDesc("im_gateway_presence_queue_batches",
		"Batches of presence operations that wait for Redis.", nil, nil)
	presenceBound = prometheus.NewDesc("im_gateway_presence_queue_batches_bound",
		"The bound of im_gateway_presence_queue_batches; beyond it the shards keep the operations.", nil, nil)
)

// Describe implements prometheus.Collector.
func (b *presenceBridge) Describe(ch chan<- *prometheus.Desc) {
	ch <- presenceDepth
	ch <- presenceBound
}

// Collect implements prometheus.Collector.
func (b *presenceBridge) Collect(ch chan<- prometheus.Metric) {
	depth, bound := 0, 0
	for _, q := range b.queues {
		depth, bound = depth+len(q), bound+cap(q)
	}
	ch <- prometheus.MustNewConstMetric(presenceDepth, prometheus.GaugeValue, float64(depth))
	ch <- prometheus.MustNewConstMetric(presenceBound, prometheus.GaugeValue, float64(bound))
}

// Submit implements shard.Presence.
func (b *presenceBridge) Submit(shard int, ops []shard.PresenceOp) bool {
	select {
	case b.queues[shard] <- ops:
		return true
	default:
		return false
	}
}

func (b *presenceBridge) run(ctx context.Context) error {
	var workers sync.WaitGroup
	for i := range b.queues {
		workers.Go(func() { b.serve(ctx, i) })
	}
	workers.Wait()
	return nil
}

func (b *presenceBridge) serve(ctx context.Context, n int) {
	for {
		select {
		case ops := <-b.queues[n]:
			for more := true; more && len(ops) < presenceRound; {
				select {
				case next := <-b.queues[n]:
					ops = append(ops, next...)
				default:
					more = false
				}
			}
			b.results(n, b.round(ctx, ops))
		case <-ctx.Done():
			return
		}
	}
}

// round does the operations kind by kind.
func (b *presenceBridge) round(ctx context.Context, ops []shard.PresenceOp) []shard.PresenceResult {
	ctx, cancel := context.WithTimeout(ctx, presenceTimeout)
	defer cancel()
	late := time.Now().Add(-lateClaim).UnixMilli()
	results := make([]shard.PresenceResult, len(ops))
	if err := b.fenced(ctx); err != nil {
		for i := range ops {
			results[i] = shard.PresenceResult{Kind: ops[i].Kind, Session: ops[i].Session, Version: ops[i].Version, Err: err}
		}
		return results
	}
	for _, at := range presenceSteps(ops) {
		if len(at) == 0 {
			continue
		}
		kind := ops[at[0]].Kind
		entries := make([]registry.Entry, 0, len(at))
		for _, i := range at {
			entries = append(entries, registry.Entry{
				User: ops[i].User, Session: ops[i].Session.Name(b.nonce),
				ConnectedAt: ops[i].ConnectedAt, Version: ops[i].Version, Late: ops[i].ConnectedAt < late,
				DeviceID: ops[i].DeviceID, DeviceKind: ops[i].Device,
			})
			results[i] = shard.PresenceResult{Kind: kind, Session: ops[i].Session, Version: ops[i].Version}
		}
		b.do(ctx, kind, entries, at, results)
	}
	return results
}

// presenceSteps returns the places of the operations that are done together, in the order of the steps:
// releases, so that a session that has ended takes no place from one that begins, claims, refreshes, and
// the releases of sessions that were claimed or refreshed in the same round, which must not come back.
func presenceSteps(ops []shard.PresenceOp) (steps [4][]int) {
	released := map[codec.SessionID]bool{} // true: claimed or refreshed, too
	for i := range ops {
		if ops[i].Kind == shard.Release {
			released[ops[i].Session] = false
		}
	}
	for i := range ops {
		if _, ok := released[ops[i].Session]; ok && ops[i].Kind != shard.Release {
			released[ops[i].Session] = true
		}
	}
	for i := range ops {
		step := 0
		switch ops[i].Kind {
		case shard.Claim:
			step = 1
		case shard.Refresh:
			step = 2
		case shard.Release:
			if released[ops[i].Session] {
				step = 3
			}
		}
		steps[step] = append(steps[step], i)
	}
	return steps
}

func (b *presenceBridge) do(ctx context.Context, kind shard.PresenceKind, entries []registry.Entry,
	at []int, results []shard.PresenceResult) {
	switch kind {
	case shard.Claim:
		for i, c := range b.store.Claim(ctx, entries) {
			r := &results[at[i]]
			r.Version, r.Superseded, r.Elsewhere, r.Err = c.Version, c.Superseded, c.Elsewhere, c.Err
			for _, h := range c.Evicted {
				r.Evicted = append(r.Evicted, shard.Evicted{Gateway: h.GatewayID, Session: h.Session})
			}
		}
	case shard.Refresh:
		for i, c := range b.store.Refresh(ctx, entries) {
			r := &results[at[i]]
			r.Superseded, r.Elsewhere, r.Err = c.Superseded, c.Elsewhere, c.Err
		}
	case shard.Release:
		for i, err := range b.store.Release(ctx, entries) {
			results[at[i]].Err = err
		}
	}
}

// locate finds users for the consumer.
func locate(p *registry.Presence) func(context.Context, []string) []broker.Located {
	return func(ctx context.Context, users []string) []broker.Located {
		out := make([]broker.Located, len(users))
		for i, found := range p.Locate(ctx, users) {
			out[i].Err = found.Err
			for _, s := range found.Sessions {
				out[i].Places = append(out[i].Places, broker.Place{GatewayID: s.GatewayID, DeviceID: s.DeviceID, AnyDevice: s.AnyDevice})
			}
		}
		return out
	}
}

// publisher is the HTTP API's way upstream.
type publisher struct {
	shards *shard.Set
	server *transport.Server // set before it serves

	mu      sync.Mutex // of builder: the API is not the hot path
	builder *codec.Builder
}

var _ Publisher = (*publisher)(nil)

// Publish implements Publisher.
func (p *publisher) Publish(ctx context.Context, from Caller, frame []byte) (Published, error) {
	refuse := func(message string) (Published, error) {
		return Published{Result: codec.UpstreamResult{Code: codec.InvalidMessage}, Message: message}, nil
	}
	if !utf8.Valid(frame) {
		return refuse("the body is not valid UTF-8")
	}
	var m codec.ClientMessage
	if err := codec.ParseClient(frame, &m); err != nil {
		var bad *codec.ParseError
		if errors.As(err, &bad) {
			return refuse(bad.Message)
		}
		return refuse("the body is not a message")
	}
	if in, ok := tracing.FromContext(ctx); ok && len(m.TraceParent) == 0 { // the envelope's own counts before it
		m.TraceParent = in.AppendTraceParent(nil)
		m.TraceID = m.TraceParent[3:35]
	}
	if from.Session != "" {
		posted, err := p.server.Post(ctx, from.User, from.Session, frame, &m)
		return Published{
			ClientMsgID: string(m.ClientMsgID), Result: posted.Result, Message: posted.Message,
			Control: m.Control(), ExpiresAt: posted.ExpiresAt,
		}, err
	}
	if m.Control() {
		return refuse("messages of type " + string(m.Type) + " are for a session: name it by session_id in the query")
	}
	m.DeviceID = from.DeviceID
	p.mu.Lock()
	now := time.Now()
	u := p.builder.Build(&m, from.User, 0, now.UnixMilli())
	p.mu.Unlock()
	u.Received = now.UnixNano()
	name := string(m.ClientMsgID)
	result, err := p.shards.Publish(ctx, u)
	return Published{ClientMsgID: name, Result: result}, err
}

// sessions is what the gRPC server acts on.
type sessions struct {
	*shard.Set
	connections func() int64
	draining    func() bool
}

var _ Sessions = (*sessions)(nil)

// Push implements Sessions.
func (s *sessions) Push(ctx context.Context, d *codec.Downstream) ([]codec.End, error) {
	if d.Frame == nil {
		d.Encode(time.Now().UnixMilli())
	}
	return s.Set.Push(ctx, d)
}

// Sessions implements Sessions.
func (s *sessions) Sessions(ctx context.Context, user string) ([]SessionInfo, error) {
	list, err := s.Set.Sessions(ctx, user)
	if err != nil {
		return nil, err
	}
	out := make([]SessionInfo, 0, len(list))
	for _, i := range list {
		out = append(out, SessionInfo{
			Name: i.SessionID, DeviceID: i.DeviceID, Device: i.Device, ConnectedAt: i.ConnectedAt, MessagesIn: i.MessagesIn,
			MessagesOut: i.MessagesOut, PendingBytes: i.PendingBytes, State: i.State,
		})
	}
	return out, nil
}

// Stats implements Sessions.
func (s *sessions) Stats() Stats {
	st := s.Set.Stats()
	return Stats{
		Connections: s.connections(), Sessions: st.Sessions, Users: st.Users, UpstreamInFlight: st.InFlight,
		Downstream: st.Ends, Refused: st.Refused, Draining: s.draining(),
	}
}

// authenticate says who sends a request of the HTTP API.
func authenticate(verifier func() *transport.Verifier) func(*http.Request) (Caller, error) {
	return func(r *http.Request) (Caller, error) {
		who, err := verifier().FromRequest(r)
		if errors.Is(err, transport.ErrTokenExpired) {
			return Caller{}, ErrTokenExpired
		}
		// The token's word about the device counts, and else the caller's.
		if who.DeviceID == "" {
			if id := r.URL.Query().Get("device_id"); codec.ValidName(id) {
				who.DeviceID = id
			}
		}
		return Caller{User: who.User, DeviceID: who.DeviceID}, err
	}
}
