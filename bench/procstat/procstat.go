// Package procstat watches what processes of this machine take while a run lasts.
package procstat

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/prometheus/procfs"

	"im-gateway/bench/report"
)

// every is the time between samples. The kernel scales user and system time to the scheduler's
// exact runtime, in steps of 10 ms.
const every = 250 * time.Millisecond

// Sampler watches processes from Start to Stop.
type Sampler struct {
	start time.Time
	stop  chan struct{}
	done  chan struct{}

	mu    sync.Mutex
	procs []*watched
}

type watched struct {
	report.Process
	proc     procfs.Proc
	from, to float64 // CPU seconds at the marks
	lastCPU  float64
	lastAt   time.Time
	measured bool
	err      error
}

// Start begins to watch the processes, by pid, under the names given.
func Start(names []string, pids []int) (*Sampler, error) {
	s := &Sampler{start: time.Now(), stop: make(chan struct{}), done: make(chan struct{})}
	for i, pid := range pids {
		p, err := procfs.NewProc(pid)
		if err != nil {
			return nil, fmt.Errorf("watch process %d: %w", pid, err)
		}
		w := &watched{Process: report.Process{Name: names[i], PID: pid}, proc: p}
		if err := w.sample(s.start); err != nil {
			return nil, fmt.Errorf("watch process %d: %w", pid, err)
		}
		s.procs = append(s.procs, w)
	}
	go s.watch()
	return s, nil
}

func (s *Sampler) watch() {
	defer close(s.done)
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			s.all(func(w *watched) error { return w.sample(s.start) })
		case <-s.stop:
			return
		}
	}
}

func (s *Sampler) all(f func(w *watched) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.procs {
		if w.err == nil {
			w.err = f(w)
		}
	}
}

// Restart forgets the samples and lets time begin at start, that of a stage's load.
func (s *Sampler) Restart(start time.Time) {
	s.mu.Lock()
	s.start = start
	for _, w := range s.procs {
		w.Samples, w.measured, w.RSSPeak = nil, false, 0
	}
	s.mu.Unlock()
}

// Mark begins the measured time.
func (s *Sampler) Mark() {
	s.all(func(w *watched) error {
		if err := w.sample(s.start); err != nil {
			return err
		}
		w.from, w.RSSStart, w.RSSPeak, w.measured = w.lastCPU, w.rss(), w.rss(), true
		return nil
	})
}

// Unmark ends the measured time.
func (s *Sampler) Unmark() {
	s.all(func(w *watched) error {
		if err := w.sample(s.start); err != nil {
			return err
		}
		w.to, w.RSSEnd, w.measured = w.lastCPU, w.rss(), false
		w.CPUSeconds = w.to - w.from
		st, err := w.proc.NewStatus()
		w.Anon = int64(st.RssAnon)
		return err
	})
}

// Processes is what was seen since Restart. The error names processes that ended meanwhile.
func (s *Sampler) Processes() ([]report.Process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []report.Process
	var errs []error
	for _, w := range s.procs {
		p := w.Process
		p.Samples = append([]report.ProcSample(nil), w.Samples...)
		out = append(out, p)
		if w.err != nil {
			errs = append(errs, fmt.Errorf("watch process %s (%d): %w", w.Name, w.PID, w.err))
		}
	}
	return out, errors.Join(errs...)
}

// RSS is what the first n processes have resident now, in bytes.
func (s *Sampler) RSS(n int) (int64, error) {
	var sum int64
	s.all(func(w *watched) error { return w.sample(s.start) })
	procs, err := s.Processes()
	for _, p := range procs[:n] {
		sum += p.Samples[len(p.Samples)-1].RSS
	}
	return sum, err
}

// Stop ends the watching.
func (s *Sampler) Stop() {
	close(s.stop)
	<-s.done
}

func (w *watched) rss() int64 { return w.Samples[len(w.Samples)-1].RSS }

func (w *watched) sample(start time.Time) error {
	st, err := w.proc.Stat()
	if err != nil {
		return err
	}
	now := time.Now()
	p := report.ProcSample{T: now.Sub(start).Seconds(), RSS: int64(st.ResidentMemory())}
	if span := now.Sub(w.lastAt).Seconds(); !w.lastAt.IsZero() && span > 0 {
		p.CPU = (st.CPUTime() - w.lastCPU) / span
	}
	w.lastCPU, w.lastAt = st.CPUTime(), now
	w.Samples = append(w.Samples, p)
	if w.measured {
		w.RSSPeak = max(w.RSSPeak, p.RSS)
	}
	return nil
}
