package engine

import "time"

// The comments of the fields below are also the text of docs/configuration.md and of
// `im-gateway config reference`: config_reference.go reads them out of this file. A sentence that
// begins with "Cost:" says what a higher value costs.
//
// Tags: koanf names the key; range, oneof and check bound the value and are shown in the reference;
// unit names the unit of a number; secret hides the value and adds the key NAME_file, which names a
// file to read the value from; required refuses an empty value; reload says that the running gateway
// takes a new value (settings.go), the others need a restart.

// Config is the whole configuration. It is a plain value: read-only once the engine has it.
type Config struct {
	// The name of this gateway: of its downstream topic, its entry in etcd and its users' entries in
	// Redis. Empty: the host's name and a random suffix, new at each start. Give a fixed name (in
	// Kubernetes a StatefulSet's pod name) to keep the topic across restarts; two running gateways
	// must never share one.
	GatewayID string `koanf:"gateway_id" check:"gateway_id"`

	HTTP      HTTP          `koanf:"http"`
	WebSocket WebSocket     `koanf:"websocket"`
	Limits    Limits        `koanf:"limits"`
	Sessions  SessionRules  `koanf:"sessions"`
	Auth      Auth          `koanf:"auth"`
	Kafka     Kafka         `koanf:"kafka"`
	Redis     Redis         `koanf:"redis"`
	Etcd      Etcd          `koanf:"etcd"`
	Logic     Logic         `koanf:"logic"`
	GRPC      GRPC          `koanf:"grpc"`
	Admin     Admin         `koanf:"admin"`
	Shard     Shard         `koanf:"shard"`
	Takeover  TakeoverRules `koanf:"takeover"`
	Drain     Drain         `koanf:"drain"`
	Log       Log           `koanf:"log"`
	Tracing   Tracing       `koanf:"tracing"`
}

// HTTP is the public port: WebSocket and the HTTP API.
type HTTP struct {
	// The public listener, WebSocket and HTTP API alike.
	Addr string `koanf:"addr" check:"listen" required:"true"`
	// Event loops, which own the connections. 0: half the cores that the process may use. Cost: a goroutine and 64 KiB each;
	// more than the cores only adds wake-ups.
	Loops int `koanf:"loops" range:"0..256"`
	// The web origins that browsers may call the HTTP API from; * stands for every origin. Empty:
	// no page of another origin.
	CORSOrigins []string `koanf:"cors_origins" check:"origin" reload:"true"`
	// HTTP API requests served at once; beyond it the answer is 503 with Retry-After. Cost: a
	// goroutine and up to http.max_body_bytes each.
	MaxRequests int `koanf:"max_requests" range:"1..65536" reload:"true"`
	// The largest body of a request to the HTTP API; a larger one is answered 413. A message is also
	// bounded by websocket.max_message_bytes.
	MaxBodyBytes int `koanf:"max_body_bytes" unit:"bytes" range:"1KiB..192KiB" reload:"true"`
	// How long an HTTP request may take to arrive, its body included; then its connection is closed. For
	// its head websocket.handshake_timeout counts.
	ReadTimeout time.Duration `koanf:"read_timeout" range:"100ms..5m"`
	// How long an HTTP request may take from the end of its head to the end of its answer; then its
	// connection is closed. Must be longer than logic.deadline and kafka.ack_deadline.
	WriteTimeout time.Duration `koanf:"write_timeout" range:"100ms..10m"`
	// How long an HTTP connection may wait for its next request; then it is closed.
	IdleTimeout time.Duration `koanf:"idle_timeout" range:"100ms..1h"`
	// Connections in HTTP use at once; a further one is answered 503. Cost: about 20 KiB each.
	MaxConnections int `koanf:"max_connections" range:"1..1000000" reload:"true"`
	// Networks of the proxies and load balancers in front of the gateway, such as 10.0.0.0/8. Only they
	// are believed when they name another address as the client's (PROXY protocol, X-Forwarded-For,
	// Forwarded).
	TrustedProxies []string `koanf:"trusted_proxies" check:"network" reload:"true"`
	// The header by which they do so in HTTP. They must set it or add to it; the other one is not read.
	ForwardedHeader string `koanf:"forwarded_header" oneof:"X-Forwarded-For|Forwarded" reload:"true"`
	// Connections from http.trusted_proxies begin with a PROXY protocol header, version 2; one without
	// is refused.
	ProxyProtocol bool      `koanf:"proxy_protocol"`
	TLS           ServerTLS `koanf:"tls"`
}

