package bench

import (
	"fmt"
	"time"

	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/lestrrat-go/jwx/v2/jwt"
)

// SignToken makes the HS256 token by which a simulated user connects, valid for ttl.
func SignToken(secret []byte, user string, ttl time.Duration) (string, error) {
	now := time.Now()
	tok, err := jwt.NewBuilder().Claim("user_id", user).IssuedAt(now).Expiration(now.Add(ttl)).Build()
	if err != nil {
		return "", fmt.Errorf("build token of %s: %w", user, err)
	}
	signed, err := jwt.Sign(tok, jwt.WithKey(jwa.HS256, secret))
	if err != nil {
		return "", fmt.Errorf("sign token of %s: %w", user, err)
	}
	return string(signed), nil
}
