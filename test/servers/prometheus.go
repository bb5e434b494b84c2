package servers

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os/exec"
	"path/filepath"

	"im-gateway/test/ports"
)

// Prometheus is a real Prometheus.
type Prometheus struct {
	*Process
	Addr string
}

// StartPrometheus starts Prometheus on a configuration file, with its data below dir. promtool comes with it.
func StartPrometheus(ctx context.Context, dir, config string) (*Prometheus, error) {
	if err := need(program{"prometheus", "prometheus"}, program{"promtool", "prometheus"}); err != nil {
		return nil, err
	}
	port, err := ports.Number()
	if err != nil {
		return nil, err
	}
	p := &Prometheus{Addr: loopback(port)}
	p.Process = &Process{name: "prometheus", ready: dials(p.Addr), make: func() *exec.Cmd {
		return exec.Command("prometheus", "--config.file", config, "--storage.tsdb.path", filepath.Join(dir, "prometheus"),
			"--web.listen-address", p.Addr, "--log.level", "warn")
	}}
	return p, p.Start(ctx)
}

// Sample is one result of an instant query.
type Sample struct {
	Metric map[string]string
	Value  [2]any // when, and the value as text
}

// Query asks for the present values of an expression that is a vector.
func (p *Prometheus) Query(ctx context.Context, expr string) ([]Sample, error) {
	var data struct{ Result []Sample }
	err := p.Get(ctx, "/api/v1/query?query="+url.QueryEscape(expr), &data)
	return data.Result, err
}

// Get reads the data that a path of its API answers with.
func (p *Prometheus) Get(ctx context.Context, path string, data any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.Addr+path, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	answer := struct {
		Status, Error string
		Data          any
	}{Data: data}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return fmt.Errorf("prometheus: %s: %w", path, err)
	}
	if answer.Status != "success" {
		return fmt.Errorf("prometheus: %s: %s", path, answer.Error)
	}
	return nil
}
