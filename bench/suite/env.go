package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"im-gateway/bench/report"
	"im-gateway/bench/shards"
	"im-gateway/test/ports"
	"im-gateway/test/servers"
)

// env is what the measures share.
type env struct {
	bin, dir, out, secret string

	kafka *servers.Kafka
	etcd  *servers.Etcd
	redis *servers.Redis
}

// server is one process that is measured.
type server struct {
	cmd *exec.Cmd
	url string
	log *bytes.Buffer
}

// start runs a server and waits until ready answers.
func (e *env) start(ctx context.Context, ready func() bool, url string, environ []string, name string, args ...string) (*server, error) {
	s := &server{cmd: exec.Command(filepath.Join(e.bin, name), args...), url: url, log: new(bytes.Buffer)}
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	s.cmd.Env = append(os.Environ(), environ...)
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
		if ready() {
			return s, nil
		}
	}
	s.stop()
	return nil, fmt.Errorf("%s was not ready within 30 s: %s", name, s.log.String())
}

func (s *server) stop() {
	_ = s.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	done := make(chan struct{})
	go func() { _ = s.cmd.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		_ = s.cmd.Process.Kill()
		<-done
	}
}

func answers(url string) func() bool {
	return func() bool {
		r, err := http.Get(url) //nolint:gosec,noctx // loopback
		if err != nil {
			return false
		}
		_ = r.Body.Close()
		return r.StatusCode == http.StatusOK
	}
}

func dials(addr string) func() bool {
	return func() bool {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return false
		}
		_ = c.Close()
		return true
	}
}

// gateway starts the n-th gateway.
func (e *env) gateway(ctx context.Context, n int) (*server, error) {
	var addr [3]string
	for i := range addr {
		var err error
		if addr[i], err = ports.Free(); err != nil {
			return nil, err
		}
	}
	return e.start(ctx, answers("http://"+addr[1]+"/readyz"), "ws://"+addr[0]+"/ws", []string{
		"IM_GATEWAY_ID=bench-" + strconv.Itoa(n), "IM_HTTP_ADDR=" + addr[0], "IM_ADMIN_ADDR=" + addr[1], "IM_GRPC_ADDR=" + addr[2],
		"IM_AUTH_HS256_SECRET=" + e.secret, "IM_KAFKA_BROKERS=" + e.kafka.Broker, "IM_KAFKA_CREATE_SHARED_TOPICS=true",
		"IM_KAFKA_START_GRACE=0s", "IM_KAFKA_SHARED_PARTITIONS=4", "IM_REDIS_ADDRS=" + e.redis.Addr, "IM_ETCD_ENDPOINTS=" + e.etcd.Endpoint,
		"IM_LOG_LEVEL=warn", "IM_DRAIN_WINDOW=0s",
	}, "im-gateway")
}

func (e *env) seed(ctx context.Context) (*server, error) {
	addr, err := ports.Free()
	if err != nil {
		return nil, err
	}
	admin, err := ports.Free()
	if err != nil {
		return nil, err
	}
	return e.start(ctx, answers("http://"+admin+"/readyz"), "ws://"+addr+"/ws", nil, "peers/seed",
		"-addr", addr, "-admin", admin, "-gateway-id", "seed-1", "-secret", e.secret, "-kafka", e.kafka.Broker, "-redis", e.redis.Addr,
		"-upstream-partitions", "4", "-downstream-partitions", "1")
}

func (e *env) echo(ctx context.Context, name string, args ...string) (*server, error) {
	addr, err := ports.Free()
	if err != nil {
		return nil, err
	}
	return e.start(ctx, dials(addr), "ws://"+addr+"/ws", nil, name, append(args, "-addr", addr)...)
}

// subject is a program, or several of it, that is measured.
type subject struct {
	name  string
	start func(ctx context.Context, e *env) ([]*server, error)
	// alone measures without im-bench and servers.
	alone func(ctx context.Context, e *env) (map[string]float64, error)
}

func one(name string, start func(ctx context.Context, e *env) (*server, error)) subject {
	return subject{name: name, start: func(ctx context.Context, e *env) ([]*server, error) {
		s, err := start(ctx, e)
		if err != nil {
			return nil, err
		}
		return []*server{s}, nil
	}}
}

func gateways(k int) subject {
	name := "gateway"
	if k > 1 {
		name = fmt.Sprintf("%d gateways", k)
	}
	return subject{name: name, start: func(ctx context.Context, e *env) ([]*server, error) {
		var list []*server
		for n := range k {
			s, err := e.gateway(ctx, n+1)
			if err != nil {
				for _, s := range list {
					s.stop()
				}
				return nil, err
			}
			list = append(list, s)
		}
		return list, nil
	}}
}

func echoer(name, program string, args ...string) subject {
	return one(name, func(ctx context.Context, e *env) (*server, error) { return e.echo(ctx, program, args...) })
}

var seed = one("seed stack", func(ctx context.Context, e *env) (*server, error) { return e.seed(ctx) })

