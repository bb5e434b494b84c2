package transport

import (
	"crypto/ed25519"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"im-gateway/codec"
)

// alter puts settings into force that differ from those before.
func alter(t testing.TB, s *Server, change func(*Settings)) {
	t.Helper()
	next := s.rules.Load().Settings
	change(&next)
	apply, err := s.Prepare(next)
	if err != nil {
		t.Fatal(err)
	}
	apply()
}

// upgrade tries to connect and returns the answer's status.
func upgrade(t testing.TB, s *Server, target, more string) (*client, int) {
	t.Helper()
	c := dial(t, s)
	c.send("GET ", target, " HTTP/1.1\r\n", upgradeLines, more, "\r\n")
	resp, _ := c.answer()
	return c, resp.StatusCode
}

func bearer(token string) string { return "Authorization: Bearer " + token + "\r\n" }

// TestSettingsOnOpenConnections: limits that change hold for connections that are open.
func TestSettingsOnOpenConnections(t *testing.T) {
	s, sink := start(t, nil)
	c := connect(t, s, "alice")
	message := text(`{"type":"m","message_id":"1","data":1}`)
	stored := func(n int) {
		t.Helper()
		for range n {
			c.send(message)
		}
		for range n {
			sink.next(t, codec.EventMessage)
		}
	}
	stored(30)
	alter(t, s, func(n *Settings) { n.MessagesPerSecond = 1 })
	for range 4 { // two seconds' worth, and as many
		c.send(message)
	}
	if f := c.read(); !strings.Contains(string(f.Payload), string(codec.RateLimited)) {
		t.Errorf("with one message a second: %s", f.Payload)
	}
	alter(t, s, func(n *Settings) { n.MessagesPerSecond = 0 })
	stored(30)

	before := testutil.ToFloat64(s.metrics.bytesIn)
	c.send(frame(false, ws.OpText, `{"type":"m","message_id":"1","data":"`+strings.Repeat("x", 1200)))
	eventually(t, func() bool { return testutil.ToFloat64(s.metrics.bytesIn) > before+1200 })
	alter(t, s, func(n *Settings) { n.MaxMessageBytes = 1024 })
	c.send(frame(true, ws.OpContinuation, `"}`))
	if code := c.closed(); code != ws.StatusMessageTooBig {
		t.Errorf("a message that had begun: closed with %d", code)
	}
	big := text(`{"type":"m","message_id":"1","data":"` + strings.Repeat("x", 2000) + `"}`)
	other := connect(t, s, "bob")
	other.send(big)
	if code := other.closed(); code != ws.StatusMessageTooBig {
		t.Errorf("a whole one: closed with %d", code)
	}
	open := connect(t, s, "carol")
	alter(t, s, func(n *Settings) { n.MaxMessageBytes = 4096 })
	open.send(big)
	sink.next(t, codec.EventMessage)
}

// TestSettingsOnHandshakes: origins, proxies, bounds and where a token may stand change for what comes next;
// what is open stays.
func TestSettingsOnHandshakes(t *testing.T) {
	s, sink := start(t, nil)
	good := bearer(token(t, "alice", time.Hour))
	page := good + "Origin: https://a.example\r\n"
	open, status := upgrade(t, s, "/ws", page)
	for _, step := range []struct {
		name   string
		change func(*Settings)
		target string
		more   string
		want   int
	}{
		{"any origin", func(*Settings) {}, "/ws", page, 101},
		{"another origin", func(n *Settings) { n.AllowedOrigins = []string{"https://b.example"} }, "/ws", page, 403},
		{"this origin", func(n *Settings) { n.AllowedOrigins = []string{"https://*.example.com", "https://a.example"} }, "/ws", page, 101},
		{"token in the query", func(*Settings) {}, "/ws?token=" + token(t, "alice", time.Hour), "", 101},
		{"no token in the query", func(n *Settings) { n.RefuseQueryToken = true }, "/ws?token=" + token(t, "alice", time.Hour), "", 401},
		{"no more connections", func(n *Settings) { n.MaxConnections = 1 }, "/ws", good, 503},
		{"more connections", func(n *Settings) { n.MaxConnections = 100 }, "/ws", good, 101},
		{"few upgrades a second", func(n *Settings) { n.HandshakesPerSecond = 1 }, "/ws", good, 101},
		{"and no more than that", func(*Settings) {}, "/ws", good, 503},
		{"any number of upgrades", func(n *Settings) { n.HandshakesPerSecond = 0 }, "/ws", good, 101},
		{"proxies count as one", func(n *Settings) { n.ConnectionsPerIP = 1 }, "/ws", good + "X-Forwarded-For: 192.0.2.1\r\n", 101},
		{"one address", func(*Settings) {}, "/ws", good + "X-Forwarded-For: 192.0.2.2\r\n", 429},
		{"a trusted proxy", func(n *Settings) {
			n.TrustedProxies = TrustedNetworks{netip.MustParsePrefix("127.0.0.0/8")}
		}, "/ws", good + "X-Forwarded-For: 192.0.2.2\r\n", 101},
		{"its client again", func(*Settings) {}, "/ws", good + "X-Forwarded-For: 192.0.2.2\r\n", 429},
		{"by another header", func(n *Settings) { n.ForwardedHeader = ForwardedHeader }, "/ws", good + "Forwarded: for=192.0.2.3\r\n", 101},
		{"without the limit", func(n *Settings) { n.ConnectionsPerIP = 0 }, "/ws", good + "Forwarded: for=192.0.2.3\r\n", 101},
	} {
		alter(t, s, step.change)
		_, got := upgrade(t, s, step.target, step.more)
		for tries := 0; got == 101 && step.want == 503 && tries < 50; tries++ { // two at once, and one a second
			_, got = upgrade(t, s, step.target, step.more)
		}
		if got != step.want {
			t.Errorf("%s: %d, want %d", step.name, got, step.want)
		}
	}
	if open.send(text(`{"type":"m","message_id":"of-the-first","data":1}`)); status != 101 {
		t.Fatalf("the first: %d", status)
	}
	for string(sink.next(t, codec.EventMessage).Upstream.ClientMsgID) != "of-the-first" {
	}
}

