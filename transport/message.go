package transport

import (
	"github.com/gobwas/ws"

	"im-gateway/codec"
)

// The fixed names of why a connection ended: close reasons, log fields and events alike.
const (
	reasonPeer       = "closed by client"
	reasonLost       = "connection lost"
	reasonProtocol   = "protocol error"
	reasonDeflate    = "compressed data is not valid"
	reasonUTF8       = "text is not valid UTF-8"
	reasonTooBig     = "message too large"
	reasonBinary     = "im.json.v1 takes text frames only"
	reasonText       = "im.proto.v1 takes binary frames only"
	reasonSlow       = "too much is waiting to be read"
	reasonSilent     = "heartbeat missed"
	reasonInternal   = "internal error"
	reasonFlood      = "too many messages"
	reasonFragments  = "message in too many pieces"
	reasonUnfinished = "message took too long"
	reasonRevoked    = "token revoked"
	reasonAuth       = "token refused"
)

// message handles one whole message; payload is the loop's until this returns.
func (cn *conn) message(op ws.OpCode, payload []byte) {
	l := cn.l
	if l.s.opts.Echo {
		l.counts.receive(receivedOther, len(payload))
		l.counts.send(codec.Content{}, len(payload))
		if l.deflater != nil {
			l.deflater.begin()
		}
		l.replies = cn.appendMessage(l.replies, op, payload)
		if len(l.replies) > maxKeptScratch {
			cn.flushReplies()
		}
		return
	}
	rate := cn.spend(1, len(payload))
	if rate == farBeyond {
		l.counts.receive(receivedUnread, len(payload))
		l.s.metrics.refuse(codec.RateLimited)
		l.fail(cn, codec.ClosePolicy, reasonFlood)
		return
	}
	var m codec.ClientMessage
	if err := cn.protocol.ParseClient(payload, &m); err != nil {
		l.counts.receive(receivedUnread, len(payload))
		if refusal, ok := err.(*codec.ParseError); ok { // errors.As would allocate; it is never wrapped
			cn.refuse(&m, refusal.Code, refusal.Message, 0)
		}
		return
	}
	what := receivedAs(m.Type)
	l.counts.receive(what, len(payload))
	if rate == beyondRate {
		cn.refuse(&m, codec.RateLimited, "too many messages; the message was not stored", cn.retryAfterMS(len(payload)))
		return
	}
	hookFrame(&m)
	switch what {
	case receivedPing:
		cn.reply(codec.Content{Type: codec.FramePong}, cn.protocol.AppendPong(l.scratch[:0], l.now))
	case receivedRefreshToken:
		cn.refreshToken(m.Token)
	case receivedDeliveryAck:
		l.acked(cn, m.DeliveryID)
	default:
		if text, retryMS := cn.upstream(&m, nil); text != "" {
			cn.refuse(&m, codec.Overloaded, text, retryMS)
		}
	}
}

// upstream hands a message to its shard, or says why it does not and when to try again. The answer goes to
// the connection, or to reply, if there is one.
func (cn *conn) upstream(m *codec.ClientMessage, reply chan<- codec.UpstreamResult) (refusal string, retryMS int32) {
	l := cn.l
	if l.s.pressed.Load() {
		l.s.metrics.pressed.messages.Inc()
		return "the gateway is short of memory; the message was not stored", pressureRetryMS
	}
	if l.full(cn.id.Shard()) {
		return "the gateway is overloaded; the message was not stored", overloadRetryMS
	}
	if len(l.devices) > 0 {
		m.DeviceID = l.devices[cn.id]
	}
	u := l.builder.Build(m, cn.user, cn.id, l.now)
	u.Reply, u.Received = reply, l.nanos
	l.emit(codec.Event{Kind: codec.EventMessage, Session: cn.id, Upstream: u})
	return "", 0
}

// op is what the messages of the connection's protocol are sent as, both ways.
func (cn *conn) op() ws.OpCode {
	if cn.protocol == codec.Proto {
		return ws.OpBinary
	}
	return ws.OpText
}

// wrongOp is why a message that was sent as the other kind closes the connection.
func (cn *conn) wrongOp() string {
	if cn.protocol == codec.Proto {
		return reasonText
	}
	return reasonBinary
}

// overRate charges a control frame and tells whether it is left unanswered.
func (cn *conn) overRate(bytes int) bool {
	rate := cn.spend(1, bytes)
	if rate == withinRate {
		return false
	}
	cn.l.s.metrics.refuse(codec.RateLimited)
	if rate == farBeyond {
		cn.l.fail(cn, codec.ClosePolicy, reasonFlood)
	}
	return true
}

// overloadRetryMS is when a client whose message found its shard's queue full may try again.
const overloadRetryMS = 500

// pressureRetryMS is when a client may try again whose message came while memory was short.
const pressureRetryMS = 5000

// reply queues a frame of the loop's own for the connection being read. payload may be scratch.
func (cn *conn) reply(content codec.Content, payload []byte) {
	l := cn.l
	l.counts.send(content, len(payload))
	l.scratch = payload[:0]
	if cn.protocol == codec.SSE {
		l.replies = append(l.replies, payload...)
	} else {
		l.replies = appendFrame(l.replies, cn.op(), payload)
	}
	if len(l.replies) > maxKeptScratch {
		cn.flushReplies()
	}
}

// refuse answers a message under its name, where that could be read.
func (cn *conn) refuse(m *codec.ClientMessage, code codec.Code, text string, retryMS int32) {
	l := cn.l
	l.s.metrics.refuse(code)
	if len(m.ClientMsgID) > 0 {
		cn.reply(codec.AckOf(code), cn.protocol.AppendAckError(l.scratch[:0], m.ClientMsgID, m.Temp, code, retryMS, l.now))
		return
	}
	cn.replyError(code, text)
}

// replyError answers what has no name.
func (cn *conn) replyError(code codec.Code, text string) {
	l := cn.l
	cn.reply(codec.Content{Type: codec.FrameError}, cn.protocol.AppendError(l.scratch[:0], code, text, l.now))
}

// refreshToken checks a new token for the session, off the loop where that is slow.
func (cn *conn) refreshToken(token []byte) {
	l := cn.l
	if !l.rules.Verifier.Slow() {
		cn.refreshed(l.s.identify(token))
		return
	}
	if cn.checking {
		cn.replyError(codec.RateLimited, "a token is being checked already")
		return
	}
	token = append([]byte(nil), token...)
	id := cn.id
	check := func() {
		who, err := l.s.identify(token)
		l.executeFor(cn, func() {
			cn.own().checking = false
			if cn.state == stateOpen && cn.id == id {
				cn.refreshed(l.recheck(who, err))
				cn.flushReplies()
			}
		})
	}
	select {
	case l.s.verify <- check:
		cn.own().checking = true
	default:
		cn.replyError(codec.Overloaded, "too many tokens are being checked, try again later")
	}
}

func (cn *conn) refreshed(who Identity, err error) {
	if refusal := cn.renew(who, err); refusal != "" {
		cn.replyError(codec.AuthFailed, refusal)
	}
}

// renew lets a checked token take the place of the session's, or says why not. Its shard tells the client.
func (cn *conn) renew(who Identity, err error) (refusal string) {
	switch {
	case err != nil:
		return err.Error()
	case who.User != cn.user:
		return "the token is another user's"
	case seconds(who.ExpiresAt/1000) <= cn.expires:
		return "the token does not expire later than the one before"
	}
	cn.keep(who)
	cn.l.emit(codec.Event{Kind: codec.EventRefresh, Session: cn.id, Value: who.ExpiresAt})
	return ""
}
