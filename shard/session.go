package shard

import "im-gateway/codec"

// state is where a session stands.
type state uint8

const (
	free     state = iota
	claiming       // presence is being claimed; frames are held until `connected` has gone out
	live
	closing // a close was commanded; the loop's EventClose ends it
)

// ref names a session inside its shard: loop and slot.
type ref uint32

const (
	noRef     ref = 1<<32 - 1
	indexMask     = codec.MaxIndex
	pageBits      = 10
	pageSize      = 1 << pageBits
)

func refOf(id codec.SessionID) ref { return ref(id.Loop())<<24 | ref(id.Index()) }

// session is one connected session. It is kept small: there may be a million of them. What a message
// needs stands together, in the first 40 bytes.
type session struct {
	id         codec.SessionID
	pending    int32           // bytes of frames that the kernel has not taken yet
	in, out    uint32          // client messages, frames
	inFlight   uint16          // upstream messages without a result
	closeCode  codec.CloseCode // commanded, while closing
	state      state
	presence   bool // an operation of the session's own is under way
	superseded bool // the presence entry belongs to a newer session: not to be released
	backlogged bool // it has an entry in backlogs
	online     bool // user.online was sent
	protocol   codec.Protocol
	slot       uint16  // wheel slot + 1; 0: in none
	account    account // of the user, in the first of the user's sessions

	next        ref    // the user's next session
	acks        bool   // the client acknowledges deliveries
	elsewhere   bool   // the user has sessions on other gateways too
	device      bool   // it has an entry in devices
	pinged      uint32 // tick of the last ping
	refreshed   uint32 // tick of the last presence refresh
	expiresAt   int64  // of the token, Unix ms
	version     int64  // of the presence entry; 0: not claimed yet
	connectedAt int64  // Unix ms
	user        string
}

// device is what a client has said of its device.
type device struct{ id, kind string }

// deviceOf returns the session's device; the zero value where none was named.
func (s *shard) deviceOf(ses *session) device {
	if !ses.device {
		return device{}
	}
	return s.devices[refOf(ses.id)]
}

// table is the sessions of one loop, found by slot, in pages that never move.
type table struct {
	pages []*[pageSize]session
}

func (t *table) at(index uint32) *session {
	page := int(index >> pageBits)
	if page >= len(t.pages) || t.pages[page] == nil {
		return nil
	}
	return &t.pages[page][index&(pageSize-1)]
}

func (t *table) grow(index uint32) *session {
	page := int(index >> pageBits)
	for page >= len(t.pages) {
		t.pages = append(t.pages, nil)
	}
	if t.pages[page] == nil {
		t.pages[page] = new([pageSize]session)
	}
	return &t.pages[page][index&(pageSize-1)]
}

// lookup returns the session named by id, or nil when it has ended.
func (s *shard) lookup(id codec.SessionID) *session {
	ses := s.tables[id.Loop()].at(id.Index())
	if ses == nil || ses.id != id || ses.state == free {
		return nil
	}
	return ses
}

// touch reads a session before the batch that names it is handled. A batch's touches do not depend on
// each other, so that the processor waits for many of them at once, not for one after the other.
func (s *shard) touch(id codec.SessionID) {
	if ses := s.lookup(id); ses != nil {
		s.touched += uint32(ses.account) | 1 // the account may lie in the next line of the cache
	}
}

func (s *shard) byRef(r ref) *session { return s.tables[r>>24].at(uint32(r) & indexMask) }

// link makes ses the user's first session and returns the others' first.
func (s *shard) link(ses *session) (others ref) {
	others, had := s.users[ses.user]
	if !had {
		others = noRef
	}
	ses.next = others
	s.users[ses.user] = refOf(ses.id)
	s.openAccount(ses, others)
	return others
}

// unlink takes ses out of its user's list, if it is in it.
func (s *shard) unlink(ses *session) {
	me := refOf(ses.id)
	first, ok := s.users[ses.user]
	if !ok {
		return
	}
	if first == me {
		s.keepAccount(ses, ses.next)
		if ses.next == noRef {
			delete(s.users, ses.user)
		} else {
			s.users[ses.user] = ses.next
		}
		return
	}
	for r := first; r != noRef; {
		prev := s.byRef(r)
		if prev.next == me {
			prev.next = ses.next
			return
		}
		r = prev.next
	}
}

// userSessions calls f for each session of the user that is not closing.
func (s *shard) userSessions(user string, f func(*session)) {
	r, ok := s.users[user]
	for ok && r != noRef {
		ses := s.byRef(r)
		r = ses.next
		f(ses)
	}
}

// each calls f for every session of the shard, closing ones too.
func (s *shard) each(f func(*session)) {
	for i := range s.tables {
		for _, page := range s.tables[i].pages {
			if page == nil {
				continue
			}
			for j := range page {
				if page[j].state != free {
					f(&page[j])
				}
			}
		}
	}
}
