package codec

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"
)

const (
	zeroTraceID = "00000000000000000000000000000000"

	someTrace = "0123456789abcdef0123456789abcdef"
	sampled   = "00-" + someTrace + "-00f067aa0ba902b7-01"
	unsampled = "00-" + someTrace + "-00f067aa0ba902b7-00"
)

func TestParseTraceParent(t *testing.T) {
	for _, tc := range []struct{ name, in, want string }{ // want: as it is handed on; empty: it is none
		{"sampled", sampled, sampled},
		{"not sampled", unsampled, unsampled},
		{"unknown flags", "00-" + someTrace + "-00f067aa0ba902b7-ff", "00-" + someTrace + "-00f067aa0ba902b7-ff"},
		{"later version", "cc-" + someTrace + "-00f067aa0ba902b7-01", sampled},
		{"later version with more", "cc-" + someTrace + "-00f067aa0ba902b7-01-what-comes", sampled},
		{"later version that runs on", "cc-" + someTrace + "-00f067aa0ba902b7-01.", ""},
		{"version 00 with more", sampled + "-01", ""},
		{"forbidden version", "ff-" + someTrace + "-00f067aa0ba902b7-01", ""},
		{"no trace", "00-" + zeroTraceID + "-00f067aa0ba902b7-01", ""},
		{"no span", "00-" + someTrace + "-0000000000000000-01", ""},
		{"upper case", strings.ToUpper(sampled), ""},
		{"no hex", "00-" + someTrace[1:] + "g-00f067aa0ba902b7-01", ""},
		{"flags no hex", sampled[:53] + "0x", ""},
		{"version no hex", "0x" + sampled[2:], ""},
		{"dashes elsewhere", strings.Replace(sampled, "-", "0", 1), ""},
		{"cut off", sampled[:54], ""},
		{"empty", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, ok := ParseTraceParent([]byte(tc.in))
			if ok != (tc.want != "") {
				t.Fatalf("taken: %v", ok)
			}
			if !ok {
				if c != (TraceContext{}) {
					t.Errorf("%+v", c)
				}
				return
			}
			if got := string(c.AppendTraceParent(nil)); got != tc.want {
				t.Errorf("handed on as %s", got)
			}
			if again, ok := ParseTraceID(tc.in); !ok || again != c {
				t.Errorf("as text %+v", again)
			}
		})
	}
	if c, ok := ParseTraceID(someTrace); !ok || c.SpanID != [8]byte{} || c.Sampled() {
		t.Errorf("a trace id alone: %+v", c)
	}
}

