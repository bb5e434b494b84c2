package bench

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/tidwall/gjson"
	"github.com/twmb/franz-go/pkg/kgo"
)

func init() {
	scenarios["downstream"] = kind{needsKafka: true, make: func(r *run) scenario { return newDownstream(r, false) }}
	scenarios["fanout"] = kind{needsKafka: true, make: func(r *run) scenario { return newDownstream(r, true) }}
}

// downstream writes records to the gateways' topics, each for one user or for a group of them,
// and waits for the pushes.
type downstream struct {
	r               *run
	m               *meter
	fan             bool
	groups          [][]int // of users, in fan-out
	records, pushed *track
	produce         *produceQueue
}

func newDownstream(r *run, fan bool) *downstream {
	s := &downstream{r: r, fan: fan}
	if fan {
		s.groups = r.groups()
	}
	s.produce = newProduceQueue(r)
	return s
}

// groups parts the users into groups, sizes drawn from Options.Group.
func (r *run) groups() [][]int {
	var out [][]int
	users := r.chatters()
	for n := 0; n < users; {
		size := min(r.o.Group.draw(r.rng), users-n)
		g := make([]int, size)
		for i := range g {
			g[i] = n + i
			r.users[n+i].group = len(out)
		}
		out = append(out, g)
		n += size
	}
	return out
}

func (s *downstream) begin(m *meter) {
	s.m = m
	s.records, s.pushed = m.track("records", false), m.track("pushed", true)
}

func (s *downstream) send(due int64) {
	if s.fan {
		g := s.groups[s.r.rng.IntN(len(s.groups))]
		s.record(g, due)
		return
	}
	s.record([]int{s.r.rng.IntN(len(s.r.users))}, due)
}

// record writes one record for users, which share a gateway's topic or not: one record each topic.
func (s *downstream) record(users []int, due int64) {
	r := s.r
	n := r.l.add(users[0], due)
	owed := r.post(s.produce, n, users, due)
	r.l.get(n).owed = int32(owed)
	s.m.count(s.records, time.Now().UnixNano())
}

// post writes message n for the users: one record for each gateway that holds some of them. It
// returns how many pushes are owed.
func (r *run) post(q *produceQueue, n int64, users []int, due int64) int {
	owed := 0
	for g, gateway := range r.gateways {
		b := append(r.buf[:0], `{"message_id":"`...)
		b = r.l.appendName(b, n)
		if len(users) == 1 {
			b = append(b, `","target_user_id":"`...)
			b = append(b, r.users[users[0]].name...)
			b = append(b, '"')
		} else {
			b = append(b, `","target_user_ids":[`...)
		}
		targets := 0
		for _, u := range users {
			if u%len(r.gateways) != g {
				continue
			}
			targets++
			if len(users) > 1 {
				if targets > 1 {
					b = append(b, ',')
				}
				b = append(b, '"')
				b = append(b, r.users[u].name...)
				b = append(b, '"')
			}
		}
		if targets == 0 {
			continue
		}
		if len(users) > 1 {
			b = append(b, ']')
		}
		b = append(b, `,"data":{"content":"`...)
		b = append(b, r.content[:r.size()]...)
		b = append(b, `"},"timestamp":`...)
		b = strconv.AppendInt(b, due/int64(time.Millisecond), 10)
		b = append(b, '}')
		r.buf = b
		owed += targets
		key := r.users[users[0]].name // one key a group: its order is kept
		q.put(r.o.DownstreamPrefix+gateway, key, append([]byte(nil), b...))
	}
	return owed
}

// frame takes one push. In fan-out the user's group must be the record's.
func (s *downstream) frame(u *user, payload []byte, now int64) {
	if done := s.r.push(u, payload, now, s.m, s.pushed, s.fan); done {
		s.r.l.pending--
		u.owed++
	}
}

// push takes one push and reports whether it was the last that its message owed.
func (r *run) push(u *user, payload []byte, now int64, m *meter, t *track, grouped bool) (done bool) {
	f := gjson.Parse(unsafe.String(unsafe.SliceData(payload), len(payload))) // the view is not kept
	id := f.Get("message_id").Str
	n, ok := r.l.number(id)
	if !ok {
		return false // of somebody else's making
	}
	e := r.l.get(n)
	switch {
	case e == nil:
		r.b.add(pushesOnce, "user %s got %q, which was settled long ago", u.name, id)
		return false
	case grouped && r.users[e.user].group != u.group, !grouped && int(e.user) != u.n:
		r.b.add(pushesToTarget, "user %s got %q, which was for %s", u.name, id, r.users[e.user].name)
		return false
	case n == u.seen:
		r.b.add(pushesOnce, "user %s got %q twice", u.name, id)
		return false
	case n < u.seen:
		r.b.add(pushesInOrder, "user %s got %q behind number %d", u.name, id, u.seen)
	}
	u.seen = max(u.seen, n)
	m.took(t, e.due, now)
	e.got++
	return e.got == e.owed
}

// turn writes, in a closed loop, a record for each that has arrived.
func (s *downstream) turn(u *user, now int64) {
	k := u.owed
	u.owed = 0
	for s.r.o.Window > 0 && k > 0 && s.r.pacing.Load() {
		s.send(now)
		k--
	}
}

func (s *downstream) lost(u *user, code int, err error, _ time.Time) { s.r.lostAtAll(u, code, err) }

func (s *downstream) refused(u *user, err error) { s.r.refusedAtAll(u, err) }

func (s *downstream) outstanding() int64 { return s.r.l.pending - s.produce.failed.Load() }

func (s *downstream) verify(_ context.Context, r *run) (counts, error) {
	missing := int64(0)
	r.l.each(func(n int64, e *entry) {
		if left := e.owed - e.got; left > 0 {
			missing += int64(left)
			r.b.add(pushesOnce, "%s-%d for %s: %d of %d pushes have not come", r.l.run, n, r.users[e.user].name, left, e.owed)
		}
	})
	if k := s.produce.failed.Load(); k > 0 {
		return nil, fmt.Errorf("%d records could not be written: %w", k, s.produce.firstErr())
	}
	return counts{{Name: "pushes missing", N: missing}}, nil
}

// produceQueue takes records off the loop: franz-go may block when much is buffered.
type produceQueue struct {
	ch     chan *kgo.Record
	failed atomic.Int64
	mu     sync.Mutex
	err    error
}

// newProduceQueue starts the goroutine that hands the records to Kafka; it ends with the run's
// client.
func newProduceQueue(r *run) *produceQueue {
	q := &produceQueue{ch: make(chan *kgo.Record, 1<<16)}
	client := r.kafka.client
	r.kafka.tasks.Go(func() {
		for {
			select {
			case rec := <-q.ch:
				client.Produce(r.kafka.ctx, rec, func(_ *kgo.Record, err error) {
					if err != nil {
						q.fail(err)
					}
				})
			case <-r.kafka.ctx.Done():
				return
			}
		}
	})
	return q
}

func (q *produceQueue) put(topic, key string, value []byte) {
	select {
	case q.ch <- &kgo.Record{Topic: topic, Key: []byte(key), Value: value}:
	default:
		q.fail(fmt.Errorf("%d records wait for Kafka already", cap(q.ch)))
	}
}

func (q *produceQueue) fail(err error) {
	q.failed.Add(1)
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err == nil {
		q.err = err
	}
}

func (q *produceQueue) firstErr() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.err
}
