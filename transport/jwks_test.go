package transport

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/lestrrat-go/jwx/v2/jwk"
	"github.com/lestrrat-go/jwx/v2/jws"
	"github.com/lestrrat-go/jwx/v2/jwt"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
)

// authority publishes keys and signs by them.
type authority struct {
	*httptest.Server
	answer atomic.Pointer[func(http.ResponseWriter)]
	reads  atomic.Int64
}

func newAuthority(t *testing.T) *authority {
	a := &authority{}
	a.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		a.reads.Add(1)
		(*a.answer.Load())(w)
	}))
	t.Cleanup(a.Close)
	return a
}

func (a *authority) says(f func(http.ResponseWriter)) { a.answer.Store(&f) }

// publishes the keys; private parts and all, for a set that is not careful must do no harm.
func (a *authority) publishes(t testing.TB, keys ...jwk.Key) {
	t.Helper()
	set := jwk.NewSet()
	for _, k := range keys {
		if err := set.AddKey(k); err != nil {
			t.Fatal(err)
		}
	}
	b, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	a.says(func(w http.ResponseWriter) { _, _ = w.Write(b) })
}

func jwkOf(t testing.TB, raw any, fields map[string]any) jwk.Key {
	t.Helper()
	k, err := jwk.FromRaw(raw)
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range fields {
		if err := k.Set(name, v); err != nil {
			t.Fatal(err)
		}
	}
	return k
}

func ecKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// issue signs a token of an issuer with a key id.
func issue(t testing.TB, issuer, kid string, alg jwa.SignatureAlgorithm, key any) []byte {
	t.Helper()
	tok, err := jwt.NewBuilder().Issuer(issuer).Claim("user_id", "u").Expiration(time.Now().Add(time.Hour)).Build()
	if err != nil {
		t.Fatal(err)
	}
	h := jws.NewHeaders()
	if kid != "" {
		if err := h.Set("kid", kid); err != nil {
			t.Fatal(err)
		}
	}
	b, err := jwt.Sign(tok, jwt.WithKey(alg, key, jws.WithProtectedHeaders(h)))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestKeySet(t *testing.T) {
	a := newAuthority(t)
	one, two := ecKey(t), ecKey(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	shared := []byte("a symmetric key that someone has published")
	keys := []jwk.Key{
		jwkOf(t, one, map[string]any{"kid": "one", "use": "sig"}),
		jwkOf(t, rsaKey, map[string]any{"kid": "rsa", "alg": "RS256"}),
		jwkOf(t, weak, map[string]any{"kid": "weak"}),
		jwkOf(t, shared, map[string]any{"kid": "shared"}),
		jwkOf(t, two, map[string]any{"kid": "enc", "use": "enc"}),
		jwkOf(t, rsaKey, map[string]any{"kid": "other-alg", "alg": "RS512"}),
	}
	a.publishes(t, keys...)
	set, err := NewKeySet(KeySetOptions{URL: a.URL, Logger: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	defer set.client.CloseIdleConnections()
	v, err := NewVerifier(VerifierOptions{Algorithm: "ES256", Issuer: "first", KeySet: set, Issuers: []Issuer{
		{Name: "second", Algorithms: []string{"RS256", "ES256"}, KeySet: set},
	}})
	if err != nil {
		t.Fatal(err)
	}
	good := func(token []byte) bool { _, err := v.Verify(token); return err == nil }
	if good(issue(t, "first", "one", jwa.ES256, one)) {
		t.Error("taken before the set was read")
	}
	if err := set.Read(t.Context()); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		token []byte
		want  bool
	}{
		"by its id":                         {issue(t, "first", "one", jwa.ES256, one), true},
		"without an id, the only that fits": {issue(t, "first", "", jwa.ES256, one), true},
		"another's key under the id":        {issue(t, "first", "one", jwa.ES256, two), false},
		"a key for encryption":              {issue(t, "first", "enc", jwa.ES256, two), false},
		"unknown id":                        {issue(t, "first", "none", jwa.ES256, one), false},
		"an algorithm that is not allowed":  {issue(t, "first", "rsa", jwa.RS256, rsaKey), false},
		"of the second issuer":              {issue(t, "second", "rsa", jwa.RS256, rsaKey), true},
		"its other algorithm":               {issue(t, "second", "one", jwa.ES256, one), true},
		"a key of another algorithm":        {issue(t, "second", "other-alg", jwa.RS256, rsaKey), false},
		"a weak key":                        {issue(t, "second", "weak", jwa.RS256, weak), false},
		"nobody's":                          {issue(t, "third", "one", jwa.ES256, one), false},
		"without an issuer":                 {issue(t, "", "one", jwa.ES256, one), false},
		"a published secret":                {issue(t, "first", "shared", jwa.HS256, shared), false},
		"HMAC by the public key":            {issue(t, "second", "rsa", jwa.HS256, []byte("x")), false},
	} {
		if got := good(c.token); got != c.want {
			t.Errorf("%s: %t", name, got)
		}
	}
	// Rotation, and the old key is out.
	a.publishes(t, jwkOf(t, two, map[string]any{"kid": "two"}))
	if err := set.Read(t.Context()); err != nil {
		t.Fatal(err)
	}
	if good(issue(t, "first", "one", jwa.ES256, one)) || !good(issue(t, "first", "two", jwa.ES256, two)) {
		t.Error("not the new key alone")
	}
	// A key of a kind that is not known does not hide the others.
	b, err := json.Marshal(jwkOf(t, two, map[string]any{"kid": "two"}))
	if err != nil {
		t.Fatal(err)
	}
	a.says(func(w http.ResponseWriter) {
		_, _ = w.Write([]byte(`{"keys":[{"kty":"AKP","alg":"ML-DSA-44","pub":"AAAA"},` + string(b) + `]}`))
	})
	if err := set.Read(t.Context()); err != nil || !good(issue(t, "first", "two", jwa.ES256, two)) {
		t.Errorf("beside a key of an unknown kind: %v", err)
	}
	// What is no set leaves the last good one.
	for name, f := range map[string]func(http.ResponseWriter){
		"an error": func(w http.ResponseWriter) { w.WriteHeader(500) },
		"no JSON":  func(w http.ResponseWriter) { _, _ = w.Write([]byte("<html>")) },
		"empty":    func(w http.ResponseWriter) { _, _ = w.Write([]byte(`{"keys":[]}`)) },
		"a secret": func(w http.ResponseWriter) { _, _ = w.Write([]byte(`{"keys":[{"kty":"oct","k":"AAAA"}]}`)) },
		"huge":     func(w http.ResponseWriter) { _, _ = w.Write([]byte(`{"keys":[` + strings.Repeat(" ", keySetBytes))) },
		"many": func(w http.ResponseWriter) {
			_, _ = w.Write([]byte(`{"keys":[` + strings.Repeat(`{"kty":"oct","k":"AAAA"},`, 200) + `{"kty":"oct","k":"AAAA"}]}`))
		},
		"interrupted": func(http.ResponseWriter) { panic(http.ErrAbortHandler) },
	} {
		a.says(f)
		if err := set.Read(t.Context()); err == nil {
			t.Errorf("%s was taken", name)
		}
		if !good(issue(t, "first", "two", jwa.ES256, two)) {
			t.Errorf("%s: the last good set is gone", name)
		}
	}
}

// TestKeySetIsReadAgain: at its time, and soon but not at once when tokens name keys that are not there.
func TestKeySetIsReadAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var reads atomic.Int64
		key := ecKey(t)
		b, err := json.Marshal(jwkOf(t, key, map[string]any{"kid": "one"}))
		if err != nil {
			t.Fatal(err)
		}
		down := false
		set, err := NewKeySet(KeySetOptions{URL: "https://user:secret@keys.example/path?key=secret", Refresh: 10 * time.Minute, Logger: zerolog.Nop()})
		if err != nil {
			t.Fatal(err)
		}
		set.client.Transport = roundTrip(func(*http.Request) (*http.Response, error) {
			reads.Add(1)
			if down {
				return nil, context.DeadlineExceeded
			}
			w := httptest.NewRecorder()
			_, _ = w.Write(b)
			return w.Result(), nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _ = set.Run(ctx) }()
		time.Sleep(10*time.Minute + time.Second)
		if n := reads.Load(); n != 1 {
			t.Errorf("%d readings in 10 minutes", n)
		}
		for range 1000 { // a flood of unknown ids, for 60 s
			set.find("none", jwa.ES256)
			time.Sleep(60 * time.Millisecond)
		}
		if n := reads.Load(); n < 5 || n > 8 {
			t.Errorf("%d readings for a minute's flood", n)
		}
		down = true
		if err := set.Read(ctx); err == nil || strings.Contains(err.Error(), "secret") || !strings.Contains(err.Error(), "https://keys.example/path") {
			t.Errorf("the error is %v", err)
		}
		time.Sleep(10 * time.Minute)
		before := reads.Load()
		time.Sleep(time.Minute)
		if n := reads.Load() - before; n < 5 || n > 7 {
			t.Errorf("%d readings in a minute while the URL is away", n)
		}
		if set.find("one", jwa.ES256) == nil {
			t.Error("the last good set is gone")
		}
		cancel()
		synctest.Wait()
	})
}

// TestKeySetIsSlow: a URL that never answers is given up.
func TestKeySetIsSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		set, err := NewKeySet(KeySetOptions{URL: "https://keys.example/"})
		if err != nil {
			t.Fatal(err)
		}
		set.client.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
			<-r.Context().Done()
			return nil, r.Context().Err()
		})
		if err := set.Read(t.Context()); err == nil {
			t.Error("read")
		}
	})
}

