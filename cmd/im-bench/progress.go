package main

import (
	"fmt"
	"io"
	"os"
	"sort"
	"strings"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/schollz/progressbar/v3"

	"im-gateway/bench"
	"im-gateway/bench/report"
)

// progress shows a bar on a terminal and prints a line a second elsewhere.
func progress(w io.Writer, o *bench.Options) bench.Hooks {
	if f, ok := w.(*os.File); ok && isatty.IsTerminal(f.Fd()) {
		return progressBar(f, o)
	}
	return bench.Hooks{
		Phase:    func(what string) { fmt.Fprintln(w, what) },
		Connect:  func(up, _ int) { fmt.Fprintf(w, "  %d of %d connected\n", up, o.Users) },
		Progress: func(p report.Point) { fmt.Fprintf(w, "  %5.1f s  %s\n", p.T, describe(p)) },
	}
}

func progressBar(w *os.File, o *bench.Options) bench.Hooks {
	length := o.Warmup + o.Duration
	newBar := func(most int, what string) *progressbar.ProgressBar {
		return progressbar.NewOptions(most, progressbar.OptionSetWriter(w), progressbar.OptionSetDescription(what),
			progressbar.OptionSetWidth(24), progressbar.OptionSetPredictTime(true), progressbar.OptionSetElapsedTime(true),
			progressbar.OptionClearOnFinish(), progressbar.OptionThrottle(100*time.Millisecond))
	}
	var bar *progressbar.ProgressBar
	end := func() {
		if bar != nil {
			_ = bar.Finish() // to a terminal
			bar = nil
		}
	}
	return bench.Hooks{
		Phase: func(what string) {
			end()
			switch what {
			case "connect":
				bar = newBar(o.Users, what)
			case "load":
				bar = newBar(int(length.Seconds()+0.999), what)
			default:
				bar = newBar(-1, what)
			}
		},
		Connect: func(up, _ int) {
			if bar != nil {
				_ = bar.Set(up) // to a terminal
			}
		},
		Progress: func(p report.Point) {
			if bar != nil {
				bar.Describe(describe(p))
				_ = bar.Set(int(p.T)) // to a terminal
			}
		},
	}
}

// describe is what happened in a second.
func describe(p report.Point) string {
	names := make([]string, 0, len(p.Rates))
	for n, rate := range p.Rates {
		if rate > 0 {
			names = append(names, n)
		}
	}
	sort.Strings(names)
	var parts []string
	for _, n := range names {
		s := fmt.Sprintf("%s %.0f/s", n, p.Rates[n])
		if v, ok := p.P50[n]; ok {
			s += fmt.Sprintf(" (p50 %.2f, p99 %.2f ms)", v/1000, p.P99[n]/1000)
		}
		parts = append(parts, s)
	}
	return strings.Join(parts, "  ")
}
