// Command sarama is a bare producer and consumer on one topic of its own: the floor for the time
// from Kafka to a client. It sends at -rate for -seconds whatever comes back, and prints
// "listening on TOPIC" and then one JSON object with the time from the scheduled send to the receipt, in microseconds.
package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/IBM/sarama"

	"im-gateway/bench/peers/internal/peer"
)

func main() { peer.Main(run) }

type options struct {
	brokers       []string
	rate, size    int
	seconds       int
	partitions    int
	flush         time.Duration
	flushMessages int
	fetchMin      int
	fetchWait     time.Duration
}

type result struct {
	Rate     int   `json:"rate_per_second"`
	Sent     int64 `json:"sent"`
	Received int64 `json:"received"`
	Failed   int64 `json:"failed"`
	P50      int64 `json:"p50_us"`
	P99      int64 `json:"p99_us"`
	Max      int64 `json:"max_us"`
}

func run(ctx context.Context) error {
	var o options
	kafka := flag.String("kafka", "127.0.0.1:9092", "brokers, separated by commas")
	flag.IntVar(&o.rate, "rate", 500, "records per second")
	flag.IntVar(&o.seconds, "seconds", 10, "measured time, after 2 s that are not")
	flag.IntVar(&o.size, "size", 250, "bytes of a record, at least 8")
	flag.IntVar(&o.partitions, "partitions", 4, "partitions of the topic")
	flag.DurationVar(&o.flush, "flush", 5*time.Millisecond, "the producer's flush interval")
	flag.IntVar(&o.flushMessages, "flush-messages", 200, "records that flush at once; 0: no such number")
	flag.IntVar(&o.fetchMin, "fetch-min-bytes", 1, "least bytes in a fetch, unless the wait is over")
	flag.DurationVar(&o.fetchWait, "fetch-max-wait", 250*time.Millisecond, "how long the broker holds back a fetch that has less")
	flag.Parse()
	o.brokers, o.size = strings.Split(*kafka, ","), max(8, o.size)
	if o.rate < 1 || o.seconds < 1 {
		return errors.New("sarama: -rate and -seconds are 1 or more")
	}
	res, err := measure(ctx, o)
	if err != nil {
		return fmt.Errorf("sarama: %w", err)
	}
	return json.NewEncoder(os.Stdout).Encode(res)
}

func (o *options) config() *sarama.Config {
	c := sarama.NewConfig()
	c.Version = sarama.V4_0_0_0
	c.ClientID = "sarama-floor"
	c.Net.MaxOpenRequests = 1
	c.Producer.Idempotent = true
	c.Producer.RequiredAcks = sarama.WaitForAll
	c.Producer.Flush.Frequency = o.flush
	c.Producer.Flush.Messages = o.flushMessages
	c.Producer.Return.Successes, c.Producer.Return.Errors = true, true
	c.Consumer.Fetch.Min = int32(o.fetchMin)
	c.Consumer.MaxWaitTime = o.fetchWait
	return c
}

func measure(ctx context.Context, o options) (res result, err error) {
	cfg := o.config()
	topic := "sarama-floor-" + strconv.FormatInt(time.Now().UnixNano(), 36)
	admin, err := sarama.NewClusterAdmin(o.brokers, cfg)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, admin.DeleteTopic(topic), admin.Close()) }()
	if err := admin.CreateTopic(topic, &sarama.TopicDetail{NumPartitions: int32(o.partitions), ReplicationFactor: -1}, false); err != nil {
		return res, err
	}
	hist := hdrhistogram.New(1, 60_000_000, 3)
	var mu sync.Mutex
	var measured time.Time // set before the first record is sent
	var received atomic.Int64
	stop, err := consume(o, cfg, topic, func(due time.Time) {
		received.Add(1)
		late := time.Since(due)
		mu.Lock()
		defer mu.Unlock()
		if !due.Before(measured) {
			_ = hist.RecordValue(max(1, late.Microseconds())) // above a minute: not counted
		}
	})
	if err != nil {
		return res, err
	}
	defer stop()
	peer.Ready(topic)
	start := time.Now().Add(100 * time.Millisecond)
	mu.Lock()
	measured = start.Add(2 * time.Second)
	mu.Unlock()
	sent, failed, err := produce(ctx, o, cfg, topic, start)
	if err != nil {
		return res, err
	}
	for end := time.Now().Add(5 * time.Second); received.Load() < sent-failed && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	mu.Lock()
	defer mu.Unlock()
	return result{
		Rate: o.rate, Sent: sent, Received: received.Load(), Failed: failed,
		P50: hist.ValueAtQuantile(50), P99: hist.ValueAtQuantile(99), Max: hist.Max(),
	}, nil
}

// consume calls got, from several goroutines, with the time at which a record was due to be sent.
func consume(o options, cfg *sarama.Config, topic string, got func(due time.Time)) (stop func(), err error) {
	consumer, err := sarama.NewConsumer(o.brokers, cfg)
	if err != nil {
		return nil, err
	}
	var parts []sarama.PartitionConsumer
	var wg sync.WaitGroup
	stop = func() {
		for _, pc := range parts {
			pc.AsyncClose()
		}
		wg.Wait()
		_ = consumer.Close()
	}
	for p := range o.partitions {
		pc, err := consumer.ConsumePartition(topic, int32(p), sarama.OffsetOldest)
		for range 100 { // the topic is new: its leaders are being chosen
			if !errors.Is(err, sarama.ErrNotLeaderForPartition) && !errors.Is(err, sarama.ErrLeaderNotAvailable) &&
				!errors.Is(err, sarama.ErrUnknownTopicOrPartition) {
				break
			}
			time.Sleep(50 * time.Millisecond)
			pc, err = consumer.ConsumePartition(topic, int32(p), sarama.OffsetOldest)
		}
		if err != nil {
			stop()
			return nil, err
		}
		parts = append(parts, pc)
		wg.Go(func() {
			for m := range pc.Messages() {
				got(time.Unix(0, int64(binary.BigEndian.Uint64(m.Value))))
			}
		})
	}
	return stop, nil
}

// produce keeps the schedule: record n is due at start + n/rate.
func produce(ctx context.Context, o options, cfg *sarama.Config, topic string, start time.Time) (sent, failed int64, err error) {
	producer, err := sarama.NewAsyncProducer(o.brokers, cfg)
	if err != nil {
		return 0, 0, err
	}
	var failures atomic.Int64
	var wg sync.WaitGroup
	wg.Go(func() {
		for range producer.Successes() {
		}
	})
	wg.Go(func() {
		for range producer.Errors() {
			failures.Add(1)
		}
	})
	total := int64(o.rate) * int64(o.seconds+2)
	for ; sent < total && ctx.Err() == nil; sent++ {
		due := start.Add(time.Duration(sent * int64(time.Second) / int64(o.rate)))
		if wait := time.Until(due); wait > 0 {
			time.Sleep(wait)
		}
		value := make([]byte, o.size)
		binary.BigEndian.PutUint64(value, uint64(due.UnixNano()))
		producer.Input() <- &sarama.ProducerMessage{
			Topic: topic, Key: sarama.StringEncoder("u" + strconv.FormatInt(sent%997, 10)), Value: sarama.ByteEncoder(value),
		}
	}
	producer.AsyncClose()
	wg.Wait()
	return sent, failures.Load(), nil
}
