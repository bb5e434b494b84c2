package engine

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

const testSecret = "IM_AUTH_HS256_SECRET=0123456789abcdef0123456789abcdef"

// write puts content into a new file and returns its path.
func write(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func load(t *testing.T, s Sources) *Loaded {
	t.Helper()
	l, err := Load(s)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func problems(t *testing.T, s Sources) []Problem {
	t.Helper()
	_, err := Load(s)
	var e *ConfigError
	if !errors.As(err, &e) {
		t.Fatalf("error %v, want a ConfigError", err)
	}
	return e.Problems
}

func TestLoadLayers(t *testing.T) {
	file := write(t, "gateway.yaml", `
gateway_id: node-1
http:
  addr: ":1"
  cors_origins: [https://a.example, "http://localhost:3000"]
websocket: {heartbeat: 20s, max_message_bytes: 32KiB, head_bytes: 4096}
kafka:
  brokers: "k1:9092, k2:9092"
  tls:
admin.addr: "127.0.0.1:1"
drain: {window: 0}
tracing: {sample_ratio: 0.5}
`)
	l := load(t, Sources{
		File: file,
		Environ: []string{testSecret, "IM_ADMIN_ADDR=127.0.0.1:2", "IM_HTTP_ADDR=:2", "IM_KAFKA_STRICT=true",
			"HOME=/root", "IM_WEBSOCKET_EGRESS_BUDGET_BYTES=2MiB"},
		Flags: map[string]string{"http.addr": ":3", "kafka.create_shared_topics": "true"},
	})
	c := l.Config
	for _, tc := range []struct {
		key       string
		got, want any
		source    string
	}{
		{"gateway_id", c.GatewayID, "node-1", "file " + file},
		{"http.addr", c.HTTP.Addr, ":3", "flag -http.addr"},
		{"http.cors_origins", c.HTTP.CORSOrigins, []string{"https://a.example", "http://localhost:3000"}, "file " + file},
		{"websocket.heartbeat", c.WebSocket.Heartbeat, 20 * time.Second, "file " + file},
		{"websocket.max_message_bytes", c.WebSocket.MaxMessageBytes, 32 << 10, "file " + file},
		{"websocket.head_bytes", c.WebSocket.HeadBytes, 4096, "file " + file},
		{"websocket.egress_budget_bytes", c.WebSocket.EgressBudgetBytes, 2 << 20, "environment IM_WEBSOCKET_EGRESS_BUDGET_BYTES"},
		{"kafka.brokers", c.Kafka.Brokers, []string{"k1:9092", "k2:9092"}, "file " + file},
		{"kafka.strict", c.Kafka.Strict, true, "environment IM_KAFKA_STRICT"},
		{"kafka.create_shared_topics", c.Kafka.CreateSharedTopics, true, "flag -kafka.create_shared_topics"},
		{"admin.addr", c.Admin.Addr, "127.0.0.1:2", "environment IM_ADMIN_ADDR"},
		{"drain.window", c.Drain.Window, time.Duration(0), "file " + file},
		{"drain.deadline", c.Drain.Deadline, DefaultDrainDeadline, sourceDefault},
		{"tracing.sample_ratio", c.Tracing.SampleRatio, 0.5, "file " + file},
	} {
		if !reflect.DeepEqual(tc.got, tc.want) || l.source[tc.key] != tc.source {
			t.Errorf("%s = %v from %s, want %v from %s", tc.key, tc.got, l.source[tc.key], tc.want, tc.source)
		}
	}
}

// TestProblemsAllAtOnce keeps the message that a person sees who got much wrong.
func TestProblemsAllAtOnce(t *testing.T) {
	file := write(t, "gateway.yaml", `
gateway_id: "no spaces please"
htttp: {addr: ":1"}
http: {addr: 8080, loops: 1000, cors_origins: ["https://ok.example", "https://not.ok/path"]}
websocket: {heartbeat: 30, heartbeat_timeout: 10s, max_message_bytes: 10MiB}
auth: {hs256_secret: 12345678, algorithm: none, previous_secret_file: /does/not/exist}
kafka: {broker: "k:9092", upstream_topic: "", undelivered_topic: im-deadletter-topic, strict: "yes"}
redis: 7
etcd: {endpoints: [1, 2]}
grpc: {addr: ":9080"}
drain: {window: 1m}
`)
	_, err := Load(Sources{
		File: file,
		Environ: []string{"IM_KAFKA_BROKER=x", "IM_LOGIC_TARGET=etcd://im-logic", "IM_ETCD_PASSWORD=hunter2",
			"IM_LOG_LEVL=debug"},
		Flags: map[string]string{"shard.count": "many", "logic.deadline": "2h"},
	})
	if err == nil {
		t.Fatal("no error")
	}
	text := strings.ReplaceAll(err.Error(), file, "gateway.yaml")
	for _, secret := range []string{"hunter2", "12345678"} {
		if strings.Contains(text, secret) {
			t.Errorf("the message holds the secret %q", secret)
		}
	}
	golden(t, "testdata/problems.golden", text+"\n")
}

func TestProblems(t *testing.T) {
	cert, key := testCertificate(t, t.TempDir(), "localhost")
	noKey := write(t, "none.pem", "no key")
	for _, tc := range []struct {
		name string
		env  string // without IM_, several separated by blanks
		keys string // of the problems, separated by blanks
	}{
		{"none", "", ""},
		{"gateway_id dot", "GATEWAY_ID=..", "gateway_id"},
		{"gateway_id 200", "GATEWAY_ID=" + strings.Repeat("x", 200), ""},
		{"gateway_id 201", "GATEWAY_ID=" + strings.Repeat("x", 201), "gateway_id"},
		{"topic with gateway_id too long", "GATEWAY_ID=" + strings.Repeat("x", 200) +
			" KAFKA_DOWNSTREAM_TOPIC_PREFIX=" + strings.Repeat("p", 50), "kafka.downstream_topic_prefix"},
		{"topic is the downstream topic", "GATEWAY_ID=a KAFKA_DOWNSTREAM_TOPIC_PREFIX=x KAFKA_UPSTREAM_TOPIC=xa",
			"kafka.upstream_topic"},
		{"topic characters", "KAFKA_UPSTREAM_TOPIC=a/b", "kafka.upstream_topic"},
		{"empty number", "SHARD_COUNT=", "shard.count"},
		{"number overflow", "KAFKA_MAX_IN_FLIGHT_BYTES=9999999999999GiB", "kafka.max_in_flight_bytes"},
		{"negative", "HTTP_LOOPS=-1", "http.loops"},
		{"lowest", "WEBSOCKET_MAX_MESSAGE_BYTES=1024", ""},
		{"below lowest", "WEBSOCKET_MAX_MESSAGE_BYTES=1023", "websocket.max_message_bytes"},
		{"duration below lowest", "WEBSOCKET_HEARTBEAT=99ms", "websocket.heartbeat"},
		{"port 0 to listen", "HTTP_ADDR=127.0.0.1:0", ""},
		{"port 0 to dial", "KAFKA_BROKERS=k:0", "kafka.brokers"},
		{"port too large", "HTTP_ADDR=:65536", "http.addr"},
		{"IPv6", "HTTP_ADDR=[::1]:80 REDIS_ADDRS=[fe80::1]:6379", ""},
		{"no brokers", "KAFKA_BROKERS=,", "kafka.brokers"},
		{"etcd URL", "ETCD_ENDPOINTS=https://e1:2379,http://e2:2379", ""},
		{"logic host", "LOGIC_TARGET=im-logic:9000", ""},
		{"logic without port", "LOGIC_TARGET=im-logic", "logic.target"},
		{"origin with a slash", "HTTP_CORS_ORIGINS=https://a.example/", "http.cors_origins"},
		{"any origin", "HTTP_CORS_ORIGINS=*", ""},
		{"RS256 without key", "AUTH_ALGORITHM=RS256", "auth.public_key_file"},
		{"public key not there", "AUTH_PUBLIC_KEY_FILE=/nope", "auth.public_key_file"},
		{"redis both", "REDIS_CLUSTER=true REDIS_SENTINEL_MASTER=m", "redis.cluster"},
		{"redis many", "REDIS_ADDRS=a:1,b:1", "redis.addrs"},
		{"redis cluster", "REDIS_CLUSTER=true REDIS_ADDRS=a:1,b:1", ""},
		{"presence refresh", "REDIS_PRESENCE_TTL=50s", "redis.presence_ttl"},
		{"sasl without user", "KAFKA_SASL_MECHANISM=PLAIN", "kafka.sasl.mechanism"},
		{"tls not enabled", "KAFKA_TLS_CA_FILE=" + cert, "kafka.tls.enabled"},
		{"tls half a pair", "KAFKA_TLS_ENABLED=true KAFKA_TLS_CERT_FILE=" + cert, "kafka.tls.cert_file"},
		{"tls pair", "ETCD_TLS_ENABLED=true ETCD_TLS_CERT_FILE=" + cert + " ETCD_TLS_KEY_FILE=" + key, ""},
		{"tls wrong way round", "ETCD_TLS_ENABLED=true ETCD_TLS_CERT_FILE=" + key + " ETCD_TLS_KEY_FILE=" + cert,
			"etcd.tls.enabled"},
		{"tls file is no authority", "REDIS_TLS_ENABLED=true REDIS_TLS_CA_FILE=" + key, "redis.tls.enabled"},
		{"tls file not there", "REDIS_TLS_ENABLED=true REDIS_TLS_CA_FILE=/nope", "redis.tls.ca_file"},
		{"grpc open", "GRPC_ADDR=0.0.0.0:1", "grpc.token"},
		{"grpc token", "GRPC_ADDR=:1 GRPC_TOKEN=t", ""},
		{"grpc by name", "GRPC_ADDR=example.com:1", "grpc.token"},
		{"grpc loopback", "GRPC_ADDR=[::1]:1", ""},
		{"grpc mutual", "GRPC_ADDR=:1 GRPC_TLS_REQUIRE_CLIENT_CERT=true GRPC_TLS_CA_FILE=" + cert +
			" GRPC_TLS_CERT_FILE=" + cert + " GRPC_TLS_KEY_FILE=" + key, ""},
		{"grpc mutual without files", "GRPC_TLS_REQUIRE_CLIENT_CERT=true", "grpc.tls.require_client_cert"},
		{"admin tls", "ADMIN_TLS_CERT_FILE=" + cert + " ADMIN_TLS_KEY_FILE=" + key + " ADMIN_TLS_CLIENT_CA_FILE=" + cert, ""},
		{"https", "HTTP_TLS_CERT_FILE=" + cert + " HTTP_TLS_KEY_FILE=" + key, ""},
		{"https wrong way round", "HTTP_TLS_CERT_FILE=" + key + " HTTP_TLS_KEY_FILE=" + cert, "http.tls.cert_file"},
		{"public key is none", "AUTH_ALGORITHM=RS256 AUTH_PUBLIC_KEY_FILE=" + noKey, "auth.public_key_file"},
		{"public key of an issuer is none", "AUTH_ISSUER=a AUTH_ISSUERS=issuer=b,algorithms=RS256,public_key_file=" + noKey, "auth.issuers"},
		{"sentinel login without sentinels", "REDIS_SENTINEL_PASSWORD=x", "redis.sentinel_master"},
		{"sentinel login", "REDIS_SENTINEL_PASSWORD=x REDIS_SENTINEL_MASTER=m", ""},
		{"admin tls half a pair", "ADMIN_TLS_CERT_FILE=" + cert, "admin.tls.cert_file"},
		{"admin tls of clients only", "ADMIN_TLS_CLIENT_CA_FILE=" + cert, "admin.tls.client_ca_file"},
		{"admin tls wrong way round", "ADMIN_TLS_CERT_FILE=" + key + " ADMIN_TLS_KEY_FILE=" + cert, "admin.tls.cert_file"},
		{"http write timeout", "HTTP_WRITE_TIMEOUT=10s", "http.write_timeout"},
		{"drain", "DRAIN_WINDOW=25s", "drain.deadline"},
		{"tracing", "TRACING_ENDPOINT=otel:4317 TRACING_SAMPLE_RATIO=0.25", ""},
		{"tracing nothing that begins", "TRACING_SAMPLE_RATIO=0", ""},
		{"tracing everything", "TRACING_SAMPLE_RATIO=1", ""},
		{"ratio above", "TRACING_SAMPLE_RATIO=1.001", "tracing.sample_ratio"},
		{"ratio below", "TRACING_SAMPLE_RATIO=-0.1", "tracing.sample_ratio"},
		{"ratio no number", "TRACING_SAMPLE_RATIO=NaN", "tracing.sample_ratio"},
		{"ratio in percent", "TRACING_SAMPLE_RATIO=1%", "tracing.sample_ratio"},
		{"collector without port", "TRACING_ENDPOINT=otel", "tracing.endpoint"},
		{"collector's tls", "TRACING_TLS_CA_FILE=" + cert, "tracing.tls.enabled"},
		{"unknown variable", "SHARDS=3", "IM_SHARDS"},
		{"of an orchestrator", "LOGIC_SERVICE_HOST=10.0.0.1 LOGIC_PORT=tcp://10.0.0.1:90 " +
			"GATEWAY_PORT_8080_TCP_ADDR=10.0.0.2 GATEWAY_SERVICE_PORT_HTTP=80 GATEWAY_PORT_8080_TCP=x", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			environ := []string{testSecret}
			for _, e := range strings.Fields(tc.env) {
				if name, value, _ := strings.Cut(e, "="); name == "AUTH_ISSUERS" {
					e = name + "=" + strings.ReplaceAll(value, ",", " ") // one of them
				}
				environ = append(environ, "IM_"+e)
			}
			var keys []string
			_, err := Load(Sources{Environ: environ})
			var e *ConfigError
			if errors.As(err, &e) {
				for _, p := range e.Problems {
					keys = append(keys, p.Key)
				}
			} else if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(keys, " "); got != tc.keys {
				t.Errorf("problems with %q, want %q: %v", got, tc.keys, err)
			}
		})
	}
}

func TestSecretFiles(t *testing.T) {
	path := write(t, "secret", "s3cret, with blanks \n")
	l := load(t, Sources{Environ: []string{"IM_AUTH_HS256_SECRET_FILE=" + path}})
	if got := l.Config.Auth.HS256Secret; got != "s3cret, with blanks " {
		t.Errorf("secret %q", got)
	}
	for _, tc := range []struct{ name, path, more, key string }{
		{"missing", filepath.Join(t.TempDir(), "none"), "", "auth.hs256_secret_file"},
		{"directory", t.TempDir(), "", "auth.hs256_secret_file"},
		{"empty", write(t, "empty", "\n"), "", "auth.hs256_secret_file"},
		{"large", write(t, "large", strings.Repeat("x", maxSecretFile+1)), "", "auth.hs256_secret_file"},
		{"both", path, testSecret, "auth.hs256_secret_file"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			list := problems(t, Sources{Environ: []string{"IM_AUTH_HS256_SECRET_FILE=" + tc.path, tc.more}})
			if len(list) != 1 || list[0].Key != tc.key {
				t.Errorf("problems %v, want one with %s", list, tc.key)
			}
		})
	}
}

