package shards

import (
	"fmt"
	"time"

	"im-gateway/codec"
)

// Options describe a run. Zero values take the defaults named.
type Options struct {
	Sessions  int           `json:"sessions"`  // 1,000,000
	Shards    int           `json:"shards"`    // 1
	Loops     int           `json:"loops"`     // simulated event loops; 1
	Heartbeat time.Duration `json:"heartbeat"` // between pings, and between refreshes of presence; 30 s
	Size      int           `json:"size"`      // bytes of content of a message or a push; 128

	Messages int           `json:"messages"`  // client messages routed as fast as possible; 2,000,000
	Batch    int           `json:"batch"`     // of them, or of pushes, in one batch; 256
	Pushes   int           `json:"pushes"`    // deliveries of records for one user each; 1,000,000
	Targets  int           `json:"targets"`   // deliveries of records for Fanout users each; 2,000,000
	Fanout   int           `json:"fanout"`    // 500
	LowRate  int           `json:"low_rate"`  // messages a second, one by one, in the stage of low load; 5,000
	LowTime  time.Duration `json:"low_time"`  // of that stage; 3 s
	IdleTime time.Duration `json:"idle_time"` // of the stage with heartbeats only; 10 s
}

const maxSessions = 10_000_000

func (o *Options) validate() error {
	for _, f := range []struct {
		name     string
		v        *int
		def, max int
	}{
		{"sessions", &o.Sessions, 1_000_000, maxSessions},
		{"shards", &o.Shards, 1, codec.MaxShards},
		{"loops", &o.Loops, 1, codec.MaxLoops},
		{"size", &o.Size, 128, 1 << 20},
		{"messages", &o.Messages, 2_000_000, 1 << 40},
		{"batch", &o.Batch, 256, 1 << 16},
		{"pushes", &o.Pushes, 1_000_000, 1 << 40},
		{"targets", &o.Targets, 2_000_000, 1 << 40},
		{"fan-out", &o.Fanout, 500, 1 << 16},
		{"low rate", &o.LowRate, 5000, 1_000_000},
	} {
		if *f.v == 0 {
			*f.v = f.def
		}
		if *f.v < 1 || *f.v > f.max {
			return fmt.Errorf("%s: %d, must be 1 to %d", f.name, *f.v, f.max)
		}
	}
	for _, f := range []struct {
		name string
		v    *time.Duration
		def  time.Duration
	}{
		{"heartbeat", &o.Heartbeat, 30 * time.Second},
		{"low time", &o.LowTime, 3 * time.Second},
		{"idle time", &o.IdleTime, 10 * time.Second},
	} {
		if *f.v == 0 {
			*f.v = f.def
		}
		if *f.v < 100*time.Millisecond || *f.v > time.Hour {
			return fmt.Errorf("%s: %s, must be 100ms to 1h", f.name, *f.v)
		}
	}
	return nil
}
