package traffic

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/rueidis"
	"github.com/twmb/franz-go/pkg/kgo"
)

const (
	lookupEvery    = 200 * time.Millisecond // a user's gateway is asked for at most so often
	lookupTimeout  = time.Second
	produceTimeout = 10 * time.Second // of one attempt
	produceRetry   = 200 * time.Millisecond
)

// SenderOptions describe the downstream side.
type SenderOptions struct {
	Brokers []string
	Redis   string
	// Prefix and the gateway's id make the topic.
	Prefix string
	Users  []string
	// Every is the time between two records for one user.
	Every time.Duration
}

// Sender writes numbered records for each user to the topic of the user's gateway, one after the
// other: the next one once Kafka has the one before.
type Sender struct {
	o     SenderOptions
	log   *Log
	kafka *kgo.Client
	redis rueidis.Client

	stop   chan struct{} // closed by StopSending
	wg     sync.WaitGroup
	failed atomic.Int64 // attempts

	mu      sync.Mutex
	stopped bool
	busy    int // records begun and not stored
}

type downRecord struct {
	Target    string   `json:"target_user_id"`
	MessageID string   `json:"message_id"`
	Data      downData `json:"data"`
}

type downData struct {
	Seq int64 `json:"seq"`
}

// NewSender connects to Kafka and Redis directly. Close it.
func NewSender(o SenderOptions, log *Log) (*Sender, error) {
	k, err := kgo.NewClient(
		kgo.SeedBrokers(o.Brokers...),
		kgo.RequiredAcks(kgo.AllISRAcks()),
		kgo.RecordDeliveryTimeout(produceTimeout),
		kgo.ProducerLinger(5*time.Millisecond),
		kgo.MetadataMinAge(200*time.Millisecond), // gateways come and go with their topics
		kgo.UnknownTopicRetries(2),
		kgo.RecordDeliveryTimeout(10*time.Second),
	)
	if err != nil {
		return nil, fmt.Errorf("sender: kafka: %w", err)
	}
	r, err := rueidis.NewClient(rueidis.ClientOption{
		InitAddress: []string{o.Redis}, DisableCache: true, ForceSingleClient: true, DisableRetry: true,
	})
	if err != nil {
		k.Close()
		return nil, fmt.Errorf("sender: redis: %w", err)
	}
	return &Sender{o: o, log: log, kafka: k, redis: r, stop: make(chan struct{})}, nil
}

// Start begins to send for every user; a user's records wait until Redis has named a gateway once.
func (s *Sender) Start(ctx context.Context) {
	for _, u := range s.o.Users {
		s.wg.Go(func() { s.user(ctx, u) })
	}
}

// StopSending begins no further records; one that was begun is still stored.
func (s *Sender) StopSending() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.stopped {
		s.stopped = true
		close(s.stop)
	}
}

// begin counts a record as begun, unless sending is over: after StopSending, Busy only falls.
func (s *Sender) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return false
	}
	s.busy++
	return true
}

func (s *Sender) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy--
}

// Busy is how many records were begun and are not stored yet.
func (s *Sender) Busy() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.busy
}

// FailedAttempts counts produces that failed and were repeated.
func (s *Sender) FailedAttempts() int64 { return s.failed.Load() }

// Close waits for the users' goroutines, which end with Start's ctx or after StopSending.
func (s *Sender) Close() {
	s.StopSending()
	s.wg.Wait()
	s.kafka.Close()
	s.redis.Close()
}

func (s *Sender) user(ctx context.Context, user string) {
	route := route{s: s, user: user}
	sleep(ctx, rand.N(s.o.Every+1)) // users are spread over the interval
	for seq := int64(1); ; seq++ {
		for route.gateway(ctx) == "" {
			if !s.pause(ctx, lookupEvery) {
				return
			}
		}
		if !s.begin() {
			return
		}
		stored := s.store(ctx, &route, seq)
		s.end()
		if !stored || !s.pause(ctx, s.o.Every) {
			return
		}
	}
}

// pause returns false when sending is over.
func (s *Sender) pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-s.stop:
		return false
	case <-t.C:
		return true
	}
}

// store writes one record until Kafka has it; false when ctx ended first.
func (s *Sender) store(ctx context.Context, r *route, seq int64) bool {
	id := fmt.Sprintf("d-%s-%d", r.user, seq)
	value, err := json.Marshal(downRecord{r.user, id, downData{seq}})
	if err != nil {
		panic(err) // strings and numbers only
	}
	for ctx.Err() == nil {
		rec := &kgo.Record{Topic: s.o.Prefix + r.gateway(ctx), Key: []byte(r.user), Value: value}
		if err := s.kafka.ProduceSync(ctx, rec).FirstErr(); err != nil {
			s.failed.Add(1)
			s.kafka.PurgeTopicsFromProducing(rec.Topic) // it may be another topic by now
			sleep(ctx, produceRetry)
			continue
		}
		s.log.addProduced(Produced{User: r.user, Seq: seq, MessageID: id, Topic: rec.Topic, Partition: rec.Partition, Offset: rec.Offset, At: time.Now()})
		return true
	}
	return false
}

// route is where one user's records go; used by one goroutine.
type route struct {
	s     *Sender
	user  string
	last  string
	asked time.Time
}

// gateway asks Redis unless it did lately; without an answer it is the last one known.
func (r *route) gateway(ctx context.Context) string {
	if now := time.Now(); now.Sub(r.asked) >= lookupEvery {
		r.asked = now
		ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
		defer cancel()
		c := r.s.redis
		if g, err := c.Do(ctx, c.B().Hget().Key("user_session:"+r.user).Field("gateway_id").Build()).ToString(); err == nil && g != "" {
			r.last = g
		}
	}
	return r.last
}
