package shard

import (
	"time"

	"im-gateway/codec"
)

// flight is the records in flight whose deadline has not passed, oldest first. All deadlines are
// equally long, so the order of acceptance is the order of deadlines.
type flight struct {
	first, last *codec.Upstream
	n           int
}

func (f *flight) add(u *codec.Upstream) {
	u.Prev, u.Next = f.last, nil
	if f.last == nil {
		f.first = u
	} else {
		f.last.Next = u
	}
	f.last = u
	f.n++
}

func (f *flight) remove(u *codec.Upstream) {
	if u.Prev == nil {
		f.first = u.Next
	} else {
		u.Prev.Next = u.Next
	}
	if u.Next == nil {
		f.last = u.Prev
	} else {
		u.Next.Prev = u.Prev
	}
	u.Prev, u.Next = nil, nil
	f.n--
}

// onMessage accepts or refuses a client's message: of its connection, or posted for its session.
func (s *shard) onMessage(u *codec.Upstream) {
	ses := s.lookup(u.Session)
	if ses == nil || ses.state == closing {
		s.metrics.orphanMessages.Inc()
		s.reply(u, codec.UpstreamResult{Code: codec.SessionNotFound})
		s.done(u, codec.SessionNotFound)
		return
	}
	ses.in++
	if s.meter != nil {
		s.meter.sent(u)
	}
	hookMessage(u)
	switch rate, retry := s.spend(ses, u); rate {
	case beyondRate:
		s.metrics.userRate.Inc()
		s.refuse(ses, u, codec.RateLimited, retry)
		s.done(u, codec.RateLimited)
		return
	case farBeyond:
		s.metrics.userFlood.Inc()
		s.metrics.refuse(codec.RateLimited)
		s.reply(u, codec.UpstreamResult{Code: codec.RateLimited})
		s.close(ses, codec.ClosePolicy, "too many messages")
		s.done(u, codec.RateLimited)
		return
	case withinRate:
	}
	again := s.recent.find(u, s.now)
	if again != nil && again.flight == nil {
		s.answerAgain(ses, u, again)
		return
	}
	code, retry := codec.Overloaded, int32(0)
	if int(ses.inFlight) < s.rules.MaxSessionInFlight {
		if again != nil {
			s.answerAgain(ses, u, again)
			return
		}
		code, retry = s.admit(u)
	} else {
		s.metrics.unacked.Inc()
	}
	if code != codec.OK {
		s.refuse(ses, u, code, retry)
		s.done(u, code)
		return
	}
	ses.inFlight++
	s.accept(u)
}

func (s *shard) accept(u *codec.Upstream) {
	u.Deadline = s.now + s.opts.AckDeadline.Milliseconds()
	s.flight.add(u)
	ofUser, ofNode := s.recent.add(u, s.now)
	s.counts.recentUser += ofUser
	s.counts.recentNode += ofNode
	s.counts.accepted++
	s.counts.inFlight++
	s.up.Records = append(s.up.Records, u)
	hookAccepted(s, u)
}

// refuse answers with an error: under the message's name, where it has one.
func (s *shard) refuse(ses *session, u *codec.Upstream, code codec.Code, retryAfterMS int32) {
	s.metrics.refuse(code)
	if s.reply(u, codec.UpstreamResult{Code: code, RetryAfterMS: retryAfterMS}) {
		return
	}
	b := s.box(ses)
	start := len(b.Arena)
	content := codec.Content{Type: codec.FrameError}
	if len(u.ClientMsgID) > 0 {
		content = codec.AckOf(code)
		b.Arena = ses.protocol.AppendAckError(b.Arena, u.ClientMsgID, u.Temp, code, retryAfterMS, s.now)
	} else {
		b.Arena = ses.protocol.AppendError(b.Arena, code, refusalText(code), s.now)
	}
	s.send(ses, b.Arena[start:len(b.Arena):len(b.Arena)], content, codec.Delivery{})
}

func refusalText(code codec.Code) string {
	switch code {
	case codec.Overloaded:
		return "too much is under way; the message was not stored, send it again later"
	case codec.RateLimited:
		return "too many messages; the message was not stored"
	case codec.BrokerUnavailable:
		return "the message store is not available; the message was not stored"
	case codec.OutcomeUnknown:
		return "no answer from the message store; the message may or may not be stored"
	case codec.MessageTooLarge:
		return "the message is too large for the message store"
	default:
		return "the message was not stored"
	}
}

// admit asks the broker for room, unless the gateway is about to close its sessions.
func (s *shard) admit(u *codec.Upstream) (code codec.Code, retryAfterMS int32) {
	if s.drain.refuse || s.nodeFull() {
		return codec.Overloaded, reconnectDelay
	}
	return s.opts.Publisher.Admit(u.Size())
}

