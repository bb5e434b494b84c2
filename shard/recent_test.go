package shard

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"im-gateway/codec"
)

// retrier drives one shard by hand: what it hands to the broker, and what clients are sent.
type retrier struct {
	*quiet
	t       *testing.T
	builder *codec.Builder
	time    time.Time
	offset  int64
}

func newRetrier(t *testing.T, remember int) *retrier {
	r := &retrier{t: t, builder: codec.NewBuilder("g", 7, nil), time: time.UnixMilli(1_000_000)}
	r.quiet = newQuiet(t, func() time.Time { return r.time })
	r.s.recent = newRecent(remember)
	return r
}

func (r *retrier) pass(d time.Duration) { r.time = r.time.Add(d); r.s.clock() }

// send is a message of a session; it returns the records that the shard hands over for it.
func (r *retrier) send(id codec.SessionID, user, name string) []*codec.Upstream {
	r.s.onMessage(r.builder.Build(&codec.ClientMessage{Type: typeM, ClientMsgID: []byte(name), Data: dataOne}, user, id, r.s.now))
	records := r.s.up.Records
	r.s.up.Records = nil
	return records
}

// result brings the broker's answer.
func (r *retrier) result(u *codec.Upstream, code codec.Code) {
	r.offset++
	u.Result = codec.UpstreamResult{Code: code, Partition: 3, Offset: r.offset}
	r.s.onResults(&codec.UpstreamBatch{Records: []*codec.Upstream{u}}, time.Now())
}

// frames takes what the shard has for its clients.
func (r *retrier) frames() (list []string) {
	o := &r.s.out[0]
	if o.fill == nil {
		return nil
	}
	for i := range o.fill.Commands {
		c := &o.fill.Commands[i]
		list = append(list, fmt.Sprintf("%d %s", c.Session.Index(), c.Payload))
	}
	r.settle()
	return list
}

func (r *retrier) want(records []*codec.Upstream, n int) {
	r.t.Helper()
	if len(records) != n {
		r.t.Fatalf("%d records handed to the broker, want %d", len(records), n)
	}
}

func TestRetryGetsTheFirstAck(t *testing.T) {
	r := newRetrier(t, 100)
	r.open(2)
	user := "user-00000000"
	first := r.send(sessionID(0, 1), user, "a")
	r.want(first, 1)
	id := string(first[0].MessageID)
	r.result(first[0], codec.OK)
	ack := r.frames()
	if len(ack) != 1 || !strings.Contains(ack[0], id) {
		t.Fatalf("acks: %q, want one with %s", ack, id)
	}
	r.want(r.send(sessionID(0, 1), user, "a"), 0)
	if again := r.frames(); len(again) != 1 || again[0] != ack[0] {
		t.Errorf("the retry got %q, the first %q", again, ack)
	}
	// Another user's message of that name is another message; so is one without a name.
	r.want(r.send(sessionID(1, 1), "user-00000001", "a"), 1)
	r.want(r.send(sessionID(0, 1), user, ""), 1)
	r.want(r.send(sessionID(0, 1), user, ""), 1)
	r.pass(recentFor*time.Millisecond + time.Millisecond)
	r.want(r.send(sessionID(0, 1), user, "a"), 1)
	if n := value(r.s.metrics.retries); n != 1 {
		t.Errorf("%d retries counted, want 1", n)
	}
}

func TestRetryWaitsForTheFirst(t *testing.T) {
	r := newRetrier(t, 100)
	r.open(1)
	user := "user-00000000"
	first := r.send(sessionID(0, 1), user, "a")
	r.want(first, 1)
	r.want(r.send(sessionID(0, 1), user, "a"), 0)
	reply := make(chan codec.UpstreamResult, 1) // and over HTTP
	u := r.builder.Build(&codec.ClientMessage{Type: typeM, ClientMsgID: []byte("a"), Data: dataOne}, user, 0, r.s.now)
	u.Reply = reply
	r.s.onPublish(u)
	r.want(r.s.up.Records, 0)
	if u.Value != nil || string(u.ClientMsgID) != "a" {
		t.Errorf("a retry waits with the value %q and the name %q", u.Value, u.ClientMsgID)
	}
	if n := r.s.lookup(sessionID(0, 1)).inFlight; n != 2 {
		t.Errorf("%d in flight of the session, want 2", n)
	}
	// All are told at the deadline that the outcome is not known, and a late success goes to all.
	r.pass(11 * time.Second)
	r.s.expireFlight()
	for _, f := range r.frames() {
		if !strings.Contains(f, "OUTCOME_UNKNOWN") {
			t.Errorf("frame %q", f)
		}
	}
	if got := <-reply; got.Code != codec.OutcomeUnknown {
		t.Errorf("reply %+v", got)
	}
	r.result(first[0], codec.OK)
	if got := r.frames(); len(got) != 2 || got[0] != got[1] || !strings.Contains(got[0], `"offset":1`) {
		t.Errorf("late acks: %q, want the same twice", got)
	}
	if ses := r.s.lookup(sessionID(0, 1)); ses.inFlight != 0 || r.s.flight.n != 0 {
		t.Errorf("%d of the session and %d in all still in flight", ses.inFlight, r.s.flight.n)
	}
	r.s.flushCounts()
	if n := r.s.metrics.inFlight.Load(); n != 0 {
		t.Errorf("%d in flight by the gauge", n)
	}
}

