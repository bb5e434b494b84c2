package transport

import (
	"cmp"
	"context"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/panjf2000/gnet/v2"

	"im-gateway/codec"
)

// stalledEvents is how many events may wait for a shard whose queue is full before client messages
// are refused. Opens, closes and the like are always kept: there are a few per connection at most.
const stalledEvents = 1024

// loop is one event loop's own state. All of it but the atomics belongs to the loop's goroutine.
type loop struct {
	s     *Server
	index int
	el    atomic.Pointer[gnet.EventLoop]

	life  sync.RWMutex // held for reading while a task is triggered
	ended bool         // under life: gnet takes no more tasks

	ticking  request // by the ticker
	resuming request // by a shard with room again

	builder  *codec.Builder
	shards   []shardLink
	flushDue bool   // a flush of this loop's own is on its way
	flushing task   // that flush
	now      int64  // Unix ms, at the start of the current piece of work
	nanos    int64  // the same in ns
	rules    *rules // the newest at that time

	scratch []byte // frames on their way to one connection
	sealed  []byte // TLS records on their way to one connection
	opened  []byte // for the decrypted input of one connection
	replies []byte // the loop's own frames for the connection being read
	next    []int32
	touched []*conn
	hs      handshakeIO

	counts   counts
	seen     struct{ heads, stalled atomic.Int64 } // as of the last tick, for the metrics
	deflater *deflater                             // nil: without compression
	devices  map[codec.SessionID]string            // ids of the devices of sessions that have named theirs

	heads      []deadline // connections that have not finished their head, oldest first, and some that have
	unfinished int        // of them those that have not
	turnedAway int        // connections being told that there is no room

	revoker revoker

	shaking   []shake // TLS handshakes, oldest first, and some that are over
	lingering []*conn
	suspects  []*conn // silent for long
	backlog   []waiting
	partials  []partial
}

// task is work for a loop that may be handed to it again and again without an allocation of ours.
type task struct {
	l *loop
	f func(*loop)
}

// Run implements gnet.Runnable; on the loop.
func (t *task) Run(context.Context) error {
	t.l.begin()
	t.l.guard(nil, func() { t.f(t.l) })
	return nil
}

// request is a task that other goroutines ask for; one at most is on its way.
type request struct {
	task
	due atomic.Bool
}

func (r *request) init(l *loop, f func(*loop)) {
	r.task = task{l: l, f: func(l *loop) {
		r.due.Store(false)
		f(l)
	}}
}

func (r *request) request(l *loop) {
	if r.due.CompareAndSwap(false, true) && !l.trigger(&r.task) {
		r.due.Store(false)
	}
}

// shardLink is what a loop keeps for one shard.
type shardLink struct {
	pending *codec.IngressBatch
	stalled bool
	slots   []slot
	free    []uint32
	egress  egressTask
}

// slot is one place of the session table shared with a shard.
type slot struct {
	conn       *conn
	generation uint32
}

type deadline struct {
	cn *conn
	at int64
}

func newLoop(s *Server, index int) *loop {
	l := &loop{s: s, index: index, devices: map[codec.SessionID]string{}, rules: s.rules.Load()}
	l.flushing = task{l: l, f: (*loop).flush}
	l.ticking.init(l, (*loop).tick)
	l.resuming.init(l, (*loop).flush)
	l.revoker.step.init(l, (*loop).revokeSome)
	if s.opts.Echo {
		return l
	}
	l.builder = codec.NewBuilder(s.opts.GatewayID, s.opts.Nonce, s.opts.Sampler)
	l.shards = make([]shardLink, s.opts.Sink.N())
	for i := range l.shards {
		l.shards[i].egress.l = l
	}
	return l
}

// begin begins a piece of work.
func (l *loop) begin() {
	l.nanos = time.Now().UnixNano()
	l.now = l.nanos / int64(time.Millisecond)
	l.rules = l.s.rules.Load()
}

// trigger hands a task to the loop; false: the loops have ended, or this one has had no connection
// yet. Any goroutine may call it.
func (l *loop) trigger(r gnet.Runnable) bool {
	l.life.RLock()
	defer l.life.RUnlock()
	el := l.el.Load()
	return el != nil && !l.ended && (*el).Execute(context.Background(), r) == nil
}

// end makes the loop take no more tasks.
func (l *loop) end() {
	l.life.Lock()
	defer l.life.Unlock()
	l.ended = true
}

