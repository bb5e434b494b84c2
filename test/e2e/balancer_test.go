package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/twmb/franz-go/pkg/kgo"

	imclient "im-gateway/client"
)

// TestBehindHAProxy: Debian's haproxy with deploy/haproxy/haproxy.cfg in front of two gateways.
func TestBehindHAProxy(t *testing.T) {
	t.Run("TLS at the gateways", func(t *testing.T) {
		t.Parallel()
		startBalancer(t, "haproxy", "gateways").movesUsers()
	})
	for _, tlsEnds := range []string{"haproxy", "nowhere"} {
		t.Run("TLS at "+tlsEnds, func(t *testing.T) {
			t.Parallel()
			startBalancer(t, "haproxy", tlsEnds).servesUser()
		})
	}
}

// TestBehindNginx: Debian's nginx with deploy/nginx/nginx.conf in front of two gateways.
func TestBehindNginx(t *testing.T) {
	lb := startBalancer(t, "nginx", "nginx")
	lb.movesUsers()
	if log := string(readFile(t, filepath.Join(lb.dir, "access.log"))); !strings.Contains(log, " GET /ws 101 ") {
		t.Errorf("no upgrade in the access log:\n%s", log)
	}
}

// perAddress is the most connections that each gateway takes from one address in these tests.
const perAddress = 4

// balancer is a load balancer with the configuration that deploy/ ships, in front of two gateways that
// believe it, and only it, about its clients' addresses.
type balancer struct {
	t       *testing.T
	addr    string
	tlsEnds string         // the program's name, gateways or nowhere
	roots   *x509.CertPool // nil: no TLS
	dir     string         // its files, logs among them
	a, b    *gateway
	change  settings // of both
}

// startBalancer returns once it answers.
func startBalancer(t *testing.T, program, tlsEnds string) *balancer {
	t.Helper()
	lb := &balancer{t: t, addr: freeAddr(), tlsEnds: tlsEnds, dir: t.TempDir(), change: settings{
		"http.trusted_proxies": "127.0.0.1/32", "http.proxy_protocol": fmt.Sprint(program == "haproxy"),
		"limits.connections_per_ip": fmt.Sprint(perAddress), "limits.exempt_networks": "192.0.2.0/24",
		"drain.window": "1s",
	}}
	cert, key := filepath.Join(lb.dir, "server.crt"), filepath.Join(lb.dir, "server.key")
	roots := x509.NewCertPool()
	keyPair(t, cert, key, 1, roots)
	if tlsEnds != "nowhere" {
		lb.roots = roots
	}
	if tlsEnds == "gateways" {
		lb.change["http.tls.cert_file"], lb.change["http.tls.key_file"] = cert, key
	}
	lb.a, lb.b = start(t, user("gw"), lb.change), start(t, user("gw"), lb.change)

	file := filepath.Join(lb.dir, "balancer.conf")
	edits := []string{"im-gateway-0:8080", lb.a.addr, "im-gateway-1:8080", lb.b.addr}
	var args []string
	switch program {
	case "haproxy":
		bind := "    bind " + lb.addr
		switch tlsEnds { // what the file's comments say
		case "haproxy":
			both := filepath.Join(lb.dir, "both.pem")
			writeFile(t, both, append(readFile(t, cert), readFile(t, key)...))
			bind += " ssl crt " + both + " alpn http/1.1"
		case "gateways":
			edits = append(edits, "default-server check", "default-server check check-ssl verify none")
		}
		// As another user it would outlive a test that is killed; and few may open so many files.
		edits = append(edits, "    bind :443\n", bind+"\n", "    user haproxy\n    group haproxy\n", "", "maxconn 100000", "maxconn 1000")
		args = []string{"-db", "-f", file}
	case "nginx":
		edits = append(edits, "listen 443 ssl", "listen "+lb.addr+" ssl", "/run/nginx.pid", filepath.Join(lb.dir, "pid"),
			"/etc/nginx/im-gateway.crt", cert, "/etc/nginx/im-gateway.key", key, "/var/log/nginx", lb.dir)
		args = []string{"-c", file, "-g", "daemon off;"}
	}
	shipped := readFile(t, map[string]string{
		"haproxy": "../../deploy/haproxy/haproxy.cfg", "nginx": "../../deploy/nginx/nginx.conf"}[program])
	for i := 0; i < len(edits); i += 2 {
		if !bytes.Contains(shipped, []byte(edits[i])) {
			t.Fatalf("the configuration of %s no longer has %q", program, edits[i])
		}
	}
	writeFile(t, file, []byte(strings.NewReplacer(edits...).Replace(string(shipped))))
	lb.run(program, args...)
	eventually(t, "it answers through "+program, func() bool {
		resp, err := lb.http("127.0.0.9").Get(lb.url("http", "/healthz"))
		if err != nil {
			return false
		}
		_ = resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	return lb
}

// run runs the program until the test ends.
func (lb *balancer) run(program string, args ...string) {
	log := &logBuffer{}
	cmd := exec.Command(program, args...) //nolint:gosec // one of two
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	started, done := make(chan error, 1), make(chan struct{})
	go func() {
		runtime.LockOSThread() // Pdeathsig is tied to the thread that starts the process
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
		close(done)
	}()
	if err := <-started; err != nil {
		lb.t.Fatalf("%v (Debian's haproxy and nginx-light are needed)", err)
	}
	lb.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		<-done
		if lb.t.Failed() {
			lb.t.Logf("%s: %s", program, log)
		}
	})
}

