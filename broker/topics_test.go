package broker

import (
	"context"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"
)

func ensure(t *testing.T, opts Options) error {
	t.Helper()
	a, err := NewAdmin(opts)
	if err != nil {
		t.Fatal(err)
	}
	return a.EnsureTopics(within(t, testTimeout))
}

func emptyCluster(t *testing.T, opts ...kfake.Opt) *kfake.Cluster {
	t.Helper()
	c, err := kfake.NewCluster(append([]kfake.Opt{kfake.NumBrokers(1)}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestEnsureTopicsCreatesItsOwn(t *testing.T) {
	c := emptyCluster(t, kfake.SeedTopics(2, upTopic, undTopic, deadTopic, eventsTopic))
	opts := testOptions(t, c.ListenAddrs()...)
	opts.DownstreamPartitions, opts.DownstreamReplication, opts.DownstreamRetention = 3, 1, time.Hour
	for range 2 { // and leaves it alone afterwards
		if err := ensure(t, opts); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(c.PartitionInfos(downTopic)); n != 3 {
		t.Errorf("%d partitions", n)
	}
	info := c.TopicInfo(downTopic)
	if r := info.Configs["retention.ms"]; r == nil || *r != "3600000" {
		t.Errorf("configs %v", info.Configs)
	}
}

func TestEnsureTopicsCreatesSharedOnesOnlyWhenTold(t *testing.T) {
	c := emptyCluster(t, kfake.SeedTopics(1, upTopic))
	opts := testOptions(t, c.ListenAddrs()...)
	err := ensure(t, opts)
	for _, name := range []string{undTopic, deadTopic, eventsTopic} {
		if err == nil || !strings.Contains(err.Error(), "topic "+name+" does not exist") ||
			!strings.Contains(err.Error(), "kafka.create_shared_topics") {
			t.Fatalf("%v", err)
		}
	}
	opts.CreateShared, opts.SharedPartitions, opts.SharedReplication = true, 5, 1
	if err := ensure(t, opts); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]int{upTopic: 1, undTopic: 5, deadTopic: 5, eventsTopic: 5} {
		if n := len(c.PartitionInfos(name)); n != want {
			t.Errorf("%s: %d partitions, want %d", name, n, want)
		}
	}
}

func TestEnsureTopicsNamesTheMissingRight(t *testing.T) {
	allow := func(name string, op kmsg.ACLOperation) kfake.ACL {
		return kfake.ACL{Resource: kmsg.ACLResourceTypeTopic, Name: name, Pattern: kmsg.ACLResourcePatternTypeLiteral, Operation: op, Allow: true}
	}
	var acls []kfake.ACL
	for _, name := range []string{upTopic, undTopic, deadTopic, eventsTopic, downTopic} {
		acls = append(acls, allow(name, kmsg.ACLOperationDescribe))
	}
	seed := kfake.SeedTopics(1, upTopic, undTopic, deadTopic, eventsTopic)
	t.Run("create", func(t *testing.T) {
		c := emptyCluster(t, seed, kfake.EnableSASL(), kfake.EnableACLs(),
			kfake.Superuser(SASLPlain, "root", "root"), kfake.User(SASLPlain, "gw", "pw", acls...))
		opts := testOptions(t, c.ListenAddrs()...)
		opts.SASL = SASL{SASLPlain, "gw", "pw"}
		if err := ensure(t, opts); err == nil || !strings.Contains(err.Error(), "needs CREATE on topic "+downTopic) {
			t.Fatalf("%v", err)
		}
	})
	t.Run("describe", func(t *testing.T) {
		c := emptyCluster(t, seed, kfake.EnableSASL(), kfake.EnableACLs(),
			kfake.Superuser(SASLPlain, "root", "root"), kfake.User(SASLPlain, "gw", "pw", acls[1:]...))
		opts := testOptions(t, c.ListenAddrs()...)
		opts.SASL = SASL{SASLPlain, "gw", "pw"}
		if err := ensure(t, opts); err == nil || !strings.Contains(err.Error(), "needs DESCRIBE on topic "+upTopic) {
			t.Fatalf("%v", err)
		}
	})
}

func TestUnsafeTopicsAreWarnedAboutOrRefused(t *testing.T) {
	c := emptyCluster(t, kfake.SeedTopics(1, undTopic, deadTopic, eventsTopic, downTopic))
	if err := c.CreateTopic(upTopic, 1, map[string]string{"max.message.bytes": "5000"}); err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	opts := testOptions(t, c.ListenAddrs()...)
	opts.Logger = zerolog.New(&log)
	if err := ensure(t, opts); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"min.insync.replicas is 1", "max.message.bytes is 5000", `"topics":["` + upTopic + `"]`} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("%q is not in %s", want, log.String())
		}
	}
	opts.Strict = true
	if err := ensure(t, opts); err == nil || !strings.Contains(err.Error(), "min.insync.replicas is 1") ||
		!strings.Contains(err.Error(), "topics "+downTopic+", "+upTopic) {
		t.Fatalf("%v", err)
	}
}

// TestReachableBesideFrozenBroker: a broker that takes connections and never answers keeps nobody from asking the
// others, and not every question goes to the same one.
func TestReachableBesideFrozenBroker(t *testing.T) {
	c := emptyCluster(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var asked atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		var held []net.Conn
		for {
			conn, err := ln.Accept()
			if err != nil {
				break
			}
			asked.Add(1)
			held = append(held, conn)
		}
		for _, conn := range held {
			_ = conn.Close()
		}
	}()
	defer func() { _ = ln.Close(); <-done }()
	a, err := NewAdmin(testOptions(t, append([]string{ln.Addr().String()}, c.ListenAddrs()...)...))
	if err != nil {
		t.Fatal(err)
	}
	for range 64 { // until the frozen one was asked first
		if err := a.Reachable(within(t, testTimeout)); err != nil {
			t.Fatal(err)
		}
		if asked.Load() > 0 {
			return
		}
	}
	t.Error("every question goes to the same broker")
}

func TestAdminGivesUpWithItsContext(t *testing.T) {
	a, err := NewAdmin(testOptions(t, "127.0.0.1:1"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	begun := time.Now()
	if err := a.EnsureTopics(ctx); err == nil {
		t.Error("EnsureTopics without Kafka: no error")
	}
	if err := a.Reachable(context.Background()); err == nil || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Errorf("Reachable without Kafka: %v", err)
	}
	if d := time.Since(begun); d > 20*time.Second {
		t.Errorf("took %v", d)
	}
}
