// Package account logs a user in for the examples, by the gateway's HTTP API.
package account

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"im-gateway/client"
)

// Account is a user of im-logic. Its methods are for one goroutine at a time, as the client calls Token.
type Account struct {
	gateway, user, password string
	refreshToken            string
	http                    http.Client
}

// Flags adds -gateway and -user to the flags of a program; the password is in the environment, where not
// every user of the machine can read it.
func Flags(fs *flag.FlagSet) *Account {
	a := &Account{password: os.Getenv("IM_PASSWORD"), http: http.Client{Timeout: 10 * time.Second}}
	fs.StringVar(&a.gateway, "gateway", "http://127.0.0.1:8080", "address of the gateway")
	fs.StringVar(&a.user, "user", "", "user to log in as; the password is read from IM_PASSWORD")
	return a
}

// Check tells what is missing.
func (a *Account) Check() error {
	switch {
	case a.user == "":
		return errors.New("-user is missing")
	case a.password == "":
		return errors.New("the environment variable IM_PASSWORD is missing")
	case !strings.HasPrefix(a.gateway, "http://") && !strings.HasPrefix(a.gateway, "https://"):
		return errors.New("-gateway must begin with http:// or https://")
	}
	return nil
}

// URL is the address for client.Options.
func (a *Account) URL() string {
	return "ws" + strings.TrimPrefix(strings.TrimSuffix(a.gateway, "/"), "http") + "/ws"
}

// Token is for client.Options: an access token that is good now. A refresh token is used while there is one,
// for im-logic counts logins.
func (a *Account) Token(ctx context.Context, why client.TokenReason) (string, error) {
	if a.refreshToken != "" && why != client.TokenRefused {
		if token, err := a.post(ctx, "/api/auth/refresh", map[string]string{"refreshToken": a.refreshToken}); err == nil {
			return token, nil
		}
		a.refreshToken = ""
	}
	return a.post(ctx, "/api/auth/login", map[string]string{"username": a.user, "password": a.password})
}

func (a *Account) post(ctx context.Context, path string, body map[string]string) (token string, err error) {
	b, err := json.Marshal(body)
	if err != nil {
		return "", err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(a.gateway, "/")+path, bytes.NewReader(b))
	if err != nil {
		return "", err
	}
	resp, err := a.http.Do(r)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	var answer struct {
		Success       bool
		Code, Message string
		Data          struct{ Token, RefreshToken string }
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&answer); err != nil {
		return "", fmt.Errorf("%s answers %s: %w", path, resp.Status, err)
	}
	if !answer.Success {
		return "", fmt.Errorf("%s: %s %s", path, answer.Code, answer.Message)
	}
	a.refreshToken = answer.Data.RefreshToken
	return answer.Data.Token, nil
}
