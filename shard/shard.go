package shard

import (
	"context"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"im-gateway/codec"
	"im-gateway/codec/latency"
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
	returned   chan struct{} // capacity 1: a loop has returned a batch, see outbox
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
	lag      atomic.Int64 // ticks that the wheel is behind
	absent   atomic.Int64 // sessions without an entry in Redis
	asking   atomic.Int64 // presence operations without a result
	known    atomic.Int64 // messages remembered for retries

	// Owned by run.
	now         int64     // Unix ms, once per round
	began       time.Time // of the round; zero: it has done nothing yet
	current     codec.SessionID
	tables      [codec.MaxLoops]table // an id cannot name one that is not there
	users       map[string]ref
	wheel       wheel
	target      uint32 // the tick that the clock has reached
	lagging     bool   // something that is due waits for its turn
	out         []outbox
	up          *codec.UpstreamBatch // admitted, not sent yet
	flight      flight
	recent      recent
	accounts    map[string]account // of users without a session who have not paid for all they sent
	backlogs    map[ref]*backlog
	unacked     map[ref]*unacked // of sessions whose client acknowledges deliveries
	devices     map[ref]device   // of sessions that have named theirs
	rules       *rules           // the newest at the start of the round
	nodeEgress  int64            // bytes that waited in all shards at the start of the round
	handling    codec.Delivery   // taken in, neither ended nor handed on yet
	delivering  codec.Delivery   // taken in last
	remaining   int              // sessions that it has still to go to, after the one being handled
	ends        []ownerEnds
	notes       []userNote
	ops         []PresenceOp // not submitted yet
	outstanding int          // submitted, without a result
	touched     uint32       // see touch
	counts      counts
	connectTime latency.Local
	ackTime     latency.Local
	deliverTime latency.Local
	drain       drain
	meter       *meter // while somebody measures
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
		returned:       make(chan struct{}, 1),
		results:        make(chan *codec.UpstreamBatch, resultQueue),
		deliveries:     make(chan *codec.DeliveryBatch, deliveryQueue),
		presence:       make(chan []PresenceResult, presenceQueue),
		control:        make(chan func(*shard), controlQueue),
		publishes:      make(chan *codec.Upstream, publishQueue),
		upstream:       o.Publisher.Queue(index),
		stalled:        make([]atomic.Bool, o.Loops),
		users:          map[string]ref{},
		wheel:          newWheel(max(o.Heartbeat, o.RefreshInterval, o.ClaimTimeout, o.DeliveryTimeout)),
		out:            make([]outbox, o.Loops),
		up:             &codec.UpstreamBatch{Shard: index},
		backlogs:       map[ref]*backlog{},
		unacked:        map[ref]*unacked{},
		devices:        map[ref]device{},
		recent:         newRecent(o.RecentMessages / o.Shards),
		rules:          set.rules.Load(),
		accounts:       map[string]account{},
		connectTime:    m.connectTime.Local(),
		ackTime:        m.ackTime.Local(),
		deliverTime:    m.deliverTime.Local(),
	}
	return s
}

func (s *shard) run(ctx context.Context) {
	ticker := time.NewTicker(tickLength)
	defer ticker.Stop()
	for ctx.Err() == nil {
		s.guard(func() { s.round(ctx, ticker.C) })
		s.flush()
		if !s.began.IsZero() {
			s.metrics.roundTime.Observe(s.opts.Now().Sub(s.began).Seconds())
			s.began = time.Time{}
		}
	}
}

// round waits for work, then takes what else is there.
func (s *shard) round(ctx context.Context, tick <-chan time.Time) {
	var upstream chan<- *codec.UpstreamBatch
	if len(s.up.Records) > 0 {
		upstream = s.upstream
	}
	deliveries := s.deliveries
	if s.egressWaits() {
		deliveries = nil
	}
	if !s.lagging {
		select {
		case b := <-s.ingress:
			s.begin()
			s.onIngress(b)
		case <-s.returned:
			s.begin()
		case b := <-s.results:
			s.begin()
			s.onResults(b, s.began)
		case b := <-deliveries:
			s.begin()
			s.onDeliveries(b)
			deliveries = nil
		case r := <-s.presence:
			s.begin()
			s.onPresence(r)
		case f := <-s.control:
			s.begin()
			s.onControl(f)
		case u := <-s.publishes:
			s.begin()
			s.onPublish(u)
		case upstream <- s.up:
			s.up = &codec.UpstreamBatch{Shard: s.index}
		case <-tick:
			s.begin()
			s.onTick()
		case <-ctx.Done():
			return
		}
	} else {
		s.begin()
		s.catchUp()
	}
	for range rounds {
		if !s.more(tick, &deliveries) {
			return
		}
	}
}

// egressWaits tells whether commands wait for a loop that is busy with the batch before. Deliveries
// wait in their queue, and so in Kafka, until it is done: a backlog must not pass for a slow client.
func (s *shard) egressWaits() bool {
	if s.nodeFull() {
		return true
	}
	for i := range s.out {
		if o := &s.out[i]; o.sent != nil && o.fill != nil && len(o.fill.Commands) > 0 {
			return true
		}
	}
	return false
}

