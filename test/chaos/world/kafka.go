package world

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"im-gateway/test/servers"
)

// broker is one Kafka node, broker and controller.
type broker struct {
	*Process
	id                       int
	direct, proxied, control string // listeners: for the suite, behind the proxy, of the controllers
	advertised               string // where the proxy listens
	data                     string
}

// Kafka is the cluster.
type Kafka struct {
	brokers []*broker
	libs    string
	Link    *Link // from all gateways
	Client  *kgo.Client
	Admin   *kadm.Client
	disk    string // tmpfs of the first broker; empty: none
}

// Topics that the suite makes before any gateway starts.
const (
	UpstreamTopic    = "im-upstream-topic"
	UndeliveredTopic = "im-undelivered-topic"
	DeadletterTopic  = "im-deadletter-topic"
	EventsTopic      = "im-user-events-topic"
	DownstreamPrefix = "im-downstream-topic-"
)

// startKafka returns, with an error too, what close must end.
func startKafka(ctx context.Context, o Options, proxies *proxies) (*Kafka, error) {
	libs, err := servers.Jars(ctx)
	if err != nil {
		return nil, err
	}
	k := &Kafka{libs: libs, Link: &Link{name: "kafka"}}
	for i := range o.Brokers {
		b := &broker{id: i + 1, data: filepath.Join(o.Dir, fmt.Sprintf("kafka-%d", i+1))}
		if err := freeAddrs(&b.direct, &b.proxied, &b.control, &b.advertised); err != nil {
			return k, err
		}
		k.brokers = append(k.brokers, b)
	}
	if o.DiskMB > 0 {
		dir := k.brokers[0].data
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return k, fmt.Errorf("disk: %w", err)
		}
		if err := syscall.Mount("none", dir, "tmpfs", 0, fmt.Sprintf("size=%dm", o.DiskMB)); err != nil {
			return k, fmt.Errorf("mount a small disk (needs root): %w", err)
		}
		k.disk = dir
	}
	var voters []string
	for _, b := range k.brokers {
		voters = append(voters, fmt.Sprintf("%d@%s", b.id, b.control))
	}
	const cluster = "MkU3OEVBNTcwNTJENDM2Qk"
	for _, b := range k.brokers {
		file := filepath.Join(o.Dir, fmt.Sprintf("kafka-%d.properties", b.id))
		if err := os.WriteFile(file, []byte(k.properties(b, strings.Join(voters, ","))), 0o600); err != nil {
			return k, fmt.Errorf("configure Kafka: %w", err)
		}
		if err := proxies.add(k.Link, b.advertised, b.proxied); err != nil {
			return k, err
		}
		format := exec.CommandContext(ctx, "java", "-cp", filepath.Join(libs, "*"), "kafka.tools.StorageTool",
			"format", "-t", cluster, "-c", file)
		if out, err := format.CombinedOutput(); err != nil {
			return k, fmt.Errorf("format Kafka's storage: %w\n%s", err, out)
		}
		b.Process = &Process{
			name: fmt.Sprintf("kafka-%d", b.id), log: filepath.Join(o.Dir, fmt.Sprintf("kafka-%d.log", b.id)),
			ready: dials(b.direct),
			make: func() *exec.Cmd {
				return exec.Command("java", "-Xms192m", "-Xmx384m", "-cp", filepath.Join(libs, "*"), "kafka.Kafka", file)
			},
		}
		if err := b.launch(); err != nil {
			return k, err
		}
	}
	if k.Client, err = kgo.NewClient(kgo.SeedBrokers(k.Brokers()...), kgo.RetryTimeout(2*time.Minute), kgo.ProducerBatchMaxBytes(4<<20)); err != nil {
		return k, fmt.Errorf("kafka client: %w", err)
	}
	k.Admin = kadm.NewClient(k.Client)
	return k, k.Await(ctx)
}

