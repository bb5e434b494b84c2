package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/prometheus/procfs"
	"github.com/twmb/franz-go/pkg/kgo"
	"golang.org/x/sys/unix"

	"im-gateway/test/abuse/attack"
	"im-gateway/test/chaos/world"
)

const (
	handshakes = "im_gateway_transport_handshakes_total"
	closes     = "im_gateway_transport_closes_total"
	refused    = "im_gateway_transport_refused_total"
	overTLS    = "im_gateway_transport_tls_handshakes_total"
)

func counter(name, label, value string) string { return fmt.Sprintf("%s{%s=%q}", name, label, value) }

// Outcomes that attackers may see besides: the end of the attack, and a reset, which is what is left of a
// code when the client's own input was still unread; and no code, where the client sent more than 4 MiB
// or for more than 2 s after it.
const (
	open  = "open at the end"
	reset = "reset"
	ended = "ended without a code"
)

// noExempt makes the limits by address count for loopback too.
var noExempt = map[string]string{"limits.exempt_networks": ""}

// tlsOn is a public port that takes wss alone.
var tlsOn = map[string]string{"http.tls.cert_file": "{dir}/" + certFile, "http.tls.key_file": "{dir}/" + keyFile}

func with(settings map[string]string, more ...string) map[string]string {
	out := map[string]string{}
	for k, v := range settings {
		out[k] = v
	}
	for i := 0; i < len(more); i += 2 {
		out[more[i]] = more[i+1]
	}
	return out
}

