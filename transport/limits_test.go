package transport

import (
	"bufio"
	"encoding/json"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/sys/unix"

	"im-gateway/codec"
)

// TestAcceptSurvivesNoDescriptors: with no descriptor left connections are closed, those that are open
// live on, and all is well once there are some again.
func TestAcceptSurvivesNoDescriptors(t *testing.T) {
	s, _ := start(t, nil)
	old := connect(t, s, "old")
	addr, ok := s.Addr().(*net.TCPAddr)
	if !ok {
		t.Fatal(s.Addr())
	}
	sa := &unix.SockaddrInet4{Port: addr.Port, Addr: [4]byte{127, 0, 0, 1}}
	if addr.IP.To4() != nil && !addr.IP.IsUnspecified() {
		copy(sa.Addr[:], addr.IP.To4())
	}
	fds := make([]int, 20)
	for i := range fds {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Close(fd) }()
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
			t.Fatal(err)
		}
		fds[i] = fd
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	free, err := unix.Dup(fds[0])
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.Close(free)
	restore := func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Fatal(err)
		}
	}
	defer restore()
	before := testutil.ToFloat64(acceptFailures)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(free), Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if err := unix.Connect(fd, sa); err != nil {
			t.Fatal(err)
		}
		if n, err := unix.Read(fd, make([]byte, 1)); n > 0 || err == unix.EAGAIN {
			t.Fatalf("a connection without a descriptor for it was not closed: read %d, %v", n, err)
		}
	}
	if n := testutil.ToFloat64(acceptFailures) - before; n == 0 {
		t.Error("no accept has failed")
	}
	old.send(text(`{"type":"ping"}`))
	if f := old.read(); !strings.Contains(string(f.Payload), "pong") {
		t.Errorf("the old connection got %s", f.Payload)
	}
	restore()
	eventually(t, func() bool {
		c := dial(t, s)
		c.send("GET /ws HTTP/1.1\r\n", upgradeLines, "Authorization: Bearer ", token(t, "new", time.Hour), "\r\n\r\n")
		b := make([]byte, 12)
		_, err := io.ReadFull(c, b)
		return err == nil && string(b) == "HTTP/1.1 101"
	})
}

// TestDisplacedHeads: of more connections without a head than may be, the oldest are sent away, and who
// has something to say gets through.
func TestDisplacedHeads(t *testing.T) {
	s, _ := start(t, func(o *Options) { o.Settings.HandshakesInFlight, o.Loops = 10, 1 })
	var slow []*client
	for range 30 {
		c := dial(t, s)
		c.send("GET /w")
		slow = append(slow, c)
	}
	connect(t, s, "quick")
	for _, c := range slow[:20] {
		if resp, _ := c.answer(); resp.StatusCode != 408 {
			t.Errorf("a displaced connection got %s", resp.Status)
		}
	}
	if n := testutil.ToFloat64(s.metrics.handshake.displaced); n < 20 || n > 21 {
		t.Errorf("%v displaced", n)
	}
}

// TestAddressLimits: one address, and one subnet, get so many connections; what ends makes room.
func TestAddressLimits(t *testing.T) {
	s, _ := start(t, func(o *Options) { o.Settings.ConnectionsPerIP, o.Settings.ConnectionsPerSubnet = 3, 5 })
	from := func(ip string) (*client, int) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
		nc, err := d.Dial("tcp4", net.JoinHostPort("127.0.0.1", portOf(t, s)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = nc.Close() })
		_ = nc.SetDeadline(time.Now().Add(time.Minute))
		c := &client{t, nc, bufio.NewReader(nc)}
		c.send("GET /ws HTTP/1.1\r\n", upgradeLines, "Authorization: Bearer ", token(t, "u", time.Hour), "\r\n\r\n")
		resp, body := c.answer()
		if resp.StatusCode == 429 && (!strings.Contains(body, "RATE_LIMITED") || resp.Header.Get("Retry-After") == "") {
			t.Errorf("%s %v", body, resp.Header)
		}
		return c, resp.StatusCode
	}
	var first *client
	for i, want := range []int{101, 101, 101, 429, 429} {
		c, got := from("127.0.5.1")
		if got != want {
			t.Fatalf("connection %d: %d, not %d", i, got, want)
		}
		if i == 0 {
			first = c
		}
	}
	for i, want := range []int{101, 101, 429} {
		if _, got := from("127.0.5.2"); got != want {
			t.Fatalf("second address, connection %d: %d, not %d", i, got, want)
		}
	}
	if _, got := from("127.0.6.1"); got != 101 {
		t.Fatalf("another subnet: %d", got)
	}
	_ = first.Close()
	eventually(t, func() bool { _, got := from("127.0.5.1"); return got == 101 })
	if n := testutil.ToFloat64(s.metrics.handshake.crowded); n < 3 {
		t.Errorf("%v refused by address", n)
	}
}

