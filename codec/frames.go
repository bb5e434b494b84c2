package codec

import "strconv"

// The frames that the gateway sends. Each function appends one frame; now is the gateway's time in
// Unix ms. None allocates when dst has room.

// AppendConnected appends the first frame of a session. degraded: presence could not be claimed.
func (p Protocol) AppendConnected(dst []byte, gatewayID, session string, heartbeatMS int64, maxBytes int,
	degraded bool, now int64) []byte {
	dst, body := p.open(dst, "connected")
	dst = append(dst, `"gateway_id":`...)
	dst = AppendQuoted(dst, gatewayID)
	dst = append(dst, `,"session_id":`...)
	dst = AppendQuoted(dst, session)
	dst = append(dst, `,"heartbeat_ms":`...)
	dst = strconv.AppendInt(dst, heartbeatMS, 10)
	dst = append(dst, `,"max_message_bytes":`...)
	dst = strconv.AppendInt(dst, int64(maxBytes), 10)
	if degraded {
		dst = append(dst, `,"presence":"degraded"`...)
	}
	return p.end(dst, body, now)
}

func (p Protocol) openAck(dst, clientMsgID []byte, temp bool) (_ []byte, body int) {
	dst, body = p.open(dst, "message-ack")
	dst = append(dst, `"client_msg_id":`...)
	dst = AppendQuoted(dst, clientMsgID)
	if temp {
		dst = append(dst, `,"tempMessageId":`...)
		dst = AppendQuoted(dst, clientMsgID)
	}
	return dst, body
}

// AppendAck appends the ack of a stored record.
func (p Protocol) AppendAck(dst []byte, u *Upstream, topic string, now int64) []byte {
	dst, body := p.openAck(dst, u.ClientMsgID, u.Temp)
	dst = append(dst, `,"status":"success","messageId":"`...)
	dst = append(dst, u.MessageID...)
	dst = append(dst, `","topic":`...)
	dst = AppendQuoted(dst, topic)
	dst = append(dst, `,"partition":`...)
	dst = strconv.AppendInt(dst, int64(u.Result.Partition), 10)
	if u.Result.Offset >= 0 {
		dst = append(dst, `,"offset":`...)
		dst = strconv.AppendInt(dst, u.Result.Offset, 10)
	}
	return p.end(dst, body, now)
}

// AppendAckError appends the refusal of a message whose name could be read. retryAfterMS 0: not said.
func (p Protocol) AppendAckError(dst, clientMsgID []byte, temp bool, code Code, retryAfterMS int32, now int64) []byte {
	dst, body := p.openAck(dst, clientMsgID, temp)
	dst = append(dst, `,"status":"error","code":`...)
	dst = AppendQuoted(dst, string(code))
	if retryAfterMS > 0 {
		dst = append(dst, `,"retry_after_ms":`...)
		dst = strconv.AppendInt(dst, int64(retryAfterMS), 10)
	}
	return p.end(dst, body, now)
}

// AppendError appends the refusal of a frame whose name could not be read, or that has none.
func (p Protocol) AppendError(dst []byte, code Code, message string, now int64) []byte {
	dst, body := p.open(dst, "error")
	dst = append(dst, `"code":`...)
	dst = AppendQuoted(dst, string(code))
	dst = append(dst, `,"message":`...)
	dst = AppendQuoted(dst, message)
	return p.end(dst, body, now)
}

// AppendPong appends the answer to ping.
func (p Protocol) AppendPong(dst []byte, now int64) []byte {
	dst, body := p.open(dst, "pong")
	return p.end(dst, body, now)
}

// AppendReconnect appends the hint of a gateway that drains.
func (p Protocol) AppendReconnect(dst []byte, retryAfterMS int64, reason string, now int64) []byte {
	dst, body := p.open(dst, "reconnect")
	dst = append(dst, `"retry_after_ms":`...)
	dst = strconv.AppendInt(dst, retryAfterMS, 10)
	dst = append(dst, `,"reason":`...)
	dst = AppendQuoted(dst, reason)
	return p.end(dst, body, now)
}

// AppendTokenRefreshed appends the answer to refresh-token; expiresAt in Unix ms.
func (p Protocol) AppendTokenRefreshed(dst []byte, expiresAt, now int64) []byte {
	dst, body := p.open(dst, "token-refreshed")
	dst = append(dst, `"expires_at":`...)
	dst = strconv.AppendInt(dst, expiresAt, 10)
	return p.end(dst, body, now)
}

// AppendUserEvent appends the value of a record on the user-events topic.
func AppendUserEvent(dst []byte, online bool, user, gatewayID, session, reason string, now int64) []byte {
	if online {
		dst = append(dst, `{"type":"user.online","user_id":`...)
	} else {
		dst = append(dst, `{"type":"user.offline","user_id":`...)
	}
	dst = AppendQuoted(dst, user)
	dst = append(dst, `,"gateway_id":`...)
	dst = AppendQuoted(dst, gatewayID)
	dst = append(dst, `,"session_id":`...)
	dst = AppendQuoted(dst, session)
	dst = append(dst, `,"reason":`...)
	dst = AppendQuoted(dst, reason)
	dst = append(dst, `,"timestamp":`...)
	dst = strconv.AppendInt(dst, now, 10)
	return append(dst, '}')
}
