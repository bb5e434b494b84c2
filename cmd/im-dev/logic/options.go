package logic

import (
	"errors"
	"fmt"
	"time"

	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/redis/rueidis"
	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kgo"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// The defaults of Options.
const (
	DefaultAddr                  = "127.0.0.1:0"
	DefaultServiceName           = "im-logic"
	DefaultUpstreamTopic         = "im-upstream-topic"
	DefaultDownstreamTopicPrefix = "im-downstream-topic-"
	DefaultAccessTTL             = time.Hour
	DefaultRefreshTTL            = 14 * 24 * time.Hour
	DefaultLeaseTTL              = 10 * time.Second
)

// Options configure a Service.
type Options struct {
	// Addr is where gRPC listens; Advertise is what is written to etcd, by default the listener's
	// address.
	Addr, Advertise string
	// ServiceName is the name in etcd and the consumer group.
	ServiceName string
	// Kafka holds the seed brokers and, where needed, TLS and SASL; the service adds the rest.
	Kafka []kgo.Opt
	Redis rueidis.ClientOption
	Etcd  clientv3.Config
	// LeaseTTL is how long the entry in etcd outlives a crash, in whole seconds.
	LeaseTTL time.Duration

	UpstreamTopic         string
	DownstreamTopicPrefix string

	// Secret signs the access tokens; Algorithm is HS256 (the default), HS384 or HS512.
	Secret    []byte
	Algorithm jwa.SignatureAlgorithm
	// Issuer and Audience become iss and aud when they are not empty.
	Issuer, Audience string
	// AccessTTL and RefreshTTL are the lives of the tokens. A refresh begins a new life.
	AccessTTL, RefreshTTL time.Duration

	Limits Limits
	Logger zerolog.Logger
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// Limits bound the memory. Zero values stand for the defaults named with each.
type Limits struct {
	Users         int // registered users and guests together: 10,000; beyond it RESOURCE_EXHAUSTED
	UserTokens    int // refresh tokens of one user: 16; beyond it the oldest is revoked
	Conversations int // 10,000; beyond it the one that was quiet for longest is forgotten
	Members       int // of a group: 256; beyond it LIMIT_REACHED
	Messages      int // kept per conversation: 500; beyond it the oldest is forgotten
	HistoryBytes  int // of all messages kept: 64 MiB; beyond it the quietest conversations shrink
	Seen          int // (user_id, client_msg_id) remembered to recognise duplicates: 100,000
}

func orDefault[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

func (o *Options) complete() error {
	orDefault(&o.Addr, DefaultAddr)
	orDefault(&o.ServiceName, DefaultServiceName)
	orDefault(&o.LeaseTTL, DefaultLeaseTTL)
	orDefault(&o.UpstreamTopic, DefaultUpstreamTopic)
	orDefault(&o.DownstreamTopicPrefix, DefaultDownstreamTopicPrefix)
	orDefault(&o.Algorithm, jwa.HS256)
	orDefault(&o.AccessTTL, DefaultAccessTTL)
	orDefault(&o.RefreshTTL, DefaultRefreshTTL)
	orDefault(&o.Limits.Users, 10_000)
	orDefault(&o.Limits.UserTokens, 16)
	orDefault(&o.Limits.Conversations, 10_000)
	orDefault(&o.Limits.Members, 256)
	orDefault(&o.Limits.Messages, 500)
	orDefault(&o.Limits.HistoryBytes, 64<<20)
	orDefault(&o.Limits.Seen, 100_000)
	if o.Now == nil {
		o.Now = time.Now
	}
	var problems []error
	if len(o.Secret) == 0 {
		problems = append(problems, errors.New("no secret to sign tokens with"))
	}
	switch o.Algorithm {
	case jwa.HS256, jwa.HS384, jwa.HS512:
	default:
		problems = append(problems, fmt.Errorf("algorithm %s: only HS256, HS384 and HS512 are supported", o.Algorithm))
	}
	if len(o.Kafka) == 0 {
		problems = append(problems, errors.New("no Kafka brokers"))
	}
	if len(o.Redis.InitAddress) == 0 {
		problems = append(problems, errors.New("no Redis address"))
	}
	if len(o.Etcd.Endpoints) == 0 {
		problems = append(problems, errors.New("no etcd endpoints"))
	}
	if o.LeaseTTL < time.Second {
		problems = append(problems, errors.New("the lease must last a second or more"))
	}
	if err := errors.Join(problems...); err != nil {
		return fmt.Errorf("im-logic: %w", err)
	}
	return nil
}
