package main

import (
	"fmt"
	"io"
	"sort"
	"strings"

	"im-gateway/bench"
	"im-gateway/bench/report"
)

// progress prints a line a second.
func progress(w io.Writer) bench.Hooks {
	return bench.Hooks{
		Phase:   func(what string) { fmt.Fprintf(w, "%s\n", what) },
		Connect: func(up, want int) { fmt.Fprintf(w, "  %d of %d connected\n", up, want) },
		Progress: func(p report.Point) {
			names := make([]string, 0, len(p.Rates))
			for n := range p.Rates {
				names = append(names, n)
			}
			sort.Strings(names)
			var b strings.Builder
			for _, n := range names {
				fmt.Fprintf(&b, "  %s %.0f/s", n, p.Rates[n])
				if v, ok := p.P50[n]; ok {
					fmt.Fprintf(&b, " (p50 %.2f p99 %.2f ms)", v/1000, p.P99[n]/1000)
				}
			}
			fmt.Fprintf(w, "  %5.1f s%s\n", p.T, b.String())
		},
	}
}
