package transport

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/lestrrat-go/jwx/v2/jwt"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"im-gateway/codec"
)

const streamLines = "Host: h\r\nAccept: text/event-stream\r\n"

// stream opens an event stream of the user.
func stream(t testing.TB, s *Server, user string) *client {
	t.Helper()
	c := dial(t, s)
	c.send("GET /sse HTTP/1.1\r\n", streamLines, "Authorization: Bearer ", token(t, user, time.Hour), "\r\n\r\n")
	c.opened()
	return c
}

// opened reads the head of a stream's answer; the body is left to event.
func (c *client) opened() *http.Response {
	c.t.Helper()
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/event-stream" || resp.Header.Get("Cache-Control") != "no-store" ||
		resp.Header.Get("X-Accel-Buffering") != "no" || !resp.Close || resp.ContentLength != -1 || len(resp.TransferEncoding) > 0 {
		c.t.Fatalf("%s %v", resp.Status, resp.Header)
	}
	return resp
}

// event reads the lines up to the next empty one.
func (c *client) event() (block string) {
	c.t.Helper()
	for {
		line, err := c.r.ReadString('\n')
		if err != nil {
			c.t.Fatalf("read an event: %v behind %q", err, block)
		}
		if line == "\n" {
			return block
		}
		block += line
	}
}

// ended reads a stream to its close event, which must be the last thing on it, and returns that.
func (c *client) ended() (last string) {
	c.t.Helper()
	for !strings.HasPrefix(last, "event: close\n") {
		last = c.event()
	}
	if rest, err := io.ReadAll(c.r); err != nil || len(rest) > 0 {
		c.t.Errorf("behind the close: %q, %v", rest, err)
	}
	return last
}

func closeEvent(code codec.CloseCode, reason string) string {
	return strings.TrimSuffix(string(codec.AppendSSEClose(nil, code, reason)), "\n")
}

