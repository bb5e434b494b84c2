package registry

import (
	"context"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/rueidis"
)

// many is several gateways with one policy on one Redis.
type many struct {
	t  testing.TB
	c  rueidis.Client
	gw map[string]*Presence
}

func newMany(t testing.TB, maxSessions int, replaceKind bool) *many {
	t.Helper()
	s := startRedis(t, "")
	m := &many{t: t, c: dialRedis(t, RedisOptions{Addrs: []string{s.addr()}}), gw: map[string]*Presence{}}
	for _, name := range []string{"gw-a", "gw-b", "gw-c"} {
		p, err := NewPresence(PresenceOptions{
			Client: m.c, GatewayID: name, TTL: presenceTTL, MaxSessions: maxSessions, ReplaceKind: replaceKind,
			Registerer: prometheus.NewRegistry(),
		})
		if err != nil {
			t.Fatal(err)
		}
		m.gw[name] = p
	}
	return m
}

// one is a session of a test.
type one struct {
	gateway string
	Entry
}

func (m *many) claim(s *one) Claimed {
	m.t.Helper()
	r := m.gw[s.gateway].Claim(context.Background(), []Entry{s.Entry})[0]
	if r.Err != nil {
		m.t.Fatal(r.Err)
	}
	s.Version = r.Version
	return r
}

func (m *many) refresh(s *one) Refreshed {
	m.t.Helper()
	r := m.gw[s.gateway].Refresh(context.Background(), []Entry{s.Entry})[0]
	if r.Err != nil {
		m.t.Fatal(r.Err)
	}
	return r
}

func (m *many) release(s *one) {
	m.t.Helper()
	if err := m.gw[s.gateway].Release(context.Background(), []Entry{s.Entry})[0]; err != nil {
		m.t.Fatal(err)
	}
}

func (m *many) locate(user string) []Location {
	m.t.Helper()
	r := m.gw["gw-a"].Locate(context.Background(), []string{user})[0]
	if r.Err != nil {
		m.t.Fatal(r.Err)
	}
	return r.Sessions
}

// expire lets a session's field expire now, or the time in Unix ms.
func (m *many) expire(user, session string, at int64) {
	m.t.Helper()
	value := fields(m.t, m.c, user)[sessionField+session]
	parts := strings.SplitN(value, "|", 4)
	if len(parts) != 4 {
		m.t.Fatalf("field of %s: %q", session, value)
	}
	parts[2] = strconv.FormatInt(at, 10)
	do(m.t, m.c, "HSET", PresenceKey(user), sessionField+session, strings.Join(parts, "|"))
}

// check compares what Redis holds of a user with the live sessions, newest first.
func (m *many) check(at, user string, want ...*one) {
	m.t.Helper()
	hash := fields(m.t, m.c, user)
	if len(want) == 0 {
		if len(hash) != 0 {
			m.t.Fatalf("%s: left: %v", at, hash)
		}
		return
	}
	locations := m.locate(user)
	if len(hash) != 4+len(want) || len(locations) != len(want) {
		m.t.Fatalf("%s: hash %v, located %+v, want %d sessions", at, hash, locations, len(want))
	}
	for i, s := range want {
		l := Location{s.gateway, s.Session, s.ConnectedAt, s.Version, s.DeviceID, s.DeviceKind, false}
		if locations[i] != l {
			m.t.Fatalf("%s: session %d at %+v, want %+v", at, i, locations[i], l)
		}
	}
	newest := want[0]
	for name, value := range map[string]string{
		"gateway_id": newest.gateway, "session_id": newest.Session,
		"connected_at": strconv.FormatInt(newest.ConnectedAt, 10), "version": strconv.FormatInt(newest.Version, 10),
	} {
		if hash[name] != value {
			m.t.Fatalf("%s: %s is %s, want %s, in %v", at, name, hash[name], value, hash)
		}
	}
}

func session(gateway, user, id, device, kind string) *one {
	return &one{gateway, Entry{User: user, Session: id, ConnectedAt: 1760000000000, DeviceID: device, DeviceKind: kind}}
}

