package bench

import (
	"context"
	"errors"
	"os"
	"strconv"
	"time"

	"im-gateway/bench/procstat"
	"im-gateway/bench/report"
)

// Servers are the processes to watch beside a run: the servers that are measured, by name.
type Servers struct {
	Names []string
	PIDs  []int
}

// watcher looks at the processes of a run as its phases come and go.
type watcher struct {
	s       *procstat.Sampler
	servers int
	taken   [][]report.Process // by stage
	rested  []report.Count
	errs    []error
}

// watch begins with the servers and the bench's own processes.
func watch(servers Servers, clients []int) (*watcher, error) {
	names := append([]string(nil), servers.Names...)
	for range clients {
		names = append(names, "im-bench")
	}
	s, err := procstat.Start(names, append(append([]int(nil), servers.PIDs...), clients...))
	if err != nil {
		return nil, err
	}
	return &watcher{s: s, servers: len(servers.PIDs)}, nil
}

func (w *watcher) measured() {
	w.s.Unmark()
	procs, err := w.s.Processes()
	w.errs = append(w.errs, err)
	w.taken = append(w.taken, procs)
}

func (w *watcher) rest(users int) {
	rss, err := w.s.RSS(w.servers)
	w.errs = append(w.errs, err)
	if w.servers > 0 {
		w.rested = append(w.rested, report.Count{Name: restedAt + strconv.Itoa(users), N: rss})
	}
}

// finish completes the reports of the stages.
func (w *watcher) finish(reports []*report.Report) error {
	for i, r := range reports {
		r.Counts = append(r.Counts, w.rested...)
		if i < len(w.taken) {
			r.Servers, r.Clients = w.taken[i][:w.servers], w.taken[i][w.servers:]
		}
		Values(r)
	}
	return errors.Join(w.errs...)
}

// Measure is Run with the servers' processes and this one watched, and the values worked out.
func Measure(ctx context.Context, o Options, servers Servers, h Hooks) ([]*report.Report, error) {
	w, err := watch(servers, []int{os.Getpid()})
	if err != nil {
		return nil, err
	}
	defer w.s.Stop()
	phase := h.Phase
	h.Phase = func(what string) {
		if what == phaseLoad {
			w.s.Restart(time.Now())
		}
		if phase != nil {
			phase(what)
		}
	}
	h.Measure = func(int) { w.s.Mark() }
	h.Measured = func(int) { w.measured() }
	h.Rested = func(users int) error { w.rest(users); return nil }
	reports, err := Run(ctx, o, h)
	return reports, errors.Join(err, w.finish(reports))
}
