// Package latency counts durations on the hot path, for Prometheus. One goroutine counts into a Local of
// its own by plain additions, and adds what it has to the Histogram that its peers share once for many
// messages; neither allocates. A Histogram is exposed with classic buckets and with native ones, a tenth
// wide, for a Prometheus that takes those.
package latency

import (
	"math"
	"math/bits"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"
)

// Native buckets end at 2^(i/8) seconds, for i from firstNative to lastNative: at 122 us to 36 h. What is
// shorter counts as zero, what is longer as in the last one.
const (
	schema      = 3
	perOctave   = 1 << schema
	firstNative = -13 * perOctave
	lastNative  = 17 * perOctave
)

// classic are the upper bounds of the classic buckets.
var classic = [...]time.Duration{
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond,
	50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2500 * time.Millisecond, 5 * time.Second, 10 * time.Second,
}

// cells are what is counted: the durations between two neighbouring bounds, native or classic, so that the
// buckets of both kinds are sums of them.
const cells = lastNative - firstNative + 1 + len(classic) + 1

// cell says which buckets a cell is in.
type cell struct {
	native  int // firstNative: the zero bucket
	classic int // len(classic): beyond the last
}

// startBits of a duration below its leading one choose, with its length, where the search for its cell
// begins: a bound or two before it.
const startBits = 3

var (
	bounds [cells - 1]int64 // of the cells, upper, in ns, inclusive, ascending
	inside [cells]cell
	starts [65 << startBits]int16
)

func init() { // the tables follow from the constants alone
	i := 0
	c := cell{native: firstNative}
	for ; i < len(bounds); i++ {
		ns := int64(math.MaxInt64)
		if c.native <= lastNative {
			ns = int64(math.Exp2(float64(c.native)/perOctave) * float64(time.Second))
		}
		inside[i] = c
		if c.classic < len(classic) && int64(classic[c.classic]) < ns {
			bounds[i] = int64(classic[c.classic])
			c.classic++
		} else {
			bounds[i] = ns
			c.native++
		}
	}
	inside[i] = cell{lastNative, len(classic)}
	for i := range starts {
		length, next := i>>startBits, uint64(i&(1<<startBits-1))
		least := (1<<startBits | next) << (63 - startBits) >> (64 - length)
		at, _ := slices.BinarySearch(bounds[:], int64(least))
		starts[i] = int16(at)
	}
}

// find returns the cell of a duration in ns, which is not negative.
func find(ns int64) int {
	zeros := bits.LeadingZeros64(uint64(ns))
	next := uint64(ns) << zeros >> (63 - startBits) & (1<<startBits - 1)
	i := int(starts[uint64(64-zeros)<<startBits|next])
	for i < len(bounds) && ns > bounds[i] {
		i++
	}
	return i
}

// Histogram is what the Locals have added to it. Any goroutine may collect it.
type Histogram struct {
	desc   *prometheus.Desc
	counts [cells]atomic.Uint64
	sum    atomic.Uint64 // of all durations: a float64 in seconds, which no clock that is wrong can overflow
}

// New returns an empty histogram; the caller registers it.
func New(name, help string) *Histogram {
	return &Histogram{desc: prometheus.NewDesc(name, help, nil, nil)}
}

// Local is one goroutine's part of a histogram; Histogram.Local makes one.
type Local struct {
	of     *Histogram
	sum    float64 // ns, not added to the histogram yet
	lo, hi int     // the cells in use are between them
	counts [cells]uint32
}

// Local returns a Local that adds to h.
func (h *Histogram) Local() Local { return Local{of: h, lo: cells} }

// Observe counts a duration; one that is negative, as clocks differ, counts as zero.
func (l *Local) Observe(ns int64) {
	ns = max(ns, 0)
	i := find(ns)
	l.counts[i]++
	l.sum += float64(ns)
	l.lo, l.hi = min(l.lo, i), max(l.hi, i)
}

// Flush adds what was counted to the histogram.
func (l *Local) Flush() {
	if l.lo != cells {
		l.flush()
	}
}

// flush stands apart so that Flush is inlined: there is often nothing to add.
//
//go:noinline
func (l *Local) flush() {
	for i := l.lo; i <= l.hi; i++ {
		if n := l.counts[i]; n != 0 {
			l.of.counts[i].Add(uint64(n))
			l.counts[i] = 0
		}
	}
	for {
		old := l.of.sum.Load()
		if l.of.sum.CompareAndSwap(old, math.Float64bits(math.Float64frombits(old)+l.sum/float64(time.Second))) {
			break
		}
	}
	l.sum, l.lo, l.hi = 0, cells, 0
}

// Describe implements prometheus.Collector.
func (h *Histogram) Describe(ch chan<- *prometheus.Desc) { ch <- h.desc }

// Collect implements prometheus.Collector.
func (h *Histogram) Collect(ch chan<- prometheus.Metric) { ch <- h }

// Desc implements prometheus.Metric.
func (h *Histogram) Desc() *prometheus.Desc { return h.desc }

// Write implements prometheus.Metric. Count and buckets agree whatever is added meanwhile.
func (h *Histogram) Write(m *dto.Metric) error {
	var byClassic [len(classic) + 1]uint64
	byNative := make([]uint64, lastNative-firstNative+1)
	for i := range h.counts {
		n := h.counts[i].Load()
		byClassic[inside[i].classic] += n
		byNative[inside[i].native-firstNative] += n
	}
	out := &dto.Histogram{
		SampleSum:     proto.Float64(math.Float64frombits(h.sum.Load())),
		Schema:        proto.Int32(schema),
		ZeroThreshold: proto.Float64(math.Exp2(firstNative / perOctave)),
		ZeroCount:     proto.Uint64(byNative[0]),
	}
	var sum uint64
	for i, bound := range classic {
		sum += byClassic[i]
		out.Bucket = append(out.Bucket, &dto.Bucket{UpperBound: proto.Float64(bound.Seconds()), CumulativeCount: proto.Uint64(sum)})
	}
	out.SampleCount = proto.Uint64(sum + byClassic[len(classic)])
	addNative(out, byNative)
	m.Histogram = out
	return nil
}

// addNative adds the buckets that have something in them, and at least an empty span: it tells a native
// histogram from one that is not.
func addNative(out *dto.Histogram, byNative []uint64) {
	last, before := 0, int64(0)
	for i := 1; i < len(byNative); i++ {
		if byNative[i] == 0 {
			continue
		}
		switch n := len(out.PositiveSpan); {
		case n == 0:
			out.PositiveSpan = append(out.PositiveSpan, &dto.BucketSpan{Offset: proto.Int32(int32(firstNative + i)), Length: proto.Uint32(1)})
		case last == i-1:
			*out.PositiveSpan[n-1].Length++
		default:
			out.PositiveSpan = append(out.PositiveSpan, &dto.BucketSpan{Offset: proto.Int32(int32(i - last - 1)), Length: proto.Uint32(1)})
		}
		out.PositiveDelta = append(out.PositiveDelta, int64(byNative[i])-before)
		last, before = i, int64(byNative[i])
	}
	if len(out.PositiveSpan) == 0 && out.GetZeroCount() == 0 {
		out.PositiveSpan = []*dto.BucketSpan{{Offset: proto.Int32(0), Length: proto.Uint32(0)}}
	}
}
