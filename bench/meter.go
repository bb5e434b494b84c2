package bench

import (
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"im-gateway/bench/report"
)

// longest is the longest latency that is recorded as it is; what is above counts as this.
const longest = 2 * time.Minute

func newHistogram() *hdrhistogram.Histogram {
	return hdrhistogram.New(1, longest.Microseconds(), 3)
}

// meter counts and times the events of one stage. It belongs to the loop.
type meter struct {
	start    time.Time // of the load, warm-up included
	from, to int64     // the measured time, Unix ns
	names    []string
	tracks   map[string]*track
	series   []report.Point
}

// track is one kind of event: how many, when, and how late.
type track struct {
	total      int64 // all
	measured   int64 // that happened within the measured time
	lastSecond int64
	hist, sec  *hdrhistogram.Histogram // nil for events that are only counted
}

func newMeter(start time.Time, warmup, length time.Duration) *meter {
	from := start.Add(warmup)
	return &meter{start: start, from: from.UnixNano(), to: from.Add(length).UnixNano(), tracks: map[string]*track{}}
}

// track finds or makes the track of a name; timed ones keep a histogram.
func (m *meter) track(name string, timed bool) *track {
	t := m.tracks[name]
	if t == nil {
		t = &track{}
		if timed {
			t.hist, t.sec = newHistogram(), newHistogram()
		}
		m.tracks[name] = t
		m.names = append(m.names, name)
	}
	return t
}

// count counts one event at now.
func (m *meter) count(t *track, now int64) {
	t.total++
	if now >= m.from && now < m.to {
		t.measured++
	}
}

// took counts one event at now and, when it was due within the measured time, its latency.
func (m *meter) took(t *track, due, now int64) {
	m.count(t, now)
	us := min(max(1, (now-due)/1000), longest.Microseconds())
	_ = t.sec.RecordValue(us) // in range
	if due >= m.from && due < m.to {
		_ = t.hist.RecordValue(us)
	}
}

// tick closes a second of the series.
func (m *meter) tick(now time.Time) report.Point {
	p := report.Point{T: now.Sub(m.start).Seconds(), Rates: map[string]float64{}, P50: map[string]float64{}, P99: map[string]float64{}}
	n := now.UnixNano()
	p.Measured = n-int64(time.Second/2) >= m.from && n-int64(time.Second/2) < m.to // the second's middle
	span := p.T
	if k := len(m.series); k > 0 {
		span -= m.series[k-1].T
	}
	for _, name := range m.names {
		t := m.tracks[name]
		if span > 0 {
			p.Rates[name] = float64(t.total-t.lastSecond) / span
		}
		t.lastSecond = t.total
		if t.sec != nil && t.sec.TotalCount() > 0 {
			p.P50[name] = float64(t.sec.ValueAtQuantile(50))
			p.P99[name] = float64(t.sec.ValueAtQuantile(99))
			t.sec.Reset()
		}
	}
	m.series = append(m.series, p)
	return p
}
