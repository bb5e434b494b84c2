package logic

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/lestrrat-go/jwx/v2/jwt"
	"github.com/rs/zerolog"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"im-gateway/codec/logicpb"
)

// newAuth returns the auth service by itself; the clock stands where *now says.
func newAuth(now *time.Time, limits Limits) *auth {
	o := Options{
		Secret: secret, Algorithm: jwa.HS256, AccessTTL: time.Hour, RefreshTTL: 24 * time.Hour, Limits: limits,
		Now: func() time.Time { return *now },
	}
	orDefault(&o.Limits.Users, 100)
	orDefault(&o.Limits.UserTokens, 4)
	t := newTokens(&o)
	return &auth{
		users: newUsers(o.Limits.Users, func(id string) bool { return !t.live(id) }), tokens: t, logger: zerolog.Nop(),
	}
}

func wantCode(t *testing.T, what string, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

const goodPassword = "correct horse"

func TestRegisterRules(t *testing.T) {
	now := time.Now()
	a := newAuth(&now, Limits{})
	for _, tc := range []struct {
		name, username, password string
		want                     codes.Code
	}{
		{"good", "Alice", goodPassword, codes.OK},
		{"the same name", "Alice", goodPassword, codes.AlreadyExists},
		{"the same name in another case", "aLICE", goodPassword, codes.AlreadyExists},
		{"shortest name, longest password", "bo", strings.Repeat("p", 128), codes.OK},
		{"no name", "", goodPassword, codes.InvalidArgument},
		{"one letter", "b", goodPassword, codes.InvalidArgument},
		{"33 letters", strings.Repeat("b", 33), goodPassword, codes.InvalidArgument},
		{"a colon", "b:c", goodPassword, codes.InvalidArgument},
		{"a control character", "bob\n", goodPassword, codes.InvalidArgument},
		{"not ASCII", "bøb", goodPassword, codes.InvalidArgument},
		{"a guest's name", "Guest-1", goodPassword, codes.InvalidArgument},
		{"no password", "carol", "", codes.InvalidArgument},
		{"short password", "carol", "1234567", codes.InvalidArgument},
		{"long password", "carol", strings.Repeat("p", 129), codes.InvalidArgument},
		{"password not UTF-8", "carol", "12345678\xff", codes.InvalidArgument},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := a.Register(t.Context(), &logicpb.RegisterRequest{Username: tc.username, Password: tc.password})
			wantCode(t, "Register", err, tc.want)
			if err != nil && tc.password != "" && strings.Contains(err.Error(), tc.password) {
				t.Error("the answer holds the password")
			}
		})
	}
}

func TestLoginRules(t *testing.T) {
	now := time.Now()
	a := newAuth(&now, Limits{})
	if _, err := a.users.register(t.Context(), "Alice", goodPassword); err != nil {
		t.Fatal(err)
	}
	guest, err := a.GuestLogin(t.Context(), &logicpb.GuestLoginRequest{GuestName: "Gustav"})
	if err != nil {
		t.Fatal(err)
	}
	answers := map[codes.Code]map[string]bool{}
	for _, tc := range []struct {
		name, username, password string
		want                     codes.Code
	}{
		{"good", "Alice", goodPassword, codes.OK},
		{"another case of the name", "alice", goodPassword, codes.OK},
		{"wrong password", "alice", goodPassword + "!", codes.Unauthenticated},
		{"unknown user", "nobody", goodPassword, codes.Unauthenticated},
		{"a guest has no password", guest.GetUser().GetUserId(), "12345678", codes.Unauthenticated},
		{"endless password", "alice", strings.Repeat("p", 1<<20), codes.Unauthenticated},
		{"no name", "", goodPassword, codes.InvalidArgument},
		{"no password", "alice", "", codes.InvalidArgument},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := a.Login(t.Context(), &logicpb.LoginRequest{Username: tc.username, Password: tc.password})
			wantCode(t, "Login", err, tc.want)
			if answers[tc.want] == nil {
				answers[tc.want] = map[string]bool{}
			}
			answers[tc.want][fmt.Sprint(err)] = true
		})
	}
	if len(answers[codes.Unauthenticated]) != 1 {
		t.Errorf("answers tell why a login failed: %v", answers[codes.Unauthenticated])
	}
}

// A login hashes whether its user exists or not, so that it tells nobody who is registered; and it gives up
// waiting for that with its caller.
func TestLoginAlwaysHashes(t *testing.T) {
	now := time.Now()
	a := newAuth(&now, Limits{})
	if _, err := a.users.register(t.Context(), "alice", goodPassword); err != nil {
		t.Fatal(err)
	}
	for range cap(a.users.hashing) { // every place taken
		a.users.hashing <- struct{}{}
	}
	for _, name := range []string{"alice", "nobody"} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		_, err := a.Login(ctx, &logicpb.LoginRequest{Username: name, Password: goodPassword})
		cancel()
		wantCode(t, "Login of "+name, err, codes.DeadlineExceeded)
	}
}

