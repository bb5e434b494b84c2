package tracing

import (
	"context"
	"errors"
	"maps"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"im-gateway/codec"
	"im-gateway/test/collector"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	patience = 60 * time.Second

	traceID   = "0123456789abcdef0123456789abcdef"
	spanID    = "00f067aa0ba902b7"
	sampled   = "00-" + traceID + "-" + spanID + "-01"
	unsampled = "00-" + traceID + "-" + spanID + "-00"
)

func parse(t testing.TB, s string) codec.TraceContext {
	t.Helper()
	c, ok := codec.ParseTraceParent(s)
	if !ok {
		t.Fatalf("%s is no traceparent", s)
	}
	return c
}

func startCollector(t *testing.T, addr string) *collector.Collector {
	t.Helper()
	c, err := collector.Start(addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Stop)
	return c
}

// running is a Tracer that runs until stop, or the test's end.
type running struct {
	*Tracer
	t      *testing.T
	cancel context.CancelFunc
	stop   func()
}

func start(t *testing.T, endpoint string, change func(*Tracer)) *running {
	t.Helper()
	tracer, err := New(Options{
		Endpoint: endpoint, ServiceName: "im-gateway", Version: "v1", GatewayID: "gw-1", Sampler: codec.NewSampler(0, 1e6),
		UpstreamTopic: "up", DownstreamPrefix: "down-", Scheme: "https", Logger: zerolog.Nop(), Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(tracer)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- tracer.Run(ctx) }()
	r := &running{Tracer: tracer, t: t, cancel: cancel}
	stopped := false
	r.stop = func() {
		if cancel(); stopped {
			return
		}
		stopped = true
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Fatal("Run does not end")
		}
	}
	t.Cleanup(func() { r.stop() })
	return r
}

// begin begins a span under the sampled parent.
func (r *running) begin() *codec.Span {
	r.t.Helper()
	_, s := r.Begin(parse(r.t, sampled))
	if s == nil {
		r.t.Fatal("not traced")
	}
	return s
}

func (r *running) until(what string, ok func() bool) {
	r.t.Helper()
	deadline := time.After(patience)
	for !ok() {
		select {
		case <-time.After(5 * time.Millisecond):
		case <-deadline:
			r.t.Fatalf("it did not come true: %s", what)
		}
	}
}

