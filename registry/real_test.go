//go:build real

package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/redis/rueidis"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// process is a server of this test.
type process struct {
	cmd    *exec.Cmd
	out    *bytes.Buffer
	exited chan struct{}
}

// launch starts a server; the test fails when the machine does not have it.
func launch(t testing.TB, debianPackage, name string, args ...string) *process {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s is missing and the tests of the real servers need it: apt-get install %s", name, debianPackage)
	}
	p := &process{cmd: exec.Command(path, args...), out: &bytes.Buffer{}, exited: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait()
		close(p.exited)
	}()
	return p
}

// kill ends the server as a crash would.
func (p *process) kill() {
	if p != nil {
		_ = p.cmd.Process.Kill()
		<-p.exited
	}
}

// await polls until the server answers.
func (p *process) await(t testing.TB, answers func(context.Context) error) {
	t.Helper()
	late := time.After(patience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		err := answers(ctx)
		cancel()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-p.exited:
			t.Fatalf("%s has ended: %s", p.cmd.Path, p.out)
		case <-late:
			t.Fatalf("%s does not answer in time: %v", p.cmd.Path, err)
		}
	}
}

// etcdServer is a real etcd on a free port.
type etcdServer struct {
	t          testing.TB
	dir        string
	port, peer int
	process    *process
}

func startEtcd(t testing.TB) *etcdServer {
	e := &etcdServer{t: t, dir: t.TempDir(), port: freePort(t), peer: freePort(t)}
	e.start()
	t.Cleanup(e.stop)
	return e
}

func (e *etcdServer) endpoint() string { return fmt.Sprintf("http://127.0.0.1:%d", e.port) }

func (e *etcdServer) start() {
	e.t.Helper()
	peer := fmt.Sprintf("http://127.0.0.1:%d", e.peer)
	e.process = launch(e.t, "etcd-server", "etcd", "--name", "test", "--data-dir", filepath.Join(e.dir, "data"),
		"--heartbeat-interval", "10", "--election-timeout", "100",
		"--listen-client-urls", e.endpoint(), "--advertise-client-urls", e.endpoint(),
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "test="+peer)
	e.process.await(e.t, func(ctx context.Context) error {
		// A client of its own each time: one that was refused once waits before it tries again.
		c, err := clientv3.New(clientv3.Config{Endpoints: []string{e.endpoint()}, Logger: zap.NewNop()})
		if err != nil {
			return err
		}
		_, err = c.Status(ctx, e.endpoint()) // answered without a login, too
		return errors.Join(err, c.Close())
	})
}

func (e *etcdServer) stop() {
	e.process.kill()
	e.process = nil
}

func (e *etcdServer) wipe() {
	if err := os.RemoveAll(filepath.Join(e.dir, "data")); err != nil {
		e.t.Fatal(err)
	}
}

// redisServer is a real Redis on a free port, without persistence.
type redisServer struct {
	t        testing.TB
	port     int
	password string
	args     []string
	process  *process
}

func startRedis(t testing.TB, password string) *redisServer { return startRedisWith(t, password) }

func startRedisWith(t testing.TB, password string, args ...string) *redisServer {
	t.Helper()
	r := &redisServer{t: t, port: freePort(t), password: password, args: append([]string{"--dir", t.TempDir()}, args...)}
	r.start()
	t.Cleanup(r.stop)
	return r
}

func (r *redisServer) addr() string { return fmt.Sprintf("127.0.0.1:%d", r.port) }

func (r *redisServer) start() {
	r.t.Helper()
	args := append([]string{"--bind", "127.0.0.1", "--port", strconv.Itoa(r.port), "--save", "", "--appendonly", "no"}, r.args...)
	if r.password != "" {
		args = append(args, "--requirepass", r.password)
	}
	r.process = launch(r.t, "redis-server", "redis-server", args...)
	r.process.await(r.t, func(ctx context.Context) error { return r.do(ctx, "PING").Error() })
}

func (r *redisServer) stop() {
	r.process.kill()
	r.process = nil
}

// do sends one command to this very server.
func (r *redisServer) do(ctx context.Context, args ...string) rueidis.RedisResult {
	c, err := DialRedis(RedisOptions{Addrs: []string{r.addr()}, Password: r.password})
	if err != nil {
		return rueidis.NewErrorResult(err)
	}
	defer c.Close()
	return c.Do(ctx, c.B().Arbitrary(args...).Build())
}
