package engine

import (
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/knadh/koanf/parsers/yaml"
	dto "github.com/prometheus/client_model/go"
)

// The dashboard, the alert rules and their tests name metrics, labels and values of labels: monitored holds
// that a running gateway has them. That the expressions are PromQL, and say something, is the real
// Prometheus' to tell, in test/e2e.

var (
	promMetric   = regexp.MustCompile(`\b((?:im_gateway|go|process)_\w+)(?:\{([^}]*)\})?`)
	promMatcher  = regexp.MustCompile(`(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"`)
	promGrouping = regexp.MustCompile(`\b(?:by|on|ignoring|without|group_left|group_right)\s*\(([^)]*)\)`)
	promReplace  = regexp.MustCompile(`(?s)label_replace\(.*?,\s*"(\w+)"`)
	promTemplate = regexp.MustCompile(`\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}`)
)

// ofPrometheus are the labels that Prometheus itself gives.
var ofPrometheus = []string{"instance", "job", "le"}

// expression holds what a PromQL expression names, and the labels in the texts that go with it.
func expression(t *testing.T, where string, families map[string]*dto.MetricFamily, expr string, texts ...string) {
	t.Helper()
	for _, wrong := range unknowns(families, expr, texts...) {
		t.Errorf("%s %s: %s", where, wrong, expr)
	}
}

// unknowns is what expression finds.
func unknowns(families map[string]*dto.MetricFamily, expr string, texts ...string) (wrong []string) {
	known := slices.Clone(ofPrometheus)
	named := promMetric.FindAllStringSubmatch(expr, -1)
	if len(named) == 0 && !strings.Contains(expr, "up{") {
		wrong = append(wrong, "names no metric")
	}
	for _, m := range named {
		f := familyOf(families, m[1])
		if f == nil {
			wrong = append(wrong, "names "+m[1]+", which does not exist")
			continue
		}
		known = append(known, labelsOf(f)...)
		for _, match := range promMatcher.FindAllStringSubmatch(m[2], -1) {
			wrong = append(wrong, unknownValues(f, match[1], match[2], match[3])...)
		}
	}
	if of := promReplace.FindStringSubmatch(expr); of != nil {
		known = append(known, of[1])
	}
	for _, g := range promGrouping.FindAllStringSubmatch(expr, -1) {
		for l := range strings.SplitSeq(g[1], ",") {
			if l = strings.TrimSpace(l); l != "" && !slices.Contains(known, l) {
				wrong = append(wrong, "groups by "+l+", which nothing there has")
			}
		}
	}
	for _, text := range texts {
		for _, l := range promTemplate.FindAllStringSubmatch(text, -1) {
			if !slices.Contains(known, l[1]) {
				wrong = append(wrong, "shows "+l[1]+", which nothing there has")
			}
		}
	}
	return wrong
}

// unknownValues says what is wrong with a matcher.
func unknownValues(f *dto.MetricFamily, label, op, value string) (wrong []string) {
	if !slices.Contains(ofPrometheus, label) && !slices.Contains(labelsOf(f), label) {
		return []string{"asks for the label " + label + " of " + f.GetName()}
	}
	values := valuesOf(f, label)
	if len(values) == 0 || strings.Contains(value, "$") {
		return nil
	}
	alternatives := []string{value}
	if strings.HasSuffix(op, "~") {
		alternatives = strings.Split(value, "|")
	}
	for _, v := range alternatives {
		if !slices.Contains(values, v) {
			wrong = append(wrong, "asks for "+label+" "+v+" of "+f.GetName())
		}
	}
	return wrong
}

// familyOf finds the family of a metric, which may be one of a histogram's series.
func familyOf(families map[string]*dto.MetricFamily, name string) *dto.MetricFamily {
	if f := families[name]; f != nil && f.GetType() != dto.MetricType_HISTOGRAM {
		return f
	}
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		f := families[strings.TrimSuffix(name, suffix)]
		if strings.HasSuffix(name, suffix) && f != nil &&
			(f.GetType() == dto.MetricType_HISTOGRAM || f.GetType() == dto.MetricType_SUMMARY && suffix != "_bucket") {
			return f
		}
	}
	return nil
}

