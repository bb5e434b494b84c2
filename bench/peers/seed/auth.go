package main

import (
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

const (
	maxUserID    = 128
	subprotocol  = "im.json.v1"
	bearerPrefix = "bearer."
)

var errClaims = errors.New("neither user_id nor sub names a user")

type claims struct {
	UserID string `json:"user_id"`
	jwt.RegisteredClaims
}

type authenticator struct {
	parser *jwt.Parser
	key    jwt.Keyfunc
}

func newAuthenticator(secret []byte) *authenticator {
	return &authenticator{
		parser: jwt.NewParser(jwt.WithValidMethods([]string{"HS256"}), jwt.WithExpirationRequired(), jwt.WithLeeway(30*time.Second)),
		key:    func(*jwt.Token) (any, error) { return secret, nil },
	}
}

// user returns whom the request's token names.
func (a *authenticator) user(r *http.Request) (string, error) {
	var c claims
	if _, err := a.parser.ParseWithClaims(token(r), &c, a.key); err != nil {
		return "", err
	}
	id := c.UserID
	if id == "" {
		id = c.Subject
	}
	if id == "" || len(id) > maxUserID {
		return "", errClaims
	}
	return strings.Clone(id), nil
}

// token finds the token in the header, the subprotocols or the query, in that order.
func token(r *http.Request) string {
	if t, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok {
		return t
	}
	for _, h := range r.Header.Values("Sec-Websocket-Protocol") {
		for p := range strings.SplitSeq(h, ",") {
			if t, ok := strings.CutPrefix(strings.TrimSpace(p), bearerPrefix); ok {
				return t
			}
		}
	}
	return r.URL.Query().Get("token")
}
