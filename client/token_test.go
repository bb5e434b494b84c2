package client

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// The token travels in the way that was asked for, and in no error.
func TestTokenWays(t *testing.T) {
	const secret = "a.b+c/d"
	for name, way := range map[string]TokenIn{"header": InHeader, "subprotocol": InSubprotocol, "query": InQuery} {
		t.Run(name, func(t *testing.T) {
			token := secret
			if way == InSubprotocol {
				token = "a.b-c" // of characters that a header's list may hold
			}
			seen := make(chan string, 1)
			g := newGateway(t, func(_ int, p *peer) {
				seen <- strings.Join([]string{p.r.Header.Get("Authorization"), p.r.Header.Get("Sec-WebSocket-Protocol"), p.r.URL.RawQuery}, " | ")
				p.hello()
				p.acceptAll()
			})
			ask := func(context.Context, TokenReason) (string, error) { return token, nil }
			c := start(t, Options{URLs: []string{g.url() + "?x=1"}, Token: ask, TokenIn: way, DeviceID: "d"})
			stored(t, c.send(t, "m1"))
			want := map[TokenIn]string{
				InHeader:      "Bearer a.b+c/d | im.json.v1 | device_id=d&x=1",
				InSubprotocol: " | im.json.v1,bearer.a.b-c | device_id=d&x=1",
				InQuery:       " | im.json.v1 | device_id=d&token=a.b%2Bc%2Fd&x=1",
			}[way]
			if got := <-seen; got != want {
				t.Errorf("sent %s, want %s", got, want)
			}
			nobody := start(t, Options{URLs: []string{"ws://127.0.0.1:1/ws"}, Token: ask, TokenIn: way})
			if s := nobody.await(t, Reconnecting); strings.Contains(s.Err.Error(), token) || strings.Contains(s.Err.Error(), "a.b%2B") {
				t.Errorf("the error holds the token: %v", s.Err)
			}
		})
	}
}

// jwt is a token that expires so soon; nobody checks its signature here.
func jwt(name string, in time.Duration) string {
	exp := float64(time.Now().Add(in).UnixMilli()) / 1000
	part := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			panic(err)
		}
		return base64.RawURLEncoding.EncodeToString(b)
	}
	return part(map[string]string{"alg": "HS256"}) + "." + part(map[string]any{"sub": name, "exp": exp}) + ".c2ln"
}

// A JWT that is about to expire is replaced in the session, in spite of a callback that fails at first.
func TestTokenIsRenewed(t *testing.T) { formats(t, tokenIsRenewed) }

func tokenIsRenewed(t *testing.T, format Format) {
	renewed := make(chan string, 10)
	g := newGateway(t, func(_ int, p *peer) {
		p.hello()
		for f, ok := p.next(); ok; f, ok = p.next() {
			switch f.Type {
			case typeRefresh:
				renewed <- string(f.Data)
				p.send(`{"type":"token-refreshed","data":{"expires_at":%d}}`, time.Now().Add(time.Hour).UnixMilli())
			default:
				p.accept(f.MessageID)
			}
		}
	})
	var n atomic.Int64
	errs := make(chan string, 10)
	c := start(t, Options{URLs: []string{g.url()}, Format: format,
		Token: func(_ context.Context, why TokenReason) (string, error) {
			switch n.Add(1) {
			case 1:
				return jwt("a", 1500*time.Millisecond), nil
			case 2:
				return "", errors.New("not now")
			}
			if why != TokenExpiring {
				t.Errorf("asked for a token %s", why)
			}
			return jwt("b", time.Hour), nil
		},
		OnError: func(code, message string) { errs <- code + " " + message }})
	stored(t, c.send(t, "m1"))
	select {
	case data := <-renewed:
		if !strings.Contains(data, `{"token":"`+strings.Split(jwt("b", 0), ".")[0]) {
			t.Errorf("renewed by %s", data)
		}
	case <-time.After(patience):
		t.Fatal("not renewed")
	}
	if e := <-errs; e != "TOKEN client: token: not now" {
		t.Errorf("told: %s", e)
	}
	stored(t, c.send(t, "m2"))
	c.stop()
	c.ended(t)
	if g.connections() != 1 || n.Load() != 3 {
		t.Errorf("%d connections, %d tokens", g.connections(), n.Load())
	}
}