// dashboardMetrics holds deploy/grafana/im-gateway.json.
func dashboardMetrics(t *testing.T, families map[string]*dto.MetricFamily) {
	text, err := os.ReadFile("../deploy/grafana/im-gateway.json")
	if err != nil {
		t.Fatal(err)
	}
	type target struct {
		Expr, LegendFormat, RefID string
		Datasource                struct{ UID string }
	}
	var d struct {
		Panels []struct {
			ID                       int
			Type, Title, Description string
			GridPos                  struct{ X, Y, W, H int }
			Targets                  []target
			FieldConfig              struct{ Defaults struct{ Unit string } }
		}
		Templating struct {
			List []struct{ Name, Type, Definition string }
		}
		Annotations struct{ List []struct{ Expr string } }
	}
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	ids, taken := map[int]bool{}, map[[2]int]string{}
	queries, named := 0, map[string]bool{}
	for _, p := range d.Panels {
		if ids[p.ID] || p.Title == "" {
			t.Errorf("panel %d %q: its id or title", p.ID, p.Title)
		}
		ids[p.ID] = true
		if p.GridPos.X+p.GridPos.W > 24 || p.GridPos.W == 0 || p.GridPos.H == 0 {
			t.Errorf("%s does not fit the grid: %+v", p.Title, p.GridPos)
		}
		for x := range p.GridPos.W {
			for y := range p.GridPos.H {
				at := [2]int{p.GridPos.X + x, p.GridPos.Y + y}
				if other := taken[at]; other != "" {
					t.Fatalf("%s lies on %s", p.Title, other)
				}
				taken[at] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if len(p.Description) < 20 || len(p.Targets) == 0 {
			t.Errorf("%s has no description or no query", p.Title)
		}
		if u := p.FieldConfig.Defaults.Unit; u == "" && (p.Type == "timeseries" || p.Type == "stat") {
			t.Errorf("%s has no unit", p.Title)
		}
		refs := map[string]bool{}
		for _, q := range p.Targets {
			if q.Datasource.UID != "${datasource}" || !strings.Contains(q.Expr, `instance=~"$instance"`) || refs[q.RefID] {
				t.Errorf("%s: query %s is not of the data source and the gateways chosen", p.Title, q.RefID)
			}
			refs[q.RefID] = true
			queries++
			expression(t, p.Title, families, q.Expr, q.LegendFormat)
			for _, m := range promMetric.FindAllStringSubmatch(q.Expr, -1) {
				if f := familyOf(families, m[1]); f != nil {
					named[f.GetName()] = true
				}
			}
		}
	}
	for _, a := range d.Annotations.List {
		if a.Expr != "" {
			expression(t, "an annotation", families, a.Expr)
		}
	}
	var variables []string
	for _, v := range d.Templating.List {
		variables = append(variables, v.Name)
		if v.Type == "query" {
			expression(t, "variable "+v.Name, families, strings.ReplaceAll(v.Definition, "label_values", ""))
		}
	}
	if want := []string{"datasource", "gateway_id", "instance"}; !slices.Equal(variables, want) {
		t.Errorf("variables %v, want %v", variables, want)
	}
	shown := 0
	for name := range families {
		if strings.HasPrefix(name, "im_gateway_") && named[name] {
			shown++
		}
	}
	t.Logf("%d panels, %d queries, %d of our metrics", len(d.Panels), queries, shown)
}

// alertMetrics holds deploy/prometheus.
func alertMetrics(t *testing.T, families map[string]*dto.MetricFamily) {
	tests := string(prometheusFile(t, "alerts.test.yaml"))
	var rules struct {
		Groups []struct {
			Rules []struct {
				Alert, Expr         string
				Labels, Annotations map[string]string
			}
		}
	}
	remarshal(t, prometheusFile(t, "alerts.yaml"), &rules)
	seen := map[string]bool{}
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			if seen[r.Alert] || !strings.HasPrefix(r.Alert, "IMGateway") {
				t.Errorf("the name %q", r.Alert)
			}
			seen[r.Alert] = true
			if !slices.Contains([]string{"critical", "warning", "info"}, r.Labels["severity"]) {
				t.Errorf("%s is %q", r.Alert, r.Labels["severity"])
			}
			if len(r.Annotations["summary"]) < 10 || len(r.Annotations["description"]) < 40 {
				t.Errorf("%s does not say what it is, or what to do", r.Alert)
			}
			expression(t, r.Alert, families, r.Expr, r.Annotations["summary"], r.Annotations["description"])
			if !strings.Contains(tests, `alertname="`+r.Alert+`"`) {
				t.Errorf("no test fires %s", r.Alert)
			}
		}
	}
	for _, m := range regexp.MustCompile(`\bIMGateway\w+`).FindAllString(string(prometheusFile(t, "alerts.yaml"))+tests, -1) {
		if !seen[m] {
			t.Errorf("there is no alert %s", m)
		}
	}
	var unit struct {
		Tests []struct {
			InputSeries []struct{ Series string } `json:"input_series"`
		}
	}
	remarshal(t, prometheusFile(t, "alerts.test.yaml"), &unit)
	for _, test := range unit.Tests {
		for _, s := range test.InputSeries {
			if !strings.HasPrefix(s.Series, "up{") {
				expression(t, "alerts.test.yaml", families, s.Series)
			}
		}
	}
	var scrape struct {
		ScrapeConfigs []struct {
			JobName string `json:"job_name"`
		} `json:"scrape_configs"`
		RuleFiles []string `json:"rule_files"`
	}
	remarshal(t, prometheusFile(t, "prometheus.yml"), &scrape)
	if len(scrape.ScrapeConfigs) != 1 || scrape.ScrapeConfigs[0].JobName != "im-gateway" || !slices.Contains(scrape.RuleFiles, "alerts.yaml") {
		t.Errorf("prometheus.yml: %+v", scrape)
	}
	t.Logf("%d alerts", len(seen))
}

