// Package procstat watches what processes of this machine take while a run lasts.
//
// CPU time is that of the kernel's clock of the process: exact to the nanosecond, the threads that
// have ended included. The two that offer themselves first are not: /proc/PID/stat cuts user and
// system time to 10 ms each, which is much of a short window, and /proc/PID/task/*/schedstat
// forgets a thread with all its time when it ends. What runs at the moment of reading counts up to
// the last timer tick, 1 to 10 ms ago.
//
// Memory is VmRSS of /proc/PID/status: that of /proc/PID/stat lags by some hundred KiB, since the
// kernel adds the cores' shares up only now and then.
package procstat

import (
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"

	"im-gateway/bench/report"
)

const (
	every      = 250 * time.Millisecond // between looks
	maxSamples = 4096                   // per process; a longer run keeps them half as dense
)

// ErrEnded is returned when a process ended while it was watched.
var ErrEnded = errors.New("the process has ended")

// Sampler watches processes from Start to Stop. Its methods may be called from any goroutine.
type Sampler struct {
	stop chan struct{}
	once sync.Once
	done chan struct{}

	mu    sync.Mutex
	start time.Time
	procs []*watched
}

// watched is one process. A sampler's mutex guards it.
type watched struct {
	report.Process
	proc     procfs.Proc
	born     uint64        // clock ticks since boot; tells it from another that got its pid
	from     time.Duration // CPU time at Mark
	cpu      time.Duration // CPU time at the last sample kept
	at       time.Time     // of that sample
	anon     int64         // RssAnon at the last look, bytes
	every    int           // looks to a sample that is kept
	looks    int
	measured bool
	err      error // the first; nothing is read after it
}

// Start begins to watch the processes, by pid, under the names given, one for each. It fails with
// ErrEnded when one is not there.
func Start(names []string, pids []int) (*Sampler, error) {
	if len(names) != len(pids) {
		return nil, fmt.Errorf("watch processes: %d names for %d pids", len(names), len(pids))
	}
	s := &Sampler{start: time.Now(), stop: make(chan struct{}), done: make(chan struct{})}
	for i, pid := range pids {
		w, err := newWatched(names[i], pid, s.start)
		if err != nil {
			return nil, fmt.Errorf("watch process %s (%d): %w", names[i], pid, err)
		}
		s.procs = append(s.procs, w)
	}
	go s.watch()
	return s, nil
}

func newWatched(name string, pid int, start time.Time) (*watched, error) {
	p, err := procfs.NewProc(pid)
	if err != nil {
		return nil, ended(err)
	}
	st, err := p.Stat()
	if err != nil {
		return nil, ended(err)
	}
	w := &watched{Process: report.Process{Name: name, PID: pid}, proc: p, born: st.Starttime, every: 1}
	return w, w.sample(start)
}

func (s *Sampler) watch() {
	defer close(s.done)
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			s.all(func(w *watched) error { return w.look(s.start) })
		case <-s.stop:
			return
		}
	}
}

// all calls f for each process that has not failed.
func (s *Sampler) all(f func(w *watched) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.procs {
		if w.err == nil {
			w.err = f(w)
		}
	}
}

// Restart forgets what was seen and lets time begin at start, that of a stage's load.
func (s *Sampler) Restart(start time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.start = start
	for _, w := range s.procs {
		w.Process = report.Process{Name: w.Name, PID: w.PID}
		w.every, w.looks, w.measured = 1, 0, false
	}
}

// Mark begins the measured time.
func (s *Sampler) Mark() {
	s.all(func(w *watched) error {
		if err := w.sample(s.start); err != nil {
			return err
		}
		w.from, w.RSSStart, w.RSSPeak, w.measured = w.cpu, w.rss(), w.rss(), true
		return nil
	})
}

// Unmark ends the measured time, and does nothing when none has begun.
func (s *Sampler) Unmark() {
	s.all(func(w *watched) error {
		if !w.measured {
			return nil
		}
		if err := w.sample(s.start); err != nil {
			return err
		}
		w.CPUSeconds = (w.cpu - w.from).Seconds()
		w.RSSEnd, w.Anon, w.measured = w.rss(), w.anon, false
		return nil
	})
}

