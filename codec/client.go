package codec

import "unicode/utf8"

// The types of client frames that the gateway itself answers; every other type goes upstream.
const (
	TypePing         = "ping"
	TypeDeliveryAck  = "delivery-ack"
	TypeRefreshToken = "refresh-token"
)

// TypeSendMessage is the usual type of those that go upstream.
const TypeSendMessage = "send-message"

// Limits on what names things in an envelope, in bytes.
const (
	MaxNameLen = 128 // a user id, a client's name for a message
	MaxTypeLen = 64
	MaxKindLen = 32 // of a kind of device
)

// ParseError says why a client frame or a downstream record is refused.
type ParseError struct {
	Code    Code
	Message string // for the sender's eyes
}

func (e *ParseError) Error() string { return string(e.Code) + ": " + e.Message }

// The refusals of ParseClient, made once: refusing must not be dearer than accepting.
var (
	errNotObject   = &ParseError{InvalidMessage, "the frame is not one valid JSON object"}
	errNoType      = &ParseError{InvalidMessage, "type must be a string of 1 to 64 bytes without control characters"}
	errBadName     = &ParseError{InvalidMessage, "message_id must be a string of 1 to 128 bytes without control characters"}
	errNoData      = &ParseError{InvalidMessage, "data is missing"}
	errBadTime     = &ParseError{InvalidMessage, "timestamp must be a number of milliseconds"}
	errNoToken     = &ParseError{InvalidMessage, "data.token must be a string"}
	errBadDelivery = &ParseError{InvalidMessage, "data.delivery_id must be a number"}
)

// ClientMessage is one parsed client frame. Its slices point into the frame, or into a copy where
// the text was written with escapes, and are good as long as the frame is.
type ClientMessage struct {
	Type        []byte
	ClientMsgID []byte // the client's name for the message; empty: none, no ack is wanted
	Temp        bool   // the name came as data.tempMessageId
	Data        []byte // valid JSON; nil when the frame has none
	Timestamp   int64  // the client's clock, Unix ms; 0: none
	TraceID     []byte // 32 lower-case hex digits, from trace_id or traceparent; empty: none
	TraceParent []byte // the traceparent, TraceParentLen bytes of it, whose trace that is; empty: none came
	Token       []byte // of refresh-token
	DeliveryID  int64  // of delivery-ack
	DeviceID    string // of the session, set by its owner and not by ParseClient; empty: none was named
}

// ParseClient reads a client frame of im.json.v1, which must be valid UTF-8. An error is a *ParseError; even then
// m.ClientMsgID is set when the name could be read. Where a field occurs twice the last one counts.
func ParseClient(frame []byte, m *ClientMessage) error {
	*m = ClientMessage{}
	var badName, badTime bool
	o := topObject(frame)
	for o.next() {
		switch {
		case o.is("type"):
			m.Type, _ = stringValue(o.value)
		case o.is("message_id"):
			name, ok := stringValue(o.value)
			if ok && ValidName(name) {
				m.ClientMsgID, badName = name, false
			} else {
				badName = string(o.value) != "null" // null is as none
			}
		case o.is("data"):
			m.Data = o.value
		case o.is("timestamp"):
			var ok bool
			m.Timestamp, ok = intValue(o.value)
			badTime = !ok && string(o.value) != "null"
		case o.is("trace_id"), o.is("traceparent"):
			if s, ok := stringValue(o.value); ok {
				m.readTrace(s)
			}
		}
	}
	switch {
	case !o.endsHere():
		return errNotObject
	case !m.validType():
		return errNoType
	case badName:
		return errBadName
	case badTime:
		return errBadTime
	}
	return m.readData()
}

// Control tells whether the message is for the gateway itself, and does not go upstream.
func (m *ClientMessage) Control() bool {
	switch string(m.Type) {
	case TypePing, TypeDeliveryAck, TypeRefreshToken:
		return true
	}
	return false
}

func (m *ClientMessage) validType() bool {
	return len(m.Type) > 0 && len(m.Type) <= MaxTypeLen && !hasControl(m.Type)
}

// readTrace takes a trace id of 32 hex digits, or a traceparent, which counts before it.
func (m *ClientMessage) readTrace(s []byte) {
	c, ok := ParseTraceID(s)
	switch {
	case !ok:
	case c.SpanID != [8]byte{}:
		m.TraceID, m.TraceParent = s[3:35], s[:TraceParentLen]
	case len(m.TraceParent) == 0:
		m.TraceID = s
	}
}

// readData looks into data only where the frame needs it.
func (m *ClientMessage) readData() error {
	switch string(m.Type) {
	case TypePing:
		return nil
	case TypeRefreshToken:
		token, ok := m.field("token")
		if m.Token, ok = asString(token, ok); !ok || len(m.Token) == 0 {
			return errNoToken
		}
		return nil
	case TypeDeliveryAck:
		id, ok := m.field("delivery_id")
		if ok {
			m.DeliveryID, ok = intValue(id)
		}
		if !ok {
			return errBadDelivery
		}
		return nil
	}
	if m.Data == nil {
		return errNoData
	}
	if len(m.ClientMsgID) > 0 {
		return nil
	}
	if value, ok := m.field("client_msg_id"); ok {
		return m.setName(value, false)
	}
	if value, ok := m.field("tempMessageId"); ok {
		return m.setName(value, true)
	}
	return nil
}

func (m *ClientMessage) setName(value []byte, temp bool) error {
	name, ok := stringValue(value)
	if !ok || !ValidName(name) {
		return errBadName
	}
	m.ClientMsgID, m.Temp = name, temp
	return nil
}

func asString(value []byte, ok bool) ([]byte, bool) {
	if !ok {
		return nil, false
	}
	return stringValue(value)
}

// field returns a field of data that is not null.
func (m *ClientMessage) field(name string) (value []byte, ok bool) {
	o := newObject(m.Data, 0, 0)
	for o.next() {
		if o.is(name) {
			value, ok = o.value, string(o.value) != "null"
		}
	}
	return value, ok
}

func hasControl[T string | []byte](s T) bool {
	for i := range len(s) {
		if s[i] < 0x20 || s[i] == 0x7f {
			return true
		}
	}
	return false
}

// ValidKind tells whether s may name a kind of device: 1 to 32 of a-z 0-9 _ -.
func ValidKind[T string | []byte](s T) bool {
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '_' && c != '-' {
			return false
		}
	}
	return len(s) >= 1 && len(s) <= MaxKindLen
}

// ValidName tells whether s may name a user or a message: 1 to 128 bytes of UTF-8 without control
// characters.
func ValidName[T string | []byte](s T) bool {
	return len(s) >= 1 && len(s) <= MaxNameLen && !hasControl(s) && utf8.ValidString(string(s))
}
