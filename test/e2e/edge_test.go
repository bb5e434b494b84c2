package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/lestrrat-go/jwx/v2/jwk"
	"github.com/lestrrat-go/jwx/v2/jws"
	"github.com/lestrrat-go/jwx/v2/jwt"
	"github.com/redis/rueidis"
)

// keyPair writes a certificate for localhost with its key and adds it to roots.
func keyPair(t *testing.T, certFile, keyFile string, serial int64, roots *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots.AddCert(leaf)
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{keyFile: {Type: "PRIVATE KEY", Bytes: secret}, certFile: {Type: "CERTIFICATE", Bytes: der}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSecureAndCompressed: WebSocket and HTTP API over TLS, messages compressed both ways by a client of
// another make, and the certificate replaced under way.
func TestSecureAndCompressed(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	roots := x509.NewCertPool()
	keyPair(t, cert, key, 1, roots)
	g := start(t, "secure", settings{
		"http.tls.cert_file": cert, "http.tls.key_file": key, "websocket.compression.enabled": "true",
	})
	config := &tls.Config{RootCAs: roots, ServerName: "localhost"}
	web := &http.Client{Transport: &http.Transport{TLSClientConfig: config}}
	defer web.CloseIdleConnections()
	resp, err := web.Get("https://" + g.addr + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != 200 || resp.ProtoMajor != 1 {
		t.Errorf("%s %s", resp.Proto, resp.Status)
	}
	if resp, err := http.Get("http://" + g.addr + "/healthz"); err != nil || resp.StatusCode != 400 {
		t.Errorf("plain HTTP: %v %v", resp, err)
	} else {
		_ = resp.Body.Close()
	}
	open := func(name string) *client {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		conn, _, err := websocket.Dial(ctx, "wss://"+g.addr+"/ws", &websocket.DialOptions{
			HTTPClient: web, HTTPHeader: http.Header{"Authorization": {"Bearer " + token(t, name, time.Hour)}},
			CompressionMode: websocket.CompressionNoContextTakeover, CompressionThreshold: 64,
		})
		if err != nil {
			t.Fatal(err)
		}
		conn.SetReadLimit(1 << 20)
		t.Cleanup(func() { _ = conn.CloseNow() })
		c := &client{t: t, name: name, Conn: conn}
		c.wait("connected")
		return c
	}
	a, b := open(user("secure")), open(user("secure"))
	content := strings.Repeat("many words that are all the same ", 500)
	a.send("send-message", "m1", map[string]string{"content": content})
	if got := a.ack(); got.Status != "success" {
		t.Fatalf("%+v", got)
	}
	record, err := json.Marshal(map[string]any{"target_user_ids": []string{a.name, b.name}, "data": map[string]string{"content": content}})
	if err != nil {
		t.Fatal(err)
	}
	produce(t, g, "", string(record))
	for _, c := range []*client{a, b} {
		var d struct{ Content string }
		decode(t, c.wait("new-message").Data, &d)
		if d.Content != content {
			t.Errorf("%s got %d bytes", c.name, len(d.Content))
		}
	}
	saved, err := strconv.ParseFloat(g.metric("im_gateway_transport_compression_saved_bytes_total"), 64)
	if err != nil || saved < float64(len(content)) {
		t.Errorf("%v bytes saved, %v", saved, err)
	}
	keyPair(t, cert, key, 2, roots)
	eventually(t, "the new certificate is served", func() bool {
		c, err := tls.Dial("tcp", g.addr, config)
		if err != nil {
			return false
		}
		defer func() { _ = c.Close() }()
		return c.ConnectionState().PeerCertificates[0].SerialNumber.Int64() == 2
	})
	a.send("ping", "", nil)
	a.wait("pong") // who is connected stays so
}

// TestFloodIsClosed: a client beyond its rate is refused, then closed; others do not notice.
func TestFloodIsClosed(t *testing.T) {
	g := start(t, "flood", settings{"limits.messages_per_second": "20"})
	quiet, loud := connect(t, g, user("quiet")), connect(t, g, user("loud"))
	for range 200 {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		err := loud.Write(ctx, websocket.MessageText, []byte(`{"type":"send-message","message_id":"m","data":{}}`))
		cancel()
		if err != nil {
			break
		}
	}
	limited := 0
	for {
		f, err := loud.next()
		if err != nil {
			if code := websocket.CloseStatus(err); code != websocket.StatusPolicyViolation {
				t.Errorf("closed with %v", err)
			}
			break
		}
		var d ack
		decode(t, f.Data, &d)
		if d.Code == "RATE_LIMITED" {
			limited++
		}
	}
	if limited == 0 {
		t.Error("nothing was refused with RATE_LIMITED")
	}
	quiet.send("send-message", "m1", map[string]string{"content": "hello"})
	if got := quiet.ack(); got.Status != "success" {
		t.Errorf("%+v", got)
	}
}

// TestConnectionsOfOneAddress: one more than allowed is answered 429.
func TestConnectionsOfOneAddress(t *testing.T) {
	g := start(t, "crowd", settings{"limits.connections_per_ip": "2", "limits.exempt_networks": "192.0.2.0/24"})
	connect(t, g, user("crowd"))
	connect(t, g, user("crowd"))
	name := user("crowd")
	_, err := dial(t, g, name, "/ws", http.Header{"Authorization": {"Bearer " + token(t, name, time.Hour)}})
	if err == nil || !strings.Contains(err.Error(), "status 429") {
		t.Errorf("the third: %v", err)
	}
	var d net.Dialer // from elsewhere there is room
	d.LocalAddr = &net.TCPAddr{IP: net.IPv4(127, 0, 7, 7)}
	c, err := d.Dial("tcp4", g.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if _, err := c.Write([]byte("GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(patience))
	b := make([]byte, 12)
	if _, err := c.Read(b); err != nil || string(b) != "HTTP/1.1 200" {
		t.Errorf("%q, %v", b, err)
	}
}

// TestDeniedTokens: a token on the deny list, by its name or as one of a user's, is closed at once and
// does not get in again, on any gateway, also on one that starts later.
func TestDeniedTokens(t *testing.T) {
	g := start(t, "deny-1", nil)
	named, all, bystander := user("deny"), user("deny"), user("deny")
	sign := func(name, id string) http.Header {
		tok, err := jwt.NewBuilder().Claim("user_id", name).JwtID(id).IssuedAt(time.Now()).Expiration(time.Now().Add(time.Hour)).Build()
		if err != nil {
			t.Fatal(err)
		}
		b, err := jwt.Sign(tok, jwt.WithKey(jwa.HS256, []byte(secret)))
		if err != nil {
			t.Fatal(err)
		}
		return http.Header{"Authorization": {"Bearer " + hide(string(b))}}
	}
	id := "token-of-" + named
	headers := map[string]http.Header{named: sign(named, id), all: sign(all, ""), bystander: sign(bystander, "another")}
	sessions := map[string]*client{}
	for name, h := range headers {
		c, err := dial(t, g, name, "/ws", h)
		if err != nil {
			t.Fatal(err)
		}
		sessions[name] = c
	}
	cache, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{env.redis}, DisableCache: true})
	if err != nil {
		t.Fatal(err)
	}
	defer cache.Close()
	until := time.Now().Add(time.Hour).Unix()
	for _, member := range []string{"jti:" + id, fmt.Sprintf("user:%d:%s", time.Now().Unix(), all)} {
		for _, cmd := range []rueidis.Completed{
			cache.B().Zadd().Key("im-deny").ScoreMember().ScoreMember(float64(until), member).Build(),
			cache.B().Publish().Channel("im-deny").Message(fmt.Sprintf("%d %s", until, member)).Build(),
		} {
			if err := cache.Do(t.Context(), cmd).Error(); err != nil {
				t.Fatal(err)
			}
		}
	}
	later := start(t, "deny-2", nil)
	for _, name := range []string{named, all} {
		if code := sessions[name].closed(); code != 4501 {
			t.Errorf("%s: closed with %d", name, code)
		}
		for _, g := range []*gateway{g, later} {
			if _, err := dial(t, g, name, "/ws", headers[name]); err == nil || !strings.Contains(err.Error(), "status 401") {
				t.Errorf("%s at %s: %v", name, g.id, err)
			}
		}
		if a := post(t, g, "/api/messages", `{"type":"send-message","message_id":"x","data":{}}`, headers[name]); a.Status != 401 {
			t.Errorf("%s over HTTP: %d", name, a.Status)
		}
	}
	sessions[bystander].send("ping", "", nil)
	sessions[bystander].wait("pong")
	if _, err := dial(t, later, bystander, "/ws", headers[bystander]); err != nil {
		t.Error(err)
	}
}

// TestKeysOfIssuers: tokens of an issuer whose keys are published, beside those of the shared secret;
// rotated under way.
func TestKeysOfIssuers(t *testing.T) {
	var published atomic.Pointer[[]byte]
	publish := func(id string, key *ecdsa.PrivateKey) {
		k, err := jwk.FromRaw(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		if err := k.Set(jwk.KeyIDKey, id); err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(map[string]any{"keys": []jwk.Key{k}})
		if err != nil {
			t.Fatal(err)
		}
		published.Store(&b)
	}
	sign := func(name, issuer, id string, key any, alg jwa.SignatureAlgorithm) http.Header {
		tok, err := jwt.NewBuilder().Issuer(issuer).Claim("user_id", name).Expiration(time.Now().Add(time.Hour)).Build()
		if err != nil {
			t.Fatal(err)
		}
		h := jws.NewHeaders()
		if err := h.Set(jws.KeyIDKey, id); err != nil {
			t.Fatal(err)
		}
		b, err := jwt.Sign(tok, jwt.WithKey(alg, key, jws.WithProtectedHeaders(h)))
		if err != nil {
			t.Fatal(err)
		}
		return http.Header{"Authorization": {"Bearer " + hide(string(b))}}
	}
	keys := make([]*ecdsa.PrivateKey, 2)
	for i := range keys {
		var err error
		if keys[i], err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if b := published.Load(); b != nil {
			_, _ = w.Write(*b)
			return
		}
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	defer web.Close()
	password := hide("password-of-the-key-server")
	url := strings.Replace(web.URL, "http://", "http://gateway:"+password+"@", 1)
	g := launch(t, "issuers", settings{
		"auth.issuer": "https://own.example", "auth.jwks_refresh": "1s",
		"auth.issuers": "issuer=https://login.example algorithms=ES256|RS256 jwks_url=" + url,
	})
	eventually(t, "the start waits for the keys and says so", func() bool {
		resp, err := http.Get("http://" + g.admin + "/readyz")
		if err != nil {
			return false
		}
		defer func() { _ = resp.Body.Close() }()
		b, err := io.ReadAll(resp.Body)
		return err == nil && resp.StatusCode == 503 && strings.Contains(string(b), "jwks") && strings.Contains(string(b), "503 Service Unavailable")
	})
	publish("one", keys[0])
	eventually(t, "gateway is ready", func() bool {
		resp, err := http.Get("http://" + g.admin + "/readyz")
		if err != nil {
			return false
		}
		defer func() { _ = resp.Body.Close() }()
		return resp.StatusCode == 200
	})
	try := func(h http.Header) error {
		name := user("issued")
		c, err := dial(t, g, name, "/ws", h)
		if err == nil {
			_ = c.CloseNow()
		}
		return err
	}
	old := sign(user("issued"), "https://login.example", "one", keys[0], jwa.ES256)
	stays, err := dial(t, g, "stays", "/ws", sign(user("issued"), "https://login.example", "one", keys[0], jwa.ES256))
	if err != nil {
		t.Fatal(err)
	}
	for what, h := range map[string]http.Header{
		"by a published key": old, "by the shared secret": sign(user("issued"), "https://own.example", "", []byte(secret), jwa.HS256),
	} {
		if err := try(h); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, h := range map[string]http.Header{
		"the secret's token of the other issuer": sign(user("issued"), "https://login.example", "", []byte(secret), jwa.HS256),
		"the key's token of our issuer":          sign(user("issued"), "https://own.example", "one", keys[0], jwa.ES256),
		"nobody's":                               sign(user("issued"), "https://evil.example", "one", keys[0], jwa.ES256),
	} {
		if err := try(h); err == nil || !strings.Contains(err.Error(), "status 401") {
			t.Errorf("%s: %v", what, err)
		}
	}
	publish("two", keys[1])
	eventually(t, "the new key is taken", func() bool {
		return try(sign(user("issued"), "https://login.example", "two", keys[1], jwa.ES256)) == nil
	})
	if err := try(old); err == nil {
		t.Error("the old key is still taken")
	}
	stays.send("ping", "", nil)
	stays.wait("pong")
}
