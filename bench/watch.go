package bench

import (
	"context"
	"os"
	"strconv"
	"time"

	"im-gateway/bench/procstat"
	"im-gateway/bench/report"
)

// Measure is Run with the servers' processes and this one watched, and the values worked out.
// pids name the servers.
func Measure(ctx context.Context, o Options, servers []string, pids []int, h Hooks) ([]*report.Report, error) {
	s, err := procstat.Start(append(append([]string(nil), servers...), "im-bench"), append(append([]int(nil), pids...), os.Getpid()))
	if err != nil {
		return nil, err
	}
	defer s.Stop()
	phase, measure, measured := h.Phase, h.Measure, h.Measured
	var taken [][]report.Process
	h.Phase = func(what string) {
		if what == "load" {
			s.Restart(time.Now())
		}
		if phase != nil {
			phase(what)
		}
	}
	h.Measure = func(n int) {
		s.Mark()
		if measure != nil {
			measure(n)
		}
	}
	h.Measured = func(n int) {
		s.Unmark()
		procs, perr := s.Processes()
		if perr != nil && err == nil {
			err = perr
		}
		taken = append(taken, procs)
		if measured != nil {
			measured(n)
		}
	}
	var rested []report.Count
	h.Rested = func(users int) {
		rss, rerr := s.RSS(len(pids))
		if rerr != nil && err == nil {
			err = rerr
		}
		rested = append(rested, report.Count{Name: restedAt + strconv.Itoa(users), N: rss})
	}
	reports, rerr := Run(ctx, o, h)
	for i, r := range reports {
		if len(pids) > 0 {
			r.Counts = append(r.Counts, rested...)
		}
		if i < len(taken) {
			k := len(taken[i]) - 1
			r.Servers, r.Clients = taken[i][:k], taken[i][k:]
		}
		Values(r)
	}
	if rerr != nil {
		return reports, rerr
	}
	return reports, err
}
