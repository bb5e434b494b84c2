package transport

import (
	"fmt"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"im-gateway/codec"
)

// metrics are shared by the loops; their children are resolved once.
type metrics struct {
	accepted      prometheus.Counter
	sessions      [codec.SSE + 1]prometheus.Gauge
	bytesIn       prometheus.Counter
	bytesOut      prometheus.Counter
	received      [numReceived]messageCounters
	sent          [codec.NumFrameTypes]messageCounters
	acks          [len(codec.Codes)]prometheus.Counter
	deflated      prometheus.Counter
	revoked       prometheus.Counter
	panics        prometheus.Counter
	handovers     prometheus.Counter
	httpDropped   prometheus.Counter
	stalls        prometheus.Counter
	refused       map[codec.Code]prometheus.Counter
	closes        map[codec.CloseCode]prometheus.Counter
	otherCloses   prometheus.Counter
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
		accepted:    counter("connections_accepted_total", "Connections accepted, of every kind, those that are turned away at once among them."),
		bytesIn:     counter("received_bytes_total", "Bytes received on WebSocket connections and event streams."),
		bytesOut:    counter("sent_bytes_total", "Bytes written to clients, HTTP included."),
		deflated:    counter("compression_saved_bytes_total", "Bytes of messages to clients that compression has saved."),
		revoked:     counter("revoked_sessions_total", "Sessions closed because their token was denied."),
		panics:      counter("panics_total", "Panics caught in an event loop."),
		handovers:   counter("http_handovers_total", "Connections handed to the HTTP server."),
		httpDropped: counter("http_dropped_bytes_total", "Bytes dropped because more than 256 KiB waited to be read by the HTTP server; the request fails."),
		stalls:      counter("shard_stalls_total", "Times that a loop began to wait for a shard whose queue was full."),
		refused:     map[codec.Code]prometheus.Counter{},
		closes:      map[codec.CloseCode]prometheus.Counter{},
	}
	perType := func(name, help, helpBytes string) func(label string) messageCounters {
		n := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "im_gateway_transport_" + name + "_total", Help: help}, []string{"type"})
		bytes := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "im_gateway_transport_" + name + "_bytes_total", Help: helpBytes},
			[]string{"type"})
		register(n)
		register(bytes)
		return func(label string) messageCounters {
			return messageCounters{n.WithLabelValues(label), bytes.WithLabelValues(label)}
		}
	}
	receivedOf := perType("messages_received",
		"Messages received on WebSockets, or by HTTP for a session, by type: those that the protocol names, other (upstream messages of a type of the "+
			"application's own) and unread (not valid, or of a client that is closed for sending too many).",
		"Bytes of the messages received, decompressed, by type as im_gateway_transport_messages_received_total.")
	for i := range m.received {
		m.received[i] = receivedOf(receivedNames[i])
	}
	sentOf := perType("messages_sent",
		"Messages written to sessions, by type: those that the protocol names and other (records of a type of the "+
			"application's own).",
		"Bytes of the messages written to sessions, before compression, by type as im_gateway_transport_messages_sent_total.")
	for i := range m.sent {
		m.sent[i] = sentOf(codec.FrameType(i).String())
	}
	acks := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_transport_acks_total",
		Help: "message-acks written to clients, by result: success, or the code of the error. A success may follow " +
			"OUTCOME_UNKNOWN for the same message.",
	}, []string{"result"})
	register(acks)
	for i, code := range codec.Codes {
		m.acks[i] = acks.WithLabelValues(code.Result())
	}
	register(acceptFailures)
	closes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_transport_closes_total", Help: "Sessions ended, by the close code that was sent or received; 1006: the " +
			"connection was lost, or the client of an event stream has left, other: a code that a client made up.",
	}, []string{"code"})
	register(closes)
	for _, code := range closeCodes {
		m.closes[code] = closes.WithLabelValues(strconv.Itoa(int(code)))
	}
	m.otherCloses = closes.WithLabelValues("other")
	sessions := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "im_gateway_transport_sessions", Help: "Sessions open on the event loops, by what they speak: a WebSocket subprotocol, or sse, an event stream.",
	}, []string{"protocol"})
	register(sessions)
	m.sessions[codec.JSON], m.sessions[codec.Proto] = sessions.WithLabelValues(protocolJSON), sessions.WithLabelValues(protocolProto)
	m.sessions[codec.SSE] = sessions.WithLabelValues("sse")
	registerGauges(s, register)
	refused := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_transport_refused_total", Help: "Client messages refused by the event loops, by code.",
	}, []string{"code"})
	register(refused)
	for _, code := range []codec.Code{codec.InvalidMessage, codec.MessageTooLarge, codec.Overloaded, codec.RateLimited} {
		m.refused[code] = refused.WithLabelValues(string(code))
	}
	handshakes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_transport_handshakes_total",
		Help: "Handshakes of WebSockets and requests for event streams by result: ok; token_refused; origin_refused; malformed; too_large (of its head); timeout; " +
			"displaced (the oldest unfinished one, for a newer); address_limit; rate_limited; shed (no room, or draining).",
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
		Name: "im_gateway_transport_tls_handshakes_total",
		Help: "TLS handshakes by result: ok; resumed; failed; not_tls; shed (too many at once).",
	}, []string{"result"})
	register(overTLS)
	m.tlsHandshakes.ok = overTLS.WithLabelValues("ok")
	m.tlsHandshakes.resumed = overTLS.WithLabelValues("resumed")
	m.tlsHandshakes.failed = overTLS.WithLabelValues("failed")
	m.tlsHandshakes.shed = overTLS.WithLabelValues("shed")
	m.tlsHandshakes.plain = overTLS.WithLabelValues("not_tls")
	return m, failed
}

