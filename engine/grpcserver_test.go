package engine

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"im-gateway/codec"
	"im-gateway/codec/gatewaypb"
)

// fakeSessions implements Sessions with functions; a nil one is not expected to be called.
type fakeSessions struct {
	push func(context.Context, *codec.Downstream) ([]codec.End, error)
	kick func(user, session string, replaced bool, reason string) (int, error)
	list func(user string) ([]SessionInfo, error)
}

func (f *fakeSessions) Push(ctx context.Context, d *codec.Downstream) ([]codec.End, error) {
	return f.push(ctx, d)
}

func (f *fakeSessions) Kick(_ context.Context, user, session string, replaced bool, reason string) (int, error) {
	return f.kick(user, session, replaced, reason)
}

func (f *fakeSessions) Sessions(_ context.Context, user string) ([]SessionInfo, error) {
	return f.list(user)
}

func (f *fakeSessions) Stats() Stats {
	return Stats{Sessions: 7, Users: 6, Downstream: map[string]int64{"delivered": 5}, Draining: true}
}

func testActing(t *testing.T, token string) *actingToken {
	t.Helper()
	a, err := newActingToken(token, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// grpcServer runs a server on loopback and returns it with a connection to it.
func grpcServer(t *testing.T, sessions Sessions, change func(*GRPCOptions), client *tls.Config) (*GRPCServer, *grpc.ClientConn) {
	t.Helper()
	o := GRPCOptions{
		Addr: "127.0.0.1:0", GatewayID: "g-1", Version: "v9", Sessions: sessions,
		Operator: &gatewaypb.UnimplementedAdminServiceServer{}, Acting: testActing(t, ""),
		Logger: zerolog.Nop(), Registerer: prometheus.NewRegistry(),
	}
	if change != nil {
		change(&o)
	}
	s, err := NewGRPCServer(o)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, ln) }()
	conn, err := grpc.NewClient("passthrough:///"+ln.Addr().String(), grpc.WithTransportCredentials(transportCredentials(client)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	return s, conn
}

func TestPush(t *testing.T) {
	ends := []codec.End{codec.EndDelivered, codec.EndOffline, codec.EndSlowConsumer, codec.EndShutdown}
	got := make(chan *codec.Downstream, 1)
	_, conn := grpcServer(t, &fakeSessions{push: func(_ context.Context, d *codec.Downstream) ([]codec.End, error) {
		got <- d
		return ends, nil
	}}, nil, nil)
	client := gatewaypb.NewGatewayServiceClient(conn)
	users := []string{"a", "b", "c", "d"}
	r, err := client.Push(t.Context(), &gatewaypb.PushRequest{TargetUserIds: users, Data: []byte(`{"x": 1}`)})
	if err != nil {
		t.Fatal(err)
	}
	want := []gatewaypb.PushResult_Outcome{
		gatewaypb.PushResult_OUTCOME_DELIVERED, gatewaypb.PushResult_OUTCOME_OFFLINE,
		gatewaypb.PushResult_OUTCOME_SLOW_CONSUMER, gatewaypb.PushResult_OUTCOME_OFFLINE,
	}
	for i, result := range r.GetResults() {
		if result.GetUserId() != users[i] || result.GetOutcome() != want[i] {
			t.Errorf("result %d: %v, want %s %s", i, result, users[i], want[i])
		}
	}
	d := <-got
	if d.Type != "new-message" || d.MessageID == "" || !slices.Equal(d.Targets, users) ||
		!strings.Contains(string(d.Frame), `"data":{"x": 1}`) || !strings.Contains(string(d.Frame), d.MessageID) {
		t.Errorf("record %+v with frame %s", d, d.Frame)
	}

	at := time.Now().Add(-expirySkew - time.Second).UnixMilli()
	r, err = client.Push(t.Context(), &gatewaypb.PushRequest{TargetUserIds: users, Data: []byte(`1`), ExpireAt: at})
	if err != nil || len(r.GetResults()) != 4 || r.GetResults()[3].GetOutcome() != gatewaypb.PushResult_OUTCOME_EXPIRED {
		t.Errorf("expired: %v %v", r, err)
	}
}

func TestGatewayServiceRefuses(t *testing.T) {
	_, conn := grpcServer(t, &fakeSessions{}, nil, nil)
	client := gatewaypb.NewGatewayServiceClient(conn)
	data := []byte(`{}`)
	for _, tc := range []struct {
		name string
		r    *gatewaypb.PushRequest
	}{
		{"nobody", &gatewaypb.PushRequest{Data: data}},
		{"too many", &gatewaypb.PushRequest{Data: data, TargetUserIds: slices.Repeat([]string{"u"}, maxPushTargets+1)}},
		{"empty user", &gatewaypb.PushRequest{Data: data, TargetUserIds: []string{"a", ""}}},
		{"control character", &gatewaypb.PushRequest{Data: data, TargetUserIds: []string{"a\nb"}}},
		{"long user", &gatewaypb.PushRequest{Data: data, TargetUserIds: []string{strings.Repeat("u", 129)}}},
		{"no data", &gatewaypb.PushRequest{TargetUserIds: []string{"a"}}},
		{"bad data", &gatewaypb.PushRequest{TargetUserIds: []string{"a"}, Data: []byte(`{"a":`)}},
		{"data not UTF-8", &gatewaypb.PushRequest{TargetUserIds: []string{"a"}, Data: []byte("\"\xff\"")}},
		{"kick", &gatewaypb.PushRequest{TargetUserIds: []string{"a"}, Data: data, Type: "kick"}},
		{"long type", &gatewaypb.PushRequest{TargetUserIds: []string{"a"}, Data: data, Type: strings.Repeat("t", 65)}},
		{"message id", &gatewaypb.PushRequest{TargetUserIds: []string{"a"}, Data: data, MessageId: "\x01"}},
	} {
		if _, err := client.Push(t.Context(), tc.r); status.Code(err) != codes.InvalidArgument {
			t.Errorf("push, %s: %v", tc.name, err)
		}
	}
	if _, err := client.Kick(t.Context(), &gatewaypb.KickRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("kick of nobody: %v", err)
	}
	long := &gatewaypb.KickRequest{UserId: "a", Reason: strings.Repeat("r", maxKickReason+1)}
	if _, err := client.Kick(t.Context(), long); status.Code(err) != codes.InvalidArgument {
		t.Errorf("kick with a long reason: %v", err)
	}
	if _, err := client.GetSession(t.Context(), &gatewaypb.GetSessionRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("sessions of nobody: %v", err)
	}
}

func TestKickSessionsStats(t *testing.T) {
	server, conn := grpcServer(t, &fakeSessions{
		kick: func(user, session string, replaced bool, reason string) (int, error) {
			switch user {
			case "slow":
				return 0, context.DeadlineExceeded
			case "stopped":
				return 0, errors.New("stopped")
			case "boom":
				panic("boom")
			}
			if user != "a" || session != "s" || !replaced || reason != "r" {
				t.Errorf("kick of %s %s %t %s", user, session, replaced, reason)
			}
			return 2, nil
		},
		list: func(string) ([]SessionInfo, error) {
			return []SessionInfo{{Name: "s", MessagesIn: 3, State: "open"}}, nil
		},
	}, nil, nil)
	client := gatewaypb.NewGatewayServiceClient(conn)
	k, err := client.Kick(t.Context(), &gatewaypb.KickRequest{UserId: "a", SessionId: "s", Replaced: true, Reason: "r"})
	if err != nil || k.GetClosed() != 2 {
		t.Errorf("kick: %v %v", k, err)
	}
	for user, want := range map[string]codes.Code{
		"slow": codes.DeadlineExceeded, "stopped": codes.Unavailable, "boom": codes.Internal,
	} {
		if _, err := client.Kick(t.Context(), &gatewaypb.KickRequest{UserId: user}); status.Code(err) != want {
			t.Errorf("kick of %s: %v, want %s", user, err, want)
		}
	}
	if n := testutil.ToFloat64(server.panics); n != 1 {
		t.Errorf("%v panics counted", n)
	}
	g, err := client.GetSession(t.Context(), &gatewaypb.GetSessionRequest{UserId: "a"})
	if err != nil || g.GetGatewayId() != "g-1" || len(g.GetSessions()) != 1 || g.GetSessions()[0].GetMessagesIn() != 3 {
		t.Errorf("sessions: %v %v", g, err)
	}
	s, err := client.Stats(t.Context(), &gatewaypb.StatsRequest{})
	if err != nil || s.GetSessions() != 7 || s.GetDownstream()["delivered"] != 5 || !s.GetDraining() || s.GetVersion() != "v9" {
		t.Errorf("stats: %v %v", s, err)
	}
}

func TestGRPCToken(t *testing.T) {
	s, conn := grpcServer(t, &fakeSessions{}, func(o *GRPCOptions) { o.Token = "s3cret"; o.Addr = ":0" }, nil)
	client := gatewaypb.NewGatewayServiceClient(conn)
	for given, want := range map[string]codes.Code{
		"": codes.Unauthenticated, "Bearer": codes.Unauthenticated, "Bearer ": codes.Unauthenticated,
		"Bearer s3cre": codes.Unauthenticated, "Bearer s3cret2": codes.Unauthenticated, "Basic s3cret": codes.Unauthenticated,
		"s3cret": codes.Unauthenticated, "Bearer s3cret": codes.OK, "bearer s3cret": codes.OK,
	} {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", given)
		if _, err := client.Stats(ctx, &gatewaypb.StatsRequest{}); status.Code(err) != want {
			t.Errorf("authorization %q: %v, want %s", given, err, want)
		}
	}
	if _, err := reflectServices(t.Context(), conn); status.Code(err) != codes.Unauthenticated {
		t.Errorf("reflection without a token: %v", err)
	}
	// Probes have no token.
	health := grpc_health_v1.NewHealthClient(conn)
	for _, serving := range []bool{false, true} {
		s.SetServing(serving)
		r, err := health.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: "im.gateway.v1.GatewayService"})
		if err != nil || (r.GetStatus() == grpc_health_v1.HealthCheckResponse_SERVING) != serving {
			t.Errorf("health: %v %v, want serving %t", r, err, serving)
		}
	}
}

