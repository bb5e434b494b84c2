package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
)

// The keys in etcd.
const (
	endpointPrefix = "im-gateway"
	topicPrefix    = "im-gateway-topics/"
	ownerPrefix    = "im-gateway-owners/"
)

const (
	defaultDialTimeout = 5 * time.Second
	// etcdTimeout bounds one step of several calls to etcd, readTimeout a single read.
	etcdTimeout = 5 * time.Second
	readTimeout = 3 * time.Second
	// revokeTimeout bounds giving a lease up; one that is not given up expires by itself.
	revokeTimeout = 2 * time.Second
	// minLeaseTTL is what a lease must last to live through the loss of one keep-alive.
	minLeaseTTL = time.Second
)

// reconnect makes a client find an etcd that is back within seconds, as all gateways do: one that comes
// much later than the others finds its topic taken over.
var reconnect = grpc.ConnectParams{
	Backoff:           grpcbackoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
	MinConnectTimeout: 3 * time.Second,
}

// EtcdOptions say how etcd is reached.
type EtcdOptions struct {
	Endpoints          []string
	TLS                *tls.Config // nil: none
	Username, Password string      // empty user: no login
	DialTimeout        time.Duration
}

// Connect returns a client, which the caller closes. It does not wait for etcd, Reachable does; but
// with a user it logs in, and fails when etcd does not let it within DialTimeout (zero: 5 s).
func Connect(o EtcdOptions) (*clientv3.Client, error) {
	if o.DialTimeout == 0 {
		o.DialTimeout = defaultDialTimeout
	}
	cfg := clientv3.Config{
		Endpoints:            o.Endpoints,
		TLS:                  o.TLS,
		DialOptions:          []grpc.DialOption{grpc.WithConnectParams(reconnect)},
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		Logger:               zap.NewNop(), // its retries would flood the log during an outage; ours says what matters
	}
	if o.Username == "" {
		// Without a login a dial timeout would do nothing but delay the failure of the first lease.
		c, err := clientv3.New(cfg)
		if err != nil {
			return nil, fmt.Errorf("connect to etcd at %v: %w", o.Endpoints, err)
		}
		return c, nil
	}
	login, err := clientv3.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("connect to etcd at %v: %w", o.Endpoints, err)
	}
	cfg.Username, cfg.Password, cfg.DialTimeout = o.Username, o.Password, o.DialTimeout
	cfg.DialOptions = []grpc.DialOption{grpc.WithConnectParams(reconnect), grpc.WithChainUnaryInterceptor(loginThrough(login))}
	c, err := clientv3.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("log in to etcd at %v as %s: %w", o.Endpoints, o.Username, errors.Join(err, login.Close()))
	}
	context.AfterFunc(c.Ctx(), func() { _ = login.Close() }) // the caller closes c
	return c, nil
}

// loginThrough sends logins over a client that has not logged in itself. The client sends its token
// with every call, with the login, too, and etcd before 3.5 refuses a login that comes with a token
// which it does not know any more, after a restart; on that refusal the client logs in again, from
// within the login, without end.
func loginThrough(login *clientv3.Client) grpc.UnaryClientInterceptor {
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn,
		invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if method == "/etcdserverpb.Auth/Authenticate" {
			cc = login.ActiveConnection()
		}
		return invoke(ctx, method, req, reply, cc, opts...)
	}
}

// Reachable reads once from etcd.
func Reachable(ctx context.Context, c *clientv3.Client) error {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
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
	b.MaxInterval = 2 * time.Second
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

var errLeaseLost = errors.New("the lease was lost")

// grant makes a lease and calls bind, which puts keys under it. Both have etcdTimeout. When bind fails
// the lease is given up again, for its keys may stand although the answer was lost.
func grant(ctx context.Context, c *clientv3.Client, ttl time.Duration,
	bind func(context.Context, clientv3.LeaseID) error) (clientv3.LeaseID, error) {
	ctx, cancel := context.WithTimeout(ctx, etcdTimeout)
	defer cancel()
	lease, err := c.Grant(ctx, max(1, int64(ttl/time.Second))) // etcd counts in whole seconds
	if err != nil {
		return clientv3.NoLease, fmt.Errorf("grant a lease: %w", err)
	}
	if err := bind(ctx, lease.ID); err != nil {
		return clientv3.NoLease, errors.Join(err, giveUp(ctx, c, lease.ID))
	}
	return lease.ID, nil
}

// giveUp revokes a lease even when ctx has ended.
func giveUp(ctx context.Context, c *clientv3.Client, lease clientv3.LeaseID) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), revokeTimeout)
	defer cancel()
	return revoke(ctx, c, lease)
}

