package transport

import (
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/lestrrat-go/jwx/v2/jwt"

	"im-gateway/codec"
)

func TestHandshake(t *testing.T) {
	s, _ := start(t, func(o *Options) { o.Settings.AllowedOrigins = []string{"https://good.example"} })
	good := token(t, "alice", time.Hour)
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." +
		base64.RawURLEncoding.EncodeToString([]byte(`{"user_id":"alice","exp":9999999999}`)) + "."
	for _, tc := range []struct {
		name, request string
		status        int
		header, want  string // a header of the answer and its value
		body          string // is in the answer's body
	}{
		{"header", "GET /ws HTTP/1.1\r\n" + upgradeLines + "Authorization: Bearer " + good + "\r\n\r\n", 101, "", "", ""},
		{"query", "GET /ws?token=" + good + " HTTP/1.1\r\n" + upgradeLines + "\r\n", 101, "Sec-WebSocket-Protocol", "", ""},
		{"subprotocol", "GET /ws HTTP/1.1\r\n" + upgradeLines + "Sec-WebSocket-Protocol: im.json.v1, bearer." + good + "\r\n\r\n",
			101, "Sec-WebSocket-Protocol", "im.json.v1", ""},
		{"only bearer", "GET /ws HTTP/1.1\r\n" + upgradeLines + "Sec-WebSocket-Protocol: bearer." + good + "\r\n\r\n", 400, "", "", "im.json.v1"},
		{"none", "GET /ws HTTP/1.1\r\n" + upgradeLines + "\r\n", 401, "WWW-Authenticate", "Bearer", "AUTH_FAILED"},
		{"expired", "GET /ws?token=" + token(t, "alice", -time.Hour) + " HTTP/1.1\r\n" + upgradeLines + "\r\n", 401, "", "", "TOKEN_EXPIRED"},
		{"forged", "GET /ws?token=" + good[:len(good)-3] + "AAA HTTP/1.1\r\n" + upgradeLines + "\r\n", 401, "", "", "AUTH_FAILED"},
		{"alg none", "GET /ws?token=" + none + " HTTP/1.1\r\n" + upgradeLines + "\r\n", 401, "", "", "AUTH_FAILED"},
		{"origin allowed", "GET /ws?token=" + good + " HTTP/1.1\r\nOrigin: https://good.example\r\n" + upgradeLines + "\r\n", 101, "", "", ""},
		{"origin refused", "GET /ws?token=" + good + " HTTP/1.1\r\nOrigin: https://bad.example\r\n" + upgradeLines + "\r\n", 403, "", "", ""},
		{"old version", "GET /ws?token=" + good + " HTTP/1.1\r\n" + strings.Replace(upgradeLines, "Version: 13", "Version: 8", 1) + "\r\n",
			426, "Sec-WebSocket-Version", "13", ""},
		{"no key", "GET /ws?token=" + good + " HTTP/1.1\r\n" + strings.Replace(upgradeLines, "Sec-WebSocket-Key", "X", 1) + "\r\n", 400, "", "", ""},
		{"huge head", "GET /ws HTTP/1.1\r\nX: " + strings.Repeat("x", 9000), 431, "", "", ""},
		{"other path", "GET /other HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", 200, "", "", "GET /other "},
		{"path that begins so", "GET /wsx HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", 200, "", "", "GET /wsx "},
		{"no upgrade", "GET /ws HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", 426, "Sec-WebSocket-Version", "13", "UPGRADE_REQUIRED"},
		{"other method", "POST /ws HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}", 405, "Allow", "GET", "METHOD_NOT_ALLOWED"},
		{"same origin", "GET /ws?token=" + good + " HTTP/1.1\r\nOrigin: https://h\r\n" + upgradeLines + "\r\n", 101, "", "", ""},
		{"key of the wrong size", "GET /ws?token=" + good + " HTTP/1.1\r\n" + strings.Replace(upgradeLines, "dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25jZQ", 1) + "\r\n", 400, "", "", ""},
		{"key no base 64", "GET /ws?token=" + good + " HTTP/1.1\r\n" + strings.Replace(upgradeLines, "dGhl", "!!!!", 1) + "\r\n", 400, "", "", ""},
		{"two hosts", "GET /ws?token=" + good + " HTTP/1.1\r\nHost: a\r\n" + upgradeLines + "\r\n", 400, "", "", ""},
		{"a body", "GET /ws?token=" + good + " HTTP/1.1\r\nContent-Length: 3\r\n" + upgradeLines + "\r\nabc", 400, "", "", ""},
		{"a chunked body", "GET /ws?token=" + good + " HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + upgradeLines + "\r\n", 400, "", "", ""},
		{"folded header", "GET /ws?token=" + good + " HTTP/1.1\r\nX: a\r\n b\r\n" + upgradeLines + "\r\n", 400, "", "", ""},
		{"space before the colon", "GET /ws?token=" + good + " HTTP/1.1\r\nX : a\r\n" + upgradeLines + "\r\n", 400, "", "", ""},
		{"bare line feed", "GET /ws?token=" + good + " HTTP/1.1\r\nX: a\nY: b\r\n" + upgradeLines + "\r\n", 400, "", "", ""},
		{"no connection header", "GET /ws?token=" + good + " HTTP/1.1\r\n" + strings.Replace(upgradeLines, "Connection: Upgrade", "X: y", 1) + "\r\n", 400, "", "", ""},
		{"HTTP/1.0", "GET /ws?token=" + good + " HTTP/1.0\r\n" + upgradeLines + "\r\n", 505, "", "", ""},
		{"two protocol headers", "GET /ws HTTP/1.1\r\n" + upgradeLines + "Sec-WebSocket-Protocol: im.json.v1\r\nSec-WebSocket-Protocol: bearer." + good + "\r\n\r\n",
			101, "Sec-WebSocket-Protocol", "im.json.v1", ""},
		{"not spoken", "GET /ws?token=" + good + " HTTP/1.1\r\n" + upgradeLines + "Sec-WebSocket-Protocol: im.cbor.v1\r\n\r\n", 400, "", "", "im.json.v1"},
		{"im.proto.v1", "GET /ws?token=" + good + " HTTP/1.1\r\n" + upgradeLines + "Sec-WebSocket-Protocol: im.proto.v1\r\n\r\n",
			101, "Sec-WebSocket-Protocol", "im.proto.v1", ""},
		{"the first spoken one", "GET /ws HTTP/1.1\r\n" + upgradeLines + "Sec-WebSocket-Protocol: bearer." + good + ", im.cbor.v1,im.proto.v1, im.json.v1\r\n\r\n",
			101, "Sec-WebSocket-Protocol", "im.proto.v1", ""},
		{"the client's order", "GET /ws?token=" + good + " HTTP/1.1\r\n" + upgradeLines + "Sec-WebSocket-Protocol: im.json.v1\r\nSec-WebSocket-Protocol: im.proto.v1\r\n\r\n",
			101, "Sec-WebSocket-Protocol", "im.json.v1", ""},
		{"foreign protocol", "GET /ws?token=" + good + " HTTP/1.1\r\n" + upgradeLines + "Sec-WebSocket-Protocol: chat\r\n\r\n", 101, "Sec-WebSocket-Protocol", "", ""},
		{"garbage", "\x16\x03\x01\x02\x00\x01\r\n\r\n", 400, "", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := dial(t, s)
			c.send(tc.request)
			resp, body := c.answer()
			if resp.StatusCode != tc.status || !strings.Contains(body, tc.body) {
				t.Errorf("answer %s %q, want %d with %q", resp.Status, body, tc.status, tc.body)
			}
			if tc.header != "" && resp.Header.Get(tc.header) != tc.want {
				t.Errorf("%s: %q, want %q", tc.header, resp.Header.Get(tc.header), tc.want)
			}
		})
	}
}

