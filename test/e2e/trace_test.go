package e2e

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/twmb/franz-go/pkg/kgo"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"im-gateway/codec/clientpb"
	"im-gateway/codec/gatewaypb"
	"im-gateway/codec/logicpb"
	"im-gateway/test/collector"
)

// trace is one that a client begins.
type trace struct{ id, span, parent string }

// begin makes a trace; flags 01: it is sampled.
func begin(flags string) trace {
	var b [24]byte
	_, _ = rand.Read(b[:])
	b[0], b[16] = 1, 1
	tr := trace{id: hex.EncodeToString(b[:16]), span: hex.EncodeToString(b[16:])}
	tr.parent = "00-" + tr.id + "-" + tr.span + "-" + flags
	return tr
}

// told checks that a traceparent names the span.
func told(t *testing.T, what, traceparent string, s collector.Span) {
	t.Helper()
	if want := "00-" + s.TraceID + "-" + s.SpanID + "-01"; traceparent != want {
		t.Errorf("%s: traceparent %q, want %q", what, traceparent, want)
	}
}

func collect(t *testing.T, opts ...grpc.ServerOption) *collector.Collector {
	t.Helper()
	c, err := collector.Start("127.0.0.1:0", opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Stop)
	return c
}

// one returns the one span of a trace that is right, once it is there.
func one(t *testing.T, c *collector.Collector, tr trace, what string, right func(collector.Span) bool) (found collector.Span) {
	t.Helper()
	eventually(t, what, func() bool {
		n := 0
		for _, s := range c.Spans(tr.id) {
			if right(s) {
				found = s
				n++
			}
		}
		if n > 1 {
			t.Fatalf("%d times: %s", n, what)
		}
		return n == 1
	})
	return found
}

func tracing(c *collector.Collector, change settings) settings {
	s := settings{"tracing.endpoint": c.Addr, "tracing.sample_ratio": "0"}
	for k, v := range change {
		s[k] = v
	}
	return s
}

// silent checks that no span says who the users are.
func silent(t *testing.T, spans []collector.Span, users ...string) {
	t.Helper()
	for _, s := range spans {
		for _, u := range users {
			if text := fmt.Sprint(s.Name, s.Problem, s.Attributes, s.Resource); strings.Contains(text, u) {
				t.Errorf("a span names %s: %s", u, text)
			}
		}
	}
}

