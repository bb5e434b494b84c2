package world

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/redis/rueidis"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// Options describe a World.
type Options struct {
	Dir      string   // scratch directory for data and logs
	Gateway  string   // the gateway's binary
	Brokers  int      // 1, or 3 with replication 3
	Gateways []string // ids of those prepared; none is started
	DiskMB   int      // the first broker's disk is a tmpfs of that size; 0: an ordinary one
	Settings map[string]string
}

// World is one set of servers. Its parts' methods may be called from any goroutine.
type World struct {
	Kafka    *Kafka
	Etcd     *Process
	Redis    *Process
	Standby  *Process // a replica of Redis
	Logic    *Logic
	Gateways []*Gateway

	EtcdAddr, RedisAddr, StandbyAddr string
	Cache                            rueidis.Client // of Redis
	Keys                             *clientv3.Client

	o       Options
	proxies *proxies
}

// Secret signs the users' tokens.
const Secret = "chaos-secret-0123456789abcdef-0123456789"

// Start starts all servers but the gateways. Close ends what was started, also after an error.
func Start(ctx context.Context, o Options) (w *World, err error) {
	w = &World{o: o, proxies: newProxies()}
	if err := need("java", "etcd", "redis-server"); err != nil {
		return w, err
	}
	if w.Kafka, err = startKafka(ctx, o, w.proxies); err != nil {
		return w, err
	}
	if err := w.Kafka.createTopics(ctx); err != nil {
		return w, err
	}
	if err := w.startEtcd(ctx); err != nil {
		return w, err
	}
	if err := w.startRedis(ctx); err != nil {
		return w, err
	}
	if w.Logic, err = startLogic(); err != nil {
		return w, err
	}
	for _, id := range o.Gateways {
		g, err := w.newGateway(id)
		if err != nil {
			return w, err
		}
		w.Gateways = append(w.Gateways, g)
	}
	return w, nil
}

func (w *World) startEtcd(ctx context.Context) error {
	var peer string
	if err := freeAddrs(&w.EtcdAddr, &peer); err != nil {
		return err
	}
	w.Etcd = &Process{
		name: "etcd", log: filepath.Join(w.o.Dir, "etcd.log"), ready: dials(w.EtcdAddr),
		make: func() *exec.Cmd {
			return exec.Command("etcd", "--data-dir", filepath.Join(w.o.Dir, "etcd"),
				"--listen-client-urls", "http://"+w.EtcdAddr, "--advertise-client-urls", "http://"+w.EtcdAddr,
				"--listen-peer-urls", "http://"+peer, "--initial-advertise-peer-urls", "http://"+peer,
				"--initial-cluster", "default=http://"+peer, "--log-level", "error")
		},
	}
	if err := w.Etcd.Start(ctx); err != nil {
		return err
	}
	var err error
	w.Keys, err = clientv3.New(clientv3.Config{Endpoints: []string{w.EtcdAddr}, Logger: zap.NewNop(), DialTimeout: 5 * time.Second})
	return err
}

func (w *World) startRedis(ctx context.Context) error {
	if err := freeAddrs(&w.RedisAddr, &w.StandbyAddr); err != nil {
		return err
	}
	server := func(name, addr string, more ...string) *Process {
		return &Process{
			name: name, log: filepath.Join(w.o.Dir, name+".log"), ready: dials(addr),
			make: func() *exec.Cmd {
				return exec.Command("redis-server", append([]string{"--bind", "127.0.0.1", "--port", fmt.Sprint(portOf(addr)),
					"--save", "", "--appendonly", "no", "--dir", w.o.Dir, "--repl-diskless-sync-delay", "0"}, more...)...)
			},
		}
	}
	w.Redis = server("redis", w.RedisAddr)
	w.Standby = server("redis-standby", w.StandbyAddr, "--replicaof", "127.0.0.1", fmt.Sprint(portOf(w.RedisAddr)))
	if err := errors.Join(w.Redis.Start(ctx), w.Standby.Start(ctx)); err != nil {
		return err
	}
	var err error
	w.Cache, err = rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{w.RedisAddr}, DisableCache: true, ForceSingleClient: true})
	return err
}

// RedisCommand sends a command to a Redis server.
func RedisCommand(ctx context.Context, addr string, words ...string) (string, error) {
	c, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{addr}, DisableCache: true, ForceSingleClient: true})
	if err != nil {
		return "", fmt.Errorf("redis at %s: %w", addr, err)
	}
	defer c.Close()
	m, err := c.Do(ctx, c.B().Arbitrary(words...).Build()).ToMessage()
	if err != nil {
		return "", err
	}
	if m.IsInt64() {
		n, err := m.AsInt64()
		return strconv.FormatInt(n, 10), err
	}
	return m.ToString()
}

// RevokeLease revokes the lease of a key in etcd.
func (w *World) RevokeLease(ctx context.Context, key string) error {
	resp, err := w.Keys.Get(ctx, key)
	if err == nil && len(resp.Kvs) == 0 {
		err = errors.New("the key is not there")
	}
	if err == nil {
		_, err = w.Keys.Revoke(ctx, clientv3.LeaseID(resp.Kvs[0].Lease))
	}
	if err != nil {
		return fmt.Errorf("revoke the lease of %s: %w", key, err)
	}
	return nil
}

// Dir is the scratch directory.
func (w *World) Dir() string { return w.o.Dir }

// Close ends every process.
func (w *World) Close() error {
	for _, g := range w.Gateways {
		g.Kill()
	}
	if w.Logic != nil {
		w.Logic.close()
	}
	if w.Cache != nil {
		w.Cache.Close()
	}
	var errs []error
	if w.Keys != nil {
		errs = append(errs, w.Keys.Close())
	}
	for _, p := range []*Process{w.Etcd, w.Redis, w.Standby} {
		if p != nil {
			p.Kill()
		}
	}
	if w.Kafka != nil {
		errs = append(errs, w.Kafka.close())
	}
	for _, g := range w.Gateways {
		for _, l := range []*Link{g.EtcdLink, g.RedisLink, g.LogicLink, g.Front} {
			l.Down()
		}
	}
	if w.Kafka != nil {
		w.Kafka.Link.Down()
	}
	return errors.Join(errs...)
}
