package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
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

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"im-gateway/codec/gatewaypb"
	"im-gateway/test/ports"
)

// logBuffer takes what a gateway writes.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write implements io.Writer.
func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// gateway is one running im-gateway.
type gateway struct {
	t                 *testing.T
	id                string
	addr, admin, grpc string
	log               *logBuffer
	cmd               *exec.Cmd
	done              chan struct{}
}

// settings are configuration keys and values; a name in capitals is an environment variable's, one that
// begins with - an argument's.
type settings map[string]string

// defaults make a gateway fast to start, to notice and to stop.
func defaults(id string) settings {
	return settings{
		"gateway_id": id, "http.addr": freeAddr(), "admin.addr": freeAddr(), "grpc.addr": freeAddr(),
		"auth.hs256_secret": secret, "kafka.brokers": strings.Join(env.brokers, ","), "redis.addrs": env.redis,
		"etcd.endpoints": strings.Join(env.etcd, ","), "kafka.start_grace": "100ms", "etcd.lease_ttl": "2s",
		"drain.window": "200ms", "log.level": "debug", "kafka.downstream_partitions": "2",
		"limits.logins_per_ip": "0", "limits.logins_per_name": "0",
	}
}

func freeAddr() string {
	addr, err := ports.Free()
	if err != nil {
		panic(err)
	}
	return addr
}

// launch starts a gateway without waiting. Values of change replace the defaults; "" removes one.
func launch(t *testing.T, id string, change settings) *gateway {
	t.Helper()
	s := defaults(id)
	for k, v := range change {
		s[k] = v
	}
	g := &gateway{t: t, id: id, addr: s["http.addr"], admin: s["admin.addr"], grpc: s["grpc.addr"], log: &logBuffer{}, done: make(chan struct{})}
	g.cmd = exec.Command(env.binary)
	for k, v := range s {
		switch {
		case v == "":
		case strings.HasPrefix(k, "-"):
			g.cmd.Args = append(g.cmd.Args, k, v)
		case k == strings.ToUpper(k):
			g.cmd.Env = append(g.cmd.Env, k+"="+v)
		default:
			g.cmd.Env = append(g.cmd.Env, "IM_"+strings.ToUpper(strings.ReplaceAll(k, ".", "_"))+"="+v)
		}
	}
	g.cmd.Env = append(g.cmd.Env, "PATH="+os.Getenv("PATH"), "HOME="+t.TempDir())
	g.cmd.Stdout, g.cmd.Stderr = g.log, g.log
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // Pdeathsig is tied to the thread that starts the process
		err := g.cmd.Start()
		started <- err
		if err == nil {
			_ = g.cmd.Wait()
		}
		close(g.done)
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	env.mu.Lock()
	env.logs = append(env.logs, g.log)
	env.mu.Unlock()
	t.Cleanup(func() {
		g.kill()
		if t.Failed() {
			name := filepath.Join(os.TempDir(), "im-e2e-"+strings.ReplaceAll(t.Name(), "/", "-")+"-"+id+".log")
			_ = os.WriteFile(name, []byte(g.log.String()), 0o600)
			t.Logf("log of %s: %s", id, name)
		}
	})
	return g
}

// start starts a gateway and waits until it is ready.
func start(t *testing.T, id string, change settings) *gateway {
	t.Helper()
	g := launch(t, id, change)
	eventually(t, "gateway "+id+" is ready", func() bool {
		select {
		case <-g.done:
			t.Fatalf("gateway %s ended:\n%s", id, g.log)
		default:
		}
		resp, err := http.Get("http://" + g.admin + "/readyz")
		if err != nil {
			return false
		}
		defer func() { _ = resp.Body.Close() }()
		return resp.StatusCode == http.StatusOK
	})
	return g
}

func (g *gateway) kill() {
	_ = g.cmd.Process.Signal(syscall.SIGKILL) // it may have ended
	<-g.done
}

// stop asks for a stop and returns the exit code.
func (g *gateway) stop() int {
	g.t.Helper()
	if err := g.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		g.t.Fatal(err)
	}
	return g.exit()
}

// exit waits for the end and returns the exit code.
func (g *gateway) exit() int {
	g.t.Helper()
	select {
	case <-g.done:
	case <-time.After(patience):
		g.t.Fatalf("gateway %s does not end:\n%s", g.id, g.log)
	}
	return g.cmd.ProcessState.ExitCode()
}

// service is a client of the gateway's gRPC service.
func (g *gateway) service() gatewaypb.GatewayServiceClient {
	g.t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+g.grpc, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = conn.Close() })
	return gatewaypb.NewGatewayServiceClient(conn)
}

// metric reads one metric, its labels as they stand in the text.
func (g *gateway) metric(name string) string {
	g.t.Helper()
	resp, err := http.Get("http://" + g.admin + "/metrics")
	if err != nil {
		g.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		g.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("it did not come true: %s", what)
		}
	}
}

// deadline is a context for calls that must end.
func deadline(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// createTopics makes the shared topics, as an operator does.
func createTopics(ctx context.Context) error {
	req := kmsg.NewPtrCreateTopicsRequest()
	req.TimeoutMillis = 10_000
	for _, name := range sharedTopics {
		t := kmsg.NewCreateTopicsRequestTopic()
		t.Topic, t.NumPartitions, t.ReplicationFactor = name, 2, 1
		req.Topics = append(req.Topics, t)
	}
	resp, err := req.RequestWith(ctx, env.kafka)
	if err != nil {
		return fmt.Errorf("create topics: %w", err)
	}
	for _, t := range resp.Topics {
		if err := kerr.ErrorForCode(t.ErrorCode); err != nil && t.ErrorCode != kerr.TopicAlreadyExists.Code {
			return fmt.Errorf("create topic %s: %w", t.Topic, err)
		}
	}
	return nil
}
