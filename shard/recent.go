package shard

import (
	"hash/maphash"
	"math/bits"

	"im-gateway/codec"
)

// Bounds of what is remembered of messages that were accepted, so that a retry gets the first one's
// ack, and not a second record.
const (
	recentPerUser = 32     // names of one user
	recentFor     = 60_000 // ms
)

// recentKey names a message of a user: 128 bits of two hashes that nobody outside can predict.
type recentKey struct{ a, b uint64 }

// recentEntry is one remembered message.
type recentEntry struct {
	key       recentKey
	user      uint64          // hash; two users that share one share their quota
	flight    *codec.Upstream // not answered yet; nil: stored, as below
	at        int64           // Unix ms when it was accepted
	offset    int64
	partition int32
	next      uint32 // the user's next entry: slot + 1
	messageID [codec.MessageIDLen]byte
}

// recentUser is a user's entries, oldest first.
type recentUser struct {
	first, last uint32 // slot + 1
	n           uint8
}

// recent is the messages that a shard has accepted lately: a ring, the oldest first, with an index by
// message and one by user. A message is forgotten when it is recentFor old, when its user has
// recentPerUser later ones, and when the ring is full.
type recent struct {
	seeds [2]maphash.Seed
	max   int // entries; 0: nothing is remembered
	ring  []recentEntry
	next  int // the slot to be used next, once the ring is full
	index map[recentKey]uint32
	users map[uint64]recentUser
}

func newRecent(entries int) recent {
	return recent{
		seeds: [2]maphash.Seed{maphash.MakeSeed(), maphash.MakeSeed()}, max: entries,
		index: map[recentKey]uint32{}, users: map[uint64]recentUser{},
	}
}

func (r *recent) keyOf(u *codec.Upstream) (key recentKey, user uint64) {
	user = maphash.String(r.seeds[0], u.User)
	key.a = maphash.Bytes(r.seeds[0], u.ClientMsgID) ^ bits.RotateLeft64(user, 29)
	key.b = maphash.Bytes(r.seeds[1], u.ClientMsgID) ^ bits.RotateLeft64(maphash.String(r.seeds[1], u.User), 29)
	return key, user
}

// find returns what is remembered of the user's message of that name, or nil.
func (r *recent) find(u *codec.Upstream, now int64) *recentEntry {
	if len(u.ClientMsgID) == 0 || len(r.index) == 0 {
		return nil
	}
	key, _ := r.keyOf(u)
	slot, ok := r.index[key]
	if !ok {
		return nil
	}
	e := &r.ring[slot]
	if e.flight == nil && now-e.at > recentFor {
		return nil
	}
	return e
}

// add remembers a message that is in flight now, and returns how many it pushed out before their time:
// of the user's own, and because the ring is full.
func (r *recent) add(u *codec.Upstream, now int64) (ofUser, ofNode int) {
	if len(u.ClientMsgID) == 0 || r.max == 0 {
		return 0, 0
	}
	key, user := r.keyOf(u)
	if slot, ok := r.index[key]; ok { // an expired one
		r.ring[slot].forgotten(r, key)
	}
	var slot int
	if len(r.ring) < r.max {
		slot = len(r.ring)
		r.ring = append(r.ring, recentEntry{})
	} else {
		slot = r.next
		r.next = (r.next + 1) % r.max
		if r.drop(slot, now) {
			ofNode = 1
		}
	}
	list := r.users[user]
	if list.n == recentPerUser {
		if r.drop(int(list.first-1), now) {
			ofUser = 1
		}
		list = r.users[user]
	}
	r.ring[slot] = recentEntry{key: key, user: user, flight: u, at: now}
	r.index[key] = uint32(slot)
	u.Recent = uint32(slot) + 1
	if list.n == 0 {
		list.first = uint32(slot) + 1
	} else {
		r.ring[list.last-1].next = uint32(slot) + 1
	}
	list.last = uint32(slot) + 1
	list.n++
	r.users[user] = list
	return ofUser, ofNode
}

// forgotten takes the entry out of the index only: its place among the user's is given up in turn.
func (e *recentEntry) forgotten(r *recent, key recentKey) {
	delete(r.index, key)
	e.flight, e.at = nil, 0
}

// drop gives up the entry in a slot, which is its user's oldest, and tells whether it was still of use.
func (r *recent) drop(slot int, now int64) (early bool) {
	e := &r.ring[slot]
	list := r.users[e.user]
	if list.n == 0 || list.first != uint32(slot)+1 {
		return false // given up before, as the oldest of too many
	}
	list.first = e.next
	if list.n--; list.n == 0 {
		delete(r.users, e.user)
	} else {
		r.users[e.user] = list
	}
	if at, ok := r.index[e.key]; ok && at == uint32(slot) {
		delete(r.index, e.key)
		early = e.flight != nil || now-e.at <= recentFor
	}
	*e = recentEntry{}
	return early
}

// settled notes the result of a message: one that is not known to be stored is forgotten, so that it
// can be sent again.
func (r *recent) settled(u *codec.Upstream) {
	if u.Recent == 0 {
		return
	}
	e := &r.ring[u.Recent-1]
	if e.flight != u {
		return // pushed out
	}
	if u.Result.Code != codec.OK {
		e.forgotten(r, e.key)
		return
	}
	e.flight = nil
	e.partition, e.offset = u.Result.Partition, u.Result.Offset
	copy(e.messageID[:], u.MessageID)
}

// answerAgain gives a retry the first one's ack, or lets it wait for it. Without a session it was posted.
func (s *shard) answerAgain(ses *session, u *codec.Upstream, e *recentEntry) {
	s.metrics.retries.Inc()
	if e.flight != nil {
		if ses != nil {
			ses.inFlight++
		}
		u.Deadline = s.now + s.opts.AckDeadline.Milliseconds()
		u.Shrink()
		u.Same, e.flight.Same = e.flight.Same, u
		s.flight.add(u)
		return
	}
	u.Result = codec.UpstreamResult{Partition: e.partition, Offset: e.offset}
	u.MessageID = append(u.MessageID[:0], e.messageID[:]...)
	s.acknowledge(ses, u)
	s.done(u, codec.OK)
}
