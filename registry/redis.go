package registry

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"time"

	"github.com/redis/rueidis"
)

const (
	redisDialTimeout = 3 * time.Second
	// redisSilence is how long a connection may leave a write or a ping unanswered before it counts as
	// dead.
	redisSilence = 5 * time.Second
	// redisBuffer is what a connection holds either way, in bytes.
	redisBuffer = 64 << 10
	// sentinelRefresh is how often the Sentinels are asked for the master, should the word of a failover
	// get lost.
	sentinelRefresh = 5 * time.Second
)

// RedisOptions say how Redis is reached.
type RedisOptions struct {
	Addrs              []string // one server, the Sentinels, or nodes of a Cluster
	Username, Password string
	SentinelMaster     string // set: Addrs are Sentinels
	// SentinelUsername and SentinelPassword log in to the Sentinels themselves; empty: no login.
	SentinelUsername, SentinelPassword string
	Cluster                            bool        // Addrs are nodes of a Cluster
	TLS                                *tls.Config // nil: none
}

// DialRedis returns a client, connected, or an error when Redis does not answer. It connects again by
// itself after an outage. The caller closes it.
func DialRedis(o RedisOptions) (rueidis.Client, error) {
	dialer := net.Dialer{Timeout: redisDialTimeout, KeepAlive: 15 * time.Second}
	opt := rueidis.ClientOption{
		InitAddress:       o.Addrs,
		Username:          o.Username,
		Password:          o.Password,
		TLSConfig:         o.TLS,
		DisableCache:      true,
		ForceSingleClient: !o.Cluster && o.SentinelMaster == "",
		Dialer:            dialer,
		ConnWriteTimeout:  redisSilence,
		// The default of half a megabyte each is for values far larger than ours.
		ReadBufferEachConn: redisBuffer, WriteBufferEachConn: redisBuffer,
		// One pipelined connection keeps the order of a user's operations.
		PipelineMultiplex: -1,
		// What failed is tried again by the caller, with its newest state.
		DisableRetry: true,
	}
	if o.SentinelMaster != "" {
		opt.Sentinel = rueidis.SentinelOption{
			MasterSet: o.SentinelMaster, TLSConfig: o.TLS, Dialer: dialer,
			Username: o.SentinelUsername, Password: o.SentinelPassword,
			TopologyRefreshInterval: sentinelRefresh,
		}
	}
	c, err := rueidis.NewClient(opt)
	if err != nil {
		return nil, fmt.Errorf("connect to Redis at %v: %w", o.Addrs, err)
	}
	return c, nil
}

// RedisReachable asks Redis once.
func RedisReachable(ctx context.Context, c rueidis.Client) error {
	ctx, cancel := context.WithTimeout(ctx, redisDialTimeout)
	defer cancel()
	if err := c.Do(ctx, c.B().Ping().Build()).Error(); err != nil {
		return fmt.Errorf("ping Redis: %w", err)
	}
	return nil
}
