package logic

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/rs/zerolog"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	"im-gateway/codec/logicpb"
)

// maxRequest bounds one gRPC request, in bytes: a name, a password or a token.
const maxRequest = 64 << 10

// Service is one im-logic. AddUser, Addr, Ready and Stats may be called from any goroutine.
type Service struct {
	o      Options
	logger zerolog.Logger
	auth   *auth
	counts counts
	chat   *chat // owned by consume
	ready  chan struct{}
	addr   string // written by Run before ready is closed
}

// Stats counts what the service did.
type Stats struct {
	Consumed  int64 // records of the upstream topic
	Malformed int64 // of these, passed over
	Produced  int64 // records for gateways
	Failed    int64 // of these, not produced: the gateway's topic is gone
	Offline   int64 // targets that were not connected
}

// New returns a Service; nothing runs and nothing is connected yet.
func New(o Options) (*Service, error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	t := newTokens(&o)
	u := newUsers(o.Limits.Users, func(id string) bool { return !t.live(id) })
	return &Service{
		o:      o,
		logger: o.Logger,
		auth:   &auth{users: u, tokens: t, logger: o.Logger},
		chat:   newChat(o.Limits, u),
		ready:  make(chan struct{}),
	}, nil
}

// AddUser registers a user as Register does.
func (s *Service) AddUser(ctx context.Context, username, password string) error {
	if _, err := s.auth.users.register(ctx, username, password); err != nil {
		return fmt.Errorf("add the user %q: %w", username, err)
	}
	return nil
}

// Ready is closed once gRPC is served and the service is found in etcd.
func (s *Service) Ready() <-chan struct{} { return s.ready }

// Addr returns where gRPC listens. It may be called after Ready is closed.
func (s *Service) Addr() string { return s.addr }

// Stats returns the counts so far.
func (s *Service) Stats() Stats {
	c := &s.counts
	return Stats{
		Consumed: c.consumed.Load(), Malformed: c.malformed.Load(), Produced: c.produced.Load(),
		Failed: c.failed.Load(), Offline: c.offline.Load(),
	}
}

// Run serves until ctx ends, and returns nil then. It waits for servers that are away, at the start
// as later. It may be called once.
func (s *Service) Run(ctx context.Context) error {
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", s.o.Addr)
	if err != nil {
		return fmt.Errorf("im-logic cannot listen: %w", err)
	}
	s.addr = ln.Addr().String()
	if s.o.Etcd.Logger == nil {
		s.o.Etcd.Logger = zap.NewNop() // failures are logged here, by retry
	}
	etcd, err := clientv3.New(s.o.Etcd)
	if err != nil {
		return errors.Join(fmt.Errorf("etcd client of im-logic: %w", err), ln.Close())
	}
	advertise := s.o.Advertise
	if advertise == "" {
		advertise = s.addr
	}

	group, ctx := errgroup.WithContext(ctx)
	deregistered := make(chan struct{})
	group.Go(func() error {
		defer close(deregistered)
		return s.register(ctx, etcd, advertise, s.announced)
	})
	group.Go(func() error { return s.serve(ctx, ln, deregistered) })
	group.Go(func() error { return ignoreStop(ctx, s.consume(ctx)) })
	err = group.Wait()
	if closeErr := etcd.Close(); closeErr != nil && !errors.Is(closeErr, context.Canceled) {
		err = errors.Join(err, fmt.Errorf("close the etcd client: %w", closeErr))
	}
	return err
}

func (s *Service) announced() {
	select {
	case <-s.ready: // registered again
	default:
		close(s.ready)
	}
}

// serve serves gRPC on ln, which it closes, until ctx has ended and nobody is sent here any more.
func (s *Service) serve(ctx context.Context, ln net.Listener, deregistered <-chan struct{}) error {
	server := grpc.NewServer(
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{
			MinTime: 10 * time.Second, PermitWithoutStream: true,
		}),
	)
	logicpb.RegisterAuthServiceServer(server, s.auth)
	alive := health.NewServer()
	grpc_health_v1.RegisterHealthServer(server, alive)
	served := make(chan error, 1)
	go func() { served <- server.Serve(ln) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve im-logic's gRPC on %s: %w", ln.Addr(), err)
	case <-ctx.Done():
	}
	<-deregistered
	alive.Shutdown()
	late := time.AfterFunc(stopTimeout, server.Stop)
	defer late.Stop()
	server.GracefulStop()
	if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve im-logic's gRPC on %s: %w", ln.Addr(), err)
	}
	return nil
}