// ServerTLS is the TLS of the public port.
type ServerTLS struct {
	// PEM file with the server's certificate chain; the port then takes https and wss only. The files
	// are read again when they change. Empty: no TLS.
	CertFile string `koanf:"cert_file" check:"file"`
	// PEM file with the key of cert_file.
	KeyFile string `koanf:"key_file" check:"file"`
	// TLS handshakes under way at once; beyond it the oldest of them is closed. Cost: a goroutine and about
	// 30 KiB each.
	MaxHandshakes int `koanf:"max_handshakes" range:"1..65536" reload:"true"`
}

// WebSocket bounds what one client may send and what is held for it.
type WebSocket struct {
	// The largest client message, all fragments together; a larger one is refused. Cost: that much
	// memory for each client in the middle of a message.
	MaxMessageBytes int `koanf:"max_message_bytes" unit:"bytes" range:"1KiB..768KiB" reload:"true"`
	// Frames that one client message may come in; a message in more closes the connection with 1008.
	MaxFragments int `koanf:"max_fragments" range:"1..16777216" reload:"true"`
	// The largest head of a request, an upgrade or not; a larger one is answered 431. Cost: that much for
	// each connection in its handshake.
	HeadBytes int `koanf:"head_bytes" unit:"bytes" range:"1KiB..64KiB"`
	// How long a new connection may take to send its first request.
	HandshakeTimeout time.Duration `koanf:"handshake_timeout" range:"100ms..5m"`
	// How often each client is pinged. Cost of a lower value: more writes, two packets per ping.
	Heartbeat time.Duration `koanf:"heartbeat" range:"100ms..10m"`
	// A client silent for so long is closed with 4001, and one that takes so long over one message with
	// 1008. An event stream's connection ends when nothing was acknowledged for as long as this said when
	// it was opened (TCP). Must be longer than websocket.heartbeat.
	HeartbeatTimeout time.Duration `koanf:"heartbeat_timeout" range:"200ms..1h" reload:"true"`
	// Bytes that may wait to be written to one client; a client that reads too slowly to stay below is
	// closed with 4000. Must hold the largest downstream record. Cost: up to that much for each slow
	// client.
	EgressBudgetBytes int `koanf:"egress_budget_bytes" unit:"bytes" range:"64KiB..64MiB" reload:"true"`
	// Bytes that may wait to be written to all clients together. Beyond it the consumer waits, client
	// messages are refused with OVERLOADED, and the slowest clients are closed with 4000.
	NodeEgressBudgetBytes int `koanf:"node_egress_budget_bytes" unit:"bytes" range:"1MiB..64GiB" reload:"true"`
	// How long a record may wait for a client to read it, or to acknowledge it where the client does
	// (ack=1). Then the record is undelivered, and a client that reads nothing is closed with 4000.
	DeliveryTimeout time.Duration `koanf:"delivery_timeout" range:"1s..10m"`
	// Names of accepted client messages that are remembered for a minute, so that one sent again gets
	// the first one's ack and is not stored twice. 0: none. Cost: about 120 bytes each.
	RememberedMessages int `koanf:"remembered_messages" range:"0..10000000"`
	// Connections held at once; further ones are refused. 0: what the limit on open files allows,
	// with head-room for the gateway's own. Cost: about 5 KB of memory each, kernel included.
	MaxConnections int `koanf:"max_connections" range:"0..16000000" reload:"true"`
	// The web origins that browsers may connect from; * stands for every origin. Empty: every origin,
	// which is safe as sessions are opened by tokens, never by cookies.
	AllowedOrigins []string `koanf:"allowed_origins" check:"origin" reload:"true"`

	Compression Compression `koanf:"compression"`
}

// Compression is permessage-deflate (RFC 7692), for clients that offer it.
type Compression struct {
	// Compress messages to clients that offer it, and take compressed ones from them. No context is
	// kept between messages. Cost: CPU; no memory for a connection.
	Enabled bool `koanf:"enabled"`
	// Messages to clients that are smaller are sent as they are.
	ThresholdBytes int `koanf:"threshold_bytes" unit:"bytes" range:"0..1MiB"`
	// From 1, the fastest, to 9, the smallest. Cost: CPU.
	Level int `koanf:"level" range:"1..9"`
}