// TestKeySetMetrics: two issuers may publish at one URL.
func TestKeySetMetrics(t *testing.T) {
	r := prometheus.NewRegistry()
	for _, issuer := range []string{"", "second"} {
		set, err := NewKeySet(KeySetOptions{URL: "https://keys.example/", Issuer: issuer})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Register(set); err != nil {
			t.Error(err)
		}
	}
	families, err := r.Gather()
	if err != nil || len(families) != 2 { // no age before the first reading
		t.Errorf("%d families, %v", len(families), err)
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestIssuerOptions(t *testing.T) {
	set, err := NewKeySet(KeySetOptions{URL: "http://127.0.0.1:1/"})
	if err != nil {
		t.Fatal(err)
	}
	for name, o := range map[string]VerifierOptions{
		"the same name":        {Algorithm: "ES256", KeySet: set, Issuer: "a", Issuers: []Issuer{{Name: "a", Algorithms: []string{"ES256"}, KeySet: set}}},
		"no name":              {Algorithm: "ES256", KeySet: set, Issuers: []Issuer{{Name: "a", Algorithms: []string{"ES256"}, KeySet: set}}},
		"no algorithm":         {Algorithm: "ES256", KeySet: set, Issuer: "a", Issuers: []Issuer{{Name: "b", KeySet: set}}},
		"a secret's algorithm": {Algorithm: "ES256", KeySet: set, Issuer: "a", Issuers: []Issuer{{Name: "b", Algorithms: []string{"HS256"}, KeySet: set}}},
		"no key":               {Algorithm: "ES256"},
	} {
		if _, err := NewVerifier(o); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	for _, url := range []string{"", "ftp://x/", "http://", "x"} {
		if _, err := NewKeySet(KeySetOptions{URL: url}); err == nil {
			t.Errorf("%q was taken", url)
		}
	}
}

// TestQueryToken: where it is switched off a token in the query is refused, the other ways are not.
func TestQueryToken(t *testing.T) {
	s, _ := start(t, func(o *Options) { o.Settings.RefuseQueryToken = true })
	c := dial(t, s)
	c.send("GET /ws?token=", token(t, "u", time.Hour), " HTTP/1.1\r\n", upgradeLines, "\r\n")
	if resp, body := c.answer(); resp.StatusCode != 401 || !strings.Contains(body, "query") {
		t.Errorf("%s %s", resp.Status, body)
	}
	connect(t, s, "u")
}
