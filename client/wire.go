package client

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/coder/websocket"
	"google.golang.org/protobuf/encoding/protowire"
)

const (
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

// Format is how frames are written. Data is the same JSON in both.
type Format int

const (
	JSON     Format = iota // im.json.v1
	Protobuf               // im.proto.v1, the messages ClientFrame and ServerFrame of im.client.v1
)

func (f Format) subprotocol() string { return [...]string{"im.json.v1", "im.proto.v1"}[f] }

func (f Format) kind() websocket.MessageType {
	if f == Protobuf {
		return websocket.MessageBinary
	}
	return websocket.MessageText
}

// Message is what the gateway delivered.
type Message struct {
	Type string
	ID   string // repeated by a redelivery; may be empty
	Data json.RawMessage
	Time time.Time // the gateway's
}

// frame is an envelope as the gateway sends it.
type frame struct {
	Type       string          `json:"type"`
	MessageID  string          `json:"message_id"`
	DeliveryID uint64          `json:"delivery_id"`
	Timestamp  int64           `json:"timestamp"`
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

// encode writes a frame; data is JSON, and stays as it is. An empty id and a timestamp of 0 are left out.
func (f Format) encode(kind, id string, data []byte, timestamp int64) ([]byte, error) {
	if f == Protobuf {
		b := make([]byte, 0, len(kind)+len(id)+len(data)+24)
		for number, v := range [...][]byte{1: []byte(kind), 2: []byte(id), 3: data} {
			if len(v) > 0 {
				b = protowire.AppendTag(b, protowire.Number(number), protowire.BytesType)
				b = protowire.AppendBytes(b, v)
			}
		}
		if timestamp != 0 {
			b = protowire.AppendTag(b, 4, protowire.VarintType)
			b = protowire.AppendVarint(b, uint64(timestamp))
		}
		return b, nil
	}
	// By hand: json.Marshal would rewrite the data.
	quoted, err := json.Marshal(kind)
	if err != nil {
		return nil, fmt.Errorf("client: type: %w", err)
	}
	b := make([]byte, 0, len(kind)+len(id)+len(data)+64)
	b = append(append(b, `{"type":`...), quoted...)
	if id != "" {
		if quoted, err = json.Marshal(id); err != nil {
			return nil, fmt.Errorf("client: id: %w", err)
		}
		b = append(append(b, `,"message_id":`...), quoted...)
	}
	if timestamp != 0 {
		b = strconv.AppendInt(append(b, `,"timestamp":`...), timestamp, 10)
	}
	b = append(append(b, `,"data":`...), data...)
	return append(b, '}'), nil
}

// decode reads a frame of the gateway's.
func (f Format) decode(b []byte) (v frame, err error) {
	if f == Protobuf {
		v, err = decodeProtobuf(b)
	} else {
		err = json.Unmarshal(b, &v)
	}
	if err != nil {
		return frame{}, fmt.Errorf("client: a frame that is no envelope: %w", err)
	}
	return v, nil
}

var errProtobuf = errors.New("no protobuf message ServerFrame")

// decodeProtobuf reads a ServerFrame; fields that are not known are skipped.
func decodeProtobuf(b []byte) (v frame, err error) {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 || number > protowire.MaxValidNumber {
			return v, errProtobuf
		}
		b = b[n:]
		switch {
		case number <= 3 && kind == protowire.BytesType:
			text, n := protowire.ConsumeBytes(b)
			if n < 0 || number < 3 && !utf8.Valid(text) {
				return v, errProtobuf
			}
			switch number {
			case 1:
				v.Type = string(text)
			case 2:
				v.MessageID = string(text)
			case 3:
				v.Data = append(json.RawMessage{}, text...)
			}
			b = b[n:]
		case (number == 4 || number == 5) && kind == protowire.VarintType:
			value, n := protowire.ConsumeVarint(b)
			if n < 0 {
				return v, errProtobuf
			}
			if number == 4 {
				v.Timestamp = int64(value)
			} else {
				v.DeliveryID = value
			}
			b = b[n:]
		default:
			if n = protowire.ConsumeFieldValue(number, kind, b); n < 0 {
				return v, errProtobuf
			}
			b = b[n:]
		}
	}
	return v, nil
}
