package broker

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"time"

	"github.com/IBM/sarama"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rcrowley/go-metrics"
	"github.com/rs/zerolog"

	"im-gateway/codec"
)

// The defaults of Options.
const (
	DefaultMaxInFlightRecords = 65536
	DefaultMaxInFlightBytes   = 64 << 20
	DefaultMaxRecordBytes     = 1_000_000 // below the brokers' default of 1,048,588 for a whole batch
	DefaultFlushMessages      = 200
	DefaultFlushBytes         = 64 << 10
	DefaultUnavailableAfter   = 10 * time.Second
	DefaultWindowRecords      = 10_000
	DefaultWindowBytes        = 64 << 20
	DefaultRetention          = 24 * time.Hour
	DefaultPartitions         = 4
	DefaultSharedPartitions   = 16
)

// Compressions of what is produced.
const (
	CompressionNone = "none"
	CompressionLZ4  = "lz4"
)

// SASL mechanisms.
const (
	SASLNone        = "none"
	SASLPlain       = "PLAIN"
	SASLScramSHA256 = "SCRAM-SHA-256"
	SASLScramSHA512 = "SCRAM-SHA-512"
)

// How the clients behave towards a Kafka that is away. They are not configuration: each follows from
// what the gateway promises.
const (
	dialTimeout     = 5 * time.Second
	reconnectPause  = 100 * time.Millisecond // after a refused dial, so that retries are not spent in no time
	metadataBackoff = 250 * time.Millisecond
	retryBackoffMin = 50 * time.Millisecond
	retryBackoffMax = time.Second
	// metadataRefresh is how often the partitions of the topics in use are looked up again.
	metadataRefresh = 2 * time.Minute
	// upstreamMetadataRetries bridges an outage: sarama gives a batch back when a leader look-up has
	// used its retries up, so this (2 minutes) is the real deadline of a client message.
	upstreamMetadataRetries = 480
	upstreamRetries         = 120
	// The side producer fails within seconds; its callers try again.
	sideMetadataRetries = 4
	sideRetries         = 5
	// consumerMetadataRetries lets a session live through a broker's restart of some seconds.
	consumerMetadataRetries = 40
	brokerAckTimeout        = 10 * time.Second // within it the in-sync replicas must have the batch
	producerReadTimeout     = 15 * time.Second // must exceed brokerAckTimeout
	sessionTimeout          = 30 * time.Second
	heartbeatInterval       = 3 * time.Second
	commitInterval          = time.Second
	maxProcessingTime       = 250 * time.Millisecond // a full claim holds its broker's others up so long, once
)

// Options are what the parts of the package share. Zero values of sizes and durations mean the
// defaults above, unless a field says otherwise.
type Options struct {
	Brokers   []string
	GatewayID string
	Nonce     uint64 // of the public session names in user events
	// Version of the protocol; the zero value is the newest, from which sarama negotiates down.
	Version sarama.KafkaVersion
	TLS     *tls.Config // nil: plain TCP
	SASL    SASL

	UpstreamTopic    string
	DownstreamPrefix string
	UndeliveredTopic string
	DeadletterTopic  string
	UserEventsTopic  string

	// Client messages handed over and not answered yet; beyond either cap Admit refuses.
	MaxInFlightRecords int
	MaxInFlightBytes   int
	// MaxRecordBytes bounds one record, and one batch for one partition: a topic's
	// max.message.bytes must not be lower.
	MaxRecordBytes int
	// A batch leaves after so many records, so many bytes or so long, whichever comes first. With a
	// FlushInterval of 0 a batch leaves as soon as the one before it is answered.
	FlushMessages int
	FlushBytes    int
	FlushInterval time.Duration
	Compression   string // CompressionNone (also the empty string) or CompressionLZ4
	// UnavailableAfter is how long nothing may be answered, while something is in flight, until
	// Admit refuses with BROKER_UNAVAILABLE.
	UnavailableAfter time.Duration

	// Records, and their bytes, of one partition between the oldest that has not ended and the newest
	// read; at the limit the partition is read no further.
	WindowRecords int
	WindowBytes   int
	// Begin, when not nil, holds the dispatching of downstream records back until it is closed; the
	// group is joined before.
	Begin <-chan struct{}

	// Locate says where users are who have no session here, one answer per user, in their order; nil:
	// nothing is forwarded. It is called from several goroutines and may block until ctx ends.
	Locate func(ctx context.Context, users []string) []Located
	// Alive tells whether a gateway reads its topic, so that forwarding to it makes sense.
	Alive func(gatewayID string) bool

	// Sampler says which downstream records are traced; nil: none.
	Sampler *codec.Sampler
	// Traced is told of each of them when it has ended. It must not block; it is required with a Sampler.
	Traced func(*codec.RecordTrace)

	// Topics that EnsureTopics creates. A replication of 0 is the brokers' default.
	CreateShared          bool
	Strict                bool // refuse, rather than warn about, topics that can lose acknowledged records
	DownstreamPartitions  int
	DownstreamReplication int
	DownstreamRetention   time.Duration
	SharedPartitions      int
	SharedReplication     int

	Logger     zerolog.Logger
	Registerer prometheus.Registerer // nil: metrics are kept from everybody
}

