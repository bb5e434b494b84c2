package main

import (
	"errors"
	"flag"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/viper"
)

// config is read from flags and, where a flag is not given, from the environment: SEED_KAFKA for
// -kafka.
type config struct {
	Addr       string
	Admin      string
	GatewayID  string
	Secret     []byte
	Kafka      []string
	Redis      string
	Upstream   string
	Downstream string // topic prefix

	UpstreamPartitions   int
	DownstreamPartitions int

	BatchTimeout time.Duration
	BatchSize    int
	MinBytes     int
	MaxWait      time.Duration
	Inflight     int
	SendQueue    int
}

func loadConfig(args []string) (config, error) {
	fs := flag.NewFlagSet("seed", flag.ContinueOnError)
	fs.String("addr", "127.0.0.1:8080", "address of /ws")
	fs.String("admin", "", "address of /readyz, /stats and /debug/pprof; empty: none")
	fs.String("gateway-id", "seed-1", "names the downstream topic")
	fs.String("secret", "", "HS256 secret of the tokens")
	fs.String("kafka", "127.0.0.1:9092", "brokers, separated by commas")
	fs.String("redis", "127.0.0.1:6379", "Redis")
	fs.String("upstream-topic", "im-upstream-topic", "topic of what clients send")
	fs.String("downstream-prefix", "im-downstream-topic-", "the downstream topic's name without the gateway's id")
	fs.Int("upstream-partitions", 16, "partitions of the upstream topic when it is missing")
	fs.Int("downstream-partitions", 4, "partitions of the downstream topic when it is missing")
	fs.Duration("batch-timeout", 10*time.Millisecond, "how long a batch waits to be filled")
	fs.Int("batch-size", 100, "records in a batch")
	fs.Int("fetch-min-bytes", 1, "least bytes in a fetch, unless the wait is over")
	fs.Duration("fetch-max-wait", 10*time.Second, "how long the broker holds back a fetch that has less; also kafka-go's read deadline, so keep it well above a second")
	fs.Int("inflight", 100_000, "messages waiting for Kafka before further ones are refused")
	fs.Int("send-queue", 256, "frames waiting for one connection before further ones are dropped")
	if err := fs.Parse(args); err != nil {
		return config{}, err
	}
	v := viper.New()
	v.SetEnvPrefix("seed")
	v.SetEnvKeyReplacer(strings.NewReplacer("-", "_"))
	v.AutomaticEnv()
	fs.VisitAll(func(f *flag.Flag) { v.SetDefault(f.Name, f.DefValue) })
	fs.Visit(func(f *flag.Flag) { v.Set(f.Name, f.Value.String()) })
	c := config{
		Addr: v.GetString("addr"), Admin: v.GetString("admin"), GatewayID: v.GetString("gateway-id"),
		Secret: []byte(v.GetString("secret")), Kafka: strings.Split(v.GetString("kafka"), ","), Redis: v.GetString("redis"),
		Upstream: v.GetString("upstream-topic"), Downstream: v.GetString("downstream-prefix"),
		UpstreamPartitions: v.GetInt("upstream-partitions"), DownstreamPartitions: v.GetInt("downstream-partitions"),
		BatchTimeout: v.GetDuration("batch-timeout"), BatchSize: v.GetInt("batch-size"),
		MinBytes: v.GetInt("fetch-min-bytes"), MaxWait: v.GetDuration("fetch-max-wait"),
		Inflight: v.GetInt("inflight"), SendQueue: v.GetInt("send-queue"),
	}
	if len(c.Secret) == 0 {
		return c, errors.New("no -secret")
	}
	if c.GatewayID == "" || c.BatchSize < 1 || c.MinBytes < 1 || c.Inflight < 1 || c.SendQueue < 1 {
		return c, fmt.Errorf("-gateway-id, -batch-size, -fetch-min-bytes, -inflight and -send-queue are needed")
	}
	return c, nil
}
