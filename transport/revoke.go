package transport

import (
	"hash/maphash"
	"math"
	"sync"
	"sync/atomic"

	"im-gateway/codec"
)

// Revocation: tokens that are denied though their signature is good. A Verifier asks the list at each
// check; when the list grows the loops look at the sessions that are open.

// Denial denies the token of one name (jti), or a user's tokens issued at a time or before.
type Denial struct {
	TokenID string
	User    string
	// IssuedUntil and Until, the end of the denial, are Unix seconds.
	IssuedUntil, Until int64
}

// Denials is the list of what is denied. It may be used from any goroutine.
type Denials struct {
	count   atomic.Int64  // entries: most lists are empty
	version atomic.Uint64 // of the list
	seed    maphash.Seed

	mu     sync.RWMutex
	tokens map[uint64]int64 // hash of the jti: until
	users  map[string]userDenial
}

type userDenial struct{ issued, until int64 }

// NewDenials returns an empty list.
func NewDenials() *Denials {
	d := &Denials{seed: maphash.MakeSeed()}
	d.reset()
	return d
}

func (d *Denials) reset() {
	d.tokens, d.users = map[uint64]int64{}, map[string]userDenial{}
}

// Add puts one more on the list.
func (d *Denials) Add(e Denial) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.add(e)
	d.changed()
}

// Replace makes the list this one. It must not run beside Add, whose entry might be lost.
func (d *Denials) Replace(list []Denial) {
	next := Denials{seed: d.seed} // made outside the lock, which the loops take
	next.reset()
	for _, e := range list {
		next.add(e)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.tokens, d.users = next.tokens, next.users
	d.changed()
}

func (d *Denials) add(e Denial) {
	switch {
	case e.TokenID != "":
		h := d.hash(e.TokenID)
		d.tokens[h] = max(d.tokens[h], e.Until)
	case e.User != "":
		// Of several entries of one user the latest issue and the latest end count.
		old := d.users[e.User]
		d.users[e.User] = userDenial{max(old.issued, e.IssuedUntil), max(old.until, e.Until)}
	}
}

func (d *Denials) changed() {
	d.count.Store(int64(len(d.tokens) + len(d.users)))
	d.version.Add(1)
}

// hash names a jti; 0: none.
func (d *Denials) hash(id string) uint64 {
	if id == "" {
		return 0
	}
	return maphash.String(d.seed, id) | 1
}

// denies tells whether a token is denied. now is Unix seconds.
func (d *Denials) denies(token uint64, user string, issued uint32, now int64) bool {
	if d == nil || d.count.Load() == 0 {
		return false
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	if token != 0 && d.tokens[token] > now {
		return true
	}
	u, ok := d.users[user]
	return ok && u.until > now && int64(issued) <= u.issued
}

// recheck looks at the list once more for a token that was checked off the loop: it may have grown since.
func (l *loop) recheck(who Identity, err error) (Identity, error) {
	if err == nil && l.s.denials.denies(who.tokenHash, who.User, seconds(who.IssuedAt), l.now/1000) {
		return Identity{}, ErrTokenRevoked
	}
	return who, err
}

// seconds cuts a time to what a connection keeps of it; 0 where there is none.
func seconds(unix int64) uint32 { return uint32(min(max(unix, 0), math.MaxUint32)) }

// Bounds of a look at the open sessions.
const (
	revokeStep  = 4096 // slots in one turn of a loop
	revokePause = 200  // ms between two looks
)

// revoker is a loop's look at its sessions, in steps.
type revoker struct {
	step    request
	version uint64 // of the list that the sessions were held against
	shard   int    // where the look has got to
	slot    int
	last    int64 // when the last one began, Unix ms
	busy    bool
}

// tickRevoked begins a look when the list has changed.
func (l *loop) tickRevoked() {
	d, r := l.s.denials, &l.revoker
	if d == nil || r.busy || l.now-r.last < revokePause {
		return
	}
	if v := d.version.Load(); v != r.version {
		r.version, r.shard, r.slot, r.last, r.busy = v, 0, 0, l.now, true
		l.revokeSome()
	}
}

// revokeSome looks at the next sessions and asks for the next turn where there are more.
func (l *loop) revokeSome() {
	r := &l.revoker
	left := revokeStep
	for ; r.shard < len(l.shards); r.shard, r.slot = r.shard+1, 0 {
		slots := l.shards[r.shard].slots
		for ; r.slot < len(slots); r.slot++ {
			if left == 0 {
				r.step.request(l)
				return
			}
			left--
			if cn := slots[r.slot].conn; cn != nil && l.s.denials.denies(cn.token, cn.user, cn.issued, l.now/1000) {
				l.s.metrics.revoked.Inc()
				l.guard(cn, func() { l.fail(cn, codec.CloseKicked, reasonRevoked) })
			}
		}
	}
	r.busy = false
}