// execute runs f on the loop; false: it will not.
func (l *loop) execute(f func()) bool { return l.executeFor(nil, f) }

// executeFor runs f on the loop; false: it will not. A panic closes cn.
func (l *loop) executeFor(cn *conn, f func()) bool {
	return l.trigger(&task{l: l, f: func(l *loop) {
		l.guard(cn, f)
		if cn != nil {
			cn.settle()
		}
	}})
}

// guard keeps a panic to the connection at fault.
func (l *loop) guard(cn *conn, f func()) {
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		l.s.metrics.panics.Inc()
		l.s.opts.Logger.Error().Any("panic", p).Bytes("stack", debug.Stack()).
			Msg("panic in an event loop; the connection at fault is closed")
		if cn != nil {
			l.fail(cn, codec.CloseInternal, reasonInternal)
		}
	}()
	f()
}

// open takes a new connection in.
func (l *loop) open(c gnet.Conn, first connState, from network) {
	cn := &conn{c: c, l: l, state: first, lastRead: l.now, head: -1, aside: noAside, from: from, unfinished: true}
	c.SetContext(cn)
	l.heads = append(l.heads, deadline{cn, l.now + l.s.opts.HandshakeTimeout.Milliseconds()})
	l.unfinished++
	if bound := l.rules.headBound(l.s.opts.Loops); bound > 0 && l.unfinished > bound {
		// The oldest has had the most time, and whoever means it needs little.
		l.tickHeads(1)
	}
}

// headBound is how many connections without a whole first head each of so many loops may have; 0: no bound.
func (r *rules) headBound(loops int) int {
	if r.HandshakesInFlight == 0 {
		return 0
	}
	return max(1, r.HandshakesInFlight/loops)
}

// turnAway refuses a new connection.
func (l *loop) turnAway(c gnet.Conn, response string) gnet.Action {
	if l.turnedAway >= courtesy {
		return gnet.Close
	}
	l.turnedAway++
	cn := &conn{c: c, l: l, state: stateHead, lastRead: l.now, head: -1, aside: &aside{turnedAway: true}}
	c.SetContext(cn)
	l.guard(nil, func() { cn.respond(response) })
	return gnet.None
}

// finishHead takes a connection out of those that have not finished their head.
func (cn *conn) finishHead() {
	if cn.unfinished {
		cn.unfinished = false
		cn.l.unfinished--
	}
}

// traffic handles what a connection has sent.
func (l *loop) traffic(cn *conn) {
	l.begin()
	cn.lastRead = l.now
	l.guard(cn, func() { cn.read() })
	cn.settle()
	if len(l.replies) > 0 { // of a read that ended early
		l.replies = l.replies[:0]
	}
}

// closed is told by gnet that the socket is about to be closed. What was buffered for it may be
// gone already, so nothing is said of how far the kernel has taken it.
func (l *loop) closed(cn *conn) {
	if cn.state == stateClosed {
		return
	}
	l.begin()
	cn.state = stateClosed
	cn.finishHead()
	if cn.turnedAway {
		l.turnedAway--
	}
	l.s.perAddr.give(cn.from)
	if cn.linger != nil {
		l.s.lingering.Add(-1)
	}
	l.guard(nil, func() {
		if cn.bridge != nil {
			cn.bridge.hangUp()
		}
		l.endSession(cn, codec.CloseAbnormal, reasonLost)
	})
	cn.drop()
}

// lookup returns the connection of a session, or nil when it has ended.
func (l *loop) lookup(id codec.SessionID) *conn {
	slots := l.shards[id.Shard()].slots
	if int(id.Index()) >= len(slots) {
		return nil
	}
	s := &slots[id.Index()]
	if s.conn == nil || s.generation != id.Generation() {
		return nil
	}
	return s.conn
}

// startSession names a session for an authenticated connection and tells its shard.
func (l *loop) startSession(cn *conn, who Identity, w wish) {
	n := codec.ShardOf(who.User, len(l.shards))
	link := &l.shards[n]
	var index uint32
	if k := len(link.free); k > 0 {
		index = link.free[k-1]
		link.free = link.free[:k-1]
	} else {
		index = uint32(len(link.slots))
		link.slots = append(link.slots, slot{})
	}
	sl := &link.slots[index]
	sl.generation = sl.generation%codec.MaxGeneration + 1
	sl.conn = cn
	cn.user = who.User
	cn.id = codec.MakeSessionID(n, l.index, index, sl.generation)
	dev := cmp.Or(who.DeviceID, w.deviceID)
	if dev != "" {
		l.devices[cn.id] = dev
	}
	l.emit(codec.Event{Kind: codec.EventOpen, Session: cn.id, Open: &codec.Open{
		User: who.User, ExpiresAt: who.ExpiresAt, ConnectedAt: l.now, Protocol: cn.protocol, Acks: w.acks,
		DeviceID: dev, Device: cmp.Or(who.Device, w.device),
	}})
	l.s.metrics.sessions[cn.protocol].Inc()
}

