//go:build kafkaoutage

// Tests that start, freeze and kill a real Kafka broker of their own. They need Java and, in
// IM_TEST_KAFKA_LIBS, the directory with Kafka's jars.

package broker

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/twmb/franz-go/pkg/kgo"

	"im-gateway/codec"
	"im-gateway/test/ports"
)

// kafka is one KRaft node.
type kafka struct {
	t    *testing.T
	dir  string
	addr string
	cmd  *exec.Cmd
}

func newKafka(t *testing.T) *kafka {
	t.Helper()
	libs := os.Getenv("IM_TEST_KAFKA_LIBS")
	if libs == "" {
		t.Fatal("IM_TEST_KAFKA_LIBS must name the directory of Kafka's jars")
	}
	broker, controller := freeAddr(t), freeAddr(t)
	k := &kafka{t: t, dir: t.TempDir(), addr: broker}
	properties := strings.Join([]string{
		"process.roles=broker,controller", "node.id=1",
		"controller.quorum.bootstrap.servers=" + controller,
		"listeners=PLAINTEXT://" + broker + ",CONTROLLER://" + controller,
		"advertised.listeners=PLAINTEXT://" + broker,
		"controller.listener.names=CONTROLLER",
		"listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
		"log.dirs=" + filepath.Join(k.dir, "data"),
		"offsets.topic.replication.factor=1", "offsets.topic.num.partitions=1",
		"group.initial.rebalance.delay.ms=0", "auto.create.topics.enable=false",
	}, "\n")
	if err := os.WriteFile(filepath.Join(k.dir, "server.properties"), []byte(properties), 0o600); err != nil {
		t.Fatal(err)
	}
	id, err := k.java("kafka.tools.StorageTool", "random-uuid").Output()
	if err != nil {
		t.Fatal(err)
	}
	out, err := k.java("kafka.tools.StorageTool", "format", "--standalone", "-t", string(bytes.TrimSpace(id)),
		"-c", "server.properties").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	k.start()
	t.Cleanup(k.kill)
	return k
}

func freeAddr(t *testing.T) string {
	t.Helper()
	addr, err := ports.Free()
	if err != nil {
		t.Fatal(err)
	}
	return addr
}

func (k *kafka) java(args ...string) *exec.Cmd {
	cmd := exec.Command("java", append([]string{
		"-Xms256m", "-Xmx512m", "-cp", filepath.Join(os.Getenv("IM_TEST_KAFKA_LIBS"), "*"),
	}, args...)...)
	cmd.Dir = k.dir
	return cmd
}

func (k *kafka) start() {
	k.cmd = k.java("kafka.Kafka", "server.properties")
	if err := k.cmd.Start(); err != nil {
		k.t.Fatal(err)
	}
}

func (k *kafka) kill() {
	if k.cmd != nil {
		_ = k.cmd.Process.Kill()
		_ = k.cmd.Wait()
		k.cmd = nil
	}
}

func (k *kafka) signal(s syscall.Signal) {
	if err := k.cmd.Process.Signal(s); err != nil {
		k.t.Fatal(err)
	}
}

// lasting lets d pass: how long an outage is, is what these tests are about.
func lasting(d time.Duration) { <-time.After(d) }

func (k *kafka) options(t *testing.T) Options {
	opts := testOptions(t, k.addr)
	opts.CreateShared = true
	opts.SharedPartitions, opts.SharedReplication = 4, 1
	opts.DownstreamPartitions, opts.DownstreamReplication = 2, 1
	opts.FlushInterval = 5 * time.Millisecond
	a, err := NewAdmin(opts)
	if err != nil {
		t.Fatal(err)
	}
	ctx := within(t, 3*time.Minute)
	for a.Reachable(ctx) != nil {
		if ctx.Err() != nil {
			t.Fatal("Kafka does not start")
		}
		lasting(100 * time.Millisecond)
	}
	if err := a.EnsureTopics(ctx); err != nil {
		t.Fatal(err)
	}
	return opts
}

