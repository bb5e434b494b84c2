package servers

import (
	"context"
	"os/exec"
	"path/filepath"

	"im-gateway/test/ports"
)

// Etcd is a real etcd.
type Etcd struct {
	*Process
	Endpoint string
}

// StartEtcd starts etcd with its data below dir.
func StartEtcd(ctx context.Context, dir string) (*Etcd, error) {
	if err := need(program{"etcd", "etcd-server"}); err != nil {
		return nil, err
	}
	client, err := ports.Number()
	if err != nil {
		return nil, err
	}
	peer, err := ports.Number()
	if err != nil {
		return nil, err
	}
	e := &Etcd{Endpoint: loopback(client)}
	clientURL, peerURL := "http://"+e.Endpoint, "http://"+loopback(peer)
	e.Process = &Process{name: "etcd", ready: dials(e.Endpoint), make: func() *exec.Cmd {
		return exec.Command("etcd", "--data-dir", filepath.Join(dir, "etcd"),
			"--listen-client-urls", clientURL, "--advertise-client-urls", clientURL,
			"--listen-peer-urls", peerURL, "--initial-advertise-peer-urls", peerURL,
			"--initial-cluster", "default="+peerURL, "--log-level", "error")
	}}
	return e, e.Start(ctx)
}

// Redis is a real Redis that keeps nothing.
type Redis struct {
	*Process
	Addr string
}

// StartRedis starts Redis; password may be empty.
func StartRedis(ctx context.Context, dir, password string) (*Redis, error) {
	if err := need(program{"redis-server", "redis-server"}); err != nil {
		return nil, err
	}
	port, err := ports.Number()
	if err != nil {
		return nil, err
	}
	r := &Redis{Addr: loopback(port)}
	args := []string{"--bind", "127.0.0.1", "--port", portOf(r.Addr), "--save", "", "--appendonly", "no", "--dir", dir}
	if password != "" {
		args = append(args, "--requirepass", password)
	}
	r.Process = &Process{name: "redis-server", ready: dials(r.Addr), make: func() *exec.Cmd {
		return exec.Command("redis-server", args...)
	}}
	return r, r.Start(ctx)
}
