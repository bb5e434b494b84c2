package transport

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/prometheus/client_golang/prometheus"

	"im-gateway/codec"
)

// values reads every metric of a registry, as NAME or NAME{VALUE}: here none has more than one label.
func values(t testing.TB, reg prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := strings.TrimPrefix(f.GetName(), "im_gateway_transport_")
			for _, l := range m.GetLabel() {
				name += "{" + l.GetValue() + "}"
			}
			all[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return all
}

// becomes waits until the metrics have these values: loops add theirs at a tick.
func becomes(t testing.TB, reg prometheus.Gatherer, want map[string]float64) {
	t.Helper()
	late := time.After(patience)
	look := time.NewTicker(10 * time.Millisecond)
	defer look.Stop()
	for {
		got := values(t, reg)
		equal := true
		for name, v := range want {
			n, ok := got[name]
			equal = equal && ok && n == v
		}
		if equal {
			return
		}
		select {
		case <-look.C:
		case <-late:
			for name, v := range want {
				if n, ok := got[name]; !ok || n != v {
					t.Errorf("%s is %v (%v), want %v", name, n, ok, v)
				}
			}
			t.FailNow()
		}
	}
}

// TestMessagesAreCountedByType: messages and their bytes both ways, acks by result; what clients choose
// makes no label.
func TestMessagesAreCountedByType(t *testing.T) {
	reg := prometheus.NewRegistry()
	s, sink := start(t, func(o *Options) { o.Registerer, o.Settings.MessagesPerSecond = reg, 100 })
	c := connect(t, s, "alice")
	id := sink.next(t, codec.EventOpen).Session
	sent := []string{
		`{"type":"send-message","message_id":"c-1","data":{}}`,
		`{"type":"send-message","message_id":"c-2","data":{}}`,
		`{"type":"typing","message_id":"c-3","data":{}}`,
		`{"type":"` + strings.Repeat("x", 64) + `","message_id":"c-4","data":{}}`,
		`{"type":"ping"}`,
		`{"type":"delivery-ack","data":{"delivery_id":1}}`,
		`{"type":"refresh-token","data":{"token":"no"}}`,
		`{"type":1,"message_id":"c-5"}`,
		`not JSON`,
	}
	for _, m := range sent {
		c.send(text(m))
	}
	var answers [4]string // pong, error for the token, ack for c-5, error
	for i := range answers {
		answers[i] = string(c.read().Payload)
	}
	// From the shard: an ack, a push, one of another type; and one for a session that is not there.
	s.Submit(&codec.EgressBatch{Shard: id.Shard(), Loop: id.Loop(), Commands: []codec.Command{
		{Kind: codec.CommandFrame, Session: id, Payload: []byte("12345"), Content: codec.AckOf(codec.OK)},
		{Kind: codec.CommandFrame, Session: id, Payload: []byte("123"), Content: codec.AckOf(codec.OutcomeUnknown)},
		{Kind: codec.CommandPing, Session: id},
		{Kind: codec.CommandFrame, Session: id, Payload: []byte("1234567"), Content: codec.Content{Type: codec.FrameNewMessage}},
		{Kind: codec.CommandFrame, Session: id, Payload: []byte("1")},
		{Kind: codec.CommandFrame, Session: id + 1<<20, Payload: []byte("gone")},
	}})
	if b := sink.returned(t); b.Written < time.Now().Add(-patience).UnixNano() || b.Written > time.Now().UnixNano() {
		t.Errorf("the batch was written at %d ns", b.Written)
	}
	length := func(list ...string) (n float64) {
		for _, s := range list {
			n += float64(len(s))
		}
		return n
	}
	want := map[string]float64{
		"messages_received_total{send-message}": 2, "messages_received_bytes_total{send-message}": length(sent[:2]...),
		"messages_received_total{other}": 2, "messages_received_bytes_total{other}": length(sent[2:4]...),
		"messages_received_total{ping}": 1, "messages_received_bytes_total{ping}": length(sent[4]),
		"messages_received_total{delivery-ack}": 1, "messages_received_bytes_total{delivery-ack}": length(sent[5]),
		"messages_received_total{refresh-token}": 1, "messages_received_bytes_total{refresh-token}": length(sent[6]),
		"messages_received_total{unread}": 2, "messages_received_bytes_total{unread}": length(sent[7:]...),
		"messages_sent_total{pong}": 1, "messages_sent_bytes_total{pong}": length(answers[0]),
		"messages_sent_total{error}": 2, "messages_sent_bytes_total{error}": length(answers[1], answers[3]),
		"messages_sent_total{message-ack}": 3, "messages_sent_bytes_total{message-ack}": length(answers[2]) + 8,
		"messages_sent_total{new-message}": 1, "messages_sent_bytes_total{new-message}": 7,
		"messages_sent_total{other}": 1, "messages_sent_bytes_total{other}": 1,
		"acks_total{success}": 1, "acks_total{OUTCOME_UNKNOWN}": 1, "acks_total{INVALID_MESSAGE}": 1, "acks_total{OVERLOADED}": 0,
		"sessions{im.json.v1}": 1, "sessions{im.proto.v1}": 0, "sessions{sse}": 0,
	}
	becomes(t, reg, want)
	before := len(values(t, reg))

	// A flood, ended by a close; the code that the client answers with is one that it made up.
	flood := strings.Repeat(text(`{"type":"flood","data":1}`), 1000)
	c.send(flood)
	if code := c.closed(); code != 1008 {
		t.Fatalf("closed with %d", code)
	}
	other := connect(t, s, "bob")
	other.send(frame(true, ws.OpClose, string(ws.NewCloseFrameBody(4711, ""))))
	other.closed()
	becomes(t, reg, map[string]float64{
		"closes_total{1008}": 1, "closes_total{other}": 1, "connections_accepted_total": 2, "sessions{im.json.v1}": 0,
		"messages_received_total{unread}": 3, // one more: that which went too far
	})
	after := values(t, reg)
	if len(after) != before {
		t.Errorf("there were %d metrics, now there are %d", before, len(after))
	}
	if in := after["received_bytes_total"]; in < float64(len(flood))/4 {
		t.Errorf("%v bytes received", in)
	}
}

// TestGaugesOfWaiting: unfinished heads, stalled events, closing connections, with their bounds.
func TestGaugesOfWaiting(t *testing.T) {
	reg := prometheus.NewRegistry()
	s, sink := start(t, func(o *Options) { o.Registerer, o.Settings.HandshakesInFlight = reg, 10 })
	becomes(t, reg, map[string]float64{
		"handshakes_in_flight": 0, "handshakes_in_flight_bound": 10, "stalled_events": 0, "stalled_events_bound": 4096,
		"http_connections_bound": 8192, "tls_handshakes_in_flight_bound": 1024, "token_checks_waiting_bound": 1024,
	})
	for range 3 {
		dial(t, s).send("GET /ws HT")
	}
	becomes(t, reg, map[string]float64{"handshakes_in_flight": 3, "connections": 3})
	c := connect(t, s, "alice")
	sink.next(t, codec.EventOpen)
	sink.full.Store(true)
	c.send(text(`{"type":"m","message_id":"1","data":1}`), text(`{"type":"m","message_id":"2","data":1}`))
	becomes(t, reg, map[string]float64{"stalled_events": 2})
	sink.full.Store(false)
	s.Resume(0, 0)
	s.Resume(1, 0)
	becomes(t, reg, map[string]float64{"stalled_events": 0})
	c.send(frame(true, ws.OpClose, ""))
	becomes(t, reg, map[string]float64{"closing_connections": 1, "closes_total{1005}": 1})
	_ = c.Close()
	becomes(t, reg, map[string]float64{"closing_connections": 0})
}

// TestDroppedInputIsCounted: what comes beyond the bound while the HTTP server does not read.
func TestDroppedInputIsCounted(t *testing.T) {
	reg := prometheus.NewRegistry()
	begun, end := make(chan struct{}), make(chan struct{})
	s, _ := start(t, func(o *Options) {
		o.Registerer = reg
		o.API = http.HandlerFunc(func(http.ResponseWriter, *http.Request) { close(begun); <-end })
	})
	defer close(end)
	c := dial(t, s)
	c.send("POST /slow HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n")
	<-begun
	c.send(strings.Repeat("x", 1_000_000))
	late := time.After(patience)
	look := time.NewTicker(10 * time.Millisecond)
	defer look.Stop()
	for values(t, reg)["http_dropped_bytes_total"] < 700_000 {
		select {
		case <-look.C:
		case <-late:
			t.Fatalf("%v bytes are counted as dropped", values(t, reg)["http_dropped_bytes_total"])
		}
	}
}