// TestStreamAnswers: requests for a stream and what they are answered with, whole and byte by byte.
func TestStreamAnswers(t *testing.T) {
	s, sink := start(t, func(o *Options) { o.Settings.AllowedOrigins = []string{"https://good.example"} })
	strict, _ := start(t, func(o *Options) { o.Settings.RefuseQueryToken = true })
	good := token(t, "alice", time.Hour)
	auth := "Authorization: Bearer " + good + "\r\n\r\n"
	const refused = `"code":"AUTH_FAILED"`
	for _, tc := range []struct {
		name, request string
		s             *Server
		status        int
		header, want  string // a header of the answer and its value
		body          string // is in the answer's body
	}{
		{"header", "GET /sse HTTP/1.1\r\n" + streamLines + auth, s, 200, "Access-Control-Allow-Origin", "", ""},
		{"query", "GET /sse?token=" + good + " HTTP/1.1\r\n" + streamLines + "\r\n", s, 200, "", "", ""},
		{"header before query", "GET /sse?token=x HTTP/1.1\r\n" + streamLines + auth, s, 200, "", "", ""},
		{"last event id", "GET /sse HTTP/1.1\r\nLast-Event-ID: im-downstream-topic-g-0-7 \xc3\xa9\r\n" + streamLines + auth, s, 200, "", "", ""},
		{"HTTP/1.0", "GET /sse HTTP/1.0\r\n" + auth, s, 200, "", "", ""},
		{"an upgrade that is not heeded", "GET /sse HTTP/1.1\r\n" + upgradeLines + auth, s, 200, "Upgrade", "", ""},
		{"no body", "GET /sse HTTP/1.1\r\nContent-Length: 0\r\n" + streamLines + auth, s, 200, "", "", ""},
		{"another origin", "GET /sse HTTP/1.1\r\nOrigin: https://good.example\r\n" + streamLines + auth, s, 200,
			"Access-Control-Allow-Origin", "https://good.example", ""},
		{"its own origin", "GET /sse HTTP/1.1\r\nOrigin: https://h\r\n" + streamLines + auth, s, 200, "Vary", "Origin", ""},
		{"every origin", "GET /sse HTTP/1.1\r\nOrigin: https://any.example\r\n" + streamLines + auth, strict, 200,
			"Access-Control-Allow-Origin", "*", ""},
		{"absolute form", "GET http://h/sse?x=y HTTP/1.1\r\n" + streamLines + auth, s, 200, "", "", ""},
		{"escaped path", "GET /%73se HTTP/1.1\r\n" + streamLines + auth, s, 200, "", "", ""},

		{"origin refused", "GET /sse HTTP/1.1\r\nOrigin: https://bad.example\r\n" + streamLines + auth, s, 403, "", "", refused},
		{"no token", "GET /sse HTTP/1.1\r\n" + streamLines + "\r\n", s, 401, "WWW-Authenticate", "Bearer", refused},
		{"expired", "GET /sse?token=" + token(t, "alice", -time.Hour) + " HTTP/1.1\r\n" + streamLines + "\r\n", s, 401, "", "", "TOKEN_EXPIRED"},
		{"forged", "GET /sse?token=" + good[:len(good)-3] + "AAA HTTP/1.1\r\n" + streamLines + "\r\n", s, 401, "", "", refused},
		{"query refused", "GET /sse?token=" + good + " HTTP/1.1\r\n" + streamLines + "\r\n", strict, 401, "", "", "query"},
		{"no host", "GET /sse HTTP/1.1\r\n" + auth, s, 400, "", "", "INVALID_MESSAGE"},
		{"two hosts", "GET /sse HTTP/1.1\r\nHost: a\r\n" + streamLines + auth, s, 400, "", "", ""},
		{"HTTP/2.0", "GET /sse HTTP/2.0\r\n" + streamLines + auth, s, 505, "", "", ""},
		{"no version", "GET /sse\r\n" + streamLines + auth, s, 400, "", "", ""},
		{"odd version", "GET /sse HTTP/1.10\r\n" + streamLines + auth, s, 400, "", "", ""},
		{"more in the line", "GET /sse x HTTP/1.1\r\n" + streamLines + auth, s, 400, "", "", ""},
		{"a body", "GET /sse HTTP/1.1\r\nContent-Length: 3\r\n" + streamLines + auth, s, 400, "", "", ""},
		{"a chunked body", "GET /sse HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + streamLines + auth, s, 400, "", "", ""},
		{"bare line feed", "GET /sse HTTP/1.1\r\nX: a\nY: b\r\n" + streamLines + auth, s, 400, "", "", ""},
		{"a bad device", "GET /sse?device=UPPER HTTP/1.1\r\n" + streamLines + auth, s, 400, "", "", ""},
		{"huge head", "GET /sse HTTP/1.1\r\nX: " + strings.Repeat("x", 9000), s, 431, "", "", ""},
		{"other path", "GET /ssex HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", s, 200, "", "", "GET /ssex "},

		{"HEAD", "HEAD /sse HTTP/1.1\r\nConnection: close\r\n" + streamLines + auth, s, 200, "Content-Type", "text/event-stream", ""},
		{"HEAD by query", "HEAD /sse?token=" + good + " HTTP/1.0\r\n\r\n", s, 200, "Cache-Control", "no-store", ""},
		{"HEAD without a token", "HEAD /sse HTTP/1.1\r\nConnection: close\r\n" + streamLines + "\r\n", s, 401, "", "", ""},
		{"HEAD, query refused", "HEAD /sse?token=" + good + " HTTP/1.0\r\n\r\n", strict, 401, "", "", ""},
		{"HEAD, origin refused", "HEAD /sse HTTP/1.1\r\nConnection: close\r\nOrigin: https://bad.example\r\n" + streamLines + auth, s, 403, "", "", ""},
		{"preflight", "OPTIONS /sse HTTP/1.1\r\nConnection: close\r\nOrigin: https://good.example\r\nAccess-Control-Request-Method: GET\r\n" + streamLines + "\r\n",
			s, 204, "Access-Control-Allow-Headers", "Authorization, Cache-Control, Last-Event-ID", ""},
		{"preflight, origin refused", "OPTIONS /sse HTTP/1.1\r\nConnection: close\r\nOrigin: https://bad.example\r\n" + streamLines + "\r\n",
			s, 204, "Access-Control-Allow-Origin", "", ""},
		{"POST", "POST /sse HTTP/1.1\r\nConnection: close\r\nContent-Length: 2\r\n" + streamLines + "\r\n{}", s, 405, "Allow", "GET, HEAD, OPTIONS", "POST /api/messages"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, whole := range []bool{true, false} {
				c := dial(t, tc.s)
				if whole {
					c.send(tc.request)
				} else {
					c.Conn = byByte{c.Conn}
					c.send(tc.request)
				}
				var resp *http.Response
				var body string
				if opens := tc.status == 200 && tc.body == "" && !strings.HasPrefix(tc.request, "HEAD"); opens {
					resp = c.opened()
				} else {
					method, _, _ := strings.Cut(tc.request, " ")
					resp, body = c.answerTo(method)
				}
				if resp.StatusCode != tc.status || !strings.Contains(body, tc.body) {
					t.Errorf("answer %s %q, want %d with %q", resp.Status, body, tc.status, tc.body)
				}
				if tc.header != "" && resp.Header.Get(tc.header) != tc.want {
					t.Errorf("%s: %q, want %q", tc.header, resp.Header.Get(tc.header), tc.want)
				}
				_ = c.Close()
			}
		})
	}
	if e := sink.next(t, codec.EventOpen); e.Open.User != "alice" || e.Open.Protocol != codec.SSE {
		t.Errorf("opened %+v", e.Open)
	}
	eventually(t, func() bool {
		return testutil.ToFloat64(s.metrics.sessions[codec.SSE]) == 0
	})
}

