package logic

import (
	"context"
	"errors"

	"github.com/rs/zerolog"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"im-gateway/codec/logicpb"
)

// auth implements im.logic.v1.AuthService. All methods may be called from any goroutine.
type auth struct {
	logicpb.UnimplementedAuthServiceServer
	users  *users
	tokens *tokens
	logger zerolog.Logger
}

var _ logicpb.AuthServiceServer = (*auth)(nil)

// Register creates a user.
func (a *auth) Register(ctx context.Context, r *logicpb.RegisterRequest) (*logicpb.RegisterResponse, error) {
	u, err := a.users.register(ctx, r.GetUsername(), r.GetPassword())
	if err != nil {
		return nil, a.status("register", err)
	}
	return &logicpb.RegisterResponse{User: public(u)}, nil
}

// Login exchanges a user name and password for tokens.
func (a *auth) Login(ctx context.Context, r *logicpb.LoginRequest) (*logicpb.TokenResponse, error) {
	u, err := a.users.login(ctx, r.GetUsername(), r.GetPassword())
	if err != nil {
		return nil, a.status("login", err)
	}
	return a.issue(u, a.tokens.begin(u.id))
}

// GuestLogin creates a user without a password and returns its tokens.
func (a *auth) GuestLogin(_ context.Context, r *logicpb.GuestLoginRequest) (*logicpb.TokenResponse, error) {
	u, err := newGuest(r.GetGuestName())
	if err != nil {
		return nil, a.status("guest", err)
	}
	refresh := a.tokens.begin(u.id) // first, for a guest without one may be forgotten
	if err := a.users.add(u); err != nil {
		a.tokens.end(refresh)
		return nil, a.status("guest", err)
	}
	return a.issue(u, refresh)
}

// RefreshToken spends a refresh token and returns new tokens.
func (a *auth) RefreshToken(_ context.Context, r *logicpb.RefreshTokenRequest) (*logicpb.TokenResponse, error) {
	if r.GetRefreshToken() == "" {
		return nil, a.status("refresh", fieldError("refresh_token must not be empty"))
	}
	id, next, err := a.tokens.rotate(r.GetRefreshToken())
	if err != nil {
		return nil, a.status("refresh", err)
	}
	u := a.users.get(id)
	if u == nil { // a guest that was forgotten meanwhile
		a.tokens.end(next)
		return nil, a.status("refresh", errRefresh)
	}
	return a.issue(u, next)
}

// Logout revokes a refresh token, and with it those that it was exchanged for.
func (a *auth) Logout(_ context.Context, r *logicpb.LogoutRequest) (*logicpb.LogoutResponse, error) {
	if r.GetRefreshToken() == "" {
		return nil, a.status("logout", fieldError("refresh_token must not be empty"))
	}
	a.tokens.end(r.GetRefreshToken())
	return &logicpb.LogoutResponse{}, nil
}

func (a *auth) issue(u *user, refresh string) (*logicpb.TokenResponse, error) {
	token, expires, err := a.tokens.access(u.id)
	if err != nil {
		return nil, a.status("issue", err)
	}
	return &logicpb.TokenResponse{
		Token: token, RefreshToken: refresh, ExpiresAt: expires.UnixMilli(), User: public(u),
	}, nil
}

// status maps an error to the code that the service's contract names.
func (a *auth) status(call string, err error) error {
	switch {
	case errors.Is(err, errInput):
		return status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, errTaken):
		return status.Error(codes.AlreadyExists, err.Error())
	case errors.Is(err, errWrong), errors.Is(err, errRefresh):
		return status.Error(codes.Unauthenticated, err.Error())
	case errors.Is(err, errFull):
		return status.Error(codes.ResourceExhausted, err.Error())
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	}
	a.logger.Error().Err(err).Str("call", call).Msg("authentication failed by itself")
	return status.Error(codes.Internal, "internal error")
}

func public(u *user) *logicpb.User { return &logicpb.User{UserId: u.id, Username: u.name} }