func prometheusFile(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile("../deploy/prometheus/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// remarshal reads YAML into a value with the fields of JSON.
func remarshal(t *testing.T, text []byte, into any) {
	t.Helper()
	m, err := yaml.Parser().Unmarshal(text)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, into); err != nil {
		t.Fatal(err)
	}
}

// TestExpression: what the check of expressions is to find.
func TestExpression(t *testing.T) {
	label, name, value := "result", "im_gateway_x_total", "ok"
	counter := dto.MetricType_COUNTER
	families := map[string]*dto.MetricFamily{name: {Name: &name, Type: &counter,
		Metric: []*dto.Metric{{Label: []*dto.LabelPair{{Name: &label, Value: &value}}}}}}
	for _, good := range []string{
		`rate(im_gateway_x_total[5m])`, `sum by (result) (im_gateway_x_total{result="ok", instance=~"$instance"})`,
		`sum by (le, instance) (im_gateway_x_total{result!~"ok"})`,
	} {
		expression(t, "what is good", families, good, "{{result}} {{instance}}")
	}
	for _, bad := range []struct{ expr, text string }{
		{`im_gateway_y_total`, ""}, {`im_gateway_x_total_bucket`, ""}, {`im_gateway_x_total{outcome="ok"}`, ""},
		{`im_gateway_x_total{result="good"}`, ""}, {`im_gateway_x_total{result=~"ok|good"}`, ""},
		{`sum by (outcome) (im_gateway_x_total)`, ""}, {`im_gateway_x_total`, "{{ $labels.outcome }}"}, {`1 + 1`, ""},
	} {
		if len(unknowns(families, bad.expr, bad.text)) != 1 {
			t.Errorf("%v passes", bad)
		}
	}
}