// answerTo reads the answer to a request of the method to its end, and that the connection ends there.
func (c *client) answerTo(method string) (*http.Response, string) {
	c.t.Helper()
	resp, err := http.ReadResponse(c.r, &http.Request{Method: method})
	if err != nil {
		c.t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	_ = resp.Body.Close()
	if rest, err := io.ReadAll(c.r); err != nil || len(rest) > 0 {
		c.t.Errorf("behind the answer: %q, %v", rest, err)
	}
	return resp, string(body)
}

// TestStreamHeadSplit cuts a request with input behind it in two, at every byte.
func TestStreamHeadSplit(t *testing.T) {
	all := "GET /sse?token=" + fuzzToken + "&ack=1&device_id=d%201&device=web HTTP/1.1\r\n" + streamLines + "\r\nGET / HTTP/1.1\r\n"
	for _, before := range []string{"", "GET /a HTTP/1.1\r\nHost: h\r\n\r\n"} { // net/http had the connection first
		s, sink := start(t, nil)
		step := 1
		if before != "" {
			step = 7
		}
		for cut := 1; cut < len(all); cut += step {
			c := dial(t, s)
			if before != "" {
				c.send(before)
				c.answer()
			}
			c.send(all[:cut])
			c.send(all[cut:])
			c.opened()
			e := sink.next(t, codec.EventOpen)
			if o := e.Open; o.User != "alice" || !o.Acks || o.DeviceID != "d 1" || o.Device != "web" || o.Protocol != codec.SSE {
				t.Fatalf("cut at %d: %+v", cut, o)
			}
			_ = c.Close()
			sink.next(t, codec.EventClose)
		}
	}
}

// TestStream: what the shards command goes out as it is, heartbeats as comments, and a close as an event.
func TestStream(t *testing.T) {
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprintf("TLS=%t", secure), func(t *testing.T) {
			s, sink := start(t, func(o *Options) {
				o.Loops = 1
				withDeflate(o)
				if secure {
					withTLS(o)
				}
			})
			var c *client
			if secure {
				c, _ = dialTLS(t, s, clientTLS(), false)
			} else {
				c = dial(t, s)
			}
			c.send("GET /sse HTTP/1.1\r\n", streamLines, "Sec-WebSocket-Extensions: permessage-deflate\r\nAuthorization: Bearer ",
				token(t, "alice", time.Hour), "\r\n\r\n")
			c.opened()
			id := sink.next(t, codec.EventOpen).Session
			long := "data: " + strings.Repeat("x", 5000)
			submit(s, id, command(codec.CommandFrame, id, "id: 1\ndata: one\n\n"), command(codec.CommandPing, id, ""),
				command(codec.CommandFrame, id, long+"\n\n"))
			b := sink.returned(t)
			for _, i := range []int{0, 2} {
				if b.Commands[i].Outcome != codec.OutcomeFlushed {
					t.Errorf("command %d: outcome %d", i, b.Commands[i].Outcome)
				}
			}
			for _, want := range []string{"id: 1\ndata: one\n", ": ping\n", long + "\n"} {
				if got := c.event(); got != want {
					t.Errorf("got %.60q, want %.60q", got, want)
				}
			}
			if n := testutil.ToFloat64(s.metrics.sessions[codec.SSE]); n != 1 {
				t.Errorf("%v streams", n)
			}
			closing := codec.Command{Kind: codec.CommandClose, Session: id, Code: codec.CloseReplaced, Reason: "replaced \"by\" a newer session\n"}
			submit(s, id, command(codec.CommandFrame, id, "data: last\n\n"), closing, command(codec.CommandFrame, id, "data: too late\n\n"))
			b = sink.returned(t)
			if b.Commands[0].Outcome != codec.OutcomeFlushed || b.Commands[2].Outcome != codec.OutcomeGone {
				t.Errorf("outcomes %d, %d", b.Commands[0].Outcome, b.Commands[2].Outcome)
			}
			if got := c.event(); got != "data: last\n" {
				t.Errorf("got %q", got)
			}
			if got, want := c.ended(), closeEvent(codec.CloseReplaced, closing.Reason); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
			if e := sink.next(t, codec.EventClose); e.Session != id || e.Code != codec.CloseReplaced {
				t.Errorf("closed %+v", e)
			}
			_ = c.Close()
			eventually(t, func() bool { return testutil.ToFloat64(s.metrics.sessions[codec.SSE]) == 0 && s.Connections() == 0 })
		})
	}
}

