package engine

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"im-gateway/codec/gatewaypb"
)

func TestReadiness(t *testing.T) {
	r := NewReadiness("kafka", "redis")
	r.Waiting("kafka", "connection refused")
	r.Met("redis")
	r.Met("redis")
	if m := r.Missing(); len(m) != 1 || m[0] != (Condition{"kafka", "connection refused"}) {
		t.Errorf("missing %v", m)
	}
	select {
	case <-r.Done():
		t.Error("done before every condition was met")
	default:
	}
	r.Met("kafka")
	<-r.Done()
	r.Waiting("kafka", "away again") // an outage does not clear readiness
	r.Met("unknown")
	if m := r.Missing(); len(m) != 0 {
		t.Errorf("missing %v, want none", m)
	}
	r.Drain("SIGTERM")
	if m := r.Missing(); len(m) != 1 || m[0].Name != "draining" {
		t.Errorf("missing %v, want draining", m)
	}
}

// The port of a machine's own answers nobody who calls it by another name: DNS rebinding.
func TestAdminOfThisMachine(t *testing.T) {
	h := loopbackOnly(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) }))
	for host, want := range map[string]int{
		"127.0.0.1:8081": 200, "127.9.9.9": 200, "localhost:8081": 200, "LOCALHOST": 200, "[::1]:8081": 200, "[::1]": 200,
		"evil.example:8081": 421, "localhost.evil.example": 421, "127.0.0.1.evil.example:8081": 421, "10.0.0.1:8081": 421, "": 421, "[::2]:1": 421,
	} {
		r := httptest.NewRequest(http.MethodGet, "/metrics", nil)
		r.Host = host
		w := httptest.NewRecorder()
		if h.ServeHTTP(w, r); w.Code != want {
			t.Errorf("%q: %d, want %d", host, w.Code, want)
		}
	}
}

func TestAdmin(t *testing.T) {
	ready := NewReadiness("kafka")
	ready.Waiting("kafka", "connection refused")
	h, err := NewAdmin(AdminOptions{
		GatewayID: "g-1", Version: "v9", Readiness: ready, Registry: prometheus.NewRegistry(), Logger: zerolog.Nop(),
		Operator: &gatewaypb.UnimplementedAdminServiceServer{}, Token: testActing(t, ""),
	})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- ServeAdmin(ctx, ln, h, zerolog.Nop()) }()
	client := &http.Client{}
	named, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+ln.Addr().String()+"/healthz", nil)
	if err != nil {
		t.Fatal(err)
	}
	named.Host = "evil.example"
	if r, err := client.Do(named); err != nil || r.StatusCode != http.StatusMisdirectedRequest || r.Body.Close() != nil {
		t.Fatalf("by another name: %v, %v", r, err)
	}
	get := func(path string) (int, string) {
		r, err := client.Get("http://" + ln.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return r.StatusCode, strings.TrimSpace(string(body))
	}
	for _, tc := range []struct {
		path   string
		status int
		want   string
	}{
		{"/healthz", 200, `{"status":"ok"}`},
		{"/readyz", 503, `{"missing":[{"name":"kafka","reason":"connection refused"}],"ready":false}`},
		{"/metrics", 200, `im_gateway_info{gateway_id="g-1",version="v9"} 1`},
		{"/metrics", 200, "im_gateway_ready 0"},
		{"/debug/pprof/", 200, "goroutine"},
		{"/debug/pprof/goroutine?debug=1", 200, "goroutine profile"},
		{"/nothing", 404, ""},
	} {
		if status, body := get(tc.path); status != tc.status || !strings.Contains(body, tc.want) {
			t.Errorf("%s: %d %s, want %d %s", tc.path, status, body, tc.status, tc.want)
		}
	}
	ready.Met("kafka")
	if status, body := get("/readyz"); status != 200 || body != `{"ready":true}` {
		t.Errorf("/readyz when ready: %d %s", status, body)
	}
	ready.Drain("signal")
	if status, _ := get("/readyz"); status != 503 {
		t.Errorf("/readyz while draining: %d", status)
	}
	client.CloseIdleConnections()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestLogger(t *testing.T) {
	keepLogLevel(t)
	var out bytes.Buffer
	for _, tc := range []struct {
		cfg  Log
		json bool
	}{{Log{"info", "auto"}, true}, {Log{"info", "json"}, true}, {Log{"info", "console"}, false}} {
		out.Reset()
		l, err := NewLogger(&out, tc.cfg)
		if err != nil {
			t.Fatal(err)
		}
		l.Debug().Msg("not written")
		l.Info().Str("k", "v").Msg("hello")
		line := out.String()
		if strings.Count(line, "\n") != 1 || !strings.Contains(line, "hello") || json.Valid([]byte(line)) != tc.json {
			t.Errorf("%+v: %q", tc.cfg, line)
		}
	}
	if _, err := NewLogger(&out, Log{"loud", "json"}); err == nil {
		t.Error("the level loud was taken")
	}
}

// keepLogLevel gives the tests that follow the level of before back.
func keepLogLevel(t *testing.T) {
	before := zerolog.GlobalLevel()
	t.Cleanup(func() { zerolog.SetGlobalLevel(before) })
}

func TestLogLevel(t *testing.T) {
	keepLogLevel(t)
	var out bytes.Buffer
	l, err := NewLogger(&out, Log{"info", "json"})
	if err != nil {
		t.Fatal(err)
	}
	part := l.With().Str("part", "x").Logger().Sample(&zerolog.BasicSampler{N: 1}) // a copy, as the parts have
	for _, level := range []string{"trace", "debug", "info", "warn", "error", "info"} {
		if err := (LogLevel{}).Set(level); err != nil {
			t.Fatal(err)
		}
		if got := (LogLevel{}).String(); got != level {
			t.Errorf("the level is %s, want %s", got, level)
		}
		out.Reset()
		part.Debug().Msg("detail")
		part.Warn().Msg("trouble")
		lines := out.String()
		if strings.Contains(lines, "detail") != (level == "trace" || level == "debug") ||
			strings.Contains(lines, "trouble") == (level == "error") || part.Debug().Enabled() != strings.Contains(lines, "detail") {
			t.Errorf("at %s there is logged:\n%s", level, lines)
		}
	}
	for _, bad := range []string{"", "loud", "INFO", "1", "fatal", "disabled"} {
		if err := (LogLevel{}).Set(bad); err == nil || (LogLevel{}).String() != "info" {
			t.Errorf("level %q: %v, the level is %s", bad, err, LogLevel{})
		}
	}
}

func TestAdvertiseAddr(t *testing.T) {
	loop := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 90}
	if a, err := AdvertiseAddr("x:1", loop); a != "x:1" || err != nil {
		t.Errorf("configured: %s %v", a, err)
	}
	if a, err := AdvertiseAddr("", loop); a != "127.0.0.1:90" || err != nil {
		t.Errorf("bound: %s %v", a, err)
	}
	ip := chooseIP([]net.Addr{
		&net.IPNet{IP: net.IPv4(127, 0, 0, 1)}, &net.IPNet{IP: net.ParseIP("fe80::1")},
		&net.IPNet{IP: net.ParseIP("2001:db8::1")}, &net.IPNet{IP: net.IPv4(10, 0, 0, 7)},
	})
	if !ip.Equal(net.IPv4(10, 0, 0, 7)) {
		t.Errorf("chose %s", ip)
	}
	if ip := chooseIP([]net.Addr{&net.IPNet{IP: net.ParseIP("::1")}}); ip != nil {
		t.Errorf("chose %s of loopback", ip)
	}
}

