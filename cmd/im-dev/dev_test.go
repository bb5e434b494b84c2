package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"im-gateway/engine"
)

// The gateway's libraries keep three goroutines per process, whatever is closed.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		goleak.IgnoreAnyFunction("github.com/panjf2000/ants/v2.(*poolCommon).purgeStaleWorkers"),
		goleak.IgnoreAnyFunction("github.com/panjf2000/ants/v2.(*poolCommon).ticktock"),
		goleak.IgnoreAnyFunction("github.com/rcrowley/go-metrics.(*meterArbiter).tick"))
}

const testDeadline = 60 * time.Second

// free are flags that take no port that something else may want.
var free = []string{"-http", "127.0.0.1:0", "-page", "127.0.0.1:0", "-admin", "127.0.0.1:0", "-grpc", "127.0.0.1:0"}

// screen is what im-dev prints, readable while it prints.
type screen struct {
	mu      sync.Mutex
	text    bytes.Buffer
	changed chan struct{}
}

func newScreen() *screen { return &screen{changed: make(chan struct{}, 1)} }

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case s.changed <- struct{}{}:
	default:
	}
	return s.text.Write(p)
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// waitFor returns the text once it matches.
func (s *screen) waitFor(t *testing.T, pattern string) string {
	t.Helper()
	late := time.NewTimer(testDeadline)
	defer late.Stop()
	for re := regexp.MustCompile(pattern); !re.MatchString(s.String()); {
		select {
		case <-s.changed:
		case <-late.C:
			t.Fatalf("never printed %s:\n%s", pattern, s)
		}
	}
	return s.String()
}

// session is one im-dev under test.
type session struct {
	out, log *screen
	signals  chan os.Signal
	code     chan int
}

func launch(start startFunc, args ...string) *session {
	s := &session{newScreen(), newScreen(), make(chan os.Signal, 2), make(chan int, 1)}
	go func() { s.code <- run(args, []string{"IM_KAFKA_BROKERS=nowhere:1"}, s.out, s.log, s.signals, start) }()
	return s
}

func (s *session) exit(t *testing.T) int {
	t.Helper()
	select {
	case code := <-s.code:
		return code
	case <-time.After(testDeadline):
		t.Fatalf("did not end:\n%s", s.log)
		return -1
	}
}

func TestWholeSystem(t *testing.T) {
	s := launch(start, slices.Concat(free, []string{"-data", t.TempDir()})...)
	text := s.out.waitFor(t, `Servers `)
	find := func(pattern string) string {
		m := regexp.MustCompile(pattern).FindStringSubmatch(text)
		if m == nil {
			t.Fatalf("%s is not in:\n%s", pattern, text)
		}
		return m[1]
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: testDeadline}

	gateway := find(`curl -s (http://\S+)/api/auth/login`)
	pageURL := find(`Chat page +(http://\S+/)`)
	page := body(t, client, http.MethodGet, pageURL, "")
	if !strings.Contains(page, `content="`+gateway+`"`) {
		t.Error("the page does not know the gateway", gateway)
	}
	if !strings.Contains(body(t, client, http.MethodGet, find(`Metrics +(http://\S+)`), ""), "im_gateway_ready 1") {
		t.Error("no metrics where they should be")
	}
	var login struct {
		Success bool
		Data    struct{ Token string }
	}
	answer := body(t, client, http.MethodPost, gateway+"/api/auth/login", find(`api/auth/login -d '([^']+)'`))
	if err := json.Unmarshal([]byte(answer), &login); err != nil || !login.Success || login.Data.Token == "" {
		t.Errorf("the printed login answers %s", answer)
	}
	// What the browser asks before it lets the page call the gateway.
	r, err := http.NewRequestWithContext(t.Context(), http.MethodOptions, gateway+"/api/auth/login", nil)
	if err != nil {
		t.Fatal(err)
	}
	origin := strings.TrimSuffix(pageURL, "/")
	r.Header.Set("Origin", origin)
	r.Header.Set("Access-Control-Request-Method", "POST")
	r.Header.Set("Access-Control-Request-Headers", "content-type")
	preflight, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	_ = preflight.Body.Close()
	if got := preflight.Header.Get("Access-Control-Allow-Origin"); got != origin && got != "*" {
		t.Errorf("the page's origin is answered %q", got)
	}

	s.signals <- syscall.SIGINT
	if code := s.exit(t); code != exitOK {
		t.Errorf("exit code %d:\n%s", code, s.log)
	}
	if strings.Contains(s.log.String(), login.Data.Token) || strings.Contains(s.log.String(), demoUsers[0].password) {
		t.Error("the log holds a secret")
	}
}

