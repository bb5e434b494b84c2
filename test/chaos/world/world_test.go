//go:build chaos

package world

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/twmb/franz-go/pkg/kgo"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"im-gateway/codec/logicpb"
)

const (
	patience = 60 * time.Second       // for what must come
	silence  = 300 * time.Millisecond // for what must not
)

var binary string // the gateway's

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "im-world-")
	if err != nil {
		panic(err)
	}
	binary = filepath.Join(dir, "im-gateway")
	if out, err := exec.Command("go", "build", "-o", binary, "im-gateway/cmd/im-gateway").CombinedOutput(); err != nil {
		panic(fmt.Sprintf("build the gateway: %v\n%s", err, out))
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		_ = os.RemoveAll(dir)
		os.Exit(code)
	}))
}

// start starts a world, and checks at its end that nothing of it is left.
func start(t *testing.T, o Options) *World {
	t.Helper()
	o.Dir, o.Gateway = t.TempDir(), binary
	w, err := Start(t.Context(), o)
	t.Cleanup(func() {
		pids := w.pids()
		if err := w.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		http.DefaultClient.CloseIdleConnections()
		for _, pid := range pids {
			if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
				t.Errorf("process %d is left: %v", pid, err)
			}
		}
		mounts, err := os.ReadFile("/proc/mounts")
		if err != nil || strings.Contains(string(mounts), o.Dir) {
			t.Errorf("a mount is left, %v", err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *World) pids() (list []int) {
	all := []*Process{w.Etcd, w.Redis, w.Standby}
	for _, g := range w.Gateways {
		all = append(all, g.Process)
	}
	if w.Kafka != nil {
		for _, b := range w.Kafka.brokers {
			all = append(all, b.Process)
		}
	}
	for _, p := range all {
		if p != nil && p.Alive() {
			list = append(list, p.Pid())
		}
	}
	return list
}

// must fails the test on an error.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until a check has no error.
func eventually(t *testing.T, what string, check func(context.Context) error) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(t.Context(), patience/2)
		err := check(ctx)
		cancel()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// wire is a connection to a Redis, of the test's own.
type wire struct{ net.Conn }

func dialWire(t *testing.T, addr string) wire {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, patience)
	must(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return wire{c}
}

// ask sends a line and reads n bytes of the answer within a time.
func (c wire) ask(line string, n int, within time.Duration) (string, error) {
	if _, err := io.WriteString(c, line+"\r\n"); err != nil {
		return "", err
	}
	return c.read(n, within)
}

func (c wire) read(n int, within time.Duration) (string, error) {
	if err := c.SetReadDeadline(time.Now().Add(within)); err != nil {
		return "", err
	}
	b := make([]byte, n)
	read, err := io.ReadFull(c, b)
	return string(b[:read]), err
}

func (c wire) pong(t *testing.T) {
	t.Helper()
	if s, err := c.ask("PING", 7, patience); err != nil || s != "+PONG\r\n" {
		t.Fatalf("PING: %q, %v", s, err)
	}
}

// session opens a session and reads its first frame.
func session(ctx context.Context, addr, user string) (string, error) {
	token, err := Token(user)
	if err != nil {
		return "", err
	}
	c, _, err := websocket.Dial(ctx, "ws://"+addr+"/ws?token="+token, nil)
	if err != nil {
		return "", err
	}
	defer func() { _ = c.CloseNow() }()
	_, b, err := c.Read(ctx)
	return string(b), err
}

func connects(t *testing.T, addr, user string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if frame, err := session(ctx, addr, user); err != nil || !strings.Contains(frame, `"connected"`) {
		t.Fatalf("first frame of a session at %s: %s, %v", addr, frame, err)
	}
}

// store produces one record to the upstream topic by a client of its own. It does not outlive ctx, as
// a synchronous idempotent write can.
func store(ctx context.Context, brokers ...string) error {
	c, err := kgo.NewClient(kgo.SeedBrokers(brokers...), kgo.MetadataMinAge(50*time.Millisecond), kgo.DisableIdempotentWrite())
	if err != nil {
		return err
	}
	defer c.Close()
	done := make(chan error, 1)
	c.Produce(ctx, &kgo.Record{Topic: UpstreamTopic, Value: []byte("probe")}, func(_ *kgo.Record, err error) { done <- err })
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// storeFails checks that nothing can be stored through some brokers.
func storeFails(t *testing.T, brokers ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if err := store(ctx, brokers...); err == nil {
		t.Fatalf("a record was stored through %v", brokers)
	}
}

func TestWorld(t *testing.T) {
	w := start(t, Options{Brokers: 1, Gateways: []string{"g1", "g2"}, Settings: map[string]string{
		"drain.window": "0s", "etcd.lease_ttl": "2s",
	}})
	g := w.Gateways[0]
	must(t, g.Start(t.Context()))
	connects(t, g.Addr, "direct")
	connects(t, g.Front.Addr(), "proxied")
	t.Run("link", func(t *testing.T) { testLink(t, w) })
	t.Run("front", func(t *testing.T) { testFront(t, g) })
	t.Run("kafka", func(t *testing.T) { testKafka(t, w) })
	t.Run("redis", func(t *testing.T) { testRedis(t, w) })
	t.Run("etcd", func(t *testing.T) { testEtcd(t, w) })
	t.Run("logic", func(t *testing.T) { testLogic(t, w) })
	t.Run("gateway", func(t *testing.T) { testGateway(t, w, g) })
}

// testLink tries the faults of a link on the one from g2, which does not run, to Redis.
func testLink(t *testing.T, w *World) {
	l := w.Gateways[1].RedisLink
	other := dialWire(t, w.Gateways[0].RedisLink.Addr())
	restored := func(t *testing.T) {
		t.Helper()
		must(t, l.Restore(t.Context()))
		dialWire(t, l.Addr()).pong(t)
		other.pong(t) // one gateway's faults are its own
	}
	t.Run("latency", func(t *testing.T) {
		old := dialWire(t, l.Addr())
		old.pong(t)
		must(t, l.Latency(2*silence))
		for _, c := range []wire{old, dialWire(t, l.Addr())} {
			if s, err := c.ask("PING", 7, silence); !isTimeout(err) || s != "" {
				t.Errorf("an answer before the latency: %q, %v", s, err)
			}
			if s, err := c.read(7, patience); s != "+PONG\r\n" {
				t.Errorf("the late answer: %q, %v", s, err)
			}
		}
		restored(t)
		old.pong(t)
	})
	t.Run("bandwidth", func(t *testing.T) {
		c := dialWire(t, l.Addr())
		const size = 64 << 10
		_, err := RedisCommand(t.Context(), w.RedisAddr, "SET", "big", strings.Repeat("x", size))
		must(t, err)
		must(t, l.Bandwidth(16))
		s, err := c.ask("GET big", size, silence)
		if !isTimeout(err) {
			t.Errorf("64 KB came at once at 16 KB per second: %d, %v", len(s), err)
		}
		if rest, err := c.read(size-len(s), patience); err != nil {
			t.Errorf("the rest: %d of %d, %v", len(rest), size-len(s), err)
		}
		restored(t)
	})
	t.Run("cut", func(t *testing.T) {
		old := dialWire(t, l.Addr())
		old.pong(t)
		must(t, l.Cut())
		for _, c := range []wire{old, dialWire(t, l.Addr())} {
			if s, err := c.ask("PING", 1, silence); !isTimeout(err) {
				t.Errorf("through a cut: %q, %v; want silence on an open connection", s, err)
			}
		}
		other.pong(t)
		restored(t)
	})
	t.Run("reset", func(t *testing.T) {
		old := dialWire(t, l.Addr())
		old.pong(t)
		must(t, l.Reset())
		for _, c := range []wire{old, dialWire(t, l.Addr())} {
			if s, err := c.ask("PING", 1, patience); err == nil || isTimeout(err) {
				t.Errorf("an answer by a reset link: %q, %v", s, err)
			}
		}
		restored(t)
	})
	t.Run("reset downstream", func(t *testing.T) {
		old := dialWire(t, l.Addr())
		old.pong(t)
		must(t, l.ResetDownstream())
		for _, c := range []wire{old, dialWire(t, l.Addr())} {
			if s, err := c.ask("INCR resets", 1, patience); err == nil || isTimeout(err) {
				t.Errorf("an answer by a reset link: %q, %v", s, err)
			}
		}
		if n, err := RedisCommand(t.Context(), w.RedisAddr, "GET", "resets"); err != nil || n != "2" {
			t.Errorf("what was asked was done %s times, %v; want 2", n, err)
		}
		restored(t)
	})
	t.Run("down", func(t *testing.T) {
		old := dialWire(t, l.Addr())
		old.pong(t)
		l.Down()
		if s, err := old.read(1, patience); err == nil || isTimeout(err) {
			t.Errorf("an open connection by a link that is down: %q, %v", s, err)
		}
		if _, err := net.Dial("tcp", l.Addr()); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial: %v, want it refused", err)
		}
		must(t, l.Up())
		must(t, l.Up()) // one that is up stays so
		restored(t)
	})
	t.Run("several at once", func(t *testing.T) {
		must(t, errors.Join(l.Latency(time.Millisecond), l.Cut(), l.Reset()))
		c := dialWire(t, l.Addr())
		if s, err := c.ask("PING", 1, silence); err == nil {
			t.Errorf("answer %q", s)
		}
		restored(t)
	})
	t.Run("point", func(t *testing.T) {
		port := fmt.Sprint(portOf(w.StandbyAddr))
		l.Down()
		l.Point(w.StandbyAddr)
		must(t, l.Up())
		if s, err := dialWire(t, l.Addr()).ask("CONFIG GET port", len("*2\r\n$4\r\nport\r\n$5\r\n")+len(port), patience); !strings.HasSuffix(s, port) {
			t.Errorf("port %q, %v, want %s", s, err, port)
		}
		l.Down()
		l.Point(w.RedisAddr)
		must(t, l.Up())
		restored(t)
	})
}

// testFront breaks the way from clients to a gateway.
func testFront(t *testing.T, g *Gateway) {
	must(t, g.Front.Cut())
	ctx, cancel := context.WithTimeout(t.Context(), silence)
	defer cancel()
	if frame, err := session(ctx, g.Front.Addr(), "cut"); err == nil {
		t.Errorf("a session by a cut link: %s", frame)
	}
	connects(t, g.Addr, "not-cut")
	must(t, g.Front.Restore(t.Context()))
	connects(t, g.Front.Addr(), "restored")
}

func testKafka(t *testing.T, w *World) {
	stores := func(t *testing.T, brokers ...string) {
		t.Helper()
		eventually(t, "store", func(ctx context.Context) error { return store(ctx, brokers...) })
	}
	stores(t, w.Kafka.Brokers()...)
	stores(t, w.Kafka.proxied()...)
	t.Run("cut", func(t *testing.T) {
		must(t, w.Kafka.Link.Cut())
		storeFails(t, w.Kafka.proxied()...)
		stores(t, w.Kafka.Brokers()...) // the suite's own way
		must(t, w.Kafka.Link.Restore(t.Context()))
		stores(t, w.Kafka.proxied()...)
	})
	t.Run("gateways use the proxy only", func(t *testing.T) {
		w.Kafka.Link.Down()
		defer func() { must(t, w.Kafka.Link.Up()) }()
		eventually(t, "a refusal", func(ctx context.Context) error {
			code, err := publish(ctx, w.Gateways[0])
			if err == nil && code == http.StatusOK {
				err = errors.New("a message was stored")
			}
			return err
		})
		must(t, w.Kafka.Link.Up())
		eventually(t, "a success", func(ctx context.Context) error {
			code, err := publish(ctx, w.Gateways[0])
			if err == nil && code != http.StatusOK {
				err = fmt.Errorf("status %d", code)
			}
			return err
		})
	})
	t.Run("freeze", func(t *testing.T) {
		must(t, w.Kafka.Broker(0).Stop())
		storeFails(t, w.Kafka.Brokers()...)
		must(t, w.Kafka.Broker(0).Cont())
		stores(t, w.Kafka.Brokers()...)
	})
	t.Run("kill", func(t *testing.T) {
		pid := w.Kafka.Broker(0).Pid()
		w.Kafka.Broker(0).Kill()
		if _, err := net.Dial("tcp", w.Kafka.Brokers()[0]); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial: %v, want it refused", err)
		}
		storeFails(t, w.Kafka.Brokers()...)
		must(t, w.Kafka.StartAll(t.Context()))
		if w.Kafka.Broker(0).Pid() == pid {
			t.Error("the same process")
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		must(t, store(ctx, w.Kafka.Brokers()...))
		must(t, store(ctx, w.Kafka.proxied()...))
	})
}

// publish sends a message through a gateway's HTTP API.
func publish(ctx context.Context, g *Gateway) (int, error) {
	token, err := Token("publisher")
	if err != nil {
		return 0, err
	}
	body := strings.NewReader(`{"type":"m","message_id":"probe","data":"hello"}`)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+g.Addr+"/api/messages", body)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

func testRedis(t *testing.T, w *World) {
	t.Run("freeze", func(t *testing.T) {
		c := dialWire(t, w.RedisAddr)
		c.pong(t)
		must(t, w.Redis.Stop())
		if s, err := c.ask("PING", 7, silence); !isTimeout(err) {
			t.Errorf("a frozen Redis: %q, %v", s, err)
		}
		must(t, w.Redis.Cont())
		if s, err := c.read(7, patience); s != "+PONG\r\n" {
			t.Errorf("after: %q, %v", s, err)
		}
	})
	t.Run("standby follows", func(t *testing.T) {
		_, err := RedisCommand(t.Context(), w.RedisAddr, "SET", "followed", "1")
		must(t, err)
		eventually(t, "replication", func(ctx context.Context) error {
			_, err := RedisCommand(ctx, w.StandbyAddr, "GET", "followed")
			return err
		})
	})
	t.Run("read only", func(t *testing.T) {
		set := func(ctx context.Context) error {
			_, err := RedisCommand(ctx, w.RedisAddr, "SET", "probe", "1")
			return err
		}
		_, err := RedisCommand(t.Context(), w.StandbyAddr, "REPLICAOF", "NO", "ONE")
		must(t, err)
		_, err = RedisCommand(t.Context(), w.RedisAddr, "REPLICAOF", "127.0.0.1", fmt.Sprint(portOf(w.StandbyAddr)))
		must(t, err)
		if err := set(t.Context()); err == nil || !strings.Contains(err.Error(), "READONLY") {
			t.Errorf("write: %v, want READONLY", err)
		}
		_, err = RedisCommand(t.Context(), w.RedisAddr, "REPLICAOF", "NO", "ONE")
		must(t, err)
		must(t, set(t.Context()))
	})
	t.Run("kill", func(t *testing.T) {
		w.Redis.Kill()
		if _, err := net.Dial("tcp", w.RedisAddr); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial: %v, want it refused", err)
		}
		must(t, w.Redis.Start(t.Context()))
		if v, err := RedisCommand(t.Context(), w.RedisAddr, "GET", "probe"); err == nil {
			t.Errorf("the new Redis has %q, want it empty", v)
		}
	})
}

func testEtcd(t *testing.T, w *World) {
	look := func(ctx context.Context, key string) error {
		c, err := clientv3.New(clientv3.Config{Endpoints: []string{w.EtcdAddr}, Logger: zap.NewNop()})
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		resp, err := c.Get(ctx, key)
		if err == nil && len(resp.Kvs) == 0 {
			err = errNone
		}
		return err
	}
	brief := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), silence)
		defer cancel()
		return look(ctx, "kept")
	}
	_, err := w.Keys.Put(t.Context(), "kept", "1")
	must(t, err)
	t.Run("freeze", func(t *testing.T) {
		must(t, w.Etcd.Stop())
		if err := brief(); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a frozen etcd: %v", err)
		}
		must(t, w.Etcd.Cont())
		eventually(t, "etcd", func(ctx context.Context) error { return look(ctx, "kept") })
	})
	t.Run("kill", func(t *testing.T) {
		w.Etcd.Kill()
		if _, err := net.Dial("tcp", w.EtcdAddr); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial: %v, want it refused", err)
		}
		must(t, w.Etcd.Start(t.Context()))
		eventually(t, "etcd keeps its data", func(ctx context.Context) error { return look(ctx, "kept") })
	})
	t.Run("revoke", func(t *testing.T) {
		lease, err := w.Keys.Grant(t.Context(), 600)
		must(t, err)
		_, err = w.Keys.Put(t.Context(), "leased", "1", clientv3.WithLease(lease.ID))
		must(t, err)
		must(t, w.RevokeLease(t.Context(), "leased"))
		if err := look(t.Context(), "leased"); !errors.Is(err, errNone) {
			t.Errorf("the key of a revoked lease: %v", err)
		}
		if err := w.RevokeLease(t.Context(), "leased"); err == nil {
			t.Error("a key that is not there was revoked")
		}
		// The gateway's own comes back with another lease.
		const key = "im-gateway/g1"
		resp, err := w.Keys.Get(t.Context(), key)
		if err != nil || len(resp.Kvs) == 0 {
			t.Fatalf("%s: %v", key, err)
		}
		before := resp.Kvs[0].Lease
		must(t, w.RevokeLease(t.Context(), key))
		eventually(t, key, func(ctx context.Context) error {
			resp, err := w.Keys.Get(ctx, key)
			if err == nil && (len(resp.Kvs) == 0 || resp.Kvs[0].Lease == before) {
				err = errNone
			}
			return err
		})
	})
}