func (k *Kafka) properties(b *broker, voters string) string {
	n := len(k.brokers)
	return strings.Join([]string{
		"process.roles=broker,controller", fmt.Sprintf("node.id=%d", b.id),
		"controller.quorum.voters=" + voters,
		fmt.Sprintf("listeners=DIRECT://%s,PROXY://%s,CONTROLLER://%s", b.direct, b.proxied, b.control),
		fmt.Sprintf("advertised.listeners=DIRECT://%s,PROXY://%s", b.direct, b.advertised),
		"controller.listener.names=CONTROLLER", "inter.broker.listener.name=DIRECT",
		"listener.security.protocol.map=DIRECT:PLAINTEXT,PROXY:PLAINTEXT,CONTROLLER:PLAINTEXT",
		"log.dirs=" + b.data,
		fmt.Sprintf("offsets.topic.replication.factor=%d", min(3, n)), "offsets.topic.num.partitions=1",
		fmt.Sprintf("transaction.state.log.replication.factor=%d", min(3, n)), "transaction.state.log.num.partitions=1",
		fmt.Sprintf("default.replication.factor=%d", min(3, n)), fmt.Sprintf("min.insync.replicas=%d", min(2, n)),
		"group.initial.rebalance.delay.ms=0", "group.min.session.timeout.ms=1000", "auto.create.topics.enable=false",
		"replica.lag.time.max.ms=5000", "broker.session.timeout.ms=6000",
		"log.segment.bytes=16777216", "log.index.size.max.bytes=1048576", "",
	}, "\n")
}

// Await waits until every broker serves clients and sees the whole cluster: all brokers, and all replicas
// of every partition in sync.
func (k *Kafka) Await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		err := k.whole(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("the Kafka cluster is not whole: %w\n%s", err, tail(k.brokers[0].log))
		}
	}
}

// whole asks every broker: one that was killed stays in what the others say until its session ends.
func (k *Kafka) whole(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if _, err := k.metadata(ctx, k.Client); err != nil { // tells the client where the brokers are
		return err
	}
	for _, b := range k.brokers {
		m, err := k.metadata(ctx, k.Client.Broker(b.id))
		if err != nil {
			return fmt.Errorf("broker %d: %w", b.id, err)
		}
		if len(m.Brokers) != len(k.brokers) {
			return fmt.Errorf("broker %d sees %d brokers", b.id, len(m.Brokers))
		}
		for _, t := range m.Topics {
			for _, p := range t.Partitions {
				if p.Leader < 0 || len(p.ISR) < len(p.Replicas) {
					return fmt.Errorf("broker %d sees %s/%d led by %d, in sync %v of %v", b.id, *t.Topic, p.Partition, p.Leader, p.ISR, p.Replicas)
				}
			}
		}
	}
	return nil
}

const askTimeout = 5 * time.Second

// metadata asks a broker. kadm would answer from a memory of several seconds.
func (k *Kafka) metadata(ctx context.Context, of kmsg.Requestor, topics ...string) (*kmsg.MetadataResponse, error) {
	req := kmsg.NewPtrMetadataRequest() // without topics: all of them
	for _, name := range topics {
		t := kmsg.NewMetadataRequestTopic()
		t.Topic = &name
		req.Topics = append(req.Topics, t)
	}
	resp, err := req.RequestWith(ctx, of)
	if err != nil {
		return nil, fmt.Errorf("metadata: %w", err)
	}
	for _, t := range resp.Topics {
		if err := kerr.ErrorForCode(t.ErrorCode); err != nil {
			return nil, fmt.Errorf("metadata: %w", err)
		}
	}
	return resp, nil
}

// Brokers are the addresses for the suite itself.
func (k *Kafka) Brokers() (list []string) {
	for _, b := range k.brokers {
		list = append(list, b.direct)
	}
	return list
}

// proxied are those for the gateways.
func (k *Kafka) proxied() (list []string) {
	for _, b := range k.brokers {
		list = append(list, b.advertised)
	}
	return list
}

// Broker is the process of one of them, from 0.
func (k *Kafka) Broker(i int) *Process { return k.brokers[i].Process }

// N is how many there are.
func (k *Kafka) N() int { return len(k.brokers) }

