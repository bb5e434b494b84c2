package report

import (
	"errors"
	"fmt"
	"math"
	"strings"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Merge makes one report of those of several client processes, or hosts, that ran the same scenario
// at the same time: counts, rates and histograms are added; the percentiles of a second, which
// cannot be, are those of the worst part. A server that several parts watched counts once. The
// values are left to be worked out anew.
func Merge(parts []*Report) (*Report, error) {
	if len(parts) == 0 {
		return nil, errors.New("nothing to merge")
	}
	first := parts[0]
	out := &Report{
		Scenario: first.Scenario, Label: first.Label, Started: first.Started, Machine: first.Machine,
		Options: map[string]any{},
	}
	for k, v := range first.Options {
		out.Options[k] = v
	}
	m := merging{out: out, hists: map[string]*hdrhistogram.Histogram{}}
	var users float64
	for _, p := range parts {
		if p.Scenario != first.Scenario {
			return nil, fmt.Errorf("reports of %s and of %s do not make one", first.Scenario, p.Scenario)
		}
		if p.Started.Before(out.Started) {
			out.Started = p.Started
		}
		out.Seconds = max(out.Seconds, p.Seconds)
		switch n := p.Options["users"].(type) {
		case int:
			users += float64(n)
		case float64: // from a file
			users += n
		}
		if err := m.add(p); err != nil {
			return nil, err
		}
	}
	if users > 0 {
		out.Options["users"] = int(users)
	}
	for _, name := range m.order {
		out.Latency = append(out.Latency, NewLatency(name, m.hists[name]))
	}
	return out, nil
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
			sum.Merge(h)
		} else {
			m.hists[l.Name] = h
			m.order = append(m.order, l.Name)
		}
	}
	for i, point := range p.Series {
		m.point(i, point)
	}
	for _, s := range p.Servers {
		m.server(s)
	}
	m.out.Clients = append(m.out.Clients, p.Clients...)
	for _, c := range p.Checks {
		m.check(c)
	}
	for _, w := range p.Warnings {
		if !has(m.out.Warnings, w) {
			m.out.Warnings = append(m.out.Warnings, w)
		}
	}
	return nil
}

func has(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
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
	m := merging{out: &Report{}}
	for _, p := range parts {
		if p != nil {
			m.point(0, *p)
		}
	}
	if len(m.out.Series) == 0 {
		return Point{}
	}
	return m.out.Series[0]
}

// point adds the i-th second: parts begin together, so seconds are told by their place.
func (m *merging) point(i int, p Point) {
	if i == len(m.out.Series) {
		m.out.Series = append(m.out.Series, Point{
			T: math.Round(p.T), Measured: p.Measured,
			Rates: map[string]float64{}, P50: map[string]float64{}, P99: map[string]float64{},
		})
	}
	sum := &m.out.Series[i]
	sum.Measured = sum.Measured || p.Measured
	for k, v := range p.Rates {
		sum.Rates[k] += v
	}
	for k, v := range p.P50 {
		sum.P50[k] = max(sum.P50[k], v)
	}
	for k, v := range p.P99 {
		sum.P99[k] = max(sum.P99[k], v)
	}
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
