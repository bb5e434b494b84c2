package report

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Merge makes one report of those of several client processes, or hosts, that ran the same scenario
// at the same time: counts, rates and histograms are added; the percentiles of a second, which
// cannot be, are those of the worst part. Seconds meet by the time since each part's load began. A
// server that several parts watched, told by name and pid, counts once; a check holds when it does
// in all. The values are left to be worked out anew; the options of the first part
// stand, with users and rates added. Merge fails when there is no part, when the
// scenarios differ, or when a histogram cannot be read or does not fit the others.
func Merge(parts []*Report) (*Report, error) {
	if len(parts) == 0 {
		return nil, errors.New("nothing to merge")
	}
	first := parts[0]
	out := &Report{
		Scenario: first.Scenario, Label: first.Label, Started: first.Started, Machine: first.Machine,
		Options: map[string]any{},
	}
	maps.Copy(out.Options, first.Options)
	m := merging{out: out, hists: map[string]*hdrhistogram.Histogram{}}
	for i, p := range parts {
		if p.Scenario != first.Scenario {
			return nil, fmt.Errorf("reports of %s and of %s do not make one", first.Scenario, p.Scenario)
		}
		if p.Started.Before(out.Started) {
			out.Started = p.Started
		}
		out.Seconds = max(out.Seconds, p.Seconds)
		for _, k := range []string{"users", "rate", "connect_rate"} {
			if v, ok := p.Options[k]; ok && i > 0 {
				out.Options[k] = addOption(out.Options[k], v)
			}
		}
		if err := m.add(p); err != nil {
			return nil, err
		}
	}
	for _, name := range m.order {
		out.Latency = append(out.Latency, NewLatency(name, m.hists[name]))
	}
	return out, nil
}

// addOption adds numbers and rates, which are text: "500" and "100..500". What is neither, as "2
// outstanding per user", is that of the first part.
func addOption(a, b any) any {
	switch x := a.(type) {
	case int:
		if y, ok := toFloat(b); ok {
			return x + int(y)
		}
	case float64: // from a file
		if y, ok := toFloat(b); ok {
			return x + y
		}
	case string:
		if y, ok := b.(string); ok {
			return addRates(x, y)
		}
	}
	return a
}

func toFloat(v any) (float64, bool) {
	switch n := v.(type) {
	case int:
		return float64(n), true
	case float64:
		return n, true
	}
	return 0, false
}

func addRates(a, b string) string {
	const to = ".."
	x, y := strings.Split(a, to), strings.Split(b, to)
	if len(x) != len(y) {
		return a
	}
	for i := range x {
		m, errA := strconv.ParseFloat(x[i], 64)
		n, errB := strconv.ParseFloat(y[i], 64)
		if errA != nil || errB != nil {
			return a
		}
		x[i] = strconv.FormatFloat(m+n, 'f', -1, 64)
	}
	return strings.Join(x, to)
}

type merging struct {
	out   *Report
	order []string
	hists map[string]*hdrhistogram.Histogram
}

func (m *merging) add(p *Report) error {
	for _, c := range p.Counts {
		m.count(c)
	}
	for _, l := range p.Latency {
		h, err := l.Histogram()
		if err != nil {
			return err
		}
		if sum := m.hists[l.Name]; sum != nil {
			if dropped := sum.Merge(h); dropped > 0 {
				return fmt.Errorf("merge the histograms of %s: %d values of one are beyond the range of another", l.Name, dropped)
			}
		} else {
			m.hists[l.Name] = h
			m.order = append(m.order, l.Name)
		}
	}
	for i, point := range bySecond(p.Series) {
		m.out.Series = addPoint(m.out.Series, i, point)
	}
	for _, s := range p.Servers {
		m.server(s)
	}
	m.out.Clients = append(m.out.Clients, p.Clients...)
	for _, c := range p.Checks {
		m.check(c)
	}
	for _, w := range p.Warnings {
		if !slices.Contains(m.out.Warnings, w) {
			m.out.Warnings = append(m.out.Warnings, w)
		}
	}
	return nil
}

func (m *merging) count(c Count) {
	for i := range m.out.Counts {
		if m.out.Counts[i].Name == c.Name {
			m.out.Counts[i].N += c.N
			return
		}
	}
	m.out.Counts = append(m.out.Counts, c)
}

// MergePoints is the sum of one second of several parts; nil ones are left out.
func MergePoints(parts []*Point) Point {
	var sum []Point
	for _, p := range parts {
		if p != nil {
			sum = addPoint(sum, 0, *p)
		}
	}
	if len(sum) == 0 {
		return Point{}
	}
	sum[0].T = math.Round(sum[0].T)
	return sum[0]
}

// addPoint adds p to the i-th point of sum, which grows as it must.
func addPoint(sum []Point, i int, p Point) []Point {
	for len(sum) <= i {
		sum = append(sum, Point{
			T: float64(len(sum) + 1), Rates: map[string]float64{}, P50: map[string]float64{}, P99: map[string]float64{},
		})
	}
	s := &sum[i]
	s.T = max(s.T, p.T)
	s.Measured = s.Measured || p.Measured
	for k, v := range p.Rates {
		s.Rates[k] += v
	}
	for k, v := range p.P50 {
		s.P50[k] = max(s.P50[k], v)
	}
	for k, v := range p.P99 {
		s.P99[k] = max(s.P99[k], v)
	}
	return sum
}

// bySecond puts the points of one part, which are about a second long and come when they can, on
// whole seconds: the i-th covers i to i+1. A rate is the mean over the time of that second that the
// points cover; a last second of which less than half is covered is left out. Percentiles go to the
// second that holds the middle of their point.
func bySecond(points []Point) []Point {
	if len(points) == 0 {
		return nil
	}
	n := max(1, int(math.Round(points[len(points)-1].T)))
	out := make([]Point, n)
	covered := make([]float64, n)
	for i := range out {
		out[i] = Point{T: float64(i + 1), Rates: map[string]float64{}, P50: map[string]float64{}, P99: map[string]float64{}}
	}
	from := 0.0
	for _, p := range points {
		for i := max(0, int(from)); i < n && float64(i) < p.T; i++ {
			part := min(p.T, float64(i+1)) - max(from, float64(i))
			covered[i] += part
			for k, v := range p.Rates {
				out[i].Rates[k] += v * part
			}
		}
		mid := &out[min(n-1, max(0, int((from+p.T)/2)))]
		mid.Measured = mid.Measured || p.Measured
		for k, v := range p.P50 {
			mid.P50[k] = max(mid.P50[k], v)
		}
		for k, v := range p.P99 {
			mid.P99[k] = max(mid.P99[k], v)
		}
		from = p.T
	}
	for i := range out {
		for k := range out[i].Rates {
			out[i].Rates[k] /= covered[i]
		}
	}
	return out
}

func (m *merging) server(s Process) {
	for _, have := range m.out.Servers {
		if have.PID == s.PID && have.Name == s.Name {
			return
		}
	}
	m.out.Servers = append(m.out.Servers, s)
}

func (m *merging) check(c Check) {
	for i := range m.out.Checks {
		have := &m.out.Checks[i]
		if have.Name == c.Name {
			have.OK = have.OK && c.OK
			have.Detail = strings.Trim(have.Detail+"; "+c.Detail, "; ")
			return
		}
	}
	m.out.Checks = append(m.out.Checks, c)
}
