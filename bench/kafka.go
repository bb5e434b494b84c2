package bench

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

// kafka is the run's own view of Kafka, by a client that is not the gateway's, so that what acks
// say is checked against what is there.
type kafka struct {
	o      *Options
	client *kgo.Client
	admin  *kadm.Client
	from   kadm.ListedOffsets // of the upstream topic when the stage began
	ctx    context.Context    // ends with close
	cancel context.CancelFunc
	tasks  sync.WaitGroup
}

func dialKafka(ctx context.Context, o *Options) (*kafka, error) {
	client, err := kgo.NewClient(kgo.SeedBrokers(o.Kafka...), kgo.ProducerLinger(time.Millisecond),
		kgo.RecordPartitioner(kgo.StickyKeyPartitioner(nil)), kgo.ProducerBatchMaxBytes(900_000),
		kgo.MaxBufferedRecords(1<<18), kgo.ClientID("im-bench"))
	if err != nil {
		return nil, fmt.Errorf("kafka client: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := client.Ping(ctx); err != nil {
		client.Close()
		return nil, fmt.Errorf("reach Kafka at %v: %w", o.Kafka, err)
	}
	k := &kafka{o: o, client: client, admin: kadm.NewClient(client)}
	k.ctx, k.cancel = context.WithCancel(context.Background())
	return k, nil
}

func (k *kafka) close() {
	k.cancel()
	k.tasks.Wait()
	k.client.Close()
}

// mark remembers where the upstream topic ends, so that verification begins there.
func (k *kafka) mark(ctx context.Context) error {
	var err error
	k.from, err = k.admin.ListEndOffsets(ctx, k.o.UpstreamTopic)
	if err == nil {
		err = k.from.Error()
	}
	if err != nil {
		return fmt.Errorf("find the end of topic %s: %w", k.o.UpstreamTopic, err)
	}
	return nil
}

// follow reads the upstream topic from where it ends now.
func (k *kafka) follow() (*kgo.Client, error) {
	parts := map[int32]kgo.Offset{}
	k.from.Each(func(o kadm.ListedOffset) { parts[o.Partition] = kgo.NewOffset().At(o.Offset) })
	c, err := kgo.NewClient(kgo.SeedBrokers(k.o.Kafka...), kgo.FetchMaxWait(100*time.Millisecond),
		kgo.ConsumePartitions(map[string]map[int32]kgo.Offset{k.o.UpstreamTopic: parts}))
	if err != nil {
		return nil, fmt.Errorf("kafka client: %w", err)
	}
	return c, nil
}

// readUpstream hands every record stored since mark to f.
func (k *kafka) readUpstream(ctx context.Context, f func(rec *kgo.Record)) error {
	ends, err := k.admin.ListEndOffsets(ctx, k.o.UpstreamTopic)
	if err == nil {
		err = ends.Error()
	}
	if err != nil {
		return fmt.Errorf("find the end of topic %s: %w", k.o.UpstreamTopic, err)
	}
	parts := map[int32]kgo.Offset{}
	left := map[int32]int64{} // last offset wanted, by partition
	ends.Each(func(end kadm.ListedOffset) {
		start, ok := k.from.Lookup(end.Topic, end.Partition)
		if ok && start.Offset < end.Offset {
			parts[end.Partition] = kgo.NewOffset().At(start.Offset)
			left[end.Partition] = end.Offset - 1
		}
	})
	if len(left) == 0 {
		return nil
	}
	c, err := kgo.NewClient(kgo.SeedBrokers(k.o.Kafka...), kgo.FetchMaxWait(100*time.Millisecond),
		kgo.ConsumePartitions(map[string]map[int32]kgo.Offset{k.o.UpstreamTopic: parts}))
	if err != nil {
		return fmt.Errorf("kafka client: %w", err)
	}
	defer c.Close()
	for len(left) > 0 {
		idle, cancel := context.WithTimeout(ctx, 30*time.Second)
		fetches := c.PollFetches(idle)
		cancel()
		if err := errors.Join(ctx.Err(), fetches.Err0()); err != nil {
			return fmt.Errorf("read topic %s back: %w", k.o.UpstreamTopic, err)
		}
		fetches.EachRecord(func(rec *kgo.Record) {
			f(rec)
			if last, ok := left[rec.Partition]; ok && rec.Offset >= last {
				delete(left, rec.Partition)
			}
		})
	}
	return nil
}

// verifyUpstream reads back what the stage stored and holds it against the ledger. The loop must
// be idle.
func (k *kafka) verifyUpstream(ctx context.Context, r *run) (counts, error) {
	var stored int64
	last := make([]int64, len(r.users))
	for i := range last {
		last[i] = -1
	}
	err := k.readUpstream(ctx, func(rec *kgo.Record) {
		var id string
		for _, h := range rec.Headers {
			if h.Key == "client_msg_id" {
				id = string(h.Value)
			}
		}
		n, ok := r.l.number(id)
		if !ok {
			return // of somebody else
		}
		stored++
		e := r.l.get(n)
		if e == nil {
			r.b.add(storesOwn, "record %d/%d is message %q, which was not sent in this stage", rec.Partition, rec.Offset, id)
			return
		}
		if string(rec.Key) != r.users[e.user].name {
			r.b.add(storesOwn, "record %d/%d of %s is stored under key %q", rec.Partition, rec.Offset, r.users[e.user].name, rec.Key)
		}
		if e.count++; e.count > 1 {
			r.b.add(storesAcked, "%s is stored %d times, again at %d/%d", id, e.count, rec.Partition, rec.Offset)
		}
		if e.state == refused {
			r.b.add(storesNoRefused, "%s was refused and is stored at %d/%d", id, rec.Partition, rec.Offset)
		}
		if e.state == settled && (e.partition >= 0 && int32(e.partition) != rec.Partition || e.offset >= 0 && e.offset != rec.Offset) {
			r.b.add(storesAcked, "%s was acked at %d/%d and is stored at %d/%d", id, e.partition, e.offset, rec.Partition, rec.Offset)
		}
		if n < last[e.user] {
			r.b.add(storesInOrder, "%s of user %s is stored behind number %d", id, r.users[e.user].name, last[e.user])
		}
		last[e.user] = max(last[e.user], n)
	})
	if err != nil {
		return nil, err
	}
	r.l.each(func(n int64, e *entry) {
		if e.state == settled && e.count == 0 {
			r.b.add(storesAcked, "%s-%d of user %s was acked and is not stored", r.l.run, n, r.users[e.user].name)
		}
	})
	return counts{{Name: "read back from Kafka", N: stored}}, nil
}
