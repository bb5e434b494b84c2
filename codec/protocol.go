package codec

import (
	"strconv"
	"sync"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// Protocol is how a session's envelopes are written. What they say is the same in each, and data is
// JSON in each.
type Protocol uint8

// The protocols, named as WebSocket subprotocols; the zero value is the default.
const (
	JSON  Protocol = iota // im.json.v1: text messages, a JSON object each
	Proto                 // im.proto.v1: binary messages, a frame of im/client/v1/client.proto each
	SSE                   // no WebSocket: server-sent events, a JSON object each; clients send JSON by HTTP
)

// The fields of ClientFrame and of ServerFrame.
const (
	fieldType      protowire.Number = 1
	fieldMessageID protowire.Number = 2
	fieldData      protowire.Number = 3
	fieldTimestamp protowire.Number = 4
	fieldTraceID   protowire.Number = 5 // ClientFrame
	fieldDelivery  protowire.Number = 5 // ServerFrame
)

var (
	errNotFrame = &ParseError{InvalidMessage, "the frame is not one valid ClientFrame"}
	errNotJSON  = &ParseError{InvalidMessage, "data is not one valid JSON value"}
)

// ParseClient reads a client frame of the protocol; see the function of that name, and ParseClientProto.
func (p Protocol) ParseClient(frame []byte, m *ClientMessage) error {
	if p == Proto {
		return ParseClientProto(frame, m)
	}
	return ParseClient(frame, m)
}

// ParseClientProto reads a client frame of im.proto.v1 as ParseClient does one of im.json.v1: what is
// refused there is refused here, under the name if that could be read. Fields that are not the schema's
// are skipped; groups, which no client of the schema writes, are refused.
func ParseClientProto(frame []byte, m *ClientMessage) error {
	*m = ClientMessage{}
	var badName bool
	var data []byte
	for len(frame) > 0 {
		num, typ, n := protowire.ConsumeTag(frame)
		if n < 0 || typ == protowire.StartGroupType || typ == protowire.EndGroupType {
			return errNotFrame
		}
		frame = frame[n:]
		if typ != protowire.BytesType {
			if num == fieldTimestamp && typ == protowire.VarintType {
				v, _ := protowire.ConsumeVarint(frame)
				m.Timestamp = int64(v)
			}
			if n = protowire.ConsumeFieldValue(num, typ, frame); n < 0 {
				return errNotFrame
			}
			frame = frame[n:]
			continue
		}
		value, n := protowire.ConsumeBytes(frame)
		if n < 0 {
			return errNotFrame
		}
		frame = frame[n:]
		switch num {
		case fieldType, fieldMessageID, fieldTraceID:
			if !utf8.Valid(value) {
				return errNotFrame
			}
		}
		switch num {
		case fieldType:
			m.Type = value
		case fieldMessageID:
			m.ClientMsgID, badName = nil, false
			if ValidName(value) {
				m.ClientMsgID = value
			} else {
				badName = len(value) > 0 // an empty one is none
			}
		case fieldData:
			data = value
		case fieldTraceID:
			m.readTrace(value)
		}
	}
	if len(data) > 0 {
		if m.Data = jsonValue(data); m.Data == nil {
			return errNotJSON
		}
	}
	switch {
	case !m.validType():
		return errNoType
	case badName:
		return errBadName
	}
	return m.readData()
}

// jsonValue returns the one JSON value that b is, without the white space around it; nil: it is none,
// or nested deeper than the data of a JSON frame may be.
func jsonValue(b []byte) []byte {
	start := skipSpace(b, 0)
	end := scanValue(b, start, 1)
	if end < 0 || skipSpace(b, end) < len(b) || !utf8.Valid(b) {
		return nil
	}
	return b[start:end]
}

// open begins a frame of the gateway's own: what follows, up to end, are the fields of its data. body is
// for end.
func (p Protocol) open(dst []byte, typ string) (_ []byte, body int) {
	if p == Proto {
		dst = appendField(dst, fieldType, typ)
		dst = append(protowire.AppendTag(dst, fieldData, protowire.BytesType), 0) // the length, see setLength
		return append(dst, '{'), len(dst)
	}
	if p == SSE {
		dst = append(dst, eventData...)
	}
	dst = append(dst, `{"type":"`...)
	dst = append(dst, typ...)
	return append(dst, `","data":{`...), 0
}

func (p Protocol) end(dst []byte, body int, now int64) []byte {
	dst = append(dst, '}')
	if p == Proto {
		dst = setLength(dst, body)
		dst = protowire.AppendTag(dst, fieldTimestamp, protowire.VarintType)
		return protowire.AppendVarint(dst, uint64(now))
	}
	dst = append(dst, `,"timestamp":`...)
	dst = strconv.AppendInt(dst, now, 10)
	dst = append(dst, '}')
	if p == SSE {
		dst = append(dst, eventEnd...)
	}
	return dst
}

// setLength writes the length of what begins at body into the byte before it, and makes room where it
// takes more than one.
func setLength(dst []byte, body int) []byte {
	n := len(dst) - body
	if more := protowire.SizeVarint(uint64(n)) - 1; more > 0 {
		dst = append(dst, "\x00\x00\x00\x00\x00\x00\x00\x00\x00"[:more]...)
		copy(dst[body+more:], dst[body:body+n])
	}
	protowire.AppendVarint(dst[:body-1], uint64(n))
	return dst
}

func appendField[T string | []byte](dst []byte, num protowire.Number, value T) []byte {
	dst = protowire.AppendTag(dst, num, protowire.BytesType)
	dst = protowire.AppendVarint(dst, uint64(len(value)))
	return append(dst, value...)
}

// AppendDownstreamFrame appends the client frame of a record, the same for all its targets; data
// stands in it byte for byte, but for line ends in SSE.
func (p Protocol) AppendDownstreamFrame(dst []byte, d *Downstream, now int64) []byte {
	data := d.Data
	if data == nil {
		data = view("null")
	}
	if p == Proto {
		dst = appendField(dst, fieldType, d.Type)
		dst = appendField(dst, fieldMessageID, d.MessageID)
		dst = appendField(dst, fieldData, data)
		dst = protowire.AppendTag(dst, fieldTimestamp, protowire.VarintType)
		return protowire.AppendVarint(dst, uint64(now))
	}
	if p == SSE {
		return appendEvent(dst, d, now)
	}
	dst = append(dst, `{"type":`...)
	dst = AppendQuoted(dst, d.Type)
	dst = append(dst, `,"message_id":`...)
	dst = AppendQuoted(dst, d.MessageID)
	dst = append(dst, `,"data":`...)
	dst = append(dst, data...)
	dst = append(dst, `,"timestamp":`...)
	dst = strconv.AppendInt(dst, now, 10)
	return append(dst, '}')
}

// AppendDeliveryID appends a frame that AppendDownstreamFrame has made, with a delivery_id.
func (p Protocol) AppendDeliveryID(dst, frame []byte, id uint64) []byte {
	if p == Proto {
		dst = append(dst, frame...)
		dst = protowire.AppendTag(dst, fieldDelivery, protowire.VarintType)
		return protowire.AppendVarint(dst, id)
	}
	if p == SSE {
		return append(JSON.AppendDeliveryID(dst, frame[:len(frame)-len(eventEnd)], id), eventEnd...)
	}
	dst = append(dst, frame[:len(frame)-1]...) // one JSON object
	dst = append(dst, `,"delivery_id":`...)
	dst = strconv.AppendUint(dst, id, 10)
	return append(dst, '}')
}

// frameOverhead is what a record's frame holds beside the record's own texts, unless those are escaped.
const frameOverhead = 80

// Encode makes the record's client frame, before the record is dispatched; now is the gateway's time in
// Unix ms. It is that of im.json.v1: only a session can tell that it needs another.
func (d *Downstream) Encode(now int64) {
	d.encodedAt = now
	if d.Type == TypeNewMessage {
		d.Content.Type = FrameNewMessage
	}
	d.Frame = d.encode(JSON)
}

// otherFrames are a record's client frames in the protocols that come after JSON.
type otherFrames [SSE]struct {
	once  sync.Once
	bytes []byte
}

// FrameFor returns the record's client frame in a protocol, the same slice for every session of it.
// Shards call it.
func (d *Downstream) FrameFor(p Protocol) []byte {
	if p == JSON {
		return d.Frame
	}
	others := d.others.Load()
	if others == nil { // most records never need them
		others = new(otherFrames)
		if !d.others.CompareAndSwap(nil, others) {
			others = d.others.Load()
		}
	}
	f := &others[p-1]
	f.once.Do(func() { f.bytes = d.encode(p) })
	return f.bytes
}

func (d *Downstream) encode(p Protocol) []byte {
	n := frameOverhead + len(d.Type) + len(d.MessageID) + len(d.Data)
	if p == SSE {
		n += len(d.MessageID)
	}
	return p.AppendDownstreamFrame(make([]byte, 0, n), d, d.encodedAt)
}
