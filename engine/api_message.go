package engine

import (
	"context"
	"errors"
	"net/http"

	"im-gateway/codec"
)

// stored is the answer to a message that Kafka has acknowledged.
type stored struct {
	ClientMsgID string `json:"client_msg_id,omitempty"`
	MessageID   string `json:"message_id"`
	Topic       string `json:"topic"`
	Partition   int32  `json:"partition"`
	Offset      *int64 `json:"offset,omitempty"` // nil: not known
}

// done is the answer to what a session did itself.
type done struct {
	ExpiresAt int64 `json:"expires_at,omitempty"`
}

// publish serves POST /api/messages.
func publish(c *call) {
	caller, err := c.api.o.Authenticate(c.r)
	if err != nil {
		c.note = err
		c.w.Header().Set("WWW-Authenticate", `Bearer realm="im-gateway", error="invalid_token"`)
		code := codec.AuthFailed
		if errors.Is(err, ErrTokenExpired) {
			code = codec.TokenExpired
		}
		c.fail(http.StatusUnauthorized, string(code), err.Error())
		return
	}
	if id := c.r.URL.Query().Get("device_id"); id != "" && !codec.ValidName(id) {
		c.fail(http.StatusBadRequest, string(codec.InvalidMessage), "device_id must be at most 128 bytes without control characters")
		return
	}
	body, ok := c.body(min(c.rules.MaxBodyBytes, c.rules.MaxMessageBytes), string(codec.MessageTooLarge))
	if !ok {
		return
	}
	caller.Session = c.r.URL.Query().Get("session_id")
	ctx, cancel := context.WithTimeout(c.r.Context(), c.api.o.PublishDeadline)
	defer cancel()
	p, err := c.api.o.Publisher.Publish(ctx, caller, body)
	if err != nil {
		c.note = err
		p.Result.Code = codec.OutcomeUnknown
		if c.r.Context().Err() != nil {
			c.fail(statusClientGone, string(codec.OutcomeUnknown), "the request was given up")
			return
		}
	}
	if p.Result.Code != codec.OK {
		c.refuse(p)
		return
	}
	if p.Control {
		c.succeed(done{p.ExpiresAt})
		return
	}
	answer := stored{
		ClientMsgID: p.ClientMsgID,
		MessageID:   p.Result.MessageID,
		Topic:       c.api.o.UpstreamTopic,
		Partition:   p.Result.Partition,
	}
	if p.Result.Offset >= 0 {
		answer.Offset = &p.Result.Offset
	}
	c.succeed(answer)
}

// refuse answers a message that was not acknowledged.
func (c *call) refuse(p Published) {
	var status int
	var message string
	switch p.Result.Code {
	case codec.InvalidMessage:
		status, message = http.StatusBadRequest, "the body is no message envelope"
	case codec.MessageTooLarge:
		status, message = http.StatusRequestEntityTooLarge, "the message is too large"
	case codec.RateLimited:
		status, message = http.StatusTooManyRequests, "too many messages"
	case codec.Overloaded:
		status, message = http.StatusServiceUnavailable, "not stored: a limit is reached; send again later"
	case codec.BrokerUnavailable:
		status, message = http.StatusServiceUnavailable, "not stored: Kafka is not available; send again later"
	case codec.OutcomeUnknown:
		status, message = http.StatusGatewayTimeout, "stored or not: send again under the same id"
	case codec.AuthFailed, codec.TokenExpired:
		status, message = http.StatusUnauthorized, "the token is not good any more"
	case codec.SessionNotFound:
		status = http.StatusNotFound
		message = "this gateway has no such session of yours: it has ended, or is on another gateway; " +
			"send both to one gateway (sticky routing)"
	default:
		status, message = http.StatusInternalServerError, "internal error"
	}
	if p.Message != "" {
		message = p.Message
	}
	if status == http.StatusServiceUnavailable || status == http.StatusTooManyRequests {
		c.retryAfter(int64(p.Result.RetryAfterMS))
	}
	c.fail(status, string(p.Result.Code), message)
}
