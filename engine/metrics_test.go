package engine

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io/fs"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/lestrrat-go/jwx/v2/jwk"
	"github.com/lestrrat-go/jwx/v2/jwt"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kgo"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"im-gateway/cmd/im-dev/embedded"
	"im-gateway/codec/gatewaypb"
	"im-gateway/registry"
)

const metricsPatience = 60 * time.Second

const metricsSecret = "metrics-secret-0123456789abcdef-0123456789"

// TestMetricsReference runs a gateway with everything switched on that has metrics, uses it, and holds what
// /metrics shows then against its reference and against all that names metrics.
func TestMetricsReference(t *testing.T) {
	families := runningMetrics(t)
	t.Run("docs/metrics.md", func(t *testing.T) { golden(t, "../docs/metrics.md", metricsReference(t, families)) })
	t.Run("lint", func(t *testing.T) { lintMetrics(t, families) })
	t.Run("bounds", func(t *testing.T) { boundedMetrics(t, families) })
	t.Run("documents", func(t *testing.T) { namedMetrics(t, families) })
	t.Run("dashboard", func(t *testing.T) { dashboardMetrics(t, families) })
	t.Run("alerts", func(t *testing.T) { alertMetrics(t, families) })
	t.Run("values", func(t *testing.T) { sensibleMetrics(t, families) })
}

