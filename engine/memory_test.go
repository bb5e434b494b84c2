package engine

import (
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

func TestGCRoom(t *testing.T) {
	const mib = 1 << 20
	for _, tc := range []struct {
		room, live, want int64
		apart            time.Duration
	}{
		{6 * mib, 100 * mib, 12 * mib, time.Millisecond},   // busy: more
		{60 * mib, 100 * mib, 100 * mib, time.Millisecond}, // never more than the live heap
		{12 * mib, 100 * mib, 12 * mib, 100 * time.Millisecond},
		{12 * mib, 100 * mib, 6 * mib, time.Second}, // at rest: less
		{6 * mib, 100 * mib, 6 * mib, time.Second},  // never less than the least
		{6 * mib, 1 * mib, 6 * mib, time.Millisecond},
	} {
		if got := gcRoom(tc.room, tc.live, tc.apart); got != tc.want {
			t.Errorf("room %d, live %d, %s apart: %d, want %d", tc.room, tc.live, tc.apart, got, tc.want)
		}
	}
	for _, tc := range []struct {
		room, live int64
		want       int
	}{{6 * mib, 60 * mib, 10}, {6 * mib, 600 * mib, 5}, {6 * mib, 0, 1000}, {60 * mib, 60 * mib, 100}} {
		if got := gcPercent(tc.room, tc.live); got != tc.want {
			t.Errorf("room %d, live %d: GOGC %d, want %d", tc.room, tc.live, got, tc.want)
		}
	}
}

// A large live heap at rest leaves room of bytes, not of a multiple of itself.
func TestPaceGC(t *testing.T) {
	t.Setenv("GOGC", "off") // as the operator's: left alone
	PaceGC()()
	before := debug.SetGCPercent(100)
	defer debug.SetGCPercent(before)
	held := make([]byte, 200<<20)
	p := newGCPacer()
	defer p.stop()
	percent := func() int {
		runtime.GC()
		v := debug.SetGCPercent(100)
		debug.SetGCPercent(v)
		return v
	}
	for end := time.Now().Add(time.Minute); percent() > 20; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("GOGC stays at %d with %d MiB held", percent(), len(held)>>20)
		}
	}
	runtime.KeepAlive(held)
}

// The program goes on when its pages are given back.
func TestTrimStart(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux tells a process its mappings")
	}
	if err := trimStart(); err != nil {
		t.Error(err)
	}
}

// What the process may use counts (a quota of CPU lowers it), not what the machine has.
func TestHalfTheCores(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	for allowed, want := range map[int]int{1: 1, 2: 1, 3: 1, 4: 2, 64: 32, 1000: 256} {
		runtime.GOMAXPROCS(allowed)
		if got := halfTheCores(); got != want {
			t.Errorf("%d of each with %d cores, want %d", got, allowed, want)
		}
	}
}
