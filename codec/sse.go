package codec

import (
	"bytes"
	"strconv"
	"unicode/utf8"
)

// Server-sent events (HTML Living Standard, section 9.2): each frame is one event, whose data is the object
// that im.json.v1 has. An event is a block of lines, so white space of the sender's that would end a line
// is written as a space: the JSON is the same, and no longer than it was.
const (
	eventData = "data: "
	eventEnd  = "\n\n"
)

// SSEHeartbeat is a comment, which clients skip: it keeps a quiet stream from being taken for a dead one.
const SSEHeartbeat = ": ping" + eventEnd

// maxEventID bounds the message ids that an event carries, in bytes: a browser that reconnects sends the
// last one in a header.
const maxEventID = 512

// stayAway is for how long, in ms, a client that reconnects by itself is to wait where it should not.
const stayAway = "86400000"

// appendEvent appends a record's event. A message id that a header cannot carry is not its id.
func appendEvent(dst []byte, d *Downstream, now int64) []byte {
	if id := d.MessageID; id != "" && len(id) <= maxEventID && !hasControl(id) && utf8.ValidString(id) {
		dst = append(dst, "id: "...)
		dst = append(dst, id...)
		dst = append(dst, '\n')
	}
	dst = append(dst, eventData...)
	start := len(dst)
	dst = JSON.AppendDownstreamFrame(dst, d, now)
	unbreak(dst[start:])
	return append(dst, eventEnd...)
}

// unbreak makes one line of valid JSON: it has line ends between its tokens only.
func unbreak(json []byte) {
	for _, end := range []byte{'\n', '\r'} {
		for rest := json; ; {
			i := bytes.IndexByte(rest, end)
			if i < 0 {
				break
			}
			rest[i] = ' '
			rest = rest[i+1:]
		}
	}
}

// AppendSSEClose appends the last event of a stream, of the type close: what a close frame says on a
// WebSocket. After 45xx it tells clients that reconnect by themselves to stay away, too.
func AppendSSEClose(dst []byte, code CloseCode, reason string) []byte {
	dst = append(dst, "event: close\n"...)
	if code >= CloseReplaced {
		dst = append(dst, "retry: "+stayAway+"\n"...)
	}
	dst = append(dst, eventData+`{"code":`...)
	dst = strconv.AppendUint(dst, uint64(code), 10)
	dst = append(dst, `,"reason":`...)
	dst = AppendQuoted(dst, reason)
	return append(dst, "}"+eventEnd...)
}