// endSession ends the connection's session, once: what the kernel took is reported before.
func (l *loop) endSession(cn *conn, code codec.CloseCode, reason string) {
	if cn.id == 0 {
		return
	}
	if cn.backlog && cn.state != stateClosed {
		l.reportFlushed(cn)
	}
	l.emit(codec.Event{Kind: codec.EventClose, Session: cn.id, Code: code, Reason: reason})
	link := &l.shards[cn.id.Shard()]
	link.slots[cn.id.Index()].conn = nil
	delete(l.devices, cn.id)
	link.free = append(link.free, cn.id.Index())
	cn.id = 0
	l.s.metrics.sessions[cn.protocol].Dec()
	l.s.metrics.close(code)
}

// emit puts an event into its shard's batch.
func (l *loop) emit(e codec.Event) {
	link := &l.shards[e.Session.Shard()]
	if link.pending == nil {
		link.pending = codec.NewIngressBatch(l.index)
	}
	link.pending.Events = append(link.pending.Events, e)
	if !l.flushDue && !link.stalled {
		// One flush for all that this turn of the loop brings.
		l.flushDue = true
		if !l.trigger(&l.flushing) {
			l.flush()
		}
	}
}

// full tells whether a shard has so much waiting that messages are refused.
func (l *loop) full(shard int) bool {
	link := &l.shards[shard]
	return link.stalled && link.pending != nil && len(link.pending.Events) >= stalledEvents
}

// acked tells the shard up to where the client has acknowledged deliveries. While the shard has too
// much waiting, one such event waits for a session: the last says it all.
func (l *loop) acked(cn *conn, deliveryID int64) {
	if l.full(cn.id.Shard()) {
		events := l.shards[cn.id.Shard()].pending.Events
		for i := len(events) - 1; i >= 0; i-- {
			if e := &events[i]; e.Kind == codec.EventAcked && e.Session == cn.id {
				e.Value = max(e.Value, deliveryID)
				return
			}
		}
	}
	l.emit(codec.Event{Kind: codec.EventAcked, Session: cn.id, Value: deliveryID})
}

// flush offers every batch to its shard.
func (l *loop) flush() {
	l.flushDue = false
	for i := range l.shards {
		link := &l.shards[i]
		if link.pending == nil {
			continue
		}
		if l.s.opts.Sink.Offer(i, link.pending) {
			link.pending, link.stalled = nil, false
			continue
		}
		if !link.stalled {
			link.stalled = true
			l.s.metrics.stalls.Inc()
		}
	}
}

// tick looks after the few connections that need it: unfinished heads, lingering closes, backlogs.
func (l *loop) tick() {
	spare.ready()
	l.flushCounts()
	l.show()
	l.tickHeads(0)
	l.tickRevoked()
	l.tickShaking()
	l.tickLingering()
	l.tickBacklog()
	l.tickSuspects()
	l.tickPartials()
}

// show tells the metrics how much waits.
func (l *loop) show() {
	l.seen.heads.Store(int64(l.unfinished))
	stalled := 0
	for i := range l.shards {
		if link := &l.shards[i]; link.stalled && link.pending != nil {
			stalled += len(link.pending.Events)
		}
	}
	l.seen.stalled.Store(int64(stalled))
}

// tickHeads ends the connections whose time for their first head is over, and so many of the oldest
// besides.
func (l *loop) tickHeads(besides int) {
	for len(l.heads) > 0 {
		d := l.heads[0]
		late := d.at <= l.now
		if d.cn.unfinished && !late && besides == 0 {
			break
		}
		l.heads[0] = deadline{}
		l.heads = l.heads[1:]
		if !d.cn.unfinished {
			continue
		}
		if late {
			l.s.metrics.handshake.timeout.Inc()
		} else {
			besides--
			l.s.metrics.handshake.displaced.Inc()
		}
		l.guard(d.cn, func() { d.cn.respond(timeoutResponse) })
	}
	if len(l.heads) == 0 {
		l.heads = nil
	}
}
