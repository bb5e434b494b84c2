package main

import (
	"crypto/rand"
	"fmt"
	"net"
	"time"

	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/redis/rueidis"
	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/sasl/plain"
	"github.com/twmb/franz-go/pkg/sasl/scram"
	clientv3 "go.etcd.io/etcd/client/v3"

	"im-gateway/cmd/im-dev/embedded"
	"im-gateway/cmd/im-dev/logic"
	"im-gateway/engine"
)

const (
	// devGatewayID names the gateway of the embedded servers, so that its topic's name can be typed.
	devGatewayID = "im-dev"
	// devDrain is short: who stops im-dev waits at the terminal.
	devDrain = time.Second
)

// loadConfig returns the gateway's configuration. With the embedded servers neither a file nor the
// environment has a say: what is meant for another gateway must not break this one.
func loadConfig(o options, environ []string) (engine.Config, error) {
	from := engine.Sources{Flags: o.keys}
	if o.external {
		from.File, from.Environ = o.config, environ
	} else {
		def := engine.Default()
		for key, value := range map[string]string{
			"gateway_id": devGatewayID,
			"http.addr":  defaultHTTP,
			// Tokens need not outlive this process: its im-logic's users do not either.
			"auth.hs256_secret": rand.Text() + rand.Text(),
			"admin.token":       rand.Text(), // said on standard output
			// Nobody was connected before the start.
			"kafka.start_grace":          "0s",
			"kafka.create_shared_topics": "true",
			"sessions.policy":            "allow:5", // several tabs of one user
			"limits.logins_per_ip":       "0",       // all come from this machine, and some are scripts
			"limits.logins_per_name":     "0",
			"tracing.sample_ratio":       "1", // who names a collector wants to see something
			"drain.window":               devDrain.String(),
			"drain.deadline":             (devDrain + def.Drain.Deadline).String(),
		} {
			if _, given := o.keys[key]; !given {
				o.keys[key] = value
			}
		}
	}
	loaded, err := engine.Load(from)
	if err != nil {
		return engine.Config{}, err
	}
	return loaded.Config, nil
}

// useEmbedded points the gateway at the embedded servers.
func useEmbedded(c *engine.Config, s *embedded.Servers) {
	c.Kafka.Brokers = s.KafkaBrokers()
	c.Redis.Addrs = []string{s.RedisAddr()}
	c.Etcd.Endpoints = s.EtcdEndpoints()
}

// allowPage lets the page call the gateway: its own origin, or every one when other machines may
// open it by names that are not known here.
func allowPage(c *engine.Config, pageAddr string) {
	origins := []string{"*"}
	if host, port, err := net.SplitHostPort(pageAddr); err == nil {
		if ip := net.ParseIP(host); host != "" && (ip == nil || !ip.IsUnspecified()) {
			origins = []string{"http://" + pageAddr}
			if ip.IsLoopback() {
				origins = append(origins, "http://"+net.JoinHostPort("localhost", port))
			}
		}
	}
	c.HTTP.CORSOrigins = append(origins, c.HTTP.CORSOrigins...)
	if len(c.WebSocket.AllowedOrigins) > 0 { // empty: every origin already
		c.WebSocket.AllowedOrigins = append(origins, c.WebSocket.AllowedOrigins...)
	}
}

// logicOptions are those of an im-logic that works with a gateway of this configuration.
func logicOptions(c *engine.Config, addr string, logger zerolog.Logger) (logic.Options, error) {
	o := logic.Options{
		Addr:                  addr,
		UpstreamTopic:         c.Kafka.UpstreamTopic,
		DownstreamTopicPrefix: c.Kafka.DownstreamTopicPrefix,
		Algorithm:             jwa.SignatureAlgorithm(c.Auth.Algorithm),
		Secret:                []byte(c.Auth.HS256Secret),
		Issuer:                c.Auth.Issuer,
		Audience:              c.Auth.Audience,
		Kafka:                 []kgo.Opt{kgo.SeedBrokers(c.Kafka.Brokers...)},
		Redis: rueidis.ClientOption{
			InitAddress: c.Redis.Addrs, Username: c.Redis.Username, Password: c.Redis.Password,
			ForceSingleClient: !c.Redis.Cluster && c.Redis.SentinelMaster == "",
		},
		Etcd: clientv3.Config{
			Endpoints: c.Etcd.Endpoints, Username: c.Etcd.Username, Password: c.Etcd.Password,
			DialTimeout: 5 * time.Second,
		},
		Logger: logger,
	}
	kafkaTLS, err := c.Kafka.TLS.Client()
	if err != nil {
		return o, fmt.Errorf("kafka.tls: %w", err)
	}
	if kafkaTLS != nil {
		o.Kafka = append(o.Kafka, kgo.DialTLSConfig(kafkaTLS))
	}
	user, password := c.Kafka.SASL.Username, c.Kafka.SASL.Password
	switch c.Kafka.SASL.Mechanism {
	case "PLAIN":
		o.Kafka = append(o.Kafka, kgo.SASL(plain.Auth{User: user, Pass: password}.AsMechanism()))
	case "SCRAM-SHA-256":
		o.Kafka = append(o.Kafka, kgo.SASL(scram.Auth{User: user, Pass: password}.AsSha256Mechanism()))
	case "SCRAM-SHA-512":
		o.Kafka = append(o.Kafka, kgo.SASL(scram.Auth{User: user, Pass: password}.AsSha512Mechanism()))
	}
	if o.Redis.TLSConfig, err = c.Redis.TLS.Client(); err != nil {
		return o, fmt.Errorf("redis.tls: %w", err)
	}
	if c.Redis.SentinelMaster != "" {
		o.Redis.Sentinel = rueidis.SentinelOption{MasterSet: c.Redis.SentinelMaster, TLSConfig: o.Redis.TLSConfig}
	}
	if o.Etcd.TLS, err = c.Etcd.TLS.Client(); err != nil {
		return o, fmt.Errorf("etcd.tls: %w", err)
	}
	return o, nil
}

// useLogic makes the gateway call this process's im-logic, which has no TLS, and no other's.
func useLogic(c *engine.Config, addr string) {
	c.Logic.TLS = engine.TLS{}
	if c.Logic.Target != engine.DefaultLogicTarget {
		c.Logic.Target = addr
	}
}
