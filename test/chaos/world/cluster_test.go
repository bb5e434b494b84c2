//go:build chaos

package world

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// partitions asks one broker, by a client of its own, who is in the cluster and leads a topic.
func partitions(ctx context.Context, broker, topic string) (brokers int, leaders []int32, inSync []int, err error) {
	c, err := kgo.NewClient(kgo.SeedBrokers(broker))
	if err != nil {
		return 0, nil, nil, err
	}
	defer c.Close()
	req := kmsg.NewPtrMetadataRequest()
	rt := kmsg.NewMetadataRequestTopic()
	rt.Topic = &topic
	req.Topics = append(req.Topics, rt)
	resp, err := req.RequestWith(ctx, c)
	if err != nil {
		return 0, nil, nil, err
	}
	leaders = make([]int32, len(resp.Topics[0].Partitions))
	inSync = make([]int, len(leaders))
	for _, p := range resp.Topics[0].Partitions {
		leaders[p.Partition], inSync[p.Partition] = p.Leader, len(p.ISR)
	}
	return len(resp.Brokers), leaders, inSync, nil
}

// TestCluster breaks a cluster of three, whose first broker has a small disk. It needs root to mount it.
func TestCluster(t *testing.T) {
	w := start(t, Options{Brokers: 3, DiskMB: 192})
	k := w.Kafka
	whole := func(t *testing.T) {
		t.Helper()
		for _, b := range k.Brokers() {
			n, _, inSync, err := partitions(t.Context(), b, UpstreamTopic)
			if err != nil || n != 3 || slices.Min(inSync) != 3 {
				t.Errorf("seen from %s: %d brokers, %v replicas in sync, %v", b, n, inSync, err)
			}
		}
	}
	stores := func(t *testing.T) {
		t.Helper()
		eventually(t, "store", func(ctx context.Context) error { return store(ctx, k.Brokers()...) })
	}
	whole(t)
	stores(t)
	t.Run("move leaders", func(t *testing.T) {
		for range 4 { // more than there are brokers
			_, was, _, err := partitions(t.Context(), k.Brokers()[0], UpstreamTopic)
			must(t, err)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			before, after, err := k.MoveLeaders(ctx, UpstreamTopic)
			must(t, err)
			if !slices.Equal(before, was) {
				t.Errorf("it says that the leaders were %v, they were %v", before, was)
			}
			_, is, _, err := partitions(t.Context(), k.Brokers()[0], UpstreamTopic)
			must(t, err)
			for p := range is {
				if is[p] == was[p] {
					t.Errorf("leaders %v became %v: %d did not move", was, is, p)
				}
			}
			if !slices.Equal(after, is) {
				t.Errorf("it says that the leaders are %v, they are %v", after, is)
			}
		}
		stores(t)
	})
	t.Run("one frozen", func(t *testing.T) {
		must(t, k.Broker(1).Stop())
		eventually(t, "two brokers", func(ctx context.Context) error {
			n, leaders, _, err := partitions(ctx, k.Brokers()[0], UpstreamTopic)
			if err == nil && (n != 2 || slices.Contains(leaders, 2)) {
				err = fmt.Errorf("%d brokers, leaders %v", n, leaders)
			}
			return err
		})
		stores(t)
		must(t, k.Broker(1).Cont())
		must(t, k.StartAll(t.Context()))
		whole(t)
	})
	t.Run("one killed", func(t *testing.T) {
		k.Broker(1).Kill()
		must(t, k.StartAll(t.Context())) // at once, while clients may still believe that nothing happened
		whole(t)
		k.Broker(1).Kill()
		stores(t)
		must(t, k.StartAll(t.Context()))
		whole(t)
	})
	t.Run("two killed", func(t *testing.T) {
		k.Broker(1).Kill()
		k.Broker(2).Kill()
		storeFails(t, k.Brokers()...)
		must(t, k.StartAll(t.Context()))
		whole(t)
		stores(t)
	})
	t.Run("full disk", func(t *testing.T) {
		must(t, k.FillDisk())
		f, err := os.Create(k.disk + "/probe")
		if err == nil {
			_, err = f.Write(make([]byte, 64<<10))
			err = errors.Join(err, f.Close())
		}
		if err == nil {
			t.Error("there is room on the full disk")
		}
		b := k.Broker(0)
		eventually(t, "the broker notices", func(ctx context.Context) error {
			// Segments are made in advance: it takes some records until the broker needs the disk.
			c, err := kgo.NewClient(kgo.SeedBrokers(k.Brokers()...), kgo.ProducerBatchCompression(kgo.NoCompression()))
			if err != nil {
				return err
			}
			defer c.Close()
			for range 64 {
				c.Produce(ctx, &kgo.Record{Topic: UpstreamTopic, Value: make([]byte, 32<<10)}, nil)
			}
			time.Sleep(silence)
			log, err := os.ReadFile(b.Log())
			if err == nil && !strings.Contains(string(log), "No space left on device") {
				err = errors.New("the broker's log says nothing of the disk")
			}
			return err
		})
		eventually(t, "its end", func(context.Context) error {
			if b.Alive() {
				return errors.New("it runs, all its log directories offline")
			}
			return nil
		})
		stores(t) // the other two do
		must(t, k.FreeDisk())
		must(t, k.StartAll(t.Context()))
		whole(t)
	})
	t.Run("all killed", func(t *testing.T) {
		for i := range k.N() {
			k.Broker(i).Kill()
		}
		began := time.Now()
		must(t, k.StartAll(t.Context()))
		t.Logf("all three were back after %s", time.Since(began).Round(time.Millisecond))
		whole(t)
		stores(t)
	})
}