// load publishes about perSecond messages until stop; it stands for the shards, so it keeps a batch
// while the queue is full.
func load(t *testing.T, p *Producer, perSecond int, stop <-chan struct{}) (refused map[codec.Code]int, admitted int) {
	refused = make(map[codec.Code]int)
	const users = 50
	pending := make([][]*codec.UpstreamBatch, testShards)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	seq := make([]int, users)
	for {
		select {
		case <-stop:
			for shard := range pending {
				for _, b := range pending[shard] {
					p.Queue(shard) <- b
				}
			}
			return refused, admitted
		case <-tick.C:
		}
		batches := make([]*codec.UpstreamBatch, testShards)
		for i := range perSecond / 100 {
			user := fmt.Sprint("user-", i%users)
			shard := codec.ShardOf(user, testShards)
			u := newUpstream(t, user, fmt.Sprintf("%d-%d", i%users, seq[i%users]), `{"conversation_id":"v1","content":"a message of usual length"}`)
			code, _ := p.Admit(u.Size())
			if code != codec.OK {
				refused[code]++
				continue
			}
			seq[i%users]++
			admitted++
			if batches[shard] == nil {
				batches[shard] = &codec.UpstreamBatch{Shard: shard}
			}
			batches[shard].Records = append(batches[shard].Records, u)
		}
		for shard, b := range batches {
			if b != nil {
				pending[shard] = append(pending[shard], b)
			}
			for len(pending[shard]) > 0 {
				select {
				case p.Queue(shard) <- pending[shard][0]:
					pending[shard] = pending[shard][1:]
					continue
				default:
				}
				break
			}
		}
	}
}

// judge compares what was answered with what is stored.
func judge(t *testing.T, addr string, got *answers) {
	t.Helper()
	cl, err := kgo.NewClient(kgo.SeedBrokers(addr), kgo.ConsumeTopics(upTopic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	if err != nil {
		t.Fatal(err)
	}
	defer cl.Close()
	stored := make(map[string]int)
	last := make(map[string]int)
	inversions, duplicates := 0, 0
	for {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		f := cl.PollFetches(ctx)
		cancel()
		if f.NumRecords() == 0 {
			break
		}
		f.EachRecord(func(r *kgo.Record) {
			id := header(r, "client_msg_id")
			if stored[id]++; stored[id] > 1 {
				duplicates++
			}
			var user, n int
			_, _ = fmt.Sscanf(id, "%d-%d", &user, &n)
			if n < last[string(r.Key)] {
				inversions++
			}
			last[string(r.Key)] = n
		})
	}
	codes := make(map[codec.Code]int)
	lost := 0
	for id, rs := range got.results {
		if len(rs) != 1 {
			t.Errorf("%s answered %d times", id, len(rs))
		}
		codes[rs[0].Code]++
		if rs[0].Code == codec.OK && stored[id] == 0 {
			lost++
		}
		if rs[0].Code != codec.OK && rs[0].Code != codec.OutcomeUnknown && stored[id] > 0 {
			t.Errorf("%s answered %s and stored", id, rs[0].Code)
		}
	}
	t.Logf("stored %d, answers %v, lost %d, duplicates %d, inversions %d", len(stored), codes, lost, duplicates, inversions)
	if lost > 0 || inversions > 0 || duplicates > 0 {
		t.Error("acknowledged messages lost, doubled or out of order")
	}
}

func outage(t *testing.T, perSecond int, away time.Duration, begin, end func(*kafka)) {
	k := newKafka(t)
	opts := k.options(t)
	var got answers
	p := startProducer(t, opts, got.take)
	stop, watched := make(chan struct{}), make(chan struct{})
	var peakRecords, peakBytes, peakHeap atomic.Int64
	go func() {
		defer close(watched)
		var m runtime.MemStats
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			runtime.ReadMemStats(&m)
			peakRecords.Store(max(peakRecords.Load(), p.credits.records.Load()))
			peakBytes.Store(max(peakBytes.Load(), p.credits.bytes.Load()))
			peakHeap.Store(max(peakHeap.Load(), int64(m.HeapAlloc)))
		}
	}()
	type loaded struct {
		refused  map[codec.Code]int
		admitted int
	}
	done := make(chan loaded, 1)
	go func() {
		r, a := load(t, p, perSecond, stop)
		done <- loaded{r, a}
	}()
	lasting(3 * time.Second)
	begin(k)
	cut := time.Now()
	lasting(away)
	end(k)
	back := time.Now()
	before := got.count()
	for got.count() < before+perSecond/10 {
		if time.Since(back) > 3*time.Minute {
			t.Fatal("no answers after the outage")
		}
		lasting(10 * time.Millisecond)
	}
	t.Logf("outage of %v; answers again %v after its end", back.Sub(cut).Round(time.Millisecond), time.Since(back).Round(time.Millisecond))
	lasting(3 * time.Second)
	close(stop)
	<-watched
	l := <-done
	t.Logf("admitted %d, refused %v, peak in flight %d records, %d bytes, peak heap %d MiB", l.admitted, l.refused,
		peakRecords.Load(), peakBytes.Load(), peakHeap.Load()>>20)
	begun := time.Now()
	if err := p.Close(within(t, 30*time.Second)); err != nil {
		t.Error(err)
	}
	t.Logf("Close took %v", time.Since(begun).Round(time.Millisecond))
	if n := got.count(); n != l.admitted {
		t.Errorf("%d answers for %d admitted", n, l.admitted)
	}
	if peakRecords.Load() > DefaultMaxInFlightRecords+64 {
		t.Errorf("%d in flight", peakRecords.Load())
	}
	judge(t, k.addr, &got)
}

func TestKafkaKilledAndRestarted(t *testing.T) {
	t.Parallel() // each has a Kafka of its own
	outage(t, 5000, 10*time.Second, (*kafka).kill, (*kafka).start)
}

func TestKafkaKilledForLongUnderMoreLoadThanTheCapsHold(t *testing.T) {
	t.Parallel() // each has a Kafka of its own
	outage(t, 10000, 30*time.Second, (*kafka).kill, (*kafka).start)
}

func TestKafkaFrozen(t *testing.T) {
	t.Parallel() // each has a Kafka of its own
	outage(t, 5000, 30*time.Second,
		func(k *kafka) { k.signal(syscall.SIGSTOP) }, func(k *kafka) { k.signal(syscall.SIGCONT) })
}

func TestCloseWhileKafkaIsDeadOrFrozen(t *testing.T) {
	t.Parallel() // each has a Kafka of its own
	for name, begin := range map[string]func(*kafka){
		"dead":   (*kafka).kill,
		"frozen": func(k *kafka) { k.signal(syscall.SIGSTOP) },
	} {
		t.Run(name, func(t *testing.T) {
			k := newKafka(t)
			var got answers
			p := startProducer(t, k.options(t), got.take)
			d := &desk{auto: codec.EndDelivered}
			c, err := NewConsumer(k.options(t), p, testShards, d.dispatch, nil)
			if err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- c.Run(context.Background()) }()
			<-c.Ready()
			stop := make(chan struct{})
			loaded := make(chan int, 1)
			go func() {
				_, n := load(t, p, 5000, stop)
				loaded <- n
			}()
			lasting(time.Second)
			begin(k)
			lasting(2 * time.Second)
			begun := time.Now()
			_ = c.Stop(within(t, 2*time.Second))
			t.Logf("Stop took %v, %v", time.Since(begun).Round(time.Millisecond), <-ended)
			begun = time.Now()
			go func() { lasting(time.Second); close(stop) }()
			err = p.Close(within(t, 2*time.Second))
			took := time.Since(begun)
			n := <-loaded
			t.Logf("Close took %v: %v", took.Round(time.Millisecond), err)
			if took > 30*time.Second {
				t.Error("Close took too long")
			}
			if got.count() != n {
				t.Errorf("%d answers for %d admitted", got.count(), n)
			}
		})
	}
}

