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
	Algorithm      string   // HS256, HS384, HS512, RS256, ES256 or EdDSA; whatever the token claims
	Secret         []byte   // HS*
	PreviousSecret []byte   // HS*: still accepted; optional
	PublicKeyPEM   []byte   // RS256, ES256, EdDSA
	Issuer         string   // checked when set
	Audience       string   // checked when set
	KeySet         *KeySet  // RS256, ES256, EdDSA, in place of PublicKeyPEM
	Issuers        []Issuer // further ones; then a token's iss says whose it is
	Leeway         time.Duration
	Denials        *Denials         // tokens that are refused all the same; optional
	Now            func() time.Time // time.Now
}

// Issuer is one more whose tokens are good.
type Issuer struct {
	Name         string   // a token's iss
	Audience     string   // checked when set
	Algorithms   []string // RS256, ES256, EdDSA
	PublicKeyPEM []byte
	KeySet       *KeySet // in place of PublicKeyPEM
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
	o          VerifierOptions
	issuers    []issuer
	signatures map[jwa.SignatureAlgorithm]jws.Verifier
	slow       bool
}

// issuer is whose tokens are good, and by which keys.
type issuer struct {
	name, audience string // empty: any
	keys           map[jwa.SignatureAlgorithm][]any
	set            *KeySet // besides, for every algorithm in keys
}

// NewVerifier validates the options.
func NewVerifier(o VerifierOptions) (*Verifier, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	v := &Verifier{o: o, signatures: map[jwa.SignatureAlgorithm]jws.Verifier{}}
	first := issuer{name: o.Issuer, audience: o.Audience, set: o.KeySet, keys: map[jwa.SignatureAlgorithm][]any{}}
	switch alg := jwa.SignatureAlgorithm(o.Algorithm); alg {
	case jwa.HS256, jwa.HS384, jwa.HS512:
		if len(o.Secret) == 0 {
			return nil, fmt.Errorf("tokens by %s: the secret is empty", alg)
		}
		first.keys[alg] = append(first.keys[alg], o.Secret)
		if len(o.PreviousSecret) > 0 {
			first.keys[alg] = append(first.keys[alg], o.PreviousSecret)
		}
		first.set = nil // its keys are public
	default:
		if err := first.allow([]string{o.Algorithm}, o.PublicKeyPEM); err != nil {
			return nil, err
		}
	}
	v.issuers = append(v.issuers, first)
	for _, i := range o.Issuers {
		next := issuer{name: i.Name, audience: i.Audience, set: i.KeySet, keys: map[jwa.SignatureAlgorithm][]any{}}
		if err := next.allow(i.Algorithms, i.PublicKeyPEM); err != nil {
			return nil, fmt.Errorf("issuer %s: %w", i.Name, err)
		}
		for _, other := range v.issuers {
			if next.name == "" || other.name == "" || other.name == next.name {
				return nil, errors.New("several issuers need names that differ")
			}
		}
		v.issuers = append(v.issuers, next)
	}
	for _, i := range v.issuers {
		for alg := range i.keys {
			verifier, err := jws.NewVerifier(alg)
			if err != nil {
				return nil, fmt.Errorf("tokens by %s: %w", alg, err)
			}
			v.signatures[alg] = verifier
			v.slow = v.slow || !symmetric(alg)
		}
	}
	return v, nil
}

// allow takes the asymmetric algorithms of an issuer, with the one key or a set.
func (i *issuer) allow(algorithms []string, pemText []byte) error {
	if len(algorithms) == 0 {
		return errors.New("no algorithm is allowed")
	}
	used := false
	var key any
	if i.set == nil {
		var err error
		if key, err = publicKey(pemText); err != nil {
			return fmt.Errorf("tokens by %s: %w", strings.Join(algorithms, ", "), err)
		}
	}
	for _, name := range algorithms {
		alg := jwa.SignatureAlgorithm(name)
		switch alg {
		case jwa.RS256, jwa.ES256, jwa.EdDSA:
		default:
			return fmt.Errorf("tokens by %q: the algorithm must be HS256, HS384, HS512, RS256, ES256 or EdDSA", name)
		}
		i.keys[alg] = nil
		if key != nil && fits(key, alg) {
			i.keys[alg] = []any{key}
			used = true
		}
	}
	// A key of another kind would refuse every token, one by one.
	if key != nil && !used {
		return fmt.Errorf("tokens by %s: the public key is of another kind (%T)", strings.Join(algorithms, ", "), key)
	}
	return nil
}

