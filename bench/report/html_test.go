package report

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/net/html"
)

func pageOf(t *testing.T, s *Set) (string, *html.Node) {
	t.Helper()
	var b bytes.Buffer
	if err := WriteHTML(&b, s); err != nil {
		t.Fatal(err)
	}
	n, err := html.Parse(bytes.NewReader(b.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	return b.String(), n
}

// TestPage also writes the page of a sample, for people to look at: -page FILE.
func TestPage(t *testing.T) {
	s := &Set{Schema: 1, Runs: []*Report{sample(t, "im-gateway", 1), sample(t, "seed stack", 2.2)}}
	text, root := pageOf(t, s)
	if *page != "" {
		if err := os.WriteFile(*page, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	elements := map[string]int{}
	var ok, broken, warnings int
	for n := range root.Descendants() {
		if n.Type != html.ElementNode {
			continue
		}
		elements[n.Data]++
		for _, a := range n.Attr {
			switch {
			case a.Key == "src" || a.Key == "href" || a.Key == "srcset" || a.Key == "action":
				t.Errorf("<%s %s=%q>: the page needs something else", n.Data, a.Key, a.Val)
			case a.Key == "class" && a.Val == "ok":
				ok++
			case a.Key == "class" && a.Val == "broken":
				broken++
			case a.Key == "class" && a.Val == "warning":
				warnings++
			}
		}
		if n.Data == "style" && (strings.Contains(n.FirstChild.Data, "url(") || strings.Contains(n.FirstChild.Data, "@import")) {
			t.Error("a style needs something else")
		}
	}
	if elements["script"] != 2 || elements["h1"] != 1 || elements["link"] != 0 || elements["b"] != 2*(5+7) {
		t.Errorf("elements %v", elements)
	}
	if ok != 2*2 || broken != 2*1 || warnings != 2*1 {
		t.Errorf("%d checks hold, %d are broken, %d warnings", ok, broken, warnings)
	}
	for _, want := range []string{
		"im-gateway: chat, 2000 users, 500/s", "AMD EPYC", "24 GiB", "group <b>5-40</b>", "urls <b>ws://127.0.0.1:8080/ws</b>", "41.50", "&lt;b&gt;u17", "0.93 cores", "prefers-color-scheme",
		"width=device-width", "Permission is hereby granted", "refused OVERLOADED",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the page does not hold %q", want)
		}
	}
}

func TestPageEscapes(t *testing.T) {
	r := sample(t, "</script><script>evil()</script>", 1)
	r.Warnings = []string{"<img src=http://example.org>"}
	r.Servers[0].Name = "</script><script>evil()"
	_, root := pageOf(t, &Set{Schema: 1, Runs: []*Report{r, r}})
	scripts := 0
	for n := range root.Descendants() {
		if n.Type == html.ElementNode && n.Data == "img" {
			t.Error("a warning became an element")
		}
		if n.Type == html.ElementNode && n.Data == "script" {
			scripts++
		}
	}
	if scripts != 2 {
		t.Errorf("%d scripts: a name became one", scripts)
	}
}

func TestPageOfNothing(t *testing.T) {
	text, _ := pageOf(t, &Set{Schema: 1, Runs: []*Report{{Scenario: "idle", Servers: []Process{{Name: "gateway"}}}}})
	if own := strings.Replace(text, uplotJS, "", 1); strings.Contains(own, "NaN") || strings.Contains(own, "Inf") {
		t.Error("a run that measured nothing has figures that are none")
	}
	if !strings.Contains(text, "const charts = [];") {
		t.Error("a run that measured nothing has charts")
	}
}

func TestCharts(t *testing.T) {
	a, b := sample(t, "im-gateway", 1), sample(t, "seed stack", 2)
	a.Servers[0].Samples = a.Servers[0].Samples[:20] // it ended
	for i := range a.Clients[1].Samples {
		a.Clients[1].Samples[i].T += 0.11 // at other times
	}
	a.Clients = append(a.Clients, Process{Name: "unseen"})
	delete(a.Series[3].P99, "acked")
	charts := chartsOf(&Set{Schema: 1, Runs: []*Report{a, b}})
	if len(charts) != 9 {
		t.Fatalf("%d charts", len(charts))
	}
	var titles []string
	for _, c := range charts {
		titles = append(titles, fmt.Sprintf("%d %s", c.Run, c.Title))
		for _, l := range c.Lines {
			if len(l.Y) != len(c.X) {
				t.Errorf("%s: %d values of %s at %d places", c.Title, len(l.Y), l.Name, len(c.X))
			}
		}
		for i := range c.X[1:] {
			if c.X[i+1] <= c.X[i] {
				t.Fatalf("%s: %v follows %v", c.Title, c.X[i+1], c.X[i])
			}
		}
		if _, err := json.Marshal(c); err != nil {
			t.Errorf("%s: %v", c.Title, err)
		}
	}
	want := "-1 latency by percentile, ms; 0 latency, ms; 0 events per second; 0 CPU, cores; 0 memory, MiB; 1 latency, ms; 1 events per second; 1 CPU, cores; 1 memory, MiB"
	if got := strings.Join(titles, "; "); got != want {
		t.Errorf("charts %s\nwant   %s", got, want)
	}
	if charts[0].Warmup != 0 || charts[1].Warmup != 3 {
		t.Errorf("warm-up of %v and %v s", charts[0].Warmup, charts[1].Warmup)
	}
	if one := chartsOf(&Set{Runs: []*Report{a}}); len(one) != 5 || one[0].Run != 0 {
		t.Errorf("a single run has %d charts, the first of run %d", len(one), one[0].Run)
	}
	var lines []string
	for _, l := range charts[3].Lines {
		seen := 0
		for _, y := range l.Y {
			if y != nil {
				seen++
			}
		}
		lines = append(lines, l.Name)
		if want := map[string]int{"gateway": 20, "im-bench (4178)": 60, "im-bench (4179)": 60}[l.Name]; seen != want {
			t.Errorf("%d samples of %s are drawn, want %d", seen, l.Name, want)
		}
	}
	if got := strings.Join(lines, ", "); got != "gateway, im-bench (4178), im-bench (4179)" {
		t.Errorf("processes drawn: %s", got)
	}
	if y := charts[1].Lines[1].Y[3]; charts[1].Lines[1].Name != "acked p99" || y != nil {
		t.Errorf("%s has %v where nothing was measured", charts[1].Lines[1].Name, y)
	}
	// A distribution of n values says nothing of 1-1/x for x above n.
	curve := charts[0]
	for i, x := range curve.X {
		if (curve.Lines[0].Y[i] == nil) != (x > 6000) {
			t.Errorf("1 in %v of 6000 is drawn as %v", x, curve.Lines[0].Y[i])
		}
	}
	if len(curve.Lines) != 4 {
		t.Errorf("%d percentile curves of two runs with two latencies each", len(curve.Lines))
	}
}
