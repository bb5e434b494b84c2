package bench

import (
	"context"
	"strings"
	"time"

	"im-gateway/bench/fleet"
)

func init() {
	scenarios["echo-load"] = kind{plain: true, make: func(r *run) scenario { return &echo{r: r} }}
}

// echo drives plain echo servers: what a user sends must come back to it, in order. Each user has
// at most Window messages outstanding, 1 unless said otherwise.
type echo struct {
	r            *run
	m            *meter
	sent, echoed *track
	next         int
	open         int64
}

func (s *echo) begin(m *meter) {
	s.m = m
	s.sent, s.echoed = m.track("sent", false), m.track("echoed", true)
}

func (s *echo) send(due int64) {
	u := &s.r.users[s.next]
	s.next = (s.next + 1) % len(s.r.users)
	if !u.up {
		return
	}
	s.r.out = s.append(s.r.out[:0], u, due)
	_ = s.r.f.Write(u.conn, s.r.out) // a lost connection is told to lost
}

func (s *echo) append(dst []byte, u *user, due int64) []byte {
	n := s.r.l.add(u.n, due)
	b := s.r.l.appendName(s.r.buf[:0], n)
	b = append(b, ' ')
	b = append(b, s.r.content[:max(1, s.r.size()-len(b))]...)
	s.r.buf = b
	s.open++
	s.m.count(s.sent, due)
	return fleet.AppendText(dst, b)
}

func (s *echo) frame(u *user, payload []byte, now int64) {
	name, _, _ := strings.Cut(string(payload), " ")
	n, ok := s.r.l.number(name)
	if !ok {
		return
	}
	e := s.r.l.get(n)
	switch {
	case e == nil || int(e.user) != u.n:
		s.r.b.add(pushesToTarget, "user %s got %q, which it did not send", u.name, name)
		return
	case e.state == settled:
		s.r.b.add(pushesOnce, "user %s got %q twice", u.name, name)
		return
	case n < u.seen:
		s.r.b.add(pushesInOrder, "user %s got %q behind number %d", u.name, name, u.seen)
	}
	e.state = settled
	u.seen = max(u.seen, n)
	s.open--
	s.m.took(s.echoed, e.due, now)
	u.owed++
}

func (s *echo) turn(u *user, now int64) {
	k := u.owed
	u.owed = 0
	if s.r.o.Window == 0 || k == 0 || !s.r.pacing.Load() || !u.up {
		return
	}
	out := s.r.out[:0]
	for range k {
		out = s.append(out, u, now)
	}
	s.r.out = out
	_ = s.r.f.Write(u.conn, out) // a lost connection is told to lost
}

func (s *echo) lost(u *user, code int, err error, _ time.Time) { s.r.lostAtAll(u, code, err) }
func (s *echo) refused(u *user, err error)                     { s.r.refusedAtAll(u, err) }
func (s *echo) outstanding() int64                             { return s.open }
func (s *echo) verify(context.Context, *run) (counts, error)   { return nil, nil }
