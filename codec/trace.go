package codec

import (
	"encoding/binary"
	"math/rand/v2"
	"sync/atomic"
	"time"
)

// TraceParentLen is the length of a W3C traceparent of version 00.
const TraceParentLen = 55

// TraceContext names a span of a trace and says whether it is recorded: what a traceparent says (W3C
// Trace Context, section 3.2).
type TraceContext struct {
	TraceID [16]byte
	SpanID  [8]byte // zero: the trace has a name, but no span of it is known
	Flags   byte
}

// The flags that are known; others are not handed on in a context of our own.
const (
	flagSampled = 1
	knownFlags  = 3 // sampled, random trace id
)

// Sampled tells whether whoever made the span records it.
func (c TraceContext) Sampled() bool { return c.Flags&flagSampled != 0 }

// NewTraceContext returns the context of a trace that begins and is not recorded.
func NewTraceContext() (c TraceContext) {
	c.draw()
	putRandom(c.SpanID[:])
	return c
}

// draw gives the context the id of a new trace.
func (c *TraceContext) draw() {
	putRandom(c.TraceID[:8])
	putRandom(c.TraceID[8:])
}

// putRandom fills eight bytes, not all zero.
func putRandom(b []byte) { binary.BigEndian.PutUint64(b, rand.Uint64()|1) } // #nosec G404 -- not a secret

// ParseTraceParent reads a traceparent; one of a later version is read as far as 00 knows it. ok is false
// for what is none, which is to be ignored.
func ParseTraceParent[T string | []byte](s T) (c TraceContext, ok bool) {
	if len(s) < TraceParentLen || s[2] != '-' || s[35] != '-' || s[52] != '-' {
		return c, false
	}
	var version, flags [1]byte
	if !decodeHex(version[:], s[:2]) || !decodeHex(c.TraceID[:], s[3:35]) || !decodeHex(c.SpanID[:], s[36:52]) ||
		!decodeHex(flags[:], s[53:55]) || c.TraceID == [16]byte{} || c.SpanID == [8]byte{} {
		return TraceContext{}, false
	}
	if version[0] == 0xff || len(s) > TraceParentLen && (version[0] == 0 || s[TraceParentLen] != '-') {
		return TraceContext{}, false
	}
	c.Flags = flags[0]
	return c, true
}

// ParseTraceID reads the 32 hex digits of a trace id, or a traceparent: a trace_id field may hold either.
func ParseTraceID[T string | []byte](s T) (c TraceContext, ok bool) {
	if len(s) != 32 {
		return ParseTraceParent(s)
	}
	if !decodeHex(c.TraceID[:], s) || c.TraceID == [16]byte{} {
		return TraceContext{}, false
	}
	return c, true
}

// AppendTraceParent appends the context as a traceparent of version 00.
func (c TraceContext) AppendTraceParent(dst []byte) []byte {
	dst = append(dst, "00-"...)
	dst = appendHex64(dst, binary.BigEndian.Uint64(c.TraceID[:8]))
	dst = appendHex64(dst, binary.BigEndian.Uint64(c.TraceID[8:]))
	dst = append(dst, '-')
	dst = appendHex64(dst, binary.BigEndian.Uint64(c.SpanID[:]))
	return append(dst, '-', hexDigits[c.Flags>>4], hexDigits[c.Flags&15])
}

// decodeHex reads lower-case hex digits, two for each byte of dst.
func decodeHex[T string | []byte](dst []byte, s T) bool {
	for i := range dst {
		high, low := hexValue(s[2*i]), hexValue(s[2*i+1])
		if high|low > 15 {
			return false
		}
		dst[i] = high<<4 | low
	}
	return true
}

// hexValue is the value of a lower-case hex digit; more than 15: it is none.
func hexValue(c byte) byte {
	switch {
	case c >= '0' && c <= '9':
		return c - '0'
	case c >= 'a' && c <= 'f':
		return c - 'a' + 10
	}
	return 0xff
}

// Span is a recorded operation under way. Its context is what those who go on from it are told.
type Span struct {
	TraceContext
	Parent [8]byte // zero: the trace begins with this span
	Begun  time.Time
}

// RecordTrace is what became of a downstream record that is traced: one span, from reading it until the
// last of its deliveries has ended.
type RecordTrace struct {
	*Span
	Topic      string
	Group      string // the consumer group that reads it
	Partition  int32
	Offset     int64
	MessageID  string // empty: the record could not be read
	Ends       [NumEnds]int
	DeadLetter error // why it could not be read
	// Abandoned: the partition was lost before all had ended; its next reader reads the record again.
	Abandoned bool
}

// Sampler decides which traces are recorded, once where something enters the gateway. Any goroutine may
// call its methods, on nil too: then none is.
type Sampler struct {
	bound     uint64 // of what begins here, traces below it by the last 63 bits of their ids
	perSecond int64
	second    atomic.Int64 // the Unix second that taken is of
	taken     atomic.Int64
	limited   atomic.Int64
}

// NewSampler returns a Sampler that goes by what came with a trace, and records a ratio of 0 to 1 of those
// that begin here. Beyond so many spans in a second none is recorded: anybody can ask for one.
func NewSampler(ratio float64, perSecond int) *Sampler {
	s := &Sampler{bound: uint64(max(0, ratio) * (1 << 63)), perSecond: int64(perSecond)}
	if ratio >= 1 {
		s.bound = 1 << 63
	}
	return s
}

// Limited is how many spans were not recorded because there were too many in their second.
func (s *Sampler) Limited() int64 { return s.limited.Load() }

// Continue begins a span under in, or, where in has no span, one with which the trace begins; without a
// trace id, too, it gets a new one. nil: it is not recorded, and in is what others are told.
func (s *Sampler) Continue(in TraceContext, now time.Time) *Span {
	if s == nil {
		return nil
	}
	if in.TraceID == [16]byte{} {
		in.draw()
	}
	if in.SpanID == [8]byte{} {
		if !s.chosen(binary.BigEndian.Uint64(in.TraceID[8:])) {
			return nil
		}
		in.Flags = flagSampled
	}
	if !in.Sampled() || !s.take(now) {
		return nil
	}
	span := &Span{TraceContext: in, Parent: in.SpanID, Begun: now}
	span.Flags &= knownFlags
	putRandom(span.SpanID[:])
	return span
}

// chosen tells whether a trace that begins here is of those that are recorded, by the end of its id: so
// all who decide by it decide alike.
func (s *Sampler) chosen(low uint64) bool { return low>>1 < s.bound }

func (s *Sampler) take(now time.Time) bool {
	second := now.Unix()
	if old := s.second.Load(); old != second && s.second.CompareAndSwap(old, second) {
		s.taken.Store(0)
	}
	if s.taken.Add(1) > s.perSecond {
		s.limited.Add(1)
		return false
	}
	return true
}

// continueText is Continue for a client message whose traceparent was written already; begins: by the
// gateway. Most are not recorded, and the text says so without being parsed.
func (s *Sampler) continueText(text []byte, begins bool) *Span {
	var low [8]byte
	switch {
	case s == nil, !begins && hexValue(text[TraceParentLen-1])&flagSampled == 0:
		return nil
	case begins && (!decodeHex(low[:], text[19:35]) || !s.chosen(binary.BigEndian.Uint64(low[:]))):
		return nil
	}
	in, _ := ParseTraceParent(text)
	if begins {
		in.SpanID = [8]byte{}
	}
	return s.Continue(in, time.Now())
}