// A refresh that the gateway puts off is asked for again.
func TestRefreshIsPutOff(t *testing.T) {
	for _, code := range []string{"RATE_LIMITED", "OVERLOADED"} {
		t.Run(code, func(t *testing.T) {
			renewed := make(chan struct{})
			g := newGateway(t, func(_ int, p *peer) {
				p.hello()
				p.next()
				p.send(`{"type":"error","data":{"code":%q,"message":"why"}}`, code)
				if f, ok := p.next(); ok && f.Type == typeRefresh {
					close(renewed)
				}
				p.send(`{"type":"token-refreshed","data":{"expires_at":%d}}`, time.Now().Add(time.Hour).UnixMilli())
				p.next()
			})
			start(t, Options{URLs: []string{g.url()}, Token: func(context.Context, TokenReason) (string, error) {
				return jwt("a", 1500*time.Millisecond), nil
			}})
			select {
			case <-renewed:
			case <-time.After(patience):
				t.Fatal("not asked again")
			}
		})
	}
}

func TestExpiry(t *testing.T) {
	at := time.UnixMilli(1760000000500)
	for token, want := range map[string]time.Time{
		jwt("a", time.Until(at)): at, "": {}, "opaque": {}, "a.b.c": {}, "a.e30.c": {}, "a." + base64.RawURLEncoding.EncodeToString([]byte(`{"exp":"x"}`)) + ".c": {},
		"a." + base64.RawURLEncoding.EncodeToString([]byte(`{"exp":1e300}`)) + ".c": {}, "a." + base64.RawURLEncoding.EncodeToString([]byte(`{"exp":-1}`)) + ".c": {},
	} {
		if got := expiry(token); got.Sub(want).Abs() > 2*time.Millisecond {
			t.Errorf("%q expires at %s, want %s", token, got, want)
		}
	}
}

// Another token is tried, twice in a row at most; a session that lasts, or that stores a message, is progress.
func TestTokensRefusedInARow(t *testing.T) {
	for _, tc := range []struct {
		name string
		way  func(n int, w http.ResponseWriter) bool // refuses the nth connection
		good int                                     // from this connection on; 0: never
		want int                                     // connections
	}{
		{"the second is good", refuse401, 2, 2},
		{"the third is good", refuse401, 3, 3},
		{"none is", refuse401, 0, 1 + tokenTries},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := newGateway(t, func(_ int, p *peer) { p.hello(); p.acceptAll() })
			g.refuse = func(n int, w http.ResponseWriter, _ *http.Request) bool {
				return (tc.good == 0 || n < tc.good) && tc.way(n, w)
			}
			var n atomic.Int64
			c := start(t, Options{URLs: []string{g.url()}, Token: func(context.Context, TokenReason) (string, error) {
				return fmt.Sprint("t", n.Add(1)), nil
			}})
			if tc.good > 0 {
				stored(t, c.send(t, "m1"))
			} else if err, ok := errors.AsType[*CloseError](c.ended(t)); !ok || err.Code != codeTokenRefused {
				t.Errorf("Run: %v", err)
			}
			if got := g.connections(); got != tc.want {
				t.Errorf("%d connections, want %d", got, tc.want)
			}
		})
	}
}

func refuse401(_ int, w http.ResponseWriter) bool {
	w.WriteHeader(http.StatusUnauthorized)
	fmt.Fprint(w, `{"success":false,"code":"AUTH_FAILED","message":"why"}`)
	return true
}

// However many ask: the callback runs once at a time.
func TestTokenCallbackRunsAlone(t *testing.T) {
	g := newGateway(t, func(n int, p *peer) {
		p.hello()
		for f, ok := p.next(); ok; f, ok = p.next() {
			if f.Type == typeRefresh {
				p.send(`{"type":"token-refreshed","data":{"expires_at":1760000000000}}`)
			}
		}
	})
	var inside, most, calls atomic.Int64
	c := start(t, Options{URLs: []string{g.url()}, Token: func(context.Context, TokenReason) (string, error) {
		calls.Add(1)
		if n := inside.Add(1); n > most.Load() {
			most.Store(n)
		}
		time.Sleep(5 * time.Millisecond)
		inside.Add(-1)
		return "t", nil
	}})
	c.await(t, Connected)
	done := make(chan error, 10)
	for range cap(done) {
		go func() { _, err := c.Refresh(t.Context()); done <- err }()
	}
	for range cap(done) {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if most.Load() != 1 || calls.Load() != 11 {
		t.Errorf("%d calls, %d at once", calls.Load(), most.Load())
	}
}

// A gateway of another protocol is not taken for one that speaks ours.
func TestOtherProtocol(t *testing.T) {
	g := newGateway(t, func(int, *peer) {})
	g.only = Protobuf.subprotocol()
	c := start(t, Options{URLs: []string{g.url()}})
	if s := c.await(t, Reconnecting); !strings.Contains(s.Err.Error(), "im.json.v1") {
		t.Errorf("ended by %v", s.Err)
	}
}
