package registry

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/redis/rueidis"
	"github.com/rs/zerolog"
)

func TestParseDenial(t *testing.T) {
	for member, want := range map[string]Denial{
		"jti:abc:def":     {TokenID: "abc:def", Until: 9},
		"user:5:alice":    {User: "alice", IssuedUntil: 5, Until: 9},
		"user:0:a:b:c":    {User: "a:b:c", Until: 9},
		"user:5:":         {},
		"user:x:alice":    {},
		"user:-1:alice":   {},
		"user:alice":      {},
		"jti:":            {},
		"":                {},
		"JTI:abc":         {},
		"user:1.5:alice":  {},
		"user: 5:alice":   {},
		"user:5":          {},
		"something:5:abc": {},
	} {
		got, err := ParseDenial(member, 9)
		if got != want || (err == nil) != (want != Denial{}) {
			t.Errorf("%q: %+v, %v", member, got, err)
		}
	}
	for _, text := range []string{"", "9", "jti:a", "x jti:a", "9  jti:a", "9.5 jti:a"} {
		if got, err := parseDenialMessage(text); err == nil {
			t.Errorf("%q: %+v", text, got)
		}
	}
	if got, err := parseDenialMessage("9 user:5:al ice"); err != nil || got.User != "al ice" {
		t.Errorf("%+v, %v", got, err)
	}
}

// denied is a gateway's view of the list.
type denied struct {
	mu   sync.Mutex
	list map[Denial]bool
}

func (d *denied) has(e Denial) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.list[e]
}

func followDenyList(t *testing.T, s *redisServer, most int) (*denied, *DenyList) {
	t.Helper()
	d := &denied{list: map[Denial]bool{}}
	l, err := NewDenyList(DenyListOptions{
		Redis: dialDeny(t, s), Max: most, Logger: zerolog.Nop(), Registerer: prometheus.NewRegistry(),
		Add: func(e Denial) {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.list[e] = true
		},
		Replace: func(list []Denial) {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.list = map[Denial]bool{}
			for _, e := range list {
				d.list[e] = true
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := l.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return d, l
}

// TestDenyList: what is on the list, what is told, what ended, and what was missed while Redis was away.
func TestDenyList(t *testing.T) {
	s := startRedis(t, "")
	until := time.Now().Add(time.Hour).Unix()
	add := func(member string, until int64) {
		t.Helper()
		if _, err := s.server.ZAdd(DenyKey, float64(until), member); err != nil {
			t.Fatal(err)
		}
	}
	add("jti:before", until)
	add("jti:ended", time.Now().Add(-time.Minute).Unix())
	add("nonsense", until)
	d, l := followDenyList(t, s, 0)
	eventually(t, "the list is read", func() bool { return d.has(Denial{TokenID: "before", Until: until}) })
	if members, err := s.server.ZMembers(DenyKey); err != nil || len(members) != 2 {
		t.Errorf("what has ended was not cleared: %v %v", members, err)
	}
	if n := testutil.ToFloat64(l.bad); n != 1 {
		t.Errorf("%v entries that cannot be read", n)
	}
	eventually(t, "the channel is subscribed", func() bool { return s.server.PubSubNumSub(DenyChannel)[DenyChannel] == 1 })
	add("user:7:alice", until)
	s.server.Publish(DenyChannel, fmt.Sprintf("%d user:7:alice", until))
	eventually(t, "a message is heard", func() bool { return d.has(Denial{User: "alice", IssuedUntil: 7, Until: until}) })

	s.stop()
	time.Sleep(20 * time.Millisecond)
	if !d.has(Denial{TokenID: "before", Until: until}) {
		t.Error("what was known was forgotten")
	}
	s.start()
	add("jti:missed", until)
	eventually(t, "the list is read again", func() bool { return d.has(Denial{TokenID: "missed", Until: until}) })
}

// TestDenyListIsBounded: of too long a list the entries that end last are in force.
func TestDenyListIsBounded(t *testing.T) {
	s := startRedis(t, "")
	now := time.Now().Unix()
	for i := range 20 {
		if _, err := s.server.ZAdd(DenyKey, float64(now+1000+int64(i)), fmt.Sprint("jti:", i)); err != nil {
			t.Fatal(err)
		}
	}
	d, l := followDenyList(t, s, 15)
	eventually(t, "the list is read", func() bool { return d.has(Denial{TokenID: "19", Until: now + 1019}) })
	if d.has(Denial{TokenID: "4", Until: now + 1004}) || !d.has(Denial{TokenID: "5", Until: now + 1005}) {
		t.Error("not the 15 that end last")
	}
	if n := testutil.ToFloat64(l.dropped); n != 5 {
		t.Errorf("%v were dropped", n)
	}
}

func dialDeny(t *testing.T, s *redisServer) rueidis.Client {
	t.Helper()
	c, err := DialRedis(RedisOptions{Addrs: []string{s.addr()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}
