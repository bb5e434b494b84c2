package shard

import (
	"cmp"
	"context"
	"slices"
	"time"

	"im-gateway/codec"
)

// meteredUsers bounds how many users of one shard are measured at a time: about 8 MB.
const meteredUsers = 1 << 16

// Talk is what one user sent and was sent while it was measured.
type Talk struct {
	User     string
	In, Out  int64 // messages from the user, refused ones too; deliveries to the user's sessions
	BytesIn  int64 // of the messages' upstream records
	BytesOut int64 // of the deliveries' frames
}

// Talks is what users sent and were sent in a while.
type Talks struct {
	Window time.Duration // for how long it was measured
	Users  []Talk        // who sent or were sent something, in no order
	Missed int64         // messages and deliveries of users beyond those that can be measured at a time
}

// meter counts for Measure. A shard has one only while it is measured, and else pays for nothing but
// the look whether it has.
type meter struct {
	began  time.Time
	users  map[string]*Talk
	missed int64
}

// of returns where to count for a user, who may be the last that there is room for.
func (m *meter) of(user string) *Talk {
	t := m.users[user]
	if t != nil {
		return t
	}
	if len(m.users) == meteredUsers {
		m.missed++
		return &Talk{}
	}
	t = &Talk{User: user}
	m.users[user] = t
	return t
}

func (m *meter) sent(u *codec.Upstream) {
	t := m.of(u.User)
	t.In++
	t.BytesIn += int64(len(u.Value))
}

func (m *meter) received(user string, bytes int) {
	t := m.of(user)
	t.Out++
	t.BytesOut += int64(bytes)
}

// Measure watches for so long what users send and are sent, those of the HTTP API included. When ctx ends
// first it returns what there was until then, and why ctx ended. One measurement is under way at a time:
// another waits for it.
func (set *Set) Measure(ctx context.Context, window time.Duration) (Talks, error) {
	select {
	case set.measuring <- struct{}{}:
		defer func() { <-set.measuring }()
	case <-ctx.Done():
		return Talks{}, context.Cause(ctx)
	}
	// What has begun is ended, whoever goes away meanwhile.
	always := context.WithoutCancel(ctx)
	for i := range set.shards {
		if err := set.do(always, i, func(s *shard) {
			s.meter = &meter{began: s.opts.Now(), users: map[string]*Talk{}}
		}); err != nil {
			return Talks{}, err
		}
	}
	end := time.NewTimer(window)
	defer end.Stop()
	select {
	case <-end.C:
	case <-set.done:
	case <-ctx.Done():
	}
	var all Talks
	for i := range set.shards {
		var m *meter
		var ended time.Time
		if err := set.do(always, i, func(s *shard) { m, s.meter, ended = s.meter, nil, s.opts.Now() }); err != nil {
			return Talks{}, err
		}
		all.Window = max(all.Window, ended.Sub(m.began))
		all.Missed += m.missed
		all.Users = slices.Grow(all.Users, len(m.users))
		for _, t := range m.users {
			all.Users = append(all.Users, *t)
		}
	}
	return all, context.Cause(ctx)
}

// Top returns the n users, at least 1, for whom the figure is highest, the highest first; none for whom it
// is 0. There may be a million users: each is looked at once, and moved only if among the first so far.
func (t *Talks) Top(n int, figure func(*Talk) int64) []Talk {
	before := func(a, b *Talk) int {
		return cmp.Or(cmp.Compare(figure(b), figure(a)), cmp.Compare(a.User, b.User))
	}
	first := make([]*Talk, 0, min(n, len(t.Users))+1)
	for i := range t.Users {
		u := &t.Users[i]
		if figure(u) == 0 || len(first) == n && before(u, first[n-1]) > 0 {
			continue
		}
		at, _ := slices.BinarySearchFunc(first, u, before)
		first = slices.Insert(first, at, u)
		first = first[:min(n, len(first))]
	}
	top := make([]Talk, len(first))
	for i, u := range first {
		top[i] = *u
	}
	return top
}