func TestUnreadableFile(t *testing.T) {
	for _, tc := range []struct{ name, path, want string }{
		{"missing", filepath.Join(t.TempDir(), "none.yaml"), "cannot be read: no such file or directory"},
		{"no YAML", write(t, "a.yaml", "http: [\n"), "is not valid YAML"},
		{"no mapping", write(t, "b.yaml", "- a\n- b\n"), "is not valid YAML"},
		{"twice", write(t, "c.yaml", "http: {addr: ':1'}\nhttp: {addr: ':2'}\n"), "already defined"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			list := problems(t, Sources{File: tc.path})
			if len(list) != 1 || !strings.Contains(list[0].Message, tc.want) {
				t.Errorf("problems %v, want one with %q", list, tc.want)
			}
		})
	}
	if l := load(t, Sources{File: write(t, "empty.yaml", ""), Environ: []string{testSecret}}); l == nil {
		t.Error("an empty file was refused")
	}
}

// TestPrint reads the printed configuration again: it must give the same one.
func TestPrint(t *testing.T) {
	from := Sources{
		Environ: []string{testSecret, "IM_KAFKA_BROKERS=a:1,b:2", "IM_ETCD_PASSWORD=hunter2", "IM_ETCD_USERNAME=a\"b"},
		Flags:   map[string]string{"websocket.heartbeat": "12s"},
	}
	l := load(t, from)
	var out bytes.Buffer
	if err := l.Print(&out); err != nil {
		t.Fatal(err)
	}
	text := out.String()
	for _, want := range []string{"# flag -websocket.heartbeat\n", "# environment IM_KAFKA_BROKERS\n", "# default\n",
		"# etcd.password: (redacted)"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing from\n%s", want, text)
		}
	}
	for _, secret := range []string{"hunter2", "0123456789abcdef"} {
		if strings.Contains(text, secret) {
			t.Errorf("the secret %q was printed", secret)
		}
	}
	again := load(t, Sources{File: write(t, "p.yaml", text), Environ: []string{testSecret, "IM_ETCD_PASSWORD=hunter2"}})
	for _, o := range options() {
		if a, b := o.text(o.value(&again.Config).Interface()), o.text(o.value(&l.Config).Interface()); a != b {
			t.Errorf("%s = %q after a round trip, want %q", o.key, a, b)
		}
	}
}

