// Package e2e drives the built gateway as its users do: clients over WebSocket and HTTP, im-logic,
// Kafka, Redis and etcd, first on the embedded servers (-backend=embedded), then on real ones
// (-backend=real, with -tags real for the tests that need them).
package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/rueidis"
	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kgo"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"im-gateway/cmd/im-dev/embedded"
	"im-gateway/cmd/im-dev/logic"
	"im-gateway/test/servers"
)

var backendFlag = flag.String("backend", "embedded", "embedded or real servers")

// patience is how long an event may take; nothing is asserted to be faster.
const patience = 60 * time.Second

const secret = "e2e-secret-0123456789abcdef-0123456789"

// env is what all tests share.
var env environment

type environment struct {
	binary  string // bin/im-gateway
	brokers []string
	redis   string
	etcd    []string
	real    *realServers // nil on embedded
	kafka   *kgo.Client  // a producer of the tests' own
	cache   rueidis.Client
	keys    *clientv3.Client
	logic   *logic.Service
	spec    *specification

	mu      sync.Mutex
	logs    []*logBuffer
	secrets []string // must occur in no log
}

// realServers are the child processes of -backend=real.
type realServers struct {
	kafka *servers.Kafka
	etcd  *servers.Etcd
	redis *servers.Redis
}

var sharedTopics = []string{"im-upstream-topic", "im-undelivered-topic", "im-deadletter-topic", "im-user-events-topic"}

func TestMain(m *testing.M) {
	flag.Parse()
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	dir, err := os.MkdirTemp("", "im-e2e-")
	if err != nil {
		return 1, fmt.Errorf("temporary directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	env.binary = filepath.Join(dir, "im-gateway")
	if out, err := exec.Command("go", "build", "-o", env.binary, "im-gateway/cmd/im-gateway").CombinedOutput(); err != nil {
		return 1, fmt.Errorf("build the gateway: %w\n%s", err, out)
	}
	stop, err := startBackend(ctx, dir)
	if err != nil {
		return 1, err
	}
	defer stop()
	if env.kafka, err = kgo.NewClient(kgo.SeedBrokers(env.brokers...)); err != nil {
		return 1, fmt.Errorf("kafka client: %w", err)
	}
	defer env.kafka.Close()
	env.cache, err = rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{env.redis}, DisableCache: true, ForceSingleClient: true})
	if err != nil {
		return 1, fmt.Errorf("redis client: %w", err)
	}
	defer env.cache.Close()
	env.keys, err = clientv3.New(clientv3.Config{Endpoints: env.etcd, Logger: zap.NewNop()})
	if err != nil {
		return 1, fmt.Errorf("etcd client: %w", err)
	}
	defer func() { _ = env.keys.Close() }()
	// The first gateway makes the shared topics, which im-logic needs.
	if err := createTopics(ctx); err != nil {
		return 1, err
	}
	stopLogic, err := startLogic(ctx)
	if err != nil {
		return 1, err
	}
	defer stopLogic()
	env.secrets = append(env.secrets, secret)
	if env.spec, err = loadSpecification(); err != nil {
		return 1, err
	}
	code = m.Run()
	ctx, cancel = context.WithTimeout(ctx, patience)
	defer cancel()
	return code, errors.Join(searchLogs(), env.spec.readTopics(ctx))
}

func startBackend(ctx context.Context, dir string) (stop func(), err error) {
	switch *backendFlag {
	case "embedded":
		s, err := embedded.Start(ctx, embedded.Options{Topics: sharedTopics})
		if err != nil {
			return nil, fmt.Errorf("embedded servers: %w", err)
		}
		env.brokers, env.redis, env.etcd = s.KafkaBrokers(), s.RedisAddr(), s.EtcdEndpoints()
		return func() { _ = s.Close() }, nil
	case "real":
		r := &realServers{}
		if r.kafka, err = servers.StartKafka(ctx, dir); err != nil {
			return nil, err
		}
		if r.etcd, err = servers.StartEtcd(ctx, dir); err != nil {
			return nil, err
		}
		if r.redis, err = servers.StartRedis(ctx, dir, ""); err != nil {
			return nil, err
		}
		env.real = r
		env.brokers, env.redis, env.etcd = []string{r.kafka.Broker}, r.redis.Addr, []string{r.etcd.Endpoint}
		return func() {
			r.kafka.Kill()
			r.etcd.Kill()
			r.redis.Kill()
		}, nil
	}
	return nil, fmt.Errorf("-backend=%s: must be embedded or real", *backendFlag)
}

// startLogic runs the reference im-logic for the whole suite.
func startLogic(ctx context.Context) (stop func(), err error) {
	env.logic, err = logic.New(logic.Options{
		Kafka:    []kgo.Opt{kgo.SeedBrokers(env.brokers...)},
		Redis:    rueidis.ClientOption{InitAddress: []string{env.redis}, ForceSingleClient: true},
		Etcd:     clientv3.Config{Endpoints: env.etcd},
		LeaseTTL: 2 * time.Second, Secret: []byte(secret), Logger: zerolog.Nop(),
	})
	if err != nil {
		return nil, fmt.Errorf("im-logic: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- env.logic.Run(ctx) }()
	select {
	case <-env.logic.Ready():
	case err := <-ended:
		cancel()
		return nil, fmt.Errorf("im-logic ended: %w", err)
	case <-time.After(patience):
		cancel()
		return nil, errors.New("im-logic is not ready")
	}
	return func() { cancel(); <-ended }, nil
}

// searchLogs looks for secrets and tokens in all that the gateways have logged.
func searchLogs() error {
	env.mu.Lock()
	defer env.mu.Unlock()
	var errs []error
	for _, l := range env.logs {
		text := l.String()
		for _, s := range env.secrets {
			if strings.Contains(text, s) {
				errs = append(errs, fmt.Errorf("a gateway has logged the secret or token %.12s...", s))
			}
		}
	}
	if len(env.logs) == 0 || len(env.secrets) < 2 {
		errs = append(errs, errors.New("nothing was searched for secrets"))
	}
	return errors.Join(errs...)
}

// hide notes a text that must never be logged.
func hide(s string) string {
	env.mu.Lock()
	defer env.mu.Unlock()
	env.secrets = append(env.secrets, s)
	return s
}
