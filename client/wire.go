package client

import (
	"encoding/json"
	"time"
)

const (
	subprotocol = "im.json.v1"

	typePing           = "ping"
	typePong           = "pong"
	typeConnected      = "connected"
	typeMessageAck     = "message-ack"
	typeDeliveryAck    = "delivery-ack"
	typeReconnect      = "reconnect"
	typeRefresh        = "refresh-token"
	typeTokenRefreshed = "token-refreshed"
	typeError          = "error"

	codeTokenExpired = 4502
	codeTokenRefused = 4503
)

// Message is what the gateway delivered.
type Message struct {
	Type string
	ID   string // repeated by a redelivery; may be empty
	Data json.RawMessage
}

// frame is an envelope as the gateway sends it.
type frame struct {
	Type       string          `json:"type"`
	MessageID  string          `json:"message_id"`
	DeliveryID int64           `json:"delivery_id"`
	Data       json.RawMessage `json:"data"`
}

type connected struct {
	GatewayID       string `json:"gateway_id"`
	SessionID       string `json:"session_id"`
	HeartbeatMs     int64  `json:"heartbeat_ms"`
	MaxMessageBytes int    `json:"max_message_bytes"`
	Presence        string `json:"presence"`
}

type ack struct {
	ClientMsgID  string `json:"client_msg_id"`
	Status       string `json:"status"`
	Topic        string `json:"topic"`
	Partition    int32  `json:"partition"`
	Offset       *int64 `json:"offset"`
	MessageID    string `json:"messageId"`
	Code         string `json:"code"`
	RetryAfterMs int64  `json:"retry_after_ms"`
}

// hint bounds a time that the gateway named.
func hint(ms int64) time.Duration {
	return time.Duration(min(max(ms, 0), maxHint.Milliseconds())) * time.Millisecond
}