// TestStreamAuthClose: a client that cannot read a 401 is told by an event.
func TestStreamAuthClose(t *testing.T) {
	s, sink := start(t, nil)
	c := dial(t, s)
	c.send("GET /sse?auth=close&token=bad HTTP/1.1\r\n", streamLines, "\r\n")
	c.opened()
	if got, want := c.ended(), closeEvent(codec.CloseTokenRefused, reasonAuth); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if len(sink.events) > 0 {
		t.Error("a shard was told of a session that never was")
	}
}

// TestStreamMayBeSilent: of a stream nothing is heard, which is no reason to close it, as it is of a
// WebSocket.
func TestStreamMayBeSilent(t *testing.T) {
	l := bareLoop(t, &dropSink{}, nil)
	for _, protocol := range []codec.Protocol{codec.JSON, codec.SSE} {
		p := &pipe{keep: true}
		cn := &conn{c: p, l: l, state: stateOpen, head: -1, aside: noAside, lastRead: l.now, protocol: protocol}
		l.startSession(cn, Identity{User: "u", ExpiresAt: l.now + 1e9}, wish{})
		id := cn.id
		for range 10 {
			l.now += l.s.opts.Heartbeat.Milliseconds()
			l.run(&codec.EgressBatch{Commands: []codec.Command{{Kind: codec.CommandPing, Session: id}}})
			l.tickSuspects()
		}
		if closed := cn.state != stateOpen; closed != (protocol == codec.JSON) {
			t.Errorf("protocol %d: closed %t", protocol, closed)
		}
		if want := strings.Repeat(codec.SSEHeartbeat, 10); protocol == codec.SSE && string(p.out) != want {
			t.Errorf("wrote %q", p.out)
		}
	}
}

// TestStreamIsNotListenedTo: what the client sends is dropped, up to a rate.
func TestStreamIsNotListenedTo(t *testing.T) {
	s, sink := start(t, func(o *Options) { o.Loops, o.Settings.BytesPerSecond = 1, 1<<20 })
	c := stream(t, s, "talker")
	id := sink.next(t, codec.EventOpen).Session
	const most = 1 << 20
	for range 16 {
		c.send(strings.Repeat("x", most/16))
	}
	held, received := make(chan int), func() int { return int(testutil.ToFloat64(s.metrics.bytesIn)) }
	eventually(t, func() bool { return received() == most })
	l := s.loops[0]
	l.execute(func() {
		cn := l.lookup(id)
		n := cn.c.InboundBuffered()
		if cn.asm != nil || cn.aside != noAside {
			n++
		}
		held <- n
	})
	if n := <-held; n != 0 {
		t.Errorf("%d bytes are held", n)
	}
	go func() { // until it is closed
		for {
			if _, err := io.WriteString(c.Conn, strings.Repeat("x", 64<<10)); err != nil {
				return
			}
		}
	}()
	if got, want := c.event(), closeEvent(codec.ClosePolicy, reasonFlood); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if e := sink.next(t, codec.EventClose); e.Code != codec.ClosePolicy {
		t.Errorf("closed %+v", e)
	}
}

