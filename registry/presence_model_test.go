package registry

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

// TestPresenceModel runs random operations of two gateways on one user, losses of the data among
// them, against a model: the highest version wins, and nothing stale overwrites or deletes.
func TestPresenceModel(t *testing.T) {
	t.Parallel()
	a, b, c := two(t)
	gateways := map[string]*Presence{"gw-a": a, "gw-b": b}
	names := slices.Sorted(maps.Keys(gateways))
	type session struct {
		gateway, id string
		version     int64
	}
	for seed := range uint64(40) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		user := fmt.Sprint("u", seed)
		var sessions []session // all that ever claimed
		var stored *session
		var highest int64
		for step := range 60 {
			at := fmt.Sprintf("seed %d, step %d", seed, step)
			var s *session
			if len(sessions) > 0 {
				s = &sessions[rnd.IntN(len(sessions))]
			}
			switch op := rnd.IntN(10); {
			case op < 2 || s == nil:
				n := session{gateway: names[rnd.IntN(2)], id: fmt.Sprint("s", step)}
				got := claim(t, gateways[n.gateway], user, n.id)
				if n.version = got.Version; n.version <= highest {
					t.Fatalf("%s: version %d, not above %d", at, n.version, highest)
				}
				highest = n.version
				var prev session
				if stored != nil {
					prev = *stored
				}
				if got.PrevGateway != prev.gateway || got.PrevSession != prev.id {
					t.Fatalf("%s: previous %+v, want %+v", at, got, prev)
				}
				sessions = append(sessions, n)
				stored = &n
			case op < 7:
				superseded := refresh(t, gateways[s.gateway], user, s.id, s.version)
				if want := stored != nil && stored.version > s.version; superseded != want {
					t.Fatalf("%s: superseded %v, want %v", at, superseded, want)
				}
				if !superseded {
					kept := *s
					stored = &kept
				}
			case op < 9:
				release(t, gateways[s.gateway], user, s.id)
				if stored != nil && stored.id == s.id {
					stored = nil
				}
			default:
				do(t, c, "DEL", PresenceKey(user)) // lost
				stored = nil
			}
			got, found := lookup(t, a, user)
			if found != (stored != nil) || found && (got.GatewayID != stored.gateway || got.Session != stored.id || got.Version != stored.version) {
				t.Fatalf("%s: found %v at %+v, want %+v", at, found, got, stored)
			}
		}
	}
}

// TestPresenceConverges: two gateways claim the same users at once. Whatever the order, versions are
// all different, one session per user is left, the highest, and only it survives a refresh.
func TestPresenceConverges(t *testing.T) {
	t.Parallel()
	const users, claims = 20, 8
	a, b, c := two(t)
	var mu sync.Mutex
	held := map[string][]Entry{} // by user
	gateway := map[string]*Presence{}
	var all sync.WaitGroup
	for n := range claims {
		p, name := a, "a"
		if n%2 == 1 {
			p, name = b, "b"
		}
		all.Go(func() {
			entries := make([]Entry, users)
			for i := range entries {
				entries[i] = Entry{User: fmt.Sprint("u", i), Session: fmt.Sprint(name, n)}
			}
			rand.Shuffle(users, func(i, j int) { entries[i], entries[j] = entries[j], entries[i] })
			for i, r := range p.Claim(context.Background(), entries) {
				if r.Err != nil {
					t.Error(r.Err)
				}
				entries[i].Version = r.Version
			}
			p.Refresh(context.Background(), entries)
			mu.Lock()
			defer mu.Unlock()
			gateway[fmt.Sprint(name, n)] = p
			for _, e := range entries {
				held[e.User] = append(held[e.User], e)
			}
		})
	}
	all.Wait()
	for user, entries := range held {
		slices.SortFunc(entries, func(x, y Entry) int { return int(x.Version - y.Version) })
		last := entries[len(entries)-1]
		for i, e := range entries {
			if i > 0 && e.Version == entries[i-1].Version {
				t.Errorf("%s: version %d twice", user, e.Version)
			}
			if superseded := refresh(t, gateway[e.Session], user, e.Session, e.Version); superseded != (e != last) {
				t.Errorf("%s: %s superseded %v", user, e.Session, superseded)
			}
			if e != last {
				release(t, gateway[e.Session], user, e.Session)
			}
		}
		if got := fields(t, c, user); got["session_id"] != last.Session {
			t.Errorf("%s: entry %v, want session %s", user, got, last.Session)
		}
	}
}
