package shard

import "im-gateway/codec"

// userNote is a user.online or user.offline that has not been handed on yet.
type userNote struct {
	online  bool
	user    string
	session codec.SessionID
	reason  string
	at      int64 // Unix ms
}

func (s *shard) note(online bool, ses *session, reason string) {
	s.notes = append(s.notes, userNote{online, ses.user, ses.id, reason, s.now})
}

// goOnline says that the user is online by this session.
func (s *shard) goOnline(ses *session) {
	ses.online = true
	s.note(true, ses, "connected")
}

// maxKeptNotes keeps the memory of a storm of connects from staying.
const maxKeptNotes = 4096

func (s *shard) flushNotes() {
	notes := s.notes
	if s.notes = notes[:0]; cap(notes) > maxKeptNotes {
		s.notes = nil
	}
	s.forEach(len(notes), func(i int) {
		n := &notes[i]
		s.opts.Events.UserEvent(n.online, n.user, n.session, n.reason, n.at)
	}, nil)
	clear(notes)
}
