package engine

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"im-gateway/codec"
	"im-gateway/codec/logicpb"
	"im-gateway/engine/tracing"
	"im-gateway/transport"
)

// Caller is who sends a message by the HTTP API.
type Caller struct {
	User     string
	DeviceID string // empty: not named
	Session  string // for which the message is; empty: for none
}

// ErrTokenExpired is what an Authenticate function wraps when the token was good once.
var ErrTokenExpired = errors.New("the token has expired")

// Publisher is the upstream path as the HTTP API uses it.
type Publisher interface {
	// Publish hands the envelope in frame, sent by user, to Kafka and waits until its fate is known
	// or ctx ends. A refusal is in the result's code; an error means that the fate is not known.
	// frame is the callee's to keep. What the caller's session is to do itself is done, too.
	Publish(ctx context.Context, from Caller, frame []byte) (Published, error)
}

// Published is what became of one message.
type Published struct {
	ClientMsgID string
	Result      codec.UpstreamResult
	Message     string // says more about a refusal; may be empty
	Control     bool   // the session did it, nothing was stored
	ExpiresAt   int64  // of the session's new token, Unix ms; 0: it has none
}

// APIOptions configure the HTTP API.
type APIOptions struct {
	Settings APISettings // until others are applied

	Auth logicpb.AuthServiceClient
	// Authenticate returns the caller whose token the request carries. Its error wraps ErrTokenExpired
	// when that is the reason; its text is shown to the caller.
	Authenticate    func(*http.Request) (Caller, error)
	Publisher       Publisher
	PublishDeadline time.Duration // longer than the upstream path's own
	UpstreamTopic   string
	Tracer          *tracing.Tracer // nil: requests are not traced
	Logger          zerolog.Logger
	Registerer      prometheus.Registerer
}

// APISettings are the options that may change while the API serves, see API.Prepare.
type APISettings struct {
	AuthDeadline    time.Duration
	MaxMessageBytes int // bodies are also bounded by MaxBodyBytes
	MaxBodyBytes    int // of any request
	MaxRequests     int // served at once
	Logins          LoginLimits
	Origins         []string
}

// apiRules are settings in force, with what follows from them; never written to.
type apiRules struct {
	APISettings
	origins transport.Origins
}

func newAPIRules(s APISettings) (*apiRules, error) {
	if s.MaxRequests < 1 || s.MaxBodyBytes < 1 {
		return nil, fmt.Errorf("HTTP API: %d requests at once, bodies of %d bytes", s.MaxRequests, s.MaxBodyBytes)
	}
	return &apiRules{s, transport.NewOrigins(s.Origins)}, nil
}

// API is the HTTP API of the public port. It is safe for concurrent use; each request runs on the
// goroutine of its connection.
type API struct {
	o         APIOptions          // but for its Settings, which rules hold
	routes    map[string]*route   // by path
	other     *route              // what unknown paths are counted as
	documents map[string]document // by path
	rules     atomic.Pointer[apiRules]
	serving   atomic.Int64 // requests that count against MaxRequests
	refused   prometheus.Counter
	tooLarge  prometheus.Counter // bodies
	panics    prometheus.Counter
	logins    *logins
	trouble   zerolog.Logger // sampled: an outage fails thousands of requests
}

// route is one path of the API.
type route struct {
	path    string   // or a name for several, in the metrics and the log
	methods []string // the first is the one that is served; GET implies HEAD
	serve   func(*call)
	// light routes are served whatever else is going on.
	light   bool
	seconds prometheus.Observer
	counts  [6]prometheus.Counter // by the status' first digit
}

// call is one request under way.
type call struct {
	api   *API
	rules *apiRules // as they were when it came
	route *route
	w     http.ResponseWriter
	r     *http.Request
	id    string      // of the request
	span  *codec.Span // nil: it is not traced
	// status and note are for the log.
	status int
	note   error
}

