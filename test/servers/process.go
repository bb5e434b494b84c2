// Package servers starts the real servers that the gateway stands in front of, for tests: Apache
// Kafka, etcd and Redis, on free loopback ports, with data in a temporary directory, as child
// processes that end with the test's own.
package servers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// startTimeout is how long a server may take to answer.
const startTimeout = 60 * time.Second

// Process is one server that can be killed and started again on the same port and data.
type Process struct {
	name  string
	make  func() *exec.Cmd
	ready func(context.Context) error

	mu   sync.Mutex
	cmd  *exec.Cmd
	done chan struct{}
	log  *bytes.Buffer
}

// need says what to install when a program is missing.
func need(program, debianPackage string) error {
	if _, err := exec.LookPath(program); err != nil {
		return fmt.Errorf("the tests need %s: apt-get install %s (%w)", program, debianPackage, err)
	}
	return nil
}

// freePort returns a port of 127.0.0.1 that nobody listens on.
func freePort() (int, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	addr, ok := ln.Addr().(*net.TCPAddr)
	if !ok {
		return 0, errors.New("find a free port: no TCP address")
	}
	return addr.Port, ln.Close()
}

func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// Start starts the server and returns when it answers.
func (p *Process) Start(ctx context.Context) error {
	p.mu.Lock()
	cmd := p.make()
	out := &bytes.Buffer{}
	cmd.Stdout, cmd.Stderr = out, out
	// The server must not outlive the test, however that ends.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	done := make(chan struct{})
	started := make(chan error, 1)
	go func() {
		// Pdeathsig belongs to the thread that starts: one that waits with the process keeps it alive.
		lockThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended is in its output
		}
		close(done)
	}()
	err := <-started
	p.cmd, p.done, p.log = cmd, done, out
	p.mu.Unlock()
	if err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := p.ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-done:
			return fmt.Errorf("%s ended at its start:\n%s", p.name, tail(out))
		case <-ctx.Done():
			p.Kill()
			return fmt.Errorf("%s did not answer: %w\n%s", p.name, err, tail(out))
		}
	}
}

func tail(b *bytes.Buffer) string {
	const last = 4000
	text := b.Bytes()
	return string(text[max(0, len(text)-last):])
}

// Signal sends a signal, such as SIGSTOP or SIGCONT.
func (p *Process) Signal(s syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.cmd.Process.Signal(s); err != nil {
		return fmt.Errorf("signal %s: %w", p.name, err)
	}
	return nil
}

// Kill ends the server at once and waits for its end.
func (p *Process) Kill() {
	p.mu.Lock()
	cmd, done := p.cmd, p.done
	p.mu.Unlock()
	if cmd == nil || cmd.Process == nil {
		return
	}
	_ = cmd.Process.Signal(syscall.SIGKILL) // it may have ended already
	<-done
}

// dials is a readiness check: something listens.
func dials(addr string) func(context.Context) error {
	return func(ctx context.Context) error {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", addr)
		if err != nil {
			return fmt.Errorf("dial %s: %w", addr, err)
		}
		return c.Close()
	}
}
