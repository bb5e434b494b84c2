package shard

import (
	"context"
	"math/rand/v2"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"im-gateway/codec"
)

// rounds bounds how often a shard looks for more work before it hands on what it has.
const rounds = 32

// shard is one actor. Everything below the queues is owned by its run goroutine.
type shard struct {
	// Immutable after newShard.
	set            *Set
	opts           *Options
	index          int
	metrics        *metrics
	log            zerolog.Logger // sampled: sessions come and go by the thousand
	heartbeatTicks uint32
	refreshTicks   uint32
	started        time.Time

	// Queues: who sends, see Set. None is ever closed.
	ingress    chan *codec.IngressBatch
	returns    chan *codec.EgressBatch // one per loop
	results    chan *codec.UpstreamBatch
	deliveries chan *codec.DeliveryBatch
	presence   chan []PresenceResult
	control    chan func(*shard)
	publishes  chan *codec.Upstream
	upstream   chan<- *codec.UpstreamBatch // the broker's
	stalled    []atomic.Bool               // by loop: its Offer found ingress full

	// Read by metrics from other goroutines.
	sessions atomic.Int64
	userNum  atomic.Int64

	// Owned by run.
	now         int64 // Unix ms, once per round
	current     codec.SessionID
	tables      []table
	users       map[string]ref
	wheel       wheel
	target      uint32 // the tick that the clock has reached
	lagging     bool   // the wheel has not
	out         []outbox
	up          *codec.UpstreamBatch // admitted, not sent yet
	flight      flight
	backlogs    map[ref]*backlog
	nextSweep   int64 // when backlogs are looked over, Unix ms
	ends        []ownerEnds
	ops         []PresenceOp // not submitted yet
	outstanding int          // submitted, without a result
	drain       drain
}

func newShard(set *Set, index int, m *metrics) *shard {
	o := &set.opts
	s := &shard{
		set: set, opts: o, index: index, metrics: m,
		log: o.Logger.Sample(&zerolog.BurstSampler{
			Burst: 50, Period: time.Second, NextSampler: &zerolog.BasicSampler{N: 1000},
		}),
		heartbeatTicks: ticks(o.Heartbeat),
		refreshTicks:   ticks(o.RefreshInterval),
		started:        o.Now(),
		ingress:        make(chan *codec.IngressBatch, ingressQueue),
		returns:        make(chan *codec.EgressBatch, o.Loops),
		results:        make(chan *codec.UpstreamBatch, resultQueue),
		deliveries:     make(chan *codec.DeliveryBatch, deliveryQueue),
		presence:       make(chan []PresenceResult, presenceQueue),
		control:        make(chan func(*shard), controlQueue),
		publishes:      make(chan *codec.Upstream, publishQueue),
		upstream:       o.Publisher.Queue(index),
		stalled:        make([]atomic.Bool, o.Loops),
		tables:         make([]table, o.Loops),
		users:          map[string]ref{},
		wheel:          newWheel(max(o.Heartbeat, o.RefreshInterval, o.ClaimTimeout)),
		out:            make([]outbox, o.Loops),
		up:             &codec.UpstreamBatch{Shard: index},
		backlogs:       map[ref]*backlog{},
	}
	return s
}

func (s *shard) run(ctx context.Context) {
	ticker := time.NewTicker(tickLength)
	defer ticker.Stop()
	for ctx.Err() == nil {
		s.guard(func() { s.round(ctx, ticker.C) })
		s.flush()
	}
	s.settleAll(codec.EndShutdown)
	s.flush()
}