// keep keeps a lease alive until it is lost, which is the error, or ctx ends, which is nil. It calls lives
// each time that etcd says so.
func keep(ctx context.Context, c *clientv3.Client, lease clientv3.LeaseID, lives func()) error {
	alive, err := c.KeepAlive(ctx, lease)
	if err == nil {
		for range alive { // it is closed when the lease does not live on
			lives()
		}
		err = errLeaseLost
	}
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// revoke gives a lease up, and with it the keys bound to it. A lease that is lost needs no giving up.
func revoke(ctx context.Context, c *clientv3.Client, lease clientv3.LeaseID) error {
	if lease == clientv3.NoLease {
		return nil
	}
	if _, err := c.Revoke(ctx, lease); err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return fmt.Errorf("revoke lease %x: %w", lease, err)
	}
	return nil
}

// newLosses returns the counter of losses of one of the gateway's leases.
func newLosses(lease string) prometheus.Counter {
	return prometheus.NewCounter(prometheus.CounterOpts{
		Name:        "im_gateway_registry_lease_losses_total",
		Help:        "How often a lease in etcd was lost: of the gateway's endpoint, or of its ownership of the downstream topic.",
		ConstLabels: prometheus.Labels{"lease": lease},
	})
}

// leaseState is what is known of one of the gateway's leases: for the metrics, and to know whether it may have
// ended. Any goroutine may read it.
type leaseState struct {
	name      string
	ttl       time.Duration
	began     time.Time
	confirmed atomic.Int64 // when etcd last said that it lives, in ns since began; 0: it never has
	losses    prometheus.Counter
}

func newLeaseState(name string, ttl time.Duration) *leaseState {
	return &leaseState{name: name, ttl: ttl, began: time.Now(), losses: newLosses(name)}
}

// confirm notes that the lease lives.
func (l *leaseState) confirm() { l.confirmed.Store(max(1, int64(time.Since(l.began)))) }

// lost notes that it does not.
func (l *leaseState) lost() {
	l.losses.Inc()
	l.confirmed.Store(-int64(2 * l.ttl))
}

// over notes that it was given up.
func (l *leaseState) over() { l.confirmed.Store(0) }

// age is the time since etcd confirmed the lease, or since there is nothing to be confirmed yet.
func (l *leaseState) age() time.Duration {
	return time.Since(l.began) - time.Duration(l.confirmed.Load())
}

// held tells whether it lives, as far as is known.
func (l *leaseState) held() bool { return l.confirmed.Load() > 0 && l.age() <= l.ttl }

// register registers the lease's metrics.
func (l *leaseState) register(r prometheus.Registerer) error {
	gauge := func(name, help string, f func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "im_gateway_registry_lease_" + name, Help: help, ConstLabels: prometheus.Labels{"lease": l.name},
		}, f)
	}
	return register(r, l.losses,
		gauge("held", "1 while a lease in etcd lives, as far as is known: of the gateway's endpoint, or of its ownership of the downstream topic.",
			func() float64 {
				if l.held() {
					return 1
				}
				return 0
			}),
		gauge("age_seconds", "Time since etcd confirmed the lease; it ends when this reaches im_gateway_registry_lease_ttl_seconds.",
			func() float64 { return l.age().Seconds() }),
		gauge("ttl_seconds", "How long the lease lives without being confirmed (etcd.lease_ttl).",
			func() float64 { return l.ttl.Seconds() }))
}

// register registers collectors.
func register(r prometheus.Registerer, collectors ...prometheus.Collector) error {
	if r == nil {
		return errors.New("register metrics: no registerer")
	}
	for _, c := range collectors {
		if err := r.Register(c); err != nil {
			return fmt.Errorf("register metrics: %w", err)
		}
	}
	return nil
}