func body(t *testing.T, c *http.Client, method, url, send string) string {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(send))
	if err != nil {
		t.Fatal(err)
	}
	answer, err := c.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = answer.Body.Close() }()
	got, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	if answer.StatusCode != http.StatusOK {
		t.Fatalf("%s %s: %s %s", method, url, answer.Status, got)
	}
	return string(got)
}

// fakeGateway is ready at once and ends as its fields say.
type fakeGateway struct {
	run     func(ctx context.Context) error
	aborted chan struct{}
}

func (g *fakeGateway) Run(ctx context.Context) error { return g.run(ctx) }
func (g *fakeGateway) Abort()                        { close(g.aborted) }
func (g *fakeGateway) GatewayID() string             { return "fake" }
func (g *fakeGateway) Ready() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}

func faked(run func(context.Context) error, aborted chan struct{}) startFunc {
	return func(engine.Config, zerolog.Logger) (gateway, error) { return &fakeGateway{run, aborted}, nil }
}

func TestGatewayThatFailsEndsEverything(t *testing.T) {
	boom := func(context.Context) error { return errors.New("boom") }
	s := launch(faked(boom, nil), free...)
	if code := s.exit(t); code != exitFailed || !strings.Contains(s.log.String(), "boom") {
		t.Errorf("exit code %d:\n%s", code, s.log)
	}
}

func TestGatewayThatDoesNotStart(t *testing.T) {
	s := launch(func(engine.Config, zerolog.Logger) (gateway, error) { return nil, errors.New("boom") }, free...)
	if code := s.exit(t); code != exitFailed || !strings.Contains(s.log.String(), "boom") {
		t.Errorf("exit code %d:\n%s", code, s.log)
	}
}

func TestSecondSignalStopsAtOnce(t *testing.T) {
	aborted := make(chan struct{})
	stopping := make(chan struct{})
	s := launch(faked(func(ctx context.Context) error {
		<-ctx.Done()
		close(stopping)
		<-aborted
		return nil
	}, aborted), free...)
	s.out.waitFor(t, "ready")
	s.signals <- syscall.SIGINT
	<-stopping
	s.signals <- syscall.SIGINT
	if code := s.exit(t); code != exitFailed {
		t.Errorf("exit code %d", code)
	}
}

func TestPortTakenNamesPortAndFlag(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	addr := ln.Addr().String()
	_, port, _ := net.SplitHostPort(addr)
	for _, tc := range []struct{ flag, value string }{
		{"-http", addr}, {"-page", addr}, {"-admin", addr}, {"-grpc", addr}, {"-logic", addr},
		{"-kafka-port", port}, {"-etcd-port", port}, {"-redis-port", port},
	} {
		t.Run(tc.flag, func(t *testing.T) {
			s := launch(start, slices.Concat(free, []string{tc.flag, tc.value})...)
			code, said := s.exit(t), s.log.String()
			if code != exitFailed || !strings.Contains(said, addr) || !strings.Contains(said, " "+tc.flag+",") {
				t.Errorf("exit code %d, said %q, want %s and %s", code, said, addr, tc.flag)
			}
		})
	}
}

