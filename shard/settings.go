package shard

import "fmt"

// Settings are the options that may change while the shards run, see Set.Prepare.
type Settings struct {
	EgressBudget       int // bytes that may wait for one session
	NodeEgressBudget   int // bytes that may wait for all sessions together; 0: no bound of its own
	CloseRate          int // sessions closed per second by CloseAll; 10,000
	MaxMessageBytes    int // told to clients
	MaxSessionInFlight int // upstream messages without a result, per session; 256

	UserMessagesPerSecond int // of all sessions of a user, two seconds' worth at once; 0: no limit
	UserBytesPerSecond    int // of their records; 0: no limit
}

// rules are settings in force, with what follows from them. They are never written to: each shard takes
// the newest at the beginning of a round.
type rules struct {
	Settings
	rate userRate
}

func newRules(s Settings) (*rules, error) {
	s.CloseRate = orDefault(s.CloseRate, defaultCloseRate)
	s.MaxSessionInFlight = orDefault(s.MaxSessionInFlight, 256)
	switch {
	case s.EgressBudget < 1 || s.EgressBudget > maxEgressBudget:
		return nil, fmt.Errorf("egress budget: %d bytes, must be 1 to %d", s.EgressBudget, maxEgressBudget)
	case s.NodeEgressBudget < 0:
		return nil, fmt.Errorf("egress budget of the node: %d bytes, must not be negative", s.NodeEgressBudget)
	case s.CloseRate < 1:
		return nil, fmt.Errorf("close rate: %d, must be positive", s.CloseRate)
	case s.MaxSessionInFlight < 1 || s.MaxSessionInFlight > MaxSessionInFlight:
		return nil, fmt.Errorf("messages in flight per session: %d, must be 1 to %d", s.MaxSessionInFlight, MaxSessionInFlight)
	case s.UserMessagesPerSecond < 0 || s.UserBytesPerSecond < 0:
		return nil, fmt.Errorf("rates of a user: %d messages, %d bytes, neither may be negative", s.UserMessagesPerSecond, s.UserBytesPerSecond)
	}
	return &rules{Settings: s, rate: newUserRate(s.UserMessagesPerSecond, s.UserBytesPerSecond)}, nil
}

// Prepare checks settings and returns what puts them in force: from every shard's next round on, for
// sessions that are open, too. apply cannot fail; settings are prepared and applied by one goroutine at a
// time, which may be any.
func (set *Set) Prepare(next Settings) (apply func(), err error) {
	r, err := newRules(next)
	if err != nil {
		return nil, fmt.Errorf("shard settings: %w", err)
	}
	return func() { set.rules.Store(r) }, nil
}
