package engine

import (
	"time"

	"im-gateway/transport"
)

// The defaults that are more than an empty value.
const (
	DefaultHTTPAddr    = ":8080"
	DefaultMaxRequests = 4096

	DefaultMaxMessageBytes   = 64 << 10
	DefaultHeadBytes         = 8 << 10
	DefaultHandshakeTimeout  = 10 * time.Second
	DefaultHeartbeat         = 30 * time.Second
	DefaultHeartbeatTimeout  = 75 * time.Second
	DefaultEgressBudgetBytes = 1 << 20

	DefaultMaxFragments         = 1024
	DefaultCompressionThreshold = 512
	DefaultCompressionLevel     = 1
	DefaultMaxTLSHandshakes     = 1024
	DefaultMaxHTTPConnections   = 8192
	DefaultMaxBodyBytes         = 64 << 10
	DefaultHTTPReadTimeout      = 15 * time.Second
	DefaultHTTPWriteTimeout     = 30 * time.Second
	DefaultHTTPIdleTimeout      = 60 * time.Second

	DefaultConnectionsPerIP     = 2000
	DefaultConnectionsPerSubnet = 20000
	DefaultHandshakesInFlight   = 4096
	DefaultHandshakesPerSecond  = 20000
	DefaultMessagesPerSecond    = 1000
	DefaultBytesPerSecond       = 4 << 20

	DefaultUserMessagesPerSecond = 2000
	DefaultUserBytesPerSecond    = 8 << 20
	DefaultUnackedMessages       = 256

	DefaultLoginsPerIP   = 60
	DefaultLoginsPerName = 10

	DefaultMemoryHighWaterPercent = 90

	DefaultAlgorithm = "HS256"
	DefaultLeeway    = 30 * time.Second

	DefaultJWKSRefresh = 10 * time.Minute

	DefaultKafkaBroker           = "127.0.0.1:9092"
	DefaultUpstreamTopic         = "im-upstream-topic"
	DefaultDownstreamTopicPrefix = "im-downstream-topic-"
	DefaultUndeliveredTopic      = "im-undelivered-topic"
	DefaultDeadletterTopic       = "im-deadletter-topic"
	DefaultUserEventsTopic       = "im-user-events-topic"
	DefaultDownstreamPartitions  = 1
	DefaultDownstreamRetention   = 24 * time.Hour
	DefaultSharedPartitions      = 16
	DefaultMaxInFlightRecords    = 65536
	DefaultMaxInFlightBytes      = 64 << 20
	DefaultFlushMessages         = 200
	DefaultFlushBytes            = 64 << 10
	DefaultFlushInterval         = 10 * time.Millisecond
	DefaultAckDeadline           = 10 * time.Second
	DefaultStartGrace            = 5 * time.Second

	DefaultRedisAddr       = "127.0.0.1:6379"
	DefaultPresenceTTL     = 90 * time.Second
	DefaultRefreshInterval = 30 * time.Second

	DefaultEtcdEndpoint = "127.0.0.1:2379"
	DefaultLeaseTTL     = 30 * time.Second

	DefaultLogicTarget   = "etcd:///im-logic"
	DefaultLogicDeadline = 5 * time.Second

	DefaultGRPCAddr  = "127.0.0.1:9080"
	DefaultAdminAddr = "127.0.0.1:8081"

	DefaultDrainWindow   = 10 * time.Second
	DefaultDrainDeadline = 25 * time.Second

	DefaultNodeEgressBudgetBytes = 256 << 20
	DefaultDeliveryTimeout       = 30 * time.Second
	DefaultRememberedMessages    = 32768
	DefaultSessionPolicy         = policyReplace

	DefaultTakeoverAfter     = 2 * time.Minute
	DefaultTakeoverQuiet     = 10 * time.Minute
	DefaultTakeoverMaxTopics = 16

	DefaultCloseRate = 2000

	DefaultSampleRatio    = 0.01
	DefaultSpansPerSecond = 1000
	DefaultServiceName    = "im-gateway"

	DefaultLogLevel  = "info"
	DefaultLogFormat = "auto"

	saslNone = "none"
)

