package engine

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"im-gateway/transport"
)

// Problem is one thing that is wrong with a configuration.
type Problem struct {
	Key     string
	Value   string // as given; secrets redacted; empty when there is none to show
	Source  string // where the value comes from, "default" among them; empty when not known
	Message string // what is wrong and what is allowed
}

func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(p.Key)
	if p.Value != "" {
		b.WriteString(" = " + p.Value)
	}
	if p.Source != "" {
		b.WriteString(" (" + p.Source + ")")
	}
	return b.String() + ": " + p.Message
}

// ConfigError is returned when a configuration cannot be used. It holds every problem, not just
// the first.
type ConfigError struct {
	Problems []Problem
}

func (e *ConfigError) Error() string {
	var b strings.Builder
	if len(e.Problems) == 1 {
		b.WriteString("configuration: 1 problem")
	} else {
		fmt.Fprintf(&b, "configuration: %d problems", len(e.Problems))
	}
	for _, p := range e.Problems {
		b.WriteString("\n  " + p.String())
	}
	return b.String()
}

// check is a named condition on text, or on each element of a list.
type check struct {
	name string
	text string // completes "must be ..."
	ok   func(string) bool
}

// checks are the conditions that the check tag names.
var checks = [...]check{
	{"gateway_id", "1 to 200 of A-Z a-z 0-9 . _ -", validGatewayID},
	{"listen", "host:port, such as 127.0.0.1:8080, or :8080 for every address", validListen},
	{"hostport", "host:port", validHostPort},
	{"endpoint", "host:port or http(s)://host:port", validEndpoint},
	{"target", "etcd:///NAME or host:port", validTarget},
	{"topic", "1 to 249 of A-Z a-z 0-9 . _ -", validTopic},
	{"sessions", "replace or allow:N with N from 2 to 64", func(s string) bool { return sessionPolicy(s) > 0 }},
	{"origin", "* or an origin such as https://chat.example.com or https://*.example.com", transport.ValidOrigin},
	{"url", "an http:// or https:// URL", validURL},
	{"issuer", "words such as issuer=https://login.example.com jwks_url=https://login.example.com/keys algorithms=RS256|ES256 audience=chat, " +
		"or public_key_file=FILE instead of jwks_url", validIssuer},
	{"network", "a network such as 10.0.0.0/8, or an address", validNetwork},
	{"file", "a file that can be read", readable},
}

// policyReplace is the policy of one session per user.
const policyReplace = "replace"

// sessionPolicy is how many sessions a user may have by a policy; 0: it is none.
func sessionPolicy(s string) int {
	if s == policyReplace {
		return 1
	}
	text, ok := strings.CutPrefix(s, "allow:")
	n, err := strconv.Atoi(text)
	if !ok || err != nil || n < 2 || n > 64 {
		return 0
	}
	return n
}

func checkText(name string) string { return findCheck(name).text }

func findCheck(name string) check {
	return checks[slices.IndexFunc(checks[:], func(c check) bool { return c.name == name })]
}