// Limits bounds what one address, one connection or one user may take. 0 switches a limit off.
type Limits struct {
	// Networks to which the limits by address do not apply.
	ExemptNetworks []string `koanf:"exempt_networks" check:"network" reload:"true"`
	// Connections held at once from one address (IPv6: from one /64); further ones are answered 429.
	ConnectionsPerIP int `koanf:"connections_per_ip" range:"0..16000000" reload:"true"`
	// Connections held at once from one subnet (IPv4: /24, IPv6: /48); further ones are answered 429.
	ConnectionsPerSubnet int `koanf:"connections_per_subnet" range:"0..16000000" reload:"true"`
	// Connections that have not finished the head of their first request; beyond it the oldest of them
	// is answered 408. Cost: up to websocket.head_bytes each.
	HandshakesInFlight int `koanf:"handshakes_in_flight" range:"0..16000000" reload:"true"`
	// Upgrades per second on this node; further ones are answered 503 with Retry-After.
	HandshakesPerSecond int `koanf:"handshakes_per_second" range:"0..10000000" reload:"true"`
	// Messages per second that one connection may send on average, two seconds' worth at once. Further
	// ones are refused with RATE_LIMITED; a client that goes on regardless is closed with 1008. Pings
	// count too.
	MessagesPerSecond int `koanf:"messages_per_second" range:"0..10000000" reload:"true"`
	// The same limit in bytes.
	BytesPerSecond int `koanf:"bytes_per_second" unit:"bytes" range:"0..1GiB" reload:"true"`
	// Messages per second of all sessions of one user on this node, and over HTTP, two seconds' worth at
	// once. Further ones are refused with RATE_LIMITED (HTTP: 429); a session that goes on regardless is
	// closed with 1008.
	UserMessagesPerSecond int `koanf:"user_messages_per_second" range:"0..10000000" reload:"true"`
	// The same limit in bytes of the upstream records.
	UserBytesPerSecond int `koanf:"user_bytes_per_second" unit:"bytes" range:"0..1GiB" reload:"true"`
	// Messages of one session that have no answer yet; further ones are refused with OVERLOADED.
	UnackedMessages int `koanf:"unacked_messages" range:"0..65535" reload:"true"`
	// Attempts per minute to log in or register over HTTP from one address (IPv6: from one /64), a
	// minute's worth at once; further ones are answered 429. Holds for limits.exempt_networks, too.
	LoginsPerIP int `koanf:"logins_per_ip" range:"0..1000000" reload:"true"`
	// The same limit for attempts under one name, from wherever they come.
	LoginsPerName int `koanf:"logins_per_name" range:"0..1000000" reload:"true"`
	// Percent of the memory limit, GOMEMLIMIT or else 90 % of the cgroup's, that may be held. Beyond it
	// new connections and HTTP requests are answered 503 with Retry-After and client messages are refused
	// with OVERLOADED, until a twentieth of it is free again. Without a memory limit there is no bound.
	MemoryHighWaterPercent int `koanf:"memory_high_water_percent" range:"0..100" reload:"true"`
}

// SessionRules is how many sessions a user may have.
type SessionRules struct {
	// replace: one session per user, a newer one replaces the older (4500). allow:N, N from 2 to 64: up to
	// N sessions per user, on any gateways; one more replaces the oldest, and one of the same device_id
	// the session of that device. The same on all gateways.
	Policy string `koanf:"policy" check:"sessions" required:"true"`
	// With allow:N, a new session also replaces one of the same kind of device (phone, web, ...).
	OnePerKind bool `koanf:"one_per_kind"`
}

// TakeoverRules is what is done about the downstream topics of gateways that have died.
type TakeoverRules struct {
	// How long a gateway's owner key must be missing in etcd until another gateway reads its topic.
	After time.Duration `koanf:"after" range:"1s..24h"`
	// How long the topic of a random gateway_id must stay empty until it is removed.
	Quiet time.Duration `koanf:"quiet" range:"1s..168h"`
	// Topics that this gateway takes over at a time; 0: none.
	MaxTopics int `koanf:"max_topics" range:"0..1024"`
}