func TestRefreshRotates(t *testing.T) {
	now := time.Now()
	a := newAuth(&now, Limits{})
	first, err := a.GuestLogin(t.Context(), &logicpb.GuestLoginRequest{GuestName: "Gustav"})
	if err != nil {
		t.Fatal(err)
	}
	refresh := func(token string) (*logicpb.TokenResponse, error) {
		return a.RefreshToken(t.Context(), &logicpb.RefreshTokenRequest{RefreshToken: token})
	}
	now = now.Add(time.Minute)
	second, err := refresh(first.GetRefreshToken())
	if err != nil {
		t.Fatal(err)
	}
	if second.GetToken() == first.GetToken() || second.GetRefreshToken() == first.GetRefreshToken() {
		t.Error("a token was given out twice")
	}
	if second.GetExpiresAt() <= first.GetExpiresAt() || second.GetUser().GetUserId() != first.GetUser().GetUserId() {
		t.Errorf("second: %v", second)
	}
	third, err := refresh(second.GetRefreshToken())
	if err != nil {
		t.Fatal(err)
	}
	// A spent token is presented: either it was stolen or what it was exchanged for. Both end.
	_, err = refresh(second.GetRefreshToken())
	wantCode(t, "a spent token", err, codes.Unauthenticated)
	_, err = refresh(third.GetRefreshToken())
	wantCode(t, "the latest token after a spent one", err, codes.Unauthenticated)

	for _, token := range []string{"x", ".", "a.b", strings.Repeat("x", 60_000)} {
		_, err = refresh(token)
		wantCode(t, "an invented token", err, codes.Unauthenticated)
	}
	_, err = refresh("")
	wantCode(t, "no token", err, codes.InvalidArgument)
}

func TestRefreshTokensExpireAndAreRevoked(t *testing.T) {
	now := time.Now()
	a := newAuth(&now, Limits{UserTokens: 2})
	if _, err := a.users.register(t.Context(), "alice", goodPassword); err != nil {
		t.Fatal(err)
	}
	rotate := func(token string) error {
		_, _, err := a.tokens.rotate(token)
		return err
	}
	oldest, old := a.tokens.begin("alice"), a.tokens.begin("alice")
	young := a.tokens.begin("alice") // the third of two
	if rotate(oldest) == nil {
		t.Error("more tokens than allowed")
	}
	if err := rotate(young); err != nil {
		t.Error("the latest login:", err)
	}
	if _, err := a.Logout(t.Context(), &logicpb.LogoutRequest{RefreshToken: old}); err != nil {
		t.Fatal(err)
	}
	if rotate(old) == nil {
		t.Error("logged out, but the token is good")
	}
	if _, err := a.Logout(t.Context(), &logicpb.LogoutRequest{RefreshToken: old}); err != nil {
		t.Error("logged out again:", err)
	}
	_, err := a.Logout(t.Context(), &logicpb.LogoutRequest{})
	wantCode(t, "Logout without a token", err, codes.InvalidArgument)

	late := a.tokens.begin("alice")
	now = now.Add(24 * time.Hour)
	if rotate(late) == nil {
		t.Error("the token outlived its time")
	}
	if a.tokens.live("alice") || len(a.tokens.families) != 0 || len(a.tokens.byUser) != 0 {
		t.Errorf("expired tokens are kept: %d, %d", len(a.tokens.families), len(a.tokens.byUser))
	}
}

func TestOnlyOneOfManyRefreshesWins(t *testing.T) {
	now := time.Now()
	a := newAuth(&now, Limits{})
	token := a.tokens.begin("alice")
	var won sync.Map
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			if _, _, err := a.tokens.rotate(token); err == nil {
				won.Store(i, true)
			}
		})
	}
	wg.Wait()
	n := 0
	won.Range(func(any, any) bool { n++; return true })
	if n != 1 {
		t.Errorf("%d refreshes with one token", n)
	}
}

func TestGuests(t *testing.T) {
	now := time.Now()
	a := newAuth(&now, Limits{Users: 2})
	guest := func(name string) (*logicpb.TokenResponse, error) {
		return a.GuestLogin(t.Context(), &logicpb.GuestLoginRequest{GuestName: name})
	}
	for _, bad := range []string{"", "  ", "a\nb", "\xff", strings.Repeat("ü", 33)} {
		_, err := guest(bad)
		wantCode(t, fmt.Sprintf("%q", bad), err, codes.InvalidArgument)
	}
	one, err := guest(strings.Repeat("ü", 32))
	if err != nil {
		t.Fatal(err)
	}
	two, err := guest("Gustav")
	if err != nil {
		t.Fatal(err)
	}
	if one.GetUser().GetUserId() == two.GetUser().GetUserId() {
		t.Error("two guests with one id")
	}
	_, err = guest("one too many")
	wantCode(t, "beyond the limit", err, codes.ResourceExhausted)
	if n := len(a.tokens.families); n != 2 {
		t.Errorf("%d refresh tokens for 2 guests", n)
	}
	now = now.Add(25 * time.Hour) // nobody can be those guests any more
	if _, err = guest("later"); err != nil {
		t.Error("guests of yesterday keep others out:", err)
	}
	if len(a.users.byID) != 1 {
		t.Errorf("%d users are kept", len(a.users.byID))
	}
}

func TestAccessTokenClaims(t *testing.T) {
	now := time.Now()
	for _, tc := range []struct {
		algorithm        jwa.SignatureAlgorithm
		issuer, audience string
	}{{jwa.HS256, "", ""}, {jwa.HS512, "im-logic", "chat"}} {
		tokens := newTokens(&Options{
			Secret: secret, Algorithm: tc.algorithm, Issuer: tc.issuer, Audience: tc.audience,
			AccessTTL: time.Minute, Now: func() time.Time { return now },
		})
		signed, expires, err := tokens.access("alice")
		if err != nil {
			t.Fatal(err)
		}
		token, err := jwt.Parse([]byte(signed), jwt.WithKey(tc.algorithm, secret))
		if err != nil {
			t.Fatal(err)
		}
		if !token.Expiration().Equal(expires) || token.IssuedAt().Unix() != now.Unix() || token.Issuer() != tc.issuer ||
			strings.Join(token.Audience(), ",") != tc.audience {
			t.Errorf("claims %v", token)
		}
	}
}
