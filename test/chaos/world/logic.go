package world

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"im-gateway/codec/logicpb"
)

// Mode is how the fake im-logic behaves.
type Mode int32

// The modes.
const (
	Up Mode = iota
	Hang
	Slow
	Wrong // answers without a token and a user
	Fails
)

// Logic is a fake im-logic.
type Logic struct {
	logicpb.UnimplementedAuthServiceServer
	Addr  string
	Calls atomic.Int64
	mode  atomic.Int32
	s     *grpc.Server
}

func startLogic() (*Logic, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("im-logic: %w", err)
	}
	l := &Logic{Addr: ln.Addr().String(), s: grpc.NewServer()}
	logicpb.RegisterAuthServiceServer(l.s, l)
	go func() { _ = l.s.Serve(ln) }() // until close
	return l, nil
}

func (l *Logic) close() { l.s.Stop() }

// Set changes the mode.
func (l *Logic) Set(m Mode) { l.mode.Store(int32(m)) }

// Login implements im.logic.v1.AuthService.
func (l *Logic) Login(ctx context.Context, r *logicpb.LoginRequest) (*logicpb.TokenResponse, error) {
	l.Calls.Add(1)
	switch Mode(l.mode.Load()) {
	case Hang:
		<-ctx.Done()
		return nil, ctx.Err()
	case Slow:
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	case Wrong:
		return &logicpb.TokenResponse{}, nil
	case Fails:
		return nil, status.Error(codes.Internal, "broken")
	}
	token, err := Token(r.GetUsername())
	if err != nil {
		return nil, err
	}
	return &logicpb.TokenResponse{
		Token: token, RefreshToken: "r", ExpiresAt: time.Now().Add(time.Hour).UnixMilli(),
		User: &logicpb.User{UserId: r.GetUsername(), Username: r.GetUsername()},
	}, nil
}

func copyTo(w io.Writer, r *http.Response) error {
	_, err := io.Copy(w, io.LimitReader(r.Body, 8<<20))
	return err
}