func TestDefaultNeedsOnlyASecret(t *testing.T) {
	c := Default()
	c.Auth.HS256Secret = "x"
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
	if w := c.Warnings(); len(w) != 1 || !strings.Contains(w[0], "auth.hs256_secret") {
		t.Errorf("warnings %v, want one about the short secret", w)
	}
}

// TestOptions checks what the tags of the configuration promise.
func TestOptions(t *testing.T) {
	all, err := comments()
	if err != nil {
		t.Fatal(err)
	}
	l := &loader{options: options()}
	seen := map[string]string{}
	for _, key := range l.keys() {
		if other := seen[envName(key)]; other != "" {
			t.Errorf("%s and %s share %s", key, other, envName(key))
		}
		seen[envName(key)] = key
		if orchestrated.MatchString(envName(key)) {
			t.Errorf("%s looks like a variable of an orchestrator", envName(key))
		}
	}
	defaults := Default()
	for _, o := range l.options {
		comment := all[o.typeName+"."+o.field]
		if comment == "" || !strings.HasSuffix(comment, ".") {
			t.Errorf("%s: the comment %q is no sentence", o.key, comment)
		}
		switch o.kind.Kind() {
		case reflect.Int, reflect.Int64:
			lo, hi, found := strings.Cut(o.bounds, "..")
			_, ok1 := o.parse(lo)
			_, ok2 := o.parse(hi)
			if !found || !ok1 || !ok2 {
				t.Errorf("%s: range %q", o.key, o.bounds)
			}
		}
		if o.check != "" && !slices.ContainsFunc(checks[:], func(c check) bool { return c.name == o.check }) {
			t.Errorf("%s: no check %q", o.key, o.check)
		}
		if p := o.problem(o.value(&defaults).Interface()); p != "" {
			t.Errorf("the default of %s %s", o.key, p)
		}
	}
}

// TestReference keeps docs/configuration.md as it is generated.
func TestReference(t *testing.T) {
	var out bytes.Buffer
	if err := WriteReference(&out); err != nil {
		t.Fatal(err)
	}
	golden(t, "../docs/configuration.md", out.String())
}

func FuzzLoadFile(f *testing.F) {
	f.Add("http: {addr: ':1'}\n")
	f.Add("http.addr: ':1'\nhttp: {addr: {x: 1}}\n")
	f.Add("kafka: {brokers: [1, {a: b}, null]}\n")
	f.Add("{? [a] : b, 1: 2, true: x}\n")
	f.Fuzz(func(t *testing.T, text string) {
		l := &loader{options: options(), source: map[string]string{}, secrets: map[string]secretFile{}}
		l.load(write(t, "f.yaml", text), nil, nil)
		for _, p := range l.problems {
			_ = p.String()
		}
	})
}

func TestNewGatewayID(t *testing.T) {
	for _, host := range []string{"web-1.example.com", "", "größe host", strings.Repeat("h", 300), ".."} {
		id := NewGatewayID(host)
		if !validGatewayID(id) || id == NewGatewayID(host) {
			t.Errorf("host %q: id %q is not valid or not random", host, id)
		}
	}
}
