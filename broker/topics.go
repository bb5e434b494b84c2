package broker

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/IBM/sarama"
	"github.com/rs/zerolog"
)

const (
	safeReplication = 3
	safeInSync      = 2
	leaderPoll      = 50 * time.Millisecond
	adminTimeout    = 10 * time.Second

	minInSync       = "min.insync.replicas"
	maxMessageBytes = "max.message.bytes"
)

// Admin looks after the topics, at the start.
type Admin struct {
	opts Options
	log  zerolog.Logger
}

// NewAdmin validates the options.
func NewAdmin(opts Options) (*Admin, error) {
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	return &Admin{opts: opts, log: opts.Logger}, nil
}

// wantedTopic is a topic that the gateway needs, and how it is created.
type wantedTopic struct {
	name   string
	detail *sarama.TopicDetail // nil: it may not be created
}

func (a *Admin) wanted() []wantedTopic {
	retention := strconv.FormatInt(a.opts.DownstreamRetention.Milliseconds(), 10)
	own := topicDetail(a.opts.DownstreamPartitions, a.opts.DownstreamReplication)
	own.ConfigEntries = map[string]*string{"retention.ms": &retention}
	wanted := []wantedTopic{{a.opts.DownstreamTopic(), own}}
	for _, name := range []string{
		a.opts.UpstreamTopic, a.opts.UndeliveredTopic, a.opts.DeadletterTopic, a.opts.UserEventsTopic,
	} {
		t := wantedTopic{name: name}
		if a.opts.CreateShared {
			t.detail = topicDetail(a.opts.SharedPartitions, a.opts.SharedReplication)
		}
		wanted = append(wanted, t)
	}
	return wanted
}

func topicDetail(partitions, replication int) *sarama.TopicDetail {
	d := &sarama.TopicDetail{NumPartitions: int32(partitions), ReplicationFactor: int16(replication)}
	if replication == 0 {
		d.ReplicationFactor = -1 // the brokers' default
	}
	return d
}

// EnsureTopics creates this gateway's downstream topic when it is missing, and the shared ones when
// that is allowed; it returns when every topic has a leader for every partition. The error names
// every topic that is missing or must not be used, and what to do. Topics that can lose acknowledged
// records are logged as warnings, or are errors with Strict.
func (a *Admin) EnsureTopics(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	_, admin, err := a.admin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = admin.Close() }()

	wanted := a.wanted()
	if err := a.create(admin, wanted); err != nil {
		return errors.Join(ctx.Err(), err)
	}
	topics, err := a.led(ctx, admin, wanted)
	if err != nil {
		return err
	}
	return a.judge(admin, topics)
}

// HasTopic tells whether a gateway's downstream topic exists.
func (a *Admin) HasTopic(ctx context.Context, gatewayID string) (bool, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
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
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	_, admin, err := a.admin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = admin.Close() }()
	return a.createTopic(admin, a.wanted()[0])
}

// client returns a client that is cut off when ctx ends, which the caller sees to.
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

// admin returns a client with an admin, whose Close closes both.
func (a *Admin) admin(ctx context.Context) (sarama.Client, sarama.ClusterAdmin, error) {
	client, err := a.client(ctx)
	if err != nil {
		return nil, nil, err
	}
	admin, err := sarama.NewClusterAdminFromClient(client)
	if err != nil {
		return nil, nil, fmt.Errorf("kafka: %w", errors.Join(ctx.Err(), err, client.Close()))
	}
	return client, admin, nil
}

