package logic

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/redis/rueidis"
	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kgo"
)

const (
	// lookupChunk is how many users are looked up in one pipeline.
	lookupChunk = 500
	// lookupTimeout bounds one attempt; attempts go on as long as Redis is away.
	lookupTimeout = 3 * time.Second
)

// deliverer finds users and produces to their gateways' topics. The consumer's goroutine owns it.
type deliverer struct {
	redis  rueidis.Client
	kafka  *kgo.Client
	prefix string
	counts *counts
	logger zerolog.Logger
}

// counts are written by the consumer's goroutine and Kafka's callbacks, and read by Stats.
type counts struct {
	consumed, malformed, produced, failed, offline atomic.Int64
}

// send hands all deliveries to the producer. It returns an error only when ctx ends: while Redis is
// away it waits, and Kafka keeps what clients send meanwhile.
func (d *deliverer) send(ctx context.Context, batch []delivery) error {
	where, err := d.find(ctx, batch)
	if err != nil {
		return err
	}
	for i := range batch {
		b := &batch[i]
		if b.gateway != "" {
			d.produce(ctx, b, b.gateway, b.users)
			continue
		}
		// One record per gateway, for all of its users.
		byGateway := make(map[string][]string, 1)
		for _, u := range b.users {
			if g := where[u]; g != "" {
				byGateway[g] = append(byGateway[g], u)
			} else {
				d.counts.offline.Add(1) // they get it by sync
			}
		}
		for gateway, users := range byGateway {
			d.produce(ctx, b, gateway, users)
		}
	}
	return nil
}

// find returns the gateways of those users of a batch that are connected.
func (d *deliverer) find(ctx context.Context, batch []delivery) (map[string]string, error) {
	where := make(map[string]string)
	var users []string
	for i := range batch {
		if batch[i].gateway != "" {
			continue
		}
		for _, u := range batch[i].users {
			if _, asked := where[u]; !asked {
				where[u] = ""
				users = append(users, u)
			}
		}
	}
	for len(users) > 0 {
		chunk := users[:min(len(users), lookupChunk)]
		users = users[len(chunk):]
		err := retry(ctx, d.logger, "look users up in Redis", func(ctx context.Context) error {
			return d.lookup(ctx, chunk, where)
		})
		if err != nil {
			return nil, err
		}
	}
	return where, nil
}

func (d *deliverer) lookup(ctx context.Context, users []string, where map[string]string) error {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	commands := make(rueidis.Commands, len(users))
	for i, u := range users {
		commands[i] = d.redis.B().Hget().Key("user_session:" + u).Field("gateway_id").Build()
	}
	for i, result := range d.redis.DoMulti(ctx, commands...) {
		gateway, err := result.ToString()
		if err != nil && !rueidis.IsRedisNil(err) {
			return fmt.Errorf("HGET user_session: %w", err)
		}
		where[users[i]] = gateway
	}
	return nil
}

func (d *deliverer) produce(ctx context.Context, b *delivery, gateway string, users []string) {
	record := downstream{
		Type: b.kind, MessageID: b.id, TraceID: b.trace, Data: b.data, Timestamp: b.now,
	}
	if len(users) == 1 {
		record.TargetUserID = users[0]
	} else {
		record.TargetUserIDs = users
	}
	// Keyed by the (first) user, so that what one user gets stays in order.
	out := &kgo.Record{Topic: d.prefix + gateway, Key: []byte(users[0]), Value: encode(record)}
	d.kafka.Produce(context.WithoutCancel(ctx), out, func(r *kgo.Record, err error) {
		switch {
		case err == nil:
			d.counts.produced.Add(1)
		case errors.Is(err, kgo.ErrClientClosed): // stopping: it is consumed again
		default:
			d.counts.failed.Add(1) // the gateway's topic is gone: its users get it by sync
			d.logger.Warn().Err(err).Str("topic", r.Topic).Msg("a record could not be produced")
		}
	})
}
