package report

import (
	"strings"
	"testing"
)

// side is a set of runs of one scenario with one value each.
func sideOf(better string, values ...float64) *Set {
	s := &Set{Schema: 1}
	for _, v := range values {
		s.Runs = append(s.Runs, &Report{Scenario: "upstream", Values: []Value{{"figure", "us", v, better}}})
	}
	return s
}

func TestVerdicts(t *testing.T) {
	for _, tc := range []struct {
		name   string
		better string
		a, b   []float64
		want   string
	}{
		{"lower is better", "lower", []float64{10, 11, 12}, []float64{7, 8, 9}, "better"},
		{"lower is better, grew", "lower", []float64{7, 8, 9}, []float64{10, 11, 12}, "worse"},
		{"higher is better", "higher", []float64{7, 8, 9}, []float64{10, 11, 12}, "better"},
		{"higher is better, fell", "higher", []float64{10, 11, 12}, []float64{7, 8, 9}, "worse"},
		{"neither", "", []float64{10, 11, 12}, []float64{7, 8, 9}, "changed"},
		{"ranges overlap", "lower", []float64{10, 11, 20}, []float64{5, 6, 10.5}, "within noise"},
		{"ranges touch", "lower", []float64{10, 11}, []float64{9, 10}, "within noise"},
		{"one within the other", "lower", []float64{1, 5, 9}, []float64{4, 4}, "within noise"},
		{"several runs, small but apart", "lower", []float64{100, 101}, []float64{97, 98}, "better"},
		{"one run each, below 10 %", "lower", []float64{100}, []float64{91}, "within noise"},
		{"one run each, above 10 %", "lower", []float64{100}, []float64{89}, "better"},
		{"one run each, above 10 % more", "lower", []float64{100}, []float64{111}, "worse"},
		{"one run of B, below 10 %", "lower", []float64{100, 100}, []float64{109}, "within noise"},
		{"one run of A, above 10 %", "higher", []float64{100}, []float64{150, 160}, "better"},
		{"from nothing", "lower", []float64{0}, []float64{3}, "worse"},
		{"to nothing", "lower", []float64{3}, []float64{0}, "better"},
		{"nothing", "lower", []float64{0}, []float64{0}, "within noise"},
		{"from nothing, more is better", "higher", []float64{0, 0}, []float64{3, 4}, "better"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := Compare(sideOf(tc.better, tc.a...), sideOf(tc.better, tc.b...))
			if err != nil {
				t.Fatal(err)
			}
			d := c.Scenarios[0].Differences[0]
			if d.Verdict != tc.want || d.RunsA != len(tc.a) || d.RunsB != len(tc.b) {
				t.Errorf("%+v, want %s", d, tc.want)
			}
			single := len(tc.a) == 1 || len(tc.b) == 1
			if strings.Contains(c.Text(), "one run") != single {
				t.Errorf("a single run on a side: %t; text\n%s", single, c.Text())
			}
		})
	}
}

func TestRatioAndSpread(t *testing.T) {
	c, err := Compare(sideOf("lower", 10, 8, 20), sideOf("lower", 4, 2, 5, 6))
	if err != nil {
		t.Fatal(err)
	}
	want := Difference{Name: "figure", Unit: "us", A: 10, B: 4.5, RunsA: 3, RunsB: 4, Ratio: 0.45, Lowest: 0.1, Most: 0.75, Verdict: "better"}
	if got := c.Scenarios[0].Differences[0]; got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestCompareText(t *testing.T) {
	a := &Set{Schema: 1, Runs: []*Report{sample(t, "a", 1), sample(t, "a", 1.02), sample(t, "a", 1.04)}}
	b := &Set{Schema: 1, Runs: []*Report{sample(t, "b", 0.5), sample(t, "b", 0.51), sample(t, "b", 0.53)}}
	c, err := Compare(a, b)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "compare.golden", c.Text())
}

func TestLatenciesAreComparedOnce(t *testing.T) {
	a, b := sample(t, "", 1), sample(t, "", 2)
	for _, r := range []*Report{a, b} {
		r.Values = []Value{{"acked p99", "ms", 7, "lower"}}
	}
	c, err := Compare(&Set{Runs: []*Report{a}}, &Set{Runs: []*Report{b}})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, d := range c.Scenarios[0].Differences {
		got = append(got, d.Name+" "+d.Verdict)
	}
	want := "acked p99 within noise, acked p50 worse, acked p90 worse, acked p99.9 worse, pushed p50 worse, pushed p90 worse, pushed p99 worse, pushed p99.9 worse"
	if s := strings.Join(got, ", "); s != want {
		t.Errorf("compared %s\nwant     %s", s, want)
	}
}

func TestCompareKeepsKindsApart(t *testing.T) {
	a := &Set{Schema: 1, Runs: []*Report{sample(t, "a", 1), sample(t, "a", 1)}}
	a.Runs[1].Options["rate"] = "1500"
	b := throughFile(t, a)
	b.Runs[1].Options["users"] = 1.0
	c, err := Compare(a, b)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Scenarios) != 1 || c.Scenarios[0].Name != "chat, users 2000, rate 500, size 128, group 5-40" || c.Scenarios[0].Differences[0].RunsA != 1 {
		t.Errorf("%+v", c.Scenarios)
	}
	a.Runs = a.Runs[1:]
	if _, err := Compare(a, b); err == nil || !strings.Contains(err.Error(), "rate 1500") {
		t.Errorf("nothing in common: %v", err)
	}
}

func TestMedian(t *testing.T) {
	v := []float64{5, 1, 3}
	if Median(v) != 3 || Median([]float64{4, 1, 3, 2}) != 2.5 || Median([]float64{7}) != 7 || v[0] != 5 {
		t.Errorf("medians, or the order of the argument: %v", v)
	}
}