func TestManySessions(t *testing.T) {
	t.Parallel()
	m := newMany(t, 3, false)
	device := "a|b\x00\n\xff|"
	s1, s2 := session("gw-a", "alice", "s|1", device, "web"), session("gw-b", "alice", "s2", "", "web")
	if r := m.claim(s1); r.Elsewhere || r.Superseded || len(r.Evicted) != 0 {
		t.Errorf("first: %+v", r)
	}
	before := time.Now().UnixMilli()
	if r := m.claim(s2); !r.Elsewhere || r.Superseded || len(r.Evicted) != 0 || s2.Version <= s1.Version {
		t.Errorf("second: %+v", r)
	}
	m.check("claimed", "alice", s2, s1)
	parts := strings.SplitN(fields(t, m.c, "alice")["s:s|1"], "|", 6)
	expires, err := strconv.ParseInt(parts[2], 10, 64)
	if slack := int64(10_000); err != nil || expires < before+presenceTTL.Milliseconds()-slack || expires > before+presenceTTL.Milliseconds()+slack {
		t.Errorf("expires at %v, now %d", parts, before)
	}
	if parts[0] != "gw-a" || parts[1] != strconv.FormatInt(s1.Version, 10) || parts[3] != "1760000000000" || parts[4] != "web" || parts[5] != device {
		t.Errorf("field %q", parts)
	}
	if at, found := lookup(t, m.gw["gw-a"], "alice"); !found || at.Session != "s2" || at.GatewayID != "gw-b" {
		t.Errorf("newest %+v", at)
	}

	do(t, m.c, "PEXPIRE", PresenceKey("alice"), "5000")
	m.expire("alice", s1.Session, time.Now().Add(5*time.Second).UnixMilli())
	if r := m.refresh(s1); r.Superseded || !r.Elsewhere {
		t.Errorf("refresh: %+v", r)
	}
	if d := ttl(t, m.c, "alice"); d <= presenceTTL-30*time.Second || d > presenceTTL {
		t.Errorf("TTL %s", d)
	}
	again, _ := strconv.ParseInt(strings.SplitN(fields(t, m.c, "alice")["s:s|1"], "|", 6)[2], 10, 64)
	if again < expires {
		t.Errorf("the field expires at %d, not extended to %d", again, expires)
	}
	m.check("refreshed", "alice", s2, s1)

	// A claim whose answer was lost, repeated; then the refresh with the version of the first.
	old := *s1
	if r := m.claim(s1); len(r.Evicted) != 0 || s1.Version <= s2.Version {
		t.Errorf("repeated: %+v", r)
	}
	if r := m.refresh(&old); r.Superseded {
		t.Error("superseded by itself")
	}
	m.check("claimed again", "alice", s1, s2)

	m.release(session("gw-b", "alice", s1.Session, "", "")) // another gateway's
	m.check("released by another", "alice", s1, s2)
	m.release(s1)
	m.check("released", "alice", s2)
	if r := m.refresh(s2); r.Superseded || r.Elsewhere {
		t.Errorf("alone: %+v", r)
	}
	m.release(s1) // gone
	m.check("released twice", "alice", s2)
	m.release(s2)
	m.check("all released", "alice")
}