// rows are all abuses. Those with equal settings share a gateway one after the other.
var rows = []row{
	{
		name: "slowloris", what: "heads that never end, a byte every 2 s", short: 500, hold: 15 * time.Second,
		limit:         "websocket.handshake_timeout, limits.handshakes_in_flight",
		spec:          attack.Spec{Kind: "slow heads", N: 5000, Pace: 2 * time.Second, Again: true, Rest: 4 * time.Second},
		shortSettings: map[string]string{"websocket.handshake_timeout": "2s", "limits.handshakes_in_flight": "400"},
		expect:        []string{"HTTP 408"}, allow: []string{open},
		moved: []string{counter(handshakes, "result", "timeout"), counter(handshakes, "result", "displaced")},
	},
	{
		name: "WebSocket ping flood", what: "10,000 pings of 125 bytes a second each, reconnecting", hold: 10 * time.Second,
		limit:  "limits.messages_per_second",
		spec:   attack.Spec{Kind: "pings", N: 100, Pace: 10 * time.Millisecond, Again: true},
		expect: []string{"close 1008"}, allow: []string{open, reset, ended},
		moved: []string{counter(closes, "code", "1008")},
	},
	{
		name: "application ping flood", what: "10,000 pings of the protocol's a second each, reconnecting", hold: 10 * time.Second,
		limit:  "limits.messages_per_second",
		spec:   attack.Spec{Kind: "app pings", N: 100, Pace: 10 * time.Millisecond, Again: true},
		expect: []string{"refused RATE_LIMITED", "close 1008"}, allow: []string{open, reset, ended},
		moved: []string{counter(refused, "code", "RATE_LIMITED"), counter(closes, "code", "1008")},
	},
	{
		name: "message flood", what: "10,000 messages a second each, reconnecting", short: 20, hold: 10 * time.Second,
		limit:  "limits.messages_per_second, outstanding messages of a session",
		spec:   attack.Spec{Kind: "messages", N: 50, Pace: 10 * time.Millisecond, Again: true},
		expect: []string{"refused RATE_LIMITED", "close 1008"}, allow: []string{open, reset, ended, "accepted", "refused OVERLOADED"},
		moved:    []string{counter(refused, "code", "RATE_LIMITED"), counter(closes, "code", "1008")},
		refusals: true,
	},
	{
		name: "flood of large messages", what: "messages of 60 KiB, up to 60 MB/s each, reconnecting", hold: 10 * time.Second,
		limit:  "limits.bytes_per_second, kafka.max_in_flight_bytes",
		spec:   attack.Spec{Kind: "large messages", N: 8, Pace: time.Millisecond, Again: true},
		expect: []string{"refused RATE_LIMITED", "close 1008"}, allow: []string{open, reset, ended, "accepted", "refused OVERLOADED"},
		moved:    []string{counter(refused, "code", "RATE_LIMITED"), counter(closes, "code", "1008")},
		refusals: true,
	},
	{
		name: "1-byte fragments", what: "messages without end in fragments of one byte, or of none, reconnecting", short: 20,
		hold: 10 * time.Second, limit: "websocket.max_fragments",
		spec:   attack.Spec{Kind: "fragments", N: 200, Pace: 10 * time.Millisecond, Again: true},
		expect: []string{"close 1008"}, allow: []string{open, reset, ended},
		moved: []string{counter(closes, "code", "1008")},
	},
	{
		name: "large heads", what: "heads of the largest size, of a byte more, and without end", hold: 10 * time.Second,
		limit:  "websocket.head_bytes",
		spec:   attack.Spec{Kind: "heads", N: 1000, Pace: 100 * time.Millisecond, Again: true},
		expect: []string{"HTTP 101", "HTTP 431"}, allow: []string{open, reset},
		moved: []string{counter(handshakes, "result", "too_large")},
	},
	{
		name: "invalid frames", what: "frames that RFC 6455 forbids, in every form, 200,000 on a connection each", short: 30,
		hold: 90 * time.Second, limit: "RFC 6455",
		spec:   attack.Spec{Kind: "invalid frames", N: 100, Total: 200_000, Again: true},
		expect: []string{"close 1002", "close 1003", "close 1007", "close 1009"}, allow: []string{open, reset, "HTTP 503"},
		moved: []string{counter(closes, "code", "1002"), counter(closes, "code", "1003"), counter(closes, "code", "1007"), counter(closes, "code", "1009")},
	},
	{
		name: "reconnect storm", what: "sessions that are cut by a reset as soon as they are welcome, and come again at once",
		short: 200, hold: 15 * time.Second, limit: "the queues to the shards",
		spec:   attack.Spec{Kind: "storm", N: 3000, Again: true},
		expect: []string{"welcomed"}, allow: []string{open, reset, "HTTP 503", "close 4500"},
		moved:    []string{counter(handshakes, "result", "ok")},
		refusals: true,
	},
	{
		name: "slow bodies", what: "HTTP bodies that never end, a byte a second", hold: 22 * time.Second,
		limit:  "http.max_connections, 15 s for a request",
		spec:   attack.Spec{Kind: "slow bodies", N: 5000, Pace: time.Second, Again: true},
		expect: []string{"HTTP 4*", "HTTP 503"}, allow: []string{open},
	},
	{
		name: "forged tokens", what: "upgrades with another token's signature, again and again", hold: 10 * time.Second,
		limit:  "the signature",
		spec:   attack.Spec{Kind: "storm", N: 500, Again: true},
		as:     forger,
		expect: []string{"HTTP 401"}, allow: []string{open, reset, "HTTP 503"},
		moved: []string{counter(handshakes, "result", "token_refused")},
	},
	{
		name: "one user everywhere", what: "connections of one user that replace each other, and come again at once", hold: 10 * time.Second,
		limit:  "sessions.policy",
		spec:   attack.Spec{Kind: "hold", N: 500, Again: true},
		as:     oneUser,
		expect: []string{"close 4500"}, allow: []string{open, reset, "HTTP 503"},
		moved: []string{counter(closes, "code", "4500")},
	},
	{
		name: "messages over HTTP", what: "posts of one user on many connections, as fast as they are answered", hold: 10 * time.Second,
		limit:  "limits.user_messages_per_second",
		spec:   attack.Spec{Kind: "posts", N: 100, Again: true},
		as:     oneUser,
		expect: []string{"HTTP 200", "HTTP 429"}, allow: []string{open, reset, "HTTP 503"},
	},
	{
		name: "no descriptors left", what: "connections after the limit of the running process was cut to 50 more than it has open",
		short: 200, hold: 8 * time.Second, limit: "a spare descriptor at EMFILE",
		spec:   attack.Spec{Kind: "hold", N: 1000, Again: true, Rest: 200 * time.Millisecond},
		expect: []string{open}, allow: []string{"HTTP 503", reset, ended},
		moved: []string{"im_gateway_transport_accept_failures_total"},
		arm:   exhaust,
	},
	{
		name: "messages of one user", what: "500 messages a second in each of a user's 64 sessions, reconnecting", hold: 10 * time.Second,
		limit:    "limits.user_messages_per_second",
		spec:     attack.Spec{Kind: "messages", N: 64, Pace: 200 * time.Millisecond, Again: true},
		as:       oneUser,
		settings: map[string]string{"sessions.policy": "allow:64"},
		expect:   []string{"refused RATE_LIMITED", "close 1008"}, allow: []string{open, reset, ended, "accepted", "refused OVERLOADED", "close 4500"},
		moved: []string{counter(closes, "code", "1008")},
	},
	{
		name: "half messages", what: "sessions that send 60 KiB of a message, and then a byte every 2 s", hold: 15 * time.Second,
		limit:    "websocket.heartbeat_timeout",
		spec:     attack.Spec{Kind: "half messages", N: 5000, Pace: 2 * time.Second, Again: true, Rest: time.Second},
		settings: map[string]string{"websocket.heartbeat": "2s", "websocket.heartbeat_timeout": "6s"},
		expect:   []string{"close 1008"}, allow: []string{open},
		moved: []string{counter(closes, "code", "1008")},
	},
	{
		name: "half-open connections", what: "nothing is sent after the connect, or after the upgrade; hosts that vanish",
		hold: 14 * time.Second, limit: "websocket.handshake_timeout, heartbeat_timeout",
		spec:     attack.Spec{Kind: "half open", N: 5001},
		settings: map[string]string{"websocket.heartbeat": "2s", "websocket.heartbeat_timeout": "6s"},
		expect:   []string{"HTTP 408", "close 4001", "vanished"}, allow: []string{open},
		moved: []string{counter(handshakes, "result", "timeout"), counter(closes, "code", "4001")},
	},
	{
		name: "never-reading clients", what: "sessions that read nothing while 8-KiB records are fanned out to all of them",
		short: 300, hold: 15 * time.Second, limit: "websocket.node_egress_budget_bytes, egress_budget_bytes",
		spec:          attack.Spec{Kind: "never read", N: 5000},
		settings:      map[string]string{"websocket.node_egress_budget_bytes": "64MiB"},
		shortSettings: map[string]string{"websocket.node_egress_budget_bytes": "4MiB"},
		expect:        []string{"close 4000"}, allow: []string{ended, open, reset},
		moved:    []string{counter(closes, "code", "4000")},
		refusals: true, during: fanOut,
	},
	{
		name: "never-reading event streams", what: "the same by GET /sse", hold: 15 * time.Second,
		limit:    "websocket.node_egress_budget_bytes, egress_budget_bytes",
		spec:     attack.Spec{Kind: "dead streams", N: 2000},
		settings: map[string]string{"websocket.node_egress_budget_bytes": "64MiB"},
		// Two seconds after its end a connection is gone, with the code that nobody has read.
		expect: []string{ended}, allow: []string{"close 4000", open, reset},
		moved:    []string{counter(closes, "code", "4000")},
		refusals: true, during: fanOut,
	},
	{
		name: "deflate bombs", what: "compressed messages that inflate to 32 MiB, whole and in pieces, reconnecting", hold: 10 * time.Second,
		limit:    "websocket.max_message_bytes, after inflating",
		spec:     attack.Spec{Kind: "bombs", N: 100, Again: true},
		settings: map[string]string{"websocket.compression.enabled": "true"},
		expect:   []string{"close 1009"}, allow: []string{open, reset},
		moved: []string{counter(closes, "code", "1009")},
	},
	{
		name: "reconnect storm beyond the rate", what: "the same with 500 upgrades a second allowed", hold: 10 * time.Second,
		limit:    "limits.handshakes_per_second",
		spec:     attack.Spec{Kind: "storm", N: 3000, Again: true, Rest: 500 * time.Millisecond},
		settings: map[string]string{"limits.handshakes_per_second": "500"},
		expect:   []string{"welcomed", "HTTP 503"}, allow: []string{open, reset, "close 4500"},
		moved: []string{counter(handshakes, "result", "rate_limited")},
	},
	{
		name: "stalled TLS handshakes", what: "a ClientHello, and nothing after it", hold: 15 * time.Second,
		limit:    "http.tls.max_handshakes, websocket.handshake_timeout",
		spec:     attack.Spec{Kind: "TLS stalls", N: 5000, Again: true, Rest: time.Second},
		settings: tlsOn,
		expect:   []string{ended}, allow: []string{open, reset},
		moved: []string{counter(handshakes, "result", "displaced"), counter(overTLS, "result", "failed")},
	},
	{
		name: "TLS handshakes", what: "whole handshakes without resumption, again and again", hold: 10 * time.Second,
		limit:    "http.tls.max_handshakes",
		spec:     attack.Spec{Kind: "TLS handshakes", N: 200, Again: true},
		settings: tlsOn,
		expect:   []string{"handshake done"}, allow: []string{open, reset, ended},
		moved: []string{counter(overTLS, "result", "ok")},
	},
	{
		name: "memory", what: "sessions that send 60 KiB of a message and then a byte every 2 s, more than there is memory for", hold: 16 * time.Second,
		limit:    "limits.memory_high_water_percent, then websocket.handshake_timeout",
		spec:     attack.Spec{Kind: "half messages", N: 5000, Pace: 2 * time.Second, Again: true, Rest: time.Second},
		settings: map[string]string{"GOMEMLIMIT": "160MiB"},
		expect:   []string{"HTTP 503", "close 1008"}, allow: []string{open, reset, ended},
		moved:    []string{counter("im_gateway_transport_pressure_refused_total", "what", "connection"), counter(closes, "code", "1008")},
		refusals: true,
	},
	{
		name: "one address", what: "connections from one address", short: 200, hold: 5 * time.Second,
		limit:    "limits.connections_per_ip",
		spec:     attack.Spec{Kind: "hold", N: 3000, From: attack.OneAddress},
		settings: with(noExempt, "limits.connections_per_ip", "100"), most: 100,
		expect: []string{"HTTP 429", open}, allow: []string{reset, ended},
		moved: []string{counter(handshakes, "result", "address_limit")},
	},
	{
		name: "one subnet", what: "connections from the addresses of one subnet", hold: 5 * time.Second,
		limit:    "limits.connections_per_subnet",
		spec:     attack.Spec{Kind: "hold", N: 3000, From: attack.OneSubnet},
		settings: with(noExempt, "limits.connections_per_subnet", "300"), most: 300,
		expect: []string{"HTTP 429", open}, allow: []string{reset, ended},
		moved: []string{counter(handshakes, "result", "address_limit")},
	},
	{
		name: "login guessing", what: "passwords for many names from one address, and for one name from many", hold: 10 * time.Second,
		limit:  "limits.logins_per_ip, limits.logins_per_name",
		spec:   attack.Spec{Kind: "logins", N: 100, Again: true, Rest: 50 * time.Millisecond},
		expect: []string{"HTTP 429", "HTTP 200"}, allow: []string{open},
		moved:    []string{counter("im_gateway_http_logins_refused_total", "limit", "ip"), counter("im_gateway_http_logins_refused_total", "limit", "name")},
		settings: map[string]string{"limits.logins_per_ip": "60", "limits.logins_per_name": "10"}, // the defaults
	},
	{
		name: "more connections than descriptors", what: "sessions beyond the node's bound, which follows from its open files",
		hold: 8 * time.Second, limit: "websocket.max_connections from RLIMIT_NOFILE",
		spec:     attack.Spec{Kind: "hold", N: 4000, Again: true, Rest: time.Second},
		settings: map[string]string{"ulimit": "2500"},
		expect:   []string{"HTTP 503", open}, allow: []string{reset, ended},
		moved: []string{counter(handshakes, "result", "shed")},
	},
}

