package embedded

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/redis/rueidis"
	"github.com/twmb/franz-go/pkg/kgo"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func start(t *testing.T, o Options) *Servers {
	t.Helper()
	s, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func deadline(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func TestServersAnswer(t *testing.T) {
	s := start(t, Options{Topics: []string{"seeded"}, Partitions: 3})
	ctx := deadline(t)

	kafka, err := kgo.NewClient(kgo.SeedBrokers(s.KafkaBrokers()...), kgo.ConsumeTopics("seeded"))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	want := &kgo.Record{Topic: "seeded", Key: []byte("k"), Value: []byte("v")}
	if err := kafka.ProduceSync(ctx, want).FirstErr(); err != nil {
		t.Fatal("produce:", err)
	}
	fetches := kafka.PollFetches(ctx)
	if err := fetches.Err(); err != nil {
		t.Fatal("fetch:", err)
	}
	if got := fetches.Records()[0]; string(got.Value) != "v" {
		t.Errorf("read back %q, want v", got.Value)
	}
	if n := len(s.KafkaCluster().PartitionInfos("seeded")); n != 3 {
		t.Errorf("seeded topic has %d partitions, want 3", n)
	}

	etcd, err := clientv3.New(clientv3.Config{Endpoints: s.EtcdEndpoints()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = etcd.Close() }()
	lease, err := etcd.Grant(ctx, 5)
	if err != nil {
		t.Fatal("grant:", err)
	}
	if _, err := etcd.Put(ctx, "k", "v", clientv3.WithLease(lease.ID)); err != nil {
		t.Fatal("put:", err)
	}
}

func TestRedisEntriesExpireByTheClock(t *testing.T) {
	s := start(t, Options{})
	ctx := deadline(t)
	r, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{s.RedisAddr()}, DisableCache: true})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := r.Do(ctx, r.B().Set().Key("k").Value("v").PxMilliseconds(50).Build()).Error(); err != nil {
		t.Fatal(err)
	}
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for {
		n, err := r.Do(ctx, r.B().Exists().Key("k").Build()).AsInt64()
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			return
		}
		<-poll.C
	}
}

func TestPortTaken(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	port := ln.Addr().(*net.TCPAddr).Port
	for _, tc := range []struct {
		server  string
		options Options
	}{
		{Kafka, Options{KafkaPort: port}},
		{Etcd, Options{EtcdPort: port}},
		{Redis, Options{RedisPort: port}},
	} {
		t.Run(tc.server, func(t *testing.T) {
			s, err := Start(t.Context(), tc.options)
			if err == nil {
				_ = s.Close()
				t.Fatal("started on a port that is taken")
			}
			var taken *PortError
			if !errors.As(err, &taken) || taken.Server != tc.server || taken.Addr != ln.Addr().String() {
				t.Errorf("got %v, want a PortError of %s on %s", err, tc.server, ln.Addr())
			}
		})
	}
}

func TestDirKeepsData(t *testing.T) {
	dir := t.TempDir()
	ctx := deadline(t)
	for _, round := range []string{"write", "read"} {
		s, err := Start(ctx, Options{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		etcd, err := clientv3.New(clientv3.Config{Endpoints: s.EtcdEndpoints()})
		if err != nil {
			t.Fatal(err)
		}
		if round == "write" {
			_, err = etcd.Put(ctx, "kept", "yes")
		} else if got, getErr := etcd.Get(ctx, "kept"); getErr != nil || len(got.Kvs) != 1 {
			t.Errorf("after a restart: %v, %v", got, getErr)
		}
		if err != nil {
			t.Fatal(err)
		}
		_ = etcd.Close()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Error("closed again:", err)
		}
	}
}
