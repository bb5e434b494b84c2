package engine

import (
	"context"
	"fmt"
	"math"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
)

const (
	// cgroupPercent of the cgroup's memory become the runtime's limit: the rest is for the kernel's
	// buffers of sockets, which count as well.
	cgroupPercent = 90
	// pressureOver is what part of the mark, in percent, is to be fallen below until the pressure is over.
	pressureOver = 95

	pressureSample = 200 * time.Millisecond
	// pressureGC is how old the last collection may get under pressure: only one finds out that it is over.
	pressureGC = 5 * time.Second
)

// LimitMemory gives the runtime a memory limit below that of the process's cgroup, where there is one
// and GOMEMLIMIT is not set; for a command to call once.
func LimitMemory() {
	if memoryLimit() != math.MaxInt64 {
		return
	}
	// An error is no cgroup, or none with a limit: then there is nothing to stay below.
	if limit, err := memlimit.FromCgroup(); err == nil && 0 < limit && limit < math.MaxInt64 {
		debug.SetMemoryLimit(int64(limit) / 100 * cgroupPercent)
	}
}

// memoryLimit is the runtime's memory limit, in bytes; math.MaxInt64: none.
func memoryLimit() int64 { return debug.SetMemoryLimit(-1) }

// memoryUse is one look at the process's memory.
type memoryUse struct {
	held   uint64 // bytes that a collection would leave, those that no Go object takes included
	cycles uint64 // collections so far
}

// pressure tells when the memory in use comes near the runtime's limit. It asks for what a collection
// would leave: the runtime itself collects in time to keep garbage below the limit.
type pressure struct {
	limit   int64         // bytes
	mark    atomic.Uint64 // bytes; 0: none
	look    func() memoryUse
	collect func()
	set     func(on bool)
	log     zerolog.Logger

	on      bool
	cycles  uint64    // at the last change of it
	checked time.Time // when cycles changed
	held    atomic.Uint64
	now     atomic.Bool
}

// newPressure returns nil when there is no limit. percent 0: no pressure.
func newPressure(percent int, limit int64, set func(bool), log zerolog.Logger, reg prometheus.Registerer) (*pressure, error) {
	if limit == math.MaxInt64 {
		return nil, nil
	}
	p := &pressure{limit: limit, look: memoryLook(), collect: runtime.GC, set: set, log: log}
	p.use(percent)
	for _, c := range []prometheus.Collector{
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "im_gateway_memory_held_bytes",
			Help: "Memory that a garbage collection would leave; beyond im_gateway_memory_high_water_bytes new work is refused.",
		}, func() float64 { return float64(p.held.Load()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "im_gateway_memory_high_water_bytes",
			Help: "limits.memory_high_water_percent of the memory limit; 0: no bound.",
		}, func() float64 { return float64(p.mark.Load()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "im_gateway_memory_pressure",
			Help: "Whether new work is refused for want of memory: 1 or 0.",
		}, func() float64 {
			if p.now.Load() {
				return 1
			}
			return 0
		}),
	} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register the metrics of memory: %w", err)
		}
	}
	return p, nil
}

// use sets the percentage; 0: no pressure. Any goroutine may call it.
func (p *pressure) use(percent int) {
	if p != nil {
		p.mark.Store(uint64(p.limit) / 100 * uint64(percent))
	}
}

// run watches until ctx ends.
func (p *pressure) run(ctx context.Context) error {
	t := time.NewTicker(pressureSample)
	defer t.Stop()
	for {
		select {
		case now := <-t.C:
			p.sample(now)
		case <-ctx.Done():
			return nil
		}
	}
}

func (p *pressure) sample(now time.Time) {
	use := p.look()
	p.held.Store(use.held)
	if use.cycles != p.cycles {
		p.cycles, p.checked = use.cycles, now
	}
	mark := p.mark.Load()
	switch {
	case !p.on && mark > 0 && use.held > mark:
		p.change(true)
		p.log.Warn().Uint64("held_bytes", use.held).Uint64("high_water_bytes", mark).
			Msg("memory is short: new connections, requests and messages are refused")
	case p.on && (mark == 0 || use.held < mark/100*pressureOver):
		p.change(false)
		p.log.Info().Uint64("held_bytes", use.held).Uint64("high_water_bytes", mark).
			Msg("memory is no longer short")
	case p.on && now.Sub(p.checked) > pressureGC:
		p.collect()
	}
}

func (p *pressure) change(on bool) {
	p.on = on
	p.set(on)
	p.now.Store(on)
}

// memoryLook returns a function that looks at the memory; for one goroutine.
func memoryLook() func() memoryUse {
	const (
		total = iota
		released
		free
		unused
		objects
		live
		cycles
	)
	samples := []metrics.Sample{
		total:    {Name: "/memory/classes/total:bytes"},
		released: {Name: "/memory/classes/heap/released:bytes"},
		free:     {Name: "/memory/classes/heap/free:bytes"},
		unused:   {Name: "/memory/classes/heap/unused:bytes"},
		objects:  {Name: "/memory/classes/heap/objects:bytes"},
		live:     {Name: "/gc/heap/live:bytes"},
		cycles:   {Name: "/gc/cycles/total:gc-cycles"},
	}
	return func() memoryUse {
		metrics.Read(samples)
		v := func(i int) uint64 { return samples[i].Value.Uint64() }
		heap := v(released) + v(free) + v(unused) + v(objects)
		return memoryUse{held: v(total) - min(v(total), heap) + v(live), cycles: v(cycles)}
	}
}
