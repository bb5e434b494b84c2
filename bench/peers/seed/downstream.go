package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"time"

	"github.com/goccy/go-json"
	"github.com/gorilla/websocket"
	"github.com/segmentio/kafka-go"
	"go.uber.org/zap"
)

// downstream pushes the records of this gateway's topic to their users.
type downstream struct {
	r     *kafka.Reader
	hub   *hub
	stats *stats
	log   *zap.Logger
}

type push struct {
	Target    string          `json:"target_user_id"`
	Targets   []string        `json:"target_user_ids"`
	Type      string          `json:"type"`
	MessageID string          `json:"message_id"`
	Data      json.RawMessage `json:"data"`
}

func newDownstream(c config, h *hub, st *stats, log *zap.Logger) *downstream {
	topic := c.Downstream + c.GatewayID
	return &downstream{hub: h, stats: st, log: log, r: kafka.NewReader(kafka.ReaderConfig{
		Brokers: c.Kafka, GroupID: "seed-" + c.GatewayID, Topic: topic,
		MinBytes: c.MinBytes, MaxBytes: 4 << 20, MaxWait: c.MaxWait, QueueCapacity: 1000,
		CommitInterval: time.Second, ReadLagInterval: -1, StartOffset: kafka.FirstOffset,
		Dialer: &kafka.Dialer{ClientID: c.GatewayID, Timeout: 5 * time.Second},
		ErrorLogger: kafka.LoggerFunc(func(f string, args ...any) {
			log.Sugar().Warnf("kafka reader: "+f, args...)
		}),
	})}
}

// run returns when ctx ends.
func (d *downstream) run(ctx context.Context) error {
	for {
		m, err := d.r.ReadMessage(ctx) // commits every CommitInterval
		if errors.Is(err, io.EOF) || ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the downstream topic: %w", err)
		}
		d.deliver(&m)
	}
}

func (d *downstream) deliver(m *kafka.Message) {
	var p push
	if err := json.UnmarshalNoEscape(m.Value, &p); err != nil {
		d.stats.unreadable.Add(1)
		return
	}
	if p.Type == "" {
		p.Type = "new-message"
	}
	b := make([]byte, 0, 64+len(p.MessageID)+len(p.Data))
	b = append(b, `{"type":`...)
	b = appendString(b, p.Type)
	b = append(b, `,"message_id":`...)
	if p.MessageID == "" {
		p.MessageID = m.Topic + "-" + strconv.Itoa(m.Partition) + "-" + strconv.FormatInt(m.Offset, 10)
	}
	b = appendString(b, p.MessageID)
	b = append(b, `,"data":`...)
	if len(p.Data) == 0 {
		b = append(b, "null"...)
	}
	b = append(b, p.Data...)
	b = append(b, '}')
	if len(p.Targets) == 0 {
		d.push(p.Target, &outbound{data: b})
		return
	}
	prepared, err := websocket.NewPreparedMessage(websocket.TextMessage, b)
	if err != nil {
		d.stats.unreadable.Add(1)
		return
	}
	o := &outbound{prepared: prepared}
	for _, user := range p.Targets {
		d.push(user, o)
	}
}

func (d *downstream) push(user string, o *outbound) {
	c := d.hub.get(user)
	if c == nil {
		d.stats.offline.Add(1)
		return
	}
	d.stats.pushed.Add(1)
	c.send(o, &d.stats.pushesDropped)
}

// createTopics makes the topics that are missing.
func createTopics(ctx context.Context, c config) error {
	conn, err := kafka.DialContext(ctx, "tcp", c.Kafka[0])
	if err != nil {
		return fmt.Errorf("connect to Kafka: %w", err)
	}
	defer func() { _ = conn.Close() }()
	controller, err := conn.Controller()
	if err != nil {
		return fmt.Errorf("find Kafka's controller: %w", err)
	}
	client := kafka.Client{Addr: kafka.TCP(net.JoinHostPort(controller.Host, strconv.Itoa(controller.Port))), Timeout: 10 * time.Second}
	res, err := client.CreateTopics(ctx, &kafka.CreateTopicsRequest{Topics: []kafka.TopicConfig{
		{Topic: c.Upstream, NumPartitions: c.UpstreamPartitions, ReplicationFactor: -1},
		{Topic: c.Downstream + c.GatewayID, NumPartitions: c.DownstreamPartitions, ReplicationFactor: -1},
	}})
	if err != nil {
		return fmt.Errorf("create topics: %w", err)
	}
	for topic, err := range res.Errors {
		if err != nil && !errors.Is(err, kafka.TopicAlreadyExists) {
			return fmt.Errorf("create topic %s: %w", topic, err)
		}
	}
	return nil
}