// onPublish accepts or refuses a message of the HTTP API.
func (s *shard) onPublish(u *codec.Upstream) {
	s.current = 0
	if s.meter != nil {
		s.meter.sent(u)
	}
	if again := s.recent.find(u, s.now); again != nil {
		s.answerAgain(nil, u, again)
		return
	}
	code, retry := codec.RateLimited, s.spendWithout(u)
	if retry == 0 {
		code, retry = s.admit(u)
	} else {
		s.metrics.userRate.Inc()
	}
	if code != codec.OK {
		s.metrics.refuse(code)
		s.reply(u, codec.UpstreamResult{Code: code, RetryAfterMS: retry})
		s.done(u, code)
		return
	}
	s.accept(u)
}

// onResults answers the clients; now is when the batch was taken.
func (s *shard) onResults(b *codec.UpstreamBatch, now time.Time) {
	for _, u := range b.Records {
		s.touch(u.Session)
	}
	at := now.UnixNano()
	s.forEach(len(b.Records), func(i int) {
		u := b.Records[i]
		s.current = u.Session
		s.recent.settled(u)
		s.counts.inFlight--
		if u.Result.Code == codec.OK {
			s.counts.stored++
			if u.Received != 0 {
				s.ackTime.Observe(at - u.Received)
			}
			if u.Unknown {
				s.counts.late++
			}
		} else if c := s.metrics.failed[u.Result.Code]; c != nil {
			c.Inc()
		}
		s.answer(u)
		for again := u.Same; again != nil; {
			next := again.Same
			again.Result, again.MessageID = u.Result, append(again.MessageID[:0], u.MessageID...)
			s.current = again.Session
			s.answer(again)
			s.done(again, again.Result.Code)
			again = next
		}
		s.done(u, u.Result.Code)
	}, nil)
	clear(b.Records)
}

// done gives a record back whose fate is known; that of a traced one is told.
func (s *shard) done(u *codec.Upstream, code codec.Code) {
	if u.Span != nil && s.opts.Traced != nil {
		u.Result.Code = code
		s.opts.Traced(u)
	}
	u.Release()
}

// answer tells the sender of a record its result.
func (s *shard) answer(u *codec.Upstream) {
	if !u.Unknown {
		s.flight.remove(u)
	}
	ses := s.lookup(u.Session)
	if ses != nil {
		ses.inFlight--
	}
	switch {
	case u.Reply != nil:
		s.reply(u, u.Result)
		return
	case ses == nil:
		if u.Session != 0 {
			s.metrics.orphanResults.Inc()
		}
		return
	case ses.state == closing:
		return
	}
	if u.Result.Code != codec.OK {
		if !u.Unknown || u.Result.Code != codec.OutcomeUnknown { // it was said already
			s.refuse(ses, u, u.Result.Code, u.Result.RetryAfterMS)
		}
		return
	}
	s.acknowledge(ses, u)
}

// acknowledge tells a session that its message is stored, where that has a name, or who has posted it.
func (s *shard) acknowledge(ses *session, u *codec.Upstream) {
	if u.Reply != nil {
		s.reply(u, u.Result)
		return
	}
	if len(u.ClientMsgID) == 0 {
		return
	}
	out := s.box(ses)
	start := len(out.Arena)
	out.Arena = ses.protocol.AppendAck(out.Arena, u, s.opts.Topic, s.now)
	s.send(ses, out.Arena[start:len(out.Arena):len(out.Arena)], codec.AckOf(codec.OK), codec.Delivery{})
}

// reply answers the HTTP request that waits for a record, once; false: there is none. What is known later
// goes to the session that the message was posted for, if any.
func (s *shard) reply(u *codec.Upstream, r codec.UpstreamResult) bool {
	if u.Reply == nil {
		return false
	}
	r.MessageID = string(u.MessageID)
	u.Reply <- r // capacity 1
	u.Reply = nil
	return true
}

// expireFlight tells the clients of records whose deadline has passed that their outcome is not
// known; the result, when it comes, is sent all the same. It looks at tickWork records at the most
// and returns false when there are more.
func (s *shard) expireFlight() bool {
	work := 0
	for u := s.flight.first; u != nil && u.Deadline <= s.now; u = s.flight.first {
		if work++; work > tickWork {
			return false
		}
		s.current = u.Session
		s.flight.remove(u)
		u.Unknown = true
		s.metrics.unknown.Inc()
		if s.reply(u, codec.UpstreamResult{Code: codec.OutcomeUnknown, Offset: -1}) {
			continue
		}
		if ses := s.lookup(u.Session); ses != nil && ses.state != closing {
			s.refuse(ses, u, codec.OutcomeUnknown, 0)
		}
	}
	return true
}