// NewAPI returns the handler of the HTTP API.
func NewAPI(o APIOptions) (*API, error) {
	if o.Auth == nil || o.Authenticate == nil || o.Publisher == nil {
		return nil, errors.New("HTTP API: a part is missing")
	}
	r, err := newAPIRules(o.Settings)
	if err != nil {
		return nil, err
	}
	o.Settings = APISettings{}
	a := &API{
		o:      o,
		routes: map[string]*route{},
		trouble: o.Logger.Sample(&zerolog.BurstSampler{
			Burst: 10, Period: time.Second, NextSampler: &zerolog.BasicSampler{N: 1000},
		}),
	}
	requests := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_http_requests_total",
		Help: "Requests to the HTTP API by route and class of status.",
	}, []string{"route", "status"})
	seconds := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "im_gateway_http_request_duration_seconds",
		Help:    "Time from a request's head to the end of its answer.",
		Buckets: prometheus.ExponentialBuckets(0.0005, 2.5, 12),
	}, []string{"route"})
	a.refused = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "im_gateway_http_refused_total",
		Help: "Requests answered 503 because http.max_requests were being served.",
	})
	a.tooLarge = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "im_gateway_http_bodies_too_large_total",
		Help: "Requests answered 413 because their body was larger than http.max_body_bytes, or the message than websocket.max_message_bytes.",
	})
	a.panics = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "im_gateway_http_panics_total", Help: "Panics caught in a request of the HTTP API.",
	})
	for _, c := range []prometheus.Collector{requests, seconds, a.refused, a.tooLarge, a.panics} {
		if err := o.Registerer.Register(c); err != nil {
			return nil, fmt.Errorf("register the HTTP API's metrics: %w", err)
		}
	}
	if err := errors.Join(
		registerGauge(o.Registerer, "http_requests_in_flight", "Requests to the HTTP API that are being served, but for its light ones.",
			func() int { return int(a.serving.Load()) }),
		registerGauge(o.Registerer, "http_requests_in_flight_bound", "Beyond so many requests are answered 503 (http.max_requests).",
			func() int { return a.rules.Load().MaxRequests }),
	); err != nil {
		return nil, err
	}
	if a.logins, err = newLogins(r.Logins, o.Registerer); err != nil {
		return nil, err
	}
	a.rules.Store(r)
	add := func(rt *route) *route {
		rt.seconds = seconds.WithLabelValues(rt.path)
		for class := 1; class < len(rt.counts); class++ {
			rt.counts[class] = requests.WithLabelValues(rt.path, strconv.Itoa(class)+"xx")
		}
		return rt
	}
	for _, rt := range a.table() {
		a.routes[rt.path] = add(rt)
	}
	if a.documents, err = loadDocuments(); err != nil {
		return nil, err
	}
	documents := add(&route{path: "documents", methods: []string{http.MethodGet, http.MethodHead}, serve: serveDocument, light: true})
	for path := range a.documents {
		a.routes[path] = documents
	}
	a.other = add(&route{path: "other", serve: notFound})
	return a, nil
}

// Prepare checks settings and returns what puts them in force, for requests that come from then on. apply
// cannot fail; settings are prepared and applied by one goroutine at a time, which may be any.
func (a *API) Prepare(next APISettings) (apply func(), err error) {
	r, err := newAPIRules(next)
	if err != nil {
		return nil, err
	}
	return func() {
		a.logins.set(next.Logins)
		a.rules.Store(r)
	}, nil
}

// table lists every route but the documents'.
func (a *API) table() []*route {
	post := []string{http.MethodPost}
	get := []string{http.MethodGet, http.MethodHead}
	return append(authRoutes(a.o.Auth, post),
		&route{path: "/api/messages", methods: post, serve: publish},
		&route{path: "/healthz", methods: get, serve: healthz, light: true},
		&route{path: "/ws", methods: get, serve: upgradeRequired, light: true},
		&route{path: "/sse", methods: get, serve: streamElsewhere, light: true},
	)
}

// ServeHTTP implements http.Handler.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	started := time.Now()
	c := &call{api: a, rules: a.rules.Load(), w: w, r: r, id: requestID(r)}
	c.route = a.routes[r.URL.Path]
	if c.route == nil {
		c.route = a.other
	}
	h := w.Header()
	h.Set("X-Request-Id", c.id)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
	h.Set("Cache-Control", "no-store")
	defer c.finish(started)
	c.cors()
	if !c.route.light && c.route != a.other {
		c.trace()
	}
	c.dispatch()
}

// trace begins the request's span, where it is traced, and lets those know the trace who are called
// because of the request.
func (c *call) trace() {
	var told codec.TraceContext
	if v := c.r.Header.Values("traceparent"); len(v) == 1 {
		told, _ = codec.ParseTraceParent(v[0])
	}
	if told, c.span = c.api.o.Tracer.Begin(told); told != (codec.TraceContext{}) {
		c.r = c.r.WithContext(tracing.NewContext(c.r.Context(), told))
	}
}

