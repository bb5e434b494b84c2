package shard

import (
	"time"

	"im-gateway/codec"
)

// burst is for how long a user's rate may be made use of at once, in ns.
const burst = 2 * int64(time.Second)

// sweepWork is how many of the accounts of users without a session are looked at in a tick.
const sweepWork = 256

// account is when what a user has sent will be paid for, Unix ns (GCRA, the leaky bucket as a meter). It
// stands in the user's first session, or in accounts while there is none and something is not paid for
// yet: to connect again makes nobody rich.
type account int64

// userRate is what messages cost, in ns of the time that they use up: the larger of their share in
// messages and in bytes.
type userRate struct {
	message float64 // each
	byte    float64 // each, of their records
}

func newUserRate(messages, bytes int) (r userRate) {
	if messages > 0 {
		r.message = float64(time.Second) / float64(messages)
	}
	if bytes > 0 {
		r.byte = float64(time.Second) / float64(bytes)
	}
	return r
}

// cost is what a record costs its user, in ns.
func (r *userRate) cost(u *codec.Upstream) int64 {
	return int64(max(r.message, float64(len(u.Value))*r.byte))
}

// verdict is what becomes of a message.
type verdict uint8

const (
	withinRate verdict = iota
	beyondRate         // refused
	farBeyond          // the user goes on regardless: the session is closed
)

// spend charges the session's user for a message; retryAfterMS says when the user will be within the
// limits again. What is refused is charged too, so that who slows down is heard again and who does not
// goes too far.
func (s *shard) spend(ses *session, u *codec.Upstream) (_ verdict, retryAfterMS int32) {
	cost := s.rules.rate.cost(u)
	if cost == 0 {
		return withinRate, 0
	}
	if s.opts.MaxSessions > 1 { // else it is the first
		if r, ok := s.users[ses.user]; ok {
			ses = s.byRef(r)
		}
	}
	at := s.now * int64(time.Millisecond)
	paid := max(int64(ses.account), at)
	debt := paid - at + cost
	switch {
	case debt > 2*burst && paid > at+burst:
		return farBeyond, 0
	case debt > burst && paid > at: // a message by itself is never too much
		ses.account = account(paid + cost)
		return beyondRate, retryAfter(debt + cost)
	}
	ses.account = account(paid + cost)
	return withinRate, 0
}

// spendWithout charges the user of a message of the HTTP API. What is refused is not charged: the user
// may have sessions that do no wrong. retryAfterMS 0: it is not refused.
func (s *shard) spendWithout(u *codec.Upstream) (retryAfterMS int32) {
	cost := s.rules.rate.cost(u)
	if cost == 0 {
		return 0
	}
	at := s.now * int64(time.Millisecond)
	r, online := s.users[u.User]
	had := s.accounts[u.User]
	if online {
		had = s.byRef(r).account
	}
	paid := max(int64(had), at)
	if debt := paid - at + cost; debt > burst && paid > at {
		return retryAfter(debt)
	}
	if online {
		s.byRef(r).account = account(paid + cost)
	} else {
		s.accounts[u.User] = account(paid + cost)
	}
	return 0
}

// retryAfter is when so much debt will be within the burst, in ms.
func retryAfter(debt int64) int32 {
	return int32(max(1, (debt-burst+int64(time.Millisecond)-1)/int64(time.Millisecond)))
}

// openAccount finds the account of a user for the session that has become the user's first, before which
// older was.
func (s *shard) openAccount(ses *session, older ref) {
	if older != noRef {
		ses.account = s.byRef(older).account
		return
	}
	if len(s.accounts) > 0 {
		ses.account = s.accounts[ses.user]
		delete(s.accounts, ses.user)
	}
}

// keepAccount keeps the account of a user whose first session goes, and has next behind it.
func (s *shard) keepAccount(ses *session, next ref) {
	if next != noRef {
		s.byRef(next).account = ses.account
		return
	}
	if int64(ses.account) > s.now*int64(time.Millisecond) {
		s.accounts[ses.user] = ses.account
	}
}

// sweepAccounts drops what is paid for: some at each tick, from a random one on.
func (s *shard) sweepAccounts() {
	n := 0
	for user, a := range s.accounts {
		if int64(a) <= s.now*int64(time.Millisecond) {
			delete(s.accounts, user)
		}
		if n++; n == sweepWork {
			return
		}
	}
}
