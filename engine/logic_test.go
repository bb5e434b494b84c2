package engine

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"

	"im-gateway/codec/logicpb"
)

// serveLogic serves auth on a loopback port until the test ends.
func serveLogic(t *testing.T, auth *fakeAuth) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	logicpb.RegisterAuthServiceServer(server, auth)
	served := make(chan error, 1)
	go func() { served <- server.Serve(ln) }()
	t.Cleanup(func() {
		server.Stop()
		<-served
	})
	return ln.Addr().String()
}

// TestLogicRoundRobin finds two instances through the resolver and uses both.
func TestLogicRoundRobin(t *testing.T) {
	a, b := &fakeAuth{calls: make(chan string, 100)}, &fakeAuth{calls: make(chan string, 100)}
	r := manual.NewBuilderWithScheme("etcd")
	r.InitialState(resolver.State{Addresses: []resolver.Address{{Addr: serveLogic(t, a)}, {Addr: serveLogic(t, b)}}})
	conn, err := NewLogic(LogicOptions{Target: "etcd:///im-logic", Resolver: r})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := WaitLogic(ctx, conn); err != nil {
		t.Fatal(err)
	}
	client := logicpb.NewAuthServiceClient(conn)
	for len(a.calls) == 0 || len(b.calls) == 0 {
		if _, err := client.Logout(ctx, &logicpb.LogoutRequest{}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestLogicRetries(t *testing.T) {
	auth := &fakeAuth{
		calls: make(chan string, 10),
		login: func(context.Context, *logicpb.LoginRequest) (*logicpb.TokenResponse, error) {
			return nil, status.Error(codes.Unavailable, "later")
		},
		logout: func(context.Context, *logicpb.LogoutRequest) (*logicpb.LogoutResponse, error) {
			return nil, status.Error(codes.Unavailable, "later")
		},
	}
	client := logicpb.NewAuthServiceClient(logicConn(t, auth))
	if _, err := client.Login(t.Context(), &logicpb.LoginRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("login: %v", err)
	}
	if n := len(auth.calls); n != 1 {
		t.Errorf("login was tried %d times, want once", n)
	}
	if _, err := client.Logout(t.Context(), &logicpb.LogoutRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("logout: %v", err)
	}
	if n := len(auth.calls); n != 1+3 {
		t.Errorf("logout was tried %d times, want 3", n-1)
	}
}

func TestWaitLogic(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	_ = ln.Close()
	conn, err := NewLogic(LogicOptions{Target: addr})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := WaitLogic(ctx, conn); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("nobody there: %v", err)
	}
	_ = conn.Close()
	if err := WaitLogic(t.Context(), conn); !errors.Is(err, errLogicClosed) {
		t.Errorf("closed: %v", err)
	}
	if _, err := NewLogic(LogicOptions{Target: "etcd:///im-logic"}); err == nil {
		t.Error("an etcd target was taken without a resolver")
	}
}
