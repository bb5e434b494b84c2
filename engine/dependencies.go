package engine

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
)

const (
	// dependencyEvery is how often each dependency is asked, dependencyPatience how long for an answer.
	dependencyEvery    = 5 * time.Second
	dependencyPatience = 3 * time.Second
)

// The states of a dependency.
const (
	dependencyUnknown = "unknown" // it was not asked yet
	dependencyUp      = "up"
	dependencyDown    = "down"
)

// dependencyLogic is im-logic's name among the dependencies; the others are named as the conditions of
// readiness are.
const dependencyLogic = "im-logic"

// dependencyState is what is known of one dependency.
type dependencyState struct {
	Name  string
	State string
	Since time.Time // when State was seen first
	Error string    // of the last answer; empty: none, or it is up
}

// dependencies asks what the gateway needs of others, for people to see; nothing is decided by it. All
// methods may be called from any goroutine.
type dependencies struct {
	every time.Duration
	log   zerolog.Logger
	up    *prometheus.GaugeVec

	mu   sync.Mutex
	list []dependencyState
}

func newDependencies(names []string, log zerolog.Logger, reg prometheus.Registerer) (*dependencies, error) {
	d := &dependencies{
		every: dependencyEvery, log: log,
		up: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "im_gateway_dependency_up",
			Help: "Whether the dependency answered when it was asked last, every 5 s: 1 or 0; none until it was asked.",
		}, []string{"dependency"}),
	}
	now := time.Now()
	for _, name := range names {
		d.list = append(d.list, dependencyState{Name: name, State: dependencyUnknown, Since: now})
	}
	if err := reg.Register(d.up); err != nil {
		return nil, fmt.Errorf("register the metrics of dependencies: %w", err)
	}
	return d, nil
}

// watch asks for a dependency's state now and then until ctx ends.
func (d *dependencies) watch(ctx context.Context, name string, ask func(context.Context) error) error {
	t := time.NewTicker(d.every)
	defer t.Stop()
	for {
		askCtx, cancel := context.WithTimeout(ctx, dependencyPatience)
		err := ask(askCtx)
		cancel()
		if ctx.Err() != nil {
			return nil
		}
		d.saw(name, err)
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// saw notes an answer. The log has the changes only: what an outage does is logged where it does it.
func (d *dependencies) saw(name string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	i := slices.IndexFunc(d.list, func(s dependencyState) bool { return s.Name == name })
	if i < 0 {
		return
	}
	s, before, now := &d.list[i], d.list[i], time.Now()
	s.State, s.Error = dependencyUp, ""
	if err != nil {
		s.State, s.Error = dependencyDown, err.Error()
		d.up.WithLabelValues(name).Set(0)
	} else {
		d.up.WithLabelValues(name).Set(1)
	}
	if s.State == before.State {
		return
	}
	s.Since = now
	switch {
	case err != nil:
		d.log.Warn().Err(err).Str("dependency", name).Msg("a dependency does not answer")
	case before.State == dependencyDown:
		d.log.Info().Str("dependency", name).Dur("outage_ms", now.Sub(before.Since)).Msg("a dependency answers again")
	}
}

// states returns what is known, in the order of the names.
func (d *dependencies) states() []dependencyState {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.list)
}