// TestStreamBehindRequests: a stream on a connection that net/http had before, with input behind its head.
func TestStreamBehindRequests(t *testing.T) {
	s, sink := start(t, func(o *Options) { o.Loops = 1 })
	c := dial(t, s)
	c.send("GET /a HTTP/1.1\r\nHost: h\r\n\r\nPOST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}")
	for _, want := range []string{"GET /a ", "POST /b {}"} {
		if _, body := c.answer(); body != want {
			t.Errorf("body %q, want %q", body, want)
		}
	}
	c.send("GET /sse?token=", token(t, "dave", time.Hour), " HTTP/1.1\r\nOrigin: https://a.example\r\n", streamLines, "\r\n", "GET /c HTTP/1.1\r\n")
	if resp := c.opened(); resp.Header.Get("Access-Control-Allow-Origin") != "*" {
		t.Errorf("%v", resp.Header)
	}
	e := sink.next(t, codec.EventOpen)
	if e.Open.User != "dave" || e.Open.Protocol != codec.SSE {
		t.Errorf("opened %+v", e.Open)
	}
	c.send("Host: h\r\n\r\n")
	submit(s, e.Session, command(codec.CommandFrame, e.Session, "data: one\n\n"))
	sink.returned(t)
	if got := c.event(); got != "data: one\n" {
		t.Errorf("got %q", got)
	}
	aside := make(chan bool)
	l := s.loops[0]
	l.execute(func() {
		cn := l.lookup(e.Session)
		aside <- cn.asm == nil && cn.bridge == nil && cn.c.InboundBuffered() == 0
	})
	if !<-aside {
		t.Error("something of the requests is left")
	}
	eventually(t, func() bool { return s.bridged.Load() == 0 })
}

// TestStreamSlowReader: what the kernel does not take is buffered and reported, and beyond the budget ends
// in 4000.
func TestStreamSlowReader(t *testing.T) {
	payload := "data: " + strings.Repeat("x", 60_000) + "\n\n"
	s, sink := start(t, func(o *Options) { o.Settings.EgressBudget = 32 << 20 })
	c := stream(t, s, "slow")
	id := sink.next(t, codec.EventOpen).Session
	var position uint64
	for range 400 {
		submit(s, id, command(codec.CommandFrame, id, payload))
		if b := sink.returned(t); b.Commands[0].Outcome == codec.OutcomeBuffered {
			position = b.Commands[0].Position
		}
	}
	if position == 0 {
		t.Fatal("24 MB were flushed to a client that does not read")
	}
	for range 400 {
		if got := c.event(); len(got) != len(payload)-1 {
			t.Fatalf("an event of %d bytes", len(got))
		}
	}
	for {
		if e := sink.next(t, codec.EventFlushed); uint64(e.Value) >= position {
			break
		}
	}
	s, sink = start(t, func(o *Options) { o.Settings.EgressBudget = 1 << 20 })
	stream(t, s, "slow")
	id = sink.next(t, codec.EventOpen).Session
	for range 400 {
		submit(s, id, command(codec.CommandFrame, id, payload))
		sink.returned(t)
	}
	if e := sink.next(t, codec.EventClose); e.Code != codec.CloseSlowConsumer {
		t.Errorf("closed with %d", e.Code)
	}
}

