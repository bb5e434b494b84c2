package shards

import (
	"context"
	"fmt"
	"maps"
	"math"
	"runtime"
	"slices"
	"sync"
	"time"

	dto "github.com/prometheus/client_model/go"
	"golang.org/x/sys/unix"
)

// memorySteps is at how many numbers of sessions the heap is read.
const memorySteps = 5

// Run runs all stages, one after another, and checks that every session was opened, every message
// acked and every push delivered. It needs a second or two for each million of items, and some 1 GB
// for a million sessions.
func Run(ctx context.Context, o Options) (*Result, error) {
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("options of the shards' bench: %w", err)
	}
	d, err := newDriver(o)
	if err != nil {
		return nil, err
	}
	runtime.LockOSThread() // see stage
	defer runtime.UnlockOSThread()
	runCtx, stop := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { _ = d.set.Run(runCtx) })
	defer running.Wait()
	defer stop()

	r := &Result{Options: o}
	if err := d.openAll(ctx, r); err != nil {
		return nil, fmt.Errorf("open the sessions: %w", err)
	}
	before, err := d.read()
	if err != nil {
		return nil, err
	}
	warm := func(n int) int { return n/10 + 1 }
	for _, stage := range []struct {
		name string
		warm func() (int64, error)
		run  func() (int64, error)
	}{
		{"idle", nil, func() (int64, error) { return 1, d.rest(ctx, o.IdleTime) }},
		{"messages",
			func() (int64, error) { return d.messages(ctx, warm(o.Messages)) },
			func() (int64, error) { return d.messages(ctx, o.Messages) }},
		{"low load", nil, func() (int64, error) { return d.trickle(ctx, o.LowRate, o.LowTime) }},
		{"pushes",
			func() (int64, error) { return d.pushes(ctx, warm(o.Pushes), 1) },
			func() (int64, error) { return d.pushes(ctx, o.Pushes, 1) }},
		{"fanout",
			func() (int64, error) { return d.pushes(ctx, warm(o.Targets), o.Fanout) },
			func() (int64, error) { return d.pushes(ctx, o.Targets, o.Fanout) }},
	} {
		if stage.warm != nil {
			if _, err := stage.warm(); err != nil {
				return nil, fmt.Errorf("warm up for stage %s: %w", stage.name, err)
			}
		}
		if err := d.stage(r, stage.name, stage.run); err != nil {
			return nil, fmt.Errorf("stage %s: %w", stage.name, err)
		}
	}
	after, err := d.read()
	if err != nil {
		return nil, err
	}
	ticks := after.tick.since(before.tick)
	r.Ticks, r.Over2ms = ticks.count(), ticks.over(2*time.Millisecond)
	r.TickP99, r.TickMax = ticks.quantile(0.99), ticks.quantile(1)
	r.Pings, r.Refreshes = d.pings, d.refreshes
	r.NsPerMessage, r.NsPerPush, r.NsPerTarget = r.Stage("messages").Busy, r.Stage("pushes").Busy, r.Stage("fanout").Busy
	if st := d.set.Stats(); st.Sessions != int64(r.Sessions) || d.closes != 0 {
		return nil, fmt.Errorf("%d of %d sessions left at the end, %d closed", st.Sessions, r.Sessions, d.closes)
	}
	return r, nil
}

// openAll opens the sessions in steps and reads the heap at each.
func (d *driver) openAll(ctx context.Context, r *Result) error {
	n := d.opts.Sessions
	r.Memory = []MemoryPoint{{0, liveHeap()}}
	err := d.stage(r, "open", func() (int64, error) {
		for i := range memorySteps {
			from, to := n*i/memorySteps, n*(i+1)/memorySteps
			if from == to {
				continue
			}
			if err := d.open(ctx, from, to); err != nil {
				return 0, err
			}
			r.Memory = append(r.Memory, MemoryPoint{to, liveHeap()})
		}
		return int64(n), nil
	})
	if err != nil {
		return err
	}
	st := d.set.Stats()
	r.Sessions = int(st.Sessions)
	if r.Sessions != n || st.Users != int64(n) || d.online.Load() != int64(n) {
		return fmt.Errorf("%d sessions of %d users, %d online, want %d of each", st.Sessions, st.Users, d.online.Load(), n)
	}
	r.BytesPerSession = float64(r.Memory[len(r.Memory)-1].Heap-r.Memory[0].Heap) / float64(n)
	r.BytesSlope = slope(r.Memory)
	return nil
}

