package world

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/lestrrat-go/jwx/v2/jwt"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"im-gateway/test/ports"
)

// Gateway is one gateway, which keeps its id and addresses over restarts.
type Gateway struct {
	*Process
	ID                                    string
	Addr, Admin, GRPC                     string
	EtcdLink, RedisLink, LogicLink, Front *Link // from it; Front: from clients to it
	settings                              map[string]string
}

func (w *World) newGateway(id string) (*Gateway, error) {
	g := &Gateway{
		ID: id, EtcdLink: &Link{name: "etcd-" + id}, RedisLink: &Link{name: "redis-" + id},
		LogicLink: &Link{name: "logic-" + id}, Front: &Link{name: "front-" + id}, settings: map[string]string{},
	}
	if err := freeAddrs(&g.Addr, &g.Admin, &g.GRPC); err != nil {
		return nil, err
	}
	for _, l := range []struct {
		link *Link
		to   string
	}{{g.EtcdLink, w.EtcdAddr}, {g.RedisLink, w.RedisAddr}, {g.LogicLink, w.Logic.Addr}, {g.Front, g.Addr}} {
		listen, err := ports.Free()
		if err != nil {
			return nil, err
		}
		if err := w.proxies.add(l.link, listen, l.to); err != nil {
			return nil, err
		}
	}
	base := map[string]string{
		"gateway_id": id, "http.addr": g.Addr, "admin.addr": g.Admin, "grpc.addr": g.GRPC, "auth.hs256_secret": Secret,
		"kafka.brokers": strings.Join(w.Kafka.proxied(), ","), "kafka.downstream_partitions": "2",
		"redis.addrs": g.RedisLink.Addr(), "etcd.endpoints": g.EtcdLink.Addr(), "logic.target": g.LogicLink.Addr(),
		"log.format": "json", "limits.logins_per_ip": "0", "limits.logins_per_name": "0",
	}
	for k, v := range w.o.Settings {
		base[k] = v
	}
	g.Process = &Process{
		name: "gateway " + id, log: filepath.Join(w.o.Dir, id+".log"), ready: g.ready,
		make: func() *exec.Cmd {
			c := exec.Command(w.o.Gateway)
			limit, limited := g.settings["ulimit"]
			if limited {
				c = exec.Command("bash", "-c", "ulimit -n "+limit+"; exec "+w.o.Gateway)
			}
			c.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + w.o.Dir}
			merged := map[string]string{}
			for k, v := range base {
				merged[k] = v
			}
			for k, v := range g.settings {
				merged[k] = v
			}
			for k, v := range merged {
				if k == "ulimit" {
					continue
				}
				name := "IM_" + strings.ToUpper(strings.ReplaceAll(k, ".", "_"))
				if strings.ToUpper(k) == k { // an environment variable as it is
					name = k
				}
				c.Env = append(c.Env, name+"="+v)
			}
			return c
		},
	}
	return g, nil
}

// With changes settings for the starts to come: configuration keys, environment variables in upper case,
// or ulimit for the number of files; nil goes back to the world's.
func (g *Gateway) With(settings map[string]string) *Gateway {
	g.settings = settings
	return g
}

func (g *Gateway) ready(ctx context.Context) error {
	status, _, err := g.get(ctx, "/readyz")
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("/readyz says %d", status)
	}
	return err
}

// Get asks the admin port.
func (g *Gateway) Get(ctx context.Context, path string) (status int, body string, err error) {
	status, b, err := g.get(ctx, path)
	return status, string(b), err
}

// Drain asks for a drain on the admin port.
func (g *Gateway) Drain(ctx context.Context, token string) (status int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+g.Admin+"/drain", nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, fmt.Errorf("drain %s: %w", g.ID, err)
	}
	return resp.StatusCode, resp.Body.Close()
}

func (g *Gateway) get(ctx context.Context, path string) (status int, body []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+g.Admin+path, nil)
	if err != nil {
		return 0, nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	var buf strings.Builder
	if err := copyTo(&buf, resp); err != nil {
		return 0, nil, err
	}
	return resp.StatusCode, []byte(buf.String()), nil
}

// Account is one side of a gateway's ledger.
type Account struct {
	In       int64            `json:"in"`
	Ends     map[string]int64 `json:"ends"`
	Open     int64            `json:"open"`
	Balanced bool             `json:"balanced"`
}

// Ledger is what a gateway says became of everything it took in.
type Ledger struct{ Downstream, Upstream Account }

// Ledger reads /ledger.
func (g *Gateway) Ledger(ctx context.Context) (l Ledger, err error) {
	status, body, err := g.get(ctx, "/ledger")
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("status %d", status)
	}
	if err == nil {
		err = json.Unmarshal(body, &l)
	}
	if err != nil {
		return l, fmt.Errorf("ledger of %s: %w", g.ID, err)
	}
	return l, nil
}

// Metrics are the gateway's counters and gauges: name{label="value"}.
func (g *Gateway) Metrics(ctx context.Context) (map[string]float64, error) {
	_, body, err := g.get(ctx, "/metrics")
	if err != nil {
		return nil, fmt.Errorf("metrics of %s: %w", g.ID, err)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(string(body)))
	if err != nil {
		return nil, fmt.Errorf("metrics of %s: %w", g.ID, err)
	}
	out := map[string]float64{}
	for name, f := range families {
		for _, m := range f.GetMetric() {
			key := name
			if len(m.GetLabel()) > 0 {
				var labels []string
				for _, l := range m.GetLabel() {
					labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
				}
				key += "{" + strings.Join(labels, ",") + "}"
			}
			out[key] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return out, nil
}

// LogHas tells whether the log has a text, from an offset on that Mark returned.
func (g *Gateway) LogHas(from int64, text string) bool {
	b, err := os.ReadFile(g.log)
	return err == nil && int64(len(b)) >= from && strings.Contains(string(b[from:]), text)
}

// Mark is the present length of the log.
func (g *Gateway) Mark() int64 {
	i, err := os.Stat(g.log)
	if err != nil {
		return 0
	}
	return i.Size()
}

// Token signs a user's token, good for an hour.
func Token(user string) (string, error) {
	tok, err := jwt.NewBuilder().Claim("user_id", user).Expiration(time.Now().Add(time.Hour)).Build()
	if err != nil {
		return "", err
	}
	b, err := jwt.Sign(tok, jwt.WithKey(jwa.HS256, []byte(Secret)))
	return string(b), err
}

// ErrBit is wrapped by errors that say that a fault was not seen to bite.
var ErrBit = errors.New("the fault was not seen to bite")
