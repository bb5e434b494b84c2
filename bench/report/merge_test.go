package report

import (
	"math"
	"reflect"
	"strings"
	"testing"

	"github.com/HdrHistogram/hdrhistogram-go"
)

func TestMergeAddsUp(t *testing.T) {
	a, b := sample(t, "im-gateway", 1), sample(t, "im-gateway", 3)
	b.Started = a.Started.Add(-1)
	b.Seconds = 13
	b.Counts = append(b.Counts, Count{"lost", 3})
	b.Latency = append(b.Latency, NewLatency("connect", histogram(t, 10, 500)))
	b.Checks[1] = Check{Name: b.Checks[1].Name, Detail: "broken 2 times"}
	b.Servers = append(b.Servers, process("gateway", 5000, 1, 1<<20))
	b.Clients = []Process{process("im-bench", 77, 1, 1<<20)}
	b.Warnings = append(b.Warnings, "another")
	got, err := Merge([]*Report{a, b})
	if err != nil {
		t.Fatal(err)
	}
	if got.Scenario != "chat" || got.Label != "im-gateway" || !got.Started.Equal(b.Started) || got.Seconds != 13 || got.Values != nil {
		t.Errorf("merged %s of %s at %s, %v s, values %v", got.Scenario, got.Label, got.Started, got.Seconds, got.Values)
	}
	if got.Options["users"] != 4000 || got.Options["rate"] != "1000" || got.Options["size"] != "128" || a.Options["users"] != 2000 {
		t.Errorf("options %v, of the first part %v", got.Options, a.Options)
	}
	if want := []Count{{"sent", 15000}, {"sent, measured", 12000}, {"acked", 14996}, {"pushed", 330000}, {"refused OVERLOADED", 4}, {"lost", 3}}; !reflect.DeepEqual(got.Counts, want) {
		t.Errorf("counts %v, want %v", got.Counts, want)
	}
	for i, want := range []int64{12000, 120000, 10} {
		if l := got.Latency[i]; l.N != want {
			t.Errorf("%d values of %s, want %d", l.N, l.Name, want)
		}
	}
	h := histogram(t, 6000, 4000)
	h.Merge(histogram(t, 6000, 12000))
	if want := NewLatency("acked", h); got.Latency[0] != want {
		t.Errorf("latency %+v, want that of all values, %+v", got.Latency[0], want)
	}
	for i, p := range got.Series {
		x, y := a.Series[i], b.Series[i]
		if p.T != x.T || p.Measured != x.Measured || p.Rates["acked"] != x.Rates["acked"]+y.Rates["acked"] ||
			p.P50["acked"] != y.P50["acked"] || p.P99["pushed"] != max(x.P99["pushed"], y.P99["pushed"]) {
			t.Fatalf("second %d: %+v of %+v and %+v", i+1, p, x, y)
		}
	}
	pids := func(list []Process) (out []int) {
		for _, p := range list {
			out = append(out, p.PID)
		}
		return out
	}
	if s, c := pids(got.Servers), pids(got.Clients); !reflect.DeepEqual(s, []int{4165, 5000}) || !reflect.DeepEqual(c, []int{4178, 4179, 77}) {
		t.Errorf("servers %v, clients %v", s, c)
	}
	var ok []bool
	for _, c := range got.Checks {
		ok = append(ok, c.OK)
	}
	if !reflect.DeepEqual(ok, []bool{true, false, false}) || got.Checks[1].Detail != "broken 2 times" || strings.Count(got.Checks[2].Detail, "u17") != 2 {
		t.Errorf("checks %+v", got.Checks)
	}
	if !reflect.DeepEqual(got.Warnings, []string{a.Warnings[0], "another"}) {
		t.Errorf("warnings %v", got.Warnings)
	}
}

func TestMergeTwiceIsTheSame(t *testing.T) {
	a, b, c := sample(t, "", 1), sample(t, "", 2), sample(t, "", 3)
	all, err := Merge([]*Report{a, b, c})
	if err != nil {
		t.Fatal(err)
	}
	two, err := Merge([]*Report{a, b})
	if err != nil {
		t.Fatal(err)
	}
	twice, err := Merge([]*Report{two, c})
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(all.Series, twice.Series) || !reflect.DeepEqual(all.Latency, twice.Latency) || !reflect.DeepEqual(all.Counts, twice.Counts) {
		t.Error("three parts at once are not as two and one")
	}
}