// TestTraceOfMessage: what a record says of its trace, by what its message says and whether it is traced.
func TestTraceOfMessage(t *testing.T) {
	all, none := NewSampler(1, 1000), NewSampler(0, 1000)
	for _, tc := range []struct {
		name    string
		sampler *Sampler
		fields  string
		header  string // the record's traceparent; "new" where it is not the message's
		trace   string // trace_id; empty: a new one
		span    bool
	}{
		{"off", nil, ``, "new", "", false},
		{"off, sampled by the client", nil, `,"traceparent":"` + sampled + `"`, sampled, someTrace, false},
		{"off, trace id", nil, `,"trace_id":"` + someTrace + `"`, "new", someTrace, false},
		{"client samples", none, `,"traceparent":"` + sampled + `"`, "new", someTrace, true},
		{"client samples in trace_id", none, `,"trace_id":"` + sampled + `"`, "new", someTrace, true},
		{"client does not sample", all, `,"traceparent":"` + unsampled + `"`, unsampled, someTrace, false},
		{"begins here", all, ``, "new", "", true},
		{"begins here and is not recorded", none, ``, "new", "", false},
		{"trace id", all, `,"trace_id":"` + someTrace + `"`, "new", someTrace, true},
		{"trace id that is not recorded", none, `,"trace_id":"` + someTrace + `"`, "new", someTrace, false},
		{"both, and another trace id", none, `,"traceparent":"` + sampled + `","trace_id":"` + strings.Repeat("9", 32) + `"`, "new", someTrace, true},
		{"later version", all, `,"traceparent":"cc` + unsampled[2:] + `-more"`, unsampled, someTrace, false},
		{"not valid", all, `,"traceparent":"` + sampled + `9"`, "new", "", true},
	} {
		for _, p := range []Protocol{JSON, Proto} {
			if p == Proto && strings.Contains(tc.fields, "traceparent") {
				continue // it has the one field
			}
			t.Run(tc.name, func(t *testing.T) {
				frame := []byte(`{"type":"m","message_id":"c-1","data":1` + tc.fields + `}`)
				if p == Proto {
					var in struct {
						TraceID string `json:"trace_id"`
					}
					if err := json.Unmarshal(frame, &in); err != nil {
						t.Fatal(err)
					}
					frame = appendField(appendField(appendField(nil, fieldType, "m"), fieldData, "1"), fieldTraceID, in.TraceID)
				}
				var m ClientMessage
				if err := p.ParseClient(frame, &m); err != nil {
					t.Fatal(err)
				}
				b := NewBuilder("g", 1, tc.sampler)
				before := time.Now()
				u := b.Build(&m, "u", 1, 1)
				var r record
				if err := json.Unmarshal(u.Value, &r); err != nil {
					t.Fatal(err)
				}
				checkTraceParent(t, string(u.TraceParent), r.TraceID)
				if tc.trace != "" && r.TraceID != tc.trace {
					t.Errorf("trace_id %s", r.TraceID)
				}
				if tc.header != "new" && string(u.TraceParent) != tc.header {
					t.Errorf("traceparent %s", u.TraceParent)
				}
				if (u.Span != nil) != tc.span {
					t.Fatalf("span %+v", u.Span)
				}
				c, _ := ParseTraceParent(u.TraceParent)
				if c.Sampled() != (tc.span || tc.header == sampled) {
					t.Errorf("traceparent %s", u.TraceParent)
				}
				if u.Span == nil {
					return
				}
				var parent [8]byte
				if in, _ := ParseTraceParent(m.TraceParent); in.SpanID != parent {
					parent = in.SpanID
				}
				if c != u.Span.TraceContext || u.Span.Parent != parent || c.SpanID == parent || u.Span.Begun.Before(before) {
					t.Errorf("span %+v, traceparent %s", u.Span, u.TraceParent)
				}
				if u.Release(); u.Span != nil {
					t.Error("the pool keeps a span")
				}
			})
		}
	}
}

// TestSamplerRatio: of traces that begin here about so many are recorded, and all who decide by the id
// decide alike.
func TestSamplerRatio(t *testing.T) {
	const n = 100_000
	s, other := NewSampler(0.1, n), NewSampler(0.1, n)
	now := time.Now()
	recorded := 0
	for range n {
		span := s.Continue(TraceContext{}, now)
		if span == nil {
			continue
		}
		recorded++
		if again := other.Continue(TraceContext{TraceID: span.TraceID}, now); again == nil || again.SpanID == span.SpanID {
			t.Fatalf("another one says no to %+v", span)
		}
	}
	if recorded < n/10-1000 || recorded > n/10+1000 { // ten standard deviations
		t.Errorf("%d of %d", recorded, n)
	}
	b := NewBuilder("g", 1, NewSampler(0.1, n))
	m := ClientMessage{Type: []byte("m"), Data: []byte("1")}
	recorded = 0
	for range n {
		u := b.Build(&m, "u", 1, 1)
		if u.Span != nil {
			recorded++
		}
		u.Release()
	}
	if recorded < n/10-1000 || recorded > n/10+1000 {
		t.Errorf("%d of %d messages", recorded, n)
	}
}

