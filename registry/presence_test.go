package registry

import (
	"context"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/rueidis"
)

const presenceTTL = 90 * time.Second

func dialRedis(t testing.TB, o RedisOptions) rueidis.Client {
	t.Helper()
	c, err := DialRedis(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func newPresence(t testing.TB, c rueidis.Client, gateway string) (*Presence, *prometheus.Registry) {
	t.Helper()
	metrics := prometheus.NewRegistry()
	p, err := NewPresence(PresenceOptions{Client: c, GatewayID: gateway, TTL: presenceTTL, Registerer: metrics})
	if err != nil {
		t.Fatal(err)
	}
	return p, metrics
}

// two returns two gateways on one Redis, and the client.
func two(t testing.TB) (a, b *Presence, c rueidis.Client) {
	t.Helper()
	s := startRedis(t, "")
	c = dialRedis(t, RedisOptions{Addrs: []string{s.addr()}})
	a, _ = newPresence(t, c, "gw-a")
	b, _ = newPresence(t, dialRedis(t, RedisOptions{Addrs: []string{s.addr()}}), "gw-b")
	return a, b, c
}

func do(t testing.TB, c rueidis.Client, args ...string) rueidis.RedisResult {
	t.Helper()
	r := c.Do(context.Background(), c.B().Arbitrary(args[0]).Keys(args[1:min(2, len(args))]...).Args(args[min(2, len(args)):]...).Build())
	if err := r.Error(); err != nil && !rueidis.IsRedisNil(err) {
		t.Fatalf("%v: %v", args, err)
	}
	return r
}

func fields(t testing.TB, c rueidis.Client, user string) map[string]string {
	t.Helper()
	m, err := do(t, c, "HGETALL", PresenceKey(user)).AsStrMap()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func ttl(t testing.TB, c rueidis.Client, user string) time.Duration {
	t.Helper()
	ms, err := do(t, c, "PTTL", PresenceKey(user)).AsInt64()
	if err != nil {
		t.Fatal(err)
	}
	return time.Duration(ms) * time.Millisecond
}

func claim(t testing.TB, p *Presence, user, session string) Claimed {
	t.Helper()
	r := p.Claim(context.Background(), []Entry{{User: user, Session: session, ConnectedAt: 1760000000000}})[0]
	if r.Err != nil {
		t.Fatal(r.Err)
	}
	return r
}

func refresh(t testing.TB, p *Presence, user, session string, version int64) (superseded bool) {
	t.Helper()
	r := p.Refresh(context.Background(), []Entry{{User: user, Session: session, ConnectedAt: 1760000000000, Version: version}})[0]
	if r.Err != nil {
		t.Fatal(r.Err)
	}
	return r.Superseded
}

func release(t testing.TB, p *Presence, user, session string) {
	t.Helper()
	if err := p.Release(context.Background(), []Entry{{User: user, Session: session}})[0]; err != nil {
		t.Fatal(err)
	}
}

func lookup(t testing.TB, p *Presence, user string) (Location, bool) {
	t.Helper()
	at, found, err := p.Lookup(context.Background(), user)
	if err != nil {
		t.Fatal(err)
	}
	return at, found
}

func TestPresenceEntry(t *testing.T) {
	t.Parallel()
	a, b, c := two(t)
	if _, found := lookup(t, a, "alice"); found {
		t.Error("found before she came")
	}
	before := time.Now().Add(-time.Second).UnixMicro()
	first := claim(t, a, "alice", "s1")
	if first.PrevGateway != "" || first.PrevSession != "" {
		t.Errorf("previous %+v", first)
	}
	if first.Version < before || first.Version > time.Now().Add(time.Second).UnixMicro() {
		t.Errorf("version %d is not the time in microseconds", first.Version)
	}
	want := map[string]string{
		"gateway_id": "gw-a", "session_id": "s1", "connected_at": "1760000000000", "version": strconv.FormatInt(first.Version, 10),
	}
	if got := fields(t, c, "alice"); !maps.Equal(got, want) {
		t.Errorf("entry %v, want %v", got, want)
	}
	if d := ttl(t, c, "alice"); d <= presenceTTL-30*time.Second || d > presenceTTL {
		t.Errorf("TTL %s", d)
	}
	if at, found := lookup(t, b, "alice"); !found || at != (Location{GatewayID: "gw-a", Session: "s1", ConnectedAt: 1760000000000, Version: first.Version}) {
		t.Errorf("found %v at %+v", found, at)
	}

	second := claim(t, b, "alice", "s2")
	if second.PrevGateway != "gw-a" || second.PrevSession != "s1" || second.Version <= first.Version {
		t.Errorf("second claim %+v after %+v", second, first)
	}
	again := claim(t, b, "alice", "s2")
	if again.PrevGateway != "" || again.PrevSession != "" || again.Version <= second.Version {
		t.Errorf("repeated claim %+v after %+v", again, second)
	}
	release(t, a, "alice", "s1") // not hers any more
	release(t, a, "alice", "s2") // another gateway's
	if at, found := lookup(t, a, "alice"); !found || at.GatewayID != "gw-b" {
		t.Errorf("found %v at %+v", found, at)
	}
	release(t, b, "alice", "s2")
	if _, found := lookup(t, a, "alice"); found {
		t.Error("still there")
	}
	release(t, b, "alice", "s2")
}

func TestPresenceRefresh(t *testing.T) {
	t.Parallel()
	a, b, c := two(t)
	old := claim(t, a, "alice", "s1").Version
	do(t, c, "PEXPIRE", PresenceKey("alice"), "5000")
	if refresh(t, a, "alice", "s1", old) {
		t.Error("superseded by itself")
	}
	if d := ttl(t, c, "alice"); d <= presenceTTL-30*time.Second {
		t.Errorf("not extended: %s", d)
	}

	// A zombie: a newer claim stands.
	newer := claim(t, b, "alice", "s2").Version
	do(t, c, "PEXPIRE", PresenceKey("alice"), "5000")
	if !refresh(t, a, "alice", "s1", old) {
		t.Error("the zombie was not told")
	}
	if d := ttl(t, c, "alice"); d > 5*time.Second {
		t.Errorf("the zombie has extended it: %s", d)
	}
	if got := fields(t, c, "alice"); got["gateway_id"] != "gw-b" || got["session_id"] != "s2" {
		t.Errorf("the zombie has overwritten it: %v", got)
	}

	// Redis lost everything: the zombie is first, the live session puts it right.
	do(t, c, "FLUSHALL")
	if refresh(t, a, "alice", "s1", old) {
		t.Error("superseded by nothing")
	}
	if refresh(t, b, "alice", "s2", newer) {
		t.Error("superseded by an older one")
	}
	want := map[string]string{
		"gateway_id": "gw-b", "session_id": "s2", "connected_at": "1760000000000", "version": strconv.FormatInt(newer, 10),
	}
	if got := fields(t, c, "alice"); !maps.Equal(got, want) {
		t.Errorf("entry %v, want %v", got, want)
	}
	if d := ttl(t, c, "alice"); d <= presenceTTL-30*time.Second {
		t.Errorf("TTL %s", d)
	}
	if !refresh(t, a, "alice", "s1", old) {
		t.Error("the zombie was not told")
	}
	// The same version, but not the same session.
	if !refresh(t, a, "alice", "s2", newer) || !refresh(t, b, "alice", "s1", newer) {
		t.Error("somebody else's version was taken for one's own")
	}
}

// TestPresenceVersionRises even when Redis' clock went back.
func TestPresenceVersionRises(t *testing.T) {
	t.Parallel()
	a, _, c := two(t)
	future := time.Now().Add(24 * time.Hour).UnixMicro()
	do(t, c, "HSET", PresenceKey("alice"), "gateway_id", "gw-x", "session_id", "sx", "version", strconv.FormatInt(future, 10))
	if got := claim(t, a, "alice", "s1"); got.Version != future+1 || got.PrevGateway != "gw-x" {
		t.Errorf("claim %+v, want version %d", got, future+1)
	}
}

// TestPresenceOverForeignEntries: what others wrote keeps no user out, and spoils no other's answer.
func TestPresenceOverForeignEntries(t *testing.T) {
	t.Parallel()
	a, _, c := two(t)
	do(t, c, "HSET", PresenceKey("words"), "gateway_id", "gw-x", "session_id", "sx", "version", "new")
	do(t, c, "HSET", PresenceKey("half"), "gateway_id", "gw-x")
	do(t, c, "SET", PresenceKey("text"), "gw-x")
	if at, found := lookup(t, a, "words"); !found || at.GatewayID != "gw-x" || at.Version != 0 {
		t.Errorf("found %v at %+v", found, at)
	}
	entries := []Entry{{User: "words", Session: "1"}, {User: "text", Session: "2"}, {User: "half", Session: "3"}, {User: "new", Session: "4"}}
	for i, r := range a.Claim(t.Context(), entries) {
		if (r.Err != nil) != (entries[i].User == "text") {
			t.Errorf("%s: %v", entries[i].User, r.Err)
		}
		entries[i].Version = r.Version
	}
	for i, r := range a.Refresh(t.Context(), entries) {
		if (r.Err != nil) != (entries[i].User == "text") || r.Superseded {
			t.Errorf("%s: %+v", entries[i].User, r)
		}
	}
	for i, err := range a.Release(t.Context(), entries) {
		if (err != nil) != (entries[i].User == "text") {
			t.Errorf("%s: %v", entries[i].User, err)
		}
	}
	if _, _, err := a.Lookup(t.Context(), "text"); err == nil {
		t.Error("no error for a key of another type")
	}
}

// TestPresenceKeys: the id is in the key as it is.
func TestPresenceKeys(t *testing.T) {
	t.Parallel()
	a, _, c := two(t)
	for _, user := range []string{
		"a", "user 1", "a:b", "{tag}x", "}{", "über", "日本", `"quoted"`, `back\slash`, "100%s", "*", strings.Repeat("u", 128),
	} {
		version := claim(t, a, user, "s").Version
		if n, err := do(t, c, "EXISTS", "user_session:"+user).AsInt64(); err != nil || n != 1 {
			t.Errorf("%q: no such key", user)
		}
		if at, found := lookup(t, a, user); !found || at.Version != version {
			t.Errorf("%q: found %v at %+v", user, found, at)
		}
		release(t, a, user, "s")
		if n, err := do(t, c, "DBSIZE").AsInt64(); err != nil || n != 0 {
			t.Errorf("%q: %d keys left", user, n)
		}
	}
}

// TestPresenceChunks: more than a pipeline's worth, answers in the entries' order, results mixed.
func TestPresenceChunks(t *testing.T) {
	t.Parallel()
	s := startRedis(t, "")
	c := dialRedis(t, RedisOptions{Addrs: []string{s.addr()}})
	a, metrics := newPresence(t, c, "gw-a")
	b, _ := newPresence(t, c, "gw-b")
	const n = 3*presenceChunk + 7
	entries := make([]Entry, n)
	var theirs []Entry
	for i := range entries {
		entries[i] = Entry{User: fmt.Sprint("u", i), Session: fmt.Sprint("s", i), ConnectedAt: int64(i)}
		if i%3 == 0 {
			theirs = append(theirs, Entry{User: fmt.Sprint("u", i), Session: fmt.Sprint("old", i)})
		}
	}
	b.Claim(t.Context(), theirs)
	for i, r := range a.Claim(t.Context(), entries) {
		want := ""
		if i%3 == 0 {
			want = fmt.Sprint("old", i)
		}
		if r.Err != nil || r.PrevSession != want {
			t.Fatalf("claim %d: %+v", i, r)
		}
		entries[i].Version = r.Version
	}
	b.Claim(t.Context(), theirs)
	do(t, c, "SCRIPT", "FLUSH")
	for i, r := range a.Refresh(t.Context(), entries) {
		if r.Err != nil || r.Superseded != (i%3 == 0) {
			t.Fatalf("refresh %d: %+v", i, r)
		}
	}
	for i, err := range a.Release(t.Context(), entries) {
		if err != nil {
			t.Fatalf("release %d: %v", i, err)
		}
	}
	if left, err := do(t, c, "DBSIZE").AsInt64(); err != nil || left != int64(len(theirs)) {
		t.Errorf("%d entries left, want %d", left, len(theirs))
	}
	for result, want := range map[string]int{
		"replaced": len(theirs), "new": n - len(theirs), "superseded": len(theirs), "extended": n - len(theirs),
		"not_ours": len(theirs), "deleted": n - len(theirs), "written_again": 0, "error": 0,
	} {
		if got := metric(t, metrics, "im_gateway_presence_operations_total", "result", result); got != float64(want) {
			t.Errorf("%s: %v operations counted, want %d", result, got, want)
		}
	}
	if len(a.Claim(t.Context(), nil)) != 0 {
		t.Error("answers to nothing")
	}
}

// TestPresenceSurvives what may happen to Redis.
func TestPresenceSurvives(t *testing.T) {
	t.Parallel()
	s := startRedis(t, "")
	c := dialRedis(t, RedisOptions{Addrs: []string{s.addr()}})
	a, metrics := newPresence(t, c, "gw-a")
	version := claim(t, a, "alice", "s1").Version
	there := func(what string) {
		t.Helper()
		if at, found := lookup(t, a, "alice"); !found || at.Session != "s1" || at.Version != version {
			t.Errorf("after %s: found %v at %+v", what, found, at)
		}
	}
	do(t, c, "SCRIPT", "FLUSH")
	if refresh(t, a, "alice", "s1", version) {
		t.Error("superseded")
	}
	there("SCRIPT FLUSH")
	do(t, c, "FLUSHALL")
	if refresh(t, a, "alice", "s1", version) {
		t.Error("superseded")
	}
	there("FLUSHALL")

	s.stop()
	entries := []Entry{{User: "alice", Session: "s1", Version: version}, {User: "bob", Session: "s2", Version: 1}}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	began := time.Now()
	for i, r := range a.Refresh(ctx, entries) {
		if r.Err == nil || r.Superseded {
			t.Errorf("Redis away, entry %d: %+v", i, r)
		}
	}
	for i, r := range a.Claim(ctx, entries) {
		if r.Err == nil {
			t.Errorf("Redis away, entry %d: claimed", i)
		}
	}
	if _, _, err := a.Lookup(ctx, "alice"); err == nil {
		t.Error("looked up without Redis")
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("Redis away: it took %s", took)
	}
	if got := metric(t, metrics, "im_gateway_presence_operations_total", "result", "error"); got != 5 {
		t.Errorf("%v errors counted, want 5", got)
	}

	s.start() // empty, with no script
	eventually(t, "Redis answers", func() bool { return RedisReachable(t.Context(), c) == nil })
	if refresh(t, a, "alice", "s1", version) {
		t.Error("superseded")
	}
	there("a restart")
}

func TestPresenceContextEnded(t *testing.T) {
	t.Parallel()
	a, _, _ := two(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for i, r := range a.Claim(ctx, make([]Entry, 2*presenceChunk)) {
		if r.Err == nil {
			t.Fatalf("entry %d: no error", i)
		}
	}
}

func TestRedisPassword(t *testing.T) {
	t.Parallel()
	s := startRedis(t, "secret")
	for _, password := range []string{"", "wrong"} {
		c, err := DialRedis(RedisOptions{Addrs: []string{s.addr()}, Password: password})
		if err == nil {
			err = RedisReachable(t.Context(), c)
			c.Close()
		}
		if err == nil {
			t.Errorf("let in with password %q", password)
		} else if password != "" && strings.Contains(err.Error(), password) {
			t.Errorf("the error tells the password: %v", err)
		}
	}
	c := dialRedis(t, RedisOptions{Addrs: []string{s.addr()}, Password: "secret"})
	if err := RedisReachable(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	a, _ := newPresence(t, c, "gw-a")
	claim(t, a, "alice", "s1")
}

func TestRedisAway(t *testing.T) {
	t.Parallel()
	if _, err := DialRedis(RedisOptions{Addrs: []string{fmt.Sprintf("127.0.0.1:%d", freePort(t))}}); err == nil {
		t.Error("no error")
	}
}

func TestNewPresenceRefuses(t *testing.T) {
	t.Parallel()
	for _, o := range []PresenceOptions{
		{GatewayID: "g", TTL: time.Millisecond, Registerer: prometheus.NewRegistry()},
		{TTL: time.Minute, Registerer: prometheus.NewRegistry()},
		{GatewayID: "g", TTL: time.Minute},
	} {
		if _, err := NewPresence(o); err == nil {
			t.Errorf("%+v: no error", o)
		}
	}
}

// BenchmarkRefresh10000 is what one gateway with 300,000 users does each second.
func BenchmarkRefresh10000(b *testing.B) {
	s := startRedis(b, "")
	p, _ := newPresence(b, dialRedis(b, RedisOptions{Addrs: []string{s.addr()}}), "gw-a")
	entries := make([]Entry, 10_000)
	for i := range entries {
		entries[i] = Entry{User: fmt.Sprint("user-", i), Session: fmt.Sprint("session-", i)}
	}
	for i, r := range p.Claim(b.Context(), entries) {
		entries[i].Version = r.Version
	}
	b.ReportAllocs()
	for b.Loop() {
		for i, r := range p.Refresh(b.Context(), entries) {
			if r.Err != nil || r.Superseded {
				b.Fatalf("entry %d: %+v", i, r)
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/float64(len(entries)), "us/entry")
}

// TestLateClaimTakesNothingFromANewerSession: Redis was away when a session connected, and the user
// has connected elsewhere since.
func TestLateClaimTakesNothingFromANewerSession(t *testing.T) {
	a, b, c := two(t)
	ctx := t.Context()
	newer := b.Claim(ctx, []Entry{{User: "alice", Session: "s2", ConnectedAt: 2000}})[0]
	if newer.Err != nil {
		t.Fatal(newer.Err)
	}
	late := a.Claim(ctx, []Entry{{User: "alice", Session: "s1", ConnectedAt: 1000, Late: true}})[0]
	if late.Err != nil || !late.Superseded || late.PrevSession != "s2" {
		t.Errorf("late claim: %+v", late)
	}
	if f := fields(t, c, "alice"); f["session_id"] != "s2" || f["version"] != strconv.FormatInt(newer.Version, 10) {
		t.Errorf("entry %v", f)
	}
	for _, e := range []Entry{
		{User: "bob", Session: "s1", ConnectedAt: 1000, Late: true},   // nobody stands
		{User: "alice", Session: "s3", ConnectedAt: 3000, Late: true}, // an older one stands
		{User: "alice", Session: "s0", ConnectedAt: 500},              // not late: the newest connect wins
	} {
		if got := a.Claim(ctx, []Entry{e})[0]; got.Err != nil || got.Superseded || got.Version == 0 {
			t.Errorf("%+v: %+v", e, got)
		}
	}
}