// http is a client of that address of this machine; each has connections of its own.
func (lb *balancer) http(from string) *http.Client {
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	transport := &http.Transport{DialContext: dialer.DialContext}
	if lb.roots != nil {
		transport.TLSClientConfig = &tls.Config{RootCAs: lb.roots, ServerName: "localhost"}
	}
	lb.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

func (lb *balancer) url(scheme, path string) string {
	if lb.roots != nil {
		scheme += "s"
	}
	return scheme + "://" + lb.addr + path
}

// member is one user of package client.
type member struct {
	name string
	*imclient.Client

	mu      sync.Mutex
	handled map[string]int
}

// join connects a user from that address.
func (lb *balancer) join(from string) *member {
	m := &member{name: user("member"), handled: map[string]int{}}
	var err error
	m.Client, err = imclient.New(imclient.Options{
		URLs: []string{lb.url("ws", "/ws")},
		Token: func(context.Context, imclient.TokenReason) (string, error) {
			return token(lb.t, m.name, time.Hour), nil
		},
		HTTPClient: lb.http(from), AckDeliveries: true, Outbox: 1000,
		Handle: func(f imclient.Message) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.handled[f.ID]++
		},
	})
	if err != nil {
		lb.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan struct{})
	go func() {
		defer close(ran)
		_ = m.Run(ctx) // ends with ctx
	}()
	lb.t.Cleanup(func() { cancel(); <-ran })
	return m
}

// say sends a message and returns once it is stored.
func (m *member) say(ctx context.Context, id string) error {
	p, err := m.Send(imclient.Envelope{Type: "m", ID: id, Data: json.RawMessage(`1`)})
	if err == nil {
		_, err = p.Wait(ctx)
	}
	return err
}

func (m *member) has(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.handled[id] > 0
}

// servesUser: a message up, one down, a request of the HTTP API.
func (lb *balancer) servesUser() {
	m := lb.join("127.0.1.1")
	if err := m.say(deadline(lb.t), "one"); err != nil {
		lb.t.Fatal(err)
	}
	at := lb.a
	if presence(lb.t, m.name)["gateway_id"] == lb.b.id {
		at = lb.b
	}
	produce(lb.t, at, m.name, fmt.Sprintf(`{"target_user_id":%q,"message_id":"down","data":1}`, m.name))
	eventually(lb.t, "a push comes through", func() bool { return m.has("down") })
	lb.streams(user("reader"))
	req, err := http.NewRequest(http.MethodPost, lb.url("http", "/api/messages"), strings.NewReader(`{"type":"m","message_id":"two","data":2}`))
	if err != nil {
		lb.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token(lb.t, m.name, time.Hour))
	resp, err := lb.http("127.0.1.2").Do(req)
	if err != nil {
		lb.t.Fatal(err)
	}
	text, _ := io.ReadAll(resp.Body) // short of it the next line fails
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusOK || !bytes.Contains(text, []byte(`"success":true`)) {
		lb.t.Errorf("POST /api/messages: %s %s", resp.Status, text)
	}
}

// streams: an event stream is read as it comes, not when it is long enough.
func (lb *balancer) streams(name string) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, lb.url("http", "/sse"), nil)
	if err != nil {
		lb.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token(lb.t, name, time.Hour))
	resp, err := lb.http("127.0.1.3").Do(req)
	if err != nil {
		lb.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	lines := bufio.NewScanner(resp.Body)
	until := func(text string) {
		for lines.Scan() {
			if strings.Contains(lines.Text(), text) {
				return
			}
		}
		lb.t.Fatalf("the stream ended before %s: %v", text, lines.Err())
	}
	until("connected")
	at := lb.a
	if presence(lb.t, name)["gateway_id"] == lb.b.id {
		at = lb.b
	}
	produce(lb.t, at, name, fmt.Sprintf(`{"target_user_id":%q,"message_id":"event","data":1}`, name))
	until("event")
}

