package engine

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"

	"im-gateway/engine/tracing"
)

// etcdScheme begins a logic.target that is found in etcd.
const etcdScheme = "etcd:///"

// logicServiceConfig spreads calls over all instances and retries those that are safe to repeat.
//
// UNAVAILABLE does not say whether im-logic has acted. A call that never left this process, or that
// the server refused unread, is sent again by gRPC itself, whatever stands here. Beyond that only
// Logout is repeated. A repeated Register would answer ALREADY_EXISTS to the user who has just been
// registered; a repeated RefreshToken would present a spent token; a repeated Login or GuestLogin
// would leave a session or a user behind and count a wrong password twice. Their callers get
// UNAVAILABLE and decide.
const logicServiceConfig = `{
  "loadBalancingConfig": [{"round_robin": {}}],
  "methodConfig": [{
    "name": [{"service": "im.logic.v1.AuthService", "method": "Logout"}],
    "retryPolicy": {
      "maxAttempts": 3,
      "initialBackoff": "0.05s",
      "maxBackoff": "0.5s",
      "backoffMultiplier": 2,
      "retryableStatusCodes": ["UNAVAILABLE"]
    }
  }]
}`

const (
	// A server with gRPC's default policy drops clients that ping more than every 5 minutes. Yet a
	// dead peer is noticed sooner: logicKeepaliveTimeout also becomes TCP_USER_TIMEOUT, which ends a
	// connection whose calls are not even acknowledged by the peer's kernel.
	logicKeepalive        = 6 * time.Minute
	logicKeepaliveTimeout = 10 * time.Second

	// logicMaxAnswer is the largest answer, in bytes, that is taken from im-logic.
	logicMaxAnswer = 1 << 20
)

// LogicOptions configure the connection to im-logic.
type LogicOptions struct {
	Target   string           // etcd:///NAME or host:port
	TLS      *tls.Config      // nil: no TLS
	Resolver resolver.Builder // of the etcd scheme; required by an etcd target
	Tracer   *tracing.Tracer  // nil: calls are not traced

	Registerer prometheus.Registerer // nil: without metrics
	// DialOptions are appended, for tests.
	DialOptions []grpc.DialOption
}

// NewLogic returns the connection to im-logic. It does not connect: WaitLogic does. The caller
// closes it.
func NewLogic(o LogicOptions) (*grpc.ClientConn, error) {
	target := o.Target
	if strings.HasPrefix(target, etcdScheme) {
		if o.Resolver == nil {
			return nil, fmt.Errorf("logic.target %s: no etcd resolver", target)
		}
	} else if !strings.Contains(target, "://") {
		target = "dns:///" + target
	}
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(transportCredentials(o.TLS)),
		grpc.WithDefaultServiceConfig(logicServiceConfig),
		grpc.WithDisableServiceConfig(), // none from DNS
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: logicKeepalive, Timeout: logicKeepaliveTimeout}),
		grpc.WithConnectParams(connectParams(5 * time.Second)),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(logicMaxAnswer)),
		grpc.WithUnaryInterceptor(o.Tracer.Client),
		// Users must not wait for the first dial after a quiet night.
		grpc.WithIdleTimeout(0),
	}
	if o.Resolver != nil {
		opts = append(opts, grpc.WithResolvers(o.Resolver))
	}
	if o.Registerer != nil {
		m, err := newRPCs("logic", "to im-logic", o.Registerer)
		if err != nil {
			return nil, err
		}
		opts = append(opts, grpc.WithChainUnaryInterceptor(m.client))
	}
	conn, err := grpc.NewClient(target, append(opts, o.DialOptions...)...)
	if err != nil {
		return nil, fmt.Errorf("client of im-logic at %s: %w", o.Target, err)
	}
	return conn, nil
}

// errLogicClosed is returned by WaitLogic when the connection was closed meanwhile.
var errLogicClosed = errors.New("the connection to im-logic is closed")

// WaitLogic connects and returns once an instance of im-logic can be called, or ctx ends.
func WaitLogic(ctx context.Context, conn *grpc.ClientConn) error {
	conn.Connect()
	for {
		state := conn.GetState()
		switch state {
		case connectivity.Ready:
			return nil
		case connectivity.Shutdown:
			return errLogicClosed
		case connectivity.Idle:
			conn.Connect()
		}
		if !conn.WaitForStateChange(ctx, state) {
			return fmt.Errorf("wait for im-logic (%s): %w", state, context.Cause(ctx))
		}
	}
}

func transportCredentials(c *tls.Config) credentials.TransportCredentials {
	if c == nil {
		return insecure.NewCredentials()
	}
	return credentials.NewTLS(c)
}

// connectParams tries again soon: a server that restarts is back within seconds.
func connectParams(maxDelay time.Duration) grpc.ConnectParams {
	b := backoff.DefaultConfig
	b.BaseDelay = 100 * time.Millisecond
	b.MaxDelay = maxDelay
	return grpc.ConnectParams{Backoff: b, MinConnectTimeout: time.Second}
}
