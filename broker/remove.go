package broker

import (
	"context"
	"errors"
	"fmt"

	"github.com/IBM/sarama"
)

// ErrNotEmpty is returned by RemoveTopic when records wait.
var ErrNotEmpty = errors.New("records wait in the topic")

// RemoveTopic deletes the downstream topic of a gateway that will not come back, and its consumer group,
// once every record is behind the committed offsets; else it returns ErrNotEmpty. A topic that is not
// there is no error. Nobody may be reading it. It blocks for as long as Kafka takes, or until ctx ends.
func (a *Admin) RemoveTopic(ctx context.Context, gatewayID string) error {
	opts := a.opts
	opts.GatewayID = gatewayID
	topic, group := opts.DownstreamTopic(), opts.Group()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	client, admin, err := a.admin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = admin.Close() }()

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
