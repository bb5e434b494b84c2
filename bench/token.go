package bench

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/lestrrat-go/jwx/v2/jwk"
	"github.com/lestrrat-go/jwx/v2/jwt"
)

// Tokens gives the token of a user by name or index. The zero value gives none, for servers that
// ask for none.
type Tokens struct {
	key   jwk.Key
	alg   jwa.SignatureAlgorithm
	given []string
}

// TokenSource says where tokens come from: at most one of its fields is set.
type TokenSource struct {
	Secret string `json:"secret,omitempty"` // HS256
	JWKS   string `json:"jwks,omitempty"`   // file with a private JWK set
	File   string `json:"file,omitempty"`   // a token a line
}

// Open reads what the source names.
func (s TokenSource) Open() (Tokens, error) {
	switch {
	case s.File != "":
		return TokensFromFile(s.File)
	case s.JWKS != "":
		return TokensByJWKS(s.JWKS)
	case s.Secret != "":
		return TokensBySecret(s.Secret)
	}
	return Tokens{}, nil
}

const tokenLife = 24 * time.Hour

// TokensBySecret signs with HS256.
func TokensBySecret(secret string) (Tokens, error) {
	key, err := jwk.FromRaw([]byte(secret))
	if err != nil {
		return Tokens{}, fmt.Errorf("token secret: %w", err)
	}
	return Tokens{key: key, alg: jwa.HS256}, nil
}

// TokensByJWKS signs with the first private key of a JWK set, by the algorithm that the key names.
func TokensByJWKS(file string) (Tokens, error) {
	set, err := jwk.ReadFile(file)
	if err != nil {
		return Tokens{}, fmt.Errorf("read the key set: %w", err)
	}
	key, ok := set.Key(0)
	if !ok {
		return Tokens{}, fmt.Errorf("read the key set: %s has no key", file)
	}
	alg, ok := key.Algorithm().(jwa.SignatureAlgorithm)
	if !ok || alg == "" {
		return Tokens{}, fmt.Errorf("read the key set: the first key of %s names no signature algorithm (alg)", file)
	}
	return Tokens{key: key, alg: alg}, nil
}

// TokensFromFile reads one token a line; user n connects by line n. The users' names are then
// the tokens' own: scenarios that check them need names of the form {prefix}{n}.
func TokensFromFile(file string) (Tokens, error) {
	f, err := os.Open(file)
	if err != nil {
		return Tokens{}, fmt.Errorf("read the tokens: %w", err)
	}
	defer f.Close() //nolint:errcheck // read only
	var t Tokens
	s := bufio.NewScanner(f)
	for s.Scan() {
		if line := strings.TrimSpace(s.Text()); line != "" {
			t.given = append(t.given, line)
		}
	}
	if err := s.Err(); err != nil {
		return Tokens{}, fmt.Errorf("read the tokens: %w", err)
	}
	if len(t.given) == 0 {
		return Tokens{}, fmt.Errorf("read the tokens: %s is empty", file)
	}
	return t, nil
}

// all makes the tokens of users before the load begins, so that signing is no part of it.
func (t Tokens) all(o *Options) ([]string, error) {
	out := make([]string, o.Users)
	switch {
	case t.given != nil:
		if len(t.given) < o.FirstUser+o.Users {
			return nil, fmt.Errorf("%d tokens for users up to number %d", len(t.given), o.FirstUser+o.Users-1)
		}
		copy(out, t.given[o.FirstUser:])
	case t.key != nil:
		for i := range out {
			s, err := t.sign(o.user(i))
			if err != nil {
				return nil, err
			}
			out[i] = s
		}
	}
	return out, nil
}

func (t Tokens) sign(user string) (string, error) {
	if t.key == nil {
		return "", errors.New("no key to sign tokens with")
	}
	now := time.Now()
	tok, err := jwt.NewBuilder().Claim("user_id", user).IssuedAt(now).Expiration(now.Add(tokenLife)).Build()
	if err != nil {
		return "", fmt.Errorf("build token of %s: %w", user, err)
	}
	signed, err := jwt.Sign(tok, jwt.WithKey(t.alg, t.key))
	if err != nil {
		return "", fmt.Errorf("sign token of %s: %w", user, err)
	}
	return string(signed), nil
}
