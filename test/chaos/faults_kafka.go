package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"

	"im-gateway/test/chaos/judge"
	"im-gateway/test/chaos/world"
)

func noFault(ctx context.Context, r *row) error {
	r.hold(ctx, 5*time.Second)
	r.bite("nothing was done; %d acks in 5 s", r.acks(r.began, time.Now()))
	return nil
}

func brokerKilled(ctx context.Context, r *row) error {
	before, err := r.w.Kafka.Leaders(ctx, world.UpstreamTopic)
	if err != nil {
		return err
	}
	r.w.Kafka.Broker(1).Kill()
	gone := until(ctx, 20*time.Second, func() bool {
		l, err := r.w.Kafka.Admin.ListBrokers(ctx)
		return err == nil && len(l) == 2
	})
	r.hold(ctx, 15*time.Second)
	after, err := r.w.Kafka.Leaders(ctx, world.UpstreamTopic)
	if err != nil {
		return err
	}
	if gone {
		r.bite("the cluster counted 2 brokers; leaders %v became %v", before, after)
	}
	r.mend()
	return r.w.Kafka.StartAll(ctx)
}

func allBrokersStopped(ctx context.Context, r *row) error {
	var all sync.WaitGroup
	for i := range r.w.Kafka.N() {
		all.Go(r.w.Kafka.Broker(i).Kill)
	}
	all.Wait()
	down := time.Now()
	_, err := roundTrip(ctx, r.w.Kafka.Brokers()[0], kafkaVersions, time.Second)
	r.hold(ctx, 60*time.Second)
	if n := r.acks(down, time.Now()); err != nil && n == 0 {
		r.bite("no broker answered, no message was acknowledged for %s", time.Since(down).Round(time.Second))
	}
	r.mend()
	return r.w.Kafka.StartAll(ctx)
}

func leadersMoved(ctx context.Context, r *row) error {
	for _, topic := range []string{world.UpstreamTopic, world.DownstreamPrefix + "g1"} {
		moveCtx, cancel := context.WithTimeout(ctx, 40*time.Second)
		before, after, err := r.w.Kafka.MoveLeaders(moveCtx, topic)
		cancel()
		if err != nil {
			return err
		}
		r.bite("%s: leaders %v became %v", topic, before, after)
	}
	return nil
}

func kafkaSlow(ctx context.Context, r *row) error {
	if err := r.w.Kafka.Link.Latency(500 * time.Millisecond); err != nil {
		return err
	}
	took, err := roundTrip(ctx, r.w.Kafka.Link.Addr(), kafkaVersions, 10*time.Second)
	r.hold(ctx, 15*time.Second)
	if err == nil && took > 900*time.Millisecond {
		r.bite("a request through the proxy took %s", took.Round(10*time.Millisecond))
	}
	return nil
}

func kafkaBandwidth(ctx context.Context, r *row) error {
	before := r.acks(r.began.Add(-2*time.Second), r.began)
	if err := r.w.Kafka.Link.Bandwidth(4); err != nil {
		return err
	}
	began := time.Now()
	r.hold(ctx, 15*time.Second)
	took := time.Since(began).Seconds()
	if after := float64(r.acks(began, time.Now())) / took; after < float64(before)/2*0.7 {
		r.bite("%d acks per second became %.0f", before/2, after)
	}
	return nil
}

func kafkaReset(ctx context.Context, r *row) error {
	resets := 0
	for began := time.Now(); time.Since(began) < 10*time.Second && ctx.Err() == nil; {
		if err := r.w.Kafka.Link.ResetDownstream(); err != nil {
			return err
		}
		if _, err := roundTrip(ctx, r.w.Kafka.Link.Addr(), kafkaVersions, time.Second); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			resets++
		}
		if err := r.w.Kafka.Link.Restore(ctx); err != nil {
			return err
		}
		sleep(ctx, 700*time.Millisecond)
	}
	if resets > 3 {
		r.bite("%d connections through the proxies were reset at the answer", resets)
	}
	return nil
}

