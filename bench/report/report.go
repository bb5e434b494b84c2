// Package report is what a run of im-bench says: its schema, and its forms for people and
// programs.
package report

import (
	"fmt"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Set is what a report file holds.
type Set struct {
	Schema int       `json:"schema"` // 1
	Runs   []*Report `json:"runs"`
}

// Report is one run of one scenario at one rate.
type Report struct {
	Scenario string         `json:"scenario"`
	Label    string         `json:"label,omitempty"` // who was measured
	Started  time.Time      `json:"started"`
	Seconds  float64        `json:"seconds"` // measured time, warm-up left out
	Options  map[string]any `json:"options"` // as given, no secrets
	Machine  Machine        `json:"machine"`
	Values   []Value        `json:"values"` // the headline figures, in order
	Counts   []Count        `json:"counts"`
	Latency  []Latency      `json:"latency"`
	Series   []Point        `json:"series"`  // one a second, warm-up included
	Servers  []Process      `json:"servers"` // by pid
	Clients  []Process      `json:"clients"` // the bench processes themselves
	Checks   []Check        `json:"checks"`
	Warnings []string       `json:"warnings"`
}

// Machine is where the run ran.
type Machine struct {
	CPUs   int    `json:"cpus"`
	CPU    string `json:"cpu"`
	Memory int64  `json:"memory"` // bytes
	Kernel string `json:"kernel"`
	Go     string `json:"go"`
}

// Value is one headline figure.
type Value struct {
	Name   string  `json:"name"`
	Unit   string  `json:"unit"`
	Value  float64 `json:"value"`
	Better string  `json:"better,omitempty"` // "lower", "higher" or "": neither
}

// Count is how often something happened.
type Count struct {
	Name string `json:"name"`
	N    int64  `json:"n"`
}

// Latency is a distribution in microseconds. Hist is its HdrHistogram in the V2 compressed form,
// in base64.
type Latency struct {
	Name string `json:"name"`
	N    int64  `json:"n"`
	P50  int64  `json:"p50"`
	P90  int64  `json:"p90"`
	P99  int64  `json:"p99"`
	P999 int64  `json:"p999"`
	Max  int64  `json:"max"`
	Hist string `json:"hist"`
}

// Point is one second. T counts from the start of the load; latencies are in microseconds.
type Point struct {
	T        float64            `json:"t"`
	Measured bool               `json:"measured"`
	Rates    map[string]float64 `json:"rates"` // per second
	P50      map[string]float64 `json:"p50"`
	P99      map[string]float64 `json:"p99"`
}

// Process is what a process took within the measured time.
type Process struct {
	Name       string       `json:"name"`
	PID        int          `json:"pid"`
	CPUSeconds float64      `json:"cpu_seconds"` // user and system
	RSSStart   int64        `json:"rss_start"`   // bytes
	RSSEnd     int64        `json:"rss_end"`
	RSSPeak    int64        `json:"rss_peak"`
	Anon       int64        `json:"anon"` // RssAnon at the end
	Samples    []ProcSample `json:"samples"`
}

// ProcSample is one look at a process.
type ProcSample struct {
	T   float64 `json:"t"`   // seconds since the start of the load
	CPU float64 `json:"cpu"` // cores in use since the sample before
	RSS int64   `json:"rss"` // bytes
}

// Check is one invariant.
type Check struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"`
}

// Failed are the checks that did not hold.
func (r *Report) Failed() []Check {
	var out []Check
	for _, c := range r.Checks {
		if !c.OK {
			out = append(out, c)
		}
	}
	return out
}

// Count is the count of a name, 0 when there is none.
func (r *Report) Count(name string) int64 {
	for _, c := range r.Counts {
		if c.Name == name {
			return c.N
		}
	}
	return 0
}

// NewLatency sums a histogram of microseconds up.
func NewLatency(name string, h *hdrhistogram.Histogram) Latency {
	enc, err := h.Encode(hdrhistogram.V2CompressedEncodingCookieBase)
	if err != nil {
		enc = nil // the percentiles below stand for themselves
	}
	return Latency{
		Name: name, N: h.TotalCount(), Hist: string(enc),
		P50: h.ValueAtQuantile(50), P90: h.ValueAtQuantile(90), P99: h.ValueAtQuantile(99),
		P999: h.ValueAtQuantile(99.9), Max: h.Max(),
	}
}

// Histogram is the distribution that l sums up.
func (l Latency) Histogram() (*hdrhistogram.Histogram, error) {
	h, err := hdrhistogram.Decode([]byte(l.Hist))
	if err != nil {
		return nil, fmt.Errorf("read the histogram of %s: %w", l.Name, err)
	}
	return h, nil
}
