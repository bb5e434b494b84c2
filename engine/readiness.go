package engine

import (
	"slices"
	"sync"
)

// Condition is one thing that has to hold before the gateway is ready.
type Condition struct {
	Name   string `json:"name"`
	Reason string `json:"reason,omitempty"` // why it does not hold yet
}

// drainCondition is what is missing from the beginning of a drain on.
const drainCondition = "draining"

// Readiness says whether the gateway may be sent clients: once every named condition has been met,
// until the drain begins. A condition stays met: an outage later is a metric, for one fault of a
// shared dependency must not take every gateway out of service at once. All methods may be called
// from any goroutine.
type Readiness struct {
	ready chan struct{} // closed when every condition has been met

	mu       sync.Mutex
	missing  []Condition
	draining string // why; empty: not draining
}

// NewReadiness returns a Readiness that waits for the named conditions, at least one.
func NewReadiness(names ...string) *Readiness {
	r := &Readiness{ready: make(chan struct{})}
	for _, name := range names {
		r.missing = append(r.missing, Condition{Name: name, Reason: "not started"})
	}
	return r
}

// Waiting says why a condition does not hold yet. It does nothing once the condition was met.
func (r *Readiness) Waiting(name, reason string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.missing {
		if r.missing[i].Name == name {
			r.missing[i].Reason = reason
		}
	}
}

// Met says that a condition holds.
func (r *Readiness) Met(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.missing) == 0 {
		return
	}
	r.missing = slices.DeleteFunc(r.missing, func(c Condition) bool { return c.Name == name })
	if len(r.missing) == 0 {
		close(r.ready)
	}
}

// Drain ends the readiness for good.
func (r *Readiness) Drain(reason string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.draining = reason
}

// Done is closed when every condition has been met. A drain does not undo it.
func (r *Readiness) Done() <-chan struct{} { return r.ready }

// Draining tells whether the drain has begun.
func (r *Readiness) Draining() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.draining != ""
}

// Missing returns the conditions that keep the gateway from being ready; none when it is.
func (r *Readiness) Missing() []Condition {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := slices.Clone(r.missing)
	if r.draining != "" {
		list = append(list, Condition{Name: drainCondition, Reason: r.draining})
	}
	return list
}
