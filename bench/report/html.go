package report

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
)

//go:embed page.html
var pageHTML string

//go:embed assets/uPlot.iife.min.js
var uplotJS string

//go:embed assets/uPlot.min.css
var uplotCSS string

//go:embed assets/uPlot.LICENSE
var uplotLicense string

var pageTemplate = template.Must(template.New("page").Funcs(template.FuncMap{
	"number": number, "ms": ms, "mib": mib, "gib": func(b int64) float64 { return float64(b) / (1 << 30) },
	"visible": func(c Count) bool { return !strings.HasSuffix(c.Name, ", measured") },
	"option":  option,
	"cores":   (*Report).cores,
	"both":    func(r *Report) []Process { return slices.Concat(r.Servers, r.Clients) },
}).Parse(pageHTML))

// WriteHTML writes one page that needs nothing else: the charts' library is in it.
func WriteHTML(w io.Writer, s *Set) error {
	charts, err := json.Marshal(chartsOf(s))
	if err != nil {
		return fmt.Errorf("charts: %w", err)
	}
	return pageTemplate.Execute(w, struct {
		Runs   []*Report
		JS     template.JS
		CSS    template.CSS
		Charts template.JS // JSON; the encoder escapes what could end the script
	}{s.Runs, template.JS("/*\n" + uplotLicense + "*/\n" + uplotJS), template.CSS(uplotCSS), template.JS(charts)}) //nolint:gosec // our own files
}

// chart is one of the page's, as its script takes it. X and each series are of one length; nil: no
// value there.
type chart struct {
	Run    int       `json:"run"` // its place in the set; -1: of all runs
	Title  string    `json:"title"`
	Kind   string    `json:"kind"` // "time" or "percentile"
	Unit   string    `json:"unit"`
	Warmup float64   `json:"warmup"` // seconds from the left that were not measured
	X      []float64 `json:"x"`
	Lines  []series  `json:"lines"`
}

type series struct {
	Name  string `json:"name"`
	Color int    `json:"color"`
	Faint bool   `json:"faint"` // a lesser companion of the line of the same colour
	Y     []any  `json:"y"`
}

// chartsOf are the charts that have something to show.
func chartsOf(s *Set) []chart {
	all := percentiles(s)
	if all.Run = -1; len(s.Runs) == 1 {
		all.Run = 0
	}
	charts := []chart{all}
	for i, r := range s.Runs {
		for _, c := range []chart{
			r.latencyOverTime(), r.throughput(), r.processes("CPU, cores", "cores", func(p ProcSample) float64 { return p.CPU }),
			r.processes("memory, MiB", "MiB", func(p ProcSample) float64 { return mib(p.RSS) }),
		} {
			c.Run, c.Warmup = i, r.warmup()
			charts = append(charts, c)
		}
	}
	return slices.DeleteFunc(charts, func(c chart) bool { return len(c.Lines) == 0 || len(c.X) < 2 })
}

// warmup is how long the load ran before the first second that was measured.
func (r *Report) warmup() float64 {
	from := 0.0
	for _, p := range r.Series {
		if p.Measured {
			return from
		}
		from = p.T
	}
	return 0
}

// percentiles is one line for each run and latency, over 1/(1-q).
func percentiles(s *Set) chart {
	c := chart{Title: "latency by percentile, ms", Kind: "percentile", Unit: "ms"}
	for x := 1.0; x <= 10000; x *= 1.12 {
		c.X = append(c.X, x)
	}
	for i, r := range s.Runs {
		for _, l := range r.Latency {
			h, err := l.Histogram()
			if err != nil || h.TotalCount() == 0 {
				continue
			}
			line := series{Name: l.Name, Color: len(c.Lines)}
			if len(s.Runs) > 1 {
				line.Name = fmt.Sprintf("%d: %s %s", i+1, r.Label, l.Name)
			}
			for _, x := range c.X {
				if x > float64(h.TotalCount()) { // one sample says nothing of what is above it
					line.Y = append(line.Y, nil)
					continue
				}
				line.Y = append(line.Y, float64(h.ValueAtQuantile(100*(1-1/x)))/1000)
			}
			c.Lines = append(c.Lines, line)
		}
	}
	return c
}

func (r *Report) seconds() []float64 {
	x := make([]float64, len(r.Series))
	for i, p := range r.Series {
		x[i] = p.T
	}
	return x
}

func (r *Report) line(of func(Point) map[string]float64, key string, scale float64) series {
	s := series{Name: key}
	for _, p := range r.Series {
		if v, ok := of(p)[key]; ok {
			s.Y = append(s.Y, v*scale)
		} else {
			s.Y = append(s.Y, nil)
		}
	}
	return s
}

func (r *Report) latencyOverTime() chart {
	c := chart{Title: "latency, ms", Kind: "time", Unit: "ms", X: r.seconds()}
	var all []map[string]float64
	for _, p := range r.Series {
		all = append(all, p.P50)
	}
	for i, n := range names(all...) {
		p50 := r.line(func(p Point) map[string]float64 { return p.P50 }, n, 0.001)
		p99 := r.line(func(p Point) map[string]float64 { return p.P99 }, n, 0.001)
		p50.Name, p50.Color, p50.Faint = n+" p50", i, true
		p99.Name, p99.Color = n+" p99", i
		c.Lines = append(c.Lines, p50, p99)
	}
	return c
}

func (r *Report) throughput() chart {
	c := chart{Title: "events per second", Kind: "time", Unit: "/s", X: r.seconds()}
	var all []map[string]float64
	for _, p := range r.Series {
		all = append(all, p.Rates)
	}
	for _, n := range names(all...) {
		if r.Count(n) > 0 {
			line := r.line(func(p Point) map[string]float64 { return p.Rates }, n, 1)
			line.Color = len(c.Lines)
			c.Lines = append(c.Lines, line)
		}
	}
	return c
}

// processes is one line for each process. They are sampled each at its own times, and one may have
// ended: X is all of these times, to 50 ms.
func (r *Report) processes(title, unit string, of func(ProcSample) float64) chart {
	const step = 0.05
	c := chart{Title: title, Kind: "time", Unit: unit}
	all := slices.Concat(r.Servers, r.Clients)
	place := map[int]int{} // in X, by steps
	for _, p := range all {
		for _, s := range p.Samples {
			place[int(math.Round(s.T/step))] = 0
		}
	}
	for i, at := range slices.Sorted(maps.Keys(place)) {
		place[at] = i
		c.X = append(c.X, float64(at)*step)
	}
	named := map[string]int{}
	for _, p := range all {
		named[p.Name]++
	}
	for _, p := range all {
		if len(p.Samples) == 0 {
			continue
		}
		line := series{Name: p.Name, Color: len(c.Lines), Y: make([]any, len(c.X))}
		if named[p.Name] > 1 {
			line.Name = fmt.Sprintf("%s (%d)", p.Name, p.PID)
		}
		for _, s := range p.Samples {
			line.Y[place[int(math.Round(s.T/step))]] = of(s)
		}
		c.Lines = append(c.Lines, line)
	}
	return c
}
