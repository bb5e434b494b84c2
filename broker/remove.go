package broker

import (
	"context"
	"errors"
	"fmt"

	"github.com/IBM/sarama"
)

// ErrNotEmpty is returned by RemoveTopic when records wait.
var ErrNotEmpty = errors.New("records wait in the topic")

// HasTopic tells whether a gateway's downstream topic exists.
func (a *Admin) HasTopic(ctx context.Context, gatewayID string) (bool, error) {
	client, err := a.client(ctx)
	if err != nil {
		return false, err
	}
	defer func() { _ = client.Close() }()
	opts := a.opts
	opts.GatewayID = gatewayID
	_, err = client.Partitions(opts.DownstreamTopic())
	if errors.Is(err, sarama.ErrUnknownTopicOrPartition) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("kafka: topic %s: %w", opts.DownstreamTopic(), err)
	}
	return true, nil
}

// EnsureOwn creates this gateway's downstream topic when it is missing, as when somebody has deleted it.
func (a *Admin) EnsureOwn(ctx context.Context) error {
	exists, err := a.HasTopic(ctx, a.opts.GatewayID)
	if exists || err != nil {
		return err
	}
	client, err := a.client(ctx)
	if err != nil {
		return err
	}
	admin, err := sarama.NewClusterAdminFromClient(client)
	if err != nil {
		return fmt.Errorf("kafka: %w", errors.Join(ctx.Err(), err, client.Close()))
	}
	defer func() { _ = admin.Close() }() // closes the client too
	return a.createTopic(admin, a.wanted()[0])
}

// client returns a client that is cut off when ctx ends.
func (a *Admin) client(ctx context.Context) (sarama.Client, error) {
	l := newLink()
	context.AfterFunc(ctx, l.cut)
	conf := a.opts.config(l)
	conf.Metadata.Full = true // an admin looks for the controller by it
	conf.Metadata.Retry.Max = sideMetadataRetries
	conf.Admin.Timeout = adminTimeout
	client, err := sarama.NewClient(a.opts.Brokers, conf)
	if err != nil {
		return nil, fmt.Errorf("kafka: %w", errors.Join(ctx.Err(), err))
	}
	return client, nil
}

// RemoveTopic deletes the downstream topic of a gateway that will not come back, and its consumer group,
// once every record is behind the committed offsets; else it returns ErrNotEmpty. A topic that is not
// there is no error. Nobody may be reading it. It blocks for as long as Kafka takes, or until ctx ends.
func (a *Admin) RemoveTopic(ctx context.Context, gatewayID string) error {
	opts := a.opts
	opts.GatewayID = gatewayID
	topic, group := opts.DownstreamTopic(), opts.Group()
	client, err := a.client(ctx)
	if err != nil {
		return err
	}
	admin, err := sarama.NewClusterAdminFromClient(client)
	if err != nil {
		return fmt.Errorf("kafka: %w", errors.Join(ctx.Err(), err, client.Close()))
	}
	defer func() { _ = admin.Close() }() // closes the client too

	partitions, err := client.Partitions(topic)
	if errors.Is(err, sarama.ErrUnknownTopicOrPartition) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("kafka: partitions of topic %s: %w", topic, err)
	}
	committed, err := admin.ListConsumerGroupOffsets(group, map[string][]int32{topic: partitions})
	if err != nil {
		return fmt.Errorf("kafka: offsets of group %s: %w", group, err)
	}
	for _, p := range partitions {
		oldest, err := client.GetOffset(topic, p, sarama.OffsetOldest)
		if err != nil {
			return fmt.Errorf("kafka: offsets of topic %s: %w", topic, err)
		}
		newest, err := client.GetOffset(topic, p, sarama.OffsetNewest)
		if err != nil {
			return fmt.Errorf("kafka: offsets of topic %s: %w", topic, err)
		}
		at := int64(-1)
		if b := committed.GetBlock(topic, p); b != nil && b.Err == sarama.ErrNoError {
			at = b.Offset
		}
		if max(at, oldest) < newest {
			return fmt.Errorf("topic %s, partition %d: offset %d of %d is committed: %w", topic, p, at, newest, ErrNotEmpty)
		}
	}
	if err := admin.DeleteTopic(topic); err != nil && !errors.Is(err, sarama.ErrUnknownTopicOrPartition) {
		return fmt.Errorf("kafka: delete topic %s: %w", topic, err)
	}
	// A static member stays in its group until its session times out: the group expires by itself then.
	if err := admin.DeleteConsumerGroup(group); err != nil && !errors.Is(err, sarama.ErrGroupIDNotFound) &&
		!errors.Is(err, sarama.ErrNonEmptyGroup) {
		return fmt.Errorf("kafka: delete group %s: %w", group, err)
	}
	return nil
}