// registerGauges registers what is read when it is asked for.
func registerGauges(s *Server, register func(prometheus.Collector)) {
	gauge := func(name, help string, f func() int) {
		register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "im_gateway_transport_" + name, Help: help},
			func() float64 { return float64(f()) }))
	}
	ofLoops := func(f func(*loop) int64) func() int {
		return func() (sum int) {
			for _, l := range s.loops {
				sum += int(f(l))
			}
			return sum
		}
	}
	constant := func(n int) func() int { return func() int { return n } }
	o := &s.opts
	shards := 0
	if o.Sink != nil {
		shards = o.Sink.N()
	}
	gauge("connections", "Connections open, of every kind.", func() int { return int(s.connections.Load()) })
	gauge("connections_bound", "Connections beyond which new ones are refused.", func() int { return s.rules.Load().MaxConnections })
	gauge("closing_connections", "Connections that stay open, for 2 s at the most, only for the peer to read why they are closed.",
		func() int { return int(s.lingering.Load()) })
	gauge("http_connections", "Connections that the HTTP server has.", func() int { return int(s.bridged.Load()) })
	gauge("http_connections_bound", "Connections that the HTTP server may have (http.max_connections).",
		func() int { return s.rules.Load().MaxHTTPConnections })
	gauge("handshakes_in_flight", "Connections that have not sent a whole first head.", ofLoops(func(l *loop) int64 { return l.seen.heads.Load() }))
	gauge("handshakes_in_flight_bound", "How many there may be until the oldest is closed (limits.handshakes_in_flight); 0: no bound.",
		func() int { return s.rules.Load().headBound(o.Loops) * o.Loops })
	gauge("tls_handshakes_in_flight", "TLS handshakes under way.", func() int { return int(s.shaking.Load()) })
	gauge("tls_handshakes_in_flight_bound", "How many there may be until the oldest is closed (http.tls.max_handshakes).",
		func() int { return s.rules.Load().MaxTLSHandshakes })
	gauge("token_checks_waiting", "Tokens that wait to be checked off the event loops: those with signatures that are slow to check.", func() int { return len(s.verify) })
	gauge("token_checks_waiting_bound", "How many may wait; beyond it handshakes are refused.",
		func() int { return cap(s.verify) })
	gauge("stalled_events", "Events that wait in the event loops for shards whose queues are full.", ofLoops(func(l *loop) int64 { return l.seen.stalled.Load() }))
	gauge("stalled_events_bound", "Beyond so many, for one shard at one loop its share of it, client messages are refused.",
		constant(stalledEvents*o.Loops*shards))
}