// Auth says how access tokens (JWT) are checked.
type Auth struct {
	// The only signature algorithm that is accepted; the token's own claim about it is never believed.
	Algorithm string `koanf:"algorithm" oneof:"HS256|HS384|HS512|RS256|ES256|EdDSA" reload:"true"`
	// The secret shared with im-logic, for the HS algorithms; at least 32 random bytes are advised.
	HS256Secret string `koanf:"hs256_secret" secret:"true" reload:"true"`
	// The secret before the last change, still accepted; remove it once its tokens have expired.
	PreviousSecret string `koanf:"previous_secret" secret:"true" reload:"true"`
	// PEM file with the public key, for RS256, ES256 and EdDSA.
	PublicKeyFile string `koanf:"public_key_file" check:"file" reload:"true"`
	// Where the public keys are published as a JWK set, in place of public_key_file. It is read at the start,
	// which waits up to 10 s for it, then in the background. Until it came once tokens are refused and the gateway
	// is not ready; while it is away later the last good set stands. A token's kid chooses the key.
	JWKSURL string `koanf:"jwks_url" check:"url" secret:"true" reload:"true"`
	// How often the JWK sets are read again; sooner when a token names a key that is not there.
	JWKSRefresh time.Duration `koanf:"jwks_refresh" range:"1s..24h" reload:"true"`
	// Further issuers, each as words: issuer=NAME algorithms=RS256|ES256 jwks_url=URL (or public_key_file=FILE)
	// and, optional, audience=NAME. A token's iss says whose keys are tried, so auth.issuer must be set too.
	Issuers []string `koanf:"issuers" check:"issuer" secret:"true" reload:"true"`
	// Take a token from the query too (?token=), where proxies may log it.
	QueryToken bool `koanf:"query_token" reload:"true"`
	// When set, a token's iss must be this.
	Issuer string `koanf:"issuer" reload:"true"`
	// When set, a token's aud must contain this.
	Audience string `koanf:"audience" reload:"true"`
	// The difference between the clocks that is tolerated in exp and nbf.
	Leeway time.Duration `koanf:"leeway" range:"0s..10m" reload:"true"`
	// Follow the deny list in Redis (im-deny): a token on it is refused, and its sessions are closed with
	// 4501 within a second.
	DenyList bool `koanf:"deny_list"`
}

// Kafka is the connection to Kafka, the topics and the limits on what is under way.
type Kafka struct {
	// Brokers to begin with; the others are learnt from them.
	Brokers []string `koanf:"brokers" check:"hostport" required:"true"`
	// Where client messages are stored.
	UpstreamTopic string `koanf:"upstream_topic" check:"topic" required:"true"`
	// The topic read by this gateway is this prefix and its gateway_id.
	DownstreamTopicPrefix string `koanf:"downstream_topic_prefix" check:"topic" required:"true"`
	// Where records go that could not be delivered, with the reason in a header.
	UndeliveredTopic string `koanf:"undelivered_topic" check:"topic" required:"true"`
	// Where records go that could not be parsed.
	DeadletterTopic string `koanf:"deadletter_topic" check:"topic" required:"true"`
	// Where user.online and user.offline events go.
	UserEventsTopic string `koanf:"user_events_topic" check:"topic" required:"true"`
	// Create the shared topics (the four above that carry no gateway_id) when they are missing. The
	// gateway's own downstream topic is always created.
	CreateSharedTopics bool `koanf:"create_shared_topics"`
	// Refuse to start when a topic has fewer than 3 replicas or min.insync.replicas below 2, rather
	// than warn.
	Strict bool `koanf:"strict"`
	// Partitions of a downstream topic that the gateway creates. One gateway reads them all: more
	// than one spreads a topic over brokers and makes smaller batches.
	DownstreamPartitions int `koanf:"downstream_partitions" range:"1..1024"`
	// Replicas of a downstream topic that the gateway creates. 0: the brokers' default.
	DownstreamReplication int `koanf:"downstream_replication" range:"0..16"`
	// How long a downstream topic that the gateway creates keeps its records.
	DownstreamRetention time.Duration `koanf:"downstream_retention" range:"1m..8760h"`
	// Partitions of a shared topic that the gateway creates.
	SharedPartitions int `koanf:"shared_partitions" range:"1..1024"`
	// Replicas of a shared topic that the gateway creates. 0: the brokers' default.
	SharedReplication int `koanf:"shared_replication" range:"0..16"`
	// Client messages handed to the producer and not yet answered by Kafka; beyond it messages are
	// refused with OVERLOADED. Cost: about 1 KiB each.
	MaxInFlightRecords int `koanf:"max_in_flight_records" range:"1..10000000"`
	// The same limit in bytes.
	MaxInFlightBytes int `koanf:"max_in_flight_bytes" unit:"bytes" range:"1MiB..16GiB"`
	// A batch for Kafka is sent after so many records at the latest.
	FlushMessages int `koanf:"flush_messages" range:"1..100000"`
	// A batch for Kafka is sent after so many bytes at the latest.
	FlushBytes int `koanf:"flush_bytes" unit:"bytes" range:"1KiB..1MiB"`
	// A batch for Kafka is sent after so long at the latest. Cost: added to every ack's latency; a lower
	// value costs CPU.
	FlushInterval time.Duration `koanf:"flush_interval" range:"0s..1s"`
	// A message that Kafka has not acknowledged for so long is answered OUTCOME_UNKNOWN.
	AckDeadline time.Duration `koanf:"ack_deadline" range:"100ms..2m"`
	// How long after the listener opens the backlog is fetched, so that a restart finds its users
	// connected again.
	StartGrace time.Duration `koanf:"start_grace" range:"0s..5m"`
	TLS        TLS           `koanf:"tls"`
	SASL       SASL          `koanf:"sasl"`
}