func TestUsage(t *testing.T) {
	for _, tc := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"-h"}, exitOK, "Usage: im-dev"},
		{[]string{"-nonsense"}, exitUsage, "nonsense"},
		{[]string{"more"}, exitUsage, "more"},
		{[]string{"-config", "x.yaml"}, exitUsage, "-external"},
		{[]string{"-external", "-kafka-port", "1"}, exitUsage, "-external"},
		{[]string{"-redis-port", "70000"}, exitUsage, "70000"},
		{[]string{"-http", "nonsense"}, exitUsage, "http.addr"},
		{[]string{"-websocket.heartbeat", "soon"}, exitUsage, "websocket.heartbeat"},
		{[]string{"-auth.hs256_secret", "x"}, exitUsage, "hs256_secret"},
		{[]string{"-page", "nonsense"}, exitFailed, "-page"},
	} {
		t.Run(strings.Join(tc.args, " "), func(t *testing.T) {
			var out, log bytes.Buffer
			args := tc.args
			if tc.code == exitFailed {
				args = slices.Concat(free, args)
			}
			if code := run(args, nil, &out, &log, nil, start); code != tc.code {
				t.Errorf("exit code %d, want %d", code, tc.code)
			}
			if said := out.String() + log.String(); !strings.Contains(said, tc.says) {
				t.Errorf("said %q, want %q in it", said, tc.says)
			}
		})
	}
}

func TestExternalTakesFileEnvironmentAndFlags(t *testing.T) {
	file := filepath.Join(t.TempDir(), "gateway.yaml")
	text := "kafka: {brokers: 'k1:1,k2:2', sasl: {mechanism: SCRAM-SHA-512, username: u, password: p}}\netcd: {endpoints: 'e:1'}\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	o, err := parse([]string{"-external", "-config", file, "-redis.addrs", "r:1", "-http", ":1234"})
	if err != nil {
		t.Fatal(err)
	}
	c, err := loadConfig(o, []string{"IM_AUTH_HS256_SECRET=0123456789abcdef0123456789abcdef", "IM_AUTH_ISSUER=me"})
	if err != nil {
		t.Fatal(err)
	}
	if c.Kafka.Brokers[1] != "k2:2" || c.Etcd.Endpoints[0] != "e:1" || c.Redis.Addrs[0] != "r:1" ||
		c.HTTP.Addr != ":1234" || c.Auth.Issuer != "me" || c.GatewayID != "" || c.Drain != engine.Default().Drain {
		t.Errorf("configuration %+v", c)
	}
	l, err := logicOptions(&c, "127.0.0.1:0", zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	if len(l.Kafka) != 2 || l.Redis.InitAddress[0] != "r:1" || l.Etcd.Endpoints[0] != "e:1" || l.Issuer != "me" ||
		string(l.Secret) != c.Auth.HS256Secret {
		t.Errorf("options of im-logic %+v", l)
	}

	// Without -external none of that counts.
	o, err = parse(nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err = loadConfig(o, []string{"IM_AUTH_ISSUER=me", "IM_NONSENSE=x"})
	if err != nil {
		t.Fatal(err)
	}
	if c.Auth.Issuer != "" || c.GatewayID != devGatewayID || c.HTTP.Addr != defaultHTTP || len(c.Auth.HS256Secret) < 32 {
		t.Errorf("configuration %+v", c)
	}
}

func TestPageMayCallTheGateway(t *testing.T) {
	for _, tc := range []struct{ page, origins string }{
		{"127.0.0.1:8090", "http://127.0.0.1:8090 http://localhost:8090"},
		{"[::1]:8090", "http://[::1]:8090 http://localhost:8090"},
		{"192.168.1.7:8090", "http://192.168.1.7:8090"},
		{"chat.example:8090", "http://chat.example:8090"},
		{":8090", "*"},
		{"0.0.0.0:8090", "*"},
		{"[::]:8090", "*"},
	} {
		c := engine.Default()
		c.HTTP.CORSOrigins = []string{"https://own.example"}
		allowPage(&c, tc.page)
		if got := strings.Join(c.HTTP.CORSOrigins, " "); got != tc.origins+" https://own.example" {
			t.Errorf("%s: %s", tc.page, got)
		}
		if len(c.WebSocket.AllowedOrigins) != 0 {
			t.Errorf("%s: WebSockets were open to all and are not any more", tc.page)
		}
	}
}