func TestMergeFails(t *testing.T) {
	echo, broken, narrow := sample(t, "", 1), sample(t, "", 1), sample(t, "", 1)
	echo.Scenario = "echo"
	broken.Latency[0].Hist = "?"
	narrow.Latency[0] = NewLatency("acked", hdrhistogram.New(1, 100, 3))
	for name, parts := range map[string][]*Report{
		"nothing": nil, "two scenarios": {sample(t, "", 1), echo}, "a broken histogram": {broken},
		"values that do not fit": {narrow, sample(t, "", 1)},
	} {
		if r, err := Merge(parts); err == nil {
			t.Errorf("%s: merged to %+v", name, r)
		}
	}
}

func TestMergeAlignsByTime(t *testing.T) {
	point := func(t, rate, p99 float64) Point {
		return Point{T: t, Rates: map[string]float64{"sent": rate}, P99: map[string]float64{"ack": p99}}
	}
	for _, tc := range []struct {
		name string
		in   []Point
		want []float64 // rates by second
		p99  []float64 // 0: none
	}{
		{"on time", []Point{point(1, 10, 1), point(2, 20, 2), point(3, 30, 3)}, []float64{10, 20, 30}, []float64{1, 2, 3}},
		{"a little late", []Point{point(1.0625, 16, 1), point(2, 16, 2)}, []float64{16, 16}, []float64{1, 2}},
		{"two seconds in one point", []Point{point(1, 10, 1), point(3, 20, 2), point(4, 30, 3)}, []float64{10, 20, 20, 30}, []float64{1, 0, 2, 3}},
		{"a tick that came late", []Point{point(1.5, 10, 1), point(2, 30, 2), point(3, 8, 3)}, []float64{10, 20, 8}, []float64{1, 2, 3}},
		{"a rest", []Point{point(1, 10, 1), point(1.25, 99, 2)}, []float64{10}, []float64{2}},
		{"most of a second", []Point{point(1, 10, 1), point(1.75, 20, 2)}, []float64{10, 20}, []float64{1, 2}},
		{"short", []Point{point(0.25, 10, 1)}, []float64{10}, []float64{1}},
		{"none", nil, nil, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r, err := Merge([]*Report{{Series: tc.in}, {Series: tc.in}})
			if err != nil {
				t.Fatal(err)
			}
			if len(r.Series) != len(tc.want) {
				t.Fatalf("%d seconds, want %d", len(r.Series), len(tc.want))
			}
			for i, p := range r.Series {
				if p.T != float64(i+1) || math.Abs(p.Rates["sent"]-2*tc.want[i]) > 1e-9 || p.P99["ack"] != tc.p99[i] {
					t.Errorf("second %d: %+v; want twice %v, p99 %v", i+1, p, tc.want[i], tc.p99[i])
				}
			}
		})
	}
}

func TestMergePartsOfDifferentLength(t *testing.T) {
	a, b := sample(t, "", 1), sample(t, "", 1)
	a.Series = a.Series[:2]
	r, err := Merge([]*Report{a, b})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Series) != 15 || r.Series[1].Rates["sent"] != 1000 || r.Series[2].Rates["sent"] != 500 {
		t.Errorf("%d seconds: %v", len(r.Series), r.Series)
	}
}

func TestMergePoints(t *testing.T) {
	x, y := sample(t, "", 1).Series[4], sample(t, "", 2).Series[4]
	x.T = 5.03
	got := MergePoints([]*Point{&x, nil, &y})
	if got.T != 5 || !got.Measured || got.Rates["sent"] != 1000 || got.P50["acked"] != y.P50["acked"] || x.Rates["sent"] != 500 {
		t.Errorf("%+v", got)
	}
	if got := MergePoints([]*Point{nil}); got.T != 0 {
		t.Errorf("of none: %+v", got)
	}
}

func TestAddOption(t *testing.T) {
	for _, tc := range []struct{ a, b, want any }{
		{1, 2, 3}, {1, 2.0, 3}, {1.5, 2, 3.5}, {1, "2", 1}, {"500", "250.5", "750.5"}, {"1..5", "2..6", "3..11"}, {"1..5", "2", "1..5"},
		{"2 outstanding per user", "2 outstanding per user", "2 outstanding per user"}, {nil, 1, nil},
	} {
		if got := addOption(tc.a, tc.b); got != tc.want {
			t.Errorf("%v and %v: %v, want %v", tc.a, tc.b, got, tc.want)
		}
	}
}
