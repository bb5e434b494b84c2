package engine

import (
	"os/exec"
	"strings"
	"testing"
)

// TestDependencies holds the direction in which the packages may import each other.
func TestDependencies(t *testing.T) {
	const module = "im-gateway/"
	allowed := map[string][]string{
		"codec":     {},
		"registry":  {},
		"transport": {"codec"},
		"shard":     {"codec"},
		"broker":    {"codec"},
		"bench":     {"codec", "bench"},
		"engine":    {"codec", "transport", "shard", "broker", "registry", "engine"},

		"engine/adminpage": {"codec"},
		"engine/tracing":   {"codec"},
		"codec/latency":    {},
	}
	for pkg, may := range allowed {
		for _, dep := range goList(t, "{{join .Imports \"\\n\"}}", module+pkg) {
			if strings.HasPrefix(dep, "go.opentelemetry.io/") && pkg != "engine/tracing" {
				t.Errorf("%s imports %s", pkg, dep)
			}
			ours, found := strings.CutPrefix(dep, module)
			if !found {
				continue
			}
			top, _, _ := strings.Cut(ours, "/")
			ok := top == "codec"
			for _, m := range may {
				ok = ok || top == m
			}
			if !ok || pkg == "codec" || pkg == "registry" || pkg == "codec/latency" {
				t.Errorf("%s imports %s", pkg, dep)
			}
		}
	}
}

// TestOutsidersShareNoCode: the client library, and those who judge the gateway, know it by its protocol only.
func TestOutsidersShareNoCode(t *testing.T) {
	for pkg, may := range map[string]string{
		"im-gateway/client":             "im-gateway/client",
		"im-gateway/test/chaos/judge":   "im-gateway/test/chaos/",
		"im-gateway/test/chaos/traffic": "im-gateway/test/chaos/",
	} {
		for _, dep := range goList(t, "{{join .Deps \"\\n\"}}", pkg) {
			if strings.HasPrefix(dep, "im-gateway/") && !strings.HasPrefix(dep, may) {
				t.Errorf("%s depends on %s", pkg, dep)
			}
		}
	}
}

// TestNoEmbeddedServerInProduction keeps the servers of im-dev, and what only tests need, out of the gateway's
// binary.
func TestNoEmbeddedServerInProduction(t *testing.T) {
	banned := []string{"miniredis", "kfake", "toxiproxy", "etcd/server", "im-gateway/cmd/im-dev", "chromedp", "jsonschema"}
	for _, dep := range goList(t, "{{join .Deps \"\\n\"}}", "im-gateway/cmd/im-gateway") {
		for _, b := range banned {
			if strings.Contains(dep, b) {
				t.Errorf("im-gateway links %s", dep)
			}
		}
	}
}

func goList(t *testing.T, format, pkg string) []string {
	t.Helper()
	out, err := exec.Command("go", "list", "-f", format, pkg).CombinedOutput()
	if err != nil {
		t.Fatalf("go list %s: %v\n%s", pkg, err, out)
	}
	return strings.Fields(string(out))
}