// TestSettingsOfKeys: after a change of keys, even of their kind, tokens of the old one are refused in
// handshakes and as new tokens of a session, but the sessions that they opened stay.
func TestSettingsOfKeys(t *testing.T) {
	s, sink := start(t, nil)
	open := connect(t, s, "alice")
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	v, err := NewVerifier(VerifierOptions{Algorithm: "EdDSA", PublicKeyPEM: pemOf(t, public)})
	if err != nil {
		t.Fatal(err)
	}
	alter(t, s, func(n *Settings) { n.Verifier = v })
	if _, status := upgrade(t, s, "/ws", bearer(token(t, "alice", time.Hour))); status != 401 {
		t.Errorf("a token of the old key: %d", status)
	}
	fresh := string(signed(t, jwa.EdDSA, private))
	if _, status := upgrade(t, s, "/ws", bearer(fresh)); status != 101 {
		t.Errorf("a token of the new key: %d", status)
	}
	refresh := func(token string) string {
		open.send(text(fmt.Sprintf(`{"type":"refresh-token","data":{"token":%q}}`, token)))
		return string(open.read().Payload)
	}
	if answer := refresh(token(t, "alice", 2*time.Hour)); !strings.Contains(answer, string(codec.AuthFailed)) {
		t.Errorf("refreshed by the old key: %s", answer)
	}
	open.send(text(`{"type":"m","message_id":"still-here","data":1}`))
	for string(sink.next(t, codec.EventMessage).Upstream.ClientMsgID) != "still-here" {
	}
	for _, wrong := range []func(*Settings){
		func(n *Settings) { n.Verifier = nil },
		func(n *Settings) {
			n.Verifier, err = NewVerifier(VerifierOptions{Algorithm: "HS256", Secret: secret, Denials: NewDenials()})
		},
	} {
		next := s.rules.Load().Settings
		if wrong(&next); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Prepare(next); err == nil {
			t.Error("a verifier that must not be taken was")
		}
	}
}

// TestAddressLimitsChange: counts stay right while the limits come and go.
func TestAddressLimitsChange(t *testing.T) {
	c := newAddressCounts()
	a := netip.MustParseAddr("10.0.0.1")
	limits := func(ip, subnet int, exempt ...netip.Prefix) *rules {
		return &rules{Settings: Settings{ConnectionsPerIP: ip, ConnectionsPerSubnet: subnet, ExemptNetworks: exempt}}
	}
	var held []network
	take := func(r *rules, want bool) {
		t.Helper()
		n, ok := c.take(r, a)
		if ok != want {
			t.Errorf("%d held, taken: %t, want %t", len(held), ok, want)
		}
		if ok {
			held = append(held, n)
		}
	}
	take(limits(0, 0), true) // not counted
	take(limits(2, 0), true)
	take(limits(0, 2), true)
	take(limits(0, 2), false)
	take(limits(2, 0), false)
	take(limits(2, 2, netip.MustParsePrefix("10.0.0.0/8")), true) // not counted
	take(limits(3, 3), true)
	take(limits(3, 3), false)
	for _, n := range held {
		c.give(n)
	}
	if len(c.ips)+len(c.subnets) != 0 {
		t.Errorf("left behind: %v %v", c.ips, c.subnets)
	}
}

// TestSettingsUnderLoad: settings that change all the time lose no message, for -race too.
func TestSettingsUnderLoad(t *testing.T) {
	s, sink := start(t, nil)
	const clients, messages = 8, 400
	stop := make(chan struct{})
	var changing, sending sync.WaitGroup
	changing.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			alter(t, s, func(n *Settings) {
				n.MessagesPerSecond, n.BytesPerSecond = 1_000_000+i, 1<<30
				n.MaxMessageBytes, n.MaxFragments = 4096+i%1000, 100+i%100
				n.AllowedOrigins = []string{fmt.Sprintf("https://%d.example", i)}
				n.ConnectionsPerIP, n.ConnectionsPerSubnet = i%2*1000, i%3*1000
				n.HandshakesPerSecond, n.HandshakesInFlight = 1_000_000, 1000+i
			})
		}
	})
	open := make([]*client, clients)
	for i := range open {
		open[i] = connect(t, s, fmt.Sprintf("u-%d", i))
	}
	for i, c := range open {
		sending.Go(func() {
			for n := range messages {
				m := text(fmt.Sprintf(`{"type":"m","message_id":"%d-%d","data":1}`, i, n))
				if _, err := c.Write([]byte(m)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	next := make([]int, clients)
	for range clients * messages {
		var i, n int
		id := string(sink.next(t, codec.EventMessage).Upstream.ClientMsgID)
		if _, err := fmt.Sscanf(id, "%d-%d", &i, &n); err != nil || next[i] != n {
			t.Fatalf("message %q, want number %d of its client: %v", id, next[i], err)
		}
		next[i]++
	}
	sending.Wait()
	close(stop)
	changing.Wait()
}