func TestAuthCloseUpgradesAndCloses(t *testing.T) {
	s, sink := start(t, nil)
	c := dial(t, s)
	c.send("GET /ws?auth=close&token=bad HTTP/1.1\r\n", upgradeLines, "\r\n", text(`{"type":"ping"}`))
	if resp, _ := c.answer(); resp.StatusCode != 101 {
		t.Fatal(resp.Status)
	}
	if code := c.closed(); code != ws.StatusCode(codec.CloseTokenRefused) {
		t.Errorf("closed with %d", code)
	}
	if len(sink.events) > 0 {
		t.Error("a shard was told of a session that never was")
	}
}

// TestHandshakeInPieces sends head and first frame one byte at a time, so the head ends anywhere.
func TestHandshakeInPieces(t *testing.T) {
	s, sink := start(t, nil)
	c := dial(t, s)
	all := "GET /ws HTTP/1.1\r\n" + upgradeLines + "Authorization: Bearer " + token(t, "alice", time.Hour) + "\r\n\r\n" +
		text(`{"type":"ping"}`)
	for i := range len(all) {
		c.send(all[i : i+1])
	}
	if resp, _ := c.answer(); resp.StatusCode != 101 {
		t.Fatal(resp.Status)
	}
	if f := c.read(); !strings.Contains(string(f.Payload), `"pong"`) {
		t.Errorf("got %q", f.Payload)
	}
	if e := sink.next(t, codec.EventOpen); e.Open.User != "alice" || e.Session.Generation() != 1 {
		t.Errorf("opened %+v", e.Open)
	}
}