func TestGRPCMutualTLS(t *testing.T) {
	dir := t.TempDir()
	cert, key := testCertificate(t, dir, "gateway.test")
	files := GRPCTLS{CertFile: cert, KeyFile: key, CAFile: cert, RequireClientCert: true}
	server, err := files.Server(zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	peer, err := files.Client(zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := TLS{Enabled: true, CAFile: cert}.Client()
	if err != nil {
		t.Fatal(err)
	}
	for want, client := range map[codes.Code]*tls.Config{codes.OK: peer, codes.Unavailable: stranger} {
		_, conn := grpcServer(t, &fakeSessions{}, func(o *GRPCOptions) { o.TLS = server; o.Addr = ":0" }, client)
		_, err := gatewaypb.NewGatewayServiceClient(conn).Stats(t.Context(), &gatewaypb.StatsRequest{})
		if status.Code(err) != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

func TestGRPCRefusesToBeOpen(t *testing.T) {
	for _, addr := range []string{":9080", "0.0.0.0:9080", "10.0.0.1:9080", "[::]:9080", "gateway:9080"} {
		_, err := NewGRPCServer(GRPCOptions{
			Addr: addr, Sessions: &fakeSessions{}, Registerer: prometheus.NewRegistry(),
			Operator: &gatewaypb.UnimplementedAdminServiceServer{}, Acting: testActing(t, ""),
			TLS: &tls.Config{MinVersion: tls.VersionTLS12}, // of the server alone
		})
		if err == nil {
			t.Errorf("a server on %s was made without authentication", addr)
		}
	}
}

// TestGRPCReflection does what grpcurl does: list the services, then the methods of one.
func TestGRPCReflection(t *testing.T) {
	_, conn := grpcServer(t, &fakeSessions{}, nil, nil)
	services, err := reflectServices(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"im.gateway.v1.GatewayService", "im.gateway.v1.AdminService", "grpc.health.v1.Health"} {
		if !slices.Contains(services, want) {
			t.Errorf("services %v lack %s", services, want)
		}
	}
}

func reflectServices(ctx context.Context, conn *grpc.ClientConn) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	stream, err := grpc_reflection_v1.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		return nil, err
	}
	if err := stream.Send(&grpc_reflection_v1.ServerReflectionRequest{
		MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{},
	}); err != nil && !errors.Is(err, io.EOF) { // EOF: the server has refused already, Recv says why
		return nil, err
	}
	answer, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, s := range answer.GetListServicesResponse().GetService() {
		names = append(names, s.GetName())
	}
	return names, nil
}