func TestManyEvicts(t *testing.T) {
	t.Parallel()
	for _, replaceKind := range []bool{false, true} {
		m := newMany(t, 3, replaceKind)
		phone, web := session("gw-a", "bob", "s1", "d1", "phone"), session("gw-b", "bob", "s2", "d2", "web")
		m.claim(phone)
		m.claim(web)
		phone2 := session("gw-c", "bob", "s3", "d1", "tablet")
		if r := m.claim(phone2); !slices.Equal(r.Evicted, []Holder{{"gw-a", "s1"}}) || !r.Elsewhere {
			t.Errorf("same device: %+v", r)
		}
		m.check("same device", "bob", phone2, web)
		web2 := session("gw-a", "bob", "s4", "d4", "web")
		r := m.claim(web2)
		if replaceKind {
			if !slices.Equal(r.Evicted, []Holder{{"gw-b", "s2"}}) {
				t.Errorf("same kind: %+v", r)
			}
			m.check("same kind", "bob", web2, phone2)
			continue
		}
		if len(r.Evicted) != 0 {
			t.Errorf("same kind: %+v", r)
		}
		m.check("full", "bob", web2, phone2, web)
		more := session("gw-a", "bob", "s5", "", "")
		if r := m.claim(more); !slices.Equal(r.Evicted, []Holder{{"gw-b", "s2"}}) {
			t.Errorf("one too many: %+v", r)
		}
		m.check("one too many", "bob", more, web2, phone2)
		do(t, m.c, "PEXPIRE", PresenceKey("bob"), "5000")
		if r := m.refresh(web); !r.Superseded {
			t.Error("the evicted one was not told")
		}
		if r := m.refresh(phone); !r.Superseded {
			t.Error("the evicted one was not told")
		}
		m.release(web)
		m.release(phone)
		m.check("the evicted ones end", "bob", more, web2, phone2)
		if d := ttl(t, m.c, "bob"); d > 5*time.Second {
			t.Errorf("the evicted ones have extended it: %s", d)
		}
		// Two without a device or kind are not the same.
		last := session("gw-b", "bob", "s6", "", "")
		if r := m.claim(last); !slices.Equal(r.Evicted, []Holder{{"gw-c", "s3"}}) {
			t.Errorf("without a device: %+v", r)
		}
		m.release(more)
		if r := m.refresh(web); r.Superseded { // there is room again, and it was never closed
			t.Error("superseded with room")
		}
		m.check("room again", "bob", last, web2, web)
	}
}

func TestManyLateClaims(t *testing.T) {
	t.Parallel()
	m := newMany(t, 2, true)
	at := func(gateway, id, device, kind string, connected int64, late bool) *one {
		s := session(gateway, "carol", id, device, kind)
		s.ConnectedAt, s.Late = connected, late
		return s
	}
	newer := at("gw-a", "s2", "d1", "web", 2000, false)
	m.claim(newer)
	for _, s := range []*one{at("gw-b", "s1", "d1", "phone", 1000, true), at("gw-b", "s1", "", "web", 1000, true)} {
		if r := m.claim(s); !r.Superseded || r.Version != 0 || len(r.Evicted) != 0 || !r.Elsewhere {
			t.Errorf("%+v: %+v", s, r)
		}
		m.check("conflict", "carol", newer)
	}
	late := at("gw-b", "s1", "d9", "phone", 1000, true)
	if r := m.claim(late); r.Superseded || late.Version >= newer.Version || late.Version <= 0 {
		t.Errorf("with room: %+v", r)
	}
	m.check("with room", "carol", newer, late)
	if r := m.refresh(late); r.Superseded {
		t.Error("superseded")
	}
	m.check("refreshed", "carol", newer, late)
	later := at("gw-c", "s3", "", "", 1500, true) // between the two
	if r := m.claim(later); !slices.Equal(r.Evicted, []Holder{{"gw-b", "s1"}}) {
		t.Errorf("between: %+v of version %d, newer %d, late %d", r, later.Version, newer.Version, late.Version)
	}
	m.check("between", "carol", newer, later)
	if r := m.claim(at("gw-b", "s0", "", "", 500, true)); !r.Superseded {
		t.Errorf("full of later ones: %+v", r)
	}
	m.check("full of later ones", "carol", newer, later)
	newest := at("gw-b", "s4", "", "", 3000, true)
	if r := m.claim(newest); !slices.Equal(r.Evicted, []Holder{{"gw-c", "s3"}}) || newest.Version <= newer.Version {
		t.Errorf("late, but the newest: %+v", r)
	}
	m.check("late, but the newest", "carol", newest, newer)
}

// TestManyNewestExpires: its gateway has crashed.
func TestManyNewestExpires(t *testing.T) {
	t.Parallel()
	m := newMany(t, 3, false)
	s1, s2 := session("gw-a", "dave", "s1", "", ""), session("gw-b", "dave", "s2", "", "")
	m.claim(s1)
	m.claim(s2)
	m.expire("dave", "s2", time.Now().Add(-time.Second).UnixMilli())
	if r := m.refresh(s1); r.Superseded || r.Elsewhere {
		t.Errorf("refresh: %+v", r)
	}
	m.check("the newest has expired", "dave", s1)
	// It was only frozen.
	if r := m.refresh(s2); r.Superseded || !r.Elsewhere {
		t.Errorf("thawed: %+v", r)
	}
	m.check("thawed", "dave", s2, s1)
	m.expire("dave", "s1", 1)
	if got := m.locate("dave"); len(got) != 1 || got[0].Session != "s2" {
		t.Errorf("located %+v", got)
	}
	m.expire("dave", "s2", 1)
	m.release(session("gw-c", "dave", "none", "", ""))
	m.check("all expired", "dave")
}

