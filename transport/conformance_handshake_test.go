package transport

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

// handshake is an upgrade request in parts, so that a case changes what it is about.
type handshake struct {
	method, target, proto, end string
	lines                      []string
}

// with returns the request with the header's lines replaced; no line: without it.
func (h handshake) with(name string, lines ...string) handshake {
	var kept []string
	for _, l := range h.lines {
		if !strings.HasPrefix(l, name+":") {
			kept = append(kept, l)
		}
	}
	h.lines = append(kept, lines...)
	return h
}

func (h handshake) String() string {
	return h.method + " " + h.target + " " + h.proto + h.end + strings.Join(append(h.lines, "", ""), h.end)
}

// TestConformanceHandshake: requests and what they are answered with, never a hang: whole and in single
// bytes. What is refused ends the connection.
func TestConformanceHandshake(t *testing.T) {
	s, _ := start(t, func(o *Options) { o.Settings.AllowedOrigins = []string{"https://good.example"} })
	good := token(t, "alice", time.Hour)
	base := handshake{"GET", "/ws?token=" + good, "HTTP/1.1", "\r\n", []string{"Host: h", "Upgrade: websocket", "Connection: Upgrade",
		"Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="}}
	line := func(f func(*handshake)) string {
		h := base
		f(&h)
		return h.String()
	}
	add := func(l ...string) string { return base.with("-", l...).String() }
	first := func(l string) string {
		h := base
		h.lines = append([]string{l}, h.lines...)
		return h.String()
	}
	method := func(m string) string { return line(func(h *handshake) { h.method = m }) }
	target := func(u string) string { return line(func(h *handshake) { h.target = u }) }
	proto := func(p string) string { return line(func(h *handshake) { h.proto = p }) }
	room := s.opts.HeadBytes - len(add("X: "))
	for _, tc := range []struct {
		name, request string
		status        int
	}{
		{"plain", base.String(), 101},

		{"lower-case names", line(func(h *handshake) {
			h.lines = strings.Split(strings.Replace(strings.ToLower(strings.Join(h.lines, "\n")), "dghlihnhbxbszsbub25jzq==", "dGhlIHNhbXBsZSBub25jZQ==", 1), "\n")
		}), 101},
		{"upper-case names", line(func(h *handshake) {
			h.lines = []string{"HOST: h", "UPGRADE: websocket", "CONNECTION: Upgrade", "SEC-WEBSOCKET-VERSION: 13", "SEC-WEBSOCKET-KEY: dGhlIHNhbXBsZSBub25jZQ=="}
		}), 101},
		{"reverse order", line(func(h *handshake) {
			h.lines = []string{h.lines[4], h.lines[3], h.lines[2], h.lines[1], h.lines[0]}
		}), 101},
		{"no space behind the colons", strings.ReplaceAll(base.String(), ": ", ":"), 101},
		{"spaces and tabs around values", strings.ReplaceAll(strings.ReplaceAll(base.String(), ": ", ": \t "), "\r\nS", " \t\r\nS"), 101},

		{"Upgrade: WebSocket", base.with("Upgrade", "Upgrade: WebSocket").String(), 101},
		{"Upgrade: WEBSOCKET", base.with("Upgrade", "Upgrade: WEBSOCKET").String(), 101},
		{"Upgrade: websockets", base.with("Upgrade", "Upgrade: websockets").String(), 426},
		{"Upgrade: h2c", base.with("Upgrade", "Upgrade: h2c").String(), 426},
		{"Upgrade empty", base.with("Upgrade", "Upgrade:").String(), 426},
		{"no Upgrade", base.with("Upgrade").String(), 426},

		{"Connection: upgrade", base.with("Connection", "Connection: upgrade").String(), 101},
		{"Connection: UPGRADE", base.with("Connection", "Connection: UPGRADE").String(), 101},
		{"Connection: keep-alive, Upgrade", base.with("Connection", "Connection: keep-alive, Upgrade").String(), 101},
		{"Connection: keep-alive,upgrade", base.with("Connection", "Connection: keep-alive,upgrade").String(), 101},
		{"Connection: Upgrade, close", base.with("Connection", "Connection: Upgrade, close").String(), 101},
		{"Connection: keep-alive", base.with("Connection", "Connection: keep-alive").String(), 400},
		{"Connection: upgraded", base.with("Connection", "Connection: upgraded").String(), 400},
		{"Connection: no-upgrade", base.with("Connection", "Connection: no-upgrade").String(), 400},
		{"Connection empty", base.with("Connection", "Connection:").String(), 400},
		{"two Connections", base.with("Connection", "Connection: keep-alive", "Connection: Upgrade").String(), 400}, // they would make one list; no client sends two
		{"no Connection", base.with("Connection").String(), 400},

		{"version 8", base.with("Sec-WebSocket-Version", "Sec-WebSocket-Version: 8").String(), 426},
		{"version 14", base.with("Sec-WebSocket-Version", "Sec-WebSocket-Version: 14").String(), 426},
		{"version 013", base.with("Sec-WebSocket-Version", "Sec-WebSocket-Version: 013").String(), 426},
		{"version 8, 13", base.with("Sec-WebSocket-Version", "Sec-WebSocket-Version: 8, 13").String(), 426},
		{"version empty", base.with("Sec-WebSocket-Version", "Sec-WebSocket-Version:").String(), 426},
		{"no version", base.with("Sec-WebSocket-Version").String(), 400},
		{"two versions", add("Sec-WebSocket-Version: 13"), 400},

		{"no key", base.with("Sec-WebSocket-Key").String(), 400},
		{"key empty", base.with("Sec-WebSocket-Key", "Sec-WebSocket-Key:").String(), 400},
		{"key of 15 bytes", base.with("Sec-WebSocket-Key", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAA").String(), 400},
		{"key of 17 bytes", base.with("Sec-WebSocket-Key", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAAA=").String(), 400},
		{"key without padding", base.with("Sec-WebSocket-Key", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ").String(), 400},
		{"key in the alphabet of URLs", base.with("Sec-WebSocket-Key", "Sec-WebSocket-Key: -_hlIHNhbXBsZSBub25jZQ==").String(), 400},
		{"key with a space", base.with("Sec-WebSocket-Key", "Sec-WebSocket-Key: dGhlIHNhbXBs SBub25jZQ==").String(), 400},
		{"key of 1000 bytes", base.with("Sec-WebSocket-Key", "Sec-WebSocket-Key: "+strings.Repeat("A", 1000)).String(), 400},
		{"two keys", add("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="), 400},

		{"no Host", base.with("Host").String(), 400},
		{"two Hosts", add("Host: h"), 400},

		{"HTTP/1.0", proto("HTTP/1.0"), 505},
		{"HTTP/2.0", proto("HTTP/2.0"), 505},
		{"http/1.1", proto("http/1.1"), 400},
		{"HTTP/1.1 and a space", proto("HTTP/1.1 "), 400},
		{"HTTP", proto("HTTP"), 400},
		{"no protocol", strings.Replace(base.String(), " HTTP/1.1", "", 1), 400},
		{"two spaces", strings.Replace(base.String(), " HTTP/1.1", "  HTTP/1.1", 1), 400},

		{"HEAD", method("HEAD"), 405},
		{"POST", method("POST"), 405},
		{"PUT", method("PUT"), 405},
		{"DELETE", method("DELETE"), 405},
		{"OPTIONS", method("OPTIONS"), 405},
		{"an unknown method", method("BREW"), 405},
		{"get", method("get"), 405},
		{"no method", method(""), 400},

		{"absolute form", target("http://h/ws?token=" + good), 101},
		{"asterisk form", target("*"), 200}, // the API's
		{"no path", target("?token=" + good), 400},
		{"a control character in the target", target("/ws?token=\x01" + good), 400},
		{"a path below", target("/ws/?token=" + good), 200}, // the API's

		{"only line feeds", line(func(h *handshake) { h.end = "\n" }), 400},
		{"one line feed", first("X: a\nY: b"), 400},
		{"ends in a line feed", strings.TrimSuffix(base.String(), "\r\n") + "\n", 400},
		{"only carriage returns and line feeds before", "\r\n" + base.String(), 400},
		{"a carriage return in a value", first("X: a\rb"), 400},
		{"NUL in a value", first("X: a\x00b"), 400},
		{"DEL in a value", first("X: a\x7fb"), 400},
		{"a folded line", first("X: a\r\n b"), 400},
		{"a folded first line", first(" X: a"), 400},
		{"a line folded by a tab", first("X: a\r\n\tb"), 400},
		{"space before a colon", first("X : a"), 400},
		{"no colon", first("X"), 400},
		{"no name", first(": a"), 400},
		{"a name with a space", first("X Y: a"), 400},
		{"a name that is no token", first("X(: a"), 400},
		{"a value beyond ASCII", first("X: \xc3\xa4\xff"), 101},

		{"a length of 0", add("Content-Length: 0"), 101},
		{"a length", add("Content-Length: 3") + "abc", 400},
		{"a length that is none", add("Content-Length: -1"), 400},
		{"chunks", add("Transfer-Encoding: chunked") + "0\r\n\r\n", 400},

		{"a head as large as it may be", add("X: " + strings.Repeat("x", room)), 101},
		{"one byte more", add("X: " + strings.Repeat("x", room+1)), 431},
		{"many lines", add(strings.Split(strings.Repeat("X: y\n", 3000), "\n")...), 431},
		{"a long target", target("/ws?token=" + strings.Repeat("x", 20_000)), 431},
		{"a long name", add(strings.Repeat("X", 20_000) + ": y"), 431},

		{"no token", target("/ws"), 401},
		{"an empty token", target("/ws?token="), 401},
		{"a forged token", target("/ws?token=" + good[:len(good)-4] + "AAAA"), 401},
		{"an expired token", target("/ws?token=" + token(t, "alice", -time.Hour)), 401},
		{"another scheme", line(func(h *handshake) { h.target = "/ws"; h.lines = append(h.lines[:5:5], "Authorization: Basic "+good) }), 401},

		{"an origin allowed", add("Origin: https://good.example"), 101},
		{"an origin not allowed", add("Origin: https://bad.example"), 403},
		{"another scheme of it", add("Origin: http://good.example"), 403},
		{"another port of it", add("Origin: https://good.example:444"), 403},
		{"a host that ends so", add("Origin: https://notgood.example"), 403},
		{"a host that begins so", add("Origin: https://good.example.evil"), 403},
		{"null", add("Origin: null"), 403},
		{"two origins", add("Origin: https://bad.example", "Origin: https://good.example"), 400},

		{"an extension unknown", add("Sec-WebSocket-Extensions: x-unknown; a=b"), 101},
		{"only protocols of ours that are not spoken", add("Sec-WebSocket-Protocol: im.cbor.v9"), 400},
		{"an early frame", base.String() + wire(fin|opPing, ""), 101},
		{"a TLS client", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400},
		{"an HTTP/2 client", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 200}, // the API's
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			for _, ch := range []chop{wholeChop, octetsChop} {
				c := dial(t, s)
				for _, part := range ch.cut(tc.request) {
					if _, err := io.WriteString(c.Conn, part); err != nil {
						break // refused before its end
					}
				}
				resp, err := http.ReadResponse(c.r, nil)
				if err != nil {
					t.Errorf("%s: %v", ch.name, err)
					continue
				}
				if resp.StatusCode != tc.status {
					t.Errorf("%s: %s, want %d", ch.name, resp.Status, tc.status)
				}
				h := resp.Header
				switch resp.StatusCode {
				case 101:
					if h.Get("Sec-WebSocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" ||
						!strings.EqualFold(h.Get("Upgrade"), "websocket") || !strings.EqualFold(h.Get("Connection"), "upgrade") ||
						h.Get("Sec-WebSocket-Extensions") != "" {
						t.Errorf("%s: %v", ch.name, h)
					}
				case 405:
					if h.Get("Allow") != "GET" {
						t.Errorf("%s: %v", ch.name, h)
					}
				case 426:
					if h.Get("Sec-WebSocket-Version") != "13" {
						t.Errorf("%s: %v", ch.name, h)
					}
				}
				if resp.StatusCode >= 400 && resp.StatusCode != 405 && resp.StatusCode != 426 {
					if _, err := io.ReadAll(c.r); err != nil {
						t.Errorf("%s: it does not end: %v", ch.name, err)
					}
				}
				_ = c.Close()
			}
		})
	}
}

// TestConformanceHandshakeSplit cuts an upgrade with a frame behind it in two, at every byte.
func TestConformanceHandshakeSplit(t *testing.T) {
	s := startEcho(t, nil)
	all := "GET / HTTP/1.1\r\n" + upgradeLines + "\r\n" + wire(fin|opText, hello)
	for cut := range len(all) {
		c := dial(t, s)
		c.send(all[:cut])
		c.send(all[cut:])
		if resp, _ := c.answer(); resp.StatusCode != 101 {
			t.Fatalf("cut at %d: %s", cut, resp.Status)
		}
		if f, err := readServed(c.r); err != nil || f != (served{fin | opText, hello}) {
			t.Fatalf("cut at %d: %v, %v", cut, f, err)
		}
		_ = c.Close()
	}
}
