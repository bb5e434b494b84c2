package engine

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/lestrrat-go/jwx/v2/jwk"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/rs/zerolog"

	"im-gateway/codec"
	"im-gateway/codec/gatewaypb"
	"im-gateway/shard"
	"im-gateway/transport"
)

// TestReloadTags: a key that the reference calls changeable changes what a reload hands on, and no other
// key does.
func TestReloadTags(t *testing.T) {
	handedOn := func(c *Config) []any {
		auth := c.Auth
		auth.DenyList = false
		return []any{transportSettings(c, nil), shardSettings(c), apiSettings(c), auth, c.Limits.MemoryHighWaterPercent, c.Drain, c.Log.Level, c.Admin.Token, c.GRPC.Token}
	}
	for _, o := range options() {
		c := Default()
		before := handedOn(&c)
		v := o.value(&c)
		switch {
		case o.kind.Kind() == reflect.Bool:
			v.SetBool(!v.Bool())
		case o.kind.Kind() == reflect.Int, o.kind == durationType:
			v.SetInt(v.Int() + 7)
		case o.kind.Kind() == reflect.Float64:
			v.SetFloat(v.Float() + 0.5)
		case o.kind == listType:
			v.Set(reflect.ValueOf([]string{"10.1.2.0/24"}))
		default:
			v.SetString(v.String() + "x")
		}
		if differs := !reflect.DeepEqual(before, handedOn(&c)); differs != o.reload {
			t.Errorf("%s: tagged to change by a reload: %t; a reload hands it on: %t", o.key, o.reload, differs)
		}
	}
}

// ports are what the shards need and do not use here.
type ports struct{}

func (ports) Submit(*codec.EgressBatch)                              {}
func (ports) Resume(int, int)                                        {}
func (ports) Admit(int) (codec.Code, int32)                          { return codec.OK, 0 }
func (ports) Queue(int) chan<- *codec.UpstreamBatch                  { return nil }
func (ports) UserEvent(bool, string, codec.SessionID, string, int64) {}
func (ports) N() int                                                 { return 1 }
func (ports) Offer(int, *codec.IngressBatch) bool                    { return true }
func (ports) Return(*codec.EgressBatch)                              {}

type presencePorts struct{}

func (presencePorts) Submit(int, []shard.PresenceOp) bool { return true }

// safeBuffer is a log that is written by one goroutine and read by another.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

// take returns what was written since the last time.
func (s *safeBuffer) take() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	text := s.b.String()
	s.b.Reset()
	return text
}

// reloadable is a gateway that does not run, with a configuration file to change.
type reloadable struct {
	*Engine
	t    *testing.T
	dir  string
	file string
	out  *safeBuffer
}

const reloadSecret = "0123456789abcdef0123456789abcdef"

func newReloadable(t *testing.T, config string, files map[string]string) *reloadable {
	t.Helper()
	keepLogLevel(t)
	r := &reloadable{t: t, dir: t.TempDir(), out: &safeBuffer{}}
	r.file = filepath.Join(r.dir, "gateway.yaml")
	r.write("gateway.yaml", config)
	for name, text := range files {
		r.write(name, text)
	}
	if _, ok := files["v1/secret"]; ok {
		if err := os.Symlink("v1", filepath.Join(r.dir, "link")); err != nil {
			t.Fatal(err)
		}
	}
	loaded, err := Load(Sources{File: r.file, Environ: []string{"IM_LOGIC_DEADLINE=3s"}})
	if err != nil {
		t.Fatal(err)
	}
	logger, err := NewLogger(r.out, loaded.Config.Log)
	if err != nil {
		t.Fatal(err)
	}
	if r.Engine, err = New(loaded, logger); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Abort)
	e := r.Engine
	if e.shards, err = shard.New(shard.Options{
		Shards: 1, Loops: 1, GatewayID: "g", Settings: shardSettings(&e.cfg), Heartbeat: time.Second, RefreshInterval: time.Second,
		AckDeadline: time.Second, Egress: ports{}, Publisher: ports{}, Events: ports{}, Presence: presencePorts{},
		Replaced: func(string, string, string) {}, Logger: zerolog.Nop(), Registerer: e.metrics,
	}); err != nil {
		t.Fatal(err)
	}
	e.api = testAPI(t, &fakeAuth{}, func(o *APIOptions) { o.Settings, o.Registerer = apiSettings(&e.cfg), e.metrics })
	if e.server, err = transport.New(transport.Options{
		Addr: ":0", Loops: 1, Sink: ports{}, API: e.api, Settings: transportSettings(&e.cfg, e.keys.verifier),
		Logger: zerolog.Nop(), Registerer: e.metrics,
	}); err != nil {
		t.Fatal(err)
	}
	if e.acting, err = newActingToken(e.cfg.Admin.Token, e.metrics); err != nil {
		t.Fatal(err)
	}
	if e.peers, err = NewPeers(PeersOptions{
		Lookup: func(context.Context, string) (string, error) { return "", errors.New("nobody is there") },
		Token:  e.cfg.GRPC.Token, Registerer: e.metrics,
	}); err != nil {
		t.Fatal(err)
	}
	if e.grpc, err = NewGRPCServer(GRPCOptions{
		Addr: "127.0.0.1:0", Token: e.cfg.GRPC.Token, Sessions: &fakeSessions{}, Operator: gatewaypb.UnimplementedAdminServiceServer{},
		Acting: e.acting, Registerer: e.metrics,
	}); err != nil {
		t.Fatal(err)
	}
	return r
}