// round waits for work, then takes what else is there.
func (s *shard) round(ctx context.Context, tick <-chan time.Time) {
	var upstream chan<- *codec.UpstreamBatch
	if len(s.up.Records) > 0 {
		upstream = s.upstream
	}
	if !s.lagging {
		select {
		case b := <-s.ingress:
			s.clock()
			s.onIngress(b)
		case b := <-s.returns:
			s.clock()
			s.onReturn(b)
		case b := <-s.results:
			s.clock()
			s.onResults(b)
		case b := <-s.deliveries:
			s.clock()
			s.onDeliveries(b)
		case r := <-s.presence:
			s.clock()
			s.onPresence(r)
		case f := <-s.control:
			s.clock()
			f(s)
		case u := <-s.publishes:
			s.clock()
			s.onPublish(u)
		case upstream <- s.up:
			s.up = &codec.UpstreamBatch{Shard: s.index}
		case <-tick:
			s.clock()
			s.onTick()
		case <-ctx.Done():
			return
		}
	} else {
		s.clock()
		s.onTick()
	}
	for range rounds {
		if !s.more(tick) {
			return
		}
	}
}

// more takes one piece of work if there is any.
func (s *shard) more(tick <-chan time.Time) bool {
	select {
	case b := <-s.ingress:
		s.onIngress(b)
	case b := <-s.returns:
		s.onReturn(b)
	case b := <-s.results:
		s.onResults(b)
	case b := <-s.deliveries:
		s.onDeliveries(b)
	case <-tick:
		s.onTick()
	default:
		return false
	}
	return true
}

func (s *shard) clock() { s.now = s.opts.Now().UnixMilli() }

// guard keeps a panic in the handling of one event from ending the process: it is counted and the
// session at fault, where there is one, is closed.
func (s *shard) guard(f func()) {
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		s.metrics.panics.Inc()
		s.opts.Logger.Error().Any("panic", p).Bytes("stack", debug.Stack()).Int("shard", s.index).
			Msg("panic in a shard; the session at fault is closed")
		if ses := s.lookup(s.current); ses != nil && ses.state != closing {
			s.close(ses, codec.CloseInternal, "internal error")
		}
	}()
	f()
}

// flush hands on everything that has gathered.
func (s *shard) flush() {
	s.current = 0
	for i := range s.stalled {
		if s.stalled[i].Load() && len(s.ingress) < cap(s.ingress) {
			s.stalled[i].Store(false)
			s.opts.Egress.Resume(i, s.index)
		}
	}
	s.flushEgress()
	s.flushEnds()
	s.flushPresence()
	if len(s.up.Records) > 0 {
		select {
		case s.upstream <- s.up:
			s.up = &codec.UpstreamBatch{Shard: s.index}
		default: // the next round waits for room
		}
	}
}

func (s *shard) onIngress(b *codec.IngressBatch) {
	// A loop returns a batch before it reports what happened to the connection later: outcomes
	// must be known first.
	s.drainReturns()
	for i := range b.Events {
		e := &b.Events[i]
		s.current = e.Session
		switch e.Kind {
		case codec.EventMessage:
			s.onMessage(e.Upstream)
		case codec.EventFlushed:
			s.onFlushed(e.Session, uint64(e.Value))
		case codec.EventOpen:
			s.onOpen(e.Session, e.Open)
		case codec.EventClose:
			s.onClose(e)
		case codec.EventRefresh:
			s.onRefresh(e.Session, e.Value)
		}
	}
	b.Release()
}

func (s *shard) onOpen(id codec.SessionID, o *codec.Open) {
	ses := s.tables[id.Loop()].grow(id.Index())
	*ses = session{
		user: o.User, id: id, expiresAt: o.ExpiresAt, connectedAt: o.ConnectedAt,
		next: noRef, state: claiming, refreshed: s.wheel.now,
	}
	s.sessions.Add(1)
	for r := s.link(ses); r != noRef; {
		older := s.byRef(r)
		r = older.next
		older.superseded = true
		s.close(older, codec.CloseReplaced, "replaced by a newer session")
	}
	s.userNum.Store(int64(len(s.users)))
	s.metrics.opened.Inc()
	if s.drain.on {
		s.close(ses, codec.CloseDraining, "draining")
		return
	}
	s.schedule(ses, ticks(s.opts.ClaimTimeout))
	s.claimPresence(ses)
}