// create creates what is missing and may be created.
func (a *Admin) create(admin sarama.ClusterAdmin, wanted []wantedTopic) error {
	found, err := describe(admin, wanted)
	if err != nil {
		return err
	}
	var errs []error
	for _, t := range wanted {
		m := found[t.name]
		switch {
		case m == nil:
			errs = append(errs, fmt.Errorf("kafka: no answer about topic %s", t.name))
		case m.Err == sarama.ErrNoError, m.Err == sarama.ErrLeaderNotAvailable:
		case m.Err == sarama.ErrTopicAuthorizationFailed:
			errs = append(errs, fmt.Errorf("kafka: needs DESCRIBE on topic %s: %w", t.name, m.Err))
		case m.Err != sarama.ErrUnknownTopicOrPartition:
			errs = append(errs, fmt.Errorf("kafka: topic %s: %w", t.name, m.Err))
		case t.detail == nil:
			errs = append(errs, fmt.Errorf("kafka: topic %s does not exist: create it, or let the gateway "+
				"create it by kafka.create_shared_topics", t.name))
		default:
			if err := a.createTopic(admin, t); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

func (a *Admin) createTopic(admin sarama.ClusterAdmin, t wantedTopic) error {
	err := admin.CreateTopic(t.name, t.detail, false)
	switch {
	case err == nil:
		a.log.Info().Str("topic", t.name).Int32("partitions", t.detail.NumPartitions).Msg("kafka: topic created")
		return nil
	case errors.Is(err, sarama.ErrTopicAlreadyExists): // another gateway was faster
		return nil
	case errors.Is(err, sarama.ErrTopicAuthorizationFailed), errors.Is(err, sarama.ErrClusterAuthorizationFailed):
		return fmt.Errorf("kafka: topic %s does not exist, and creating it needs CREATE on topic %s or on the cluster: %w",
			t.name, t.name, err)
	}
	return fmt.Errorf("kafka: creating topic %s (%d partitions, replication %d): %w",
		t.name, t.detail.NumPartitions, t.detail.ReplicationFactor, err)
}

func describe(admin sarama.ClusterAdmin, wanted []wantedTopic) (map[string]*sarama.TopicMetadata, error) {
	names := make([]string, len(wanted))
	for i, t := range wanted {
		names[i] = t.name
	}
	list, err := admin.DescribeTopics(names)
	if err != nil {
		return nil, fmt.Errorf("kafka: describing topics: %w", err)
	}
	found := make(map[string]*sarama.TopicMetadata, len(list))
	for _, m := range list {
		found[m.Name] = m
	}
	return found, nil
}

// led waits until every partition of every topic has a leader.
func (a *Admin) led(ctx context.Context, admin sarama.ClusterAdmin, wanted []wantedTopic) ([]*sarama.TopicMetadata, error) {
	t := time.NewTicker(leaderPoll)
	defer t.Stop()
	for {
		found, err := describe(admin, wanted)
		var missing string
		topics := make([]*sarama.TopicMetadata, 0, len(wanted))
		for _, w := range wanted {
			m := found[w.name]
			if m == nil || m.Err != sarama.ErrNoError || !hasLeaders(m) {
				missing = w.name
				break
			}
			topics = append(topics, m)
		}
		if err == nil && missing == "" {
			return topics, nil
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			if err != nil {
				return nil, errors.Join(ctx.Err(), err)
			}
			return nil, fmt.Errorf("kafka: topic %s has a partition without a leader: %w", missing, ctx.Err())
		}
	}
}

func hasLeaders(m *sarama.TopicMetadata) bool {
	for _, p := range m.Partitions {
		if p.Err == sarama.ErrLeaderNotAvailable || p.Leader < 0 {
			return false
		}
	}
	return len(m.Partitions) > 0
}

// judge warns about topics that can lose records, or refuse them.
func (a *Admin) judge(admin sarama.ClusterAdmin, topics []*sarama.TopicMetadata) error {
	configs, err := topicConfigs(admin, topics)
	if err != nil {
		a.log.Warn().Err(err).Msg("kafka: the topics' configuration could not be read")
	}
	var found []string // problems, in order of appearance
	where := make(map[string][]string)
	for _, m := range topics {
		for _, problem := range a.problems(m, configs[m.Name]) {
			if where[problem] == nil {
				found = append(found, problem)
			}
			where[problem] = append(where[problem], m.Name)
		}
	}
	var errs []error
	for _, problem := range found {
		if a.opts.Strict {
			errs = append(errs, fmt.Errorf("kafka: %s (kafka.strict): topics %s", problem, strings.Join(where[problem], ", ")))
			continue
		}
		a.log.Warn().Strs("topics", where[problem]).Msg("kafka: " + problem)
	}
	return errors.Join(errs...)
}

func topicConfigs(admin sarama.ClusterAdmin, topics []*sarama.TopicMetadata) (map[string]*sarama.ConfigResourceResult, error) {
	var resources []*sarama.ConfigResource
	for _, m := range topics {
		resources = append(resources, &sarama.ConfigResource{
			Type: sarama.TopicResource, Name: m.Name, ConfigNames: []string{minInSync, maxMessageBytes},
		})
	}
	results, err := admin.DescribeConfigs(resources, sarama.DescribeConfigsOptions{})
	if err != nil {
		return nil, err
	}
	configs := make(map[string]*sarama.ConfigResourceResult, len(results))
	for _, r := range results {
		configs[r.Name] = r
	}
	return configs, nil
}

// problems says what is wrong with a topic; config is nil when it could not be read.
func (a *Admin) problems(m *sarama.TopicMetadata, config *sarama.ConfigResourceResult) []string {
	var problems []string
	replicas := len(m.Partitions[0].Replicas)
	for _, p := range m.Partitions {
		replicas = min(replicas, len(p.Replicas))
	}
	if replicas < safeReplication {
		problems = append(problems, fmt.Sprintf("replication is %d: below %d the loss of a broker can lose acknowledged records",
			replicas, safeReplication))
	}
	if config == nil {
		return problems
	}
	if config.ErrorCode != 0 {
		return append(problems, fmt.Sprintf("the configuration could not be read, which needs DESCRIBE_CONFIGS on the topic: %s (%d)",
			config.ErrorMsg, config.ErrorCode))
	}
	for _, e := range config.Configs {
		n, err := strconv.Atoi(e.Value)
		switch {
		case err != nil:
		case e.Name == minInSync && n < safeInSync:
			problems = append(problems, fmt.Sprintf("%s is %d: below %d one broker's word makes a record acknowledged",
				minInSync, n, safeInSync))
		case e.Name == maxMessageBytes && n < a.opts.MaxRecordBytes:
			problems = append(problems, fmt.Sprintf("%s is %d: whole batches are refused unless it is at least %d",
				maxMessageBytes, n, a.opts.MaxRecordBytes))
		}
	}
	return problems
}
