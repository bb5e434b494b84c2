package transport

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/lestrrat-go/jwx/v2/jws"
	"github.com/lestrrat-go/jwx/v2/jwt"

	"im-gateway/codec"
)

// Why a token is refused. The texts are shown to clients and say nothing of the token.
var (
	ErrTokenMissing = errors.New("a token is needed: Authorization: Bearer, the subprotocol bearer.<token>, or ?token=")
	ErrTokenExpired = errors.New("the token has expired")
	ErrTokenRefused = errors.New("the token is not valid")
)

// Bounds of what is taken.
const (
	maxTokenBytes = 8 << 10
	maxExpiryYear = 9999
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
	Now            func() time.Time // time.Now
}

// Identity is what a good token says.
type Identity struct {
	User      string
	ExpiresAt int64 // Unix ms, leeway included: when the session ends
}

// Verifier checks access tokens. It may be used from any goroutine.
type Verifier struct {
	o         VerifierOptions
	algorithm jwa.SignatureAlgorithm
	keys      []any
	validate  []jwt.ValidateOption
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
	v.validate = []jwt.ValidateOption{
		jwt.WithAcceptableSkew(o.Leeway), jwt.WithClock(jwt.ClockFunc(o.Now)),
		jwt.WithRequiredClaim(jwt.ExpirationKey),
	}
	if o.Issuer != "" {
		v.validate = append(v.validate, jwt.WithIssuer(o.Issuer))
	}
	if o.Audience != "" {
		v.validate = append(v.validate, jwt.WithAudience(o.Audience))
	}
	return v, nil
}

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

// Verify checks a token. The error is ErrTokenMissing, ErrTokenExpired or ErrTokenRefused.
func (v *Verifier) Verify(token []byte) (Identity, error) {
	if len(token) == 0 {
		return Identity{}, ErrTokenMissing
	}
	if len(token) > maxTokenBytes || !v.acceptable(token) {
		return Identity{}, ErrTokenRefused
	}
	payload, ok := v.signed(token)
	if !ok {
		return Identity{}, ErrTokenRefused
	}
	t := jwt.New()
	if err := json.Unmarshal(payload, t); err != nil {
		return Identity{}, ErrTokenRefused
	}
	switch err := jwt.Validate(t, v.validate...); {
	case errors.Is(err, jwt.ErrTokenExpired()):
		return Identity{}, ErrTokenExpired
	case err != nil:
		return Identity{}, ErrTokenRefused
	}
	user := t.Subject()
	if claim, ok := t.Get("user_id"); ok {
		if user, ok = claim.(string); !ok {
			return Identity{}, ErrTokenRefused
		}
	}
	expires := t.Expiration()
	if !codec.ValidName(user) || expires.Year() > maxExpiryYear {
		return Identity{}, ErrTokenRefused
	}
	return Identity{User: user, ExpiresAt: expires.Add(v.o.Leeway).UnixMilli()}, nil
}

// acceptable tells whether the token is of the compact form and its header names the algorithm in
// use. The header decides nothing: one that names another algorithm, or extensions that must be
// understood (RFC 7515, section 4.1.11), is refused.
func (v *Verifier) acceptable(token []byte) bool {
	header, rest, ok := bytes.Cut(token, []byte("."))
	if !ok || bytes.Count(rest, []byte(".")) != 1 {
		return false
	}
	raw := make([]byte, base64.RawURLEncoding.DecodedLen(len(header)))
	n, err := base64.RawURLEncoding.Decode(raw, header)
	if err != nil {
		return false
	}
	var named struct {
		Algorithm string          `json:"alg"`
		Critical  json.RawMessage `json:"crit"`
	}
	return json.Unmarshal(raw[:n], &named) == nil && named.Algorithm == v.o.Algorithm && named.Critical == nil
}

// signed returns the payload of a token that one of the keys has signed.
func (v *Verifier) signed(token []byte) (payload []byte, ok bool) {
	for _, key := range v.keys {
		if payload, err := jws.Verify(token, jws.WithKey(v.algorithm, key)); err == nil {
			return payload, true
		}
	}
	return nil, false
}

// FromRequest returns who sends a request of the HTTP API, by its Authorization header.
func (v *Verifier) FromRequest(r *http.Request) (Identity, error) {
	return v.Verify(bearerToken([]byte(r.Header.Get("Authorization"))))
}
