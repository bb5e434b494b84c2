package logic

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
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
			d.produce(ctx, b, b.gateway, b.users, false)
			continue
		}
		// One record per gateway, for all of its users. Those with sessions on several gateways are
		// written to each of these, which must not forward to the others again.
		byGateway := make(map[place][]string, 1)
		for _, u := range b.users {
			gateways := where[u]
			for _, g := range gateways {
				at := place{g, len(gateways) > 1}
				byGateway[at] = append(byGateway[at], u)
			}
			if len(gateways) == 0 {
				d.counts.offline.Add(1) // they get it by sync
			}
		}
		for at, users := range byGateway {
			d.produce(ctx, b, at.gateway, users, at.shared)
		}
	}
	return nil
}

// place is where records go: a gateway, and whether the users have sessions on others too.
type place struct {
	gateway string
	shared  bool
}

// find returns the gateways of those users of a batch that are connected.
func (d *deliverer) find(ctx context.Context, batch []delivery) (map[string][]string, error) {
	where := make(map[string][]string)
	var users []string
	for i := range batch {
		if batch[i].gateway != "" {
			continue
		}
		for _, u := range batch[i].users {
			if _, asked := where[u]; !asked {
				where[u] = nil
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

func (d *deliverer) lookup(ctx context.Context, users []string, where map[string][]string) error {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	commands := make(rueidis.Commands, len(users))
	for i, u := range users {
		commands[i] = d.redis.B().Hgetall().Key("user_session:" + u).Build()
	}
	for i, result := range d.redis.DoMulti(ctx, commands...) {
		session, err := result.AsStrMap()
		if err != nil {
			return fmt.Errorf("HGETALL user_session: %w", err)
		}
		where[users[i]] = gatewaysOf(session, time.Now().UnixMilli())
	}
	return nil
}

// gatewaysOf reads a presence entry: gateway_id names the newest session's gateway; where users may have
// several sessions, each has a field s:SESSION of gateway|version|expires_ms|... besides.
func gatewaysOf(session map[string]string, nowMS int64) (gateways []string) {
	if g := session["gateway_id"]; g != "" {
		gateways = append(gateways, g)
	}
	for name, value := range session {
		if !strings.HasPrefix(name, "s:") {
			continue
		}
		parts := strings.SplitN(value, "|", 4)
		if len(parts) < 4 || slices.Contains(gateways, parts[0]) {
			continue
		}
		if expires, err := strconv.ParseInt(parts[2], 10, 64); err == nil && expires > nowMS {
			gateways = append(gateways, parts[0])
		}
	}
	return gateways
}

func (d *deliverer) produce(ctx context.Context, b *delivery, gateway string, users []string, shared bool) {
	record := downstream{
		DeviceID: b.device, Type: b.kind, MessageID: b.id, TraceID: b.trace, Data: b.data, Timestamp: b.now,
	}
	if len(users) == 1 {
		record.TargetUserID = users[0]
	} else {
		record.TargetUserIDs = users
	}
	// Keyed by the (first) user, so that what one user gets stays in order.
	out := &kgo.Record{Topic: d.prefix + gateway, Key: []byte(users[0]), Value: encode(record)}
	if shared {
		out.Headers = append(out.Headers, kgo.RecordHeader{Key: "im-hop", Value: []byte("1")})
	}
	if b.parent != "" {
		out.Headers = append(out.Headers, kgo.RecordHeader{Key: headerTraceParent, Value: []byte(b.parent)})
	}
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