// What the consumer reads through a broker's death: everything at least once.
func TestConsumerThroughADeath(t *testing.T) {
	t.Parallel() // each has a Kafka of its own
	k := newKafka(t)
	opts := k.options(t)
	d := &desk{auto: codec.EndDelivered}
	r := startConsumer(t, opts, d, nil).awaitReady(t)
	const n = 2000
	written := make(chan struct{})
	go func() {
		defer close(written)
		cl, err := kgo.NewClient(kgo.SeedBrokers(k.addr), kgo.DefaultProduceTopic(downTopic))
		if err != nil {
			t.Error(err)
			return
		}
		defer cl.Close()
		for i := range n {
			cl.Produce(context.Background(), &kgo.Record{Key: fmt.Append(nil, "u", i%20), Value: []byte(message(fmt.Sprint("m", i), fmt.Sprint("u", i%20)))}, nil)
			lasting(5 * time.Millisecond)
		}
		_ = cl.Flush(context.Background())
	}()
	lasting(3 * time.Second)
	k.kill()
	lasting(5 * time.Second)
	k.start()
	back := time.Now()
	<-written
	for {
		seen := make(map[string]bool)
		d.mu.Lock()
		for _, s := range d.seen {
			seen[s] = true
		}
		all := len(d.seen)
		d.mu.Unlock()
		if len(seen) == n {
			t.Logf("%d deliveries of %d records, %v after the restart, sessions %v", all, n,
				time.Since(back).Round(time.Millisecond), testutil.ToFloat64(r.metrics.sessions))
			return
		}
		if time.Since(back) > 3*time.Minute {
			t.Fatalf("%d of %d read", len(seen), n)
		}
		lasting(50 * time.Millisecond)
	}
}