// liveHeap is the heap after a second collection, which empties the pools too.
func liveHeap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// rest leaves the shards to their ticks.
func (d *driver) rest(ctx context.Context, lasting time.Duration) error {
	pause := time.NewTicker(10 * time.Millisecond)
	defer pause.Stop()
	for end := time.Now().Add(lasting); time.Now().Before(end); {
		for d.pump() {
		}
		select {
		case <-pause.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// reading is what has been taken and done up to now.
type reading struct {
	at              time.Time
	process, thread time.Duration // CPU
	mallocs         uint64
	pings, batches  int64
	round, tick     durations
}

func (d *driver) read() (reading, error) {
	r := reading{at: time.Now(), pings: d.pings, batches: d.batches}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	r.mallocs = m.Mallocs
	families, err := d.registry.Gather()
	if err != nil {
		return r, fmt.Errorf("gather the shards' metrics: %w", err)
	}
	for _, f := range families {
		switch f.GetName() {
		case "im_gateway_shard_round_duration_seconds":
			r.round = durationsOf(f.GetMetric()[0].GetHistogram())
		case "im_gateway_shard_tick_duration_seconds":
			r.tick = durationsOf(f.GetMetric()[0].GetHistogram())
		}
	}
	if r.process, err = cpu(unix.CLOCK_PROCESS_CPUTIME_ID); err != nil {
		return r, err
	}
	r.thread, err = cpu(unix.CLOCK_THREAD_CPUTIME_ID)
	return r, err
}

func cpu(clock int32) (time.Duration, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(clock, &t); err != nil {
		return 0, fmt.Errorf("read a CPU clock: %w", err)
	}
	return time.Duration(t.Nano()), nil
}

// stage runs f and adds what it took to r. The caller is locked to its thread.
func (d *driver) stage(r *Result, name string, f func() (items int64, err error)) error {
	a, err := d.read()
	if err != nil {
		return err
	}
	items, err := f()
	if err != nil {
		return err
	}
	b, err := d.read()
	if err != nil {
		return err
	}
	per := func(v float64) float64 { return v / float64(max(items, 1)) }
	process, thread := b.process-a.process, b.thread-a.thread
	rounds := b.round.since(a.round)
	r.Stages = append(r.Stages, Stage{
		Name: name, Items: items, Seconds: b.at.Sub(a.at).Seconds(),
		CPU: per(float64(process - thread)), Generator: per(float64(thread)), Busy: per(rounds.sum * 1e9),
		Rounds: per(float64(rounds.count())), Batches: per(float64(b.batches - a.batches)),
		Allocs: per(float64(b.mallocs - a.mallocs)), Pings: b.pings - a.pings,
	})
	return nil
}

// durations is a Prometheus native histogram: counts by bucket, whose upper bounds are powers of
// 2^(2^-schema) seconds.
type durations struct {
	schema  int32
	sum     float64 // seconds
	zero    int64
	buckets map[int32]int64
}

func durationsOf(h *dto.Histogram) durations {
	d := durations{schema: h.GetSchema(), sum: h.GetSampleSum(), zero: int64(h.GetZeroCount()), buckets: map[int32]int64{}}
	at, n, k := int32(0), int64(0), 0
	for _, span := range h.GetPositiveSpan() {
		at += span.GetOffset()
		for range span.GetLength() {
			n += h.GetPositiveDelta()[k]
			d.buckets[at] = n
			at++
			k++
		}
	}
	return d
}

func (d durations) bound(bucket int32) time.Duration {
	return time.Duration(math.Exp2(math.Ldexp(float64(bucket), -int(d.schema))) * float64(time.Second))
}

// since takes away what was there before.
func (d durations) since(before durations) durations {
	diff := durations{schema: d.schema, sum: d.sum - before.sum, zero: d.zero - before.zero, buckets: map[int32]int64{}}
	for b, n := range d.buckets {
		if n -= before.buckets[b]; n > 0 {
			diff.buckets[b] = n
		}
	}
	return diff
}

func (d durations) count() int64 { return d.over(-1) }

// over is how many took longer, to the width of a bucket.
func (d durations) over(limit time.Duration) (n int64) {
	if limit < 0 {
		n = d.zero
	}
	for b, c := range d.buckets {
		if d.bound(b) > limit {
			n += c
		}
	}
	return n
}

// quantile is the upper bound of the bucket that q of the durations do not exceed.
func (d durations) quantile(q float64) time.Duration {
	if len(d.buckets) == 0 {
		return 0
	}
	keys := slices.Sorted(maps.Keys(d.buckets))
	want := int64(math.Ceil(q * float64(d.count())))
	n := d.zero
	for _, b := range keys {
		if n += d.buckets[b]; n >= want {
			return d.bound(b)
		}
	}
	return d.bound(keys[len(keys)-1])
}
