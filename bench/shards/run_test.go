package shards

import (
	"context"
	"encoding/json"
	"os"
	"testing"
	"time"

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
	if r.BytesPerSession < 100 || r.BytesPerSession > 300 {
		t.Errorf("%.0f bytes per session, want 100 to 300", r.BytesPerSession)
	}
	for name, least := range map[string]int64{
		"open": 20_000, "idle": 1, "messages": 50_000, "low load": 1, "pushes": 20_000, "fanout": 50_000,
	} {
		if s := r.Stage(name); s.Items < least || s.Items > 2*least+300 || s.CPU <= 0 || s.Rounds <= 0 {
			t.Errorf("stage %q: %+v, want %d items", name, *s, least)
		}
	}
	if s := r.Stage("messages"); s.Allocs > 2.5 {
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

// TestMillion is the whole measurement, on request.
func TestMillion(t *testing.T) {
	if os.Getenv("SHARDS_BENCH") == "" {
		t.Skip("SHARDS_BENCH is not set")
	}
	r, err := Run(context.Background(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%.0f B/session (slope %.0f), %.0f ns/message, %.0f ns/push, %.0f ns/target; ticks %d p99 %s max %s over2ms %d",
		r.BytesPerSession, r.BytesSlope, r.NsPerMessage, r.NsPerPush, r.NsPerTarget, r.Ticks, r.TickP99, r.TickMax, r.Over2ms)
	for _, s := range r.Stages {
		t.Logf("%-9s n=%d %.2fs cpu %.0f busy %.0f gen %.0f rounds %.4f batches %.4f allocs %.3f pings %d",
			s.Name, s.Items, s.Seconds, s.CPU, s.Busy, s.Generator, s.Rounds, s.Batches, s.Allocs, s.Pings)
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
