package codec

import (
	crand "crypto/rand"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
)

const (
	// recordOverhead is about what a record holds beside the user's own bytes.
	recordOverhead = 512
	// maxPooledRecord keeps a few huge messages from staying in the pool.
	maxPooledRecord = 16 << 10
)

// records is shared by all Builders: a record is built on one goroutine and released on another.
var records = sync.Pool{New: func() any { return new(Upstream) }}

// Builder makes upstream records. It belongs to one goroutine: each event loop has its own.
type Builder struct {
	gateway []byte // quoted
	nonce   uint64
	ulids   ulidSource
	sampler *Sampler
}

// NewBuilder returns a Builder for the gateway; nonce is the one of its session names, sampler says which
// messages are traced.
func NewBuilder(gatewayID string, nonce uint64, sampler *Sampler) *Builder {
	var seed [32]byte
	_, _ = crand.Read(seed[:]) // never fails, says crypto/rand
	return &Builder{
		gateway: AppendQuoted(nil, gatewayID),
		nonce:   nonce,
		ulids:   ulidSource{random: rand.NewChaCha8(seed)},
		sampler: sampler,
	}
}

// Build makes the record of message m, sent by user in session id (zero: the HTTP API), at the
// gateway's time now in Unix ms. Nothing of m is kept.
func (b *Builder) Build(m *ClientMessage, user string, id SessionID, now int64) *Upstream {
	u, _ := records.Get().(*Upstream)
	u.Session, u.User, u.Temp = id, user, m.Temp
	buf := slices.Grow(u.buf[:0], recordOverhead+len(m.Data)+2*len(m.ClientMsgID)+2*len(user))

	buf = append(buf, `{"message_id":"`...)
	idStart := len(buf)
	buf = b.ulids.append(buf, now)
	idEnd := len(buf)
	buf = append(buf, `","trace_id":"`...)
	traceStart := len(buf)
	if len(m.TraceID) > 0 {
		buf = append(buf, m.TraceID...)
	} else {
		buf = b.appendHex(b.appendHex(buf))
	}
	traceEnd := len(buf)
	buf = append(buf, `","user_id":`...)
	buf = AppendQuoted(buf, user)
	buf = append(buf, `,"gateway_id":`...)
	buf = append(buf, b.gateway...)
	if id != 0 {
		buf = append(buf, `,"session_id":"`...)
		buf = id.AppendName(buf, b.nonce)
		buf = append(buf, '"')
	}
	if m.DeviceID != "" {
		buf = append(buf, `,"device_id":`...)
		buf = AppendQuoted(buf, m.DeviceID)
	}
	buf = append(buf, `,"type":`...)
	buf = AppendQuoted(buf, m.Type)
	if len(m.ClientMsgID) > 0 {
		buf = append(buf, `,"client_msg_id":`...)
		buf = AppendQuoted(buf, m.ClientMsgID)
	}
	buf = append(buf, `,"data":`...)
	buf = append(buf, m.Data...)
	buf = append(buf, `,"timestamp":`...)
	buf = strconv.AppendInt(buf, now, 10)
	if m.Timestamp != 0 {
		buf = append(buf, `,"client_timestamp":`...)
		buf = strconv.AppendInt(buf, m.Timestamp, 10)
	}
	buf = append(buf, '}')
	valueEnd := len(buf)

	// Behind the value stand the texts that headers and acks need, unescaped.
	buf = append(buf, m.Type...)
	typeEnd := len(buf)
	buf = append(buf, m.ClientMsgID...)
	nameEnd := len(buf)
	buf = append(buf, "00-"...)
	if len(m.TraceParent) > 0 {
		buf = append(buf, m.TraceParent[3:]...) // as it came, for whoever traces
	} else {
		buf = append(buf, buf[traceStart:traceEnd]...)
		buf = append(buf, '-')
		buf = b.appendHex(buf)
		buf = append(buf, "-00"...)
	}
	if b.sampler != nil {
		if u.Span = b.sampler.continueText(buf[nameEnd:], len(m.TraceParent) == 0); u.Span != nil {
			buf = u.Span.AppendTraceParent(buf[:nameEnd])
		}
	}

	u.buf = buf
	u.Value = buf[:valueEnd:valueEnd]
	u.MessageID = buf[idStart:idEnd:idEnd]
	u.Type = buf[valueEnd:typeEnd:typeEnd]
	u.ClientMsgID = buf[typeEnd:nameEnd:nameEnd]
	u.TraceParent = buf[nameEnd : nameEnd+TraceParentLen : nameEnd+TraceParentLen]
	return u
}

// appendHex appends 16 random hex digits, not all zero.
func (b *Builder) appendHex(dst []byte) []byte { return appendHex64(dst, b.ulids.random.Uint64()|1) }

// Release gives the record back to the pool. Nobody may hold it, or a slice of it, afterwards.
func (u *Upstream) Release() {
	buf := u.buf
	if cap(buf) > maxPooledRecord {
		buf = nil
	}
	*u = Upstream{buf: buf[:0]}
	records.Put(u)
}

// Shrink gives up all but what an ack needs: the record waits, and is not stored itself.
func (u *Upstream) Shrink() {
	n := len(u.ClientMsgID)
	buf := append(append(make([]byte, 0, n+len(u.MessageID)), u.ClientMsgID...), u.MessageID...)
	u.buf, u.ClientMsgID, u.MessageID = buf, buf[:n:n], buf[n:]
	u.Value, u.Type, u.TraceParent = nil, nil, nil
}

// Size is what the record counts against the cap on bytes in flight.
func (u *Upstream) Size() int { return len(u.buf) + len(u.User) }
