package world

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"

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

func startKafka(ctx context.Context, o Options, proxies *proxies) (*Kafka, error) {
	libs, err := servers.Jars(ctx)
	if err != nil {
		return nil, err
	}
	k := &Kafka{libs: libs, Link: &Link{name: "kafka"}}
	for i := range o.Brokers {
		b := &broker{id: i + 1, data: filepath.Join(o.Dir, fmt.Sprintf("kafka-%d", i+1))}
		if err := freeAddrs(&b.direct, &b.proxied, &b.control, &b.advertised); err != nil {
			return nil, err
		}
		k.brokers = append(k.brokers, b)
	}
	if o.DiskMB > 0 {
		k.disk = k.brokers[0].data
		if err := os.MkdirAll(k.disk, 0o755); err != nil {
			return nil, fmt.Errorf("disk: %w", err)
		}
		if err := syscall.Mount("none", k.disk, "tmpfs", 0, fmt.Sprintf("size=%dm", o.DiskMB)); err != nil {
			return nil, fmt.Errorf("mount a small disk (needs root): %w", err)
		}
	}
	var voters []string
	for _, b := range k.brokers {
		voters = append(voters, fmt.Sprintf("%d@%s", b.id, b.control))
	}
	const cluster = "MkU3OEVBNTcwNTJENDM2Qk"
	for _, b := range k.brokers {
		file := filepath.Join(o.Dir, fmt.Sprintf("kafka-%d.properties", b.id))
		if err := os.WriteFile(file, []byte(k.properties(b, strings.Join(voters, ","))), 0o600); err != nil {
			return nil, fmt.Errorf("configure Kafka: %w", err)
		}
		if err := proxies.add(k.Link, b.advertised, b.proxied); err != nil {
			return nil, err
		}
		format := exec.CommandContext(ctx, "java", "-cp", filepath.Join(libs, "*"), "kafka.tools.StorageTool",
			"format", "-t", cluster, "-c", file)
		if out, err := format.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("format Kafka's storage: %w\n%s", err, out)
		}
		b.Process = &Process{
			name: fmt.Sprintf("kafka-%d", b.id), log: filepath.Join(o.Dir, fmt.Sprintf("kafka-%d.log", b.id)),
			ready: dials(b.direct),
			make: func() *exec.Cmd {
				return exec.Command("java", "-Xms192m", "-Xmx384m", "-cp", filepath.Join(libs, "*"), "kafka.Kafka", file)
			},
		}
		if err := b.launch(); err != nil {
			return nil, err
		}
	}
	if k.Client, err = kgo.NewClient(kgo.SeedBrokers(k.Brokers()...), kgo.RetryTimeout(2*time.Minute)); err != nil {
		return nil, fmt.Errorf("kafka client: %w", err)
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

// Await waits until every broker is in the cluster and every partition has a leader.
func (k *Kafka) Await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		m, err := k.Admin.Metadata(ctx)
		if err == nil && len(m.Brokers) == len(k.brokers) && led(m.Topics) {
			return nil
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("the Kafka cluster is not whole: %w\n%s", ctx.Err(), tail(k.brokers[0].log))
		}
	}
}

func led(topics kadm.TopicDetails) bool {
	for _, t := range topics {
		for _, p := range t.Partitions {
			if p.Leader < 0 || len(p.ISR) < len(p.Replicas) {
				return false
			}
		}
	}
	return true
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

// Leaders are the leaders of a topic's partitions, by partition.
func (k *Kafka) Leaders(ctx context.Context, topic string) ([]int32, error) {
	m, err := k.Admin.Metadata(ctx, topic)
	if err != nil {
		return nil, fmt.Errorf("leaders of %s: %w", topic, err)
	}
	leaders := make([]int32, len(m.Topics[topic].Partitions))
	for p, d := range m.Topics[topic].Partitions {
		leaders[p] = d.Leader
	}
	return leaders, nil
}

// MoveLeaders makes another broker the leader of every partition of a topic, and waits until it is.
func (k *Kafka) MoveLeaders(ctx context.Context, topic string) (before, after []int32, err error) {
	m, err := k.Admin.Metadata(ctx, topic)
	if err != nil {
		return nil, nil, fmt.Errorf("move leaders: %w", err)
	}
	if before, err = k.Leaders(ctx, topic); err != nil {
		return nil, nil, err
	}
	var assign kadm.AlterPartitionAssignmentsReq
	set := kadm.TopicsSet{}
	for p, d := range m.Topics[topic].Partitions {
		i := slices.Index(d.Replicas, d.Leader)
		rotated := append(append([]int32(nil), d.Replicas[i+1:]...), d.Replicas[:i+1]...)
		assign.Assign(topic, p, rotated)
		set.Add(topic, p)
	}
	if _, err := k.Admin.AlterPartitionAssignments(ctx, assign); err != nil {
		return nil, nil, fmt.Errorf("move leaders: %w", err)
	}
	for {
		_, _ = k.Admin.ElectLeaders(ctx, kadm.ElectPreferredReplica, set)
		if after, err = k.Leaders(ctx, topic); err == nil && !slices.ContainsFunc(before, func(int32) bool { return false }) {
			moved := true
			for p := range before {
				moved = moved && before[p] != after[p]
			}
			if moved {
				return before, after, nil
			}
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return before, after, fmt.Errorf("leaders did not move: %w", ctx.Err())
		}
	}
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
	return nil // it is full
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
