package bench

import (
	"context"
	"fmt"
	"time"

	"im-gateway/bench/report"
)

func init() {
	scenarios["connect"] = kind{make: newQuietScenario, run: runConnect}
	scenarios["idle"] = kind{make: newQuietScenario, run: runIdle}
}

// quietScenario sends nothing.
type quietScenario struct{ r *run }

func newQuietScenario(r *run) scenario { return &quietScenario{r} }

func (s *quietScenario) begin(*meter)                                   {}
func (s *quietScenario) send(int64)                                     {}
func (s *quietScenario) frame(*user, []byte, int64)                     {}
func (s *quietScenario) turn(*user, int64)                              {}
func (s *quietScenario) outstanding() int64                             { return 0 }
func (s *quietScenario) verify(context.Context, *run) (counts, error)   { return nil, nil }
func (s *quietScenario) refused(u *user, err error)                     { s.r.refusedAtAll(u, err) }
func (s *quietScenario) lost(u *user, code int, err error, _ time.Time) { s.r.lostAtAll(u, code, err) }

// runConnect measures the storm of connects itself: from the scheduled connect to `connected`.
func runConnect(ctx context.Context, r *run) ([]*report.Report, error) {
	if r.hooks.Ready != nil {
		if err := r.hooks.Ready(); err != nil {
			return nil, err
		}
	}
	r.phase(phaseLoad)
	start := time.Now()
	r.f.DoWait(func() {
		r.newMeter(start)
		r.m.from, r.m.to = start.UnixNano(), start.Add(time.Hour).UnixNano()
	})
	if r.hooks.Measure != nil {
		r.hooks.Measure(0)
	}
	shown := r.hooks.Connect
	r.hooks.Connect = func(up, want int) {
		r.tick(time.Now())
		if shown != nil {
			shown(up, want)
		}
	}
	err := r.connectAll(ctx, len(r.users))
	if r.hooks.Measured != nil {
		r.hooks.Measured(0)
	}
	if err != nil {
		return nil, err
	}
	r.tick(time.Now())
	var rep *report.Report
	r.f.DoWait(func() { rep = r.report(start, time.Since(start)) })
	return []*report.Report{rep}, nil
}

// runIdle connects users in steps and rests after each, so that the caller can read the servers'
// memory; then it watches what idle users cost for Options.Duration. A step's end is told by
// Hooks.Measure.
func runIdle(ctx context.Context, r *run) ([]*report.Report, error) {
	if r.hooks.Ready != nil {
		if err := r.hooks.Ready(); err != nil {
			return nil, err
		}
	}
	start := time.Now()
	var steps []int
	for i := range r.o.Steps {
		lo := min(2000, max(1, len(r.users)/r.o.Steps))
		n := lo + (len(r.users)-lo)*i/(r.o.Steps-1)
		if err := r.connectAll(ctx, n); err != nil {
			return nil, err
		}
		if !sleepUntil(ctx, time.Now().Add(r.o.Warmup)) {
			return nil, ctx.Err()
		}
		if r.hooks.Rested != nil {
			if err := r.hooks.Rested(n); err != nil {
				return nil, err
			}
		}
		steps = append(steps, n)
	}
	r.phase(phaseLoad)
	begin := time.Now()
	r.f.DoWait(func() {
		r.newMeter(begin)
		r.m.from = begin.UnixNano()
	})
	if r.hooks.Measure != nil {
		r.hooks.Measure(0)
	}
	for end := begin.Add(r.o.Duration); time.Now().Before(end); {
		if !sleepUntil(ctx, time.Now().Add(min(time.Second, time.Until(end)))) {
			return nil, ctx.Err()
		}
		r.tick(time.Now())
	}
	if r.hooks.Measured != nil {
		r.hooks.Measured(0)
	}
	var rep *report.Report
	r.f.DoWait(func() { rep = r.report(start, r.o.Duration) })
	rep.Options["steps"] = fmt.Sprint(steps)
	return []*report.Report{rep}, nil
}