// TestManyStale: a gateway that was frozen for longer than the TTL neither deletes nor overwrites.
func TestManyStale(t *testing.T) {
	t.Parallel()
	m := newMany(t, 2, false)
	stale, newer := session("gw-a", "erin", "s1", "d", ""), session("gw-b", "erin", "s2", "d", "")
	m.claim(stale)
	m.expire("erin", "s1", 1)
	if r := m.claim(newer); len(r.Evicted) != 0 {
		t.Errorf("evicted one that had expired: %+v", r)
	}
	if r := m.refresh(stale); !r.Superseded || !r.Elsewhere {
		t.Errorf("stale: %+v", r)
	}
	m.release(stale)
	m.check("stale", "erin", newer)
	// Nor does another gateway under that very session id.
	if r := m.refresh(&one{"gw-c", newer.Entry}); !r.Superseded {
		t.Errorf("another's: %+v", r)
	}
	m.check("another's", "erin", newer)
}

// TestManyHops: one device, a hundred times from one gateway to another.
func TestManyHops(t *testing.T) {
	t.Parallel()
	m := newMany(t, 2, false)
	fixed := session("gw-c", "frank", "fixed", "pc", "")
	m.claim(fixed)
	var last *one
	for i := range 100 {
		s := session([]string{"gw-a", "gw-b"}[i%2], "frank", fmt.Sprint("s", i), "phone", "")
		r := m.claim(s)
		if last != nil {
			if !slices.Equal(r.Evicted, []Holder{{last.gateway, last.Session}}) {
				t.Fatalf("hop %d: %+v", i, r)
			}
			if !m.refresh(last).Superseded {
				t.Fatalf("hop %d: the one before was not told", i)
			}
			m.release(last)
		}
		last = s
	}
	m.check("hopped", "frank", last, fixed)
}

// TestManyLosesEverything: whatever the order of the refreshes after, evicted sessions that were not
// told among them, the live ones are there again.
func TestManyLosesEverything(t *testing.T) {
	t.Parallel()
	m := newMany(t, 3, false)
	for seed := range uint64(60) {
		rnd := rand.New(rand.NewPCG(seed, 2))
		user := fmt.Sprint("u", seed)
		var all []*one
		for i := range 2 + rnd.IntN(7) {
			s := session([]string{"gw-a", "gw-b", "gw-c"}[rnd.IntN(3)], user, fmt.Sprint("s", i), []string{"", "d1", "d2"}[rnd.IntN(3)], "")
			m.claim(s)
			all = append(all, s)
		}
		var want []*one
		for _, l := range m.locate(user) {
			want = append(want, all[slices.IndexFunc(all, func(s *one) bool { return s.Session == l.Session })])
		}
		do(t, m.c, "DEL", PresenceKey(user))
		rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		for range 2 {
			for _, s := range all {
				if r := m.refresh(s); r.Superseded && slices.Contains(want, s) {
					t.Fatalf("seed %d: live session %s superseded", seed, s.Session)
				}
			}
		}
		m.check(fmt.Sprint("seed ", seed), user, want...)
	}
}