// write puts a file into the configuration's directory, which DIR stands for.
func (r *reloadable) write(name, text string) {
	r.t.Helper()
	path := filepath.Join(r.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		r.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(text, "DIR", r.dir)), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// again reloads and returns the log's lines without what differs between two runs.
func (r *reloadable) again() string {
	r.t.Helper()
	r.reload(r.t.Context(), "test")
	return r.logged()
}

var varying = regexp.MustCompile(`"(gateway_id|time|why)":"[^"]*",?`)

func (r *reloadable) logged() string {
	return strings.ReplaceAll(varying.ReplaceAllString(r.out.take(), ""), r.dir, "DIR")
}

// gauge is a metric without labels, or with those given as they stand in the text.
func (r *reloadable) gauge(name string) (value float64) {
	r.t.Helper()
	families, err := r.metrics.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name && len(f.GetMetric()) == 1 {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	r.t.Fatalf("there is no metric %s", name)
	return 0
}

// inForce sums up what the parts go by.
func (r *reloadable) inForce() string {
	return fmt.Sprintf("connections %v, egress %v, origin %q, level %s, deadline %s",
		r.gauge("im_gateway_transport_connections_bound"), r.gauge("im_gateway_shard_egress_bound_bytes"),
		do(r.api, "GET", "/healthz", "", "Origin: https://a.example").Header().Get("Access-Control-Allow-Origin"),
		LogLevel{}, r.config().Drain.Deadline)
}

// TestReload keeps the lines that an operator reads; a refusal changes nothing at all.
func TestReload(t *testing.T) {
	const base = "auth: {hs256_secret_file: DIR/secret}\nhttp: {cors_origins: [\"https://a.example\"]}\nwebsocket.max_connections: 50\n"
	r := newReloadable(t, base, map[string]string{"secret": reloadSecret})
	var lines strings.Builder
	for _, step := range []struct {
		name    string
		config  string // "": as it was
		file    string // another file to write
		text    string
		applied bool
	}{
		{name: "nothing", applied: true},
		{name: "a comment", config: base + "# a few\n", applied: true},
		{name: "several", applied: true, config: "auth: {hs256_secret_file: DIR/secret}\nwebsocket: {max_connections: 40, node_egress_budget_bytes: 2MiB}\n" +
			"drain.deadline: 20s\nlog.level: debug\nhttp: {cors_origins: [\"https://b.example\", \"https://c.example\"]}\n"},
		{name: "no YAML", config: "http: [\n"},
		{name: "not valid", config: base + "websocket.heartbeat_timeout: 1s\nlimits: {unacked_messages: many}\nnonsense: 1\n"},
		{name: "for a restart", config: base + "shard: {count: 3}\nkafka: {brokers: \"k:9092\", sasl: {mechanism: PLAIN, username: u, password: hunter2}}\nlog.level: warn\n"},
		{name: "back", config: base, applied: true},
		{name: "a new secret", file: "secret", text: "another-0123456789abcdef0123456789abcdef", applied: true},
		{name: "the old one beside it", applied: true, config: base + "auth.previous_secret: " + reloadSecret + "\n"},
		{name: "and no more", config: base, applied: true},
		{name: "an empty secret", file: "secret", text: "\n"},
		{name: "a short secret", file: "secret", text: "short", applied: true},
		{name: "overridden by the environment", config: base + "logic: {deadline: 4s}\n", applied: true},
		{name: "no key of this kind", config: base + "auth.algorithm: RS256\nauth.public_key_file: DIR/secret\n"},
	} {
		before, good := r.inForce(), testutil.ToFloat64(r.reloads.applied)+testutil.ToFloat64(r.reloads.unchanged)
		if step.config != "" {
			r.write("gateway.yaml", step.config)
		}
		if step.file != "" {
			r.write(step.file, step.text)
		}
		fmt.Fprintf(&lines, "# %s\n%s", step.name, r.again())
		if !step.applied && r.inForce() != before {
			t.Errorf("%s: refused, but in force is %s, before %s", step.name, r.inForce(), before)
		}
		if got := testutil.ToFloat64(r.reloads.applied) + testutil.ToFloat64(r.reloads.unchanged) - good; (got == 1) != step.applied ||
			(r.gauge("im_gateway_config_last_reload_successful") == 1) != step.applied {
			t.Errorf("%s: counted %v as good", step.name, got)
		}
		fmt.Fprintf(&lines, "%s\n\n", r.inForce())
	}
	if err := os.Remove(r.file); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(&lines, "# no file\n%s", r.again())
	for _, secret := range []string{reloadSecret, "another", "short\"", "hunter2"} {
		if strings.Contains(lines.String(), secret) {
			t.Errorf("the log holds the secret %q", secret)
		}
	}
	golden(t, "testdata/reload.golden", lines.String())
	if n := testutil.ToFloat64(r.reloads.refused); n != 6 {
		t.Errorf("%v refusals counted", n)
	}
	if age := time.Now().UnixMilli() - int64(1000*r.gauge("im_gateway_config_last_reload_success_timestamp_seconds")); age < 0 || age > time.Hour.Milliseconds() {
		t.Errorf("the last good reload was %d ms ago", age)
	}
}

// TestReloadKeepsAnOperatorsLevel: a level that was set by hand stays while log.level does not change.
func TestReloadKeepsAnOperatorsLevel(t *testing.T) {
	const base = "auth.hs256_secret: " + reloadSecret + "\n"
	r := newReloadable(t, base, nil)
	for _, step := range []struct{ set, config, want string }{
		{"debug", base + "limits.unacked_messages: 5\n", "debug"},
		{"", base + "log.level: error\n", "error"}, // its own line is written all the same
		{"info", base + "log.level: error\nlimits.unacked_messages: 6\n", "info"},
	} {
		if step.set != "" {
			if err := (LogLevel{}).Set(step.set); err != nil {
				t.Fatal(err)
			}
		}
		r.write("gateway.yaml", step.config)
		if text := r.again(); (LogLevel{}).String() != step.want || !strings.Contains(text, " -> ") {
			t.Errorf("%q: the level is %s, want %s: %s", step.config, LogLevel{}, step.want, text)
		}
	}
}

// TestReloadOfTokens: of those who act and of the other gateways.
func TestReloadOfTokens(t *testing.T) {
	const base = "auth.hs256_secret: " + reloadSecret + "\n"
	r := newReloadable(t, base, nil)
	may := func(token string) string {
		act := r.acting.check("192.0.2.1:5", "Bearer "+token) == nil
		call := r.grpc.authenticatePeer("/im.gateway.v1.GatewayService/Push", "Bearer "+token) == nil
		return fmt.Sprintf("acts %t, calls %t, sends %q", act, call, *r.peers.token.Load())
	}
	for _, step := range []struct{ config, token, want string }{
		{"", "a", `acts false, calls true, sends ""`},
		{"admin.token: a\ngrpc.token: b\n", "a", `acts true, calls false, sends "b"`},
		{"admin.token: a\ngrpc.token: b\n", "b", `acts false, calls true, sends "b"`},
		{"admin.token: b\ngrpc.token: b\n", "b", `acts true, calls true, sends "b"`},
		{"", "b", `acts false, calls true, sends ""`},
	} {
		r.write("gateway.yaml", base+step.config)
		text := r.again()
		if got := may(step.token); got != step.want {
			t.Errorf("with %q the token %s %s, want %s: %s", step.config, step.token, got, step.want, text)
		}
	}
	r.write("gateway.yaml", base+"grpc: {addr: \":9080\", token: \"\"}\n")
	if text := r.again(); !strings.Contains(text, "grpc.token") {
		t.Errorf("open without a token: %s", text)
	}
}

func publicPEM(t *testing.T) (text string, key ed25519.PrivateKey) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), private
}

