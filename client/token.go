package client

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// TokenReason is why a token is asked for.
type TokenReason int

const (
	ToConnect     TokenReason = iota
	TokenExpiring             // the session's will expire soon, or Refresh was called
	TokenRefused              // the last one was refused, or its session was ended for it: another is needed
)

func (r TokenReason) String() string {
	return [...]string{"to connect", "expiring", "refused"}[r]
}

// TokenIn is how the token travels.
type TokenIn int

const (
	InHeader      TokenIn = iota // Authorization: Bearer
	InSubprotocol                // bearer.<token>, as browsers do
	InQuery                      // ?token=, where proxies may log it
)

// refusal is what is known of refused tokens.
type refusal struct {
	token string // the last one, until one is taken; empty: none
	code  int
	why   string
	tries int // other ones, in a row
}

// another notes a connection that ended with a close code, and tells whether it is worth trying with another
// token.
func (r *refusal) another(code int, token, why string) bool {
	if code != codeTokenExpired && code != codeTokenRefused || token == "" || r.tries == tokenTries {
		return false
	}
	r.token, r.code, r.why = token, code, why
	r.tries++
	return true
}

// token asks the caller for one; alone. unlock ends that.
func (c *Client) token(ctx context.Context, why TokenReason) (token string, unlock func(), err error) {
	select {
	case c.refresh <- struct{}{}:
	case <-ctx.Done():
		return "", nil, ctx.Err()
	}
	unlock = func() { <-c.refresh }
	token, err = c.opts.Token(ctx, why)
	if err == nil && token == "" {
		err = errors.New("it is empty")
	}
	if err != nil {
		unlock()
		return "", nil, fmt.Errorf("client: token: %w", err)
	}
	return token, unlock, nil
}

// tokenToConnect is the token for the next connection. One that was refused before is not worth trying.
func (c *Client) tokenToConnect(ctx context.Context, refused *refusal) (string, error) {
	why := ToConnect
	if refused.token != "" {
		why = TokenRefused
	}
	token, unlock, err := c.token(ctx, why)
	if err != nil {
		return "", err
	}
	unlock()
	if token == refused.token {
		return "", &CloseError{Code: refused.code, Reason: refused.why}
	}
	return token, nil
}

// Refresh asks Token for a fresh token and gives it to the gateway, so that the session outlives the old one.
// It returns the new expiry, or ErrNotConnected, a *RefusedError when the gateway keeps the old one, or ctx's
// error. A JWT that is about to expire is refreshed without it: a minute before, or when a fifth of its time is
// left, and again in what is left then; what goes wrong is told to OnError as TOKEN. Without a session none is
// needed: each connect gets its own.
func (c *Client) Refresh(ctx context.Context) (time.Time, error) {
	token, unlock, err := c.token(ctx, TokenExpiring)
	if err != nil {
		return time.Time{}, err
	}
	defer unlock()
	c.mu.Lock()
	s := c.session
	c.mu.Unlock()
	if s == nil {
		return time.Time{}, ErrNotConnected
	}
	return s.refresh(ctx, token)
}

// renew keeps the session's token fresh; expires is zero where that is not known.
func (s *session) renew() {
	expires := s.expires
	for !expires.IsZero() {
		left := time.Until(expires)
		if left < minRenewal || sleep(s.ctx, left-min(time.Minute, left/5)) != nil {
			return // the gateway will end the session, or it has ended
		}
		at, err := s.c.Refresh(s.ctx)
		switch {
		case err == nil:
			expires = at
		case s.ctx.Err() != nil:
			return
		default:
			if _, told := errors.AsType[*RefusedError](err); !told { // by the gateway's own frame
				s.c.report(codeToken, err.Error())
			}
		}
	}
}

const (
	// minRenewal is the shortest time before a token's end in which another one is asked for.
	minRenewal = 100 * time.Millisecond
	codeToken  = "TOKEN" // in OnError: what went wrong with a token
)

// expiry is when a JWT expires; zero when it does not tell.
func expiry(token string) time.Time {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return time.Time{}
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return time.Time{}
	}
	var claims struct {
		Exp float64 `json:"exp"`
	}
	if json.Unmarshal(payload, &claims) != nil || claims.Exp <= 0 || claims.Exp > maxExp {
		return time.Time{}
	}
	return time.UnixMilli(int64(claims.Exp * 1000))
}

const maxExp = 253402300800 // the year 10000, Unix seconds