// TestAdminTLS: the port over TLS, and closed to who has no certificate of its authorities.
func TestAdminTLS(t *testing.T) {
	dir := t.TempDir()
	cert, key := testCertificate(t, dir, "admin.test")
	operatorCert, operatorKey := testCertificate(t, dir, "operator.test")
	stranger, strangerKey := testCertificate(t, dir, "stranger.test")
	out := &safeBuffer{}
	get := func(files AdminTLS, client TLS) (int, error) {
		t.Helper()
		h, err := NewAdmin(AdminOptions{
			Readiness: NewReadiness(), Registry: prometheus.NewRegistry(), Logger: zerolog.Nop(),
			Operator: &gatewaypb.UnimplementedAdminServiceServer{}, Token: testActing(t, ""),
		})
		if err != nil {
			t.Fatal(err)
		}
		server, err := files.Server(zerolog.Nop())
		if err != nil {
			t.Fatal(err)
		}
		ln, err := tls.Listen("tcp", "127.0.0.1:0", server)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- ServeAdmin(ctx, ln, h, zerolog.New(out)) }()
		defer func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}()
		client.Enabled = true
		config, err := client.Client()
		if err != nil {
			t.Fatal(err)
		}
		transport := &http.Transport{TLSClientConfig: config}
		defer transport.CloseIdleConnections()
		resp, err := (&http.Client{Transport: transport}).Get("https://" + ln.Addr().String() + "/healthz")
		if err != nil {
			return 0, err
		}
		return resp.StatusCode, resp.Body.Close()
	}
	plain := AdminTLS{CertFile: cert, KeyFile: key}
	mutual := AdminTLS{CertFile: cert, KeyFile: key, ClientCAFile: operatorCert}
	for _, c := range []struct {
		name   string
		server AdminTLS
		client TLS
		ok     bool
	}{
		{"TLS", plain, TLS{CAFile: cert}, true},
		{"TLS of an unknown authority", plain, TLS{CAFile: stranger}, false},
		{"mutual", mutual, TLS{CAFile: cert, CertFile: operatorCert, KeyFile: operatorKey}, true},
		{"mutual without a certificate", mutual, TLS{CAFile: cert}, false},
		{"mutual with another's", mutual, TLS{CAFile: cert, CertFile: stranger, KeyFile: strangerKey}, false},
	} {
		if status, err := get(c.server, c.client); (err == nil && status == http.StatusOK) != c.ok {
			t.Errorf("%s: %d, %v", c.name, status, err)
		}
	}
	if lines := out.take(); !strings.Contains(lines, `"level":"debug","detail":"http: TLS handshake error`) {
		t.Errorf("the log says %s", lines)
	}
}
