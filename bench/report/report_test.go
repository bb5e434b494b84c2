package report

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"go.uber.org/goleak"
)

var (
	update = flag.Bool("update", false, "write the golden files")
	page   = flag.String("page", "", "write the sample's page to this file")
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; go test ./bench/report -update writes it. Got:\n%s", file, got)
	}
}

// histogram has n values around mid us, with a tail that grows towards the last of them.
func histogram(t testing.TB, n int, mid float64) *hdrhistogram.Histogram {
	t.Helper()
	h := hdrhistogram.New(1, (2 * time.Minute).Microseconds(), 3)
	for i := range n {
		q := (float64(i) + 0.5) / float64(n)
		if err := h.RecordValue(int64(mid * (0.3 + 0.35*math.Pow(1/(1-q), 0.4) + q))); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

// sample is a report like those of a run, slower by factor.
func sample(t testing.TB, label string, factor float64) *Report {
	t.Helper()
	const warmup, seconds = 3, 12
	r := &Report{
		Scenario: "chat", Label: label, Started: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), Seconds: seconds,
		Options: map[string]any{"users": 2000, "rate": "500", "size": "128", "group": "5-40", "warmup": "3s", "duration": "12s", "urls": []string{"ws://127.0.0.1:8080/ws"}},
		Machine: Machine{CPUs: 2, CPU: "AMD EPYC", Memory: 24 << 30, Kernel: "Linux 6.18", Go: "go1.26"},
		Values: []Value{
			{"acked", "per second", 500, "higher"}, {"server CPU per ack", "us", 41.5 * factor, "lower"}, {"server CPU", "cores", 0.22 * factor, "lower"},
			{"server memory, peak", "MiB", 36.25 * factor, "lower"}, {"server memory per user", "bytes", 980 * factor, "lower"},
		},
		Counts:  []Count{{"sent", 7500}, {"sent, measured", 6000}, {"acked", 7498}, {"pushed", 165000}, {"refused OVERLOADED", 2}},
		Latency: []Latency{NewLatency("acked", histogram(t, 6000, 4000*factor)), NewLatency("pushed", histogram(t, 60000, 7000*factor))},
		Checks: []Check{
			{Name: "every acked message is in Kafka once", OK: true}, {Name: "pushes arrived in order", OK: true},
			{Name: "no push arrived at another user", Detail: "broken 1 times, first: <b>u17</b> got one of u4"},
		},
		Warnings: []string{"a bench process used 0.93 cores of its one loop"},
	}
	wave := func(i int, by float64) float64 { return 1 + by*math.Sin(float64(i)) }
	for i := range warmup + seconds {
		r.Series = append(r.Series, Point{
			T: float64(i + 1), Measured: i >= warmup,
			Rates: map[string]float64{"sent": 500, "acked": math.Round(500 * wave(i, 0.02)), "pushed": math.Round(11000 * wave(i, 0.1))},
			P50:   map[string]float64{"acked": math.Round(4100 * factor * wave(i, 0.1)), "pushed": math.Round(8000 * factor * wave(i, 0.1))},
			P99:   map[string]float64{"acked": math.Round(9000 * factor * wave(i, 0.2)), "pushed": math.Round(17000 * factor * wave(i, 0.3))},
		})
	}
	r.Servers = []Process{process("gateway", 4165, 0.22*factor, 36<<20)}
	r.Clients = []Process{process("im-bench", 4178, 0.11, 28<<20), process("im-bench", 4179, 0.12, 27<<20)}
	return r
}

// process used so many cores and bytes for 15 s, of which 12 were measured.
func process(name string, pid int, cores float64, rss int64) Process {
	p := Process{Name: name, PID: pid, CPUSeconds: cores * 12, RSSStart: rss - 2<<20, RSSEnd: rss - 1<<20, RSSPeak: rss, Anon: rss / 2}
	for i := 1; i <= 60; i++ {
		p.Samples = append(p.Samples, ProcSample{T: float64(i) * 0.25, CPU: cores * (1 + 0.2*math.Sin(float64(i))), RSS: rss - int64(60-i)<<15})
	}
	return p
}

func TestText(t *testing.T) { golden(t, "text.golden", sample(t, "im-gateway", 1).Text()) }

func TestTextOfNothing(t *testing.T) {
	got := (&Report{Scenario: "idle", Servers: []Process{{Name: "gateway", PID: 1}}}).Text()
	if strings.Contains(got, "NaN") || strings.Contains(got, "Inf") {
		t.Errorf("a run that measured nothing reads\n%s", got)
	}
}

func TestTitleOfALargeNumberFromAFile(t *testing.T) {
	r := &Report{Scenario: "shards", Options: map[string]any{"users": 1_000_000, "rate": "500"}}
	want := "shards, 1000000 users, 500/s"
	if got := r.Title(); got != want {
		t.Errorf("title %q, want %q", got, want)
	}
	if got := throughFile(t, &Set{Schema: 1, Runs: []*Report{r}}).Runs[0]; got.Title() != want || got.key() != r.key() {
		t.Errorf("from a file: title %q, key %q; want %q, %q", got.Title(), got.key(), want, r.key())
	}
}

func TestFailed(t *testing.T) {
	if got := sample(t, "", 1).Failed(); len(got) != 1 || got[0].Name != "no push arrived at another user" {
		t.Errorf("failed checks: %+v", got)
	}
}

func throughFile(t *testing.T, s *Set) *Set {
	t.Helper()
	file := filepath.Join(t.TempDir(), "set.json")
	var b bytes.Buffer
	if err := WriteJSON(&b, s); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestJSON(t *testing.T) {
	s := &Set{Schema: 1, Runs: []*Report{sample(t, "im-gateway", 1), sample(t, "seed stack", 2)}}
	got := throughFile(t, s)
	for _, r := range s.Runs { // JSON has one kind of number and of list
		r.Options["users"], r.Options["urls"] = 2000.0, []any{"ws://127.0.0.1:8080/ws"}
	}
	if !reflect.DeepEqual(got, s) {
		t.Errorf("a set reads back as another:\n%+v\n%+v", got.Runs[0], s.Runs[0])
	}
}

func TestJSONNames(t *testing.T) {
	b, err := json.Marshal(sample(t, "x", 1))
	if err != nil {
		t.Fatal(err)
	}
	var r struct {
		Started string
		Series  []map[string]any
		Servers []map[string]any
		Latency []map[string]any
	}
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		in   map[string]any
		want []string
	}{
		{r.Series[0], []string{"t", "measured", "rates", "p50", "p99"}},
		{r.Servers[0], []string{"name", "pid", "cpu_seconds", "rss_start", "rss_end", "rss_peak", "anon", "samples"}},
		{r.Latency[0], []string{"name", "hist", "p50", "p90", "p99", "p999", "max", "n"}},
	} {
		for _, k := range tc.want {
			if _, ok := tc.in[k]; !ok {
				t.Errorf("no %q in %v", k, tc.in)
			}
		}
	}
}

func TestReadFileFails(t *testing.T) {
	for name, content := range map[string]string{
		"another schema": `{"schema":2,"runs":[{}]}`, "no runs": `{"schema":1,"runs":[]}`, "a run that is null": `{"schema":1,"runs":[null]}`,
		"no JSON": `schema 1`, "empty": ``,
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "set.json")
			if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			if s, err := ReadFile(file); err == nil {
				t.Errorf("read as %+v", s)
			}
		})
	}
	if _, err := ReadFile(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
}