// TestTraceOfMessage follows a message from alice's client by her gateway, Kafka, im-logic and Kafka to
// bob's gateway, and one from there to where carol is: each span has the right parent, and all are one trace.
func TestTraceOfMessage(t *testing.T) {
	c := collect(t)
	a, b := start(t, user("gw"), tracing(c, nil)), start(t, user("gw"), tracing(c, nil))
	alice, bob, carol := user("alice"), user("bob"), user("carol")
	from, to, other := connect(t, a, alice), connect(t, b, bob), connect(t, a, carol)

	send := func(tr trace, id string) (a ack) {
		t.Helper()
		from.write(websocket.MessageText, fmt.Appendf(nil,
			`{"type":"send-message","message_id":%q,"traceparent":%q,"data":{"to":%q,"content":"hi"}}`, id, tr.parent, bob))
		if a = from.ack(); a.Status != "success" || a.ClientMsgID != id {
			t.Fatalf("ack %+v", a)
		}
		to.wait("new-message")
		return a
	}
	quiet := begin("00")
	unsampled := send(quiet, "c-0") // first: it has passed every stage when the next one has
	tr := begin("01")
	sampled := send(tr, "c-1")

	up := one(t, c, tr, "the message is produced", func(s collector.Span) bool { return s.Kind == "producer" })
	if up.Name != "send im-upstream-topic" || up.Parent != tr.span || up.Status != "unset" ||
		up.Resource["service.instance.id"] != a.id || up.Attributes["messaging.message.id"] != sampled.MessageID ||
		up.Attributes["messaging.kafka.offset"] != fmt.Sprint(sampled.Offset) ||
		up.Attributes["messaging.destination.partition.id"] != fmt.Sprint(sampled.Partition) {
		t.Errorf("%+v", up)
	}
	down := one(t, c, tr, "the message is delivered", func(s collector.Span) bool {
		return s.Kind == "consumer" && s.Attributes["messaging.message.id"] == sampled.MessageID
	})
	if down.Name != "process im-downstream-topic-{gateway_id}" || down.Parent != up.SpanID || down.Resource["service.instance.id"] != b.id ||
		down.Attributes["messaging.destination.name"] != "im-downstream-topic-"+b.id ||
		down.Attributes["im_gateway.deliveries.delivered"] != "1" || down.Begun.Before(up.Begun) || down.Status != "unset" {
		t.Errorf("%+v", down)
	}
	stored := func(a ack) *kgo.Record {
		return find(t, a.Topic, func(r *kgo.Record) bool { return r.Partition == a.Partition && r.Offset == a.Offset })
	}
	told(t, "upstream record", header(stored(sampled), "traceparent"), up)
	if got := header(stored(unsampled), "traceparent"); got != quiet.parent {
		t.Errorf("a context that is not sampled is handed on as %q, was %q", got, quiet.parent)
	}
	record := find(t, "im-downstream-topic-"+b.id, contains(unsampled.MessageID))
	if got := header(record, "traceparent"); got != quiet.parent {
		t.Errorf("a context that is not sampled reaches bob's gateway as %q, was %q", got, quiet.parent)
	}

	// Of two records for somebody on the other gateway one is traced.
	onward, still := begin("01"), begin("00")
	for i, tr := range []trace{still, onward} {
		r := &kgo.Record{Topic: "im-downstream-topic-" + b.id, Headers: []kgo.RecordHeader{{Key: "traceparent", Value: []byte(tr.parent)}},
			Value: fmt.Appendf(nil, `{"target_user_ids":[%q,%q],"message_id":"%s-%d","data":1}`, carol, user("nobody"), b.id, i)}
		if err := env.kafka.ProduceSync(deadline(t), r).FirstErr(); err != nil {
			t.Fatal(err)
		}
		other.wait("new-message")
	}
	by := func(g *gateway) func(collector.Span) bool {
		return func(s collector.Span) bool { return s.Resource["service.instance.id"] == g.id }
	}
	first, second := one(t, c, onward, "bob's gateway has forwarded it", by(b)), one(t, c, onward, "carol's has delivered it", by(a))
	if first.Parent != onward.span || first.Attributes["im_gateway.deliveries.forwarded"] != "1" || first.Attributes["im_gateway.deliveries.offline"] != "1" ||
		second.Parent != first.SpanID || second.Attributes["im_gateway.deliveries.delivered"] != "1" {
		t.Errorf("%+v\n%+v", first, second)
	}
	for i, want := range []string{still.parent, "00-" + onward.id + "-" + first.SpanID + "-01"} {
		name := fmt.Sprintf("%s-%d", b.id, i)
		for _, topic := range []string{"im-downstream-topic-" + a.id, "im-undelivered-topic"} {
			if got := header(find(t, topic, contains(name)), "traceparent"); got != want {
				t.Errorf("%s: traceparent %q, want %q", topic, got, want)
			}
		}
	}
	if a.stop() != 0 || b.stop() != 0 { // what there was is sent
		t.Error("a gateway did not stop in order")
	}
	for _, tr := range []trace{quiet, still} {
		if list := c.Spans(tr.id); len(list) > 0 {
			t.Errorf("not sampled, and yet: %+v", list)
		}
	}
	parents := map[string]bool{tr.span: true, up.SpanID: true}
	for _, s := range c.Spans(tr.id) { // with those of the conversation that is announced
		if !parents[s.Parent] {
			t.Errorf("no part of the one trace: %+v", s)
		}
	}
	silent(t, c.Spans(""), alice, bob, carol)
}

// fakeLogic answers logins, and keeps what it was told.
type fakeLogic struct {
	logicpb.UnimplementedAuthServiceServer
	told chan []string
}

// Login implements AuthService.
func (f *fakeLogic) Login(ctx context.Context, r *logicpb.LoginRequest) (*logicpb.TokenResponse, error) {
	f.told <- metadata.ValueFromIncomingContext(ctx, "traceparent")
	return &logicpb.TokenResponse{Token: "t", User: &logicpb.User{UserId: r.GetUsername()}}, nil
}

