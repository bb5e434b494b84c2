package transport

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/lestrrat-go/jwx/v2/jws"
	"github.com/lestrrat-go/jwx/v2/jwt"
)

// pemOf is the public key as a PEM file holds it.
func pemOf(t testing.TB, key crypto.PublicKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

func signed(t testing.TB, alg jwa.SignatureAlgorithm, key any) []byte {
	t.Helper()
	tok, err := jwt.NewBuilder().Subject("alice").Expiration(time.Now().Add(time.Hour)).Build()
	if err != nil {
		t.Fatal(err)
	}
	b, err := jwt.Sign(tok, jwt.WithKey(alg, key))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// handmade signs any header and claims by HS256.
func handmade(header, claims string) []byte {
	input := base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString([]byte(claims))
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(input))
	return []byte(input + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil)))
}

func TestVerifierAlgorithms(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	edPublic, edPrivate, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaPEM, p256PEM, edPEM := pemOf(t, &rsaKey.PublicKey), pemOf(t, &p256.PublicKey), pemOf(t, edPublic)
	pkcs1 := pem.EncodeToMemory(&pem.Block{Type: "RSA PUBLIC KEY", Bytes: x509.MarshalPKCS1PublicKey(&rsaKey.PublicKey)})
	tokens := map[string][]byte{
		"HS256": signed(t, jwa.HS256, secret), "HS384": signed(t, jwa.HS384, secret), "HS512": signed(t, jwa.HS512, secret),
		"RS256": signed(t, jwa.RS256, rsaKey), "ES256": signed(t, jwa.ES256, p256), "EdDSA": signed(t, jwa.EdDSA, edPrivate),
		// What a verifier that trusts the token's header would take.
		"HS256 by the RSA key's PEM": signed(t, jwa.HS256, rsaPEM), "HS256 by the EC key's PEM": signed(t, jwa.HS256, p256PEM),
		"HS256 by the Ed key's PEM": signed(t, jwa.HS256, edPEM), "HS256 by the Ed key": signed(t, jwa.HS256, []byte(edPublic)),
		"HS256 by nothing": signed(t, jwa.HS256, []byte{0}),
	}
	for _, o := range []VerifierOptions{
		{Algorithm: "HS256", Secret: secret}, {Algorithm: "HS384", Secret: secret}, {Algorithm: "HS512", Secret: secret},
		{Algorithm: "RS256", PublicKeyPEM: rsaPEM}, {Algorithm: "RS256", PublicKeyPEM: pkcs1},
		{Algorithm: "ES256", PublicKeyPEM: p256PEM}, {Algorithm: "EdDSA", PublicKeyPEM: edPEM},
	} {
		v, err := NewVerifier(o)
		if err != nil {
			t.Fatal(err)
		}
		if slow := !strings.HasPrefix(o.Algorithm, "HS"); v.Slow() != slow {
			t.Errorf("%s: Slow() is %t", o.Algorithm, v.Slow())
		}
		for name, token := range tokens {
			who, err := v.Verify(token)
			if name == o.Algorithm {
				if err != nil || who.User != "alice" {
					t.Errorf("%s refused its own token: %v", o.Algorithm, err)
				}
			} else if !errors.Is(err, ErrTokenRefused) {
				t.Errorf("%s took the token %s: %v", o.Algorithm, name, err)
			}
		}
	}
	for _, o := range []VerifierOptions{
		{Algorithm: "HS256"}, {Algorithm: "none"}, {Algorithm: ""}, {Algorithm: "hs256", Secret: secret}, {Algorithm: "RS512", PublicKeyPEM: rsaPEM},
		{Algorithm: "RS256"}, {Algorithm: "RS256", PublicKeyPEM: p256PEM}, {Algorithm: "RS256", PublicKeyPEM: []byte("no PEM")},
		{Algorithm: "ES256", PublicKeyPEM: pemOf(t, &p384.PublicKey)}, {Algorithm: "ES256", PublicKeyPEM: edPEM},
		{Algorithm: "EdDSA", PublicKeyPEM: rsaPEM},
		{Algorithm: "EdDSA", PublicKeyPEM: pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: []byte("x")})},
	} {
		if _, err := NewVerifier(o); err == nil {
			t.Errorf("a verifier by %q with the key %.40q was made", o.Algorithm, o.PublicKeyPEM)
		}
	}
}