func TestCSV(t *testing.T) {
	r := sample(t, "im-gateway", 1)
	r.Series = r.Series[:4]
	r.Servers = append(r.Servers, process("gateway", 4166, 1, 10<<20)) // a second one of the name: added
	other := sample(t, "a, \"quoted\" one", 2)
	other.Series = other.Series[:2]
	other.Series[1].P99 = nil
	delete(other.Options, "rate")
	other.Servers = []Process{{Name: "broker", Samples: []ProcSample{{T: 0.9, CPU: 0.5, RSS: 7}}}} // ended early
	var b bytes.Buffer
	if err := WriteCSV(&b, &Set{Schema: 1, Runs: []*Report{r, other}}); err != nil {
		t.Fatal(err)
	}
	golden(t, "csv.golden", b.String())
}

func TestNearest(t *testing.T) {
	s := []ProcSample{{T: 2, RSS: 2}, {T: 4, RSS: 4}, {T: 9, RSS: 9}}
	for _, tc := range []struct {
		t    float64
		want int64 // 0: none
	}{{0.5, 0}, {1, 2}, {2, 2}, {2.9, 2}, {3.1, 4}, {6, 4}, {7, 9}, {10, 9}, {10.1, 0}} {
		if got, ok := nearest(s, tc.t); got.RSS != tc.want && ok || ok != (tc.want != 0) {
			t.Errorf("nearest to %v: %v, %t; want %d", tc.t, got.RSS, ok, tc.want)
		}
	}
	if _, ok := nearest(nil, 1); ok {
		t.Error("a sample of none")
	}
}

func TestLatency(t *testing.T) {
	h := histogram(t, 5000, 2000)
	l := NewLatency("ack", h)
	back, err := l.Histogram()
	if err != nil {
		t.Fatal(err)
	}
	if !back.Equals(h) {
		t.Error("the histogram reads back as another")
	}
	if l.N != 5000 || l.P50 != h.ValueAtQuantile(50) || l.P999 != h.ValueAtQuantile(99.9) || l.Max != h.Max() || l.P50 >= l.P90 || l.P90 >= l.P99 {
		t.Errorf("summed up as %+v", l)
	}
	if _, err := (Latency{Name: "ack", Hist: "?"}).Histogram(); err == nil || !strings.Contains(err.Error(), "ack") {
		t.Errorf("a broken histogram: %v", err)
	}
	if back, err := NewLatency("none", hdrhistogram.New(1, 1000, 3)).Histogram(); err != nil || back.TotalCount() != 0 {
		t.Errorf("an empty histogram: %v", err)
	}
}

func TestThisMachine(t *testing.T) {
	m := ThisMachine()
	if m.CPUs != runtime.NumCPU() || m.Go != runtime.Version() || m.Memory <= 0 || !strings.HasPrefix(m.Kernel, "Linux ") {
		t.Errorf("%+v", m)
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0.00", 0.0421: "0.042", 0.5: "0.50", 8.538: "8.54", 999.994: "999.99", 1000.4: "1000", -2500: "-2500", -0.001: "-0.001"} {
		if got := number(v); got != want {
			t.Errorf("%v reads %s, want %s", v, got, want)
		}
	}
	if got := fmt.Sprint(option([]any{1e6, "a", true})); got != "1000000, a, true" {
		t.Errorf("an option reads %s", got)
	}
}
