package transport

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"im-gateway/codec"
)

// selfSigned is a certificate for localhost, made once.
var selfSigned = sync.OnceValue(func() *tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
})

func withTLS(o *Options) {
	o.Certificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return selfSigned(), nil }
}

// clientTLS trusts the certificate.
func clientTLS() *tls.Config {
	leaf, err := x509.ParseCertificate(selfSigned().Certificate[0])
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	return &tls.Config{RootCAs: roots, ServerName: "localhost", NextProtos: []string{"h2", "http/1.1"}}
}

// dialTLS connects; chop: every write comes byte by byte.
func dialTLS(t testing.TB, s *Server, c *tls.Config, chop bool) (*client, *tls.Conn) {
	t.Helper()
	raw := dial(t, s).Conn
	if chop {
		raw = byByte{raw}
	}
	secure := tls.Client(raw, c)
	if err := secure.Handshake(); err != nil {
		t.Fatal(err)
	}
	return &client{t, secure, bufio.NewReader(secure)}, secure
}

type byByte struct{ net.Conn }

func (c byByte) Write(p []byte) (int, error) {
	for i := range p {
		if _, err := c.Conn.Write(p[i : i+1]); err != nil {
			return i, err
		}
	}
	return len(p), nil
}

func (c *client) upgrade(t testing.TB, user string) {
	t.Helper()
	c.send("GET /ws HTTP/1.1\r\n", upgradeLines, "Authorization: Bearer ", token(t, user, time.Hour), "\r\n\r\n")
	if resp, body := c.answer(); resp.StatusCode != 101 {
		t.Fatalf("upgrade: %s %s", resp.Status, body)
	}
}

// TestTLS: WebSocket over TLS, in each version, whole and byte by byte, messages of many records.
func TestTLS(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, chop := range []bool{false, true} {
			s, sink := start(t, withTLS)
			config := clientTLS()
			config.MaxVersion = version
			c, secure := dialTLS(t, s, config, chop)
			if p := secure.ConnectionState().NegotiatedProtocol; p != "http/1.1" {
				t.Errorf("negotiated %q", p)
			}
			c.upgrade(t, "u")
			open := sink.next(t, codec.EventOpen)
			big := strings.Repeat("x", 40_000)
			c.send(text(`{"type":"send-message","message_id":"m1","data":"`+big+`"}`), text(`{"type":"ping"}`))
			if e := sink.next(t, codec.EventMessage); len(e.Upstream.Value) < len(big) {
				t.Errorf("%d bytes came", len(e.Upstream.Value))
			}
			if f := c.read(); !strings.Contains(string(f.Payload), "pong") {
				t.Errorf("%s", f.Payload)
			}
			// Down: what the shards command is delivered, and counted as such.
			payload := []byte(`{"type":"new-message","data":"` + big + `"}`)
			s.Submit(&codec.EgressBatch{Loop: open.Session.Loop(), Shard: open.Session.Shard(), Commands: []codec.Command{
				{Kind: codec.CommandFrame, Session: open.Session, Payload: payload},
			}})
			if f := c.read(); string(f.Payload) != string(payload) {
				t.Errorf("%d bytes went", len(f.Payload))
			}
			if b := sink.returned(t); b.Commands[0].Outcome == codec.OutcomeGone {
				t.Errorf("outcome %d", b.Commands[0].Outcome)
			}
			c.send(frame(true, ws.OpClose, "\x03\xe8"))
			if code := c.closed(); code != ws.StatusNormalClosure {
				t.Errorf("closed with %d", code)
			}
			if _, err := c.r.ReadByte(); err != io.EOF {
				t.Errorf("after the close: %v, not the end of TLS", err)
			}
			sink.next(t, codec.EventClose)
			_ = c.Close()
			eventually(t, func() bool { return s.Connections() == 0 })
		}
	}
}

// TestTLSThenHTTPThenUpgrade: the other ways of a connection go over TLS as well.
func TestTLSThenHTTPThenUpgrade(t *testing.T) {
	s, _ := start(t, withTLS)
	c, _ := dialTLS(t, s, clientTLS(), false)
	for range 2 {
		c.send("POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 70000\r\n\r\n", strings.Repeat("y", 70_000))
		resp, err := http.ReadResponse(c.r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			t.Fatal(err)
		}
	}
	ping := text(`{"type":"ping"}`)
	c.send("GET /ws HTTP/1.1\r\n", upgradeLines, "Authorization: Bearer ", token(t, "u", time.Hour), "\r\n\r\n", ping[:9])
	if resp, body := c.answer(); resp.StatusCode != 101 {
		t.Fatalf("%s %s", resp.Status, body)
	}
	c.send(ping[9:])
	if f := c.read(); !strings.Contains(string(f.Payload), "pong") {
		t.Errorf("%s", f.Payload)
	}
}