// StartAll starts those that do not run, together, and waits until the cluster is whole.
func (k *Kafka) StartAll(ctx context.Context) error {
	for _, b := range k.brokers {
		if !b.Alive() {
			if err := b.launch(); err != nil {
				return err
			}
		}
	}
	return k.Await(ctx)
}

func (k *Kafka) createTopics(ctx context.Context) error {
	replicas := int16(min(3, len(k.brokers)))
	resp, err := k.Admin.CreateTopics(ctx, 4, replicas, nil, UpstreamTopic, UndeliveredTopic, DeadletterTopic, EventsTopic)
	if err == nil {
		err = resp.Error()
	}
	if err != nil {
		return fmt.Errorf("create the shared topics: %w", err)
	}
	return nil
}

// Leaders are the leaders of a topic's partitions, by partition; -1: it has none.
func (k *Kafka) Leaders(ctx context.Context, topic string) ([]int32, error) {
	m, err := k.metadata(ctx, k.Client, topic)
	if err != nil {
		return nil, fmt.Errorf("leaders of %s: %w", topic, err)
	}
	return leaders(m), nil
}

func leaders(of *kmsg.MetadataResponse) []int32 {
	list := make([]int32, len(of.Topics[0].Partitions))
	for _, p := range of.Topics[0].Partitions {
		list[p.Partition] = p.Leader
	}
	return list
}

// MoveLeaders makes another broker the leader of every partition of a topic, and waits until it is. The
// topic needs more than one replica.
func (k *Kafka) MoveLeaders(ctx context.Context, topic string) (before, after []int32, err error) {
	m, err := k.metadata(ctx, k.Client, topic)
	if err != nil {
		return nil, nil, fmt.Errorf("move leaders: %w", err)
	}
	before = leaders(m)
	var assign kadm.AlterPartitionAssignmentsReq
	set := kadm.TopicsSet{}
	for _, p := range m.Topics[0].Partitions {
		if len(p.Replicas) < 2 {
			return before, nil, fmt.Errorf("move leaders: %s/%d has one replica", topic, p.Partition)
		}
		i := slices.Index(p.Replicas, p.Leader)
		assign.Assign(topic, p.Partition, slices.Concat(p.Replicas[i+1:], p.Replicas[:i+1]))
		set.Add(topic, p.Partition)
	}
	resp, err := k.Admin.AlterPartitionAssignments(ctx, assign)
	if err == nil {
		err = resp.Error()
	}
	if err != nil {
		return before, nil, fmt.Errorf("move leaders: %w", err)
	}
	for {
		// An error here is one to try again after, such as that the reassignment is still under way.
		_, electErr := k.Admin.ElectLeaders(ctx, kadm.ElectPreferredReplica, set)
		if after, err = k.Leaders(ctx, topic); err == nil && moved(before, after) {
			return before, after, nil
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return before, after, fmt.Errorf("leaders did not move: %w", errors.Join(ctx.Err(), electErr, err))
		}
	}
}

func moved(before, after []int32) bool {
	for p := range before {
		if after[p] < 0 || before[p] == after[p] {
			return false
		}
	}
	return true
}

// FillDisk fills the first broker's disk.
func (k *Kafka) FillDisk() error {
	f, err := os.Create(filepath.Join(k.disk, "ballast"))
	if err != nil {
		return fmt.Errorf("fill the disk: %w", err)
	}
	defer func() { _ = f.Close() }()
	block := make([]byte, 64<<10)
	for err == nil {
		_, err = f.Write(block)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("fill the disk: %w", err)
	}
	return nil
}

// FreeDisk ends FillDisk.
func (k *Kafka) FreeDisk() error { return os.Remove(filepath.Join(k.disk, "ballast")) }

func (k *Kafka) close() error {
	if k.Client != nil {
		k.Client.Close()
	}
	for _, b := range k.brokers {
		if b.Process != nil {
			b.Kill()
		}
	}
	if k.disk != "" {
		return syscall.Unmount(k.disk, 0)
	}
	return nil
}