// TestSpans: what the collector gets of each kind of span, and nothing else: no user, no token, no text of
// a client's.
func TestSpans(t *testing.T) {
	c := startCollector(t, "127.0.0.1:0")
	r := start(t, c.Addr, nil)
	want := map[string]collector.Span{} // by span id
	expect := func(s *codec.Span, w collector.Span) {
		text := string(s.AppendTraceParent(nil))
		w.TraceID, w.SpanID, w.Parent = text[3:35], text[36:52], spanID
		if s.Parent == [8]byte{} {
			w.Parent = ""
		}
		if w.Status == "" {
			w.Status = "unset"
		}
		w.Begun = s.Begun
		want[w.SpanID] = w
	}
	message := func(code codec.Code, offset int64) {
		s := r.begin()
		u := &codec.Upstream{Span: s, User: "alice", ClientMsgID: []byte("c-1"), Value: []byte("secret"), MessageID: []byte("01J"),
			Result: codec.UpstreamResult{Code: code, Partition: 3, Offset: offset}}
		r.Upstream(u)
		u.MessageID[0], u.Result = 'x', codec.UpstreamResult{} // it is the pool's again
		w := collector.Span{Name: "send up", Kind: "producer", Attributes: map[string]string{
			"messaging.system": "kafka", "messaging.operation.name": "send", "messaging.operation.type": "send",
			"messaging.destination.name": "up", "messaging.message.id": "01J"}}
		if code != codec.OK {
			w.Status, w.Problem, w.Attributes["error.type"] = "error", string(code), string(code)
		} else {
			w.Attributes["messaging.destination.partition.id"] = "3"
			if offset >= 0 {
				w.Attributes["messaging.kafka.offset"] = "7"
			}
		}
		expect(s, w)
	}
	message(codec.OK, 7)
	message(codec.OK, -1)
	message(codec.Overloaded, 0)

	record := func(change func(*codec.RecordTrace), also map[string]string, status, problem string) {
		s := r.begin()
		d := &codec.RecordTrace{Span: s, Topic: "down-gw-1", Group: "im-gateway-gw-1", Partition: 1, Offset: 9, MessageID: "m"}
		a := map[string]string{
			"messaging.system": "kafka", "messaging.operation.name": "process", "messaging.operation.type": "process",
			"messaging.destination.name": "down-gw-1", "messaging.destination.template": "down-{gateway_id}",
			"messaging.destination.partition.id": "1", "messaging.kafka.offset": "9",
			"messaging.consumer.group.name": "im-gateway-gw-1", "messaging.message.id": "m"}
		maps.Copy(a, also)
		if change(d); d.MessageID == "" {
			delete(a, "messaging.message.id")
		}
		r.Downstream(d)
		expect(s, collector.Span{Name: "process down-{gateway_id}", Kind: "consumer", Attributes: a, Status: status, Problem: problem})
	}
	record(func(d *codec.RecordTrace) { d.Ends[codec.EndDelivered], d.Ends[codec.EndOffline] = 2, 1 },
		map[string]string{"im_gateway.deliveries.delivered": "2", "im_gateway.deliveries.offline": "1"}, "", "")
	record(func(d *codec.RecordTrace) { d.MessageID, d.DeadLetter = "", errors.New("no JSON") },
		map[string]string{"error.type": "dead_letter"}, "error", "no JSON")
	record(func(d *codec.RecordTrace) { d.Abandoned = true },
		map[string]string{"error.type": "abandoned"}, "error", "the partition was lost; its next reader reads the record again")

	request := func(method, shown string, code int) {
		s := r.begin()
		r.HTTP(s, method, "/api/messages", code)
		w := collector.Span{Name: shown + " /api/messages", Kind: "server", Attributes: map[string]string{
			"http.request.method": shown, "http.route": "/api/messages", "url.path": "/api/messages", "url.scheme": "https",
			"http.response.status_code": map[int]string{200: "200", 422: "422", 503: "503", 405: "405"}[code]}}
		if code >= 500 {
			w.Status, w.Attributes["error.type"] = "error", "503"
		}
		expect(s, w)
	}
	request("POST", "POST", 200)
	request("POST", "POST", 422)
	request("POST", "POST", 503)
	request("alice", "_OTHER", 405)

	// A trace that begins here.
	root := r.begin()
	root.Parent = [8]byte{}
	r.HTTP(root, "GET", "/api/messages", 405)
	expect(root, collector.Span{Name: "GET /api/messages", Kind: "server", Attributes: map[string]string{
		"http.request.method": "GET", "http.route": "/api/messages", "url.path": "/api/messages", "url.scheme": "https",
		"http.response.status_code": "405"}})

	r.stop() // what was handed over is sent
	got := c.Spans("")
	if len(got) != len(want) {
		t.Errorf("%d spans, want %d", len(got), len(want))
	}
	for _, s := range got {
		w, ok := want[s.SpanID]
		if !ok {
			t.Errorf("unexpected: %+v", s)
			continue
		}
		if s.Name != w.Name || s.Kind != w.Kind || s.TraceID != w.TraceID || s.Parent != w.Parent || s.Status != w.Status ||
			s.Problem != w.Problem || !maps.Equal(s.Attributes, w.Attributes) || !s.Begun.Equal(w.Begun) || s.Ended.Before(s.Begun) {
			t.Errorf("got  %+v\nwant %+v", s, w)
		}
		for name, value := range map[string]string{"service.name": "im-gateway", "service.version": "v1", "service.instance.id": "gw-1"} {
			if s.Resource[name] != value {
				t.Errorf("%s is %q", name, s.Resource[name])
			}
		}
	}
	if n := r.exported.Load(); n != int64(len(want)) || r.dropped.Load()+r.failed.Load() != 0 {
		t.Errorf("%d exported, %d dropped, %d failed", n, r.dropped.Load(), r.failed.Load())
	}
}

