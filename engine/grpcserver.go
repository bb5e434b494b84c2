package engine

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	"im-gateway/codec/gatewaypb"
	"im-gateway/engine/tracing"
)

const (
	// grpcStreams bounds the calls under way on one connection; a caller waits for a free one.
	grpcStreams = 256
	// grpcStop is how long calls under way may take to end when the server stops.
	grpcStop = 2 * time.Second

	healthService = "grpc.health.v1.Health"
)

// GRPCOptions configure the gRPC server.
type GRPCOptions struct {
	Addr       string      // as configured: whether it is loopback decides if authentication is needed
	Token      string      // callers send it as `authorization: Bearer TOKEN`; empty: none needed
	TLS        *tls.Config // nil: no TLS; it may ask for client certificates
	GatewayID  string
	Version    string
	Sessions   Sessions
	Operator   gatewaypb.AdminServiceServer
	Acting     *actingToken    // that AdminService asks for
	Tracer     *tracing.Tracer // nil: calls are not traced
	Logger     zerolog.Logger
	Registerer prometheus.Registerer
}

// GRPCServer serves GatewayService, AdminService, health and reflection. All methods may be called from any
// goroutine.
type GRPCServer struct {
	server *grpc.Server
	health *health.Server
	token  tokenSum
	acting *actingToken
	logger zerolog.Logger
	calls  *rpcs
	panics prometheus.Counter
}

// NewGRPCServer returns a server that is not listening. It refuses to be reachable from other
// machines without authentication.
func NewGRPCServer(o GRPCOptions) (*GRPCServer, error) {
	mutual := o.TLS != nil && o.TLS.ClientAuth == tls.RequireAndVerifyClientCert
	if o.Token == "" && !mutual && !loopback(o.Addr) {
		return nil, fmt.Errorf("gRPC server on %s: a token or client certificates are needed but on loopback", o.Addr)
	}
	if o.Sessions == nil || o.Operator == nil || o.Acting == nil {
		return nil, errors.New("gRPC server: no sessions, or nothing for operators")
	}
	s := &GRPCServer{
		health: health.NewServer(),
		acting: o.Acting,
		logger: o.Logger,
	}
	s.token.use(o.Token)
	var err error
	if s.calls, err = newRPCs("grpc", "to the gRPC server", o.Registerer); err != nil {
		return nil, err
	}
	s.panics = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "im_gateway_grpc_panics_total", Help: "Panics caught in a call to the gRPC server.",
	})
	if err := o.Registerer.Register(s.panics); err != nil {
		return nil, fmt.Errorf("register the metrics of the gRPC server: %w", err)
	}
	calls := []grpc.UnaryServerInterceptor{s.unary}
	if o.Tracer != nil {
		calls = []grpc.UnaryServerInterceptor{o.Tracer.Server, s.unary}
	}
	s.server = grpc.NewServer(
		grpc.Creds(transportCredentials(o.TLS)),
		grpc.ChainUnaryInterceptor(calls...),
		grpc.StreamInterceptor(s.stream),
		grpc.MaxConcurrentStreams(grpcStreams),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{
			MinTime: 10 * time.Second, PermitWithoutStream: true,
		}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second}),
	)
	gatewaypb.RegisterGatewayServiceServer(s.server, newGatewayService(o))
	gatewaypb.RegisterAdminServiceServer(s.server, o.Operator)
	grpc_health_v1.RegisterHealthServer(s.server, s.health)
	reflection.Register(s.server)
	s.SetServing(false)
	return s, nil
}

// useToken changes the token that callers send; empty: none is needed.
func (s *GRPCServer) useToken(token string) { s.token.use(token) }

// SetServing sets what the health service answers.
func (s *GRPCServer) SetServing(serving bool) {
	state := grpc_health_v1.HealthCheckResponse_NOT_SERVING
	if serving {
		state = grpc_health_v1.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus("", state)
	s.health.SetServingStatus(gatewaypb.GatewayService_ServiceDesc.ServiceName, state)
	s.health.SetServingStatus(gatewaypb.AdminService_ServiceDesc.ServiceName, state)
}

// Run serves on ln, which it closes, until ctx ends. Calls under way may end within grpcStop.
func (s *GRPCServer) Run(ctx context.Context, ln net.Listener) error {
	served := make(chan error, 1)
	go func() { served <- s.server.Serve(ln) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve gRPC on %s: %w", ln.Addr(), err)
	case <-ctx.Done():
	}
	s.health.Shutdown()
	ended := make(chan struct{})
	go func() {
		s.server.GracefulStop()
		close(ended)
	}()
	late := time.NewTimer(grpcStop)
	defer late.Stop()
	select {
	case <-ended:
	case <-late.C:
		s.server.Stop()
		<-ended
	}
	if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve gRPC on %s: %w", ln.Addr(), err)
	}
	return nil
}

// unary authenticates, recovers and counts.
func (s *GRPCServer) unary(ctx context.Context, request any, info *grpc.UnaryServerInfo,
	handler grpc.UnaryHandler) (answer any, err error) {
	began := time.Now()
	defer func() { err = s.ended(info.FullMethod, began, recover(), err) }()
	if err := s.authenticate(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	return handler(ctx, request)
}

// stream is as unary.
func (s *GRPCServer) stream(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo,
	handler grpc.StreamHandler) (err error) {
	defer func() { err = s.ended(info.FullMethod, time.Time{}, recover(), err) }()
	if err := s.authenticate(stream.Context(), info.FullMethod); err != nil {
		return err
	}
	return handler(server, stream)
}

// ended counts a call; began is zero for a stream, whose length says nothing.
func (s *GRPCServer) ended(method string, began time.Time, panicked any, err error) error {
	if panicked != nil {
		s.panics.Inc()
		s.logger.Error().Any("panic", panicked).Bytes("stack", debug.Stack()).Str("method", method).Msg("panic in a gRPC call")
		err = status.Error(codes.Internal, "internal error")
	}
	s.calls.ended(method, began, err)
	return err
}

// operatorsLook are the methods of AdminService that change nothing.
var operatorsLook = []string{
	gatewaypb.AdminService_Status_FullMethodName, gatewaypb.AdminService_Ledger_FullMethodName,
	gatewaypb.AdminService_Queues_FullMethodName, gatewaypb.AdminService_TopTalkers_FullMethodName,
	gatewaypb.AdminService_FindUser_FullMethodName, gatewaypb.AdminService_GetLogLevel_FullMethodName,
}

// authenticate checks the shared token. The health service needs none: probes cannot send it. Operators
// may show theirs instead, and have to where they act.
func (s *GRPCServer) authenticate(ctx context.Context, method string) error {
	authorization := ""
	if v := metadata.ValueFromIncomingContext(ctx, "authorization"); len(v) > 0 {
		authorization = v[0]
	}
	if !strings.HasPrefix(method, "/"+gatewaypb.AdminService_ServiceDesc.ServiceName+"/") {
		return s.authenticatePeer(method, authorization)
	}
	if slices.Contains(operatorsLook, method) {
		err := s.authenticatePeer(method, authorization)
		if err == nil || !s.acting.sum.set() {
			return err
		}
	}
	addr := ""
	if p, ok := peer.FromContext(ctx); ok {
		addr = p.Addr.String()
	}
	return s.acting.check(addr, authorization)
}

func (s *GRPCServer) authenticatePeer(method, authorization string) error {
	if !s.token.set() || strings.HasPrefix(method, "/"+healthService+"/") {
		return nil
	}
	if !s.token.is(bearer(authorization)) {
		return status.Error(codes.Unauthenticated, "metadata authorization must be: Bearer and the shared token")
	}
	return nil
}
