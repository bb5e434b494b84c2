package transport

import (
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/lestrrat-go/jwx/v2/jwk"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
)

// Bounds of a JWK set.
const (
	keySetBytes   = 1 << 20
	keySetKeys    = 100
	keySetTimeout = 10 * time.Second
	keySetPause   = 10 * time.Second // between two readings, whatever asks for them
	rsaBits       = 2048             // of a key that is used
)

// KeySetOptions say where a set of keys is.
type KeySetOptions struct {
	URL     string        // http or https
	Issuer  string        // labels the metrics, beside the URL; both together are unique
	Refresh time.Duration // 10 min
	Logger  zerolog.Logger
}

// KeySet is the public keys that an issuer publishes as a JWK set (RFC 7517). It is read in the
// background; the last good one stands while its URL is away. Any goroutine may use it.
type KeySet struct {
	o       KeySetOptions
	where   string // the URL without what may be secret
	client  *http.Client
	current atomic.Pointer[keyring]
	wanted  chan struct{} // capacity 1: a key that is not there was asked for

	ok, failed atomic.Int64
	read       atomic.Int64 // Unix s, of the last good reading; 0: none yet

	reads, keys, age *prometheus.Desc
}

// keyring is one reading of a set.
type keyring struct{ keys []publicJWK }

type publicJWK struct {
	id, alg string // empty: none
	key     any
}

// NewKeySet validates the options. Read or Run gets the keys.
func NewKeySet(o KeySetOptions) (*KeySet, error) {
	u, err := url.Parse(o.URL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, errors.New("the URL of a JWK set must begin with http:// or https://")
	}
	def(&o.Refresh, 10*time.Minute)
	s := &KeySet{
		o: o, where: u.Scheme + "://" + u.Host + u.Path, wanted: make(chan struct{}, 1),
		client: &http.Client{Timeout: keySetTimeout, CheckRedirect: sameSecurity, Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, MaxIdleConns: 1, IdleConnTimeout: keySetTimeout, ForceAttemptHTTP2: true,
		}},
	}
	s.current.Store(&keyring{})
	labels := prometheus.Labels{"issuer": o.Issuer, "url": s.where}
	desc := func(name, help string, more ...string) *prometheus.Desc {
		return prometheus.NewDesc("im_gateway_jwks_"+name, help, more, labels)
	}
	s.reads = desc("reads_total", "Times that a JWK set was read, by result.", "result")
	s.keys = desc("keys", "Keys of a JWK set that are in use.")
	s.age = desc("age_seconds", "Time since a JWK set was last read.")
	return s, nil
}

// Known tells whether the set was read once.
func (s *KeySet) Known() bool { return s.read.Load() > 0 }

// sameSecurity follows redirects, but not from https to http.
func sameSecurity(req *http.Request, via []*http.Request) error {
	if len(via) > 5 || via[0].URL.Scheme == "https" && req.URL.Scheme != "https" {
		return errors.New("it redirects to where it must not")
	}
	return nil
}

// Read reads the set once. On an error the keys are those of before.
func (s *KeySet) Read(ctx context.Context) error {
	ring, err := s.fetch(ctx)
	if err != nil {
		s.failed.Add(1)
		return fmt.Errorf("read the JWK set %s: %w", s.where, err)
	}
	s.ok.Add(1)
	s.read.Store(time.Now().Unix())
	s.current.Store(ring)
	return nil
}

func (s *KeySet) fetch(ctx context.Context) (*keyring, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.o.URL, nil)
	if err != nil {
		return nil, errors.New("the URL is not valid") // the error would quote it
	}
	resp, err := s.client.Do(req)
	if err != nil {
		var quoting *url.Error
		if errors.As(err, &quoting) {
			err = quoting.Err
		}
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the answer is %s", resp.Status)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, keySetBytes+1))
	if err != nil {
		return nil, err
	}
	if len(b) > keySetBytes {
		return nil, fmt.Errorf("it is larger than %d bytes", keySetBytes)
	}
	return parseKeySet(b)
}

// parseKeySet takes the public keys that may sign; an error where there is none.
func parseKeySet(b []byte) (*keyring, error) {
	set, err := jwk.Parse(b, jwk.WithIgnoreParseError(true)) // keys of unknown kinds must not hide the others
	if err != nil {
		return nil, errors.New("it is no JWK set")
	}
	if set.Len() > keySetKeys {
		return nil, fmt.Errorf("it has %d keys, at most %d are taken", set.Len(), keySetKeys)
	}
	ring := &keyring{}
	for i := range set.Len() {
		k, _ := set.Key(i)
		if k.KeyType() == jwa.OctetSeq || k.KeyUsage() != "" && k.KeyUsage() != string(jwk.ForSignature) {
			continue
		}
		public, err := k.PublicKey()
		if err != nil {
			continue
		}
		var raw any
		if err := public.Raw(&raw); err != nil {
			continue
		}
		if r, ok := raw.(*rsa.PublicKey); ok && r.N.BitLen() < rsaBits {
			continue
		}
		ring.keys = append(ring.keys, publicJWK{id: k.KeyID(), alg: k.Algorithm().String(), key: raw})
	}
	if len(ring.keys) == 0 {
		return nil, errors.New("it has no public key that signs")
	}
	return ring, nil
}

// find returns the key for a token's header: the one it names, or the only one that fits. nil: none;
// then the set is read again soon, for it may have changed.
func (s *KeySet) find(id string, alg jwa.SignatureAlgorithm) any {
	var found any
	for _, k := range s.current.Load().keys {
		if id != "" && k.id != id || k.alg != "" && k.alg != alg.String() || !fits(k.key, alg) {
			continue
		}
		if found != nil {
			return nil // which of them?
		}
		found = k.key
	}
	if found == nil && id != "" {
		select {
		case s.wanted <- struct{}{}:
		default:
		}
	}
	return found
}

// Run reads the set again and again until ctx ends: every Refresh, sooner after a failure or when a token
// names a key that is not there.
func (s *KeySet) Run(ctx context.Context) error {
	defer s.client.CloseIdleConnections()
	next := s.o.Refresh
	for {
		// However many ask: not without a pause.
		select {
		case <-time.After(min(keySetPause, next)):
		case <-ctx.Done():
			return nil
		}
		if rest := next - keySetPause; rest > 0 {
			select {
			case <-time.After(rest):
			case <-s.wanted:
			case <-ctx.Done():
				return nil
			}
		}
		next = s.o.Refresh
		if err := s.Read(ctx); err != nil && ctx.Err() == nil {
			next = min(next, keySetPause)
			s.o.Logger.Warn().Err(err).Msg("the keys of before stay in use")
		}
	}
}

// Describe implements prometheus.Collector.
func (s *KeySet) Describe(ch chan<- *prometheus.Desc) {
	ch <- s.reads
	ch <- s.keys
	ch <- s.age
}

// Collect implements prometheus.Collector.
func (s *KeySet) Collect(ch chan<- prometheus.Metric) {
	ch <- prometheus.MustNewConstMetric(s.reads, prometheus.CounterValue, float64(s.ok.Load()), "ok")
	ch <- prometheus.MustNewConstMetric(s.reads, prometheus.CounterValue, float64(s.failed.Load()), "error")
	ch <- prometheus.MustNewConstMetric(s.keys, prometheus.GaugeValue, float64(len(s.current.Load().keys)))
	if at := s.read.Load(); at > 0 {
		ch <- prometheus.MustNewConstMetric(s.age, prometheus.GaugeValue, time.Since(time.Unix(at, 0)).Seconds())
	}
}
