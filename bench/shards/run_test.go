package shards

import (
	"context"
	"encoding/json"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRun(t *testing.T) {
	o := Options{
		Sessions: 20_000, Shards: 2, Loops: 2, Heartbeat: 2 * time.Second,
		Messages: 50_000, Pushes: 20_000, Targets: 50_000, LowRate: 1000,
		LowTime: 300 * time.Millisecond, IdleTime: 2500 * time.Millisecond,
	}
	r, err := Run(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := json.Marshal(r); err == nil {
		t.Logf("%s", out)
	}
	if r.Sessions != o.Sessions || len(r.Memory) != memorySteps+1 {
		t.Errorf("%d sessions, %d readings of the heap", r.Sessions, len(r.Memory))
	}
	// So few sessions share the queues and pages that are there once; a million take less each.
	if r.BytesPerSession < 100 || r.BytesPerSession > 450 {
		t.Errorf("%.0f bytes per session, want 100 to 450", r.BytesPerSession)
	}
	for name, least := range map[string]int64{
		"open": 20_000, "idle": 1, "messages": 50_000, "low load": 1, "pushes": 20_000, "fanout": 50_000,
	} {
		if s := r.Stage(name); s.Items < least || s.Items > 2*least+300 || s.CPU <= 0 || s.Rounds <= 0 {
			t.Errorf("stage %q: %+v, want %d items", name, *s, least)
		}
	}
	if s := r.Stage("messages"); s.Allocs > 1.5 {
		t.Errorf("%.2f allocations per message", s.Allocs)
	}
	// Each session is pinged and refreshed once per heartbeat.
	if r.Pings < 20_000 || r.Refreshes < 20_000 || r.Stage("idle").Pings < 20_000 {
		t.Errorf("%d pings, %d refreshes", r.Pings, r.Refreshes)
	}
	if r.Ticks == 0 || r.TickP99 <= 0 || r.TickMax < r.TickP99 {
		t.Errorf("%d ticks, 99%% in %s, all in %s", r.Ticks, r.TickP99, r.TickMax)
	}
}

// TestDurations: a native histogram is read to the width of its buckets.
func TestDurations(t *testing.T) {
	h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: "h", NativeHistogramBucketFactor: 1.1})
	read := func() durations {
		var m dto.Metric
		if err := h.Write(&m); err != nil {
			t.Fatal(err)
		}
		return durationsOf(m.GetHistogram())
	}
	h.Observe(1) // before
	before := read()
	for range 98 {
		h.Observe(0.0001)
	}
	h.Observe(0.003)
	h.Observe(0.02)
	d := read().since(before)
	for q, want := range map[float64]time.Duration{0.5: 100 * time.Microsecond, 0.99: 3 * time.Millisecond, 1: 20 * time.Millisecond} {
		if got := d.quantile(q); got < want || got > want*11/10 {
			t.Errorf("quantile %v: %s, want %s or a tenth more", q, got, want)
		}
	}
	if d.count() != 100 || d.over(2*time.Millisecond) != 2 {
		t.Errorf("%d, %d over 2 ms", d.count(), d.over(2*time.Millisecond))
	}
	if (durations{}).quantile(0.99) != 0 {
		t.Error("a quantile of nothing")
	}
}

// BenchmarkMillion is the whole measurement, once: -benchtime 1x.
func BenchmarkMillion(b *testing.B) {
	for b.Loop() {
		r, err := Run(b.Context(), Options{})
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(r.BytesPerSession, "B/session")
		b.ReportMetric(r.NsPerMessage, "ns/message")
		b.ReportMetric(r.NsPerPush, "ns/push")
		b.ReportMetric(r.NsPerTarget, "ns/target")
		b.ReportMetric(r.Stage("low load").Rounds, "wake-ups/message")
		b.ReportMetric(float64(r.TickP99.Microseconds()), "us/tick-p99")
		b.ReportMetric(float64(r.TickMax.Microseconds()), "us/tick-max")
		for _, s := range r.Stages {
			b.Logf("%+v", s)
		}
	}
}

func TestStops(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Run(ctx, Options{Sessions: 1000}); err == nil {
		t.Error("a run whose context has ended succeeds")
	}
}

func TestOptions(t *testing.T) {
	for name, o := range map[string]Options{
		"negative sessions": {Sessions: -1},
		"too many shards":   {Shards: 1000},
		"short heartbeat":   {Heartbeat: time.Millisecond},
	} {
		if _, err := Run(context.Background(), o); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestSlope(t *testing.T) {
	if got := slope([]MemoryPoint{{0, 1000}, {10, 3000}, {20, 5000}}); got != 200 {
		t.Errorf("slope %v", got)
	}
}
