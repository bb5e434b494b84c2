package e2e

import (
	"net/http"
	"strings"
	"testing"
)

// TestMemoryHighWater: a gateway that holds more than its mark, as this one always does, takes no new
// work and says so once.
func TestMemoryHighWater(t *testing.T) {
	g := start(t, user("gw"), settings{"GOMEMLIMIT": "400MiB", "limits.memory_high_water_percent": "1"})
	eventually(t, "memory is short", func() bool { return g.metric("im_gateway_memory_pressure") == "1" })
	for range 3 {
		resp, err := http.Get("http://" + g.addr + "/healthz")
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
			t.Errorf("%s, Retry-After %q", resp.Status, resp.Header.Get("Retry-After"))
		}
	}
	if n := g.metric(`im_gateway_transport_pressure_refused_total{what="connection"}`); n != "3" {
		t.Errorf("%s counted, want 3", n)
	}
	if n := strings.Count(g.log.String(), "memory is short"); n != 1 {
		t.Errorf("%d lines in the log", n)
	}
}

// TestLoginLimit: attempts from one address are bounded, loopback's too.
func TestLoginLimit(t *testing.T) {
	g := start(t, user("gw"), settings{"limits.logins_per_ip": "2"})
	var last answer
	for i := range 3 {
		last = post(t, g, "/api/auth/login", `{"username":"nobody","password":"guess"}`, nil)
		if limited := last.Status == http.StatusTooManyRequests; limited != (i == 2) {
			t.Errorf("attempt %d: %+v", i, last)
		}
	}
	if last.Code != "RATE_LIMITED" || last.Header.Get("Retry-After") == "" {
		t.Errorf("%+v", last)
	}
	if n := g.metric(`im_gateway_http_logins_refused_total{limit="ip"}`); n != "1" {
		t.Errorf("%s counted, want 1", n)
	}
}