// TestTLSRefuses: old versions, plain text and noise; each of them at once.
func TestTLSRefuses(t *testing.T) {
	s, _ := start(t, withTLS)
	old := clientTLS()
	old.MinVersion, old.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	if err := tls.Client(dial(t, s).Conn, old).Handshake(); err == nil || !strings.Contains(err.Error(), "version") {
		t.Errorf("TLS 1.1: %v", err)
	}
	c := dial(t, s)
	c.send("GET /ws HTTP/1.1\r\n\r\n")
	if resp, body := c.answer(); resp.StatusCode != 400 || !strings.Contains(body, "TLS") {
		t.Errorf("plain text: %s %s", resp.Status, body)
	}
	for _, noise := range []string{"\x16\x03\x01\x00\x05hello", "\x16\x03\x01\x00\x00", "\x16\xff\xff\xff\xff" + strings.Repeat("z", 1<<16)} {
		c := dial(t, s)
		c.send(noise)
		if _, err := io.Copy(io.Discard, c); err != nil && strings.Contains(err.Error(), "timeout") {
			t.Errorf("%q: %v", noise[:5], err)
		}
	}
	// After the handshake: what is no record ends the connection, and only it.
	_, secure := dialTLS(t, s, clientTLS(), false)
	if _, err := secure.NetConn().Write([]byte("this is no record")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, secure); err != nil && strings.Contains(err.Error(), "timeout") {
		t.Error(err)
	}
	eventually(t, func() bool { return s.Connections() == 0 && s.shaking.Load() == 0 })
}

// TestTLSHandshakesAreBounded in number and in time.
func TestTLSHandshakesAreBounded(t *testing.T) {
	s, _ := start(t, func(o *Options) {
		withTLS(o)
		o.Loops, o.Settings.MaxTLSHandshakes, o.HandshakeTimeout = 1, 3, time.Second
	})
	hello := &capture{}
	_ = tls.Client(hello, clientTLS()).Handshake()
	begin := func() *client {
		c := dial(t, s)
		c.send(string(hello.b))
		return c
	}
	var held []*client
	for range 3 {
		held = append(held, begin())
	}
	eventually(t, func() bool { return s.shaking.Load() == 3 })
	held = append(held, begin()) // the oldest of them goes
	if _, err := io.Copy(io.Discard, held[0]); err != nil && strings.Contains(err.Error(), "timeout") {
		t.Errorf("the first: %v", err)
	}
	if n := testutil.ToFloat64(s.metrics.handshake.displaced); n != 1 {
		t.Errorf("%v displaced", n)
	}
	eventually(t, func() bool { return s.shaking.Load() == 3 })
	for _, c := range held { // their time ends
		_, _ = io.Copy(io.Discard, c)
	}
	eventually(t, func() bool { return s.shaking.Load() == 0 && s.Connections() == 0 })
	c, _ := dialTLS(t, s, clientTLS(), false)
	c.upgrade(t, "u")
}

// capture keeps what is written and has nothing to read.
type capture struct {
	net.Conn
	b []byte
}

func (c *capture) Write(p []byte) (int, error)      { c.b = append(c.b, p...); return len(p), nil }
func (c *capture) Read([]byte) (int, error)         { return 0, io.EOF }
func (c *capture) SetWriteDeadline(time.Time) error { return nil }
func (c *capture) Close() error                     { return nil }

// TestTLSResumes: a client that comes again is spared the key exchange.
func TestTLSResumes(t *testing.T) {
	s, _ := start(t, withTLS)
	config := clientTLS()
	config.ClientSessionCache = tls.NewLRUClientSessionCache(1)
	for i := range 3 {
		c, secure := dialTLS(t, s, config, false)
		c.upgrade(t, "u") // a ticket comes with the first answer
		if resumed := secure.ConnectionState().DidResume; resumed != (i > 0) {
			t.Errorf("connection %d resumed: %t", i, resumed)
		}
		_ = c.Close()
	}
}