// TestReloadOfKeyFiles: what counts is the content, also of a file whose name stays.
func TestReloadOfKeyFiles(t *testing.T) {
	one, _ := publicPEM(t)
	two, _ := publicPEM(t)
	const config = "auth: {algorithm: EdDSA, issuer: a, public_key_file: DIR/a.pem,\n" +
		"  issuers: [issuer=b algorithms=EdDSA public_key_file=DIR/b.pem]}\n"
	r := newReloadable(t, config, map[string]string{"a.pem": one, "b.pem": one})
	verifier := r.verifier.Load()
	if text := r.again(); !strings.Contains(text, "no value has changed") || r.verifier.Load() != verifier {
		t.Errorf("nothing has changed: %s", text)
	}
	for _, step := range []struct{ file, text, want string }{
		{"a.pem", two, "auth.public_key_file: the content of DIR/a.pem changed"},
		{"b.pem", two, "auth.issuers: the content of DIR/b.pem changed"},
	} {
		r.write(step.file, step.text)
		if text := r.again(); !strings.Contains(text, step.want) || r.verifier.Load() == verifier {
			t.Errorf("%s: %s", step.file, text)
		}
		verifier = r.verifier.Load()
	}
	r.write("b.pem", "no key")
	if text := r.again(); !strings.Contains(text, "issuer b") || !strings.Contains(text, "not reloaded") || r.verifier.Load() != verifier {
		t.Errorf("no key: %s", text)
	}
}