// Processes is what was seen since Restart, in Start's order. The error wraps ErrEnded for each
// process that ended meanwhile; of such a one only the samples hold.
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

// RSS is what the first n processes have resident now, in bytes. The error is that of Processes.
func (s *Sampler) RSS(n int) (int64, error) {
	s.all(func(w *watched) error { return w.sample(s.start) })
	procs, err := s.Processes()
	var sum int64
	for _, p := range procs[:n] {
		if k := len(p.Samples); k > 0 { // none: it ended before Restart
			sum += p.Samples[k-1].RSS
		}
	}
	return sum, err
}

// Stop ends the watching and returns when it has ended. It may be called again.
func (s *Sampler) Stop() {
	s.once.Do(func() { close(s.stop) })
	<-s.done
}

func (w *watched) rss() int64 { return w.Samples[len(w.Samples)-1].RSS }

// look reads the process and keeps every w.every-th sample.
func (w *watched) look(start time.Time) error {
	if w.looks++; w.looks%w.every == 0 {
		return w.sample(start)
	}
	_, err := w.memory()
	return err
}

// sample reads the process and keeps what it read.
func (w *watched) sample(start time.Time) error {
	rss, err := w.memory()
	if err != nil {
		return err
	}
	cpu, err := cpuTime(w.PID)
	if err != nil {
		return err
	}
	now := time.Now()
	p := report.ProcSample{T: now.Sub(start).Seconds(), RSS: rss}
	if span := now.Sub(w.at); !w.at.IsZero() && span > 0 {
		p.CPU = float64(cpu-w.cpu) / float64(span)
	}
	w.cpu, w.at = cpu, now
	if w.Samples = append(w.Samples, p); len(w.Samples) >= maxSamples {
		w.Samples = halve(w.Samples)
		w.every *= 2
	}
	return nil
}

// memory is what the process has resident, in bytes. It fails with ErrEnded when the process is
// gone, is dead but not waited for, or is another that got its pid.
func (w *watched) memory() (int64, error) {
	m, err := w.proc.NewStatus()
	if err != nil {
		return 0, ended(err)
	}
	st, err := w.proc.Stat() // behind what it vouches for
	if err != nil {
		return 0, ended(err)
	}
	if st.State == "Z" || st.State == "X" || st.Starttime != w.born {
		return 0, ErrEnded
	}
	rss := int64(m.VmRSS)
	w.anon = int64(m.RssAnon)
	if w.measured {
		w.RSSPeak = max(w.RSSPeak, rss)
	}
	return rss, nil
}

// cpuTime is what a process has run, by its clock: see clock_getcpuclockid(3).
func cpuTime(pid int) (time.Duration, error) {
	const ofProcess = 2 // CPUCLOCK_SCHED
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|ofProcess), &t); err != nil {
		return 0, ended(fmt.Errorf("read the CPU clock: %w", err))
	}
	return time.Duration(t.Nano()), nil
}

// ended turns what the kernel says of a pid that is no more into ErrEnded.
func ended(err error) error {
	for _, gone := range []error{fs.ErrNotExist, unix.ESRCH, unix.EINVAL} {
		if errors.Is(err, gone) {
			return ErrEnded
		}
	}
	return err
}

// halve makes one sample of two, in place; a last odd one stays. The CPU time under the curve, the
// highest memory and the newest sample's own memory stay.
func halve(s []report.ProcSample) []report.ProcSample {
	out := s[:0]
	before := 0.0
	for i := 0; i < len(s); i += 2 {
		if i+1 == len(s) {
			return append(out, s[i])
		}
		a, b := s[i], s[i+1]
		if span := b.T - before; span > 0 {
			b.CPU = (a.CPU*(a.T-before) + b.CPU*(b.T-a.T)) / span
		}
		before = s[i+1].T
		if i+2 < len(s) {
			b.RSS = max(a.RSS, b.RSS)
		}
		out = append(out, b)
	}
	return out
}