// TestCalls: what callees are told, and which calls have spans.
func TestCalls(t *testing.T) {
	c := startCollector(t, "127.0.0.1:0")
	r := start(t, c.Addr, nil)
	call := func(tracer *Tracer, ctx context.Context, fail error) (told string) {
		err := tracer.Client(ctx, "/im.logic.v1.AuthService/Login", nil, nil, nil,
			func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
				md, _ := metadata.FromOutgoingContext(ctx)
				told = strings.Join(md.Get("traceparent"), "|")
				return fail
			})
		if !errors.Is(err, fail) {
			t.Errorf("answered %v", err)
		}
		return told
	}
	ctx := NewContext(context.Background(), parse(t, sampled))
	for name, tc := range map[string]struct {
		tracer *Tracer
		ctx    context.Context
		want   string
	}{
		"no trace": {r.Tracer, context.Background(), ""}, "not sampled": {r.Tracer, NewContext(context.Background(), parse(t, unsampled)), unsampled},
		"off": {nil, ctx, sampled}, "off, no trace": {nil, context.Background(), ""},
	} {
		if got := call(tc.tracer, tc.ctx, nil); got != tc.want {
			t.Errorf("%s: told %q", name, got)
		}
	}
	good := call(r.Tracer, ctx, nil)
	bad := call(r.Tracer, ctx, status.Error(codes.PermissionDenied, "alice"))

	serve := func(method, parent string, fail error) {
		ctx := context.Background()
		if parent != "" {
			ctx = metadata.NewIncomingContext(ctx, metadata.Pairs("traceparent", parent))
		}
		answer, err := r.Server(ctx, 1, &grpc.UnaryServerInfo{FullMethod: method}, func(_ context.Context, request any) (any, error) {
			return request, fail
		})
		if answer != 1 || !errors.Is(err, fail) {
			t.Errorf("answered %v, %v", answer, err)
		}
	}
	serve("/im.gateway.v1.GatewayService/Push", sampled, nil)
	serve("/im.gateway.v1.GatewayService/Push", unsampled, nil)
	serve("/im.gateway.v1.GatewayService/Push", "", nil) // of those that begin here none is sampled
	serve("/im.gateway.v1.GatewayService/Kick", sampled, status.Error(codes.InvalidArgument, "user_id"))
	serve("/im.gateway.v1.GatewayService/Stats", sampled, status.Error(codes.Internal, "x"))
	serve("/grpc.health.v1.Health/Check", sampled, nil)
	r.stop()

	got := map[string]collector.Span{}
	for _, s := range c.Spans("") {
		if s.TraceID != traceID || s.Parent != spanID || s.Attributes["rpc.system.name"] != "grpc" || s.Attributes["rpc.method"] != s.Name ||
			s.Problem != "" || len(s.Attributes) > 4 {
			t.Errorf("%+v", s)
		}
		got[s.Kind+" "+s.Name+" "+s.Attributes["rpc.response.status_code"]+" "+s.Status] = s
		if s.Attributes["error.type"] != "" && s.Attributes["error.type"] != s.Attributes["rpc.response.status_code"] {
			t.Errorf("%+v", s)
		}
	}
	for _, name := range []string{
		"client im.logic.v1.AuthService/Login OK unset", "client im.logic.v1.AuthService/Login PERMISSION_DENIED error",
		"server im.gateway.v1.GatewayService/Push OK unset", "server im.gateway.v1.GatewayService/Kick INVALID_ARGUMENT unset",
		"server im.gateway.v1.GatewayService/Stats INTERNAL error",
	} {
		if _, ok := got[name]; !ok {
			t.Errorf("missing: %s", name)
		}
		delete(got, name)
	}
	if len(got) > 0 {
		t.Errorf("unexpected: %v", got)
	}
	for i, s := range []string{good, bad} {
		if c := parse(t, s); !c.Sampled() || s[3:35] != traceID || s[36:52] == spanID {
			t.Errorf("call %d was told %s", i, s)
		}
	}
}