// TestTLSCostsNoGoroutines once it is established, and says what it costs in memory.
func TestTLSCostsNoGoroutines(t *testing.T) {
	s, _ := start(t, withTLS)
	const n = 500
	c, _ := dialTLS(t, s, clientTLS(), false)
	c.upgrade(t, "first")
	before := runtime.NumGoroutine()
	var clients []*client
	for range n {
		c, _ := dialTLS(t, s, clientTLS(), false)
		c.upgrade(t, "u")
		clients = append(clients, c)
	}
	eventually(t, func() bool { return s.shaking.Load() == 0 })
	if after := runtime.NumGoroutine(); after > before+10 {
		t.Errorf("%d goroutines for %d connections", after-before, n)
	}
	for _, c := range clients {
		c.send(text(`{"type":"ping"}`))
		c.read()
	}
}

// TestTLSClientsThatVanish in the middle of a handshake leave nothing behind.
func TestTLSClientsThatVanish(t *testing.T) {
	s, _ := start(t, withTLS)
	hello := &capture{}
	_ = tls.Client(hello, clientTLS()).Handshake()
	for i := range 100 {
		c := dial(t, s)
		c.send(string(hello.b[:min(len(hello.b), 1+i*len(hello.b)/50)]))
		if i%2 == 0 {
			if tcp, ok := c.Conn.(*net.TCPConn); ok {
				_ = tcp.SetLinger(0)
			}
		}
		_ = c.Close()
	}
	eventually(t, func() bool { return s.Connections() == 0 && s.shaking.Load() == 0 })
}

// TestTLSSlowHeads: a head that comes byte by byte does not hold a buffer of the loop's.
func TestTLSSlowHeads(t *testing.T) {
	s, sink := start(t, func(o *Options) { withTLS(o); o.Loops = 1 })
	head := "GET /ws HTTP/1.1\r\n" + upgradeLines + "Authorization: Bearer " + token(t, "u", time.Hour) + "\r\n\r\n" + text(`{"type":"ping"}`)
	var clients []*client
	for range 20 {
		c, _ := dialTLS(t, s, clientTLS(), false)
		clients = append(clients, c)
	}
	for i := 0; i < len(head); i += 7 {
		for _, c := range clients {
			c.send(head[i:min(len(head), i+7)])
		}
		if i > len(head)/2 && i < len(head)/2+7 {
			held := make(chan int)
			l := s.loops[0]
			l.execute(func() {
				n := 0
				for _, d := range l.heads {
					if d.cn.tls != nil {
						n += cap(d.cn.tls.in)
					}
				}
				held <- n
			})
			if n := <-held; n > 20*1024 {
				t.Errorf("%d bytes held for %d heads", n, len(clients))
			}
		}
	}
	for _, c := range clients {
		if resp, body := c.answer(); resp.StatusCode != 101 {
			t.Fatalf("%s %s", resp.Status, body)
		}
		if f := c.read(); !strings.Contains(string(f.Payload), "pong") {
			t.Errorf("%s", f.Payload)
		}
		sink.next(t, codec.EventOpen)
	}
}

// TestMemoryPerTLSSession holds what an idle TLS session costs on the heap, and says it. The clients'
// side is dropped, but for the descriptors.
func TestMemoryPerTLSSession(t *testing.T) {
	const n, budget = 1000, 8 << 10
	s, sink := start(t, withTLS)
	warm, _ := dialTLS(t, s, clientTLS(), false)
	warm.upgrade(t, "warm")
	sink.next(t, codec.EventOpen)
	var files []*os.File
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	before := heap()
	for range n {
		raw, err := net.Dial("tcp", s.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		secure := tls.Client(raw, clientTLS())
		c := &client{t, secure, bufio.NewReader(secure)}
		c.upgrade(t, "u")
		c.send(text(`{"type":"ping"}`))
		c.read()
		f, err := raw.(*net.TCPConn).File()
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
		_ = raw.Close() // its duplicate lives
		sink.next(t, codec.EventOpen)
	}
	eventually(t, func() bool { return s.shaking.Load() == 0 })
	if s.Connections() != n+1 {
		t.Errorf("%d connections", s.Connections())
	}
	per := float64(heap()-before) / n
	t.Logf("%.0f bytes of heap per idle TLS session", per)
	if per > budget {
		t.Errorf("%.0f bytes of heap per idle TLS session, want %d at most", per, budget)
	}
}
