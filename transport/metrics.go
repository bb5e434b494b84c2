package transport

import (
	"fmt"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"im-gateway/codec"
)

// metrics are shared by the loops; their children are resolved once.
type metrics struct {
	sessions      prometheus.Gauge
	streams       prometheus.Gauge
	bytesIn       prometheus.Counter
	bytesOut      prometheus.Counter
	messagesIn    prometheus.Counter
	messagesOut   prometheus.Counter
	deflated      prometheus.Counter
	revoked       prometheus.Counter
	panics        prometheus.Counter
	handovers     prometheus.Counter
	stalls        prometheus.Counter
	refused       map[codec.Code]prometheus.Counter
	closes        *prometheus.CounterVec
	pressed       struct{ connections, requests, messages prometheus.Counter }
	httpLate      struct{ read, write, idle prometheus.Counter }
	tlsHandshakes struct {
		ok, resumed, failed, shed, plain prometheus.Counter
	}
	handshake struct {
		ok, refused, malformed, tooLarge, timeout, displaced, shed, rate, crowded, origin prometheus.Counter
	}
}

func newMetrics(s *Server, reg prometheus.Registerer) (*metrics, error) {
	var failed error
	register := func(c prometheus.Collector) {
		if err := reg.Register(c); err != nil && failed == nil {
			failed = fmt.Errorf("register the transport's metrics: %w", err)
		}
	}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "im_gateway_transport_" + name, Help: help})
		register(c)
		return c
	}
	m := &metrics{
		bytesIn:     counter("received_bytes_total", "Bytes received on WebSocket connections and event streams."),
		bytesOut:    counter("sent_bytes_total", "Bytes written to clients, HTTP included."),
		messagesIn:  counter("messages_received_total", "WebSocket messages received."),
		messagesOut: counter("frames_sent_total", "Frames written for the shards."),
		deflated:    counter("compression_saved_bytes_total", "Bytes of messages to clients that compression has saved."),
		revoked:     counter("revoked_sessions_total", "Sessions closed because their token was denied."),
		panics:      counter("panics_total", "Panics caught in an event loop."),
		handovers:   counter("http_handovers_total", "Connections handed to the HTTP server."),
		stalls:      counter("shard_stalls_total", "How often a shard's queue was found full."),
		refused:     map[codec.Code]prometheus.Counter{},
		sessions: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "im_gateway_transport_sessions", Help: "Sessions open on the event loops, WebSockets and event streams.",
		}),
		streams: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "im_gateway_transport_event_streams", Help: "Of the sessions those that are event streams (GET /sse).",
		}),
		closes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "im_gateway_transport_closes_total", Help: "Sessions ended, by close code.",
		}, []string{"code"}),
	}
	register(acceptFailures)
	register(m.sessions)
	register(m.streams)
	register(m.closes)
	register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "im_gateway_transport_connections", Help: "Connections open, of every kind.",
	}, func() float64 { return float64(s.connections.Load()) }))
	register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "im_gateway_transport_http_connections", Help: "Connections that the HTTP server has; bounded by http.max_connections.",
	}, func() float64 { return float64(s.bridged.Load()) }))
	register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "im_gateway_transport_connections_bound", Help: "Connections beyond which new ones are refused.",
	}, func() float64 { return float64(s.rules.Load().MaxConnections) }))
	refused := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_transport_refused_total", Help: "Client messages refused by the event loops, by code.",
	}, []string{"code"})
	register(refused)
	for _, code := range []codec.Code{codec.InvalidMessage, codec.MessageTooLarge, codec.Overloaded, codec.RateLimited} {
		m.refused[code] = refused.WithLabelValues(string(code))
	}
	handshakes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_transport_handshakes_total", Help: "Handshakes of WebSockets and requests for event streams, by result.",
	}, []string{"result"})
	register(handshakes)
	h := &m.handshake
	h.ok = handshakes.WithLabelValues("ok")
	h.refused = handshakes.WithLabelValues("token_refused")
	h.malformed = handshakes.WithLabelValues("malformed")
	h.tooLarge = handshakes.WithLabelValues("too_large")
	h.timeout = handshakes.WithLabelValues("timeout")
	h.displaced = handshakes.WithLabelValues("displaced")
	h.shed = handshakes.WithLabelValues("shed")
	h.rate = handshakes.WithLabelValues("rate_limited")
	h.crowded = handshakes.WithLabelValues("address_limit")
	h.origin = handshakes.WithLabelValues("origin_refused")
	pressed := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_transport_pressure_refused_total",
		Help: "What was refused while memory was short: connection, request or message.",
	}, []string{"what"})
	register(pressed)
	m.pressed.connections = pressed.WithLabelValues("connection")
	m.pressed.requests = pressed.WithLabelValues("request")
	m.pressed.messages = pressed.WithLabelValues("message")
	late := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_transport_http_timeouts_total",
		Help: "HTTP connections that a timeout has ended, by what they were doing: read or write a request, or idle.",
	}, []string{"doing"})
	register(late)
	m.httpLate.read = late.WithLabelValues("read")
	m.httpLate.write = late.WithLabelValues("write")
	m.httpLate.idle = late.WithLabelValues("idle")
	overTLS := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_transport_tls_handshakes_total", Help: "TLS handshakes by result.",
	}, []string{"result"})
	register(overTLS)
	m.tlsHandshakes.ok = overTLS.WithLabelValues("ok")
	m.tlsHandshakes.resumed = overTLS.WithLabelValues("resumed")
	m.tlsHandshakes.failed = overTLS.WithLabelValues("failed")
	m.tlsHandshakes.shed = overTLS.WithLabelValues("shed")
	m.tlsHandshakes.plain = overTLS.WithLabelValues("not_tls")
	register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "im_gateway_transport_tls_handshakes_in_flight", Help: "TLS handshakes under way; bounded by http.tls.max_handshakes.",
	}, func() float64 { return float64(s.shaking.Load()) }))
	return m, failed
}

func (m *metrics) refuse(code codec.Code) {
	if c := m.refused[code]; c != nil {
		c.Inc()
	}
}

// close counts a session's end. Codes that a peer makes up share one label.
func (m *metrics) close(code codec.CloseCode) {
	label := "other"
	if code < 1016 || code/10 == 400 || code/10 == 450 {
		label = strconv.Itoa(int(code))
	}
	m.closes.WithLabelValues(label).Inc()
}
