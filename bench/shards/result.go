package shards

import "time"

// Result is what a run found.
type Result struct {
	Options         Options       `json:"options"`
	Sessions        int           `json:"sessions"`
	BytesSlope      float64       `json:"bytes_per_session_slope"` // of Memory
	BytesPerSession float64       `json:"bytes_per_session"`       // live heap, all sessions open, less that of none
	Memory          []MemoryPoint `json:"memory"`

	NsPerMessage float64 `json:"ns_per_message"` // Stage.Busy of "messages"
	NsPerPush    float64 `json:"ns_per_push"`    // Stage.Busy of "pushes"
	NsPerTarget  float64 `json:"ns_per_target"`  // Stage.Busy of "fanout"

	// How long what was due held a shard at a time, in all stages after the sessions were open. Both
	// are the upper ends of buckets that are a tenth wide; a thread that was not running counts too.
	Ticks     int64         `json:"ticks"`
	TickP99   time.Duration `json:"tick_p99"`
	TickMax   time.Duration `json:"tick_max"`
	Over2ms   int64         `json:"ticks_over_2ms"`
	Pings     int64         `json:"pings"`
	Refreshes int64         `json:"refreshes"`

	Stages []Stage `json:"stages"`
}

// MemoryPoint is the live heap at a number of sessions.
type MemoryPoint struct {
	Sessions int   `json:"sessions"`
	Heap     int64 `json:"heap"` // bytes, after two garbage collections
}

// Stage is one part of a run. Times are ns per item, an item being a session opened, a message, or a
// target; counts are per item as well.
//
// Busy is what an item costs a shard from waking up to going back to sleep, records and sessions being
// in other caches or in none; the time that a thread was kept from running counts, so a busy machine
// makes it larger, never smaller. CPU has beside that what waking up costs, and the collector.
type Stage struct {
	Name      string  `json:"name"`
	Items     int64   `json:"items"`
	Seconds   float64 `json:"seconds"`
	Busy      float64 `json:"busy_ns"`      // of the shards by their own clock
	CPU       float64 `json:"cpu_ns"`       // of the process less the generator's thread
	Generator float64 `json:"generator_ns"` // CPU of the generator's thread, which waits by spinning
	Rounds    float64 `json:"rounds"`       // of the shards: how often one woke up, or went round
	Batches   float64 `json:"batches"`      // handed to event loops: each is a task and an eventfd write
	Allocs    float64 `json:"allocs"`       // of the process
	Pings     int64   `json:"pings"`        // in all
}

// Stage returns the stage of that name, empty where there is none.
func (r *Result) Stage(name string) *Stage {
	for i := range r.Stages {
		if r.Stages[i].Name == name {
			return &r.Stages[i]
		}
	}
	return &Stage{}
}

// slope is that of the line through the points, by least squares.
func slope(points []MemoryPoint) float64 {
	var n, sx, sy, sxx, sxy float64
	for _, p := range points {
		x, y := float64(p.Sessions), float64(p.Heap)
		n, sx, sy, sxx, sxy = n+1, sx+x, sy+y, sxx+x*x, sxy+x*y
	}
	return (n*sxy - sx*sy) / (n*sxx - sx*sx)
}
