package engine

import (
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// wrongTokensPerMinute is how many wrong tokens one address may show, so many at once; then it has to
	// wait, with the right one too.
	wrongTokensPerMinute = 10
	// wrongTokenAddresses bounds how many addresses are watched at once.
	wrongTokenAddresses = 1024
)

// actingToken is admin.token, which those who act have to show, on the admin port and on the gRPC port
// alike. All methods may be called from any goroutine.
type actingToken struct {
	sum                 tokenSum
	wrong               *attempts
	off, missing, other prometheus.Counter
}

// newActingToken takes the token configured; empty: nobody may act.
func newActingToken(token string, reg prometheus.Registerer) (*actingToken, error) {
	refused := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_admin_refused_total",
		Help: "Attempts to act as an operator that were refused, by reason: off (no admin.token is configured), missing, wrong, " +
			"limited (too many wrong tokens from the address).",
	}, []string{"reason"})
	forgotten := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "im_gateway_admin_addresses_forgotten_total",
		Help: "Addresses with wrong tokens that are watched no longer, as too many others came after them.",
	})
	for _, c := range []prometheus.Collector{refused, forgotten} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register the metrics of operators: %w", err)
		}
	}
	a := &actingToken{
		wrong: newAttempts(wrongTokensPerMinute, wrongTokenAddresses, refused.WithLabelValues("limited"), forgotten),
		off:   refused.WithLabelValues("off"), missing: refused.WithLabelValues("missing"), other: refused.WithLabelValues("wrong"),
	}
	a.sum.use(token)
	return a, nil
}

// tokenSum is a token that callers have to show, of which the hash is kept; it may change while they do. Any
// goroutine may use it.
type tokenSum struct {
	sum atomic.Pointer[[sha256.Size]byte] // nil: none
}

// use changes the token; empty: none is needed.
func (t *tokenSum) use(token string) {
	if token == "" {
		t.sum.Store(nil)
		return
	}
	sum := sha256.Sum256([]byte(token))
	t.sum.Store(&sum)
}

func (t *tokenSum) set() bool { return t.sum.Load() != nil }

// is tells whether a token is needed and this is it.
func (t *tokenSum) is(given string) bool {
	sum, want := sha256.Sum256([]byte(given)), t.sum.Load()
	return want != nil && subtle.ConstantTimeCompare(sum[:], want[:]) == 1
}

// check returns nil when the caller at addr ("IP:port") may act; authorization is the header of that name.
func (a *actingToken) check(addr, authorization string) error {
	if !a.sum.set() {
		a.off.Inc()
		return status.Error(codes.FailedPrecondition, "acting is off: no admin.token is configured")
	}
	given := bearer(authorization)
	if given == "" {
		a.missing.Inc()
		return status.Error(codes.Unauthenticated, "acting needs `Authorization: Bearer TOKEN` with the token configured as admin.token")
	}
	key := addr
	if a, err := netip.ParseAddrPort(addr); err == nil {
		key = addressKey(a.Addr())
	}
	now := time.Now()
	if wait, ok := a.wrong.left(key, now); !ok {
		return status.Errorf(codes.ResourceExhausted, "too many wrong tokens from this address: try again in %.0f s", math.Ceil(wait.Seconds()))
	}
	if !a.sum.is(given) {
		a.other.Inc()
		_, _ = a.wrong.take(key, now) // what counts is whether one is left next time
		return status.Error(codes.Unauthenticated, "this is not the token configured as admin.token")
	}
	return nil
}

// bearer is the token of an Authorization header; empty: there is none.
func bearer(authorization string) string {
	scheme, token, found := strings.Cut(authorization, " ")
	if !found || !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return token
}