func (c *call) dispatch() {
	methods := c.route.methods
	switch {
	case c.route == c.api.other:
		notFound(c)
		return
	case c.r.Method == http.MethodOptions:
		c.options()
		return
	case !slices.Contains(methods, c.r.Method):
		c.w.Header().Set("Allow", allow(methods))
		c.fail(http.StatusMethodNotAllowed, "METHOD_NOT_ALLOWED", "use "+strings.Join(methods, " or "))
		return
	case c.route.light:
		c.route.serve(c)
		return
	}
	defer c.api.serving.Add(-1)
	if c.api.serving.Add(1) > int64(c.rules.MaxRequests) {
		c.api.refused.Inc()
		c.retryAfter(0)
		c.fail(http.StatusServiceUnavailable, string(codec.Overloaded), "too many requests are being served")
		return
	}
	c.route.serve(c)
}

// finish recovers from a panic in a handler, counts and logs.
func (c *call) finish(started time.Time) {
	if p := recover(); p != nil && p != http.ErrAbortHandler { //nolint:errorlint // a panic's value
		c.note = fmt.Errorf("panic: %v", p)
		c.api.panics.Inc()
		c.api.o.Logger.Error().Any("panic", p).Bytes("stack", debug.Stack()).Str("route", c.route.path).Str("request_id", c.id).
			Msg("panic in a request of the HTTP API")
		if c.status == 0 {
			c.fail(http.StatusInternalServerError, "INTERNAL", "internal error")
		}
	}
	if c.span != nil {
		c.api.o.Tracer.HTTP(c.span, c.r.Method, c.route.path, c.status)
	}
	took := time.Since(started)
	c.route.seconds.Observe(took.Seconds())
	if class := c.status / 100; 0 < class && class < len(c.route.counts) {
		c.route.counts[class].Inc()
	}
	var event *zerolog.Event
	if c.status >= http.StatusInternalServerError {
		event = c.api.trouble.Warn()
	} else {
		event = c.api.o.Logger.Debug()
	}
	// The path is the route's, never the request's: that might carry a token in its query.
	event.Str("method", c.r.Method).Str("route", c.route.path).Int("status", c.status).
		Str("request_id", c.id).Str("remote", c.r.RemoteAddr).Dur("took_ms", took).
		AnErr("error", c.note).Msg("http request")
}

// options answers a preflight, or says which methods there are.
func (c *call) options() {
	c.w.Header().Set("Allow", allow(c.route.methods))
	c.status = http.StatusNoContent
	c.w.WriteHeader(c.status)
}

func allow(methods []string) string { return strings.Join(methods, ", ") + ", OPTIONS" }

// cors sets what browsers need to let a page of a configured origin read the answer.
func (c *call) cors() {
	h := c.w.Header()
	if !c.rules.origins.All() {
		h.Add("Vary", "Origin")
	}
	origin := c.r.Header.Get("Origin")
	switch {
	case origin == "":
		return
	case c.rules.origins.All():
		h.Set("Access-Control-Allow-Origin", "*")
	case c.rules.origins.Has(origin):
		h.Set("Access-Control-Allow-Origin", origin)
	default:
		return
	}
	h.Set("Access-Control-Expose-Headers", "Retry-After, X-Request-Id")
	if c.r.Method == http.MethodOptions && c.r.Header.Get("Access-Control-Request-Method") != "" {
		h.Set("Access-Control-Allow-Methods", strings.Join(c.route.methods, ", "))
		h.Set("Access-Control-Allow-Headers", "Authorization, Content-Type, X-Request-Id, traceparent")
		h.Set("Access-Control-Max-Age", "600")
	}
}

// requestID is the caller's own id when it is a sensible one, else a new one.
func requestID(r *http.Request) string {
	id := r.Header.Get("X-Request-Id")
	if len(id) <= 64 && validGatewayID(id) {
		return id
	}
	return strings.ToLower(rand.Text())
}

func notFound(c *call) {
	c.fail(http.StatusNotFound, "NOT_FOUND", "there is nothing at this path; /openapi.json lists what there is")
}

func healthz(c *call) { c.succeed(map[string]string{"status": "ok"}) }

// upgradeRequired answers a request to /ws that is no WebSocket handshake; those never get here.
func upgradeRequired(c *call) {
	c.w.Header().Set("Connection", "Upgrade")
	c.w.Header().Set("Upgrade", "websocket")
	c.fail(http.StatusUpgradeRequired, "UPGRADE_REQUIRED", "this is a WebSocket endpoint")
}

// streamElsewhere stands for GET /sse, which the event loops answer; it never gets here.
func streamElsewhere(c *call) {
	c.retryAfter(0)
	c.fail(http.StatusServiceUnavailable, string(codec.Overloaded), "this is an event stream")
}