// Default returns the configuration that holds when nothing is configured. It does not pass
// Validate as it is: a key to check tokens with has no default.
func Default() Config {
	return Config{
		HTTP: HTTP{
			Addr:            DefaultHTTPAddr,
			MaxRequests:     DefaultMaxRequests,
			MaxConnections:  DefaultMaxHTTPConnections,
			MaxBodyBytes:    DefaultMaxBodyBytes,
			ReadTimeout:     DefaultHTTPReadTimeout,
			WriteTimeout:    DefaultHTTPWriteTimeout,
			IdleTimeout:     DefaultHTTPIdleTimeout,
			ForwardedHeader: transport.ForwardedForHeader,
			TLS:             ServerTLS{MaxHandshakes: DefaultMaxTLSHandshakes},
		},
		WebSocket: WebSocket{
			MaxMessageBytes:       DefaultMaxMessageBytes,
			MaxFragments:          DefaultMaxFragments,
			Compression:           Compression{ThresholdBytes: DefaultCompressionThreshold, Level: DefaultCompressionLevel},
			HeadBytes:             DefaultHeadBytes,
			HandshakeTimeout:      DefaultHandshakeTimeout,
			Heartbeat:             DefaultHeartbeat,
			HeartbeatTimeout:      DefaultHeartbeatTimeout,
			EgressBudgetBytes:     DefaultEgressBudgetBytes,
			NodeEgressBudgetBytes: DefaultNodeEgressBudgetBytes,
			DeliveryTimeout:       DefaultDeliveryTimeout,
			RememberedMessages:    DefaultRememberedMessages,
		},
		Limits: Limits{
			ExemptNetworks:       []string{"127.0.0.0/8", "::1/128"},
			ConnectionsPerIP:     DefaultConnectionsPerIP,
			ConnectionsPerSubnet: DefaultConnectionsPerSubnet,
			HandshakesInFlight:   DefaultHandshakesInFlight,
			HandshakesPerSecond:  DefaultHandshakesPerSecond,
			MessagesPerSecond:    DefaultMessagesPerSecond,
			BytesPerSecond:       DefaultBytesPerSecond,

			UserMessagesPerSecond: DefaultUserMessagesPerSecond,
			UserBytesPerSecond:    DefaultUserBytesPerSecond,
			UnackedMessages:       DefaultUnackedMessages,

			LoginsPerIP:   DefaultLoginsPerIP,
			LoginsPerName: DefaultLoginsPerName,

			MemoryHighWaterPercent: DefaultMemoryHighWaterPercent,
		},
		Auth: Auth{Algorithm: DefaultAlgorithm, Leeway: DefaultLeeway, DenyList: true, JWKSRefresh: DefaultJWKSRefresh, QueryToken: true},
		Kafka: Kafka{
			Brokers:               []string{DefaultKafkaBroker},
			UpstreamTopic:         DefaultUpstreamTopic,
			DownstreamTopicPrefix: DefaultDownstreamTopicPrefix,
			UndeliveredTopic:      DefaultUndeliveredTopic,
			DeadletterTopic:       DefaultDeadletterTopic,
			UserEventsTopic:       DefaultUserEventsTopic,
			DownstreamPartitions:  DefaultDownstreamPartitions,
			DownstreamRetention:   DefaultDownstreamRetention,
			SharedPartitions:      DefaultSharedPartitions,
			MaxInFlightRecords:    DefaultMaxInFlightRecords,
			MaxInFlightBytes:      DefaultMaxInFlightBytes,
			FlushMessages:         DefaultFlushMessages,
			FlushBytes:            DefaultFlushBytes,
			FlushInterval:         DefaultFlushInterval,
			AckDeadline:           DefaultAckDeadline,
			StartGrace:            DefaultStartGrace,
			SASL:                  SASL{Mechanism: saslNone},
		},
		Redis: Redis{
			Addrs:           []string{DefaultRedisAddr},
			PresenceTTL:     DefaultPresenceTTL,
			RefreshInterval: DefaultRefreshInterval,
		},
		Etcd:     Etcd{Endpoints: []string{DefaultEtcdEndpoint}, LeaseTTL: DefaultLeaseTTL},
		Logic:    Logic{Target: DefaultLogicTarget, Deadline: DefaultLogicDeadline},
		GRPC:     GRPC{Addr: DefaultGRPCAddr},
		Admin:    Admin{Addr: DefaultAdminAddr},
		Sessions: SessionRules{Policy: DefaultSessionPolicy},
		Takeover: TakeoverRules{After: DefaultTakeoverAfter, Quiet: DefaultTakeoverQuiet, MaxTopics: DefaultTakeoverMaxTopics},
		Drain:    Drain{Window: DefaultDrainWindow, CloseRate: DefaultCloseRate, Deadline: DefaultDrainDeadline},
		Log:      Log{Level: DefaultLogLevel, Format: DefaultLogFormat},
		Tracing:  Tracing{SampleRatio: DefaultSampleRatio, SpansPerSecond: DefaultSpansPerSecond, ServiceName: DefaultServiceName},
	}
}
