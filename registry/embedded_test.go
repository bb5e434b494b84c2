//go:build !real

package registry

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"go.etcd.io/etcd/server/v3/embed"
)

// etcdServer is an etcd inside the test's process.
type etcdServer struct {
	t      testing.TB
	dir    string
	port   int
	server *embed.Etcd
}

func startEtcd(t testing.TB) *etcdServer {
	e := &etcdServer{t: t, dir: t.TempDir(), port: freePort(t)}
	e.start()
	t.Cleanup(e.stop)
	return e
}

func (e *etcdServer) endpoint() string { return fmt.Sprintf("http://127.0.0.1:%d", e.port) }

func (e *etcdServer) start() {
	e.t.Helper()
	cfg := embed.NewConfig()
	cfg.Name = "test"
	cfg.Dir = filepath.Join(e.dir, "data")
	cfg.LogLevel = "panic"
	cfg.UnsafeNoFsync = true
	cfg.BcryptCost = 4 // the least: hashing under -race takes seconds
	cfg.TickMs, cfg.ElectionMs = 10, 100
	client := url.URL{Scheme: "http", Host: fmt.Sprintf("127.0.0.1:%d", e.port)}
	peer := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	server, err := embed.StartEtcd(cfg)
	if err != nil {
		e.t.Fatal(err)
	}
	select {
	case <-server.Server.ReadyNotify():
	case err := <-server.Err():
		e.t.Fatal(err)
	case <-time.After(patience):
		e.t.Fatal("etcd is not ready in time")
	}
	e.server = server
}

func (e *etcdServer) stop() {
	if e.server != nil {
		e.server.Server.HardStop() // ends the watches, which Close would wait for
		e.server.Close()
		e.server = nil
	}
}

// wipe removes the data of a stopped server.
func (e *etcdServer) wipe() {
	if err := os.RemoveAll(filepath.Join(e.dir, "data")); err != nil {
		e.t.Fatal(err)
	}
}

// redisServer is a Redis inside the test's process.
type redisServer struct {
	t      testing.TB
	server *miniredis.Miniredis
}

func startRedis(t testing.TB, password string) *redisServer {
	s := miniredis.NewMiniRedis()
	if password != "" {
		s.RequireAuth(password)
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	s.ClockTTL(true)
	t.Cleanup(s.Close)
	return &redisServer{t: t, server: s}
}

func (r *redisServer) addr() string { return r.server.Addr() }

func (r *redisServer) stop() { r.server.Close() }

// start starts a stopped server on the same port, without the data.
func (r *redisServer) start() {
	r.server.FlushAll()
	if err := r.server.Restart(); err != nil {
		r.t.Fatal(err)
	}
}