// more takes one piece of work if there is any.
//
// Of the deliveries it takes one batch a round.
func (s *shard) more(tick <-chan time.Time, deliveries *chan *codec.DeliveryBatch) bool {
	select {
	case b := <-s.ingress:
		s.onIngress(b)
	case <-s.returned:
		s.drainReturns()
	case b := <-s.results:
		s.onResults(b, s.opts.Now())
	case b := <-*deliveries:
		s.onDeliveries(b)
		*deliveries = nil
	case r := <-s.presence:
		s.onPresence(r)
	case f := <-s.control:
		s.onControl(f)
	case u := <-s.publishes:
		s.onPublish(u)
	case <-tick:
		s.onTick()
	default:
		return false
	}
	return true
}

func (s *shard) onControl(f func(*shard)) {
	s.current = 0
	f(s)
}

// begin begins a round with what has come back in the meantime.
func (s *shard) begin() {
	s.clock()
	s.drainReturns()
}

func (s *shard) clock() {
	s.began = s.opts.Now()
	s.now = s.began.UnixMilli()
	s.nodeEgress = s.set.egress.Load()
	s.rules = s.set.rules.Load()
}

// flush hands on everything that has gathered. Each part is guarded by itself: a port that panics
// does not keep the others waiting.
func (s *shard) flush() {
	s.current = 0
	s.flushCounts()
	s.guard(s.resume)
	s.guard(s.flushEgress)
	s.guard(s.flushEnds)
	s.guard(s.flushNotes)
	s.guard(s.flushPresence)
	if len(s.up.Records) > 0 {
		select {
		case s.upstream <- s.up:
			s.up = &codec.UpstreamBatch{Shard: s.index}
		default: // the next round waits for room
			s.metrics.upstreamFull.Inc()
		}
	}
}

// resume tells the loops that found the ingress queue full that it has room again.
func (s *shard) resume() {
	for i := range s.stalled {
		if s.stalled[i].Load() && len(s.ingress) < cap(s.ingress) {
			s.stalled[i].Store(false)
			s.opts.Egress.Resume(i, s.index)
		}
	}
}

func (s *shard) onIngress(b *codec.IngressBatch) {
	// A loop returns a batch before it reports what happened to the connection later: outcomes
	// must be known first.
	s.drainReturns()
	for i := range b.Events {
		s.touch(b.Events[i].Session)
	}
	s.forEach(len(b.Events), func(i int) { s.onEvent(&b.Events[i]) }, func(i int) {
		// The loop reports a close once: whatever went wrong, the slot is given up.
		if e := &b.Events[i]; e.Kind == codec.EventClose {
			if ses := s.lookup(e.Session); ses != nil {
				s.forget(ses, codec.EndOffline)
			}
		}
	})
	b.Release()
}

func (s *shard) onEvent(e *codec.Event) {
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
	case codec.EventAcked:
		s.onAcked(e.Session, e.Value)
	case codec.EventRefresh:
		s.onRefresh(e.Session, e.Value)
	}
}

func (s *shard) onOpen(id codec.SessionID, o *codec.Open) {
	ses := s.tables[id.Loop()].grow(id.Index())
	if ses.state != free { // its close was never reported
		s.forget(ses, codec.EndOffline)
	}
	*ses = session{
		user: o.User, id: id, expiresAt: o.ExpiresAt, connectedAt: o.ConnectedAt,
		next: noRef, state: claiming, refreshed: s.wheel.now, acks: o.Acks, protocol: o.Protocol,
	}
	if o.DeviceID != "" || o.Device != "" {
		s.devices[refOf(id)] = device{o.DeviceID, o.Device}
		ses.device = true
	}
	if o.Acks {
		s.unacked[refOf(id)] = &unacked{}
	}
	s.sessions.Add(1)
	s.absent.Add(1)
	s.metrics.opened.Inc()
	if s.drain.on { // it takes nothing over: an older session of the user's lives out the drain
		ses.superseded = true
		s.close(ses, codec.CloseDraining, "draining")
		return
	}
	wasOnline := s.makeRoom(ses, s.link(ses))
	s.userNum.Store(int64(len(s.users)))
	if wasOnline { // the user stays online, by this session from now on, however it fares
		s.goOnline(ses)
	}
	s.schedule(ses, ticks(s.opts.ClaimTimeout))
	s.claimPresence(ses)
}

// makeRoom closes those of the user's older sessions that the new one replaces, and tells whether the
// user goes on being online by it.
func (s *shard) makeRoom(ses *session, older ref) (wasOnline bool) {
	dev := s.deviceOf(ses)
	kept := 0
	for r := older; r != noRef; {
		old := s.byRef(r)
		r = old.next
		if s.opts.MaxSessions > 1 {
			d := s.deviceOf(old)
			same := dev.id != "" && d.id == dev.id || s.opts.ReplaceKind && dev.kind != "" && d.kind == dev.kind
			if kept++; !same && kept < s.opts.MaxSessions {
				continue
			}
			if same {
				kept--
			}
		} else {
			wasOnline = wasOnline || old.online
			old.superseded = true
		}
		s.metrics.userSessions.Inc()
		s.close(old, codec.CloseReplaced, replacedReason)
	}
	return wasOnline
}

