package bench

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Rate is a rate of events per second that goes evenly from From to To over a stage of load.
type Rate struct{ From, To float64 }

// ParseRates reads the stages of a run: "1000", "1000,5000,20000" (a report for each), or
// "1000..20000" (a ramp).
func ParseRates(s string) ([]Rate, error) {
	var rates []Rate
	for _, stage := range strings.Split(s, ",") {
		from, to, ramp := strings.Cut(strings.TrimSpace(stage), "..")
		if !ramp {
			to = from
		}
		var r Rate
		for _, p := range []struct {
			s string
			v *float64
		}{{from, &r.From}, {to, &r.To}} {
			v, err := strconv.ParseFloat(p.s, 64)
			if err != nil || !(v >= 0 && v <= 10e6) {
				return nil, fmt.Errorf("rate %q: give a number up to 10000000, as in 5000 or 1000,5000 or 1000..5000", stage)
			}
			*p.v = v
		}
		if r.From+r.To == 0 {
			return nil, fmt.Errorf("rate %q: give a rate above 0", stage)
		}
		rates = append(rates, r)
	}
	return rates, nil
}

// String is the rate as ParseRates reads it.
func (r Rate) String() string {
	if r.From == r.To {
		return strconv.FormatFloat(r.From, 'f', -1, 64)
	}
	return strconv.FormatFloat(r.From, 'f', -1, 64) + ".." + strconv.FormatFloat(r.To, 'f', -1, 64)
}

// split is one n-th of the rate, for one of n processes.
func (r Rate) split(n int) Rate { return Rate{r.From / float64(n), r.To / float64(n)} }

// schedule is when the events of one stage are due: a warm-up at the first rate, then the
// measured time.
type schedule struct {
	rate           Rate
	warmup, length time.Duration
}

func (s schedule) total() time.Duration { return s.warmup + s.length }

// count is how many events are due by d since the start.
func (s schedule) count(d time.Duration) int64 {
	d = min(d, s.total())
	n := s.rate.From * min(d, s.warmup).Seconds()
	if d > s.warmup {
		t := (d - s.warmup).Seconds()
		n += s.rate.From*t + (s.rate.To-s.rate.From)*t*t/(2*s.length.Seconds())
	}
	return int64(n)
}

// due is when event k, from 0, is due; the inverse of count.
func (s schedule) due(k int64) time.Duration {
	n := float64(k + 1)
	warm := s.rate.From * s.warmup.Seconds()
	var t float64
	if n <= warm {
		t = n / s.rate.From
	} else {
		t = s.warmup.Seconds() + s.afterWarmup(n-warm)
	}
	return time.Duration(t * float64(time.Second))
}

func (s schedule) afterWarmup(n float64) float64 {
	a := (s.rate.To - s.rate.From) / (2 * s.length.Seconds())
	if a == 0 {
		return n / s.rate.From
	}
	return (math.Sqrt(max(0, s.rate.From*s.rate.From+4*a*n)) - s.rate.From) / (2 * a)
}