func TestOffCostsNothing(t *testing.T) {
	var off *Tracer
	in := parse(t, sampled)
	ctx := context.Background()
	call := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return nil }
	if n := testing.AllocsPerRun(100, func() {
		if told, span := off.Begin(in); span != nil || told != in {
			t.Fatal("traced")
		}
		_ = off.Client(ctx, "/m", nil, nil, nil, call)
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestWhatIsDecidedIsTold: with a Tracer a trace that begins here and is not recorded is told as that, so
// that nobody else decides anew.
func TestWhatIsDecidedIsTold(t *testing.T) {
	r := start(t, "127.0.0.1:1", nil)
	told, span := r.Begin(codec.TraceContext{})
	if span != nil || told.Sampled() || told.TraceID == [16]byte{} || told.SpanID == [8]byte{} {
		t.Errorf("%+v, %+v", told, span)
	}
	if again, span := r.Begin(told); again != told || span != nil {
		t.Errorf("%+v, %+v", again, span)
	}
}

// TestCollectorAway: while there is no collector nobody waits, what is kept is bounded and what is not is
// counted; when it comes spans are sent again.
func TestCollectorAway(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	_ = ln.Close()
	r := start(t, addr, nil)
	const n = 3 * queueSpans
	for range n {
		r.HTTP(r.begin(), "POST", "/x", 200)
	}
	if got := r.dropped.Load(); got < n-queueSpans-batchSpans-1 || got > n-queueSpans {
		t.Errorf("%d of %d are dropped", got, n)
	}
	c := startCollector(t, addr)
	r.until("all that was kept is sent or lost", func() bool { return r.exported.Load()+r.failed.Load()+r.dropped.Load() == n })
	for range 3 {
		r.HTTP(r.begin(), "POST", "/x", 200)
	}
	r.until("spans are sent again", func() bool {
		return len(c.Spans("")) > 0 && int64(len(c.Spans(""))) >= r.exported.Load() && r.exported.Load() >= 3
	})
}

// TestCollectorRefuses: a batch that is refused is counted and not tried for ever.
func TestCollectorRefuses(t *testing.T) {
	c := startCollector(t, "127.0.0.1:0")
	c.Answer(func(context.Context) error { return status.Error(codes.InvalidArgument, "no") })
	r := start(t, c.Addr, nil)
	r.HTTP(r.begin(), "POST", "/x", 200)
	r.until("it has failed", func() bool { return r.failed.Load() == 1 })
	c.Answer(nil)
	r.HTTP(r.begin(), "POST", "/x", 200)
	r.until("the next one is sent", func() bool { return r.exported.Load() == 1 && len(c.Spans("")) == 1 })
}

// TestStopSendsWhatIsOnItsWay: the batch that is being sent, and those behind it.
func TestStopSendsWhatIsOnItsWay(t *testing.T) {
	c := startCollector(t, "127.0.0.1:0")
	asked, goOn := make(chan struct{}, 100), make(chan struct{})
	c.Answer(func(context.Context) error {
		asked <- struct{}{}
		<-goOn
		return nil
	})
	r := start(t, c.Addr, func(t *Tracer) { t.late = patience })
	r.HTTP(r.begin(), "POST", "/x", 200)
	select {
	case <-asked:
	case <-time.After(patience):
		t.Fatal("nothing was sent")
	}
	const more = 2 * batchSpans
	for range more {
		r.HTTP(r.begin(), "POST", "/x", 200)
	}
	r.cancel()
	close(goOn)
	r.stop()
	if n := len(c.Spans("")); n != 1+more || r.exported.Load() != 1+more {
		t.Errorf("%d of %d spans have arrived, %d failed", n, 1+more, r.failed.Load())
	}
}

// TestCollectorHangs: a collector that never answers holds nobody up, nor the stop.
func TestCollectorHangs(t *testing.T) {
	c := startCollector(t, "127.0.0.1:0")
	asked := make(chan struct{}, 10)
	c.Answer(func(ctx context.Context) error {
		select {
		case asked <- struct{}{}:
		default:
		}
		<-ctx.Done()
		return ctx.Err()
	})
	r := start(t, c.Addr, nil)
	r.HTTP(r.begin(), "POST", "/x", 200)
	select {
	case <-asked:
	case <-time.After(patience):
		t.Fatal("nothing was sent")
	}
	for range 2 * queueSpans {
		r.HTTP(r.begin(), "POST", "/x", 200)
	}
	if r.dropped.Load() != queueSpans {
		t.Errorf("%d are dropped", r.dropped.Load())
	}
	r.stop()
	if n := r.failed.Load(); n == 0 || r.exported.Load() != 0 {
		t.Errorf("%d failed, %d exported", n, r.exported.Load())
	}
}

// BenchmarkSpan is what a span costs on the goroutine that ends it, and on Run's.
func BenchmarkSpan(b *testing.B) {
	t := &Tracer{o: Options{UpstreamTopic: "up", Sampler: codec.NewSampler(1, 1<<40)}, queue: make(chan *ended, queueSpans)}
	in := parse(b, sampled)
	b.ReportAllocs()
	for b.Loop() {
		_, s := t.Begin(in)
		t.Upstream(&codec.Upstream{Span: s, MessageID: []byte("01J")})
		if len(t.queue) == cap(t.queue) {
			b.StopTimer()
			for len(t.queue) > 0 {
				<-t.queue
			}
			b.StartTimer()
		}
	}
}

// BenchmarkExport is what the goroutine of Run spends on a span, and a collector in the same process.
func BenchmarkExport(b *testing.B) {
	c, err := collector.Start("127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer c.Stop()
	t, err := New(Options{
		Endpoint: c.Addr, ServiceName: "im-gateway", Version: "v1", GatewayID: "gw-1", Sampler: codec.NewSampler(1, 1<<40),
		UpstreamTopic: "up", DownstreamPrefix: "down-", Scheme: "http", Logger: zerolog.Nop(), Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		b.Fatal(err)
	}
	if err := t.exporter.Start(b.Context()); err != nil {
		b.Fatal(err)
	}
	in := parse(b, sampled)
	b.ReportAllocs()
	for b.Loop() {
		_, s := t.Begin(in)
		t.Upstream(&codec.Upstream{Span: s, MessageID: []byte("01J")})
		if t.add(<-t.queue); len(t.batch.spans) == batchSpans {
			t.export(b.Context())
		}
	}
	t.finish(b.Context())
	_ = t.conn.Close()
	if t.failed.Load() > 0 {
		b.Errorf("%d failed", t.failed.Load())
	}
}