// SASL is the login at Kafka.
type SASL struct {
	// How to log in at Kafka. none: not at all.
	Mechanism string `koanf:"mechanism" oneof:"none|PLAIN|SCRAM-SHA-256|SCRAM-SHA-512"`
	// The user to log in as.
	Username string `koanf:"username"`
	// The user's password. PLAIN sends it as it is: use TLS.
	Password string `koanf:"password" secret:"true"`
}

// TLS is one client's side of TLS.
type TLS struct {
	// Use TLS, version 1.2 or later. Certificates are always verified.
	Enabled bool `koanf:"enabled"`
	// PEM file with the authorities to trust. Empty: the system's.
	CAFile string `koanf:"ca_file" check:"file"`
	// PEM file with the client's certificate chain, when the server asks for one.
	CertFile string `koanf:"cert_file" check:"file"`
	// PEM file with the key of cert_file.
	KeyFile string `koanf:"key_file" check:"file"`
	// The name that the server's certificate must carry. Empty: the host dialled.
	ServerName string `koanf:"server_name"`
}

// Redis is the connection to Redis and the life of presence entries.
type Redis struct {
	// Redis servers: one for a single server, all Sentinels, or some nodes of a Cluster.
	Addrs []string `koanf:"addrs" check:"hostport" required:"true"`
	// The user to log in as. Empty: the default user.
	Username string `koanf:"username"`
	// The user's password.
	Password string `koanf:"password" secret:"true"`
	// The master's name; when set, redis.addrs are Sentinels.
	SentinelMaster string `koanf:"sentinel_master"`
	// The user to log in to the Sentinels as. Empty: the default user.
	SentinelUsername string `koanf:"sentinel_username"`
	// The Sentinels' password, where they have one of their own.
	SentinelPassword string `koanf:"sentinel_password" secret:"true"`
	// Whether redis.addrs are nodes of a Cluster.
	Cluster bool `koanf:"cluster"`
	// How long an entry outlives its last refresh: so long a crashed gateway's users look connected.
	PresenceTTL time.Duration `koanf:"presence_ttl" range:"1s..1h"`
	// How often each entry is refreshed, evenly spread. At most half of redis.presence_ttl. Cost of a
	// lower value: Redis CPU, about 4 us per entry.
	RefreshInterval time.Duration `koanf:"refresh_interval" range:"300ms..30m"`
	TLS             TLS           `koanf:"tls"`
}

// Etcd is the connection to etcd and the life of this gateway's registration.
type Etcd struct {
	// The endpoints of etcd, host:port or with http:// or https://.
	Endpoints []string `koanf:"endpoints" check:"endpoint" required:"true"`
	// The user to log in as. Empty: no login.
	Username string `koanf:"username"`
	// The user's password.
	Password string `koanf:"password" secret:"true"`
	// How long the registration outlives a crash.
	LeaseTTL time.Duration `koanf:"lease_ttl" range:"2s..10m"`
	TLS      TLS           `koanf:"tls"`
}

// Logic is the connection to im-logic.
type Logic struct {
	// Where im-logic is: etcd:///NAME finds every instance registered under NAME in etcd, host:port is
	// a fixed address.
	Target string `koanf:"target" check:"target" required:"true"`
	// How long im-logic may take for one call; beyond it the answer is 504.
	Deadline time.Duration `koanf:"deadline" range:"50ms..1m" reload:"true"`
	TLS      TLS           `koanf:"tls"`
}

