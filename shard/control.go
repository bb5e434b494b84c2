package shard

import (
	"context"
	"sync"
	"time"

	"im-gateway/codec"
)

// SessionInfo describes one session.
type SessionInfo struct {
	SessionID    string
	DeviceID     string
	Device       string // the kind of device
	ConnectedAt  int64  // Unix ms
	MessagesIn   int64
	MessagesOut  int64
	PendingBytes int64
	State        string // claiming, live or closing
}

var stateNames = [...]string{free: "free", claiming: "claiming", live: "live", closing: "closing"}

// Publish sends a record of the HTTP API upstream and waits for its result, OUTCOME_UNKNOWN at the
// ack deadline, or ctx. The record becomes the Set's.
func (set *Set) Publish(ctx context.Context, u *codec.Upstream) (codec.UpstreamResult, error) {
	reply := make(chan codec.UpstreamResult, 1)
	u.Reply = reply
	select {
	case set.shards[codec.ShardOf(u.User, len(set.shards))].publishes <- u:
	case <-set.done:
		return codec.UpstreamResult{}, ErrStopped
	case <-ctx.Done():
		return codec.UpstreamResult{}, context.Cause(ctx)
	}
	select {
	case r := <-reply:
		return r, nil
	case <-set.done:
		return codec.UpstreamResult{}, ErrStopped
	case <-ctx.Done():
		return codec.UpstreamResult{}, context.Cause(ctx)
	}
}

// pushSink gathers the ends of one Push.
type pushSink struct {
	mu   sync.Mutex
	ends []codec.End
	open int
	done chan struct{}
}

// Ends implements codec.EndSink.
func (p *pushSink) Ends(list []codec.Ended) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range list {
		if e.End == codec.EndNone {
			p.open += int(e.Sessions) - 1
			continue
		}
		if p.ends[e.Target] != codec.EndDelivered { // to one of several sessions
			p.ends[e.Target] = e.End
		}
		p.open--
	}
	if p.open == 0 {
		close(p.done)
	}
}

// Push delivers a record to those of its targets that are connected here and returns the ends in
// the order of the targets; EndNone where ctx ended first.
func (set *Set) Push(ctx context.Context, d *codec.Downstream) ([]codec.End, error) {
	if len(d.Targets) == 0 {
		return nil, nil
	}
	sink := &pushSink{ends: make([]codec.End, len(d.Targets)), open: len(d.Targets), done: make(chan struct{})}
	d.Owner = sink
	batches := make([]*codec.DeliveryBatch, len(set.shards))
	for i, user := range d.Targets {
		n := codec.ShardOf(user, len(set.shards))
		if batches[n] == nil {
			batches[n] = &codec.DeliveryBatch{}
		}
		batches[n].Deliveries = append(batches[n].Deliveries, codec.Delivery{Record: d, Target: int32(i)})
	}
	for i, b := range batches {
		if b == nil {
			continue
		}
		if err := set.Deliver(ctx, i, b); err != nil {
			return nil, err
		}
	}
	select {
	case <-sink.done:
	case <-set.done:
		return nil, ErrStopped
	case <-ctx.Done():
	}
	sink.mu.Lock()
	defer sink.mu.Unlock()
	return append([]codec.End(nil), sink.ends...), nil
}

// Kick closes the user's sessions, or only the one of that name, with 4501, or 4500 when it was
// replaced, and returns how many were closed.
func (set *Set) Kick(ctx context.Context, user, sessionName string, replaced bool, reason string) (int, error) {
	var only codec.SessionID
	if sessionName != "" {
		id, ok := codec.ParseSessionName(sessionName, set.opts.Nonce)
		if !ok {
			return 0, nil // of another process, or of none
		}
		only = id
	}
	code := codec.CloseKicked
	if replaced {
		code = codec.CloseReplaced
	}
	closed := 0
	err := set.do(ctx, codec.ShardOf(user, len(set.shards)), func(s *shard) {
		closed = s.kick(user, only, code, kickReason(reason))
	})
	if err != nil {
		return 0, err // the shard may be at it still: closed is its own
	}
	return closed, nil
}

// Sessions describes the user's sessions.
func (set *Set) Sessions(ctx context.Context, user string) ([]SessionInfo, error) {
	var list []SessionInfo
	err := set.do(ctx, codec.ShardOf(user, len(set.shards)), func(s *shard) {
		s.userSessions(user, func(ses *session) {
			dev := s.deviceOf(ses)
			list = append(list, SessionInfo{
				DeviceID: dev.id, Device: dev.kind, SessionID: ses.id.Name(s.opts.Nonce), ConnectedAt: ses.connectedAt,
				MessagesIn: int64(ses.in), MessagesOut: int64(ses.out),
				PendingBytes: int64(ses.pending), State: stateNames[ses.state],
			})
		})
	})
	if err != nil {
		return nil, err // the shard may be at it still: list is its own
	}
	return list, nil
}

// Stats are a Set's counts. They are read one by one, while the shards go on.
type Stats struct {
	Sessions, Users, InFlight int64
	Heartbeats                int64         // pings asked for
	WheelLag                  time.Duration // by how much the wheel that is furthest behind is
	Ends                      map[string]int64
	Refused                   map[string]int64
}

// Stats returns the counts. It never blocks.
func (set *Set) Stats() Stats {
	st := Stats{Ends: map[string]int64{}, Refused: map[string]int64{}}
	for _, s := range set.shards {
		st.Sessions += s.sessions.Load()
		st.Users += s.userNum.Load()
		st.WheelLag = max(st.WheelLag, time.Duration(s.lag.Load())*tickLength)
	}
	m := set.shards[0].metrics
	st.Heartbeats = value(m.heartbeats)
	st.InFlight = m.inFlight.Load()
	for end := codec.EndDelivered; end < codec.NumEnds; end++ {
		st.Ends[end.String()] = value(m.ends[end])
	}
	for code, c := range m.refused {
		st.Refused[string(code)] = value(c)
	}
	return st
}
