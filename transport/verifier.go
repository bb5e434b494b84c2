package transport

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strings"
	"time"
	"unsafe"

	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/lestrrat-go/jwx/v2/jws"
	"github.com/tidwall/gjson"

	"im-gateway/codec"
)

// Why a token is refused. The texts are shown to clients and say nothing of the token.
var (
	ErrTokenMissing = errors.New("a token is needed: Authorization: Bearer, the subprotocol bearer.<token>, or ?token=")
	ErrTokenExpired = errors.New("the token has expired")
	ErrTokenRefused = errors.New("the token is not valid")
	ErrTokenRevoked = errors.New("the token has been revoked")
)

// Bounds of what is taken.
const (
	maxTokenBytes = 8 << 10
	maxExpiry     = 253402300800 // the year 10000, Unix seconds
)

// VerifierOptions say which tokens are good.
type VerifierOptions struct {
	Algorithm      string // HS256, HS384, HS512, RS256, ES256 or EdDSA; whatever the token claims
	Secret         []byte // HS*
	PreviousSecret []byte // HS*: still accepted; optional
	PublicKeyPEM   []byte // RS256, ES256, EdDSA
	Issuer         string // checked when set
	Audience       string // checked when set
	Leeway         time.Duration
	Denials        *Denials         // tokens that are refused all the same; optional
	Now            func() time.Time // time.Now
}

// Identity is what a good token says.
type Identity struct {
	User      string
	ExpiresAt int64  // Unix ms, leeway included: when the session ends
	DeviceID  string // from the claim device_id; empty: none
	Device    string // the kind of device, from the claim device; empty: none
	IssuedAt  int64  // Unix s; 0: the token does not say

	tokenHash uint64 // of the claim jti, by Denials.hash
}

// Verifier checks access tokens. It may be used from any goroutine.
type Verifier struct {
	o         VerifierOptions
	algorithm jwa.SignatureAlgorithm
	signature jws.Verifier
	keys      []any
}

// NewVerifier validates the options.
func NewVerifier(o VerifierOptions) (*Verifier, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	v := &Verifier{o: o, algorithm: jwa.SignatureAlgorithm(o.Algorithm)}
	switch v.algorithm {
	case jwa.HS256, jwa.HS384, jwa.HS512:
		if len(o.Secret) == 0 {
			return nil, fmt.Errorf("tokens by %s: the secret is empty", o.Algorithm)
		}
		v.keys = append(v.keys, o.Secret)
		if len(o.PreviousSecret) > 0 {
			v.keys = append(v.keys, o.PreviousSecret)
		}
	case jwa.RS256, jwa.ES256, jwa.EdDSA:
		key, err := publicKey(o.PublicKeyPEM)
		if err != nil {
			return nil, fmt.Errorf("tokens by %s: %w", o.Algorithm, err)
		}
		// A key of another kind would refuse every token, one by one.
		if !fits(key, v.algorithm) {
			return nil, fmt.Errorf("tokens by %s: the public key is of another kind (%T)", o.Algorithm, key)
		}
		v.keys = append(v.keys, key)
	default:
		return nil, fmt.Errorf("tokens by %q: the algorithm must be HS256, HS384, HS512, RS256, ES256 or EdDSA", o.Algorithm)
	}
	var err error
	if v.signature, err = jws.NewVerifier(v.algorithm); err != nil {
		return nil, fmt.Errorf("tokens by %s: %w", o.Algorithm, err)
	}
	return v, nil
}

// Denials is the list of the tokens that are refused all the same, or nil.
func (v *Verifier) Denials() *Denials { return v.o.Denials }

func publicKey(text []byte) (any, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, errors.New("the public key file holds no PEM block")
	}
	if key, err := x509.ParsePKIXPublicKey(block.Bytes); err == nil {
		return key, nil
	}
	if cert, err := x509.ParseCertificate(block.Bytes); err == nil {
		return cert.PublicKey, nil
	}
	key, err := x509.ParsePKCS1PublicKey(block.Bytes)
	if err != nil {
		return nil, errors.New("the public key file holds no public key")
	}
	return key, nil
}

// fits tells whether the algorithm can use the key.
func fits(key any, alg jwa.SignatureAlgorithm) bool {
	switch key := key.(type) {
	case *rsa.PublicKey:
		return alg == jwa.RS256
	case *ecdsa.PublicKey:
		return alg == jwa.ES256 && key.Curve == elliptic.P256()
	case ed25519.PublicKey:
		return alg == jwa.EdDSA
	}
	return false
}

// Slow tells whether a check takes so long that an event loop must not do it itself.
func (v *Verifier) Slow() bool {
	switch v.algorithm {
	case jwa.HS256, jwa.HS384, jwa.HS512:
		return false
	default:
		return true
	}
}

// Verify checks a token. The error is ErrTokenMissing, ErrTokenExpired, ErrTokenRefused or
// ErrTokenRevoked.
//
// Only the signature is jwx's to check: its tokens are maps, which cost more than all the rest of
// a connect.
func (v *Verifier) Verify(token []byte) (Identity, error) {
	if len(token) == 0 {
		return Identity{}, ErrTokenMissing
	}
	header, rest, _ := bytes.Cut(token, dot)
	payload, signature, ok := bytes.Cut(rest, dot)
	if !ok || len(token) > maxTokenBytes {
		return Identity{}, ErrTokenRefused
	}
	buf := make([]byte, 0, len(token))
	if buf, ok = decode(buf, header); !ok || !v.acceptable(buf) {
		return Identity{}, ErrTokenRefused
	}
	if buf, ok = decode(buf, signature); !ok || !v.signed(token[:len(token)-len(signature)-1], buf) {
		return Identity{}, ErrTokenRefused
	}
	if buf, ok = decode(buf, payload); !ok {
		return Identity{}, ErrTokenRefused
	}
	var c claims
	if !c.read(buf) {
		return Identity{}, ErrTokenRefused
	}
	return v.identify(&c)
}

