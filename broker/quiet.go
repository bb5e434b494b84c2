package broker

import "time"

const quietInterval = 5 * time.Second

// quiet lets one log line through per quietInterval. It belongs to one goroutine.
type quiet struct {
	last       time.Time
	suppressed int
}

// allow reports whether to log, and how often it said no since it last said yes.
func (q *quiet) allow() (suppressed int, ok bool) {
	now := time.Now()
	if now.Sub(q.last) < quietInterval {
		q.suppressed++
		return 0, false
	}
	suppressed, q.last, q.suppressed = q.suppressed, now, 0
	return suppressed, true
}
