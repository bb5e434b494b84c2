package report

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
)

// ReadFile reads a report file.
func ReadFile(name string) (*Set, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("read the report: %w", err)
	}
	var s Set
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("read the report %s: %w", name, err)
	}
	if s.Schema != 1 || len(s.Runs) == 0 {
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

// WriteCSV writes a row for each second of each run.
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
		for _, p := range r.Series {
			row = append(row[:0], strconv.Itoa(i+1), r.Label, r.Scenario, fmt.Sprint(r.Options["rate"]),
				strconv.FormatFloat(p.T, 'f', 3, 64), strconv.FormatBool(p.Measured))
			row = cells(row, rateNames, p.Rates)
			row = cells(row, p50Names, p.P50)
			row = cells(row, p99Names, p.P99)
			for _, n := range serverNames {
				row = append(row, r.nearest(n, p.T)...)
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

// nearest are the cells of a server's sample nearest to t, empty when it was not watched.
func (r *Report) nearest(server string, t float64) []string {
	for _, p := range r.Servers {
		if p.Name != server {
			continue
		}
		best := -1
		for i, s := range p.Samples {
			if best < 0 || abs(s.T-t) < abs(p.Samples[best].T-t) {
				best = i
			}
		}
		if best >= 0 {
			s := p.Samples[best]
			return []string{strconv.FormatFloat(s.CPU, 'f', 3, 64), strconv.FormatInt(s.RSS, 10)}
		}
	}
	return []string{"", ""}
}

func abs(v float64) float64 { return max(v, -v) }