const replacedReason = "replaced by a newer session"

// goLive sends `connected` and what was held for it.
func (s *shard) goLive(ses *session, degraded bool) {
	ses.state = live
	if degraded {
		s.metrics.degraded.Inc()
	}
	s.connectTime.Observe((s.now - ses.connectedAt) * int64(time.Millisecond))
	b := s.box(ses)
	start := len(b.Arena)
	b.Arena = ses.protocol.AppendConnected(b.Arena, s.opts.GatewayID, ses.id.Name(s.opts.Nonce),
		s.opts.Heartbeat.Milliseconds(), s.rules.MaxMessageBytes, degraded, s.now)
	s.frame(ses, b.Arena[start:], codec.Content{Type: codec.FrameConnected}, codec.Delivery{})
	s.release(ses)
	if ses.state != live { // what was held went over the budget
		return
	}
	if !ses.online {
		s.goOnline(ses)
	}
	if e := s.log.Debug(); e.Enabled() {
		e.Str("user_id", ses.user).Str("session_id", ses.id.Name(s.opts.Nonce)).
			Bool("degraded", degraded).Msg("connected")
	}
	// A storm of connects is spread over the interval from here on.
	phase := rand.Uint32N(s.heartbeatTicks) // #nosec G404 -- spreads load
	ses.pinged = s.wheel.now - phase
	ses.refreshed = s.wheel.now - phase%s.refreshTicks // in one go with the ping where they are as often
	unschedule(ses)                                    // from the end of the claim's timeout
	s.schedule(ses, s.nextDue(ses))
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

// leave takes a session out of its user's list, the wheel and Redis. The user goes offline with the
// last one.
func (s *shard) leave(ses *session, reason string) {
	ses.state = closing
	unschedule(ses)
	s.unlink(ses)
	s.userNum.Store(int64(len(s.users)))
	s.releasePresence(ses)
	_, others := s.users[ses.user]
	if ses.online && (!others || s.opts.MaxSessions > 1) {
		s.note(false, ses, reason)
	}
	ses.online = false
}

// forget frees a session's slot. It can be called in any state.
func (s *shard) forget(ses *session, end codec.End) {
	s.settle(ses, end)
	unschedule(ses)
	s.unlink(ses)
	s.wait(ses, -int(ses.pending))
	if ses.device {
		delete(s.devices, refOf(ses.id))
	}
	if ses.version == 0 {
		s.absent.Add(-1)
	}
	s.metrics.lifetime.Observe(float64(s.now-ses.connectedAt) / 1000)
	*ses = session{}
	s.sessions.Add(-1)
	s.userNum.Store(int64(len(s.users)))
	s.metrics.closed.Inc()
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
	if e.Code == codec.CloseHeartbeatMissed {
		s.log.Info().Str("user_id", ses.user).Str("session_id", ses.id.Name(s.opts.Nonce)).Msg("heartbeat missed")
	}
	if l := s.log.Debug(); l.Enabled() {
		l.Str("user_id", ses.user).Str("session_id", ses.id.Name(s.opts.Nonce)).
			Str("reason", e.Reason).Uint16("code", uint16(e.Code)).
			Int64("duration_ms", s.now-ses.connectedAt).Uint32("messages_in", ses.in).Uint32("messages_out", ses.out).
			Msg("disconnected")
	}
	s.forget(ses, end)
}

func (s *shard) onRefresh(id codec.SessionID, expiresAt int64) {
	ses := s.lookup(id)
	if ses == nil || ses.state == closing {
		return
	}
	ses.expiresAt = expiresAt
	b := s.box(ses)
	start := len(b.Arena)
	b.Arena = ses.protocol.AppendTokenRefreshed(b.Arena, expiresAt, s.now)
	s.send(ses, b.Arena[start:], codec.Content{Type: codec.FrameTokenRefreshed}, codec.Delivery{})
}

func (s *shard) onTick() {
	s.target = uint32(s.opts.Now().Sub(s.started) / tickLength)
	s.known.Store(int64(len(s.recent.index)))
	s.catchUp()
	s.drainStep()
	s.shedDebtors()
	s.sweepAccounts()
}

// catchUp does a bounded share of what is due; while more is, it is called again every round.
func (s *shard) catchUp() {
	began := s.opts.Now()
	turned := s.turn(s.target, began)
	expired := s.expireFlight()
	s.lagging = !turned || !expired
	s.lag.Store(int64(int32(s.target - s.wheel.now)))
	s.metrics.tickTime.Observe(s.opts.Now().Sub(began).Seconds())
}