func (m *metrics) refuse(code codec.Code) {
	if c := m.refused[code]; c != nil {
		c.Inc()
	}
}

// closeGoingAway is what browsers send when the page is left.
const closeGoingAway codec.CloseCode = 1001

// closeCodes are those that have a label of their own.
var closeCodes = []codec.CloseCode{
	codec.CloseNormal, closeGoingAway, codec.CloseProtocol, codec.CloseUnsupported, codec.CloseNoStatus, codec.CloseAbnormal,
	codec.CloseInvalidData, codec.ClosePolicy, codec.CloseTooBig, codec.CloseInternal,
	codec.CloseSlowConsumer, codec.CloseHeartbeatMissed, codec.CloseDraining,
	codec.CloseReplaced, codec.CloseKicked, codec.CloseTokenExpired, codec.CloseTokenRefused,
}

// close counts a session's end.
func (m *metrics) close(code codec.CloseCode) {
	if c := m.closes[code]; c != nil {
		c.Inc()
		return
	}
	m.otherCloses.Inc()
}

// messageCounters are those of one type of messages, in one direction.
type messageCounters struct{ messages, bytes prometheus.Counter }

// received is the type of a message from a client, as far as it is counted by it: clients choose the
// types, and each label value costs memory for ever.
type received uint8

const (
	receivedOther received = iota
	receivedSendMessage
	receivedPing
	receivedDeliveryAck
	receivedRefreshToken
	receivedUnread
	numReceived
)

var receivedNames = [numReceived]string{"other", codec.TypeSendMessage, codec.TypePing, codec.TypeDeliveryAck, codec.TypeRefreshToken, "unread"}

func receivedAs(t []byte) received {
	switch string(t) {
	case codec.TypeSendMessage:
		return receivedSendMessage
	case codec.TypePing:
		return receivedPing
	case codec.TypeDeliveryAck:
		return receivedDeliveryAck
	case codec.TypeRefreshToken:
		return receivedRefreshToken
	}
	return receivedOther
}

// counts are what a loop has counted since it last added it to the metrics, at a tick: an atomic operation
// for each message would wait for every write before it.
type counts struct {
	bytesIn, bytesOut int
	received          [numReceived]tally
	sent              [codec.NumFrameTypes]tally
	acks              [len(codec.Codes)]int
}

type tally struct{ messages, bytes int }

func (t *tally) add(bytes int) {
	t.messages++
	t.bytes += bytes
}

func (c *counts) receive(as received, bytes int) { c.received[as].add(bytes) }

func (c *counts) send(what codec.Content, bytes int) {
	c.sent[what.Type].add(bytes)
	if what.Type == codec.FrameAck {
		c.acks[what.Code]++
	}
}

func (l *loop) flushCounts() {
	c, m := &l.counts, l.s.metrics
	add(m.bytesIn, &c.bytesIn)
	add(m.bytesOut, &c.bytesOut)
	for i := range c.received {
		addTally(m.received[i], &c.received[i])
	}
	for i := range c.sent {
		addTally(m.sent[i], &c.sent[i])
	}
	for i := range c.acks {
		add(m.acks[i], &c.acks[i])
	}
}

func addTally(to messageCounters, t *tally) {
	if t.messages != 0 { // a message may be empty
		add(to.messages, &t.messages)
		add(to.bytes, &t.bytes)
	}
}

func add(c prometheus.Counter, n *int) {
	if *n != 0 {
		c.Add(float64(*n))
		*n = 0
	}
}