// runningMetrics returns what a gateway shows once it has been used.
func runningMetrics(t *testing.T) map[string]*dto.MetricFamily {
	t.Helper()
	limit := debug.SetMemoryLimit(8 << 30) // for the metrics of memory
	defer debug.SetMemoryLimit(limit)
	servers, err := embedded.Start(t.Context(), embedded.Options{
		Topics: []string{"im-upstream-topic", "im-undelivered-topic", "im-deadletter-topic", "im-user-events-topic"},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := servers.Close(); err != nil {
			t.Error(err)
		}
	}()
	logic, endLogic := someServer(t)
	defer endLogic()
	keys := keyServer(t)
	defer keys.Close()
	cert, key := testCertificate(t, t.TempDir(), "localhost")
	cfg := Default()
	cfg.GatewayID = "g-1"
	cfg.HTTP.Addr, cfg.Admin.Addr, cfg.GRPC.Addr = "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0"
	cfg.HTTP.Loops, cfg.Shard.Count = 2, 2
	cfg.Auth.HS256Secret, cfg.Auth.Issuer = metricsSecret, "us"
	cfg.Auth.Issuers = []string{"issuer=them algorithms=ES256 jwks_url=" + keys.URL + "/keys"}
	cfg.HTTP.TLS.CertFile, cfg.HTTP.TLS.KeyFile = cert, key
	cfg.Admin.TLS.CertFile, cfg.Admin.TLS.KeyFile = cert, key
	cfg.GRPC.TLS.CertFile, cfg.GRPC.TLS.KeyFile, cfg.GRPC.TLS.CAFile = cert, key, cert
	cfg.Kafka.Brokers, cfg.Kafka.StartGrace = servers.KafkaBrokers(), 0
	cfg.Redis.Addrs, cfg.Etcd.Endpoints = []string{servers.RedisAddr()}, servers.EtcdEndpoints()
	cfg.Logic.Target = logic
	cfg.Tracing.Endpoint = logic
	cfg.Drain.Window = 0
	e, err := New(Fixed(cfg), zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- e.Run(ctx) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	select {
	case <-e.Ready():
	case err := <-ended:
		ended <- err
		t.Fatal("the gateway did not start: ", err)
	case <-time.After(metricsPatience):
		t.Fatal("the gateway is not ready: ", e.ready.Missing())
	}
	authorities, err := loadAuthorities(cert)
	if err != nil {
		t.Fatal(err)
	}
	useGateway(t, e, servers.KafkaBrokers(), &tls.Config{RootCAs: authorities})

	// Loops add what they have counted at a tick, the consumer shows its window once a second.
	var families map[string]*dto.MetricFamily
	late := time.After(metricsPatience)
	for {
		list, err := prometheus.Gatherers{e.metrics, runtimeRegistry()}.Gather()
		if err != nil {
			t.Fatal(err)
		}
		families = map[string]*dto.MetricFamily{}
		for _, f := range list {
			families[f.GetName()] = f
		}
		if used(families) {
			return families
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-late:
			t.Fatal("the metrics do not show what was done: ", families["im_gateway_transport_messages_sent_total"],
				families["im_gateway_shard_delivery_duration_seconds"])
		}
	}
}

// used tells whether the metrics show what useGateway does.
func used(f map[string]*dto.MetricFamily) bool {
	count := func(name, label string) float64 {
		for _, m := range f["im_gateway_"+name].GetMetric() {
			if l := m.GetLabel(); label == "" || len(l) == 1 && l[0].GetValue() == label {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
		return -1
	}
	return count("transport_messages_sent_total", "new-message") == 1 && count("transport_acks_total", "success") == 1 &&
		count("transport_messages_received_total", "send-message") == 1 && count("shard_ack_duration_seconds", "") == 1 &&
		count("shard_delivery_duration_seconds", "") == 1 && count("consumer_ends_total", "delivered") == 1 &&
		count("producer_ack_duration_seconds", "") == 1 && count("shard_session_duration_seconds", "") == 1 &&
		count("shard_sessions", "") == 0 && count("registry_gateways", "") == 1 &&
		len(f["im_gateway_dependency_up"].GetMetric()) == 4
}

// useGateway connects, sends, is pushed to and kicked, and calls what can be called.
func useGateway(t *testing.T, e *Engine, brokers []string, trust *tls.Config) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), metricsPatience)
	defer cancel()
	tok, err := jwt.NewBuilder().Claim("user_id", "alice").Issuer("us").Expiration(time.Now().Add(time.Hour)).Build()
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.Sign(tok, jwt.WithKey(jwa.HS256, []byte(metricsSecret)))
	if err != nil {
		t.Fatal(err)
	}
	web := &http.Client{Transport: &http.Transport{TLSClientConfig: trust}}
	defer web.CloseIdleConnections()
	c, _, err := websocket.Dial(ctx, "wss://"+e.HTTPAddr().String()+"/ws", &websocket.DialOptions{
		HTTPClient: web, HTTPHeader: http.Header{"Authorization": {"Bearer " + string(token)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.CloseNow() }()
	expect := func(kind string) {
		t.Helper()
		_, b, err := c.Read(ctx)
		var f struct {
			Type string `json:"type"`
		}
		if err != nil || json.Unmarshal(b, &f) != nil || f.Type != kind {
			t.Fatalf("got %s (%v), want %s", b, err, kind)
		}
	}
	expect("connected")
	if err := c.Write(ctx, websocket.MessageText, []byte(`{"type":"send-message","message_id":"c-1","data":{}}`)); err != nil {
		t.Fatal(err)
	}
	expect("message-ack")
	kafka, err := kgo.NewClient(kgo.SeedBrokers(brokers...))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	push := &kgo.Record{Topic: "im-downstream-topic-g-1", Value: []byte(`{"user_id":"alice","content":"hi"}`)}
	if err := kafka.ProduceSync(ctx, push).FirstErr(); err != nil {
		t.Fatal(err)
	}
	expect("new-message")
	resp, err := web.Post("https://"+e.HTTPAddr().String()+"/api/auth/guest", "application/json", strings.NewReader(`{"guestName":"x"}`))
	if err != nil || resp.StatusCode != http.StatusNotImplemented {
		t.Fatalf("a guest at an im-logic that can do nothing: %v, %v", resp, err)
	}
	_ = resp.Body.Close()
	addr, err := registry.GatewayAddr(ctx, e.etcd, "g-1")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(credentials.NewTLS(trust)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	kick, err := gatewaypb.NewGatewayServiceClient(conn).Kick(ctx, &gatewaypb.KickRequest{UserId: "alice"})
	if err != nil {
		t.Fatal(kick, err)
	}
	for err == nil {
		_, _, err = c.Read(ctx)
	}
	if websocket.CloseStatus(err) != 4501 {
		t.Fatal(err)
	}
}

// someServer is a gRPC server without services.
func someServer(t *testing.T) (addr string, end func()) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	return ln.Addr().String(), func() {
		s.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}
}

// keyServer serves a JWK set.
func keyServer(t *testing.T) *httptest.Server {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := jwk.FromRaw(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]any{jwk.KeyIDKey: "1", jwk.AlgorithmKey: jwa.ES256} {
		if err := public.Set(name, value); err != nil {
			t.Fatal(err)
		}
	}
	set := jwk.NewSet()
	if err := set.AddKey(public); err != nil {
		t.Fatal(err)
	}
	return httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(set) }))
}

// lintMetrics holds every name, type and help against Prometheus' conventions.
func lintMetrics(t *testing.T, families map[string]*dto.MetricFamily) {
	var text bytes.Buffer
	for _, f := range sorted(families) {
		if _, err := expfmt.MetricFamilyToText(&text, f); err != nil {
			t.Fatal(err)
		}
	}
	problems, err := promlint.New(&text).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	for name, f := range families {
		if strings.HasPrefix(name, "im_gateway_") && !strings.HasSuffix(f.GetHelp(), ".") {
			t.Errorf("%s: its help is no sentence: %s", name, f.GetHelp())
		}
		if strings.HasSuffix(name, "_info") {
			continue
		}
		if ours := strings.HasPrefix(name, "im_gateway_"); ours && (f.GetType() == dto.MetricType_COUNTER) != strings.HasSuffix(name, "_total") {
			t.Errorf("%s is a %s", name, f.GetType())
		}
	}
}

// dynamic are the labels whose values are not known beforehand, with what bounds their number.
var dynamic = map[string]string{
	"gateway_id": "one", "version": "one", "shard": "shard.count", "topic": "takeover.max_topics and one",
	"partition": "Kafka's", "issuer": "the configuration", "url": "the configuration", "method": "the services", "code": "the codes",
}

// boundedMetrics holds that each bound belongs to something, and that no label is a client's to choose.
func boundedMetrics(t *testing.T, families map[string]*dto.MetricFamily) {
	series := 0
	for name, f := range families {
		series += len(f.GetMetric())
		for _, l := range labelsOf(f) {
			if slices.Contains([]string{"user_id", "session_id", "message_id", "device_id", "remote"}, l) {
				t.Errorf("%s has the label %s", name, l)
			}
		}
		of, ok := strings.CutSuffix(name, "_bound")
		if !ok {
			if of, ok = strings.CutSuffix(name, "_bound_bytes"); !ok {
				continue
			}
			of += "_bytes"
		}
		if of == "im_gateway_shard_queue" {
			of = "im_gateway_shard_queue_depth"
		}
		if families[of] == nil {
			t.Errorf("%s: there is no %s", name, of)
		}
	}
	if series > 700 {
		t.Errorf("%d series, want at most 700", series)
	}
	t.Logf("%d families, %d series", len(families), series)
}

// namedMetrics holds that the documents, and the suites that read metrics, name none that is not there.
func namedMetrics(t *testing.T, families map[string]*dto.MetricFamily) {
	docs, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	files := append(docs, "../README.md", "../ARCHITECTURE.md", "queues.go", "ledger.go", "operator.go")
	for _, dir := range []string{"../test", "../bench"} {
		if err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			if filepath.Ext(path) == ".go" {
				files = append(files, path)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	named := 0
	for _, path := range files {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range regexp.MustCompile(`im_gateway_\w+`).FindAllString(string(text), -1) {
			if beginning := strings.HasSuffix(name, "_"); !beginning && familyOf(families, name) == nil && families[name] == nil {
				t.Errorf("%s names %s, which does not exist", path, name)
			}
			named++
		}
	}
	if named < len(families) {
		t.Errorf("only %d metrics are named", named)
	}
}

// sensibleMetrics looks at some values.
func sensibleMetrics(t *testing.T, families map[string]*dto.MetricFamily) {
	for name, want := range map[string]float64{
		"im_gateway_ready": 1, "im_gateway_draining": 0, "im_gateway_registry_registered": 1, "im_gateway_registry_gateways": 1,
		"im_gateway_producer_available": 1,
		"im_gateway_memory_pressure":    0, "im_gateway_takeover_topics_bound": 16,
	} {
		if got := families[name].GetMetric()[0].GetGauge().GetValue(); got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	for _, m := range families["im_gateway_registry_lease_held"].GetMetric() {
		if m.GetGauge().GetValue() != 1 {
			t.Errorf("lease %v is not held", m.GetLabel())
		}
	}
	expiry := families["im_gateway_tls_certificate_expiry_timestamp_seconds"].GetMetric()[0].GetGauge().GetValue()
	if math.Abs(expiry-float64(time.Now().Add(time.Hour).Unix())) > 600 {
		t.Errorf("the certificate expires at %v", expiry)
	}
	for _, name := range []string{"go_sched_latencies_seconds", "go_sched_pauses_total_gc_seconds", "go_goroutines", "process_open_fds", "go_build_info"} {
		if families[name] == nil {
			t.Errorf("there is no %s", name)
		}
	}
}

func sorted(families map[string]*dto.MetricFamily) (list []*dto.MetricFamily) {
	for _, f := range families {
		list = append(list, f)
	}
	slices.SortFunc(list, func(a, b *dto.MetricFamily) int { return strings.Compare(a.GetName(), b.GetName()) })
	return list
}

// labelsOf returns the names of a family's labels.
func labelsOf(f *dto.MetricFamily) (names []string) {
	for _, m := range f.GetMetric() {
		for _, l := range m.GetLabel() {
			if !slices.Contains(names, l.GetName()) {
				names = append(names, l.GetName())
			}
		}
	}
	return names
}

// valuesOf returns the values of a label where they are a fixed set.
func valuesOf(f *dto.MetricFamily, label string) (values []string) {
	if dynamic[label] != "" && f.GetName() != "im_gateway_transport_closes_total" && f.GetName() != "im_gateway_transport_refused_total" &&
		f.GetName() != "im_gateway_shard_refused_total" && f.GetName() != "im_gateway_shard_failed_total" {
		return nil
	}
	for _, m := range f.GetMetric() {
		for _, l := range m.GetLabel() {
			if l.GetName() == label && !slices.Contains(values, l.GetValue()) {
				values = append(values, l.GetValue())
			}
		}
	}
	slices.Sort(values)
	return values
}

// metricsSections are the parts of the reference, by the beginning of their metrics' names; those that fit
// none are the gateway's own.
var metricsSections = []struct{ prefix, title, text string }{
	{"", "The gateway", "The node itself, its memory and its certificates."},
	{"transport", "transport", "The public port: connections, handshakes, sessions, messages and bytes."},
	{"http", "http", "The HTTP API on the public port."},
	{"shard", "shard", "What is decided about sessions and messages: acks, deliveries, limits, queues."},
	{"producer", "producer", "The way to Kafka."},
	{"consumer", "consumer", "The downstream topic, and those that were taken over: what was read and how it ended, the ledger's downstream side."},
	{"presence", "presence", "Users' entries in Redis."},
	{"registry", "registry", "etcd: the registration, the ownership of the downstream topic, the other gateways."},
	{"takeover", "takeover", "Topics of dead gateways."},
	{"peer", "peer", "Calls to other gateways."},
	{"grpc", "grpc", "The gRPC server."},
	{"logic", "logic", "Calls to im-logic."},
	{"admin", "admin", "The admin port."},
	{"tracing", "tracing", "Spans on their way to the collector, where tracing is on."},
	{"deny_list", "deny_list", "Denied tokens."},
	{"jwks", "jwks", "The issuers' keys, where they are published as JWK sets."},
}

const metricsHead = "# Metrics\n\n" +
	"<!-- Generated by `go test ./engine -run TestMetricsReference -update` from a running gateway: do not edit. -->\n\n" +
	"`GET /metrics` on the admin port, in the format that the scraper asks for. All names begin with `im_gateway_`; besides\n" +
	"there are Go's and the process's own (`go_*`, `process_*`), among them how long goroutines wait for a processor\n" +
	"(`go_sched_latencies_seconds`) and collections stop them (`go_sched_pauses_total_gc_seconds`).\n\n" +
	"- Whatever can be full has a gauge with its depth and one ending in `_bound` (`_bound_bytes`) with its bound.\n" +
	"- Histograms have classic buckets; those of shard, producer and sessions have native ones too, for a Prometheus that takes\n" +
	"  them (`scrape_native_histograms`, or `--enable-feature=native-histograms` before 3.8).\n" +
	"- Labels that clients could choose take a fixed set of values and `other`. The values listed are all that there are; a\n" +
	"  label without a list is bounded by the configuration.\n" +
	"- `gateway_id` is on `im_gateway_info` alone: join it as the dashboard does, by `instance`.\n" +
	"- Event loops add what they have counted ten times a second, shards after each round.\n\n" +
	"The dashboard is `deploy/grafana/im-gateway.json`, the alert rules are `deploy/prometheus/alerts.yaml`; see\n" +
	"[monitoring](monitoring.md).\n"

// metricsReference is docs/metrics.md.
func metricsReference(t *testing.T, families map[string]*dto.MetricFamily) string {
	t.Helper()
	sections := make([][]*dto.MetricFamily, len(metricsSections))
	for _, f := range sorted(families) {
		name, ours := strings.CutPrefix(f.GetName(), "im_gateway_")
		if !ours {
			continue
		}
		at := 0
		for i, s := range metricsSections {
			if s.prefix != "" && (strings.HasPrefix(name, s.prefix+"_") || strings.HasPrefix(name, s.prefix+"s_")) {
				at = i
			}
		}
		sections[at] = append(sections[at], f)
	}
	b := &strings.Builder{}
	b.WriteString(metricsHead)
	for i, s := range metricsSections {
		if len(sections[i]) == 0 {
			t.Errorf("section %s is empty", s.title)
		}
		fmt.Fprintf(b, "\n## %s\n\n%s\n\n| metric | type | unit | labels | meaning |\n|---|---|---|---|---|\n", s.title, s.text)
		for _, f := range sections[i] {
			fmt.Fprintf(b, "| `%s` | %s | %s | %s | %s |\n", f.GetName(), strings.ToLower(f.GetType().String()), unitOf(f.GetName()),
				labelCell(f), cell(f.GetHelp()))
		}
	}
	return b.String()
}

func unitOf(name string) string {
	name = strings.TrimSuffix(name, "_total")
	switch {
	case strings.HasSuffix(name, "_timestamp_seconds"):
		return "Unix time, s"
	case strings.HasSuffix(name, "_seconds"):
		return "s"
	case strings.HasSuffix(name, "_bytes"):
		return "bytes"
	}
	return ""
}

func labelCell(f *dto.MetricFamily) string {
	var parts []string
	for _, l := range labelsOf(f) {
		part := "`" + l + "`"
		if values := valuesOf(f, l); len(values) > 0 {
			part += ": " + strings.Join(values, ", ")
		}
		parts = append(parts, part)
	}
	return strings.Join(parts, "; ")
}