// TestTraceOfHTTP: a login is traced into im-logic, a message over HTTP into Kafka, a call to the gateway
// from its caller; the collector speaks TLS.
func TestTraceOfHTTP(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	keyPair(t, certFile, keyFile, 1, x509.NewCertPool())
	secure, err := credentials.NewServerTLSFromFile(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	c := collect(t, grpc.Creds(secure))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	logic, server := &fakeLogic{told: make(chan []string, 10)}, grpc.NewServer()
	logicpb.RegisterAuthServiceServer(server, logic)
	go func() { _ = server.Serve(ln) }()
	t.Cleanup(server.Stop)
	g := start(t, user("gw"), tracing(c, settings{"logic.target": ln.Addr().String(), "tracing.tls.enabled": "true",
		"tracing.tls.ca_file": certFile, "tracing.tls.server_name": "localhost", "tracing.service_name": "front-door"}))
	alice := user("alice")
	login := func(parent string) (seen []string) {
		h := http.Header{}
		if parent != "" {
			h.Set("traceparent", parent)
		}
		if got := post(t, g, "/api/auth/login", fmt.Sprintf(`{"username":%q,"password":"p"}`, alice), h); got.Status != http.StatusOK {
			t.Fatalf("login: %+v", got)
		}
		return <-logic.told
	}
	query := "" // of the messages
	message := func(id, h, envelope string) string {
		t.Helper()
		auth := http.Header{"Authorization": {"Bearer " + token(t, alice, time.Hour)}, "Traceparent": {h}}
		got := post(t, g, "/api/messages"+query, fmt.Sprintf(`{"type":"m","message_id":%q,"data":1%s}`, id, envelope), auth)
		if got.Status != http.StatusOK {
			t.Fatalf("message: %+v", got)
		}
		return header(find(t, "im-upstream-topic", func(r *kgo.Record) bool {
			return string(r.Key) == alice && header(r, "client_msg_id") == id
		}), "traceparent")
	}

	quiet := begin("00")
	if got := login(quiet.parent); len(got) != 1 || got[0] != quiet.parent {
		t.Errorf("im-logic was told %q, the gateway %q", got, quiet.parent)
	}
	if got := message("c-0", quiet.parent, ""); got != quiet.parent {
		t.Errorf("the record says %q, the request said %q", got, quiet.parent)
	}
	if got := login(""); len(got) != 1 || !strings.HasSuffix(got[0], "-00") {
		t.Errorf("without a context im-logic was told %q", got)
	}

	tr := begin("01")
	seen := login(tr.parent)
	kind := func(kind string) func(collector.Span) bool {
		return func(s collector.Span) bool { return s.Kind == kind }
	}
	request, call := one(t, c, tr, "the login", kind("server")), one(t, c, tr, "the call", kind("client"))
	if request.Name != "POST /api/auth/login" || request.Parent != tr.span || request.Attributes["http.response.status_code"] != "200" ||
		call.Name != "im.logic.v1.AuthService/Login" || call.Parent != request.SpanID || call.Resource["service.name"] != "front-door" {
		t.Errorf("%+v\n%+v", request, call)
	}
	if len(seen) != 1 {
		t.Fatalf("im-logic was told %q", seen)
	}
	told(t, "im-logic", seen[0], call)

	tr = begin("01")
	got := message("c-1", tr.parent, "")
	request, up := one(t, c, tr, "the request", kind("server")), one(t, c, tr, "the record", kind("producer"))
	if request.Name != "POST /api/messages" || request.Parent != tr.span || up.Parent != request.SpanID {
		t.Errorf("%+v\n%+v", request, up)
	}
	told(t, "record", got, up)

	query, tr = "?session_id="+connect(t, g, alice).session, begin("01")
	got = message("c-3", tr.parent, "")
	if up = one(t, c, tr, "the record of a session", kind("producer")); up.Parent != one(t, c, tr, "its request", kind("server")).SpanID {
		t.Errorf("%+v", up)
	}
	told(t, "record of a session", got, up)

	// A context in the envelope counts before the request's.
	outer, inner := begin("00"), begin("01")
	got = message("c-2", outer.parent, fmt.Sprintf(`,"trace_id":%q`, inner.parent))
	up = one(t, c, inner, "the record", kind("producer"))
	if up.Parent != inner.span {
		t.Errorf("%+v", up)
	}
	told(t, "record", got, up)

	tr = begin("01")
	ctx := metadata.AppendToOutgoingContext(deadline(t), "traceparent", tr.parent)
	if _, err := g.service().Push(ctx, &gatewaypb.PushRequest{TargetUserIds: []string{alice}, Data: []byte("1")}); err != nil {
		t.Fatal(err)
	}
	if s := one(t, c, tr, "the push", kind("server")); s.Name != "im.gateway.v1.GatewayService/Push" || s.Parent != tr.span {
		t.Errorf("%+v", s)
	}
	if g.stop() != 0 {
		t.Error("the gateway did not stop in order")
	}
	for _, tr := range []trace{quiet, outer} {
		if list := c.Spans(tr.id); len(list) > 0 {
			t.Errorf("not sampled, and yet: %+v", list)
		}
	}
	silent(t, c.Spans(""), alice)
}

// TestTraceOff: a gateway without a collector hands a client's context on as it came, in either protocol.
func TestTraceOff(t *testing.T) {
	g := start(t, user("gw"), nil)
	if got := g.metric(`im_gateway_tracing_queue_spans`); got != "" {
		t.Errorf("tracing has metrics: %s", got)
	}
	for _, protocol := range []string{jsonProtocol, protoProtocol} {
		name, tr := user("alice"), begin("01")
		c, err := dial(t, g, name, "/ws", http.Header{"Authorization": {"Bearer " + token(t, name, time.Hour)}}, protocol)
		if err != nil {
			t.Fatal(err)
		}
		if protocol == jsonProtocol {
			c.write(websocket.MessageText, fmt.Appendf(nil, `{"type":"m","message_id":"c-1","traceparent":%q,"data":1}`, tr.parent))
		} else {
			b, err := proto.Marshal(&clientpb.ClientFrame{Type: "m", MessageId: "c-1", TraceId: tr.parent, Data: []byte("1")})
			if err != nil {
				t.Fatal(err)
			}
			c.write(websocket.MessageBinary, b)
		}
		if a := c.ack(); a.Status != "success" {
			t.Fatalf("%+v", a)
		}
		r := find(t, "im-upstream-topic", contains(`"user_id":"`+name+`"`))
		if got := header(r, "traceparent"); got != tr.parent || !strings.Contains(string(r.Value), `"trace_id":"`+tr.id+`"`) {
			t.Errorf("%s: traceparent %q, was %q, in %s", protocol, got, tr.parent, r.Value)
		}
	}
}

// TestTraceCollectorAway: without its collector a gateway goes on; it keeps a bounded number of spans and
// counts those that it drops.
func TestTraceCollectorAway(t *testing.T) {
	g := start(t, user("gw"), settings{"tracing.endpoint": freeAddr(), "tracing.sample_ratio": "1", "tracing.spans_per_second": "1000000"})
	var records []*kgo.Record
	for i := range 6000 { // one span for each
		records = append(records, &kgo.Record{Topic: "im-downstream-topic-" + g.id,
			Value: fmt.Appendf(nil, `{"target_user_id":"%s-%d","data":1}`, g.id, i)})
	}
	if err := env.kafka.ProduceSync(deadline(t), records...).FirstErr(); err != nil {
		t.Fatal(err)
	}
	dropped := `im_gateway_tracing_spans_total{outcome="dropped"}`
	eventually(t, "spans are dropped", func() bool { got := g.metric(dropped); return got != "" && got != "0" })
	if depth, bound := g.metric("im_gateway_tracing_queue_spans"), g.metric("im_gateway_tracing_queue_spans_bound"); bound != "4096" || len(depth) > 4 {
		t.Errorf("%s spans of %s wait", depth, bound)
	}
	c := connect(t, g, user("alice"))
	c.send("m", "c-1", 1)
	if a := c.ack(); a.Status != "success" {
		t.Errorf("ack %+v", a)
	}
	if code := g.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if !strings.Contains(g.log.String(), "spans could not be sent to the collector") {
		t.Error("nothing is logged")
	}
}