// movesUsers: users on both gateways talk and are talked to while one of them drains. All go over to the
// other, no message is lost either way, and a gateway that is back is found.
func (lb *balancer) movesUsers() {
	t := lb.t
	lb.servesUser()
	// Three times as many as one address may have: the gateways tell their addresses apart.
	var members []*member
	for i := range 3 * perAddress {
		members = append(members, lb.join(fmt.Sprintf("127.0.3.%d", i+1)))
	}
	on := map[string]int{}
	for _, m := range members {
		if err := m.say(deadline(t), "first"); err != nil {
			t.Fatal(err)
		}
		on[presence(t, m.name)["gateway_id"]]++
	}
	if on[lb.a.id] == 0 || on[lb.b.id] == 0 {
		t.Errorf("not spread over the gateways: %v", on)
	}
	lb.countsOneAddress()

	undelivered := watch(t, "im-undelivered-topic")
	ctx, stop := context.WithCancel(context.Background())
	var talkers sync.WaitGroup
	sent := make([]int, len(members)) // by member; read after talkers
	for i, m := range members {
		talkers.Go(func() {
			for ; ctx.Err() == nil; sent[i]++ {
				if err := m.say(deadline(t), fmt.Sprint("m-", sent[i])); err != nil {
					t.Errorf("%s, message %d: %v", m.name, sent[i], err)
					return
				}
			}
		})
	}
	pushed := map[string]*member{} // by message_id
	push := func() {
		for _, m := range members {
			at := lb.a
			if presence(t, m.name)["gateway_id"] == lb.b.id {
				at = lb.b
			}
			id := fmt.Sprint("p-", len(pushed), "-", m.name)
			produce(t, at, m.name, fmt.Sprintf(`{"target_user_id":%q,"message_id":%q,"data":1}`, m.name, id))
			pushed[id] = m
		}
	}
	push()
	if err := lb.a.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	push()
	eventually(t, "all users are on the other gateway", func() bool {
		push()
		moved := 0
		for _, m := range members {
			if presence(t, m.name)["gateway_id"] == lb.b.id {
				moved++
			}
		}
		return moved == len(members)
	})
	if code := lb.a.exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	push()
	stop()
	talkers.Wait()

	again := maps.Clone(lb.change)
	again["http.addr"] = lb.a.addr
	lb.a = start(t, lb.a.id, again)
	n := 0
	eventually(t, "new users come to the gateway that is back", func() bool {
		n++
		m := lb.join(fmt.Sprintf("127.0.4.%d", n))
		if err := m.say(deadline(t), "hello"); err != nil {
			t.Fatal(err)
		}
		return presence(t, m.name)["gateway_id"] == lb.a.id
	})

	eventually(t, "every push was handled, or is undelivered", func() bool {
		for id, m := range pushed {
			if !m.has(id) && !undelivered.has(id) {
				return false
			}
		}
		return true
	})
	want := map[string]bool{}
	for i, m := range members {
		for n := range sent[i] {
			want[fmt.Sprint(m.name, " m-", n)] = true
		}
	}
	t.Logf("%d messages up, %d down, of which %d undelivered", len(want), len(pushed), undelivered.count(pushed))
	find(t, "im-upstream-topic", func(r *kgo.Record) bool {
		delete(want, string(r.Key)+" "+header(r, "client_msg_id"))
		return len(want) == 0
	})
	lb.a.settled()
	lb.b.settled()
}

// countsOneAddress: connections of one address are counted as such, whatever they claim; and the balancer
// writes no token.
func (lb *balancer) countsOneAddress() {
	t := lb.t
	var tok string
	var open []*websocket.Conn
	refused := 0
	for i := range 2*perAddress + 1 {
		tok = token(t, user("crowd"), time.Hour)
		conn, resp, err := websocket.Dial(deadline(t), lb.url("ws", "/ws?token="+tok), &websocket.DialOptions{
			HTTPClient: lb.http("127.0.2.1"), HTTPHeader: http.Header{"X-Forwarded-For": {fmt.Sprintf("203.0.113.%d", i)}},
		})
		switch {
		case err == nil:
			open = append(open, conn)
		case resp != nil && resp.StatusCode == http.StatusTooManyRequests:
			refused++
		case resp == nil && lb.tlsEnds == "gateways": // told before TLS can begin: an answer could not be read
			refused++
		default:
			t.Fatal(err)
		}
	}
	if len(open) < perAddress || refused == 0 {
		t.Errorf("%d connections of one address taken, %d refused", len(open), refused)
	}
	for _, c := range open {
		_ = c.CloseNow()
	}
	err := filepath.WalkDir(lb.dir, func(path string, _ os.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".log") && bytes.Contains(readFile(t, path), []byte(tok)) {
			t.Errorf("a token is in %s", filepath.Base(path))
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// topicWatch collects the message ids of a topic.
type topicWatch struct {
	mu  sync.Mutex
	ids map[string]bool
}

func watch(t *testing.T, topic string) *topicWatch {
	w := &topicWatch{ids: map[string]bool{}}
	c, err := kgo.NewClient(kgo.SeedBrokers(env.brokers...), kgo.ConsumeTopics(topic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			c.PollFetches(ctx).EachRecord(func(r *kgo.Record) {
				w.mu.Lock()
				defer w.mu.Unlock()
				w.ids[header(r, "message_id")] = true
			})
		}
	}()
	t.Cleanup(func() { cancel(); <-done; c.Close() })
	return w
}

func (w *topicWatch) has(id string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ids[id]
}

func (w *topicWatch) count(ids map[string]*member) (n int) {
	for id := range ids {
		if w.has(id) {
			n++
		}
	}
	return n
}

func readFile(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeFile(t *testing.T, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
