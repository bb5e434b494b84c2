package logic

import (
	"bytes"
	"encoding/json"
	"fmt"
)

// upstream is a record of the upstream topic.
type upstream struct {
	MessageID   string          `json:"message_id"`
	TraceID     string          `json:"trace_id"`
	UserID      string          `json:"user_id"`
	GatewayID   string          `json:"gateway_id"`
	SessionID   string          `json:"session_id"`
	DeviceID    string          `json:"device_id"`
	Type        string          `json:"type"`
	ClientMsgID string          `json:"client_msg_id"`
	Data        json.RawMessage `json:"data"`
	Timestamp   int64           `json:"timestamp"`

	traceParent string // the record's header; handed on with what the record leads to
}

// downstream is a record of a gateway's topic.
type downstream struct {
	TargetUserID  string          `json:"target_user_id,omitempty"`
	TargetUserIDs []string        `json:"target_user_ids,omitempty"`
	DeviceID      string          `json:"device_id,omitempty"`
	Type          string          `json:"type"`
	MessageID     string          `json:"message_id"`
	TraceID       string          `json:"trace_id,omitempty"`
	Data          json.RawMessage `json:"data"`
	Timestamp     int64           `json:"timestamp"`
}

// The types of the chat, both ways.
const (
	typeSend      = "send-message"
	typeCreate    = "create-group"
	typeJoin      = "join-group"
	typeDelivered = "delivered"
	typeSync      = "sync"

	typeMessage      = "new-message"
	typeReceipt      = "message-delivered"
	typeConversation = "conversation"
	typeError        = "chat-error"
)

type sendData struct {
	ConversationID string          `json:"conversation_id"`
	To             string          `json:"to"`
	Content        json.RawMessage `json:"content"`
	Echo           bool            `json:"echo"`
}

type createData struct {
	Name    string   `json:"name"`
	Members []string `json:"members"`
}

type joinData struct {
	ConversationID string `json:"conversation_id"`
}

type deliveredData struct {
	ConversationID string   `json:"conversation_id"`
	MessageID      string   `json:"message_id"`
	MessageIDs     []string `json:"message_ids"`
}

type syncData struct {
	After          int64  `json:"after"`
	ConversationID string `json:"conversation_id"`
	Limit          int    `json:"limit"`
}

type messageView struct {
	ConversationID string          `json:"conversation_id"`
	MessageID      string          `json:"message_id"`
	ClientMsgID    string          `json:"client_msg_id,omitempty"` // as its sender named it
	Seq            int64           `json:"seq"`
	From           string          `json:"from"`
	FromName       string          `json:"from_name"`
	Content        json.RawMessage `json:"content"`
	SentAt         int64           `json:"sent_at"`
	DeliveredTo    []string        `json:"delivered_to,omitempty"`
}

type memberView struct {
	UserID string `json:"user_id"`
	Name   string `json:"name"`
	Known  bool   `json:"known"`
}

type conversationView struct {
	ConversationID string       `json:"conversation_id"`
	Kind           string       `json:"kind"`
	Name           string       `json:"name"`
	Members        []memberView `json:"members"`
	ClientMsgID    string       `json:"client_msg_id,omitempty"` // of the request that made it
}

type receiptView struct {
	ConversationID string   `json:"conversation_id"`
	MessageID      string   `json:"message_id"`
	ClientMsgID    string   `json:"client_msg_id,omitempty"`
	UserID         string   `json:"user_id"`
	DeliveredTo    []string `json:"delivered_to"`
}

type syncView struct {
	Conversations []json.RawMessage `json:"conversations"`
	Messages      []json.RawMessage `json:"messages"`
	After         int64             `json:"after"`
	More          bool              `json:"more"`
	ClientMsgID   string            `json:"client_msg_id,omitempty"`
}

type errorView struct {
	ClientMsgID string `json:"client_msg_id,omitempty"`
	Code        string `json:"code"`
	Message     string `json:"message"`
}

// encode is json.Marshal without the escapes that are made for HTML, which would not leave a
// message's content as it was.
func encode(v any) json.RawMessage {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		// Only our own types come here, and raw messages out of JSON that has been parsed.
		panic(fmt.Sprintf("encode %T: %v", v, err))
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}