func portOf(t testing.TB, s *Server) string {
	_, port, err := net.SplitHostPort(s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func TestNetworks(t *testing.T) {
	of := func(s string) network { return networkOf(netip.MustParseAddr(s)) }
	for _, c := range []struct {
		a, b            string
		same, sameInNet bool
	}{
		{"10.0.0.1", "10.0.0.2", false, true},
		{"10.0.0.1", "10.0.1.1", false, false},
		{"10.0.0.1", "::ffff:10.0.0.1", true, true},
		{"2001:db8::1", "2001:db8::ffff:1", true, true},
		{"2001:db8:0:1::1", "2001:db8:0:2::1", false, true},
		{"2001:db8:1::1", "2001:db8:2::1", false, false},
		{"::1", "0.0.0.1", false, false},
	} {
		if got := of(c.a) == of(c.b); got != c.same {
			t.Errorf("%s and %s the same: %t", c.a, c.b, got)
		}
		if got := of(c.a).subnet() == of(c.b).subnet(); got != c.sameInNet {
			t.Errorf("%s and %s in one subnet: %t", c.a, c.b, got)
		}
	}
	limits := &rules{Settings: Settings{ConnectionsPerIP: 1, ConnectionsPerSubnet: 1, ExemptNetworks: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}}
	l := newAddressCounts()
	for range 3 {
		if n, ok := l.take(limits, netip.MustParseAddr("::ffff:127.0.0.1")); n != 0 || !ok {
			t.Error("an exempt address was counted")
		}
	}
	n, _ := l.take(limits, netip.MustParseAddr("10.0.0.1"))
	l.give(n)
	if len(l.ips)+len(l.subnets) != 0 {
		t.Errorf("left behind: %v %v", l.ips, l.subnets)
	}
}

// TestMessageRate: beyond its rate a connection's messages are refused under their names; who goes on
// regardless is closed.
func TestMessageRate(t *testing.T) {
	s, sink := start(t, func(o *Options) { o.Settings.MessagesPerSecond = 10 })
	c := connect(t, s, "u")
	const sent = 30 // two seconds' worth, and half as many
	for range sent {
		c.send(text(`{"type":"send-message","message_id":"m","data":{}}`))
	}
	refused := 0
	for refused < sent-21 { // the clock may have let one more through
		var f struct {
			Data struct {
				Status, Code string
				Retry        int `json:"retry_after_ms"`
			}
		}
		if err := json.Unmarshal(c.read().Payload, &f); err != nil {
			t.Fatal(err)
		}
		if f.Data.Code != string(codec.RateLimited) || f.Data.Retry <= 0 {
			t.Fatalf("%+v", f)
		}
		refused++
	}
	for range 20 {
		sink.next(t, codec.EventMessage)
	}
	for range 40 {
		c.send(text(`{"type":"ping"}`))
	}
	if code := c.closed(); code != ws.StatusPolicyViolation {
		t.Errorf("closed with %d", code)
	}
}

// TestRetryAfter: who waits as long as told is heard, and who does not, not.
func TestRetryAfter(t *testing.T) {
	for _, r := range []messageRate{newMessageRate(10, 0), newMessageRate(3, 1000), newMessageRate(0, 700)} {
		for early := range int64(2) {
			cn := &conn{l: &loop{now: 1_760_000_000_000, rules: &rules{messages: r}}}
			for cn.spend(1, 100) == withinRate {
			}
			cn.l.now += int64(cn.retryAfterMS(100)) - 2*early
			if got := cn.spend(1, 100); (got == withinRate) != (early == 0) {
				t.Errorf("%+v, %d ms early: %d", r, 2*early, got)
			}
		}
	}
}

// TestByteRate: large messages use the rate up sooner.
func TestByteRate(t *testing.T) {
	s, _ := start(t, func(o *Options) { o.Settings.BytesPerSecond = 50_000 })
	c := connect(t, s, "u")
	big := text(`{"type":"send-message","message_id":"m","data":"` + strings.Repeat("x", 30_000) + `"}`)
	for range 4 {
		c.send(big)
	}
	if f := c.read(); !strings.Contains(string(f.Payload), "RATE_LIMITED") {
		t.Errorf("%s", f.Payload)
	}
}

// TestPingFlood: pings beyond the rate are not answered, and too many close the connection.
func TestPingFlood(t *testing.T) {
	s, _ := start(t, func(o *Options) { o.Settings.MessagesPerSecond = 10 })
	c := connect(t, s, "u")
	c.send(strings.Repeat(frame(true, ws.OpPing, ""), 1000))
	pongs := 0
	for {
		f := c.read()
		if f.Header.OpCode == ws.OpPong {
			pongs++
			continue
		}
		if code, _ := ws.ParseCloseFrameData(f.Payload); f.Header.OpCode != ws.OpClose || code != ws.StatusPolicyViolation {
			t.Errorf("%v %s", f.Header, f.Payload)
		}
		break
	}
	if pongs < 20 || pongs > 22 {
		t.Errorf("%d pongs", pongs)
	}
}

// TestFragments: a message comes in so many frames at most.
func TestFragments(t *testing.T) {
	s, _ := start(t, func(o *Options) { o.Settings.MaxFragments = 10 })
	c := connect(t, s, "u")
	pieces := func(n int) string {
		body := `{"type":"ping"}`
		out := frame(false, ws.OpText, body)
		for range n - 2 {
			out += frame(false, ws.OpContinuation, "")
		}
		return out + frame(true, ws.OpContinuation, "")
	}
	c.send(pieces(10))
	if f := c.read(); !strings.Contains(string(f.Payload), "pong") {
		t.Fatalf("%s", f.Payload)
	}
	c.send(pieces(11))
	if code := c.closed(); code != ws.StatusPolicyViolation {
		t.Errorf("closed with %d", code)
	}
}

// TestUnfinishedMessages: a message must come within the time of silence, however busy its client is, and
// sooner while memory is short.
func TestUnfinishedMessages(t *testing.T) {
	whole := text(`{"type":"send-message","message_id":"m","data":"` + strings.Repeat("x", 1000) + `"}`)
	slowly := func(t *testing.T, c *client) {
		t.Helper()
		go func() {
			for i := range 500 {
				if _, err := c.Write([]byte(whole[i : i+1])); err != nil {
					return
				}
				time.Sleep(20 * time.Millisecond)
			}
		}()
		if code := c.closed(); code != ws.StatusPolicyViolation {
			t.Errorf("closed with %d", code)
		}
		_ = c.Close()
	}
	t.Run("time", func(t *testing.T) {
		s, sink := start(t, func(o *Options) { o.Settings.HeartbeatTimeout = 500 * time.Millisecond })
		good := connect(t, s, "good")
		good.send(whole[:100])
		good.send(whole[100:])
		sink.next(t, codec.EventMessage)
		slowly(t, connect(t, s, "bad"))
	})
	t.Run("pressure", func(t *testing.T) {
		s, _ := start(t, func(o *Options) { o.HandshakeTimeout = 500 * time.Millisecond })
		c := connect(t, s, "bad")
		s.SetPressure(true)
		slowly(t, c)
	})
}

// TestHandshakeRate: beyond the rate of upgrades the answer is 503 with Retry-After.
func TestHandshakeRate(t *testing.T) {
	s, _ := start(t, func(o *Options) { o.Settings.HandshakesPerSecond = 2 })
	for range 4 {
		connect(t, s, "u")
	}
	c := dial(t, s)
	c.send("GET /ws HTTP/1.1\r\n", upgradeLines, "Authorization: Bearer ", token(t, "u", time.Hour), "\r\n\r\n")
	if resp, _ := c.answer(); resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" {
		t.Errorf("%s", resp.Status)
	}
}

// TestSlowHeadsCostNoHTTPConnection: a request whose head does not come whole is the loop's, and gets its
// answer when its time is over.
func TestSlowHeadsCostNoHTTPConnection(t *testing.T) {
	s, _ := start(t, func(o *Options) { o.HandshakeTimeout = 200 * time.Millisecond })
	c := dial(t, s)
	c.send("POST /api/auth/login HTTP/1.1\r\nHost: x\r\nX: ")
	if resp, _ := c.answer(); resp.StatusCode != 408 {
		t.Errorf("%s", resp.Status)
	}
	if n := s.bridged.Load(); n != 0 {
		t.Errorf("%d connections are net/http's", n)
	}
}

// TestNotHTTP is answered at once.
func TestNotHTTP(t *testing.T) {
	s, _ := start(t, nil)
	for _, head := range []string{"\x16\x03\x01\x02\x00", "\r\n", "\x00"} {
		c := dial(t, s)
		c.send(head)
		if resp, _ := c.answer(); resp.StatusCode != 400 {
			t.Errorf("%q: %s", head, resp.Status)
		}
	}
}

// TestHTTPConnections: net/http gets so many connections.
func TestHTTPConnections(t *testing.T) {
	s, _ := start(t, func(o *Options) { o.Settings.MaxHTTPConnections = 2 })
	get := func() int {
		c := dial(t, s)
		c.send("GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
		resp, _ := c.answer()
		return resp.StatusCode
	}
	a, b, third := get(), get(), get()
	if a == 503 || b == 503 || third != 503 {
		t.Errorf("%d %d %d", a, b, third)
	}
}
