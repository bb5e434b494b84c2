package report

import (
	"fmt"
	"math"
	"slices"
	"sort"
	"strconv"
	"strings"
	"text/tabwriter"
)

// Title is what a report is called: who, by what, how much.
func (r *Report) Title() string {
	s := r.Scenario
	if r.Label != "" {
		s = r.Label + ": " + s
	}
	if v, ok := r.Options["users"]; ok {
		s += ", " + option(v) + " users"
	}
	if v, ok := r.Options["rate"].(string); ok {
		if strings.Contains(v, "outstanding") {
			s += ", " + v
		} else {
			s += ", " + v + "/s"
		}
	}
	return s
}

// Text is the report for people.
func (r *Report) Text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, %.0f s\n", r.Title(), r.Seconds)
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	for _, v := range r.Values {
		if !strings.HasSuffix(v.Name, " p50") && !strings.HasSuffix(v.Name, " p99") {
			fmt.Fprintf(w, "\t%s\t%s\t\t%s\n", v.Name, number(v.Value), v.Unit)
		}
	}
	_ = w.Flush() // to memory
	if len(r.Latency) > 0 {
		fmt.Fprint(w, "\tlatency, ms\tp50\tp90\tp99\tp99.9\tmax\t\n")
		for _, l := range r.Latency {
			fmt.Fprintf(w, "\t%s\t%s\t%s\t%s\t%s\t%s\t\n", l.Name, ms(l.P50), ms(l.P90), ms(l.P99), ms(l.P999), ms(l.Max))
		}
		_ = w.Flush()
	}
	var counts []string
	for _, c := range r.Counts {
		if !strings.HasSuffix(c.Name, ", measured") {
			counts = append(counts, fmt.Sprintf("%s %d", c.Name, c.N))
		}
	}
	if len(counts) > 0 {
		fmt.Fprintf(&b, "  in all: %s\n", strings.Join(counts, ", "))
	}
	if len(r.Servers)+len(r.Clients) > 0 {
		fmt.Fprint(w, "\tprocess\tpid\tcores\tmemory, MiB, peak\tat the end\tanonymous\t\n")
		for _, p := range slices.Concat(r.Servers, r.Clients) {
			fmt.Fprintf(w, "\t%s\t%d\t%s\t%.1f\t%.1f\t%.1f\t\n", p.Name, p.PID, r.cores(p), mib(p.RSSPeak), mib(p.RSSEnd), mib(p.Anon))
		}
		_ = w.Flush()
	}
	for _, c := range r.Checks {
		if c.OK {
			fmt.Fprintf(&b, "  ok      %s\n", c.Name)
		} else {
			fmt.Fprintf(&b, "  BROKEN  %s: %s\n", c.Name, c.Detail)
		}
	}
	for _, x := range r.Warnings {
		fmt.Fprintf(&b, "  warning: %s\n", x)
	}
	return b.String()
}

func ms(us int64) string { return fmt.Sprintf("%.2f", float64(us)/1000) }

func mib(b int64) float64 { return float64(b) / (1 << 20) }

// cores is how many cores p used in the measured time.
func (r *Report) cores(p Process) string {
	if r.Seconds <= 0 { // nothing was measured
		return "-"
	}
	return fmt.Sprintf("%.2f", p.CPUSeconds/r.Seconds)
}

func number(v float64) string {
	switch size := math.Abs(v); {
	case size >= 1000:
		return fmt.Sprintf("%.0f", v)
	case size > 0 && size < 0.1:
		return fmt.Sprintf("%.2g", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// option is an option's value for people, the same for a report just made as for one from a file,
// where all numbers are floating and all lists are of anything.
func option(v any) string {
	switch x := v.(type) {
	case float64:
		return strconv.FormatFloat(x, 'f', -1, 64)
	case []string:
		return strings.Join(x, ", ")
	case []any:
		list := make([]string, len(x))
		for i, e := range x {
			list[i] = option(e)
		}
		return strings.Join(list, ", ")
	}
	return fmt.Sprint(v)
}

// names are the keys of all the maps, sorted.
func names(maps ...map[string]float64) []string {
	seen := map[string]bool{}
	var out []string
	for _, m := range maps {
		for k := range m {
			if !seen[k] {
				seen[k] = true
				out = append(out, k)
			}
		}
	}
	sort.Strings(out)
	return out
}