var errNone = errors.New("no such key")

func testLogic(t *testing.T, w *World) {
	conn, err := grpc.NewClient(w.Logic.Addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer func() { _ = conn.Close() }()
	login := func(within time.Duration) (*logicpb.TokenResponse, error) {
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		return logicpb.NewAuthServiceClient(conn).Login(ctx, &logicpb.LoginRequest{Username: "ann", Password: "p"})
	}
	defer w.Logic.Set(Up)
	calls := w.Logic.Calls.Load()
	r, err := login(patience)
	if err != nil || r.GetUser().GetUserId() != "ann" {
		t.Fatalf("up: %v, %v", r, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, _, err := websocket.Dial(ctx, "ws://"+w.Gateways[0].Addr+"/ws?token="+r.GetToken(), nil)
	if err != nil {
		t.Fatalf("the gateway does not take im-logic's token: %v", err)
	}
	_ = c.CloseNow()
	w.Logic.Set(Hang)
	if _, err := login(silence); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("hang: %v", err)
	}
	w.Logic.Set(Slow)
	if _, err := login(silence); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("slow: %v", err)
	}
	if r, err := login(patience); err != nil || r.GetToken() == "" {
		t.Errorf("slow, with patience: %v, %v", r, err)
	}
	w.Logic.Set(Wrong)
	if r, err := login(patience); err != nil || r.GetToken() != "" || r.GetUser() != nil {
		t.Errorf("wrong: %v, %v", r, err)
	}
	w.Logic.Set(Fails)
	if _, err := login(patience); status.Code(err) != codes.Internal {
		t.Errorf("fails: %v", err)
	}
	if n := w.Logic.Calls.Load() - calls; n != 6 {
		t.Errorf("%d calls were counted, want 6", n)
	}
}

func testGateway(t *testing.T, w *World, g *Gateway) {
	t.Run("looks", func(t *testing.T) {
		m, err := g.Metrics(t.Context())
		if err != nil || m["go_goroutines"] == 0 {
			t.Errorf("go_goroutines is %v, %v", m["go_goroutines"], err)
		}
		labelled := false
		for name := range m {
			labelled = labelled || strings.Contains(name, `="`)
		}
		if !labelled {
			t.Errorf("no metric has labels: %v", m)
		}
		if l, err := g.Ledger(t.Context()); err != nil || !l.Upstream.Balanced || l.Upstream.In == 0 {
			t.Errorf("ledger: %+v, %v", l, err)
		}
	})
	t.Run("freeze", func(t *testing.T) {
		must(t, g.Stop())
		ctx, cancel := context.WithTimeout(t.Context(), silence)
		defer cancel()
		if code, _, err := g.get(ctx, "/readyz"); err == nil {
			t.Errorf("a frozen gateway answered %d", code)
		}
		if !g.Alive() {
			t.Error("a frozen gateway counts as dead")
		}
		must(t, g.Cont())
		eventually(t, "ready", g.ready)
	})
	ends := func(t *testing.T, want int) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		if code, err := g.Wait(ctx); err != nil || code != want {
			t.Fatalf("exit code %d, %v; want %d\n%s", code, err, want, tail(g.Log()))
		}
		if g.Alive() {
			t.Error("it counts as alive")
		}
		if _, err := net.Dial("tcp", g.Addr); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial: %v, want it refused", err)
		}
	}
	t.Run("kill", func(t *testing.T) {
		pid, mark := g.Pid(), g.Mark()
		g.Kill()
		ends(t, -1)
		must(t, g.Start(t.Context()))
		if g.Pid() == pid || g.Mark() <= mark {
			t.Errorf("process %d after %d, log %d after %d bytes", g.Pid(), pid, g.Mark(), mark)
		}
		connects(t, g.Addr, "after-kill")
		connects(t, g.Front.Addr(), "after-kill")
	})
	t.Run("terminate", func(t *testing.T) {
		must(t, g.Term())
		ends(t, 0)
	})
	t.Run("settings", func(t *testing.T) {
		must(t, g.With(map[string]string{"http.max_requests": "7", "GOGC": "50", "ulimit": "1000"}).Start(t.Context()))
		env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", g.Pid()))
		must(t, err)
		for _, want := range []string{"IM_HTTP_MAX_REQUESTS=7", "GOGC=50", "IM_GATEWAY_ID=g1"} {
			if !strings.Contains(string(env), want+"\x00") {
				t.Errorf("the environment lacks %s", want)
			}
		}
		limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", g.Pid()))
		must(t, err)
		for line := range strings.Lines(string(limits)) {
			if f := strings.Fields(line); strings.HasPrefix(line, "Max open files") && f[3] != "1000" {
				t.Errorf("limit: %s", line)
			}
		}
		must(t, g.Term())
		ends(t, 0)
		must(t, g.With(nil).Start(t.Context()))
	})
	t.Run("does not start", func(t *testing.T) {
		if err := g.Start(t.Context()); err == nil {
			t.Error("a gateway that runs was started again")
		}
		bad := w.Gateways[1].With(map[string]string{"http.addr": "nonsense"})
		if err := bad.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "http.addr") {
			t.Errorf("start: %v, want an error that quotes the log", err)
		}
		bad.With(nil)
	})
}