// TestManyBesideReplace: while gateways are moved from one policy to the other, an entry of theirs is
// a session like others.
func TestManyBesideReplace(t *testing.T) {
	t.Parallel()
	m := newMany(t, 2, false)
	old, _ := newPresence(t, m.c, "gw-old")
	version := claim(t, old, "gail", "s0").Version
	if got := m.locate("gail"); !slices.Equal(got, []Location{{GatewayID: "gw-old", Session: "s0", ConnectedAt: 1760000000000, Version: version, AnyDevice: true}}) {
		t.Errorf("located %+v", got)
	}
	do(t, m.c, "PEXPIRE", PresenceKey("gail"), "5000")
	s0, s1, s2 := session("gw-old", "gail", "s0", "", ""), session("gw-a", "gail", "s1", "", ""), session("gw-b", "gail", "s2", "", "")
	s0.Version = version
	if r := m.claim(s1); !r.Elsewhere || len(r.Evicted) != 0 || s1.Version <= version {
		t.Errorf("claim: %+v", r)
	}
	m.check("beside", "gail", s1, s0)
	left, _ := strconv.ParseInt(strings.Split(fields(t, m.c, "gail")["s:s0"], "|")[2], 10, 64)
	if d := time.Until(time.UnixMilli(left)); d > 10*time.Second {
		t.Errorf("its field is to live for %s, the key was for 5s", d)
	}
	if r := m.claim(s2); !slices.Equal(r.Evicted, []Holder{{"gw-old", "s0"}}) {
		t.Errorf("claim: %+v", r)
	}
	// The other way: both policies' sessions are located, and each finds itself again.
	s3 := claim(t, old, "gail", "s3")
	if !slices.Equal(s3.Evicted, []Holder{{"gw-b", "s2"}}) || s3.PrevSession != "s2" {
		t.Errorf("claim: %+v", s3)
	}
	if got := m.locate("gail"); len(got) != 3 || got[0].Session != "s3" {
		t.Errorf("located %+v", got)
	}
	if old.Claim(t.Context(), []Entry{{User: "gail", Session: "s3"}})[0].Evicted != nil {
		t.Error("it has evicted itself")
	}
}

// TestManyOverForeignEntries: what others wrote keeps no user out.
func TestManyOverForeignEntries(t *testing.T) {
	t.Parallel()
	m := newMany(t, 2, false)
	for user, hash := range map[string][]string{
		"words":  {"gateway_id", "gw-x", "session_id", "sx", "version", "new", "connected_at", "today"},
		"huge":   {"gateway_id", "gw-x", "session_id", "sx", "version", strings.Repeat("9", 400)},
		"half":   {"gateway_id", "gw-x"},
		"bar":    {"gateway_id", "gw|x", "session_id", "sx"},
		"fields": {"s:", "", "s:a", "|||||", "s:b", "gw|" + strings.Repeat("9", 30) + "|9999999999999|1||", "s:c", "gw|1|x|1||"},
	} {
		do(t, m.c, append([]string{"HSET", PresenceKey(user)}, hash...)...)
		s := session("gw-a", user, "s1", "", "")
		if r := m.claim(s); r.Superseded || r.Version == 0 {
			t.Errorf("%s: %+v", user, r)
		}
		if r := m.refresh(s); r.Superseded {
			t.Errorf("%s: %+v", user, r)
		}
		if got := m.locate(user); len(got) == 0 || got[0].Session != "s1" {
			t.Errorf("%s: located %+v", user, got)
		}
	}
	do(t, m.c, "SET", PresenceKey("text"), "gw-x")
	r := m.gw["gw-a"].Locate(t.Context(), []string{"words", "text", "nobody"})
	if r[0].Err != nil || r[1].Err == nil || r[2].Err != nil || len(r[2].Sessions) != 0 {
		t.Errorf("located %+v", r)
	}
	if c := m.gw["gw-a"].Claim(t.Context(), []Entry{{User: "text", Session: "s"}, {User: "free", Session: "s"}}); c[0].Err == nil || c[1].Err != nil {
		t.Errorf("claimed %+v", c)
	}
}

