package embedded

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/twmb/franz-go/pkg/kfake"
)

// The servers, as PortError names them.
const (
	Kafka = "Kafka"
	Etcd  = "etcd"
	Redis = "Redis"
)

const (
	defaultPartitions     = 4
	defaultRetentionBytes = 64 << 20

	// retentionEvery is how often Kafka's oldest records are dropped: kfake does not by itself.
	retentionEvery = 10 * time.Second
)

// Options say where the servers listen and what they hold. The zero value is usable: free ports,
// everything in memory but for etcd's temporary directory.
type Options struct {
	// Ports on 127.0.0.1; 0: a free one.
	KafkaPort, EtcdPort, RedisPort int
	// Dir keeps Kafka's and etcd's data for the next start. Empty: a temporary directory, removed by
	// Close. Redis is never kept: what it holds is rebuilt by the gateways.
	Dir string
	// Topics exist from the start, with Partitions partitions each.
	Topics []string
	// Partitions of topics that are created without a number of their own. 0: 4.
	Partitions int
	// RetentionBytes bounds each partition, which lives in memory unless Dir is given. 0: 64 MiB.
	RetentionBytes int64
}

// Servers are the running servers. Its methods may be called from any goroutine.
type Servers struct {
	kafka *kfake.Cluster
	redis *miniredis.Miniredis
	etcd  *etcdServer

	brokers   []string
	tempDir   string
	stop      chan struct{}
	retention sync.WaitGroup
	close     sync.Once
	closeErr  error
}

// PortError is returned by Start when a server cannot listen.
type PortError struct {
	Server string // Kafka, Etcd or Redis
	Addr   string
	Err    error
}

func (e *PortError) Error() string {
	return fmt.Sprintf("%s cannot listen on %s: %v", e.Server, e.Addr, e.Err)
}

func (e *PortError) Unwrap() error { return e.Err }

// Start starts the servers and returns once all of them answer. The caller closes them; when Start
// fails, those that had been started are closed already.
func Start(ctx context.Context, o Options) (_ *Servers, err error) {
	s := &Servers{stop: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	dir := o.Dir
	if dir == "" {
		if s.tempDir, err = os.MkdirTemp("", "im-dev-*"); err != nil {
			return nil, fmt.Errorf("directory of the embedded servers: %w", err)
		}
		dir = s.tempDir
	}
	if err := s.startKafka(o); err != nil {
		return nil, err
	}
	if s.etcd, err = startEtcd(ctx, filepath.Join(dir, "etcd"), o.EtcdPort); err != nil {
		return nil, err
	}
	if err := s.startRedis(o.RedisPort); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *Servers) startKafka(o Options) error {
	partitions, retention := o.Partitions, o.RetentionBytes
	if partitions == 0 {
		partitions = defaultPartitions
	}
	if retention == 0 {
		retention = defaultRetentionBytes
	}
	opts := []kfake.Opt{
		kfake.Ports(o.KafkaPort),
		kfake.ListenFn(listenLoopback),
		kfake.DefaultNumPartitions(partitions),
		kfake.SeedTopics(int32(partitions), o.Topics...),
		kfake.BrokerConfigs(map[string]string{
			"log.retention.bytes": strconv.FormatInt(retention, 10),
			"log.segment.bytes":   strconv.FormatInt(max(retention/8, 1<<20), 10),
		}),
	}
	if o.Dir != "" {
		opts = append(opts, kfake.DataDir(filepath.Join(o.Dir, "kafka")))
	}
	cluster, err := kfake.NewCluster(opts...)
	if err != nil {
		return listenError(Kafka, o.KafkaPort, err)
	}
	s.kafka, s.brokers = cluster, cluster.ListenAddrs()
	s.retention.Go(func() {
		tick := time.NewTicker(retentionEvery)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				cluster.ApplyRetention()
			case <-s.stop:
				return
			}
		}
	})
	return nil
}

func (s *Servers) startRedis(port int) error {
	r := miniredis.NewMiniRedis()
	if err := r.StartAddr(loopback(port)); err != nil {
		return listenError(Redis, port, err)
	}
	r.ClockTTL(true) // entries expire as time passes, as in a real Redis
	s.redis = r
	return nil
}

// KafkaBrokers returns the addresses to give to a Kafka client.
func (s *Servers) KafkaBrokers() []string { return s.brokers }

// EtcdEndpoints returns the endpoints to give to an etcd client.
func (s *Servers) EtcdEndpoints() []string { return []string{s.etcd.endpoint} }

// RedisAddr returns Redis' address. Clients must not use client-side caching, and must not take it
// for a cluster, for it answers CLUSTER commands: rueidis needs DisableCache and ForceSingleClient.
func (s *Servers) RedisAddr() string { return s.redis.Addr() }

// KafkaCluster gives tests hold of the broker itself, to inject faults.
func (s *Servers) KafkaCluster() *kfake.Cluster { return s.kafka }

// RedisServer gives tests hold of Redis itself: Close and Restart make an outage, FlushAll a loss.
func (s *Servers) RedisServer() *miniredis.Miniredis { return s.redis }

// Close stops the servers and removes the temporary directory. It may be called more than once.
func (s *Servers) Close() error {
	s.close.Do(func() {
		close(s.stop)
		s.retention.Wait()
		if s.redis != nil {
			s.redis.Close()
		}
		if s.etcd != nil {
			s.etcd.close()
		}
		if s.kafka != nil {
			s.kafka.Close()
		}
		if s.tempDir != "" {
			if err := os.RemoveAll(s.tempDir); err != nil {
				s.closeErr = fmt.Errorf("remove the embedded servers' directory: %w", err)
			}
		}
	})
	return s.closeErr
}

func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// listenLoopback keeps kfake off the other interfaces and off IPv6, whatever it asks for.
func listenLoopback(_, addr string) (net.Listener, error) {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	return net.Listen("tcp4", net.JoinHostPort("127.0.0.1", port))
}

// listenError is a *PortError when err came from a listener.
func listenError(server string, port int, err error) error {
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		return &PortError{Server: server, Addr: loopback(port), Err: op.Err}
	}
	return fmt.Errorf("start the embedded %s: %w", server, err)
}
