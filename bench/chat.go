package bench

import (
	"context"
	"time"
	"unsafe"

	"github.com/tidwall/gjson"
	"github.com/twmb/franz-go/pkg/kgo"
)

// soakChurn is how many messages there are to one user that leaves and comes back.
const soakChurn = 50

func init() {
	scenarios["chat"] = kind{needsKafka: true, make: func(r *run) scenario { return newChat(r) }}
	scenarios["soak"] = kind{needsKafka: true, make: func(r *run) scenario {
		c := newChat(r)
		c.churn = newChurn(r)
		c.churn.every = soakChurn
		return c
	}}
}

// chat is both ways at once. The users are in groups; the bench itself plays im-logic: what a user
// sends is read from the upstream topic and written to the gateways of the sender's group, the
// sender among them. A push is late from the time that the message was due to be sent.
type chat struct {
	*upstream
	groups    [][]int
	pushed    *track
	produce   *produceQueue
	following bool
	passed    int64 // messages passed on
	owed      int64 // pushes
	before    int64 // passed on in earlier stages
	churn     *churn
}

func newChat(r *run) *chat {
	return &chat{upstream: newUpstream(r), groups: r.groups(), produce: newProduceQueue(r)}
}

func (c *chat) begin(m *meter) {
	c.upstream.begin(m)
	c.pushed = m.track("pushed", true)
	c.before = c.passed
	if c.churn != nil {
		c.churn.begin(m)
	}
	c.logic()
}

// logic starts the bench's own im-logic; it ends with the run's client.
func (c *chat) logic() {
	r := c.r
	if c.following {
		return
	}
	c.following = true
	reader, err := r.kafka.follow()
	if err != nil {
		r.b.add(answersAll, "%v", err)
		return
	}
	r.kafka.tasks.Go(func() {
		defer reader.Close()
		for r.kafka.ctx.Err() == nil {
			fetches := reader.PollFetches(r.kafka.ctx)
			var ids []string
			fetches.EachRecord(func(rec *kgo.Record) {
				for _, h := range rec.Headers {
					if h.Key == "client_msg_id" {
						ids = append(ids, string(h.Value))
					}
				}
			})
			if len(ids) > 0 {
				r.f.DoWait(func() { c.pass(ids) })
			}
		}
	})
}

// pass writes stored messages to the groups of their senders; on the loop.
func (c *chat) pass(ids []string) {
	r := c.r
	for _, id := range ids {
		n, ok := r.l.number(id)
		if !ok {
			continue
		}
		e := r.l.get(n)
		if e == nil || e.passed > 0 {
			continue
		}
		c.passed++
		e.passed = c.passed
		e.owed = int32(r.post(c.produce, n, c.groups[r.users[e.user].group], e.due))
		c.owed += int64(e.owed)
	}
}

func (c *chat) frame(u *user, payload []byte, now int64) {
	f := gjson.Parse(unsafe.String(unsafe.SliceData(payload), len(payload))) // the view is not kept
	if f.Get("type").Str == "message-ack" {
		c.upstream.frame(u, payload, now)
		return
	}
	r := c.r
	id := f.Get("message_id").Str
	n, ok := r.l.number(id)
	if !ok {
		return
	}
	e := r.l.get(n)
	switch {
	case e == nil:
		r.b.add(pushesOnce, "user %s got %q, which was settled long ago", u.name, id)
		return
	case r.users[e.user].group != u.group:
		r.b.add(pushesToTarget, "user %s got %q, which was for group %d", u.name, id, r.users[e.user].group)
		return
	case e.passed == u.seen:
		r.b.add(pushesOnce, "user %s got %q twice", u.name, id)
		return
	case e.passed < u.seen: // a group's records have one key, so one order
		r.b.add(pushesInOrder, "user %s got %q, passed on as number %d, behind number %d", u.name, id, e.passed, u.seen)
	}
	u.seen = max(u.seen, e.passed)
	c.m.took(c.pushed, e.due, now)
	e.got++
	c.owed--
}

// outstanding counts acks, messages on their way through im-logic, and pushes.
func (c *chat) outstanding() int64 {
	return c.upstream.outstanding() + c.owed + (c.acked.total - c.passedAcked())
}

// passedAcked is how many of the acked messages have been passed on; a message may be passed on
// before its ack has come.
func (c *chat) passedAcked() int64 { return min(c.passed-c.before, c.acked.total) }

func (c *chat) verify(ctx context.Context, r *run) (counts, error) {
	more, err := c.upstream.verify(ctx, r)
	if err != nil {
		return nil, err
	}
	r.l.each(func(n int64, e *entry) {
		if e.state == settled && e.passed == 0 {
			r.b.add(pushesOnce, "%s-%d was stored and never read by the bench's im-logic", r.l.run, n)
		}
		if e.got < e.owed {
			r.b.add(pushesOnce, "%s-%d: %d of %d pushes have not come", r.l.run, n, e.owed-e.got, e.owed)
		}
	})
	return more, nil
}

func (c *chat) send(due int64) {
	if c.churn != nil && c.sent.total%c.churn.every == 0 {
		c.churn.send(due)
	}
	c.upstream.send(due)
}

func (c *chat) lost(u *user, code int, err error, now time.Time) {
	if c.churn != nil {
		c.churn.lost(u, code, err, now)
		return
	}
	c.upstream.lost(u, code, err, now)
}

func (c *chat) refused(u *user, err error) {
	if c.churn != nil {
		c.churn.refused(u, err)
		return
	}
	c.upstream.refused(u, err)
}
