package transport

import (
	"context"
	"errors"

	"im-gateway/codec"
)

// Posted is what became of a message that came by HTTP for a session.
type Posted struct {
	Result    codec.UpstreamResult
	Message   string // says more about a refusal; may be empty
	ExpiresAt int64  // refresh-token: of the session's new token, Unix ms
}

// ErrStopped is in the error of a Post that the event loops did not live to answer: the message may have
// been taken.
var ErrStopped = errors.New("the event loops have ended")

// Post does with a message of a user's, frame and what was read of it, what is done where it comes on the
// connection of that user's session of this name: within the limits of the connection and of the session, in
// the order of both. It returns once the answer is known that would be sent there, or with the error of ctx.
// m and frame are Post's to keep. Any goroutine may call it.
func (s *Server) Post(ctx context.Context, user, session string, frame []byte, m *codec.ClientMessage) (Posted, error) {
	notFound := Posted{Result: codec.UpstreamResult{Code: codec.SessionNotFound}}
	id, ok := codec.ParseSessionName(session, s.opts.Nonce)
	if !ok || id.Loop() >= len(s.loops) || id.Shard() >= len(s.loops[id.Loop()].shards) {
		return notFound, nil
	}
	p := post{m: m, bytes: len(frame), reply: make(chan codec.UpstreamResult, 1)}
	if string(m.Type) == codec.TypeRefreshToken {
		p.who, p.err = s.identify(m.Token)
	}
	l := s.loops[id.Loop()]
	took := make(chan *Posted, 1)
	if !l.execute(func() {
		done := &notFound
		if cn := l.lookup(id); cn != nil && cn.user == user && cn.state == stateOpen {
			done = &Posted{Result: codec.UpstreamResult{Code: codec.OutcomeUnknown}} // of a panic
			l.guard(cn, func() { done = cn.post(&p) })
		}
		took <- done
	}) {
		return notFound, nil
	}
	for {
		select {
		case done := <-took:
			if done != nil {
				return *done, nil
			}
		case r := <-p.reply:
			return Posted{Result: r}, nil
		case <-s.done:
			return Posted{}, ErrStopped
		case <-ctx.Done():
			return Posted{}, context.Cause(ctx)
		}
	}
}

// post is a message that came by HTTP for a session, on its way to the session's loop.
type post struct {
	m     *codec.ClientMessage
	bytes int
	who   Identity // refresh-token: whose the token is
	err   error
	reply chan codec.UpstreamResult
}

// post handles such a message as message does one of the connection's own; nil: its shard answers.
func (cn *conn) post(p *post) *Posted {
	l := cn.l
	refuse := func(code codec.Code, text string, retryMS int32) *Posted {
		l.s.metrics.refuse(code)
		return &Posted{Result: codec.UpstreamResult{Code: code, RetryAfterMS: retryMS}, Message: text}
	}
	what := receivedAs(p.m.Type)
	l.counts.receive(what, p.bytes)
	switch cn.spend(1, p.bytes) {
	case farBeyond:
		l.fail(cn, codec.ClosePolicy, reasonFlood)
		return refuse(codec.RateLimited, "too many messages; the session is closed", 0)
	case beyondRate:
		return refuse(codec.RateLimited, "too many messages; the message was not stored", cn.retryAfterMS(p.bytes))
	case withinRate:
	}
	hookFrame(p.m)
	done := &Posted{}
	switch what {
	case receivedPing:
		cn.reply(codec.Content{Type: codec.FramePong}, cn.protocol.AppendPong(l.scratch[:0], l.now))
		cn.flushReplies()
	case receivedRefreshToken:
		if refusal := cn.renew(l.recheck(p.who, p.err)); refusal != "" {
			return refuse(codec.AuthFailed, refusal, 0)
		}
		done.ExpiresAt = p.who.ExpiresAt
	case receivedDeliveryAck:
		l.acked(cn, p.m.DeliveryID)
	default:
		if refusal, retryMS := cn.upstream(p.m, p.reply); refusal != "" {
			return refuse(codec.Overloaded, refusal, retryMS)
		}
		return nil
	}
	return done
}
