package report

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
)

// noise is the difference below which nothing is said of a side that ran once.
const noise = 0.10

// Difference is one figure of two sides, A and B.
type Difference struct {
	Name, Unit   string
	A, B         float64 // medians
	RunsA, RunsB int
	Ratio        float64 // B over A; 0, as the two below, where a run of A has 0
	Lowest, Most float64 // ratio of any pair of runs
	Verdict      string  // "better", "worse", "within noise", or "changed" where neither is better: of B
}

// Comparison holds, for each scenario and rate that both sides ran, the figures of both.
type Comparison struct {
	Scenarios []ComparedScenario
}

// ComparedScenario is one of them.
type ComparedScenario struct {
	Name        string
	Differences []Difference
}

// key tells runs of the same kind.
func (r *Report) key() string {
	s := r.Scenario
	for _, k := range []string{"users", "rate", "size", "group"} {
		if v, ok := r.Options[k]; ok {
			s += ", " + k + " " + option(v)
		}
	}
	return s
}

// Compare holds the runs of b against those of a: the values, and the percentiles of the latencies.
// A difference is within noise when the ranges of the two sides overlap or, where a side ran once,
// when it is below 10 %. Compare fails when the two sides have no run of the same kind, and says
// what the first ran.
func Compare(a, b *Set) (*Comparison, error) {
	var c Comparison
	var keys []string
	for _, r := range a.Runs {
		if k := r.key(); !slices.Contains(keys, k) {
			keys = append(keys, k)
		}
	}
	for _, k := range keys {
		sideA, sideB := figures(a, k), figures(b, k)
		s := ComparedScenario{Name: k}
		for _, f := range sideA.order {
			va, vb := sideA.values[f.Name], sideB.values[f.Name]
			if len(vb) > 0 {
				s.Differences = append(s.Differences, difference(f, va, vb))
			}
		}
		if len(s.Differences) > 0 {
			c.Scenarios = append(c.Scenarios, s)
		}
	}
	if len(c.Scenarios) == 0 {
		return nil, fmt.Errorf("nothing to compare: the first side ran %s; the second ran none of it with the same users, rate and sizes", strings.Join(keys, "; "))
	}
	return &c, nil
}

type side struct {
	order  []Value
	values map[string][]float64
}

func figures(s *Set, key string) side {
	out := side{values: map[string][]float64{}}
	for _, r := range s.Runs {
		if r.key() != key {
			continue
		}
		for _, v := range r.compared() {
			if out.values[v.Name] == nil {
				out.order = append(out.order, v)
			}
			out.values[v.Name] = append(out.values[v.Name], v.Value)
		}
	}
	return out
}

// compared are the values of a run, and those percentiles of its latencies that are no values.
func (r *Report) compared() []Value {
	out := slices.Clone(r.Values)
	for _, l := range r.Latency {
		for _, p := range []struct {
			name string
			us   int64
		}{{"p50", l.P50}, {"p90", l.P90}, {"p99", l.P99}, {"p99.9", l.P999}} {
			name := l.Name + " " + p.name
			if !slices.ContainsFunc(r.Values, func(v Value) bool { return v.Name == name }) {
				out = append(out, Value{Name: name, Unit: "ms", Value: float64(p.us) / 1000, Better: "lower"})
			}
		}
	}
	return out
}

func difference(f Value, a, b []float64) Difference {
	d := Difference{Name: f.Name, Unit: f.Unit, A: Median(a), B: Median(b), RunsA: len(a), RunsB: len(b)}
	slices.Sort(a)
	slices.Sort(b)
	overlap := a[0] <= b[len(b)-1] && b[0] <= a[len(a)-1]
	small := false
	if a[0] > 0 { // else there is no ratio
		d.Ratio, d.Lowest, d.Most = d.B/d.A, b[0]/a[len(a)-1], b[len(b)-1]/a[0]
		small = math.Abs(d.Ratio-1) < noise
	}
	switch {
	case overlap, small && (len(a) == 1 || len(b) == 1):
		d.Verdict = "within noise"
	case f.Better == "":
		d.Verdict = "changed"
	case (d.B < d.A) == (f.Better == "lower"):
		d.Verdict = "better"
	default:
		d.Verdict = "worse"
	}
	return d
}

// Median of at least one value.
func Median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// Text is the comparison for people.
func (c *Comparison) Text() string {
	var b strings.Builder
	single := false
	for _, s := range c.Scenarios {
		fmt.Fprintf(&b, "%s\n", s.Name)
		w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
		fmt.Fprint(w, "  figure\tA\tB\tB/A\tof any pair\tB is\n")
		for _, d := range s.Differences {
			single = single || d.RunsA == 1 || d.RunsB == 1
			ratio, spread := "-", "-"
			if d.Most > 0 {
				ratio, spread = fmt.Sprintf("%.3f", d.Ratio), fmt.Sprintf("%.3f - %.3f", d.Lowest, d.Most)
			}
			fmt.Fprintf(w, "  %s, %s\t%s\t%s\t%s\t%s\t%s\n", d.Name, d.Unit, number(d.A), number(d.B), ratio, spread, d.Verdict)
		}
		_ = w.Flush() // to memory
	}
	if single {
		fmt.Fprintf(&b, "A side with one run has no spread: differences below %.0f %% are called noise there. Run at least three times.\n", 100*noise)
	}
	return b.String()
}
