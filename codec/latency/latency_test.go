package latency

import (
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"
)

func written(t testing.TB, m prometheus.Metric) *dto.Histogram {
	t.Helper()
	var d dto.Metric
	if err := m.Write(&d); err != nil {
		t.Fatal(err)
	}
	return d.GetHistogram()
}

// TestAgreesWithClient: every duration is in the buckets, classic and native, that Prometheus' own client
// puts it into.
func TestAgreesWithClient(t *testing.T) {
	theirs := prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "x_seconds", Help: "x", NativeHistogramBucketFactor: 1.1,
		NativeHistogramZeroThreshold: math.Exp2(firstNative / perOctave), Buckets: seconds(classic[:]),
	})
	h := New("x_seconds", "x")
	l := h.Local()
	observe := func(ns int64) {
		l.Observe(ns)
		theirs.Observe(float64(max(ns, 0)) / 1e9)
	}
	for _, ns := range []int64{-5, 0, 1, 2, 3, 7, 8, 122_070, 122_071} {
		observe(ns)
	}
	for _, b := range bounds {
		observe(b - 1)
		observe(b)
		observe(b + 1)
	}
	for range 200_000 {
		observe(int64(math.Exp(rand.Float64() * math.Log(1e14)))) // to 28 h
	}
	l.Flush()
	got, want := written(t, h), written(t, theirs)
	if d := got.GetSampleSum() - want.GetSampleSum(); math.Abs(d) > 1e-6*want.GetSampleSum() {
		t.Errorf("the sum is %v, want %v", got.GetSampleSum(), want.GetSampleSum())
	}
	// Beyond the last bound ours says the last bucket.
	got.SampleSum, want.SampleSum, want.CreatedTimestamp = nil, nil, nil
	last := len(want.PositiveDelta) - 1
	if want.PositiveDelta[last]+sum(want.PositiveDelta[:last]) != 1 {
		t.Fatal("the bound's own successor should stand alone in a bucket of its own")
	}
	want.PositiveDelta = want.PositiveDelta[:last]
	*want.PositiveSpan[len(want.PositiveSpan)-1].Length--
	want.PositiveDelta[last-1]++
	if !proto.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func sum(deltas []int64) (n int64) {
	for _, d := range deltas {
		n += d
	}
	return n
}

func seconds(list []time.Duration) (out []float64) {
	for _, d := range list {
		out = append(out, d.Seconds())
	}
	return out
}

// TestFind holds the short way to a cell against the long one.
func TestFind(t *testing.T) {
	long := func(ns int64) int {
		i := 0
		for i < len(bounds) && ns > bounds[i] {
			i++
		}
		return i
	}
	check := func(ns int64) {
		if got := find(ns); ns >= 0 && got != long(ns) {
			t.Fatalf("%d ns: cell %d, want %d", ns, got, long(ns))
		}
	}
	for shift := range 63 {
		for d := int64(-2); d <= 2; d++ {
			check(max(0, int64(1)<<shift+d))
		}
	}
	for _, b := range bounds {
		check(b - 1)
		check(b)
		check(b + 1)
	}
	check(math.MaxInt64)
	for range 100_000 {
		check(rand.Int64() >> rand.IntN(63))
	}
}

func TestEmptyAndText(t *testing.T) {
	h := New("x_seconds", "How long.")
	if d := written(t, h); d.GetSampleCount() != 0 || len(d.PositiveSpan) != 1 {
		t.Errorf("an empty histogram: %v", d)
	}
	l := h.Local()
	l.Flush()
	l.Observe(int64(3 * time.Millisecond))
	l.Observe(int64(20 * time.Second))
	if written(t, h).GetSampleCount() != 0 {
		t.Error("it counts before Flush")
	}
	l.Flush()
	want := "# HELP x_seconds How long.\n# TYPE x_seconds histogram\n"
	for _, le := range []string{"0.001 0", "0.0025 0", "0.005 1", "0.01 1", "0.025 1", "0.05 1", "0.1 1", "0.25 1", "0.5 1",
		"1 1", "2.5 1", "5 1", "10 1", "+Inf 2"} {
		bound, n, _ := strings.Cut(le, " ")
		want += `x_seconds_bucket{le="` + bound + `"} ` + n + "\n"
	}
	want += "x_seconds_sum 20.003\nx_seconds_count 2\n"
	if err := testutil.CollectAndCompare(h, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
}

// TestConcurrent: while shards add, a scrape's buckets and count agree, and in the end nothing is lost.
func TestConcurrent(t *testing.T) {
	h := New("x_seconds", "x")
	const writers, each = 4, 50_000
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			l := h.Local()
			for i := range each {
				l.Observe(int64(w+1) * int64(i) * 1000)
				if i%64 == 0 {
					l.Flush()
				}
			}
			l.Flush()
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		d := written(t, h)
		n, deltas := d.GetZeroCount(), int64(0)
		for _, delta := range d.PositiveDelta {
			deltas += delta
			n += uint64(deltas)
		}
		if n != d.GetSampleCount() {
			t.Fatalf("native buckets hold %d of %d", n, d.GetSampleCount())
		}
	}
	if n := written(t, h).GetSampleCount(); n != writers*each {
		t.Errorf("%d counted, want %d", n, writers*each)
	}
}

// TestSumOfWrongClocks: times in seconds that were taken for milliseconds are 55 years back, in every
// message; the sum, a counter, does not wrap.
func TestSumOfWrongClocks(t *testing.T) {
	h := New("x_seconds", "x")
	l := h.Local()
	const ns, flushes, each = 1_758_000_000 * int64(time.Second), 100, 100
	for i := range flushes {
		for range each {
			l.Observe(ns)
		}
		l.Observe(math.MaxInt64)
		l.Flush()
		want := float64(i+1) * (each*float64(ns) + math.MaxInt64) / 1e9
		if got := written(t, h).GetSampleSum(); math.Abs(got-want) > 1e-9*want {
			t.Fatalf("the sum is %v, want %v", got, want)
		}
	}
}

func TestAllocations(t *testing.T) {
	h := New("x_seconds", "x")
	l := h.Local()
	if n := testing.AllocsPerRun(100, func() {
		for i := range int64(100) {
			l.Observe(i * 1_000_000)
		}
		l.Flush()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkObserve(b *testing.B) {
	var sample [1024]int64
	for i := range sample {
		sample[i] = int64(math.Exp(rand.NormFloat64()*0.7) * 12e6)
	}
	b.Run("local", func(b *testing.B) {
		l := New("x_seconds", "x").Local()
		b.ReportAllocs()
		for i := range b.N {
			l.Observe(sample[i&1023])
			if i&63 == 63 { // a round's messages
				l.Flush()
			}
		}
	})
	b.Run("client", func(b *testing.B) { // what it is instead of
		h := prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "x_seconds", Help: "x", Buckets: seconds(classic[:]), NativeHistogramBucketFactor: 1.1,
		})
		b.ReportAllocs()
		for i := range b.N {
			h.Observe(float64(sample[i&1023]) / 1e9)
		}
	})
}