// fanOut writes records for all attackers until ctx ends, or most have been closed.
func fanOut(ctx context.Context, r *running) error {
	const targets, size, perSecond = 100, 8 << 10, 8
	tick := time.NewTicker(time.Second / perSecond)
	defer tick.Stop()
	for n := 0; ; n++ {
		var records []*kgo.Record
		for from := 0; from < r.spec.N; from += targets {
			var names []string
			for i := from; i < min(from+targets, r.spec.N); i++ {
				names = append(names, fmt.Sprintf("%q", attacker(i)))
			}
			value := fmt.Sprintf(`{"target_user_ids":[%s],"message_id":"f-%d-%d","data":{"content":%q}}`,
				strings.Join(names, ","), n, from, strings.Repeat("x", size))
			records = append(records, &kgo.Record{Topic: world.DownstreamPrefix + r.g.ID, Value: []byte(value)})
		}
		if err := r.w.Kafka.Client.ProduceSync(ctx, records...).FirstErr(); err != nil {
			return fmt.Errorf("fan out: %w", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		m, err := r.g.Metrics(ctx)
		if err != nil {
			return fmt.Errorf("fan out: %w", err)
		}
		if m["im_gateway_shard_sessions"] < float64(r.users+r.spec.N/10) {
			return nil // records for users who are gone are another matter
		}
	}
}

// exhaust leaves the gateway 50 descriptors until disarmed.
func exhaust(r *running) (disarm func() error, err error) {
	pid := r.g.Pid()
	p, err := procfs.NewProc(pid)
	if err != nil {
		return nil, fmt.Errorf("exhaust: %w", err)
	}
	files, err := p.FileDescriptorsLen()
	if err != nil {
		return nil, fmt.Errorf("exhaust: %w", err)
	}
	var was unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &was); err != nil {
		return nil, fmt.Errorf("exhaust: %w", err)
	}
	less := was
	less.Cur = uint64(files + 50)
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &less, nil); err != nil {
		return nil, fmt.Errorf("exhaust: %w", err)
	}
	return func() error { return unix.Prlimit(pid, unix.RLIMIT_NOFILE, &was, nil) }, nil
}