func TestSamplerLimit(t *testing.T) {
	in, _ := ParseTraceParent(sampled)
	s := NewSampler(0, 3)
	second := time.Unix(1_760_000_000, 0)
	count := func(at time.Time) (n int) {
		for range 10 {
			if s.Continue(in, at) != nil {
				n++
			}
		}
		return n
	}
	if n, m := count(second), count(second.Add(time.Second)); n != 3 || m != 3 || s.Limited() != 14 {
		t.Errorf("%d and %d of ten, %d limited", n, m, s.Limited())
	}
	if s.Continue(TraceContext{}, second) != nil || s.Limited() != 14 {
		t.Error("what would not be recorded anyway counts")
	}
	if (*Sampler)(nil).Continue(in, second) != nil {
		t.Error("recorded without a sampler")
	}
}

// TestTracingCostsNothing: a message that is not traced allocates no more, tracing on or off.
func TestTracingCostsNothing(t *testing.T) {
	for _, tc := range []struct {
		name    string
		sampler *Sampler
		extra   string
	}{
		{"off", nil, ""}, {"off, with a traceparent", nil, `,"traceparent":"` + sampled + `"`},
		{"on", NewSampler(0, 1000), ""}, {"on, with a traceparent", NewSampler(1, 1000), `,"traceparent":"` + unsampled + `"`},
		{"over the limit", NewSampler(1, 0), ""},
	} {
		b := NewBuilder("g", 1, tc.sampler)
		frame := []byte(`{"type":"m","message_id":"c-1","data":1` + tc.extra + `}`)
		b.build(t, frame)
		if n := testing.AllocsPerRun(1000, func() { b.build(t, frame) }); n >= 1 { // a collection may empty the pool
			t.Errorf("%s: %v allocations", tc.name, n)
		}
	}
}

func (b *Builder) build(t testing.TB, frame []byte) {
	var m ClientMessage
	if err := ParseClient(frame, &m); err != nil {
		t.Fatal(err)
	}
	b.Build(&m, "user-1", 1, 1_760_000_000_000).Release()
}

// FuzzTraceParent: what is taken is handed on so that it is taken again, and no part of it is empty.
func FuzzTraceParent(f *testing.F) {
	f.Add([]byte(sampled))
	f.Add([]byte(unsampled))
	f.Add([]byte("cc" + sampled[2:] + "-more"))
	f.Add([]byte(someTrace))
	f.Fuzz(func(t *testing.T, in []byte) {
		c, ok := ParseTraceID(in)
		if !ok {
			return
		}
		if c.TraceID == [16]byte{} || len(in) != 32 && c.SpanID == [8]byte{} || !bytes.Contains(in, appendHex64(nil, uint64(c.TraceID[15]))[14:]) {
			t.Fatalf("%q is %+v", in, c)
		}
		if c.SpanID == [8]byte{} {
			return
		}
		text := c.AppendTraceParent(nil)
		if again, ok := ParseTraceParent(text); !ok || again != c || len(text) != TraceParentLen {
			t.Fatalf("%q is handed on as %q", in, text)
		}
	})
}

func BenchmarkBuildTraced(b *testing.B) {
	for _, bc := range []struct {
		name    string
		sampler *Sampler
		extra   string
	}{
		{"off", nil, ""},
		{"on, not sampled", NewSampler(0, 1), ""},
		{"on, unsampled parent", NewSampler(0, 1), `,"traceparent":"` + unsampled + `"`},
		{"on, sampled", NewSampler(1, 1<<40), ""},
	} {
		b.Run(bc.name, func(b *testing.B) {
			builder := NewBuilder("gateway-1", 1, bc.sampler)
			frame := []byte(`{"type":"send-message","message_id":"c-1","data":{"conversation_id":"v1","content":"` +
				strings.Repeat("x", 100) + `"},"timestamp":1760000000000` + bc.extra + `}`)
			b.ReportAllocs()
			for b.Loop() {
				builder.build(b, frame)
			}
		})
	}
}