// TestManyChunks: more than a pipeline's worth, answers in the users' order.
func TestManyChunks(t *testing.T) {
	t.Parallel()
	s := startRedis(t, "")
	c := dialRedis(t, RedisOptions{Addrs: []string{s.addr()}})
	metrics := prometheus.NewRegistry()
	p, err := NewPresence(PresenceOptions{Client: c, GatewayID: "gw-a", TTL: presenceTTL, MaxSessions: 2, Registerer: metrics})
	if err != nil {
		t.Fatal(err)
	}
	const n = 2*presenceChunk + 7
	users, entries := make([]string, n), make([]Entry, n)
	for i := range users {
		users[i] = fmt.Sprint("u", i)
		entries[i] = Entry{User: users[i], Session: fmt.Sprint("s", i), DeviceID: "d"}
	}
	p.Claim(t.Context(), entries[:n-1])
	do(t, c, "SCRIPT", "FLUSH")
	for i, r := range p.Claim(t.Context(), entries[:n-1]) {
		if r.Err != nil || len(r.Evicted) != 0 {
			t.Fatalf("claim %d: %+v", i, r)
		}
	}
	for i, r := range p.Locate(t.Context(), users) {
		if i == n-1 {
			if r.Err != nil || len(r.Sessions) != 0 {
				t.Errorf("nobody: %+v", r)
			}
		} else if r.Err != nil || len(r.Sessions) != 1 || r.Sessions[0].Session != entries[i].Session {
			t.Fatalf("located %d: %+v", i, r)
		}
	}
	replacing := entries[0]
	replacing.Session = "other"
	p.Claim(t.Context(), []Entry{replacing})
	for result, want := range map[string]int{"new": 2 * (n - 1), "replaced": 1, "present": n - 1, "absent": 1, "error": 0} {
		if got := metric(t, metrics, "im_gateway_presence_operations_total", "result", result); got != float64(want) {
			t.Errorf("%s: %v operations counted, want %d", result, got, want)
		}
	}
	s.stop()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	for _, r := range p.Locate(ctx, users[:2]) {
		if r.Err == nil {
			t.Error("located without Redis")
		}
	}
}

// TestManyModel runs random operations of three gateways on one user against a model.
func TestManyModel(t *testing.T) {
	t.Parallel()
	for _, replaceKind := range []bool{false, true} {
		m := newMany(t, 3, replaceKind)
		for seed := range uint64(60) {
			runManyModel(m, replaceKind, seed)
		}
	}
}

func runManyModel(m *many, replaceKind bool, seed uint64) {
	const maxSessions = 3
	t := m.t
	rnd := rand.New(rand.NewPCG(seed, 3))
	gateways := slices.Sorted(maps.Keys(m.gw))
	user := fmt.Sprint("u", seed)
	var live, all []*one // live: newest first
	expired := map[*one]bool{}
	pick := func(of ...string) string { return of[rnd.IntN(len(of))] }
	conflict := func(a, b *one) bool {
		return a.DeviceID != "" && a.DeviceID == b.DeviceID || replaceKind && a.DeviceKind != "" && a.DeviceKind == b.DeviceKind
	}
	without := func(s ...*one) {
		live = slices.DeleteFunc(live, func(x *one) bool { return slices.Contains(s, x) })
	}
	// place returns false where those above s leave it no place.
	place := func(s *one) (evicted []Holder, ok bool) {
		live = slices.DeleteFunc(live, func(x *one) bool { return x == s })
		above := 0
		for _, x := range live {
			if x.Version > s.Version {
				above++
				if conflict(x, s) {
					return nil, false
				}
			}
		}
		if above >= maxSessions {
			return nil, false
		}
		old := live
		live = append(slices.Clone(old[:above]), s)
		for _, x := range old[above:] {
			if len(live) < maxSessions && !conflict(x, s) {
				live = append(live, x)
			} else {
				evicted = append(evicted, Holder{x.gateway, x.Session})
			}
		}
		return evicted, true
	}
	elsewhere := func(s *one) bool {
		return slices.ContainsFunc(live, func(x *one) bool { return x.gateway != s.gateway })
	}
	purge := func() {
		without(slices.Collect(maps.Keys(expired))...)
		clear(expired)
	}
	for step := range 80 {
		at := fmt.Sprintf("kind %v, seed %d, step %d", replaceKind, seed, step)
		var s *one
		if len(all) > 0 {
			s = all[rnd.IntN(len(all))]
		}
		switch op := rnd.IntN(20); {
		case op < 5 || s == nil:
			s = session(pick(gateways...), user, fmt.Sprint("s", step), pick("", "d1", "d2", "d3"), pick("", "web", "phone"))
			s.ConnectedAt, s.Late = time.Now().UnixMilli(), rnd.IntN(3) == 0
			if s.Late {
				s.ConnectedAt -= int64(rnd.IntN(20))
			}
			purge()
			r := m.claim(s)
			highest, late := int64(0), int64(math.MaxInt64)
			var later []*one
			for _, x := range live {
				highest = max(highest, x.Version)
				if s.Late && x.ConnectedAt > s.ConnectedAt {
					later, late = append(later, x), min(late, x.Version-1000*(x.ConnectedAt-s.ConnectedAt))
				}
			}
			for slices.ContainsFunc(live, func(x *one) bool { return x.Version == late }) {
				late--
			}
			switch {
			case r.Superseded && len(later) == 0:
				t.Fatalf("%s: superseded by nobody", at)
			case r.Superseded:
				s.Version = late
			case len(later) == 0 && s.Version <= highest, len(later) > 0 && s.Version != late:
				t.Fatalf("%s: version %d, highest %d, of a late one %d", at, s.Version, highest, late)
			}
			evicted, ok := place(s)
			if r.Superseded == ok || !slices.Equal(r.Evicted, evicted) || r.Elsewhere != elsewhere(s) {
				t.Fatalf("%s: claimed %+v, want evicted %v, placed %v", at, r, evicted, ok)
			}
			for _, x := range later {
				if slices.Contains(r.Evicted, Holder{x.gateway, x.Session}) {
					t.Fatalf("%s: a late claim has evicted a later session: %+v", at, r)
				}
			}
			if ok {
				all = append(all, s)
			}
		case op < 13:
			purge()
			r := m.refresh(s)
			ok := slices.Contains(live, s)
			if !ok {
				_, ok = place(s)
			}
			if r.Superseded == ok || r.Elsewhere != elsewhere(s) {
				t.Fatalf("%s: %s refreshed %+v, want %v", at, s.Session, r, ok)
			}
		case op < 16:
			purge()
			m.release(s)
			without(s)
		case op < 19:
			if slices.Contains(live, s) {
				m.expire(user, s.Session, time.Now().UnixMilli()-1)
				expired[s] = true
			}
			continue // nobody has seen it yet
		default:
			do(t, m.c, "DEL", PresenceKey(user)) // lost
			live = nil
			clear(expired)
		}
		m.check(at, user, live...)
	}
}