// TestReloadOfKeySets: a new set is read before anything changes; one that goes is followed no more.
func TestReloadOfKeySets(t *testing.T) {
	var away, reads atomic.Int64
	_, private := publicPEM(t)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		reads.Add(1)
		if away.Load() > 0 {
			http.Error(w, "", http.StatusServiceUnavailable)
			return
		}
		key, err := jwk.FromRaw(private.Public())
		if err != nil {
			t.Error(err)
		}
		_ = key.Set(jwk.KeyIDKey, "k"+req.URL.Path)
		text, err := json.Marshal(key)
		if err != nil {
			t.Error(err)
		}
		fmt.Fprintf(w, `{"keys":[%s]}`, text)
	}))
	defer server.Close()
	away.Store(1)
	config := func(paths ...string) string {
		text := "auth: {algorithm: EdDSA, issuer: a, public_key_file: DIR/a.pem, issuers: ["
		for i, p := range paths {
			text += fmt.Sprintf("%q, ", fmt.Sprintf("issuer=i%d algorithms=EdDSA jwks_url=%s%s", i, server.URL, p))
		}
		return text + "]}\n"
	}
	pemText, _ := publicPEM(t)
	r := newReloadable(t, config("/one"), map[string]string{"a.pem": pemText})
	started := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() { started <- r.startKeys(ctx) }()
	for reads.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	missing := func() (list []string) {
		for _, c := range r.ready.Missing() {
			list = append(list, c.Name)
		}
		return list
	}
	known := func() string {
		n, err := testutil.GatherAndCount(r.metrics, "im_gateway_jwks_keys")
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%d sets, waits for keys: %t", n, strings.Contains(strings.Join(missing(), " "), needKeys))
	}
	if got := known(); got != "1 sets, waits for keys: true" {
		t.Errorf("at the start: %s", got)
	}
	r.write("gateway.yaml", config("/one", "/two?code=hunter2"))
	if text := r.again(); !strings.Contains(text, "503") || strings.Contains(text, "hunter2") || known() != "1 sets, waits for keys: true" {
		t.Errorf("a set that is away: %s %s", known(), text)
	}
	// The one that has never come goes: the gateway need not wait for it.
	r.write("gateway.yaml", config())
	if text := r.again(); !strings.Contains(text, "auth.issuers: removed") || known() != "0 sets, waits for keys: false" {
		t.Errorf("without sets: %s %s", known(), text)
	}
	if err := <-started; err != nil {
		t.Error(err)
	}
	away.Store(0)
	r.write("gateway.yaml", config("/one", "/two?code=hunter2"))
	if text := r.again(); !strings.Contains(text, "auth.issuers: set") || strings.Contains(text, "hunter2") || known() != "2 sets, waits for keys: false" {
		t.Errorf("two sets: %s %s", known(), text)
	}
	before := reads.Load()
	r.write("gateway.yaml", config("/one", "/two?code=hunter3"))
	if text := r.again(); !strings.Contains(text, "auth.issuers: changed") || known() != "2 sets, waits for keys: false" || reads.Load() != before+1 {
		t.Errorf("another URL of one of two, %d read: %s %s", reads.Load()-before, known(), text)
	}
	away.Store(1)
	r.write("gateway.yaml", config("/one", "/two?code=hunter3")+"auth.audience: chat\n")
	if text := r.again(); !strings.Contains(text, "auth.audience: (empty) -> chat") {
		t.Errorf("sets that stay are not read again: %s", text)
	}
}