func TestVerifierRefuses(t *testing.T) {
	v, err := NewVerifier(VerifierOptions{Algorithm: "HS256", Secret: secret, Leeway: 30 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	const header = `{"alg":"HS256"}`
	later := time.Now().Add(time.Hour).Unix()
	claims := fmt.Sprintf(`{"sub":"alice","exp":%d}`, later)
	if who, err := v.Verify(handmade(header, claims)); err != nil || who.User != "alice" || who.ExpiresAt != (later+30)*1000 {
		t.Fatalf("the plain token: %+v, %v", who, err)
	}
	good := string(handmade(header, claims))
	inJSON, err := jws.Sign([]byte(claims), jws.WithJSON(), jws.WithKey(jwa.HS256, secret))
	if err != nil {
		t.Fatal(err)
	}
	for name, token := range map[string][]byte{
		"alg none, signed":       handmade(`{"alg":"none"}`, claims),
		"another alg, signed":    handmade(`{"alg":"HS512"}`, claims),
		"no alg":                 handmade(`{}`, claims),
		"critical extension":     handmade(`{"alg":"HS256","crit":["b64"],"b64":true}`, claims),
		"header no JSON":         handmade(`alg`, claims),
		"claims no JSON":         handmade(header, "sub"),
		"claims an array":        handmade(header, "[]"),
		"JSON serialization":     inJSON,
		"two dots missing":       []byte(strings.ReplaceAll(good, ".", "")),
		"four parts":             []byte(good + ".x"),
		"space behind":           []byte(good + " "),
		"space before":           []byte(" " + good),
		"signature cut":          []byte(good[:len(good)-1]),
		"no signature":           []byte(good[:strings.LastIndexByte(good, '.')+1]),
		"huge":                   []byte(strings.Repeat("a", maxTokenBytes+1)),
		"exp a string":           handmade(header, `{"sub":"alice","exp":"x"}`),
		"exp beyond all bounds":  handmade(header, `{"sub":"alice","exp":1e300}`),
		"exp in the year 300000": handmade(header, `{"sub":"alice","exp":9400000000000}`),
		"exp null":               handmade(header, `{"sub":"alice","exp":null}`),
		"user_id empty":          handmade(header, fmt.Sprintf(`{"user_id":"","sub":"alice","exp":%d}`, later)),
		"user_id null":           handmade(header, fmt.Sprintf(`{"user_id":null,"sub":"alice","exp":%d}`, later)),
		"sub a number":           handmade(header, fmt.Sprintf(`{"sub":1,"exp":%d}`, later)),
		"user no UTF-8":          handmade(header, fmt.Sprintf("{\"sub\":\"a\\u0000b\",\"exp\":%d}", later)),
		"nbf a string":           handmade(header, fmt.Sprintf(`{"sub":"alice","exp":%d,"nbf":"x"}`, later)),
	} {
		if who, err := v.Verify(token); !errors.Is(err, ErrTokenRefused) {
			t.Errorf("%s: %+v, %v", name, who, err)
		}
	}
	if _, err := v.Verify(handmade(header, `{"sub":"alice","exp":1}`)); !errors.Is(err, ErrTokenExpired) {
		t.Errorf("expired: %v", err)
	}
	if _, err := v.Verify(handmade(header, `{"sub":"alice","exp":-1}`)); err == nil {
		t.Error("an expiry before 1970 was taken")
	}
	if _, err := v.Verify(nil); !errors.Is(err, ErrTokenMissing) {
		t.Errorf("no token: %v", err)
	}
}

// FuzzVerify: whatever is not signed is refused, and nothing panics.
func FuzzVerify(f *testing.F) {
	v, err := NewVerifier(VerifierOptions{Algorithm: "HS256", Secret: secret})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(fuzzToken)
	f.Add("..")
	f.Add(`{"payload":"","signatures":[]}`)
	f.Fuzz(func(t *testing.T, token string) {
		who, err := v.Verify([]byte(token))
		if err != nil {
			return
		}
		input, signature := token[:strings.LastIndexByte(token, '.')], token[strings.LastIndexByte(token, '.')+1:]
		mac := hmac.New(sha256.New, secret)
		mac.Write([]byte(input))
		if signature != base64.RawURLEncoding.EncodeToString(mac.Sum(nil)) {
			t.Errorf("%q is %+v", token, who)
		}
	})
}

// FuzzClaims: signed claims of any kind give a valid user or an error.
func FuzzClaims(f *testing.F) {
	v, err := NewVerifier(VerifierOptions{Algorithm: "HS256", Secret: secret})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(`{"sub":"a","exp":9999999999}`)
	f.Add(`{"user_id":"a","exp":1e10,"nbf":-1.5,"iat":[],"aud":{}}`)
	f.Fuzz(func(t *testing.T, claims string) {
		who, err := v.Verify(handmade(`{"alg":"HS256"}`, claims))
		if err == nil && (who.User == "" || who.ExpiresAt < time.Now().UnixMilli()) {
			t.Errorf("%s is %+v", claims, who)
		}
	})
}

// The claims that count, each at its bounds: those of RFC 7519, section 4.1, with a leeway of 30 s.
func TestVerifierClaimBounds(t *testing.T) {
	const now = 1_000_000
	v, err := NewVerifier(VerifierOptions{
		Algorithm: "HS256", Secret: secret, PreviousSecret: []byte("before"), Leeway: 30 * time.Second,
		Issuer: "i", Audience: "us", Now: func() time.Time { return time.Unix(now, 999) },
	})
	if err != nil {
		t.Fatal(err)
	}
	const ours = `"iss":"i","aud":"us",`
	for claims, want := range map[string]error{
		`{` + ours + `"sub":"a","exp":1000001}`:                                nil,
		`{` + ours + `"sub":"a","exp":999971}`:                                 nil,
		`{` + ours + `"sub":"a","exp":999970}`:                                 ErrTokenExpired,
		`{` + ours + `"sub":"a","exp":999970.9}`:                               ErrTokenExpired,
		`{` + ours + `"sub":"a"}`:                                              ErrTokenRefused,
		`{` + ours + `"sub":"a","exp":"1000001"}`:                              ErrTokenRefused,
		`{` + ours + `"sub":"a","exp":1000001,"nbf":1000030}`:                  nil,
		`{` + ours + `"sub":"a","exp":1000001,"nbf":1000031}`:                  ErrTokenRefused,
		`{` + ours + `"sub":"a","exp":1000001,"iat":1000031}`:                  ErrTokenRefused,
		`{` + ours + `"SUB":"a","exp":1000001}`:                                ErrTokenRefused,
		`{` + ours + `"sub":"a","sub":7,"exp":1000001}`:                        ErrTokenRefused,
		`{` + ours + `"sub":"a","exp":1,"exp":1000001}`:                        nil,
		`{` + ours + `"s\u0075b":"a","exp":1000001}`:                           nil,
		`{"iss":"j","aud":"us","sub":"a","exp":1000001}`:                       ErrTokenRefused,
		`{"iss":["i"],"aud":"us","sub":"a","exp":1000001}`:                     ErrTokenRefused,
		`{"iss":"i","aud":["them","us"],"sub":"a","exp":1000001}`:              nil,
		`{"iss":"i","aud":["them",["us"]],"sub":"a","exp":1000001}`:            ErrTokenRefused,
		`{"iss":"i","aud":{"us":"us"},"sub":"a","exp":1000001}`:                ErrTokenRefused,
		`{"iss":"i","sub":"a","exp":1000001}`:                                  ErrTokenRefused,
		`{` + ours + `"sub":"a","exp":1000001} x`:                              ErrTokenRefused,
		`{` + ours + `"user_id":"b","sub":"a","exp":1000001,"x":{}}`:           nil,
		`{` + ours + `"user_id":["b"],"sub":"a","exp":1000001}`:                ErrTokenRefused,
		`{` + ours + `"sub":"` + strings.Repeat("a", 129) + `","exp":1000001}`: ErrTokenRefused,
	} {
		if _, err := v.Verify(handmade(`{"alg":"HS256","typ":"JWT"}`, claims)); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", claims, err, want)
		}
	}
	token := handmade(`{"alg":"HS256"}`, `{`+ours+`"sub":"a","exp":1000001}`)
	who, err := v.Verify(token)
	if err != nil || who != (Identity{User: "a", ExpiresAt: 1000031_000}) {
		t.Errorf("%+v, %v", who, err)
	}
	clear(token)
	if who.User != "a" {
		t.Error("the user's name lies in the token's bytes")
	}
	if n := testing.AllocsPerRun(100, func() {
		_, _ = v.Verify(handmadeOnce)
	}); n > 14 && !raceEnabled {
		t.Errorf("a check allocates %.0f times", n)
	}
}

var handmadeOnce = handmade(`{"alg":"HS256","typ":"JWT"}`, `{"iss":"i","aud":"us","sub":"a","exp":1000001}`)
