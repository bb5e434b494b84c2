package report

import (
	"cmp"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
)

// ReadFile reads a report file. It fails for one of another schema, or without runs.
func ReadFile(name string) (*Set, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("read the report: %w", err)
	}
	var s Set
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("read the report %s: %w", name, err)
	}
	if s.Schema != 1 || len(s.Runs) == 0 || slices.Contains(s.Runs, nil) {
		return nil, fmt.Errorf("read the report %s: schema %d with %d runs; want a file that im-bench -json wrote", name, s.Schema, len(s.Runs))
	}
	return &s, nil
}

// WriteJSON writes a report file.
func WriteJSON(w io.Writer, s *Set) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", " ")
	return enc.Encode(s)
}

// WriteCSV writes a row for each second of each run. A cell is empty where there is nothing to say.
// Servers of one name are added.
func WriteCSV(w io.Writer, s *Set) error {
	var rates, p50, p99 []map[string]float64
	servers := map[string]bool{}
	var serverNames []string
	for _, r := range s.Runs {
		for _, p := range r.Series {
			rates, p50, p99 = append(rates, p.Rates), append(p50, p.P50), append(p99, p.P99)
		}
		for _, p := range r.Servers {
			if !servers[p.Name] {
				servers[p.Name] = true
				serverNames = append(serverNames, p.Name)
			}
		}
	}
	rateNames, p50Names, p99Names := names(rates...), names(p50...), names(p99...)
	row := []string{"run", "label", "scenario", "rate", "t_seconds", "measured"}
	for _, n := range rateNames {
		row = append(row, n+" per second")
	}
	for _, n := range p50Names {
		row = append(row, n+" p50 us")
	}
	for _, n := range p99Names {
		row = append(row, n+" p99 us")
	}
	for _, n := range serverNames {
		row = append(row, n+" cores", n+" rss bytes")
	}
	c := csv.NewWriter(w)
	if err := c.Write(row); err != nil {
		return err
	}
	for i, r := range s.Runs {
		rate := ""
		if v, ok := r.Options["rate"]; ok {
			rate = option(v)
		}
		for _, p := range r.Series {
			row = append(row[:0], strconv.Itoa(i+1), r.Label, r.Scenario, rate,
				strconv.FormatFloat(p.T, 'f', 3, 64), strconv.FormatBool(p.Measured))
			row = cells(row, rateNames, p.Rates)
			row = cells(row, p50Names, p.P50)
			row = cells(row, p99Names, p.P99)
			for _, n := range serverNames {
				row = append(row, r.serverCells(n, p.T)...)
			}
			if err := c.Write(row); err != nil {
				return err
			}
		}
	}
	c.Flush()
	return c.Error()
}

func cells(row, names []string, values map[string]float64) []string {
	for _, n := range names {
		v, ok := values[n]
		if !ok {
			row = append(row, "")
			continue
		}
		row = append(row, strconv.FormatFloat(v, 'f', -1, 64))
	}
	return row
}

// serverCells are the cores and the memory of the servers of a name at t, from the samples nearest
// to it.
func (r *Report) serverCells(name string, t float64) []string {
	var cpu float64
	var rss int64
	found := false
	for _, p := range r.Servers {
		if s, ok := nearest(p.Samples, t); ok && p.Name == name {
			cpu, rss, found = cpu+s.CPU, rss+s.RSS, true
		}
	}
	if !found {
		return []string{"", ""}
	}
	return []string{strconv.FormatFloat(cpu, 'f', 3, 64), strconv.FormatInt(rss, 10)}
}

// nearest is the sample nearest to t, when there is one within a second of it or samples of both
// sides.
func nearest(samples []ProcSample, t float64) (ProcSample, bool) {
	i, _ := slices.BinarySearchFunc(samples, t, func(s ProcSample, t float64) int { return cmp.Compare(s.T, t) })
	switch {
	case i == len(samples): // t is behind all
		if i == 0 || t-samples[i-1].T > 1 {
			return ProcSample{}, false
		}
		return samples[i-1], true
	case i == 0:
		return samples[0], samples[0].T-t <= 1
	case t-samples[i-1].T < samples[i].T-t:
		return samples[i-1], true
	}
	return samples[i], true
}
