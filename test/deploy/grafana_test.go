package deploy

import (
	"testing"

	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
)

// TestDashboard: the dashboard is what Grafana's schema says, without a field that it does not know. What
// its queries ask for is held by the engine's TestMetricsReference.
func TestDashboard(t *testing.T) {
	plugins.RegisterDefaultPlugins()
	var d dashboard.Dashboard
	if err := d.UnmarshalJSONStrict([]byte(read(t, root+"/deploy/grafana/im-gateway.json"))); err != nil && err.Error() != "" {
		t.Error(err)
	}
	if err := d.Validate(); err != nil && err.Error() != "" {
		t.Error(err)
	}
	if len(d.Panels) < 50 {
		t.Errorf("only %d panels", len(d.Panels))
	}
}