func topicDeleted(ctx context.Context, r *row) error {
	topic := world.DownstreamPrefix + "g2"
	ends, err := r.w.Kafka.Admin.ListEndOffsets(ctx, topic)
	if err != nil {
		return err
	}
	before, err := r.w.Kafka.Admin.ListTopics(ctx, topic)
	if err != nil {
		return err
	}
	resp, err := r.w.Kafka.Admin.DeleteTopics(ctx, topic)
	if err == nil {
		err = resp.Error()
	}
	if err != nil {
		return err
	}
	deleted := time.Now()
	// What was stored between the look at the offsets and the deletion is gone too.
	for p := range ends[topic] {
		r.deleted = append(r.deleted, judge.OffsetRange{Topic: topic, Partition: p, From: 0, To: 1 << 60, Before: deleted})
	}
	back := until(ctx, 60*time.Second, func() bool {
		after, err := r.w.Kafka.Admin.ListTopics(ctx, topic)
		return err == nil && after.Has(topic) && after[topic].ID != before[topic].ID && after[topic].ID != (kadm.TopicID{})
	})
	r.check(back, "the gateway has not made its topic again")
	if back {
		var n int64
		for _, o := range ends[topic] {
			n += o.Offset
		}
		r.bite("%s with %d records was deleted and is another topic now", topic, n)
	}
	return nil
}

func diskFull(ctx context.Context, r *row) error {
	if err := r.w.Kafka.FillDisk(); err != nil {
		return err
	}
	broker := r.w.Kafka.Broker(0)
	failed := until(ctx, 60*time.Second, func() bool {
		b, err := os.ReadFile(broker.Log())
		return err == nil && strings.Contains(string(b), "No space left on device")
	})
	r.hold(ctx, 20*time.Second)
	if failed {
		r.bite("the broker logged `No space left on device`; it runs: %v", broker.Alive())
	}
	if err := r.w.Kafka.FreeDisk(); err != nil {
		return err
	}
	r.mend()
	broker.Kill() // its log directory is offline for good
	return r.w.Kafka.StartAll(ctx)
}

func recordRefused(ctx context.Context, r *row) error {
	limit := "20000"
	for _, topic := range []string{world.UpstreamTopic, world.UndeliveredTopic} {
		if err := r.topicConfig(ctx, topic, &limit); err != nil {
			return err
		}
	}
	// Up: a message that the topic does not take, among others that it does.
	user := fmt.Sprint("large-", time.Now().UnixNano())
	status, text, _, err := publishBy(ctx, r.g(1), user, "big", 60_000)
	if err != nil {
		return err
	}
	r.check(status != 200, "a message of 60 kB was acknowledged: %s", text)
	// Down: a record for nobody whose undelivered record the topic does not take.
	if err := produce(ctx, r.w, "g1", user+"-nobody", user, 1, 60_000); err != nil {
		return err
	}
	ended := until(ctx, 30*time.Second, func() bool {
		found, err := undelivered(ctx, r.w, user)
		return err == nil && found["offline"] == 1
	})
	r.check(ended, "the record that was too large for the undelivered topic has no end")
	// And one of more than 1 MB, which its own topic takes and no other.
	huge := "3000000"
	if err := r.topicConfig(ctx, world.DownstreamPrefix+"g1", &huge); err != nil {
		return err
	}
	if err := produce(ctx, r.w, "g1", user+"-nobody", user+"-huge", 1, 1_500_000); err != nil {
		return err
	}
	ended = until(ctx, 30*time.Second, func() bool {
		found, err := undelivered(ctx, r.w, user+"-huge")
		return err == nil && found["offline"] == 1
	})
	r.check(ended, "the record of 1.5 MB has no end")
	if status == 413 || status == 503 {
		r.bite("a message of 60 kB was answered %d: %s; 60 kB and 1.5 MB for nobody are undelivered without their values", status, strings.TrimSpace(text))
	}
	var none *string
	for _, topic := range []string{world.UpstreamTopic, world.UndeliveredTopic, world.DownstreamPrefix + "g1"} {
		if err := r.topicConfig(ctx, topic, none); err != nil {
			return err
		}
	}
	return nil
}

func (r *row) topicConfig(ctx context.Context, topic string, maxBytes *string) error {
	change := kadm.AlterConfig{Op: kadm.SetConfig, Name: "max.message.bytes", Value: maxBytes}
	if maxBytes == nil {
		change.Op = kadm.DeleteConfig
	}
	resp, err := r.w.Kafka.Admin.AlterTopicConfigs(ctx, []kadm.AlterConfig{change}, topic)
	if err == nil {
		for _, t := range resp {
			err = errors.Join(err, t.Err)
		}
	}
	if err != nil {
		return fmt.Errorf("max.message.bytes of %s: %w", topic, err)
	}
	return nil
}
