package codec

import (
	"strconv"
	"unicode/utf8"
)

// Limits and names of downstream records.
const (
	MaxTargets     = 10_000
	TypeNewMessage = "new-message"
	TypeKick       = "kick"
)

var (
	errRecordJSON    = &ParseError{InvalidMessage, "the record is not one valid JSON object"}
	errRecordTarget  = &ParseError{InvalidMessage, "target_user_id or target_user_ids must name 1 to 10000 users"}
	errRecordUser    = &ParseError{InvalidMessage, "a target must be a string of 1 to 128 bytes without control characters"}
	errRecordData    = &ParseError{InvalidMessage, "data is missing"}
	errRecordType    = &ParseError{InvalidMessage, "type must be a string of 1 to 64 bytes"}
	errRecordDevice  = &ParseError{InvalidMessage, "device_id must be a string of 1 to 128 bytes without control characters"}
	errRecordExpires = &ParseError{InvalidMessage, "expire_at must be a number of milliseconds"}
)

// ParseDownstream reads a record of the downstream topic; topic, partition and offset name it where it has
// no message_id. An error is a *ParseError: the record belongs on the dead-letter topic. The
// result refers to value.
func ParseDownstream(value []byte, topic string, partition int32, offset int64) (*Downstream, error) {
	d := &Downstream{Partition: partition, Offset: offset, Value: value, Type: TypeNewMessage}
	if !utf8.Valid(value) {
		return nil, errRecordJSON
	}
	f, err := readRecord(value, d)
	if err != nil {
		return nil, err
	}
	if d.Targets, err = f.targets(); err != nil {
		return nil, err
	}
	d.Kick = d.Type == TypeKick
	switch {
	case f.data != nil:
		d.Data = f.data
	case f.content != nil:
		d.Data = append(append([]byte(`{"content":`), f.content...), '}')
	case !d.Kick:
		return nil, errRecordData
	}
	if d.Kick {
		m := ClientMessage{Data: d.Data}
		if reason, ok := asString(m.field("reason")); ok {
			d.KickReason = string(reason)
		}
	}
	if d.MessageID == "" {
		d.MessageID = topic + "-" + strconv.Itoa(int(partition)) + "-" + strconv.FormatInt(offset, 10)
	}
	return d, nil
}

// recordFields are the fields of a downstream record that have an alias or need the others.
type recordFields struct {
	one, many, user, data, content []byte
}

func readRecord(value []byte, d *Downstream) (f recordFields, err error) {
	o := topObject(value)
	for o.next() {
		if string(o.value) == "null" && !o.is("data") {
			continue
		}
		switch {
		case o.is("target_user_id"):
			f.one = o.value
		case o.is("target_user_ids"):
			f.many = o.value
		case o.is("user_id"):
			f.user = o.value
		case o.is("data"):
			f.data = o.value
		case o.is("content"):
			f.content = o.value
		case o.is("type"):
			s, ok := stringValue(o.value)
			if !ok || len(s) == 0 || len(s) > MaxTypeLen || hasControl(s) {
				return f, errRecordType
			}
			d.Type = string(s)
		case o.is("message_id"):
			if s, ok := stringValue(o.value); ok {
				d.MessageID = string(s)
			}
		case o.is("trace_id"):
			if s, ok := stringValue(o.value); ok {
				d.TraceID = string(s)
			}
		case o.is("device_id"):
			s, ok := stringValue(o.value)
			if !ok || !ValidName(s) {
				return f, errRecordDevice
			}
			d.DeviceID = string(s)
		case o.is("timestamp"):
			d.Timestamp, _ = intValue(o.value) // for those behind another gateway; nothing here depends on it
		case o.is("expire_at"):
			ms, ok := intValue(o.value)
			if !ok {
				return f, errRecordExpires
			}
			d.ExpireAt = ms
		}
	}
	if !o.endsHere() {
		return f, errRecordJSON
	}
	return f, nil
}

// targets returns the users that the record names, each once.
func (f *recordFields) targets() ([]string, error) {
	one := f.one
	if one == nil && f.many == nil {
		one = f.user
	}
	var list []string
	if one != nil {
		s, ok := stringValue(one)
		if !ok || !ValidName(s) {
			return nil, errRecordUser
		}
		list = append(list, string(s))
	}
	if f.many != nil {
		var err error
		if list, err = appendTargets(list, f.many); err != nil {
			return nil, err
		}
	}
	if len(list) == 0 {
		return nil, errRecordTarget
	}
	return list, nil
}

// appendTargets reads an array that has been checked to be valid JSON.
func appendTargets(list []string, array []byte) ([]string, error) {
	if array[0] != '[' {
		return nil, errRecordTarget
	}
	seen := make(map[string]struct{})
	for _, s := range list {
		seen[s] = struct{}{}
	}
	for i := skipSpace(array, 1); array[i] != ']'; {
		end := scanValue(array, i, 1)
		s, ok := stringValue(array[i:end])
		if !ok || !ValidName(s) {
			return nil, errRecordUser
		}
		if _, twice := seen[string(s)]; !twice {
			if len(list) == MaxTargets {
				return nil, errRecordTarget
			}
			list = append(list, string(s))
			seen[list[len(list)-1]] = struct{}{}
		}
		i = skipSpace(array, end)
		if array[i] == ',' {
			i = skipSpace(array, i+1)
		}
	}
	return list, nil
}

// AppendForward appends the record that hands d on to another gateway for one of its targets.
func AppendForward(dst []byte, d *Downstream, target string) []byte {
	dst = append(dst, `{"target_user_id":`...)
	dst = AppendQuoted(dst, target)
	if d.DeviceID != "" {
		dst = append(dst, `,"device_id":`...)
		dst = AppendQuoted(dst, d.DeviceID)
	}
	dst = append(dst, `,"type":`...)
	dst = AppendQuoted(dst, d.Type)
	dst = append(dst, `,"message_id":`...)
	dst = AppendQuoted(dst, d.MessageID)
	if d.TraceID != "" {
		dst = append(dst, `,"trace_id":`...)
		dst = AppendQuoted(dst, d.TraceID)
	}
	if d.ExpireAt != 0 {
		dst = append(dst, `,"expire_at":`...)
		dst = strconv.AppendInt(dst, d.ExpireAt, 10)
	}
	if d.Timestamp != 0 {
		dst = append(dst, `,"timestamp":`...)
		dst = strconv.AppendInt(dst, d.Timestamp, 10)
	}
	if d.Data != nil {
		dst = append(dst, `,"data":`...)
		dst = append(dst, d.Data...)
	}
	return append(dst, '}')
}
