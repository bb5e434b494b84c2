package bench

import (
	"math"
	"math/rand/v2"
	"strconv"
	"testing"
	"time"

	"im-gateway/bench/report"
)

func TestParseRates(t *testing.T) {
	for s, want := range map[string][]Rate{
		"1000": {{1000, 1000}}, "1000,5000": {{1000, 1000}, {5000, 5000}}, "0..100": {{0, 100}}, " 1.5 , 2..1": {{1.5, 1.5}, {2, 1}},
	} {
		got, err := ParseRates(s)
		if err != nil || len(got) != len(want) {
			t.Fatalf("%q: %v, %v", s, got, err)
		}
		for i, r := range got {
			again, err := ParseRates(r.String())
			if r != want[i] || err != nil || again[0] != r {
				t.Errorf("%q: %v, %v", s, r, again)
			}
		}
	}
	for _, s := range []string{"", "0", "-1", "x", "1..", "1,,2", "1e9", "NaN"} {
		if got, err := ParseRates(s); err == nil {
			t.Errorf("%q is %v", s, got)
		}
	}
}

// due is the inverse of count, for steady rates and ramps up and down.
func TestSchedule(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for range 300 {
		s := schedule{
			rate:   Rate{1 + rng.Float64()*5000, 1 + rng.Float64()*5000},
			warmup: time.Duration(rng.IntN(3)) * time.Second, length: time.Duration(1+rng.IntN(10)) * time.Second,
		}
		total := s.count(s.total())
		want := s.rate.From*s.warmup.Seconds() + (s.rate.From+s.rate.To)/2*s.length.Seconds()
		if math.Abs(float64(total)-want) > 1 {
			t.Fatalf("%+v: %d events, want %.1f", s, total, want)
		}
		last := time.Duration(-1)
		for k := int64(0); k < total; k += 1 + total/50 {
			due := s.due(k)
			if due <= last || due > s.total()+time.Millisecond {
				t.Fatalf("%+v: event %d is due at %s, the one before at %s", s, k, due, last)
			}
			last = due
			if before, after := s.count(due-time.Microsecond), s.count(due+time.Microsecond); before > k+1 || after < k {
				t.Fatalf("%+v: event %d is due at %s, when %d to %d are", s, k, due, before, after)
			}
		}
		if s.count(time.Hour) != total {
			t.Fatalf("%+v goes on after its end", s)
		}
	}
}

func TestDist(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for _, s := range []string{"128", "1-3", "lognormal:200,1,60000"} {
		d, err := ParseDist(s)
		if err != nil || d.String() != s {
			t.Fatalf("%q is %q, %v", s, d, err)
		}
		below := 0
		seen := map[int]bool{}
		for range 3000 {
			v := d.draw(rng)
			if v < d.Min || v > d.Max {
				t.Fatalf("%s drew %d", s, v)
			}
			seen[v] = true
			if float64(v) < d.Median {
				below++
			}
		}
		if d.Kind == "lognormal" && (below < 1300 || below > 1700) {
			t.Errorf("%s: %d of 3000 below the median", s, below)
		}
		if s == "1-3" && len(seen) != 3 {
			t.Errorf("%s drew %v", s, seen)
		}
	}
	for _, s := range []string{"", "x", "3-1", "-1", "lognormal:1,2", "lognormal:0,1,9", "lognormal:10,1,5", "1-2-3"} {
		if d, err := ParseDist(s); err == nil {
			t.Errorf("%q is %v", s, d)
		}
	}
}

func TestLedger(t *testing.T) {
	l := ledger{run: "r"}
	for n := range int64(ledgerPage + 10) {
		if got := l.add(int(n%7), n); got != n {
			t.Fatalf("entry %d is number %d", n, got)
		}
	}
	for _, n := range []int64{0, 1, ledgerPage - 1, ledgerPage, ledgerPage + 9} {
		got, ok := l.number(string(l.appendName(nil, n)))
		if e := l.get(n); !ok || got != n || e == nil || e.due != n {
			t.Errorf("number %d: %d, %v", n, got, ok)
		}
	}
	for _, name := range []string{"", "r", "r-", "s-1", "r-1x", "r1", "r--1", "r-99999999999999999999"} {
		if n, ok := l.number(name); ok {
			t.Errorf("%q is number %d", name, n)
		}
	}
	l.forget()
	if l.get(0) != nil || l.add(0, 0) != ledgerPage+10 || l.pending != 1 {
		t.Error("numbers begin again, or entries are left")
	}
}

func TestMemoryPerUser(t *testing.T) {
	r := &report.Report{Seconds: 1}
	for _, n := range []int64{2000, 10000, 18000} {
		r.Counts = append(r.Counts, report.Count{Name: restedAt + strconv.FormatInt(n, 10), N: 20<<20 + 900*n})
	}
	if v, ok := memoryPerUser(r); !ok || math.Abs(v-900) > 1e-6 {
		t.Errorf("%f, %v", v, ok)
	}
	r.Counts = r.Counts[:1]
	if v, ok := memoryPerUser(r); ok {
		t.Errorf("a slope of one point: %f", v)
	}
}