// TestReloadNotWhileStopping: what a stop goes by does not change.
func TestReloadNotWhileStopping(t *testing.T) {
	r := newReloadable(t, "auth.hs256_secret: "+reloadSecret+"\n", nil)
	r.mu.Lock()
	r.stopping = true
	r.mu.Unlock()
	before := r.inForce()
	r.write("gateway.yaml", "auth.hs256_secret: "+reloadSecret+"\ndrain.deadline: 50s\nwebsocket.max_connections: 3\n")
	if text := r.again(); !strings.Contains(text, "stopping") || r.inForce() != before {
		t.Errorf("%s %s", r.inForce(), text)
	}
}

// TestReloadOfWhatCannotBeReadTwice: a pipe is not read again, and not waited for.
func TestReloadOfWhatCannotBeReadTwice(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	go func() { _ = os.WriteFile(pipe, []byte(reloadSecret), 0o600) }()
	loaded, err := Load(Sources{Environ: []string{"IM_AUTH_HS256_SECRET_FILE=" + pipe}})
	if err != nil {
		t.Fatal(err)
	}
	if again := loaded.files.look(); !again[pipe].same(loaded.files[pipe]) {
		t.Error("it counts as changed")
	}
	if _, err := loaded.again(); err == nil || !strings.Contains(err.Error(), "cannot be read again") {
		t.Errorf("loaded again: %v", err)
	}
}

// TestLooks: what changes at every look is left alone until it does not.
func TestLooks(t *testing.T) {
	file := func(text string) files { return files{"f": {text: []byte(text)}} }
	seen := looks{tried: file("a")}
	for i, step := range []struct {
		text    string
		settled bool
	}{
		{"a", false}, {"b", false}, {"c", false}, {"a", false}, {"c", false}, {"a", false}, {"", false}, {"d", false}, {"d", true},
	} {
		if got := seen.settled(file(step.text)); got != step.settled {
			t.Errorf("look %d: settled %t", i, got)
		}
	}
	gone := files{"f": {err: os.ErrNotExist}}
	if seen.settled(gone) || !seen.settled(gone) {
		t.Error("a file that has gone does not settle at the second look")
	}
}

// TestFollowConfig: files that are written, replaced and swapped behind a link are found, once each, when
// they have settled.
func TestFollowConfig(t *testing.T) {
	r := newReloadable(t, "auth: {hs256_secret_file: DIR/link/secret}\n", map[string]string{
		"v1/secret": reloadSecret, "v2/secret": reloadSecret + "-2", "v3/secret": reloadSecret + "-3"})
	e := r.Engine
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- e.followConfig(ctx, 100*time.Millisecond) }()
	t.Cleanup(func() { cancel(); <-done })
	await := func(want string) {
		t.Helper()
		deadline := time.Now().Add(patienceOfReloads)
		for text := ""; ; time.Sleep(10 * time.Millisecond) {
			if text += r.logged(); strings.Contains(text, want) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("not logged: %s\nbut: %s", want, text)
			}
		}
	}
	point := func(to string) { // as Kubernetes does
		t.Helper()
		if err := os.Symlink(to, filepath.Join(r.dir, "next")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(r.dir, "next"), filepath.Join(r.dir, "link")); err != nil {
			t.Fatal(err)
		}
	}
	point("v2")
	await("auth.hs256_secret: changed")
	r.write("gateway.yaml", "auth: {hs256_secret_file: DIR/link/secret}\nlimits.unacked_messages: 7\n")
	await("limits.unacked_messages: 256 -> 7")
	r.write("gateway.new", "auth: {hs256_secret_file: DIR/link/secret}\nlimits.unacked_messages: 8\n")
	if err := os.Rename(filepath.Join(r.dir, "gateway.new"), r.file); err != nil {
		t.Fatal(err)
	}
	await("limits.unacked_messages: 7 -> 8")
	if err := os.Rename(r.file, filepath.Join(r.dir, "gateway.old")); err != nil {
		t.Fatal(err)
	}
	await("no such file")
	r.write("gateway.yaml", "auth: {hs256_secret_file: DIR/link/secret}\nlimits.unacked_messages: 9\n")
	await("limits.unacked_messages: 8 -> 9")
	// A file of an attempt that was refused counts: it may be the one to mend.
	r.write("gateway.yaml", "auth: {hs256_secret_file: DIR/other}\n")
	await("auth.hs256_secret_file")
	r.write("other", reloadSecret)
	await("auth.hs256_secret: changed")
	e.Reload()
	e.Reload()
	await("no value has changed")
	if n := testutil.ToFloat64(r.reloads.refused); n != 2 {
		t.Errorf("%v refusals, want one for each file that was not there", n)
	}
}

const patienceOfReloads = time.Minute
