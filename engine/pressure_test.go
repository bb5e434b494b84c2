package engine

import (
	"bytes"
	"fmt"
	"math"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/rs/zerolog"
)

func TestPressure(t *testing.T) {
	var log bytes.Buffer
	var changes []bool
	reg := prometheus.NewRegistry()
	p, err := newPressure(90, 1000, func(on bool) { changes = append(changes, on) }, zerolog.New(&log), reg)
	if err != nil {
		t.Fatal(err)
	}
	var use memoryUse
	collected := 0
	p.look, p.collect = func() memoryUse { return use }, func() { collected++ }
	now := time.Unix(1e9, 0)
	at := func(held uint64, on float64) {
		t.Helper()
		use.held = held
		use.cycles++
		now = now.Add(pressureSample)
		p.sample(now)
		if err := testutil.GatherAndCompare(reg, strings.NewReader(fmt.Sprintf(
			"# HELP im_gateway_memory_pressure Whether new work is refused for want of memory: 1 or 0.\n"+
				"# TYPE im_gateway_memory_pressure gauge\nim_gateway_memory_pressure %v\n", on)), "im_gateway_memory_pressure"); err != nil {
			t.Errorf("%d held: %v", held, err)
		}
	}
	at(900, 0)
	at(901, 1)
	at(2000, 1)
	at(856, 1) // not below 95 % of the mark
	at(854, 0)
	at(899, 0)
	at(950, 1)
	if !slices.Equal(changes, []bool{true, false, true}) {
		t.Errorf("changes: %v", changes)
	}
	if n := strings.Count(log.String(), "\n"); n != 3 {
		t.Errorf("%d lines for 3 changes: %s", n, &log)
	}
	// Without a collection nobody would learn that it is over.
	if collected != 0 {
		t.Error("collected though collections come by themselves")
	}
	p.sample(now.Add(pressureGC + time.Second))
	if collected != 1 {
		t.Errorf("collected %d times", collected)
	}
}

func TestPressureOff(t *testing.T) {
	p, err := newPressure(90, math.MaxInt64, nil, zerolog.Nop(), prometheus.NewRegistry())
	if p != nil || err != nil {
		t.Errorf("without a limit: %v, %v", p, err)
	}
	p.use(50)

	on := false
	if p, err = newPressure(0, 1000, func(is bool) { on = is }, zerolog.Nop(), prometheus.NewRegistry()); err != nil {
		t.Fatal(err)
	}
	p.look = func() memoryUse { return memoryUse{held: 999} }
	for _, step := range []struct {
		percent int
		want    bool
	}{{0, false}, {100, false}, {90, true}, {0, false}, {50, true}, {100, true}} { // 100: not below 95 % of it
		p.use(step.percent)
		if p.sample(time.Now()); on != step.want {
			t.Errorf("at %d percent: %t", step.percent, on)
		}
	}
}

// What is held counts, and garbage does not.
func TestMemoryLook(t *testing.T) {
	const size = 64 << 20
	look := memoryLook()
	held := func() int64 { runtime.GC(); return int64(look().held) }
	before := held()
	block := make([]byte, size)
	for i := 0; i < size; i += 4096 {
		block[i] = 1
	}
	with := held()
	runtime.KeepAlive(block)
	block = nil
	after := held()
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // what is made while a collection marks counts until the next
	garbage := make([][]byte, 0, 64)
	for range 64 {
		garbage = append(garbage[:0], make([]byte, 1<<20))
	}
	runtime.KeepAlive(garbage)
	const slack = size / 4
	if beside := int64(look().held); with-before < size-slack || after-before > slack || beside-before > slack {
		t.Errorf("%d before, %d with %d held, %d after, %d with garbage", before, with, size, after, beside)
	}
}