// BenchmarkRefreshMany10000 is 10,000 refreshes of users with so many sessions each.
func BenchmarkRefreshMany10000(b *testing.B) {
	for _, sessions := range []int{1, 3} {
		b.Run(fmt.Sprint("sessions=", sessions), func(b *testing.B) {
			m := newMany(b, 3, false)
			entries := make([]Entry, 10_000)
			for k, gateway := range slices.Sorted(maps.Keys(m.gw))[:sessions] {
				for i := range entries {
					entries[i] = Entry{
						User: fmt.Sprint("user-", i), Session: fmt.Sprint("session-", k, "-", i), ConnectedAt: 1760000000000,
						DeviceID: fmt.Sprint("device-", k, "-", i), DeviceKind: "web",
					}
				}
				for i, r := range m.gw[gateway].Claim(b.Context(), entries) {
					if r.Err != nil {
						b.Fatal(r.Err)
					}
					entries[i].Version = r.Version
				}
			}
			p := m.gw[[]string{"gw-a", "gw-b", "gw-c"}[sessions-1]]
			b.ReportAllocs()
			cpu, known := redisCPU(m.c)
			for b.Loop() {
				for i, r := range p.Refresh(b.Context(), entries) {
					if r.Err != nil || r.Superseded {
						b.Fatalf("entry %d: %+v", i, r)
					}
				}
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/float64(len(entries)), "us/entry")
			if after, _ := redisCPU(m.c); known {
				b.ReportMetric((after-cpu)*1e6/float64(b.N)/float64(len(entries)), "redis-cpu-us/entry")
			}
		})
	}
}

// redisCPU returns the CPU seconds that a real Redis has used.
func redisCPU(c rueidis.Client) (seconds float64, known bool) {
	info, err := c.Do(context.Background(), c.B().Info().Section("cpu").Build()).ToString()
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(info) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		if name == "used_cpu_user" || name == "used_cpu_sys" {
			n, _ := strconv.ParseFloat(value, 64)
			seconds += n
			known = true
		}
	}
	return seconds, known
}
