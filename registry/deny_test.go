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
	writeDenials(t, s, map[string]int64{
		"jti:before": until, "jti:ended": time.Now().Add(-time.Minute).Unix(), "nonsense": until,
	})
	d, l := followDenyList(t, s, 0)
	eventually(t, "the list is read", func() bool { return d.has(Denial{TokenID: "before", Until: until}) })
	c := dialDeny(t, s)
	if n, err := c.Do(t.Context(), c.B().Zcard().Key(DenyKey).Build()).AsInt64(); err != nil || n != 2 {
		t.Errorf("what has ended was not cleared: %d entries, %v", n, err)
	}
	if n := testutil.ToFloat64(l.bad); n != 1 {
		t.Errorf("%v entries that cannot be read", n)
	}
	writeDenials(t, s, map[string]int64{"user:7:alice": until})
	publish := c.B().Publish().Channel(DenyChannel).Message(fmt.Sprintf("%d user:7:alice", until)).Build()
	if n, err := c.Do(t.Context(), publish).AsInt64(); err != nil || n != 1 {
		t.Fatalf("heard by %d, %v", n, err)
	}
	eventually(t, "a message is heard", func() bool { return d.has(Denial{User: "alice", IssuedUntil: 7, Until: until}) })

	s.stop()
	time.Sleep(20 * time.Millisecond)
	if !d.has(Denial{TokenID: "before", Until: until}) {
		t.Error("what was known was forgotten")
	}
	s.start()
	writeDenials(t, s, map[string]int64{"jti:missed": until})
	eventually(t, "the list is read again", func() bool { return d.has(Denial{TokenID: "missed", Until: until}) })
}

// TestDenyListIsBounded: of too long a list the entries that end last are in force.
func TestDenyListIsBounded(t *testing.T) {
	s := startRedis(t, "")
	now := time.Now().Unix()
	list := map[string]int64{}
	for i := range int64(20) {
		list[fmt.Sprint("jti:", i)] = now + 1000 + i
	}
	writeDenials(t, s, list)
	d, l := followDenyList(t, s, 15)
	eventually(t, "the list is read", func() bool { return d.has(Denial{TokenID: "19", Until: now + 1019}) })
	if d.has(Denial{TokenID: "4", Until: now + 1004}) || !d.has(Denial{TokenID: "5", Until: now + 1005}) {
		t.Error("not the 15 that end last")
	}
	if n := testutil.ToFloat64(l.dropped); n != 5 {
		t.Errorf("%v were dropped", n)
	}
}

// writeDenials puts entries on the list, with what they hold until; a Redis that has just been started
// may need a moment.
func writeDenials(t *testing.T, s *redisServer, list map[string]int64) {
	t.Helper()
	c := dialDeny(t, s)
	for member, until := range list {
		eventually(t, member+" is written", func() bool {
			return c.Do(t.Context(), c.B().Zadd().Key(DenyKey).ScoreMember().ScoreMember(float64(until), member).Build()).Error() == nil
		})
	}
}

func dialDeny(t *testing.T, s *redisServer) rueidis.Client {
	t.Helper()
	var c rueidis.Client
	eventually(t, "Redis answers", func() (ok bool) {
		var err error
		c, err = DialRedis(RedisOptions{Addrs: []string{s.addr()}})
		return err == nil
	})
	t.Cleanup(c.Close)
	return c
}
