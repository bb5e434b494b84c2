package engine

import (
	"fmt"
	"hash/maphash"
	"math"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"im-gateway/codec"
	"im-gateway/transport"
)

// attemptKeys bounds how many addresses, and how many names, are watched at once; the one that has not
// been tried for longest is forgotten. Cost: about 250 bytes each.
const attemptKeys = 32768

// logins bounds how often callers try to log in or to register, by address and by name. im-logic pays
// for each attempt with a password hash, and passwords are guessed by trying.
type logins struct {
	perIP, perName *attempts
}

// LoginLimits are attempts per minute, so many at once; 0: no limit.
type LoginLimits struct {
	PerIP   int // IPv6: per /64
	PerName int
}

func newLogins(o LoginLimits, reg prometheus.Registerer) (*logins, error) {
	refused := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_http_logins_refused_total",
		Help: "Attempts to log in or register that were answered 429, by whose limit: ip or name.",
	}, []string{"limit"})
	forgotten := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_http_logins_forgotten_total",
		Help: "Addresses (ip) and names (name) that are watched no longer, as too many others came after them.",
	}, []string{"limit"})
	for _, c := range []prometheus.Collector{refused, forgotten} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register the metrics of logins: %w", err)
		}
	}
	table := func(name string, perMinute int) *attempts {
		return newAttempts(perMinute, attemptKeys, refused.WithLabelValues(name), forgotten.WithLabelValues(name))
	}
	return &logins{perIP: table("ip", o.PerIP), perName: table("name", o.PerName)}, nil
}

// set changes the limits, also for those who have tried already.
func (l *logins) set(o LoginLimits) {
	l.perIP.set(o.PerIP)
	l.perName.set(o.PerName)
}

// attempts is a token bucket for each of a bounded number of keys. It is safe for concurrent use.
type attempts struct {
	seed               maphash.Seed
	refused, forgotten prometheus.Counter

	mu        sync.Mutex
	perMinute int
	buckets   *simplelru.LRU[uint64, *rate.Limiter] // by the key's hash: keys may be long, and are secret to no one
}

func newAttempts(perMinute, keys int, refused, forgotten prometheus.Counter) *attempts {
	buckets, err := simplelru.NewLRU[uint64, *rate.Limiter](keys, nil)
	if err != nil { // keys is a positive constant
		panic(err)
	}
	return &attempts{perMinute: perMinute, seed: maphash.MakeSeed(), refused: refused, forgotten: forgotten, buckets: buckets}
}

// set changes the limit. Who has attempts left keeps as many of them as the new one allows.
func (a *attempts) set(perMinute int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.perMinute == perMinute {
		return
	}
	if a.perMinute = perMinute; perMinute == 0 {
		a.buckets.Purge()
		return
	}
	now := time.Now()
	for _, b := range a.buckets.Values() {
		b.SetLimitAt(now, rate.Limit(perMinute)/60)
		b.SetBurstAt(now, perMinute)
	}
}

// take counts an attempt. When there were too many it returns how long to wait for the next.
func (a *attempts) take(key string, now time.Time) (wait time.Duration, ok bool) {
	hash := maphash.String(a.seed, key)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.perMinute == 0 {
		return 0, true
	}
	bucket, found := a.buckets.Get(hash)
	if !found {
		bucket = rate.NewLimiter(rate.Limit(a.perMinute)/60, a.perMinute)
		if a.buckets.Add(hash, bucket) {
			a.forgotten.Inc()
		}
	}
	if bucket.AllowN(now, 1) {
		return 0, true
	}
	return a.refuse(bucket, now), false
}

// left tells whether there is an attempt left, without counting one.
func (a *attempts) left(key string, now time.Time) (wait time.Duration, ok bool) {
	hash := maphash.String(a.seed, key)
	a.mu.Lock()
	defer a.mu.Unlock()
	bucket, found := a.buckets.Get(hash)
	if !found || bucket.TokensAt(now) >= 1 {
		return 0, true
	}
	return a.refuse(bucket, now), false
}

func (a *attempts) refuse(bucket *rate.Limiter, now time.Time) (wait time.Duration) {
	a.refused.Inc()
	missing := 1 - bucket.TokensAt(now)
	return time.Duration(math.Ceil(missing * float64(time.Minute) / float64(a.perMinute)))
}

// admitAddress counts an attempt of the caller's address, or answers 429 and returns false.
func (c *call) admitAddress() bool {
	return c.admit(c.api.logins.perIP, addressKey(transport.ClientIP(c.r)), "too many attempts from this address")
}

// admitName counts an attempt under the name in a request, where there is one, or answers 429 and
// returns false.
func (c *call) admitName(request any) bool {
	var name string
	switch r := request.(type) {
	case interface{ GetUsername() string }:
		name = r.GetUsername()
	case interface{ GetGuestName() string }:
		name = r.GetGuestName()
	}
	return c.admit(c.api.logins.perName, strings.ToLower(strings.TrimSpace(name)), "too many attempts under this name")
}

func (c *call) admit(a *attempts, key, message string) bool {
	wait, ok := a.take(key, time.Now())
	if !ok {
		c.retryAfter(wait.Milliseconds())
		c.fail(http.StatusTooManyRequests, string(codec.RateLimited), message)
	}
	return ok
}

// addressKey names an IPv4 address or an IPv6 /64, which is one customer's.
func addressKey(a netip.Addr) string {
	a = a.Unmap()
	if a.Is6() {
		if network, err := a.WithZone("").Prefix(64); err == nil { // 64 bits are always there
			a = network.Addr()
		}
	}
	return a.String()
}