// GRPC is the gRPC server and the client's side of calls to other gateways.
type GRPC struct {
	// The gRPC listener, for im-logic and the other gateways. Anything but loopback needs grpc.token
	// or mutual TLS.
	Addr string `koanf:"addr" check:"listen" required:"true"`
	// The address that is written to etcd for others to dial. Empty: grpc.addr, its host replaced by
	// this machine's address when it names none.
	AdvertiseAddr string `koanf:"advertise_addr" check:"hostport"`
	// The token that callers send as `authorization: Bearer TOKEN`; the same on all gateways.
	Token string  `koanf:"token" secret:"true" reload:"true"`
	TLS   GRPCTLS `koanf:"tls"`
}

// GRPCTLS is the TLS of the gRPC server, and of calls to other gateways, which use the same files.
type GRPCTLS struct {
	// PEM file with the server's certificate chain, read again when it changes. Empty: no TLS.
	CertFile string `koanf:"cert_file" check:"file"`
	// PEM file with the key of cert_file.
	KeyFile string `koanf:"key_file" check:"file"`
	// PEM file with the authorities that sign the gateways' and their callers' certificates. Empty:
	// the system's, and callers need no certificate.
	CAFile string `koanf:"ca_file" check:"file"`
	// Refuse callers without a certificate signed by grpc.tls.ca_file (mutual TLS).
	RequireClientCert bool `koanf:"require_client_cert"`
	// The name that another gateway's certificate must carry. Empty: the host dialled.
	ServerName string `koanf:"server_name"`
}

// Admin is the operators' port.
type Admin struct {
	// The listener of the admin page, /healthz, /readyz, /metrics, /ledger and /debug/pprof. It asks for no
	// login but a client certificate (admin.tls.client_ca_file): keep it on loopback or inside the cluster.
	Addr string `koanf:"addr" check:"listen" required:"true"`
	// The token that acting asks for, as `Authorization: Bearer TOKEN`: kick, drain and log level, by the
	// admin page and by `im-gateway ctl` alike. Empty: nobody may, and the page only shows.
	Token string   `koanf:"token" secret:"true" reload:"true"`
	TLS   AdminTLS `koanf:"tls"`
}

// AdminTLS is the TLS of the operators' port.
type AdminTLS struct {
	// PEM file with the server's certificate chain, read again when it changes. Empty: no TLS.
	CertFile string `koanf:"cert_file" check:"file"`
	// PEM file with the key of cert_file.
	KeyFile string `koanf:"key_file" check:"file"`
	// PEM file with the authorities that sign the certificates of those who may use the port (mutual
	// TLS); others are refused. Empty: nobody needs one.
	ClientCAFile string `koanf:"client_ca_file" check:"file"`
}

// Shard is the session registry.
type Shard struct {
	// Shards, each one goroutine that owns the sessions of its users. 0: half the cores that the process may use.
	Count int `koanf:"count" range:"0..256"`
}

// Drain is the stop asked for by SIGTERM.
type Drain struct {
	// Clients are asked to reconnect at moments spread over this window.
	Window time.Duration `koanf:"window" range:"0s..30m" reload:"true"`
	// Connections closed per second after that, with 4002: so fast the other gateways must take them.
	CloseRate int `koanf:"close_rate" range:"1..1000000" reload:"true"`
	// The whole stop takes no longer; what is unsettled then is given up. Must be longer than
	// drain.window; keep it below the time your supervisor waits before it kills.
	Deadline time.Duration `koanf:"deadline" range:"1s..1h" reload:"true"`
}

// Log is the log on standard error.
type Log struct {
	// The least severe level written.
	Level string `koanf:"level" oneof:"trace|debug|info|warn|error" reload:"true"`
	// json: one object per line; console: for people; auto: console on a terminal, json elsewhere.
	Format string `koanf:"format" oneof:"auto|json|console"`
}

// Tracing is OpenTelemetry tracing. A traceparent that comes with a message is handed on in any case.
type Tracing struct {
	// The collector that spans are sent to, by OTLP over gRPC (port 4317 as a rule). Empty: nothing is
	// traced.
	Endpoint string `koanf:"endpoint" check:"hostport"`
	// The part of the traces that begin at this gateway that is recorded, chosen by the trace id. For a
	// trace that comes with a traceparent its sampled flag counts.
	SampleRatio float64 `koanf:"sample_ratio" range:"0..1"`
	// Spans begun per second at the most; what goes beyond is not traced: any client may ask for it. Cost:
	// about 20 us of CPU each.
	SpansPerSecond int `koanf:"spans_per_second" range:"1..1000000"`
	// The name of this service in the traces.
	ServiceName string `koanf:"service_name" required:"true"`
	TLS         TLS    `koanf:"tls"`
}