// SASL is the login at Kafka.
type SASL struct {
	Mechanism string // SASLNone (also the empty string) or one of the other SASL constants
	User      string
	Password  string
}

// DownstreamTopic is the topic that this gateway reads.
func (o *Options) DownstreamTopic() string { return o.DownstreamPrefix + o.GatewayID }

// Group is the consumer group that reads it.
func (o *Options) Group() string { return "im-gateway-" + o.GatewayID }

// withDefaults returns the options with every default filled in, or what is wrong with them.
func (o Options) withDefaults() (Options, error) {
	setDefault(&o.Version, sarama.MaxVersion)
	setDefault(&o.SASL.Mechanism, SASLNone)
	setDefault(&o.Compression, CompressionNone)
	setDefault(&o.MaxInFlightRecords, DefaultMaxInFlightRecords)
	setDefault(&o.MaxInFlightBytes, DefaultMaxInFlightBytes)
	setDefault(&o.MaxRecordBytes, DefaultMaxRecordBytes)
	setDefault(&o.FlushMessages, DefaultFlushMessages)
	setDefault(&o.FlushBytes, DefaultFlushBytes)
	setDefault(&o.UnavailableAfter, DefaultUnavailableAfter)
	setDefault(&o.WindowRecords, DefaultWindowRecords)
	setDefault(&o.WindowBytes, DefaultWindowBytes)
	setDefault(&o.DownstreamPartitions, DefaultPartitions)
	setDefault(&o.DownstreamRetention, DefaultRetention)
	setDefault(&o.SharedPartitions, DefaultSharedPartitions)
	if o.Registerer == nil {
		o.Registerer = prometheus.NewRegistry()
	}
	for _, f := range []struct{ name, value string }{
		{"GatewayID", o.GatewayID}, {"UpstreamTopic", o.UpstreamTopic},
		{"DownstreamPrefix", o.DownstreamPrefix}, {"UndeliveredTopic", o.UndeliveredTopic},
		{"DeadletterTopic", o.DeadletterTopic}, {"UserEventsTopic", o.UserEventsTopic},
	} {
		if f.value == "" {
			return o, fmt.Errorf("broker: %s is empty", f.name)
		}
	}
	if len(o.Brokers) == 0 {
		return o, errors.New("broker: no brokers")
	}
	if o.Sampler != nil && o.Traced == nil {
		return o, errors.New("broker: records are traced for nobody")
	}
	if err := o.config(newLink()).Validate(); err != nil {
		return o, fmt.Errorf("broker: %w", err)
	}
	switch o.Compression {
	case CompressionNone, CompressionLZ4:
	default:
		return o, fmt.Errorf("broker: unknown compression %q", o.Compression)
	}
	return o, nil
}

func setDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// sarama's own metrics are not exported, and cost each request a few histograms.
func init() { metrics.UseNilMetrics = true }

// config is what all sarama clients of the package have in common.
func (o *Options) config(l *link) *sarama.Config {
	c := sarama.NewConfig()
	c.ClientID = "im-gateway-" + o.GatewayID
	c.Version = o.Version
	c.Net.DialTimeout = dialTimeout
	c.Net.Proxy.Enable = true
	c.Net.Proxy.Dialer = l
	if o.TLS != nil {
		c.Net.TLS.Enable = true
		c.Net.TLS.Config = o.TLS
	}
	if m := o.SASL.Mechanism; m != SASLNone {
		c.Net.SASL.Enable = true
		c.Net.SASL.Mechanism = sarama.SASLMechanism(m)
		c.Net.SASL.User, c.Net.SASL.Password = o.SASL.User, o.SASL.Password
		c.Net.SASL.SCRAMClientGeneratorFunc = scramGenerator(m)
	}
	// Only the topics in use: a cluster may have a downstream topic for each of many gateways.
	c.Metadata.Full = false
	c.Metadata.AllowAutoTopicCreation = false
	c.Metadata.RefreshFrequency = metadataRefresh
	c.Metadata.Retry.BackoffFunc = func(int, int) time.Duration { return l.wait(metadataBackoff) }
	return c
}

// producerConfig is the configuration of the two producers.
func (o *Options) producerConfig(l *link, metadataRetries, retries int) *sarama.Config {
	c := o.config(l)
	c.Net.MaxOpenRequests = 1 // idempotence asks for it
	c.Net.ReadTimeout = producerReadTimeout
	c.Metadata.Retry.Max = metadataRetries
	p := &c.Producer
	p.Idempotent = true
	p.RequiredAcks = sarama.WaitForAll
	p.Timeout = brokerAckTimeout
	p.Partitioner = sarama.NewMurmur2Partitioner // as Java's
	p.MaxMessageBytes = o.MaxRecordBytes
	p.Return.Successes, p.Return.Errors = true, true
	p.Flush.Frequency = o.FlushInterval
	if o.FlushInterval > 0 { // without a timer sarama would wait for the counts
		p.Flush.Messages, p.Flush.Bytes = o.FlushMessages, o.FlushBytes
	}
	if o.Compression == CompressionLZ4 {
		p.Compression = sarama.CompressionLZ4
	}
	p.Retry.Max = retries
	p.Retry.BackoffFunc = func(retries, _ int) time.Duration {
		if retries <= 0 {
			// A fresh message that found no leader: sarama waits here with the whole partition behind
			// it, after it gave the message back.
			return 0
		}
		return l.wait(min(retryBackoffMin<<min(retries-1, 10), retryBackoffMax))
	}
	p.Transaction.Retry.Max = sideRetries // of asking for a producer id, at the start
	p.Transaction.Retry.BackoffFunc = func(int, int) time.Duration { return l.wait(retryBackoffMax / 10) }
	return c
}

// consumerConfig is the configuration of the consumer group.
func (o *Options) consumerConfig(l *link) *sarama.Config {
	c := o.config(l)
	c.Metadata.Retry.Max = consumerMetadataRetries
	g := &c.Consumer
	g.Return.Errors = true
	g.MaxProcessingTime = maxProcessingTime
	g.Retry.BackoffFunc = func(int) time.Duration { return metadataBackoff }
	g.Offsets.Initial = sarama.OffsetOldest
	g.Offsets.AutoCommit.Enable = true
	g.Offsets.AutoCommit.Interval = commitInterval
	g.Group.InstanceId = o.GatewayID
	g.Group.Session.Timeout = sessionTimeout
	g.Group.Heartbeat.Interval = heartbeatInterval
	g.Group.Rebalance.Retry.Backoff = metadataBackoff
	g.Group.ResetInvalidOffsets = true
	return c
}