// measure runs one scenario against one subject and returns its figures by name.
func (e *env) measure(ctx context.Context, m measure, s subject, file string) (map[string]float64, error) {
	if s.alone != nil {
		return s.alone(ctx, e)
	}
	list, err := s.start(ctx, e)
	if err != nil {
		return nil, err
	}
	defer func() {
		for _, x := range list {
			x.stop()
		}
	}()
	var urls, pids []string
	for _, x := range list {
		urls = append(urls, x.url)
		pids = append(pids, strconv.Itoa(x.cmd.Process.Pid))
	}
	args := append(strings.Fields(m.args), "-url", strings.Join(urls, ","), "-pid", strings.Join(pids, ","), "-json", file, "-label", s.name)
	if m.kafka {
		args = append(args, "-kafka", e.kafka.Broker)
	}
	var log bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(e.bin, "im-bench"), args...)
	cmd.Env = append(os.Environ(), "IM_AUTH_HS256_SECRET="+e.secret)
	cmd.Stdout, cmd.Stderr = &log, &log
	syscalls := func() (map[string]float64, error) { return nil, nil }
	if m.strace > 0 {
		syscalls = e.countSyscalls(pids[0], m.strace)
	}
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("im-bench %s: %w\n%s\nthe server said: %s", strings.Join(args, " "), err, log.String(), list[0].log.String())
	}
	counted, err := syscalls()
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read the report: %w", err)
	}
	var set report.Set
	if err := json.Unmarshal(b, &set); err != nil || len(set.Runs) == 0 {
		return nil, fmt.Errorf("read the report %s: %d runs, %w", file, len(set.Runs), err)
	}
	values := map[string]float64{}
	for _, v := range set.Runs[0].Values {
		values[v.Name] = v.Value
	}
	for name, n := range counted {
		values[name] = n / m.rate
	}
	return values, nil
}

// countSyscalls attaches strace to a server for two seconds, late enough for the load to run, and
// returns the calls per second by name.
func (e *env) countSyscalls(pid string, after time.Duration) func() (map[string]float64, error) {
	const span = 2 * time.Second
	type outcome struct {
		calls map[string]float64
		err   error
	}
	done := make(chan outcome, 1)
	go func() {
		time.Sleep(after)
		file := filepath.Join(e.dir, "strace.txt")
		cmd := exec.Command("strace", "-c", "-f", "-q", "-o", file, "-p", pid)
		if err := cmd.Start(); err != nil {
			done <- outcome{err: fmt.Errorf("count system calls (apt-get install strace): %w", err)}
			return
		}
		time.Sleep(span)
		_ = cmd.Process.Signal(os.Interrupt) // it prints the table and ends
		_ = cmd.Wait()                       // with the interrupt's status
		b, err := os.ReadFile(file)
		calls := map[string]float64{}
		for _, m := range straceLine.FindAllStringSubmatch(string(b), -1) {
			n, _ := strconv.ParseFloat(m[1], 64) // digits
			calls["calls of "+m[2]] += n / span.Seconds()
		}
		done <- outcome{calls, err}
	}()
	return func() (map[string]float64, error) { o := <-done; return o.calls, o.err }
}

// "% time  seconds  usecs/call  calls  [errors]  syscall"
var straceLine = regexp.MustCompile(`(?m)^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$`)

// bareSarama is Kafka to Kafka's client with nothing between.
func bareSarama(ctx context.Context, e *env) (map[string]float64, error) {
	var v struct {
		P50 float64 `json:"p50_us"`
		P99 float64 `json:"p99_us"`
	}
	err := e.tool(ctx, &v, "peers/sarama", "-kafka", e.kafka.Broker, "-rate", "500", "-seconds", "10", "-flush", "1ms")
	return map[string]float64{"pushed p50": v.P50 / 1000, "pushed p99": v.P99 / 1000}, err
}

// rawWrite is plain write(2) to the connections of a fan-out, read by the same clients.
func rawWrite(ctx context.Context, e *env) (map[string]float64, error) {
	addr, err := ports.Free()
	if err != nil {
		return nil, err
	}
	s, err := e.start(ctx, dials(addr), "ws://"+addr+"/ws", nil, "peers/rawwrite", "-addr", addr, "-conns", "10000", "-targets", "500",
		"-rounds", "120", "-rate", "20", "-size", "256")
	if err != nil {
		return nil, err
	}
	bench := exec.CommandContext(ctx, filepath.Join(e.bin, "im-bench"), "idle", "-plain", "-users", "10000", "-steps", "2", "-warmup", "0s",
		"-duration", "10s", "-url", s.url)
	out, err := bench.CombinedOutput()
	s.stop()
	if err != nil {
		return nil, fmt.Errorf("clients of rawwrite: %w\n%s", err, out)
	}
	var v struct {
		CPU float64 `json:"cpu_us_per_write"`
	}
	printed := s.log.Bytes()
	if err := json.Unmarshal(printed[max(0, bytes.IndexByte(printed, '{')):], &v); err != nil {
		return nil, fmt.Errorf("rawwrite had not finished: %w: %s", err, printed)
	}
	return map[string]float64{"server CPU per push": v.CPU}, nil
}

// tool runs a program that prints JSON.
func (e *env) tool(ctx context.Context, into any, name string, args ...string) error {
	b, err := exec.CommandContext(ctx, filepath.Join(e.bin, name), args...).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := json.Unmarshal(b[max(0, bytes.IndexByte(b, '{')):], into); err != nil { // it may say first where it listens
		return fmt.Errorf("%s printed no JSON: %w", name, err)
	}
	return nil
}

func shardsAlone(ctx context.Context, _ *env) (map[string]float64, error) {
	r, err := shards.Run(ctx, shards.Options{})
	if err != nil {
		return nil, err
	}
	return map[string]float64{
		"heap bytes per session": r.BytesPerSession, "ns per message": r.NsPerMessage,
		"ns per push": r.NsPerPush, "ns per target": r.NsPerTarget,
		"tick p99, ms": float64(r.TickP99) / float64(time.Millisecond), "longest tick, ms": float64(r.TickMax) / float64(time.Millisecond),
	}, nil
}