func symmetric(alg jwa.SignatureAlgorithm) bool {
	return alg == jwa.HS256 || alg == jwa.HS384 || alg == jwa.HS512
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

// Slow tells whether a check may take so long that an event loop must not do it itself.
func (v *Verifier) Slow() bool { return v.slow }

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
	buf := make([]byte, 0, len(token)) // for the three parts, one behind the other
	part, buf, ok := decode(buf, header)
	var h tokenHeader
	if !ok || !h.read(part) {
		return Identity{}, ErrTokenRefused
	}
	var c claims // not to be believed yet: they say only whose keys to try
	if part, buf, ok = decode(buf, payload); !ok || !c.read(part) {
		return Identity{}, ErrTokenRefused
	}
	from := v.issuer(c.issuer)
	if part, _, ok = decode(buf, signature); !ok || from == nil ||
		!v.signed(from, &h, token[:len(token)-len(signature)-1], part) {
		return Identity{}, ErrTokenRefused
	}
	return v.identify(from, &c)
}

// issuer finds whose token it says to be; nil: nobody's.
func (v *Verifier) issuer(name string) *issuer {
	for i := range v.issuers {
		if from := &v.issuers[i]; from.name == "" || from.name == name {
			return from
		}
	}
	return nil
}

var dot = []byte(".")

// strict takes one spelling only: no two tokens are the same to us.
var strict = base64.RawURLEncoding.Strict()

// decode appends the bytes that text stands for (RFC 7515, section 2) to buf, which has room.
func decode(buf, text []byte) (part, rest []byte, ok bool) {
	if bytes.ContainsAny(text, "\r\n") { // the decoder would skip them
		return nil, buf, false
	}
	n, err := strict.Decode(buf[len(buf):cap(buf)], text)
	return buf[len(buf) : len(buf)+n], buf[:len(buf)+n], err == nil
}

// parse views b as JSON; what it gives points into b. Only valid JSON, an object, is taken.
func parse(b []byte) (o gjson.Result, ok bool) {
	if !gjson.ValidBytes(b) {
		return o, false
	}
	o = gjson.Parse(unsafe.String(unsafe.SliceData(b), len(b))) // #nosec G103 -- b outlives o and is not written to
	return o, o.IsObject()
}

// tokenHeader is what counts of a token's header (RFC 7515, section 4.1). The texts point into it.
type tokenHeader struct{ algorithm, keyID string }

// read takes the header; false: it has extensions that must be understood (RFC 7515, section 4.1.11), or
// what counts is no text.
func (h *tokenHeader) read(header []byte) bool {
	o, ok := parse(header)
	if !ok {
		return false
	}
	o.ForEach(func(key, value gjson.Result) bool {
		switch key.Str {
		case "alg":
			h.algorithm, ok = value.Str, ok && value.Type == gjson.String
		case "kid":
			h.keyID, ok = value.Str, ok && value.Type == gjson.String
		case "crit":
			ok = false
		}
		return true
	})
	return ok
}

// signed tells whether one of the issuer's keys has signed the input. The header chooses among what the
// issuer is allowed, and decides nothing.
func (v *Verifier) signed(from *issuer, h *tokenHeader, input, signature []byte) bool {
	alg := jwa.SignatureAlgorithm(h.algorithm)
	keys, ok := from.keys[alg]
	if !ok {
		return false
	}
	check := v.signatures[alg]
	for _, key := range keys {
		if check.Verify(input, signature, key) == nil {
			return true
		}
	}
	if from.set == nil {
		return false
	}
	key := from.set.find(h.keyID, alg)
	return key != nil && check.Verify(input, signature, key) == nil
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
func (v *Verifier) identify(from *issuer, c *claims) (Identity, error) {
	now, leeway := float64(v.o.Now().Unix()), v.o.Leeway.Seconds()
	switch {
	case !c.expiring || c.expires < 0 || c.expires >= maxExpiry:
		return Identity{}, ErrTokenRefused
	case from.name != "" && c.issuer != from.name, from.audience != "" && !c.meant(from.audience):
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