var (
	gatewayIDPattern = regexp.MustCompile(`^[A-Za-z0-9._-]{1,200}$`)
	topicPattern     = regexp.MustCompile(`^[A-Za-z0-9._-]{1,249}$`)
	hostPattern      = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\.?$`)
	namePattern      = regexp.MustCompile(`^[A-Za-z0-9._/-]{1,200}$`)
)

// maxTopic is the longest name of a Kafka topic.
const maxTopic = 249

func validGatewayID(s string) bool {
	return gatewayIDPattern.MatchString(s) && s != "." && s != ".."
}

func validTopic(s string) bool { return topicPattern.MatchString(s) && s != "." && s != ".." }

func validHost(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil || hostPattern.MatchString(s)
}

func validPort(s string, lowest int) bool {
	n, err := strconv.Atoi(s)
	return err == nil && lowest <= n && n <= 65535
}

// validListen accepts port 0: the system chooses.
func validListen(s string) bool {
	host, port, err := net.SplitHostPort(s)
	return err == nil && (host == "" || validHost(host)) && validPort(port, 0)
}

func validHostPort(s string) bool {
	host, port, err := net.SplitHostPort(s)
	return err == nil && validHost(host) && validPort(port, 1)
}

func validEndpoint(s string) bool {
	for _, scheme := range []string{"http://", "https://"} {
		if rest, found := strings.CutPrefix(s, scheme); found {
			return validHostPort(rest)
		}
	}
	return validHostPort(s)
}

func validTarget(s string) bool {
	if name, found := strings.CutPrefix(s, etcdScheme); found {
		return namePattern.MatchString(name)
	}
	return validHostPort(s)
}

func validURL(s string) bool {
	u, err := url.Parse(s)
	return err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Host != ""
}

func validIssuer(s string) bool {
	i, err := parseIssuer(s)
	if err != nil {
		return false
	}
	return i.keyFile == "" || readable(i.keyFile)
}

// issuerKeys is one of auth.issuers.
type issuerKeys struct {
	name, audience, keyFile, jwksURL string
	algorithms                       []string
}

// parseIssuer reads one of auth.issuers.
func parseIssuer(s string) (i issuerKeys, err error) {
	for word := range strings.FieldsSeq(s) {
		key, value, _ := strings.Cut(word, "=")
		if value == "" {
			return i, fmt.Errorf("%s has no value", key)
		}
		switch key {
		case "issuer":
			i.name = value
		case "audience":
			i.audience = value
		case "public_key_file":
			i.keyFile = value
		case "jwks_url":
			i.jwksURL = value
		case "algorithms":
			i.algorithms = strings.Split(value, "|")
		default:
			return i, fmt.Errorf("%s is unknown", key)
		}
	}
	for _, a := range i.algorithms {
		if !slices.Contains([]string{"RS256", "ES256", "EdDSA"}, a) {
			return i, fmt.Errorf("algorithms must be of RS256, ES256 and EdDSA")
		}
	}
	if i.name == "" || len(i.algorithms) == 0 || (i.keyFile == "") == (i.jwksURL == "") || i.jwksURL != "" && !validURL(i.jwksURL) {
		return i, errors.New("issuer, algorithms and one of jwks_url and public_key_file are needed")
	}
	return i, nil
}

func validNetwork(s string) bool {
	_, err := network(s)
	return err == nil
}

// network reads a network, or an address as the network of it alone.
func network(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return a.Prefix(a.BitLen())
	}
	p, err := netip.ParsePrefix(s)
	return p.Masked(), err
}

// networks reads what Validate has passed.
func networks(list []string) []netip.Prefix {
	var prefixes []netip.Prefix
	for _, s := range list {
		if p, err := network(s); err == nil {
			prefixes = append(prefixes, p)
		}
	}
	return prefixes
}

func readable(name string) bool {
	f, err := os.Open(name) // #nosec G304 -- named in the configuration
	if err != nil {
		return false
	}
	defer f.Close()
	info, err := f.Stat()
	return err == nil && !info.IsDir()
}

// Validate returns a *ConfigError with every problem, or nil.
func (c *Config) Validate() error {
	if problems := c.problems(); len(problems) > 0 {
		return &ConfigError{Problems: problems}
	}
	return nil
}

func (c *Config) problems() []Problem {
	var list []Problem
	for _, o := range options() {
		if message := o.problem(o.value(c).Interface()); message != "" {
			list = append(list, Problem{Key: o.key, Message: message})
		}
	}
	list = append(list, c.crossProblems()...)
	for i := range list {
		list[i].Value = c.shown(list[i].Key)
	}
	return list
}

// shown is the value of a key for a person to read.
func (c *Config) shown(key string) string {
	all := options()
	at := slices.IndexFunc(all, func(o option) bool { return o.key == key })
	return all[at].shown(all[at].value(c).Interface())
}

// shown is v for a person to read: quoted where it is text, redacted where it is a secret.
func (o *option) shown(v any) string {
	text := o.text(v)
	switch {
	case o.secret && text != "":
		return redacted
	case o.kind == listType || len(o.oneOf) > 0 || o.kind.Kind() == reflect.String:
		return strconv.Quote(text)
	}
	return text
}

// problem says what is wrong with v, a value of the option's type; empty when nothing is.
func (o *option) problem(v any) string {
	elements := []string{}
	switch v := v.(type) {
	case string:
		if v != "" {
			elements = append(elements, v)
		}
	case []string:
		elements = v
	default:
		if !o.inRange(v) {
			return "must be " + o.wants()
		}
		return ""
	}
	if len(elements) == 0 && (o.required || len(o.oneOf) > 0) {
		return "must not be empty; it is " + o.wants()
	}
	for _, s := range elements {
		if len(o.oneOf) > 0 && !slices.Contains(o.oneOf, s) ||
			o.check != "" && !findCheck(o.check).ok(s) {
			if o.kind == listType && !o.secret {
				return "must be " + o.wants() + "; " + strconv.Quote(s) + " is not"
			}
			return "must be " + o.wants()
		}
	}
	return ""
}

// crossProblems checks what depends on more than one key.
func (c *Config) crossProblems() []Problem {
	var list []Problem
	add := func(key, format string, args ...any) {
		list = append(list, Problem{Key: key, Message: fmt.Sprintf(format, args...)})
	}
	if ws := &c.WebSocket; ws.HeartbeatTimeout <= ws.Heartbeat {
		add("websocket.heartbeat_timeout", "must be longer than websocket.heartbeat, %s", durationText(ws.Heartbeat))
	}
	if l := &c.Limits; l.BytesPerSecond > 0 && c.WebSocket.MaxMessageBytes <= 768<<10 &&
		2*l.BytesPerSecond < c.WebSocket.MaxMessageBytes {
		add("limits.bytes_per_second", "must let a message of websocket.max_message_bytes, %d, through in 2 s", c.WebSocket.MaxMessageBytes)
	}
	if t := &c.HTTP.TLS; (t.CertFile == "") != (t.KeyFile == "") {
		add("http.tls.cert_file", "and http.tls.key_file must both be set, or neither")
	} else if err := (AdminTLS{CertFile: t.CertFile, KeyFile: t.KeyFile}).loads(); err != nil {
		add("http.tls.cert_file", "does not work: %v", err)
	}
	if h := &c.HTTP; h.WriteTimeout <= max(c.Logic.Deadline, c.Kafka.AckDeadline) {
		add("http.write_timeout", "must be longer than logic.deadline, %s, and kafka.ack_deadline, %s",
			durationText(c.Logic.Deadline), durationText(c.Kafka.AckDeadline))
	}
	if c.HTTP.ProxyProtocol && len(c.HTTP.TrustedProxies) == 0 {
		add("http.trusted_proxies", "must not be empty with http.proxy_protocol")
	}
	switch c.Auth.Algorithm {
	case "HS256", "HS384", "HS512":
		if c.Auth.HS256Secret == "" {
			add("auth.hs256_secret", "must not be empty with auth.algorithm %s; set it, or "+
				"auth.hs256_secret_file to read it from a file", c.Auth.Algorithm)
		}
		if c.Auth.JWKSURL != "" {
			add("auth.jwks_url", "must be empty with auth.algorithm %s: its keys are public", c.Auth.Algorithm)
		}
	case "RS256", "ES256", "EdDSA":
		if (c.Auth.PublicKeyFile == "") == (c.Auth.JWKSURL == "") {
			add("auth.public_key_file", "or auth.jwks_url must be set with auth.algorithm %s, and not both", c.Auth.Algorithm)
		}
	}
	names := map[string]bool{c.Auth.Issuer: true}
	for _, s := range c.Auth.Issuers {
		if c.Auth.Issuer == "" {
			add("auth.issuer", "must be set with auth.issuers: a token's iss says whose it is")
			break
		}
		if i, err := parseIssuer(s); err == nil && names[i.name] {
			add("auth.issuers", "must not name %s twice, nor auth.issuer", i.name)
		} else {
			names[i.name] = true
		}
	}
	list = append(list, c.topicProblems()...)
	if r := &c.Redis; r.Cluster && r.SentinelMaster != "" {
		add("redis.cluster", "must not be true while redis.sentinel_master is set")
	} else if !r.Cluster && r.SentinelMaster == "" && len(r.Addrs) > 1 {
		add("redis.addrs", "must be one address, or set redis.cluster or redis.sentinel_master")
	}
	if r := &c.Redis; r.SentinelMaster == "" && (r.SentinelUsername != "" || r.SentinelPassword != "") {
		add("redis.sentinel_master", "must be set for redis.sentinel_username and redis.sentinel_password to have an effect")
	}
	if r := &c.Redis; r.PresenceTTL < 2*r.RefreshInterval {
		add("redis.presence_ttl", "must be at least twice redis.refresh_interval, %s", durationText(r.RefreshInterval))
	}
	if s := &c.Kafka.SASL; s.Mechanism != saslNone && (s.Username == "" || s.Password == "") {
		add("kafka.sasl.mechanism", "needs kafka.sasl.username and kafka.sasl.password")
	}
	if d := &c.Drain; d.Deadline <= d.Window {
		add("drain.deadline", "must be longer than drain.window, %s", durationText(d.Window))
	}
	for _, t := range []struct {
		prefix string
		tls    TLS
	}{{"kafka", c.Kafka.TLS}, {"redis", c.Redis.TLS}, {"etcd", c.Etcd.TLS}, {"logic", c.Logic.TLS}, {"tracing", c.Tracing.TLS}} {
		if (t.tls.CertFile == "") != (t.tls.KeyFile == "") {
			add(t.prefix+".tls.cert_file", "must be given together with %s.tls.key_file", t.prefix)
		}
		if !t.tls.Enabled && t.tls != (TLS{}) {
			add(t.prefix+".tls.enabled", "must be true for the other keys of %s.tls to have an effect", t.prefix)
		} else if err := t.tls.loads(); err != nil {
			add(t.prefix+".tls.enabled", "does not work: %v", err)
		}
	}
	if t := &c.Admin.TLS; (t.CertFile == "") != (t.KeyFile == "") {
		add("admin.tls.cert_file", "must be given together with admin.tls.key_file")
	} else if t.ClientCAFile != "" && t.CertFile == "" {
		add("admin.tls.client_ca_file", "needs admin.tls.cert_file and admin.tls.key_file")
	} else if err := t.loads(); err != nil {
		add("admin.tls.cert_file", "does not work: %v", err)
	}
	return append(list, c.grpcProblems()...)
}

func (c *Config) topicProblems() []Problem {
	var list []Problem
	k := &c.Kafka
	topics := []struct{ key, name string }{
		{"kafka.upstream_topic", k.UpstreamTopic},
		{"kafka.undelivered_topic", k.UndeliveredTopic},
		{"kafka.deadletter_topic", k.DeadletterTopic},
		{"kafka.user_events_topic", k.UserEventsTopic},
	}
	for i, t := range topics {
		for _, other := range topics[:i] {
			if t.name != "" && t.name == other.name {
				list = append(list, Problem{Key: t.key, Message: "must differ from " + other.key})
			}
		}
		if k.DownstreamTopicPrefix != "" && t.name == k.DownstreamTopicPrefix+c.GatewayID {
			list = append(list, Problem{Key: t.key, Message: "must differ from the gateway's downstream topic"})
		}
	}
	if n := len(k.DownstreamTopicPrefix) + len(c.GatewayID); c.GatewayID != "" && n > maxTopic {
		list = append(list, Problem{
			Key:     "kafka.downstream_topic_prefix",
			Message: fmt.Sprintf("must leave room for gateway_id: together %d characters, at most %d", n, maxTopic),
		})
	}
	return list
}

func (c *Config) grpcProblems() []Problem {
	var list []Problem
	add := func(key, message string) { list = append(list, Problem{Key: key, Message: message}) }
	g := &c.GRPC
	if (g.TLS.CertFile == "") != (g.TLS.KeyFile == "") {
		add("grpc.tls.cert_file", "must be given together with grpc.tls.key_file")
	}
	if g.TLS.RequireClientCert && (g.TLS.CertFile == "" || g.TLS.CAFile == "") {
		add("grpc.tls.require_client_cert", "needs grpc.tls.cert_file, grpc.tls.key_file and grpc.tls.ca_file")
	}
	if err := g.TLS.loads(); err != nil {
		add("grpc.tls.cert_file", "does not work: "+err.Error())
	}
	if g.Token == "" && !g.TLS.RequireClientCert && validListen(g.Addr) && !loopback(g.Addr) {
		add("grpc.token", "or grpc.tls.require_client_cert must be set, as grpc.addr is not a loopback address")
	}
	return list
}

// loopback reports whether nothing outside this machine reaches a listener on addr. A name other
// than localhost is not resolved: what it points to may change.
func loopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.Unmap().IsLoopback()
}

// Warnings lists what is allowed and yet probably not meant.
func (c *Config) Warnings() []string {
	var list []string
	if a := &c.Auth; strings.HasPrefix(a.Algorithm, "HS") && len(a.HS256Secret) < 32 {
		list = append(list, fmt.Sprintf("auth.hs256_secret has %d bytes: fewer than 32 can be guessed; "+
			"make one with: openssl rand -base64 32", len(a.HS256Secret)))
	}
	if s := &c.Kafka.SASL; s.Mechanism == "PLAIN" && !c.Kafka.TLS.Enabled {
		list = append(list, "kafka.sasl.mechanism PLAIN without kafka.tls.enabled sends the password in clear text")
	}
	if c.GRPC.Token != "" && c.GRPC.TLS.CertFile == "" && !loopback(c.GRPC.Addr) {
		list = append(list, "grpc.token without grpc.tls.cert_file is sent in clear text")
	}
	if !loopback(c.Admin.Addr) && c.Admin.TLS.ClientCAFile == "" {
		list = append(list, "admin.addr is not a loopback address and asks for no login: "+
			"let only your own systems reach it, or set admin.tls.client_ca_file")
	}
	if c.Admin.Token != "" && c.Admin.TLS.CertFile == "" && !loopback(c.Admin.Addr) {
		list = append(list, "admin.token without admin.tls.cert_file is sent in clear text")
	}
	return list
}
