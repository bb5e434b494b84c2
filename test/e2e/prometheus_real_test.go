//go:build real

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"im-gateway/codec/gatewaypb"
	"im-gateway/test/servers"
)

const prometheusFiles = "../../deploy/prometheus/"

// TestPrometheus: what deploy/prometheus has is good, and a Prometheus that scrapes a gateway in use can
// answer every query of the dashboard and of the alert rules.
func TestPrometheus(t *testing.T) {
	for _, args := range [][]string{
		{"check", "config", "prometheus.yml"}, {"check", "rules", "alerts.yaml"}, {"test", "rules", "alerts.test.yaml"},
	} {
		cmd := exec.Command("promtool", args...)
		cmd.Dir = prometheusFiles
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v (Debian's prometheus is needed)\n%s", strings.Join(args, " "), err, out)
		}
	}
	g := start(t, user("gw"), settings{"log.level": "info", "tracing.endpoint": freeAddr()})
	lintMetrics(t, g)
	p, err := servers.StartPrometheus(deadline(t), t.TempDir(), scraping(t, g))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)

	alice := connect(t, g, user("alice"))
	if a := post(t, g, "/api/auth/guest", `{"guestName":"x"}`, nil); a.Status != http.StatusOK {
		t.Fatalf("a guest: %d %s", a.Status, a.Code)
	}
	service := g.service()
	n := 0
	use := func() {
		n++
		alice.send("send-message", fmt.Sprint("c-", n), map[string]any{"content": "hi"})
		alice.ack()
		produce(t, g, alice.name, fmt.Sprintf(`{"target_user_id":%q,"data":{"n":%d}}`, alice.name, n))
		alice.wait("new-message")
		if _, err := service.Stats(deadline(t), &gatewaypb.StatsRequest{}); err != nil {
			t.Fatal(err)
		}
		bob := connect(t, g, user("bob"))
		_ = bob.CloseNow()
	}
	shown := func(expr string) bool {
		use()
		list, err := p.Query(deadline(t), expr)
		return err == nil && len(list) > 0
	}
	eventually(t, "deliveries and lifetimes are seen to grow", func() bool {
		return shown(`rate(im_gateway_shard_delivery_duration_seconds_count[10s]) > 0`) &&
			shown(`rate(im_gateway_shard_session_duration_seconds_count[10s]) > 0`) &&
			shown(`rate(im_gateway_http_requests_total{route="/api/auth/guest", status="2xx"}[30s])`) &&
			shown(`count(im_gateway_dependency_up) == 4`)
	})
	queries := dashboardQueries(t)
	exposed := allMetrics(t, g)
	asked, empty := 0, 0
	for panel, list := range queries {
		for _, expr := range list {
			asked++
			found, err := p.Query(deadline(t), expr)
			switch {
			case err != nil:
				t.Errorf("%s: %v", panel, err)
			case len(found) > 0:
			case hasAll(exposed, expr):
				t.Errorf("%s: the gateway has what it asks for, yet there is no answer to %s", panel, expr)
			default:
				empty++ // of what is switched off here: TLS, JWK sets, a memory limit
			}
		}
	}
	if asked < 150 || empty > 8 {
		t.Errorf("of %d queries %d ask for what this gateway does not have", asked, empty)
	}
	t.Logf("%d queries, %d of them of what is switched off", asked, empty)
	var rules struct {
		Groups []struct {
			Rules []struct{ Name, Health, LastError, State string }
		}
	}
	eventually(t, "every rule has been evaluated", func() bool {
		if err := p.Get(deadline(t), "/api/v1/rules", &rules); err != nil {
			t.Fatal(err)
		}
		for _, r := range rules.Groups[0].Rules {
			if r.Health == "unknown" {
				return false
			}
		}
		return true
	})
	for _, r := range rules.Groups[0].Rules {
		if r.Health != "ok" || r.State == "firing" {
			t.Errorf("%s is %s, %s: %s", r.Name, r.Health, r.State, r.LastError)
		}
	}
}

// scraping is deploy/prometheus/prometheus.yml for one gateway, often.
func scraping(t *testing.T, g *gateway) (file string) {
	t.Helper()
	rules, err := filepath.Abs(prometheusFiles + "alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(prometheusFiles + "prometheus.yml")
	if err != nil {
		t.Fatal(err)
	}
	config := string(text)
	for _, edit := range [][2]string{
		{`["im-gateway-0:8081", "im-gateway-1:8081"]`, fmt.Sprintf("[%q]", g.admin)}, {"[alerts.yaml]", fmt.Sprintf("[%q]", rules)},
		{"scrape_interval: 15s", "scrape_interval: 500ms\n  scrape_timeout: 500ms"}, {"evaluation_interval: 15s", "evaluation_interval: 1s"},
	} {
		if strings.Count(config, edit[0]) != 1 {
			t.Fatalf("prometheus.yml has no %s", edit[0])
		}
		config = strings.Replace(config, edit[0], edit[1], 1)
	}
	file = filepath.Join(t.TempDir(), "prometheus.yml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// lintMetrics holds what the gateway shows against promtool's lint.
func lintMetrics(t *testing.T, g *gateway) {
	t.Helper()
	cmd := exec.Command("promtool", "check", "metrics")
	cmd.Stdin = strings.NewReader(allMetrics(t, g))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}

// allMetrics is what the gateway shows.
func allMetrics(t *testing.T, g *gateway) string {
	t.Helper()
	resp, err := http.Get("http://" + g.admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// hasAll tells whether every metric that an expression names is shown.
func hasAll(exposed, expr string) bool {
	for _, name := range regexp.MustCompile(`\b(im_gateway|go|process)_\w+`).FindAllString(expr, -1) {
		if !regexp.MustCompile(`(?m)^` + name + `[{ ]`).MatchString(exposed) {
			return false
		}
	}
	return true
}

// dashboardQueries are the dashboard's, by panel, with its variables filled in.
func dashboardQueries(t *testing.T) map[string][]string {
	t.Helper()
	text, err := os.ReadFile("../../deploy/grafana/im-gateway.json")
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	queries := map[string][]string{}
	fill := strings.NewReplacer("$__rate_interval", "30s", "$instance", ".*")
	for _, p := range d.Panels {
		for _, q := range p.Targets {
			queries[p.Title] = append(queries[p.Title], fill.Replace(q.Expr))
		}
	}
	return queries
}
