package logic

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/lestrrat-go/jwx/v2/jwt"
)

var errRefresh = errors.New("the refresh token is spent, revoked or expired")

// tokens issues access tokens, which are signed and not stored, and refresh tokens, of which only a
// hash is. All methods may be called from any goroutine.
//
// A refresh token is ID.SECRET. Each login begins a family with an ID; each refresh replaces the
// family's SECRET. Whoever presents an older SECRET holds a token that was used already, stolen
// perhaps, and the family is revoked.
type tokens struct {
	algorithm             jwa.SignatureAlgorithm
	secret                []byte
	issuer, audience      string
	accessTTL, refreshTTL time.Duration
	perUser               int
	now                   func() time.Time

	mu       sync.Mutex
	families map[string]*family
	byUser   map[string][]string // ids of families, oldest first
}

type family struct {
	user    string
	hash    [sha256.Size]byte
	expires time.Time
}

func newTokens(o *Options) *tokens {
	return &tokens{
		algorithm: o.Algorithm, secret: o.Secret, issuer: o.Issuer, audience: o.Audience,
		accessTTL: o.AccessTTL, refreshTTL: o.RefreshTTL, perUser: o.Limits.UserTokens, now: o.Now,
		families: make(map[string]*family), byUser: make(map[string][]string),
	}
}

// access returns a signed token for a user and when it expires.
func (t *tokens) access(user string) (string, time.Time, error) {
	now := t.now()
	expires := now.Add(t.accessTTL).Truncate(time.Second) // exp holds whole seconds
	b := jwt.NewBuilder().Subject(user).Claim("user_id", user).
		IssuedAt(now).Expiration(expires).JwtID(randomText(12))
	if t.issuer != "" {
		b = b.Issuer(t.issuer)
	}
	if t.audience != "" {
		b = b.Audience([]string{t.audience})
	}
	token, err := b.Build()
	if err != nil {
		return "", time.Time{}, fmt.Errorf("build an access token: %w", err)
	}
	signed, err := jwt.Sign(token, jwt.WithKey(t.algorithm, t.secret))
	if err != nil {
		return "", time.Time{}, fmt.Errorf("sign an access token: %w", err)
	}
	return string(signed), expires, nil
}

// begin starts a family for a user and returns its first refresh token.
func (t *tokens) begin(user string) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.forgetExpired(user)
	for len(t.byUser[user]) >= t.perUser {
		t.revoke(t.byUser[user][0])
	}
	id := randomText(12)
	f := &family{user: user}
	t.families[id] = f
	t.byUser[user] = append(t.byUser[user], id)
	return t.renew(id, f)
}

// rotate spends a refresh token and returns its user and the next one.
func (t *tokens) rotate(token string) (user, next string, err error) {
	id, secret, _ := strings.Cut(token, ".")
	t.mu.Lock()
	defer t.mu.Unlock()
	f := t.families[id]
	if f == nil {
		return "", "", errRefresh
	}
	hash := sha256.Sum256([]byte(secret))
	if subtle.ConstantTimeCompare(hash[:], f.hash[:]) != 1 || !t.now().Before(f.expires) {
		t.revoke(id)
		return "", "", errRefresh
	}
	return f.user, t.renew(id, f), nil
}

// end revokes the family of a refresh token. A token that is not known is no error: the caller
// wanted it gone.
func (t *tokens) end(token string) {
	id, _, _ := strings.Cut(token, ".")
	t.mu.Lock()
	defer t.mu.Unlock()
	t.revoke(id)
}

// live reports whether a user holds a refresh token that is still good.
func (t *tokens) live(user string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.forgetExpired(user)
	return len(t.byUser[user]) > 0
}

func (t *tokens) renew(id string, f *family) string {
	secret := randomText(24)
	f.hash = sha256.Sum256([]byte(secret))
	f.expires = t.now().Add(t.refreshTTL)
	return id + "." + secret
}

func (t *tokens) revoke(id string) {
	f := t.families[id]
	if f == nil {
		return
	}
	delete(t.families, id)
	left := slices.DeleteFunc(t.byUser[f.user], func(other string) bool { return other == id })
	if len(left) == 0 {
		delete(t.byUser, f.user)
		return
	}
	t.byUser[f.user] = left
}

func (t *tokens) forgetExpired(user string) {
	for _, id := range slices.Clone(t.byUser[user]) {
		if !t.now().Before(t.families[id].expires) {
			t.revoke(id)
		}
	}
}

// randomText returns n random bytes in URL-safe base64.
func randomText(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return base64.RawURLEncoding.EncodeToString(b)
}
