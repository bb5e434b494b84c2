package bench

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strconv"
	"strings"
)

// Dist is a distribution of whole numbers between Min and Max: all the same, uniform, or
// lognormal with half of them below Median.
type Dist struct {
	Kind     string // "fixed", "uniform" or "lognormal"
	Min, Max int
	Median   float64
	Sigma    float64 // of the logarithm
}

// Fixed is always n.
func Fixed(n int) Dist { return Dist{Kind: "fixed", Min: n, Max: n} }

// ParseDist reads "128", "64-1024" (uniform) or "lognormal:200,1.0,60000" (median, sigma, most).
func ParseDist(s string) (Dist, error) {
	bad := fmt.Errorf("distribution %q: give N, or MIN-MAX, or lognormal:MEDIAN,SIGMA,MAX", s)
	if rest, ok := strings.CutPrefix(s, "lognormal:"); ok {
		p := strings.Split(rest, ",")
		if len(p) != 3 {
			return Dist{}, bad
		}
		median, err1 := strconv.ParseFloat(p[0], 64)
		sigma, err2 := strconv.ParseFloat(p[1], 64)
		most, err3 := strconv.Atoi(p[2])
		if err1 != nil || err2 != nil || err3 != nil || median < 1 || sigma <= 0 || sigma > 5 || float64(most) < median {
			return Dist{}, bad
		}
		return Dist{Kind: "lognormal", Min: 1, Max: most, Median: median, Sigma: sigma}, nil
	}
	lo, hi, uniform := strings.Cut(s, "-")
	if !uniform {
		hi = lo
	}
	a, err1 := strconv.Atoi(lo)
	b, err2 := strconv.Atoi(hi)
	if err1 != nil || err2 != nil || a < 0 || b < a {
		return Dist{}, bad
	}
	if a == b {
		return Fixed(a), nil
	}
	return Dist{Kind: "uniform", Min: a, Max: b}, nil
}

// String is the distribution as ParseDist reads it.
func (d Dist) String() string {
	switch d.Kind {
	case "uniform":
		return fmt.Sprintf("%d-%d", d.Min, d.Max)
	case "lognormal":
		return fmt.Sprintf("lognormal:%g,%g,%d", d.Median, d.Sigma, d.Max)
	}
	return strconv.Itoa(d.Min)
}

// MarshalText is String, for reports.
func (d Dist) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText is ParseDist.
func (d *Dist) UnmarshalText(b []byte) error {
	v, err := ParseDist(string(b))
	*d = v
	return err
}

func (d Dist) draw(r *rand.Rand) int {
	switch d.Kind {
	case "uniform":
		return d.Min + r.IntN(d.Max-d.Min+1)
	case "lognormal":
		return min(d.Max, max(d.Min, int(math.Round(d.Median*math.Exp(d.Sigma*r.NormFloat64())))))
	}
	return d.Min
}
