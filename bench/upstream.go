package bench

import (
	"context"
	"strconv"
	"time"
	"unsafe"

	"github.com/tidwall/gjson"

	"im-gateway/bench/fleet"
)

func init() { scenarios["upstream"] = kind{make: func(r *run) scenario { return newUpstream(r) }} }

// upstream sends messages from the users in turn and waits for their acks.
type upstream struct {
	r           *run
	m           *meter
	next        int
	sent, acked *track
	late        *track
}

func newUpstream(r *run) *upstream { return &upstream{r: r} }

func (s *upstream) begin(m *meter) {
	s.m = m
	s.sent, s.acked = m.track("sent", false), m.track("acked", true)
	s.late = m.track("acked after OUTCOME_UNKNOWN", false)
}

func (s *upstream) send(due int64) {
	users := s.r.chatters()
	for range users {
		u := &s.r.users[s.next]
		s.next = (s.next + 1) % users
		if u.up {
			s.r.out = s.append(s.r.out[:0], u, due, time.Now().UnixNano())
			_ = s.r.f.Write(u.conn, s.r.out) // a lost connection is told to lost
			return
		}
	}
}

// append appends u's next message, due then, as a frame.
func (s *upstream) append(dst []byte, u *user, due, now int64) []byte {
	r := s.r
	n := r.l.add(u.n, due)
	b := append(r.buf[:0], `{"type":"send-message","message_id":"`...)
	b = r.l.appendName(b, n)
	b = append(b, `","data":{"conversation_id":"g`...)
	b = strconv.AppendInt(b, int64(u.group), 10)
	b = append(b, `","content":"`...)
	b = append(b, r.content[:r.size()]...)
	b = append(b, `"},"timestamp":`...)
	b = strconv.AppendInt(b, due/int64(time.Millisecond), 10)
	b = append(b, '}')
	r.buf = b
	s.m.count(s.sent, now)
	return fleet.AppendText(dst, b)
}

func (s *upstream) frame(u *user, payload []byte, now int64) {
	// The view is not kept.
	f := gjson.Parse(unsafe.String(unsafe.SliceData(payload), len(payload)))
	if f.Get("type").Str != "message-ack" {
		return
	}
	d := f.Get("data")
	id := d.Get("client_msg_id").Str
	n, ok := s.r.l.number(id)
	var e *entry
	if ok {
		e = s.r.l.get(n)
	}
	if e == nil || int(e.user) != u.n {
		s.r.b.add(answersOnce, "user %s got an answer for %q, which it never sent", u.name, id)
		return
	}
	success := d.Get("status").Str == "success"
	code := d.Get("code").Str
	if e.state != pending || (!success && e.unknown) {
		s.r.b.add(answersOnce, "user %s got a second answer for %q", u.name, id)
		return
	}
	if !success && code == "OUTCOME_UNKNOWN" { // a late success may follow
		e.unknown = true
		s.r.l.pending--
		s.m.count(s.m.track("refused "+code, false), now)
		u.owed++
		return
	}
	if !success {
		e.state = refused
		s.r.l.pending--
		s.m.count(s.m.track("refused "+code, false), now)
		u.owed++
		return
	}
	e.state = settled
	if v := d.Get("partition"); v.Exists() {
		e.partition = int16(v.Int())
	}
	if v := d.Get("offset"); v.Exists() {
		e.offset = v.Int()
	}
	if e.unknown {
		s.m.count(s.late, now)
	} else {
		s.r.l.pending--
		u.owed++
	}
	s.m.took(s.acked, e.due, now)
}

// turn sends, in a closed loop, a message for each answer of the read in one write.
func (s *upstream) turn(u *user, now int64) {
	if s.r.o.Window == 0 || u.owed == 0 {
		u.owed = 0
		return
	}
	k := u.owed
	u.owed = 0
	if !s.r.pacing.Load() || !u.up {
		return
	}
	out := s.r.out[:0]
	for range k {
		out = s.append(out, u, now, now)
	}
	s.r.out = out
	_ = s.r.f.Write(u.conn, out) // a lost connection is told to lost
}

func (s *upstream) lost(u *user, code int, err error, _ time.Time) { s.r.lostAtAll(u, code, err) }

func (s *upstream) refused(u *user, err error) { s.r.refusedAtAll(u, err) }

func (s *upstream) outstanding() int64 { return s.r.l.pending }

func (s *upstream) verify(ctx context.Context, r *run) (counts, error) {
	if r.kafka == nil {
		return nil, nil
	}
	return r.kafka.verifyUpstream(ctx, r)
}