var dot = []byte(".")

// strict takes one spelling only: no two tokens are the same to us.
var strict = base64.RawURLEncoding.Strict()

// decode replaces what is in buf, which has room, by the bytes that text stands for (RFC 7515,
// section 2).
func decode(buf, text []byte) ([]byte, bool) {
	if bytes.ContainsAny(text, "\r\n") { // the decoder would skip them
		return nil, false
	}
	n, err := strict.Decode(buf[:cap(buf)], text)
	return buf[:n], err == nil
}

// parse views b as JSON; what it gives points into b. Only valid JSON, an object, is taken.
func parse(b []byte) (o gjson.Result, ok bool) {
	if !gjson.ValidBytes(b) {
		return o, false
	}
	o = gjson.Parse(unsafe.String(unsafe.SliceData(b), len(b))) // #nosec G103 -- b outlives o and is not written to
	return o, o.IsObject()
}

// acceptable tells whether a header names the algorithm in use. The header decides nothing: one that
// names another algorithm, or extensions that must be understood (RFC 7515, section 4.1.11), is
// refused.
func (v *Verifier) acceptable(header []byte) bool {
	o, ok := parse(header)
	alg := ""
	if ok {
		o.ForEach(func(key, value gjson.Result) bool {
			switch key.Str {
			case "alg":
				alg = value.Str
			case "crit":
				ok = false
			}
			return true
		})
	}
	return ok && alg == v.o.Algorithm
}

// signed tells whether one of the keys has signed the input.
func (v *Verifier) signed(input, signature []byte) bool {
	for _, key := range v.keys {
		if v.signature.Verify(input, signature, key) == nil {
			return true
		}
	}
	return false
}

// claims are those of a token that count here (RFC 7519, section 4.1). The texts point into it.
type claims struct {
	user, subject, issuer string
	deviceID, device      string
	tokenID               string
	named                 bool // user is set
	expires, from, issued float64
	expiring              bool
	audience              gjson.Result
}

// read takes the claims; false: one that counts is of the wrong type. The last of a name counts.
func (c *claims) read(payload []byte) bool {
	o, ok := parse(payload)
	if !ok {
		return false
	}
	o.ForEach(func(key, value gjson.Result) bool {
		right := true
		switch key.Str {
		case "user_id":
			c.user, c.named, right = value.Str, true, value.Type == gjson.String
		case "sub":
			c.subject, right = value.Str, value.Type == gjson.String
		case "iss":
			c.issuer, right = value.Str, value.Type == gjson.String
		case "jti":
			c.tokenID, right = value.Str, value.Type == gjson.String
		case "device_id":
			c.deviceID, right = value.Str, value.Type == gjson.String && codec.ValidName(value.Str)
		case "device":
			c.device, right = value.Str, value.Type == gjson.String && codec.ValidKind(value.Str)
		case "aud":
			c.audience = value
		case "exp":
			c.expires, c.expiring, right = value.Num, true, value.Type == gjson.Number
		case "nbf":
			c.from, right = value.Num, value.Type == gjson.Number
		case "iat":
			c.issued, right = value.Num, value.Type == gjson.Number
		}
		ok = ok && right
		return ok
	})
	return ok
}

// meant tells whether the audience holds who (RFC 7519, section 4.1.3).
func (c *claims) meant(who string) bool {
	if c.audience.Type == gjson.String {
		return c.audience.Str == who
	}
	for _, a := range c.audience.Array() {
		if a.Type == gjson.String && a.Str == who {
			return true
		}
	}
	return false
}

// identify holds the claims against the options and the clock.
func (v *Verifier) identify(c *claims) (Identity, error) {
	now, leeway := float64(v.o.Now().Unix()), v.o.Leeway.Seconds()
	switch {
	case !c.expiring || c.expires < 0 || c.expires >= maxExpiry:
		return Identity{}, ErrTokenRefused
	case v.o.Issuer != "" && c.issuer != v.o.Issuer, v.o.Audience != "" && !c.meant(v.o.Audience):
		return Identity{}, ErrTokenRefused
	case now-leeway >= math.Floor(c.expires):
		return Identity{}, ErrTokenExpired
	case now+leeway < math.Floor(c.from), now+leeway < math.Floor(c.issued):
		return Identity{}, ErrTokenRefused
	}
	user := c.subject
	if c.named {
		user = c.user
	}
	if !codec.ValidName(user) {
		return Identity{}, ErrTokenRefused
	}
	var hash uint64
	if d := v.o.Denials; d != nil {
		hash = d.hash(c.tokenID)
		if d.denies(hash, user, seconds(int64(c.issued)), v.o.Now().Unix()) {
			return Identity{}, ErrTokenRevoked
		}
	}
	return Identity{
		tokenHash: hash, IssuedAt: int64(c.issued),
		User: strings.Clone(user), ExpiresAt: int64(c.expires)*1000 + v.o.Leeway.Milliseconds(),
		DeviceID: strings.Clone(c.deviceID), Device: strings.Clone(c.device),
	}, nil
}

// FromRequest returns who sends a request of the HTTP API, by its Authorization header.
func (v *Verifier) FromRequest(r *http.Request) (Identity, error) {
	return v.Verify(bearerToken([]byte(r.Header.Get("Authorization"))))
}
