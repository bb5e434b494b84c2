package deploy

import (
	"context"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
)

// project is the compose file as `docker compose config` reads it.
func project(t *testing.T) *types.Project {
	t.Helper()
	o, err := cli.NewProjectOptions([]string{root + "/deploy/compose/compose.yaml"}, cli.WithoutEnvironmentResolution)
	if err != nil {
		t.Fatal(err)
	}
	p, err := o.LoadProject(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// gatewayEnviron is the IM_ part of a service's environment.
func gatewayEnviron(s types.ServiceConfig) map[string]string {
	env := map[string]string{}
	for k, v := range s.Environment {
		if strings.HasPrefix(k, "IM_") && v != nil {
			env[k] = *v
		}
	}
	return env
}

// TestCompose: the file keeps to the specification, its gateways' settings are good, and its parts agree.
func TestCompose(t *testing.T) {
	p := project(t)
	balancer := read(t, root+"/deploy/haproxy/haproxy.cfg")
	scraped := read(t, root+"/deploy/prometheus/prometheus.yml")
	subnet := p.Networks["default"].Ipam.Config[0].Subnet
	gateways := 0
	for name, s := range p.Services {
		env := gatewayEnviron(s)
		if len(env) > 0 {
			c := load(t, "", env, "/run/secrets")
			if stop, drain := time.Duration(*s.StopGracePeriod), c.duration(t, "drain.deadline"); stop <= drain {
				t.Errorf("%s is killed after %v, its drain may take %v", name, stop, drain)
			}
			if id := c["gateway_id"]; id != name {
				t.Errorf("%s calls itself %s", name, id)
			}
		}
		if strings.HasPrefix(name, "im-gateway-") {
			gateways++
			if !strings.Contains(balancer, "server "+name+" "+name+":8080\n") {
				t.Errorf("haproxy does not know %s", name)
			}
			if target := name + env["IM_ADMIN_ADDR"]; !strings.Contains(scraped, `"`+target+`"`) {
				t.Errorf("Prometheus does not scrape %s", target)
			}
			if env["IM_HTTP_TRUSTED_PROXIES"] != subnet || env["IM_HTTP_PROXY_PROTOCOL"] != "true" {
				t.Errorf("%s does not believe haproxy: %v, the network is %s", name, env, subnet)
			}
		}
		for _, v := range s.Volumes {
			if v.Type != types.VolumeTypeBind {
				continue
			}
			if _, err := os.Stat(v.Source); err != nil {
				t.Errorf("%s mounts what is not there: %v", name, err)
			}
		}
		for _, port := range s.Ports {
			if ip, err := netip.ParseAddr(port.HostIP); err != nil || !ip.IsLoopback() {
				t.Errorf("%s publishes %s on %q: this is a system without passwords", name, port.Published, port.HostIP)
			}
		}
		for _, secret := range s.Secrets {
			if _, ok := p.Secrets[secret.Source]; !ok {
				t.Errorf("%s wants the secret %s", name, secret.Source)
			}
		}
	}
	if gateways != 2 {
		t.Errorf("%d gateways", gateways)
	}
	if n := strings.Count(balancer, "\n    server "); n != gateways {
		t.Errorf("haproxy has %d servers", n)
	}
}
