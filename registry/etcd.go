package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/rs/zerolog"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// The keys in etcd.
const (
	endpointPrefix = "im-gateway"
	topicPrefix    = "im-gateway-topics/"
	ownerPrefix    = "im-gateway-owners/"
)

// EtcdOptions say how etcd is reached.
type EtcdOptions struct {
	Endpoints          []string
	TLS                *tls.Config // nil: none
	Username, Password string
	DialTimeout        time.Duration // 5 s
	Logger             zerolog.Logger
}

// Connect returns a client. It does not wait for etcd: Reachable does.
func Connect(o EtcdOptions) (*clientv3.Client, error) {
	if o.DialTimeout == 0 {
		o.DialTimeout = 5 * time.Second
	}
	cfg := clientv3.Config{
		Endpoints:            o.Endpoints,
		TLS:                  o.TLS,
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		Logger:               zap.NewNop(), // its retries would flood the log during an outage; ours says what matters
	}
	// With a user name the client logs in before New returns, so that needs a bound.
	if o.Username != "" {
		cfg.Username, cfg.Password, cfg.DialTimeout = o.Username, o.Password, o.DialTimeout
	}
	c, err := clientv3.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("connect to etcd at %v: %w", o.Endpoints, err)
	}
	return c, nil
}

// Reachable reads once from etcd.
func Reachable(ctx context.Context, c *clientv3.Client) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	if _, err := c.Get(ctx, ownerPrefix, clientv3.WithCountOnly()); err != nil {
		return fmt.Errorf("read from etcd: %w", err)
	}
	return nil
}

// retryPolicy tries again without end, soon at first.
func retryPolicy() backoff.BackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval = 200 * time.Millisecond
	b.MaxInterval = 5 * time.Second
	return b
}

// pause waits for d; false: ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// leaseSeconds converts a lease's TTL for etcd, which counts in whole seconds.
func leaseSeconds(ttl time.Duration) int64 { return max(1, int64(ttl/time.Second)) }

// holdLease grants a lease, calls bind with it, and keeps it alive until it is lost or ctx ends. It
// returns the lease and why it ended; the lease is not revoked.
func holdLease(ctx context.Context, c *clientv3.Client, ttl time.Duration,
	bind func(context.Context, clientv3.LeaseID) error) (clientv3.LeaseID, error) {
	askCtx, cancel := context.WithTimeout(ctx, ttl)
	defer cancel()
	grant, err := c.Grant(askCtx, leaseSeconds(ttl))
	if err != nil {
		return 0, fmt.Errorf("grant a lease: %w", err)
	}
	if err := bind(askCtx, grant.ID); err != nil {
		return grant.ID, err
	}
	alive, err := c.KeepAlive(ctx, grant.ID)
	if err != nil {
		return grant.ID, fmt.Errorf("keep lease %x alive: %w", grant.ID, err)
	}
	for range alive {
	}
	if ctx.Err() != nil {
		return grant.ID, context.Cause(ctx)
	}
	return grant.ID, errLeaseLost
}

var errLeaseLost = errors.New("the lease was lost")

// revoke gives a lease up, and with it the keys bound to it.
func revoke(ctx context.Context, c *clientv3.Client, id clientv3.LeaseID) error {
	if id == 0 {
		return nil
	}
	if _, err := c.Revoke(ctx, id); err != nil {
		return fmt.Errorf("revoke lease %x: %w", id, err)
	}
	return nil
}