// TestStreamLimits: the limits on connections and handshakes are those of WebSockets.
func TestStreamLimits(t *testing.T) {
	ask := func(t *testing.T, s *Server, lines ...string) *http.Response {
		t.Helper()
		c := dial(t, s)
		c.send("GET /sse HTTP/1.1\r\n", strings.Join(lines, ""), streamLines, "Authorization: Bearer ", token(t, "a", time.Hour), "\r\n\r\n")
		resp, err := http.ReadResponse(c.r, nil)
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	for _, tc := range []struct {
		name   string
		change func(*Options)
		before func(*Server)
		lines  string
		opens  int // so many, then one is refused
		status int
		result func(*metrics) float64
	}{
		{"of an address", func(o *Options) { o.Settings.ConnectionsPerIP = 1 }, nil, "", 1, 429, func(m *metrics) float64 { return testutil.ToFloat64(m.handshake.crowded) }},
		{"of a forwarded address", func(o *Options) { o.Settings.ConnectionsPerIP, o.Settings.TrustedProxies = 1, loopback }, nil, "X-Forwarded-For: 192.0.2.1\r\n", 1, 429,
			func(m *metrics) float64 { return testutil.ToFloat64(m.handshake.crowded) }},
		{"in a second", func(o *Options) { o.Settings.HandshakesPerSecond = 1 }, func(s *Server) { s.upgrades.paid.Store(1 << 62) }, "", 0, 503, func(m *metrics) float64 { return testutil.ToFloat64(m.handshake.rate) }},
		{"of the node", func(o *Options) { o.Settings.MaxConnections = 1 }, nil, "", 1, 503, func(m *metrics) float64 { return testutil.ToFloat64(m.handshake.shed) }},
		{"draining", nil, (*Server).StopAccepting, "", 0, 503, func(m *metrics) float64 { return testutil.ToFloat64(m.handshake.shed) }},
		{"memory", nil, func(s *Server) { s.SetPressure(true) }, "", 0, 503, func(m *metrics) float64 { return testutil.ToFloat64(m.pressed.connections) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, _ := start(t, tc.change)
			if tc.before != nil {
				tc.before(s)
			}
			for range tc.opens {
				if resp := ask(t, s, tc.lines); resp.StatusCode != 200 {
					t.Fatal(resp.Status)
				}
			}
			resp := ask(t, s, tc.lines)
			if resp.StatusCode != tc.status || resp.Header.Get("Retry-After") == "" || resp.Header.Get("Content-Type") != "application/json" {
				t.Errorf("%s %v", resp.Status, resp.Header)
			}
			if n := tc.result(s.metrics); n != 1 {
				t.Errorf("%v counted", n)
			}
			if n := testutil.ToFloat64(s.metrics.handshake.ok); n != float64(tc.opens) {
				t.Errorf("%v counted as ok", n)
			}
		})
	}
}

// TestStreamSlowVerifier: a token that is checked off the loop, and one that is denied later.
func TestStreamSlowVerifier(t *testing.T) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	denials := NewDenials()
	v, err := NewVerifier(VerifierOptions{Algorithm: "EdDSA", PublicKeyPEM: pemOf(t, public), Denials: denials})
	if err != nil {
		t.Fatal(err)
	}
	s, sink := start(t, func(o *Options) { o.Settings.Verifier, o.Settings.AllowedOrigins = v, []string{"https://a.example"} })
	sign := func(ttl time.Duration) string {
		tok, err := jwt.NewBuilder().Subject("carol").JwtID("t-1").Expiration(time.Now().Add(ttl)).Build()
		if err != nil {
			t.Fatal(err)
		}
		b, err := jwt.Sign(tok, jwt.WithKey(jwa.EdDSA, private))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	c := dial(t, s)
	c.send("GET /sse?token=", sign(time.Hour), " HTTP/1.1\r\nOrigin: https://a.example\r\n", streamLines, "\r\nmore")
	if resp := c.opened(); resp.Header.Get("Access-Control-Allow-Origin") != "https://a.example" {
		t.Errorf("%v", resp.Header)
	}
	id := sink.next(t, codec.EventOpen).Session
	p, err := s.Post(t.Context(), "carol", id.Name(7), nil, &codec.ClientMessage{Type: []byte("refresh-token"), Token: []byte(sign(2 * time.Hour))})
	if err != nil || p.Result.Code != codec.OK || p.ExpiresAt < time.Now().Add(90*time.Minute).UnixMilli() {
		t.Errorf("%+v, %v", p, err)
	}
	denials.Add(Denial{TokenID: "t-1", Until: time.Now().Add(time.Hour).Unix()})
	if got, want := c.ended(), closeEvent(codec.CloseKicked, reasonRevoked); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if e := sink.next(t, codec.EventClose); e.Session != id {
		t.Errorf("%+v", e)
	}
}

// TestPost: what comes by HTTP for a session is done as if it had come on its connection.
func TestPost(t *testing.T) {
	s, sink := start(t, func(o *Options) { o.Loops, o.Settings.MessagesPerSecond = 1, 100 })
	c := dial(t, s)
	c.send("GET /sse?device_id=d1 HTTP/1.1\r\n", streamLines, "Authorization: Bearer ", token(t, "alice", time.Hour), "\r\n\r\n")
	c.opened()
	id := sink.next(t, codec.EventOpen).Session
	name := id.Name(7)
	post := func(user, session, frame string) (Posted, error) {
		t.Helper()
		var m codec.ClientMessage
		if err := codec.ParseClient([]byte(frame), &m); err != nil {
			t.Fatal(err)
		}
		return s.Post(t.Context(), user, session, []byte(frame), &m)
	}
	for _, tc := range []struct {
		name, user, session, frame string
		code                       codec.Code
		want                       string // the next event
	}{
		{"ping", "alice", name, `{"type":"ping"}`, codec.OK, `data: {"type":"pong"`},
		{"another's session", "bob", name, `{"type":"ping"}`, codec.SessionNotFound, ""},
		{"no name", "alice", "x", `{"type":"ping"}`, codec.SessionNotFound, ""},
		{"of another process", "alice", id.Name(8), `{"type":"ping"}`, codec.SessionNotFound, ""},
		{"no such loop", "alice", codec.MakeSessionID(id.Shard(), 9, id.Index(), 1).Name(7), `{"type":"ping"}`, codec.SessionNotFound, ""},
		{"no such shard", "alice", codec.MakeSessionID(99, 0, id.Index(), 1).Name(7), `{"type":"ping"}`, codec.SessionNotFound, ""},
		{"no such slot", "alice", codec.MakeSessionID(id.Shard(), 0, 77, 1).Name(7), `{"type":"ping"}`, codec.SessionNotFound, ""},
		{"a session before", "alice", codec.MakeSessionID(id.Shard(), 0, id.Index(), id.Generation()+1).Name(7), `{"type":"ping"}`, codec.SessionNotFound, ""},
		{"a forged token", "alice", name, `{"type":"refresh-token","data":{"token":"x.y.z"}}`, codec.AuthFailed, ""},
		{"bob's token", "alice", name, `{"type":"refresh-token","data":{"token":"` + token(t, "bob", 2*time.Hour) + `"}}`, codec.AuthFailed, ""},
		{"an earlier token", "alice", name, `{"type":"refresh-token","data":{"token":"` + token(t, "alice", time.Minute) + `"}}`, codec.AuthFailed, ""},
	} {
		p, err := post(tc.user, tc.session, tc.frame)
		if err != nil || p.Result.Code != tc.code || (p.Message == "") != (tc.code != codec.AuthFailed) {
			t.Errorf("%s: %+v, %v", tc.name, p, err)
		}
		if tc.want != "" {
			if got := c.event(); !strings.HasPrefix(got, tc.want) {
				t.Errorf("%s: got %q", tc.name, got)
			}
		}
	}
	if p, err := post("alice", name, `{"type":"delivery-ack","data":{"delivery_id":7}}`); err != nil || p.Result.Code != codec.OK {
		t.Errorf("%+v, %v", p, err)
	}
	if e := sink.next(t, codec.EventAcked); e.Session != id || e.Value != 7 {
		t.Errorf("%+v", e)
	}
	p, err := post("alice", name, `{"type":"refresh-token","data":{"token":"`+token(t, "alice", 2*time.Hour)+`"}}`)
	if e := sink.next(t, codec.EventRefresh); err != nil || p.ExpiresAt != e.Value || e.Value == 0 {
		t.Errorf("%+v, %v, %+v", p, err, e)
	}

	// A message waits for its shard's answer.
	type posted struct {
		Posted
		err error
	}
	got := make(chan posted, 1)
	go func() {
		p, err := post("alice", name, `{"type":"m","message_id":"c-1","data":1}`)
		got <- posted{p, err}
	}()
	e := sink.next(t, codec.EventMessage)
	if u := e.Upstream; e.Session != id || u.Session != id || u.User != "alice" || u.Reply == nil ||
		!strings.Contains(string(u.Value), `"session_id":"`+name+`","device_id":"d1",`) {
		t.Errorf("%+v %s", e, e.Upstream.Value)
	}
	e.Upstream.Reply <- codec.UpstreamResult{Partition: 3, Offset: 9, MessageID: "m"}
	if p := <-got; p.err != nil || p.Result != (codec.UpstreamResult{Partition: 3, Offset: 9, MessageID: "m"}) {
		t.Errorf("%+v", p)
	}
	// Nobody waits for ever.
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() {
		var m codec.ClientMessage
		frame := []byte(`{"type":"m","data":1}`)
		if err := codec.ParseClient(frame, &m); err != nil {
			t.Error(err)
		}
		_, err := s.Post(ctx, "alice", name, frame, &m)
		got <- posted{err: err}
	}()
	sink.next(t, codec.EventMessage)
	why := errors.New("given up")
	cancel(why)
	if p := <-got; !errors.Is(p.err, why) {
		t.Errorf("%+v", p)
	}

	// A shard that is behind, and memory that is short.
	s.SetPressure(true)
	if p, err := post("alice", name, `{"type":"m","data":1}`); err != nil || p.Result.Code != codec.Overloaded || p.Result.RetryAfterMS != pressureRetryMS {
		t.Errorf("%+v, %v", p, err)
	}
	s.SetPressure(false)
	// Beyond the connection's rate it is refused, then the session is closed.
	refused := 0
	for range 1000 {
		p, err := post("alice", name, `{"type":"delivery-ack","data":{"delivery_id":7}}`)
		if err != nil {
			t.Fatal(err)
		}
		if p.Result.Code == codec.SessionNotFound {
			break
		}
		if p.Result.Code == codec.RateLimited {
			refused++
		}
	}
	if refused < 100 {
		t.Errorf("%d refused", refused)
	}
	if got, want := c.ended(), closeEvent(codec.ClosePolicy, reasonFlood); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	_ = c.Close()

	// A WebSocket's session is a session, too.
	w := connect(t, s, "alice")
	ws := sink.next(t, codec.EventOpen).Session
	if p, err := post("alice", ws.Name(7), `{"type":"ping"}`); err != nil || p.Result.Code != codec.OK {
		t.Errorf("%+v, %v", p, err)
	}
	if f := w.read(); !strings.Contains(string(f.Payload), `"pong"`) {
		t.Errorf("got %q", f.Payload)
	}
	shutdown, done := context.WithTimeout(t.Context(), patience)
	defer done()
	if err := s.Shutdown(shutdown); err != nil {
		t.Fatal(err)
	}
	if p, err := post("alice", ws.Name(7), `{"type":"ping"}`); err != nil || p.Result.Code != codec.SessionNotFound {
		t.Errorf("after the end: %+v, %v", p, err)
	}
}

// TestPostPanics: a panic costs the session at fault, and who has posted is told at once that nothing is known.
func TestPostPanics(t *testing.T) {
	s, sink := start(t, func(o *Options) { o.Loops = 1 })
	c := stream(t, s, "alice")
	id := sink.next(t, codec.EventOpen).Session
	l := s.loops[0]
	l.execute(func() { l.builder = nil })
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	p, err := s.Post(ctx, "alice", id.Name(7), nil, &codec.ClientMessage{Type: []byte("m"), Data: []byte("1")})
	if err != nil || p.Result.Code != codec.OutcomeUnknown {
		t.Errorf("%+v, %v", p, err)
	}
	if got, want := c.ended(), closeEvent(codec.CloseInternal, reasonInternal); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestPostToFullShard: a message that its shard has no room for is refused.
func TestPostToFullShard(t *testing.T) {
	s, sink := start(t, func(o *Options) { o.Loops = 1 })
	stream(t, s, "alice")
	id := sink.next(t, codec.EventOpen).Session
	sink.full.Store(true)
	frame := []byte(`{"type":"m","data":1}`)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for range stalledEvents + 1 {
		go func() {
			var m codec.ClientMessage
			if err := codec.ParseClient(frame, &m); err == nil {
				_, _ = s.Post(ctx, "alice", id.Name(7), frame, &m) // waits until the test is over
			}
		}()
	}
	eventually(t, func() bool {
		var m codec.ClientMessage
		if err := codec.ParseClient(frame, &m); err != nil {
			t.Fatal(err)
		}
		soon, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
		defer cancel()
		p, err := s.Post(soon, "alice", id.Name(7), frame, &m)
		return err == nil && p.Result.Code == codec.Overloaded && p.Result.RetryAfterMS == overloadRetryMS
	})
}

// TestStreamAllocations: an open stream costs a write what a WebSocket does, and opening one no more.
func TestStreamAllocations(t *testing.T) {
	l := bareLoop(t, &dropSink{}, nil)
	who := Identity{User: "alice", ExpiresAt: l.now + 1e6}
	head := []byte("GET /sse HTTP/1.1\r\n" + streamLines + "Origin: https://a.example\r\nAuthorization: Bearer abc\r\n\r\n")
	p := &pipe{keep: true}
	cn := &conn{c: p, l: l, head: -1, aside: noAside}
	open := func() {
		cn.state, p.in, p.out = stateHead, head, p.out[:0]
		var h upgradeHead
		h.read(head)
		cn.finishUpgrade(head, len(head), wish{events: true}, who, nil)
		if cn.state != stateOpen || cn.protocol != codec.SSE || len(p.in) > 0 {
			t.Fatal("the stream was not opened")
		}
	}
	opening := testing.AllocsPerRun(200, func() {
		open()
		l.endSession(cn, codec.CloseNormal, reasonPeer)
	})
	resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(string(p.out))), nil)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("%v: %s", err, p.out)
	}
	_ = resp.Body.Close()
	open()
	b := &codec.EgressBatch{}
	for range 10 {
		b.Commands = append(b.Commands, command(codec.CommandFrame, cn.id, "data: x\n\n"), command(codec.CommandPing, cn.id, ""))
	}
	p.keep = false
	writing := testing.AllocsPerRun(200, func() { l.run(b) })
	reading := testing.AllocsPerRun(200, func() { p.in = head; l.traffic(cn) })
	if raceEnabled {
		return
	}
	if opening > 6 || writing > 0 || reading > 0 {
		t.Errorf("%.0f allocations to open, %.1f to write, %.1f to drop input", opening, writing, reading)
	}
}
