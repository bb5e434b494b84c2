package embedded

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// etcdStart bounds how long etcd may take until it serves.
const etcdStart = 20 * time.Second

type etcdServer struct {
	server   *embed.Etcd
	endpoint string
}

func startEtcd(ctx context.Context, dir string, port int) (*etcdServer, error) {
	// etcd ends the process by itself on some failures to listen, hence the look beforehand.
	probe, err := net.Listen("tcp4", loopback(port))
	if err != nil {
		return nil, listenError(Etcd, port, err)
	}
	if err := probe.Close(); err != nil {
		return nil, fmt.Errorf("close the listener that tried etcd's port: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("etcd's directory: %w", err)
	}

	cfg := embed.NewConfig()
	cfg.Name = "im-dev"
	cfg.Dir = filepath.Join(dir, "data")
	cfg.LogLevel = "panic"
	cfg.LogOutputs = []string{"stderr"}
	cfg.UnsafeNoFsync = true
	// One member elects itself; the defaults are made for a network.
	cfg.TickMs, cfg.ElectionMs = 10, 100
	client := url.URL{Scheme: "http", Host: loopback(port)}
	peer := url.URL{Scheme: "http", Host: loopback(0)} // never dialled: there is one member
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)

	server, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, listenError(Etcd, port, err)
	}
	e := &etcdServer{server: server, endpoint: "http://" + server.Clients[0].Addr().String()}
	late := time.NewTimer(etcdStart)
	defer late.Stop()
	select {
	case <-server.Server.ReadyNotify():
		return e, nil
	case err = <-server.Err():
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-late.C:
		err = errors.New("not ready in time")
	}
	e.close()
	return nil, fmt.Errorf("start the embedded etcd: %w", err)
}

func (e *etcdServer) close() { e.server.Close() }