// TestFrameBehindHandshake: a frame in the same packet as the handshake is not lost.
func TestFrameBehindHandshake(t *testing.T) {
	s, sink := start(t, nil)
	c := dial(t, s)
	c.send("GET /ws?token=", token(t, "bob", time.Hour), " HTTP/1.1\r\n", upgradeLines, "\r\n",
		text(`{"type":"m","message_id":"1","data":{}}`))
	if e := sink.next(t, codec.EventMessage); string(e.Upstream.ClientMsgID) != "1" || e.Upstream.User != "bob" {
		t.Errorf("message %q of %q", e.Upstream.ClientMsgID, e.Upstream.User)
	}
}

func TestSlowVerifierRunsOffTheLoop(t *testing.T) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	v, err := NewVerifier(VerifierOptions{Algorithm: "EdDSA",
		PublicKeyPEM: pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})})
	if err != nil {
		t.Fatal(err)
	}
	if !v.Slow() {
		t.Fatal("EdDSA is checked on the loop")
	}
	s, sink := start(t, func(o *Options) { o.Settings.Verifier = v })
	tok, err := jwt.NewBuilder().Subject("carol").Expiration(time.Now().Add(time.Hour)).Build()
	if err != nil {
		t.Fatal(err)
	}
	signed, err := jwt.Sign(tok, jwt.WithKey(jwa.EdDSA, private))
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, s)
	c.send("GET /ws?token=", string(signed), " HTTP/1.1\r\n", upgradeLines, "\r\n", text(`{"type":"ping"}`))
	if resp, _ := c.answer(); resp.StatusCode != 101 {
		t.Fatal(resp.Status)
	}
	if f := c.read(); !strings.Contains(string(f.Payload), `"pong"`) {
		t.Errorf("got %q", f.Payload)
	}
	if e := sink.next(t, codec.EventOpen); e.Open.User != "carol" {
		t.Errorf("opened %+v", e.Open)
	}
	// The classic confusion: the public key as an HMAC secret.
	confused, err := jwt.Sign(tok, jwt.WithKey(jwa.HS256, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(confused); err == nil {
		t.Error("a token by another algorithm was taken")
	}
}

func TestVerifierClaims(t *testing.T) {
	now := time.Now()
	v, err := NewVerifier(VerifierOptions{Algorithm: "HS256", Secret: []byte("new"), PreviousSecret: []byte("old"),
		Issuer: "iss", Audience: "aud", Leeway: 30 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		change func(*jwt.Builder)
		secret string
		user   string // "": refused
	}{
		{"user_id", func(b *jwt.Builder) { b.Claim("user_id", "u").Subject("s") }, "new", "u"},
		{"sub", func(b *jwt.Builder) { b.Subject("s") }, "new", "s"},
		{"previous secret", func(b *jwt.Builder) { b.Subject("s") }, "old", "s"},
		{"other secret", func(b *jwt.Builder) { b.Subject("s") }, "other", ""},
		{"within leeway", func(b *jwt.Builder) { b.Subject("s").Expiration(now.Add(-20 * time.Second)) }, "new", "s"},
		{"past leeway", func(b *jwt.Builder) { b.Subject("s").Expiration(now.Add(-40 * time.Second)) }, "new", ""},
		{"not yet", func(b *jwt.Builder) { b.Subject("s").NotBefore(now.Add(time.Minute)) }, "new", ""},
		{"issuer", func(b *jwt.Builder) { b.Subject("s").Issuer("other") }, "new", ""},
		{"audience", func(b *jwt.Builder) { b.Subject("s").Audience([]string{"other"}) }, "new", ""},
		{"no user", func(*jwt.Builder) {}, "new", ""},
		{"user_id no string", func(b *jwt.Builder) { b.Claim("user_id", 7).Subject("s") }, "new", ""},
		{"control character", func(b *jwt.Builder) { b.Subject("a\nb") }, "new", ""},
		{"too long", func(b *jwt.Builder) { b.Subject(strings.Repeat("u", 129)) }, "new", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := jwt.NewBuilder().Issuer("iss").Audience([]string{"aud"}).Expiration(now.Add(time.Hour))
			tc.change(b)
			tok, err := b.Build()
			if err != nil {
				t.Fatal(err)
			}
			signed, err := jwt.Sign(tok, jwt.WithKey(jwa.HS256, []byte(tc.secret)))
			if err != nil {
				t.Fatal(err)
			}
			who, err := v.Verify(signed)
			if who.User != tc.user || (err == nil) != (tc.user != "") {
				t.Errorf("Verify: %+v, %v", who, err)
			}
		})
	}
	tok, err := jwt.NewBuilder().Subject("s").Issuer("iss").Audience([]string{"aud"}).Build()
	if err != nil {
		t.Fatal(err)
	}
	signed, err := jwt.Sign(tok, jwt.WithKey(jwa.HS256, []byte("new")))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(signed); err == nil {
		t.Error("a token without exp was taken")
	}
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	if _, err := v.FromRequest(r); err == nil {
		t.Error("a request without a token was taken")
	}
}

func TestHTTPThenUpgradeOnOneConnection(t *testing.T) {
	s, sink := start(t, nil)
	c := dial(t, s)
	// Two pipelined requests, one with a chunked body after Expect, then the upgrade with a frame behind it.
	c.send("GET /a HTTP/1.1\r\nHost: h\r\n\r\nGET /b HTTP/1.1\r\nHost: h\r\n\r\n")
	for _, want := range []string{"GET /a ", "GET /b "} {
		if _, body := c.answer(); body != want {
			t.Errorf("body %q, want %q", body, want)
		}
	}
	c.send("POST /c HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n")
	if resp, _ := c.answer(); resp.StatusCode != 100 {
		t.Fatalf("no 100 Continue but %s", resp.Status)
	}
	c.send("3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
	if _, body := c.answer(); body != "POST /c abcde" {
		t.Errorf("body %q", body)
	}
	c.send("GET /ws HTTP/1.1\r\n", upgradeLines, "Authorization: Bearer ", token(t, "dave", time.Hour), "\r\n\r\n",
		text(`{"type":"ping"}`), text(`{"type":"m","message_id":"1","data":1}`)[:9])
	if resp, body := c.answer(); resp.StatusCode != 101 {
		t.Fatalf("%s %s", resp.Status, body)
	}
	if f := c.read(); !strings.Contains(string(f.Payload), `"pong"`) {
		t.Errorf("got %q", f.Payload)
	}
	if e := sink.next(t, codec.EventOpen); e.Open.User != "dave" {
		t.Errorf("opened %+v", e.Open)
	}
}

// TestUnfinishedFrameAcrossTheHandBack sends a frame cut in two, its first half read by net/http.
func TestUnfinishedFrameAcrossTheHandBack(t *testing.T) {
	s, sink := start(t, nil)
	c := dial(t, s)
	c.send("GET /a HTTP/1.1\r\nHost: h\r\n\r\n")
	c.answer()
	m := text(`{"type":"m","message_id":"1","data":1}`)
	c.send("GET /ws?token=", token(t, "erin", time.Hour), " HTTP/1.1\r\n", upgradeLines, "\r\n", m[:3])
	if resp, _ := c.answer(); resp.StatusCode != 101 {
		t.Fatal(resp.Status)
	}
	c.send(m[3:])
	if e := sink.next(t, codec.EventMessage); string(e.Upstream.Value) == "" {
		t.Error("no message")
	}
}

func TestConnectionCap(t *testing.T) {
	s, _ := start(t, func(o *Options) { o.Settings.MaxConnections = 2 })
	connect(t, s, "a")
	second := connect(t, s, "b")
	if resp, _ := dial(t, s).answer(); resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" {
		t.Errorf("beyond the cap: %s", resp.Status)
	}
	_ = second.Close()
	eventually(t, func() bool { return s.Connections() == 1 })
	connect(t, s, "c")
}

func TestHandshakeTimeout(t *testing.T) {
	s, _ := start(t, func(o *Options) { o.HandshakeTimeout = 200 * time.Millisecond })
	c := dial(t, s)
	c.send("GET /ws HTTP/1.1\r\nHost: h")
	if resp, _ := c.answer(); resp.StatusCode != 408 {
		t.Errorf("unfinished head: %s", resp.Status)
	}
}

// TestIdleSessionsCostNoGoroutines: 5,000 sessions, half of them opened on a connection that net/http had
// before, and every third an event stream.
func TestIdleSessionsCostNoGoroutines(t *testing.T) {
	s, sink := start(t, nil)
	warm := dial(t, s)
	warm.send("GET /a HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
	warm.answer()
	before := runtime.NumGoroutine()
	const n = 5000
	for i := range n {
		c := dial(t, s)
		if i%2 == 0 {
			c.send("GET /a HTTP/1.1\r\nHost: h\r\n\r\n")
			if _, body := c.answer(); body != "GET /a " {
				t.Fatalf("body %q", body)
			}
		}
		auth := "Authorization: Bearer " + token(t, "u"+strings.Repeat("x", i%20), time.Hour) + "\r\n\r\n"
		if i%3 == 0 {
			c.send("GET /sse HTTP/1.1\r\n", streamLines, auth)
			c.opened()
			continue
		}
		c.send("GET /ws HTTP/1.1\r\n", upgradeLines, auth)
		if resp, _ := c.answer(); resp.StatusCode != 101 {
			t.Fatal(resp.Status)
		}
	}
	opened := map[codec.SessionID]bool{}
	for range n {
		opened[sink.next(t, codec.EventOpen).Session] = true
	}
	if len(opened) != n {
		t.Errorf("%d different sessions, want %d", len(opened), n)
	}
	eventually(t, func() bool { return runtime.NumGoroutine() <= before+2 })
}

func eventually(t testing.TB, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatal("it did not come true")
		}
		runtime.Gosched()
	}
}