// goLive sends `connected` and what was held for it.
func (s *shard) goLive(ses *session, degraded bool) {
	ses.state = live
	if degraded {
		s.metrics.degraded.Inc()
	}
	b := s.box(ses)
	start := len(b.Arena)
	b.Arena = codec.AppendConnected(b.Arena, s.opts.GatewayID, ses.id.Name(s.opts.Nonce),
		s.opts.Heartbeat.Milliseconds(), s.opts.MaxMessageBytes, degraded, s.now)
	s.frame(ses, b.Arena[start:], codec.Delivery{})
	s.release(ses)
	if ses.state != live { // what was held went over the budget
		return
	}
	ses.online = true
	s.opts.Events.UserEvent(true, ses.user, ses.id, "connected", s.now)
	s.log.Debug().Str("user_id", ses.user).Str("session_id", ses.id.Name(s.opts.Nonce)).
		Bool("degraded", degraded).Msg("connected")
	// A storm of connects is spread over the interval from here on.
	phase := rand.Uint32N(s.heartbeatTicks)
	ses.pinged = s.wheel.now - phase
	refreshPhase := rand.Uint32N(s.refreshTicks)
	ses.refreshed = s.wheel.now - refreshPhase
	next := min(s.heartbeatTicks-phase, s.refreshTicks-refreshPhase)
	if untilExpiry := ses.expiresAt - s.now; untilExpiry < int64(next)*tickLength.Milliseconds() {
		next = ticks(max(0, time.Duration(untilExpiry)*time.Millisecond))
	}
	s.schedule(ses, next)
}

// close commands the close of a session; nothing reaches it any more. Its slot is free once the
// loop has reported EventClose.
func (s *shard) close(ses *session, code codec.CloseCode, reason string) {
	if ses.state == closing {
		return
	}
	c := s.command(ses)
	c.Kind, c.Code, c.Reason = codec.CommandClose, code, reason
	ses.closeCode = code
	s.leave(ses, reason)
}

// leave takes a session out of its user's list, the wheel and Redis.
func (s *shard) leave(ses *session, reason string) {
	ses.state = closing
	s.unschedule(ses)
	s.unlink(ses)
	s.userNum.Store(int64(len(s.users)))
	s.releasePresence(ses)
	if ses.online {
		ses.online = false
		s.opts.Events.UserEvent(false, ses.user, ses.id, reason, s.now)
	}
}

func (s *shard) onClose(e *codec.Event) {
	ses := s.lookup(e.Session)
	if ses == nil {
		return
	}
	if ses.state != closing {
		s.leave(ses, e.Reason)
	}
	end := codec.EndOffline
	if e.Code == codec.CloseSlowConsumer || ses.closeCode == codec.CloseSlowConsumer {
		end = codec.EndSlowConsumer
	}
	s.settle(ses, end)
	s.metrics.closed.Inc()
	if e.Code == codec.CloseHeartbeatMissed {
		s.log.Info().Str("user_id", ses.user).Str("session_id", ses.id.Name(s.opts.Nonce)).Msg("heartbeat missed")
	}
	s.log.Debug().Str("user_id", ses.user).Str("session_id", ses.id.Name(s.opts.Nonce)).
		Str("reason", e.Reason).Uint16("code", uint16(e.Code)).
		Int64("duration_ms", s.now-ses.connectedAt).Uint32("messages_in", ses.in).Uint32("messages_out", ses.out).
		Msg("disconnected")
	*ses = session{}
	s.sessions.Add(-1)
}

func (s *shard) onRefresh(id codec.SessionID, expiresAt int64) {
	ses := s.lookup(id)
	if ses == nil || ses.state == closing {
		return
	}
	ses.expiresAt = expiresAt
	b := s.box(ses)
	start := len(b.Arena)
	b.Arena = codec.AppendTokenRefreshed(b.Arena, expiresAt, s.now)
	s.frame(ses, b.Arena[start:], codec.Delivery{})
}

func (s *shard) onTick() {
	s.target = uint32(s.opts.Now().Sub(s.started) / tickLength)
	s.lagging = !s.turn(s.target)
	s.expireFlight()
	if s.now >= s.nextSweep {
		s.nextSweep = s.now + time.Second.Milliseconds()
		s.sweepBacklogs()
	}
	s.drainStep()
}
