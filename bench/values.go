package bench

import (
	"fmt"
	"strconv"
	"strings"

	"im-gateway/bench/report"
)

// Values works the headline figures of a report out of what it holds, and warns when the bench
// rather than the server was the limit.
func Values(r *report.Report) {
	r.Values = nil
	add := func(name, unit string, v float64, better string) {
		r.Values = append(r.Values, report.Value{Name: name, Unit: unit, Value: v, Better: better})
	}
	var cpu, client float64
	var peak int64
	for _, p := range r.Servers {
		cpu += p.CPUSeconds
		peak += p.RSSPeak
	}
	for _, p := range r.Clients {
		client = max(client, p.CPUSeconds/r.Seconds)
	}
	for _, what := range []struct{ count, one string }{{"connected", "connect"}, {"acked", "ack"}, {"pushed", "push"}, {"echoed", "echo"}} {
		n := r.Count(what.count + ", measured")
		if n == 0 {
			continue
		}
		add(what.count, "per second", float64(n)/r.Seconds, "higher")
		if len(r.Servers) > 0 {
			add("server CPU per "+what.one, "us", cpu*1e6/float64(n), "lower")
		}
	}
	if slope, ok := memoryPerUser(r); ok {
		add("server memory per user", "bytes", slope, "lower")
	}
	if len(r.Servers) > 0 {
		add("server CPU", "cores", cpu/r.Seconds, "lower")
		add("server memory, peak", "MiB", float64(peak)/(1<<20), "lower")
	}
	for _, l := range r.Latency {
		add(l.Name+" p50", "ms", float64(l.P50)/1000, "lower")
		add(l.Name+" p99", "ms", float64(l.P99)/1000, "lower")
	}
	if client > 0.85 {
		r.Warnings = append(r.Warnings, fmt.Sprintf("a bench process used %.2f cores of its one loop: the bench, not the server, may be the limit; use more -processes", client))
	}
}

// restedAt names the counts of idle: the servers' memory, in bytes, at a number of users.
const restedAt = "server memory, bytes, users: "

// memoryPerUser is the slope of the servers' memory over the number of users, by least squares.
func memoryPerUser(r *report.Report) (float64, bool) {
	var n, sx, sy, sxx, sxy float64
	for _, c := range r.Counts {
		s, ok := strings.CutPrefix(c.Name, restedAt)
		if !ok {
			continue
		}
		users, err := strconv.Atoi(s)
		if err != nil {
			continue
		}
		x, y := float64(users), float64(c.N)
		n, sx, sy, sxx, sxy = n+1, sx+x, sy+y, sxx+x*x, sxy+x*y
	}
	if d := n*sxx - sx*sx; n >= 2 && d != 0 {
		return (n*sxy - sx*sy) / d, true
	}
	return 0, false
}
