package logic

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/redis/rueidis"
	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kgo"
)

const (
	// pollRecords bounds a batch; fetchBytes what is fetched ahead of it.
	pollRecords = 500
	fetchBytes  = 8 << 20
	// produceRecords and produceBytes bound what waits for Kafka; beyond it consuming waits.
	produceRecords = 10_000
	produceBytes   = 64 << 20

	// headerTraceParent carries the W3C trace context of a record.
	headerTraceParent = "traceparent"

	sessionTimeout = 10 * time.Second
	// commitTimeout bounds one commit. Without it what was consumed is consumed again after a
	// restart, and recognised.
	commitTimeout = 10 * time.Second
	// stopTimeout bounds the last flush and commit, and leaving the group.
	stopTimeout = 3 * time.Second
)

// consume handles the upstream topic until ctx ends: read, handle, produce, flush, commit.
func (s *Service) consume(ctx context.Context) error {
	redis, err := s.dialRedis(ctx)
	if err != nil {
		return err
	}
	defer redis.Close()
	kafka, err := kgo.NewClient(append([]kgo.Opt{
		kgo.ClientID(s.o.ServiceName),
		kgo.ConsumerGroup(s.o.ServiceName),
		kgo.ConsumeTopics(s.o.UpstreamTopic),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.DisableAutoCommit(),
		kgo.SessionTimeout(sessionTimeout),
		kgo.HeartbeatInterval(sessionTimeout / 4),
		kgo.FetchMaxBytes(fetchBytes),
		kgo.FetchMaxWait(time.Second), // also the longest wait for a new partition to be noticed
		kgo.MaxConcurrentFetches(1),
		kgo.MaxBufferedRecords(produceRecords),
		kgo.MaxBufferedBytes(produceBytes),
		// A topic may be new; one that stays unknown is a gateway's that is gone for good.
		kgo.UnknownTopicRetries(4),
		kgo.MetadataMinAge(250 * time.Millisecond),
		kgo.MetadataMaxAge(30 * time.Second),
		kgo.WithLogger(kafkaLogger{s.logger.Sample(&zerolog.BurstSampler{Burst: 5, Period: 10 * time.Second})}),
	}, s.o.Kafka...)...)
	if err != nil {
		return fmt.Errorf("create the Kafka client of im-logic: %w", err)
	}
	defer kafka.Close()

	d := &deliverer{
		redis: redis, kafka: kafka, prefix: s.o.DownstreamTopicPrefix, counts: &s.counts, logger: s.logger,
	}
	for {
		fetches := kafka.PollRecords(ctx, pollRecords)
		if ctx.Err() != nil {
			break
		}
		fetches.EachError(func(topic string, partition int32, err error) {
			s.logger.Warn().Err(err).Str("topic", topic).Int32("partition", partition).Msg("fetch failed")
		})
		var batch []delivery
		now := s.o.Now().UnixMilli()
		fetches.EachRecord(func(r *kgo.Record) {
			s.counts.consumed.Add(1)
			var in upstream
			if err := json.Unmarshal(r.Value, &in); err != nil || in.UserID == "" || in.MessageID == "" {
				s.counts.malformed.Add(1)
				s.logger.Warn().Int32("partition", r.Partition).Int64("offset", r.Offset).
					Msg("an upstream record is malformed and was passed over")
				return
			}
			for _, h := range r.Headers {
				if h.Key == headerTraceParent {
					in.traceParent = string(h.Value)
				}
			}
			batch = append(batch, s.chat.handle(&in, now)...)
		})
		if err := d.send(ctx, batch); err != nil {
			break
		}
		if err := kafka.Flush(ctx); err != nil {
			break
		}
		s.commit(ctx, kafka)
	}
	s.leave(kafka)
	return nil
}

func (s *Service) commit(ctx context.Context, kafka *kgo.Client) {
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	if err := kafka.CommitUncommittedOffsets(ctx); err != nil {
		s.logger.Warn().Err(err).Msg("offsets could not be committed")
	}
}

// leave lets the next process take over at once rather than after sessionTimeout.
func (s *Service) leave(kafka *kgo.Client) {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	if err := kafka.LeaveGroupContext(ctx); err != nil {
		s.logger.Debug().Err(err).Msg("the consumer group could not be left")
	}
}

// dialRedis waits for Redis as long as it takes.
func (s *Service) dialRedis(ctx context.Context) (rueidis.Client, error) {
	o := s.o.Redis
	o.DisableCache = true // nothing here is cached, and not every server can
	var client rueidis.Client
	err := retry(ctx, s.logger, "connect to Redis", func(context.Context) (err error) {
		client, err = rueidis.NewClient(o)
		return err
	})
	return client, err
}

// kafkaLogger shows what the Kafka client has to say of failures.
type kafkaLogger struct{ logger zerolog.Logger }

// Level implements kgo.Logger.
func (kafkaLogger) Level() kgo.LogLevel { return kgo.LogLevelWarn }

// Log implements kgo.Logger.
func (l kafkaLogger) Log(level kgo.LogLevel, message string, pairs ...any) {
	e := l.logger.Debug()
	if level == kgo.LogLevelError {
		e = l.logger.Warn()
	}
	e.Fields(pairs).Msg("Kafka: " + message)
}