func TestWhatIsNotStoredIsSentAnew(t *testing.T) {
	r := newRetrier(t, 100)
	r.open(1)
	for _, code := range []codec.Code{codec.BrokerUnavailable, codec.OutcomeUnknown, codec.OK} {
		records := r.send(sessionID(0, 1), "user-00000000", "a")
		r.want(records, 1)
		r.result(records[0], code)
	}
	r.want(r.send(sessionID(0, 1), "user-00000000", "a"), 0)
}

// TestRecentAgainstModel: at random, against a plain list.
func TestRecentAgainstModel(t *testing.T) {
	const users, names, limit = 5, 60, 100
	rng := rand.New(rand.NewPCG(1, 2))
	r := newRecent(limit)
	type item struct {
		u    *codec.Upstream
		at   int64
		gone bool
	}
	var model []*item // oldest first
	find := func(user, name string, now int64) *item {
		for _, m := range model {
			if !m.gone && m.u.User == user && string(m.u.ClientMsgID) == name &&
				(m.u.Result.Code == "in flight" || now-m.at <= recentFor) {
				return m
			}
		}
		return nil
	}
	now := int64(1_000_000)
	slots := 0 // used so far, of the ring
	var early [2]int
	var want [2]int
	for range 20_000 {
		now += rng.Int64N(1500)
		user, name := fmt.Sprint("u", rng.IntN(users)), fmt.Sprint("n", rng.IntN(names))
		u := &codec.Upstream{User: user, ClientMsgID: []byte(name), MessageID: make([]byte, codec.MessageIDLen)}
		e, m := r.find(u, now), find(user, name, now)
		if (e != nil) != (m != nil) {
			t.Fatalf("%s %s: remembered %v, want %v", user, name, e != nil, m != nil)
		}
		if e != nil {
			if (e.flight != nil) != (m.u.Result.Code == "in flight") {
				t.Fatalf("%s %s: in flight %v", user, name, e.flight != nil)
			}
			continue
		}
		useful := func(m *item) bool {
			return !m.gone && (m.u.Result.Code == "in flight" || now-m.at <= recentFor)
		}
		for _, m := range model { // an expired one of the same name
			if m.u.User == user && string(m.u.ClientMsgID) == name {
				m.gone = true
			}
		}
		if slots == limit {
			if useful(model[0]) {
				want[1]++
			}
			model = model[1:]
		} else {
			slots++
		}
		var mine []*item
		for _, m := range model {
			if m.u.User == user && m.at >= 0 {
				mine = append(mine, m)
			}
		}
		if len(mine) == recentPerUser {
			if useful(mine[0]) {
				want[0]++
			}
			mine[0].gone, mine[0].at = true, -1 // its place is given up
		}
		u.Result.Code = "in flight"
		ofUser, ofNode := r.add(u, now)
		early[0] += ofUser
		early[1] += ofNode
		model = append(model, &item{u: u, at: now})
		if k := rng.IntN(len(model)); rng.IntN(4) > 0 && model[k].u.Result.Code == "in flight" {
			v := model[k]
			v.u.Result.Code = codec.OK
			if rng.IntN(5) == 0 {
				v.u.Result.Code = codec.BrokerUnavailable
				v.gone = true
			}
			r.settled(v.u)
		}
		if len(r.ring) > limit || len(r.index) > limit || len(r.users) > users {
			t.Fatalf("%d slots, %d in the index, %d users", len(r.ring), len(r.index), len(r.users))
		}
	}
	if early != want || want[0] == 0 || want[1] == 0 {
		t.Errorf("pushed out %v, want %v and neither zero", early, want)
	}
}
