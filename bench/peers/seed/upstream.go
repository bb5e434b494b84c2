package main

import (
	"context"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/segmentio/kafka-go"
	"go.uber.org/zap"
)

// upstream hands the clients' messages to kafka-go's asynchronous writer and answers when Kafka has.
type upstream struct {
	w        *kafka.Writer
	gateway  string
	limit    int64
	inflight atomic.Int64
	stats    *stats
}

// pending is one message on its way. It is the pool's again once Kafka has it.
type pending struct {
	client  *client
	name    string
	key     []byte
	value   []byte
	headers [3]kafka.Header
}

var pendings = sync.Pool{New: func() any { return new(pending) }}

func newUpstream(c config, st *stats, log *zap.Logger) *upstream {
	u := &upstream{gateway: c.GatewayID, limit: int64(c.Inflight), stats: st}
	u.w = &kafka.Writer{
		Addr: kafka.TCP(c.Kafka...), Topic: c.Upstream,
		Balancer: kafka.Murmur2Balancer{}, RequiredAcks: kafka.RequireAll,
		Async: true, Completion: u.completed,
		BatchSize: c.BatchSize, BatchTimeout: c.BatchTimeout,
		MaxAttempts: 5, WriteTimeout: 5 * time.Second,
		Transport: &kafka.Transport{ClientID: c.GatewayID, IdleTimeout: time.Minute, MetadataTTL: time.Minute},
		ErrorLogger: kafka.LoggerFunc(func(f string, args ...any) {
			log.Sugar().Warnf("kafka writer: "+f, args...)
		}),
	}
	return u
}

func (u *upstream) publish(c *client, e *envelope) {
	if u.inflight.Add(1) > u.limit {
		u.inflight.Add(-1)
		u.stats.refused.Add(1)
		c.ack(e.MessageID, "", 0, 0, "OVERLOADED")
		return
	}
	p := pendings.Get().(*pending)
	p.client, p.name = c, e.MessageID
	p.key = append(p.key[:0], c.user...)
	p.value = u.appendRecord(p.value[:0], c, e)
	p.headers = [3]kafka.Header{
		{Key: "type", Value: []byte(e.Type)},
		{Key: "gateway_id", Value: []byte(u.gateway)},
		{Key: "client_msg_id", Value: []byte(e.MessageID)},
	}
	if err := u.w.WriteMessages(context.Background(), kafka.Message{Key: p.key, Value: p.value, Headers: p.headers[:], WriterData: p}); err != nil {
		u.settle(p, 0, 0, err) // not taken over
	}
}

func (u *upstream) appendRecord(b []byte, c *client, e *envelope) []byte {
	id := ulid.Make()
	b = append(b, `{"message_id":"`...)
	b = append(b, id.String()...)
	b = append(b, `","user_id":`...)
	b = appendString(b, c.user)
	b = append(b, `,"gateway_id":`...)
	b = appendString(b, u.gateway)
	b = append(b, `,"session_id":`...)
	b = appendString(b, c.session)
	b = append(b, `,"type":`...)
	b = appendString(b, e.Type)
	if e.MessageID != "" {
		b = append(b, `,"client_msg_id":`...)
		b = appendString(b, e.MessageID)
	}
	b = append(b, `,"data":`...)
	if len(e.Data) == 0 {
		b = append(b, "null"...)
	}
	b = append(b, e.Data...)
	b = append(b, `,"timestamp":`...)
	b = strconv.AppendInt(b, time.Now().UnixMilli(), 10)
	if e.Timestamp != 0 {
		b = append(b, `,"client_timestamp":`...)
		b = strconv.AppendInt(b, e.Timestamp, 10)
	}
	return append(b, '}')
}

// completed is called by a partition's goroutine of kafka-go with a whole batch.
func (u *upstream) completed(msgs []kafka.Message, err error) {
	for i := range msgs {
		p, ok := msgs[i].WriterData.(*pending)
		if !ok {
			continue
		}
		u.settle(p, msgs[i].Partition, msgs[i].Offset, err)
	}
}

func (u *upstream) settle(p *pending, partition int, offset int64, err error) {
	u.inflight.Add(-1)
	if err != nil {
		u.stats.refused.Add(1)
		p.client.ack(p.name, "", 0, 0, "BROKER_UNAVAILABLE")
	} else {
		u.stats.acked.Add(1)
		p.client.ack(p.name, u.w.Topic, partition, offset, "")
	}
	if err == nil { // after an error kafka-go may still be reading the record
		p.client, p.name = nil, ""
		pendings.Put(p)
	}
}
