package transport

import (
	"bufio"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

var loopback = TrustedNetworks{netip.MustParsePrefix("127.0.0.0/8")}

// viaProxy names an IPv4 client as a proxy does.
func viaProxy(client string) string {
	a := netip.MustParseAddrPort(client)
	b := []byte(proxySignature + "\x21\x11\x00\x0c")
	b = append(b, a.Addr().AsSlice()...)
	b = append(b, 127, 0, 0, 1)
	b = binary.BigEndian.AppendUint16(b, a.Port())
	return string(binary.BigEndian.AppendUint16(b, 443))
}

// TestProxyProtocol: the client counts for whom the proxy names, over plain connections and TLS.
func TestProxyProtocol(t *testing.T) {
	for _, secure := range []bool{false, true} {
		s, _ := start(t, func(o *Options) {
			o.Settings.TrustedProxies, o.ProxyProtocol, o.Settings.ConnectionsPerIP = loopback, true, 2
			if secure {
				withTLS(o)
			}
		})
		from := func(address string) (*client, bool) {
			c := dial(t, s)
			header := viaProxy(address)
			c.send(header[:5]) // in pieces
			time.Sleep(time.Millisecond)
			c.send(header[5:])
			if secure {
				conn := tls.Client(c.Conn, clientTLS())
				if conn.Handshake() != nil {
					return nil, false
				}
				c = &client{t, conn, bufio.NewReader(conn)}
			}
			c.send("GET /ws HTTP/1.1\r\n", upgradeLines, "Authorization: Bearer ", token(t, "u", time.Hour), "\r\n\r\n")
			resp, _ := c.answer()
			return c, resp.StatusCode == 101
		}
		a, ok1 := from("192.0.2.1:1")
		_, ok2 := from("192.0.2.1:2")
		_, ok3 := from("192.0.2.1:3")
		_, other := from("192.0.2.2:1")
		if !ok1 || !ok2 || ok3 || !other {
			t.Fatalf("TLS %t: %t %t %t, another address %t", secure, ok1, ok2, ok3, other)
		}
		_ = a.Close()
		eventually(t, func() bool { _, ok := from("192.0.2.1:4"); return ok })

		// Without a header, or with one that is none, the connection is refused at once.
		for _, head := range []string{"GET / HTTP/1.1\r\n\r\n", proxySignature + "\x31", viaProxy("192.0.2.1:1")[:14] + "\xff\xff"} {
			c := dial(t, s)
			c.send(head)
			if b, err := io.ReadAll(c); len(b) > 0 || err != nil && strings.Contains(err.Error(), "timeout") {
				t.Errorf("%q: %q, %v", head, b, err)
			}
		}
	}
}

// TestProxyHeaderOfStrangers: who is no trusted proxy has nothing to say of addresses.
func TestProxyHeaderOfStrangers(t *testing.T) {
	s, _ := start(t, func(o *Options) {
		o.Settings.TrustedProxies, o.ProxyProtocol = TrustedNetworks{netip.MustParsePrefix("192.0.2.0/24")}, true
	})
	c := dial(t, s)
	c.send(viaProxy("192.0.2.1:1"))
	if resp, _ := c.answer(); resp.StatusCode != 400 {
		t.Errorf("%s", resp.Status)
	}
	connect(t, s, "u")
}

// TestForwardedFor: an upgrade counts for the client whom a trusted proxy names, and HTTP handlers see
// it; others' headers are not read.
func TestForwardedFor(t *testing.T) {
	for _, trusted := range []bool{true, false} {
		seen := make(chan netip.Addr, 1)
		s, _ := start(t, func(o *Options) {
			o.Settings.ConnectionsPerIP = 2
			if trusted {
				o.Settings.TrustedProxies = loopback
			}
			o.API = http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { seen <- ClientIP(r) })
		})
		upgrade := func(forwarded string) int {
			c := dial(t, s)
			c.send("GET /ws HTTP/1.1\r\n", upgradeLines, "X-Forwarded-For: ", forwarded, "\r\nAuthorization: Bearer ", token(t, "u", time.Hour), "\r\n\r\n")
			resp, _ := c.answer()
			return resp.StatusCode
		}
		if !trusted {
			c := dial(t, s)
			c.send("GET /x HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n")
			if a := <-seen; !a.IsLoopback() {
				t.Errorf("a stranger's header was believed: %s", a)
			}
			continue
		}
		a, b, third, other := upgrade("192.0.2.1"), upgrade("8.8.8.8, 192.0.2.1"), upgrade("192.0.2.1, 127.0.0.9"), upgrade("192.0.2.2")
		if a != 101 || b != 101 || third != 429 || other != 101 {
			t.Errorf("%d %d %d, another address %d", a, b, third, other)
		}
		if n := testutil.ToFloat64(s.metrics.handshake.crowded); n != 1 {
			t.Errorf("%v refused", n)
		}
		c := dial(t, s)
		c.send("GET /x HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 192.0.2.7\r\n\r\n")
		if a := <-seen; a.String() != "192.0.2.7" {
			t.Errorf("the handler saw %s", a)
		}
	}
}
