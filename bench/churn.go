package bench

import (
	"context"
	"errors"
	"time"
)

func init() {
	scenarios["churn"] = kind{make: func(r *run) scenario { return newChurn(r) }}
}

// churn lets users leave and come back at once, at the rate of the run. In a soak they are the
// last tenth of the users, who do not chat.
type churn struct {
	r     *run
	m     *meter
	first int // of the users that come and go
	every int64
	left  *track
	away  int64
}

var errLeft = errors.New("the bench left")

func newChurn(r *run) *churn {
	s := &churn{r: r, every: 1}
	if r.o.Scenario == "soak" {
		s.first = r.chatters()
	}
	return s
}

// chatters is how many of the users chat: all, but for a tenth of a soak's, who come and go.
func (r *run) chatters() int {
	if r.o.Scenario != "soak" {
		return len(r.users)
	}
	return max(1, len(r.users)*9/10)
}

func (s *churn) begin(m *meter) {
	s.m = m
	s.left = m.track("left", false)
}

func (s *churn) send(due int64) {
	if s.first >= len(s.r.users) {
		return
	}
	u := &s.r.users[s.first+s.r.rng.IntN(len(s.r.users)-s.first)]
	if !u.up {
		return // is on its way back
	}
	s.m.count(s.left, time.Now().UnixNano())
	s.away++
	u.left = time.Unix(0, due)
	s.r.f.Close(u.conn, errLeft)
}

func (s *churn) frame(*user, []byte, int64) {}
func (s *churn) turn(*user, int64)          {}

func (s *churn) lost(u *user, code int, err error, _ time.Time) {
	if !errors.Is(err, errLeft) {
		s.r.lostAtAll(u, code, err)
		return
	}
	s.r.f.Connect(u.n, u.left)
}

func (s *churn) refused(u *user, err error) {
	s.r.b.add(comesBack, "user %s: %v", u.name, err)
}

func (s *churn) outstanding() int64 { return int64(len(s.r.users) - s.r.up) }

func (s *churn) verify(context.Context, *run) (counts, error) { return nil, nil }
