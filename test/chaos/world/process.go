package world

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"im-gateway/test/ports"
)

// Process is a child process that can be ended and started again. Its methods may be called from any
// goroutine.
type Process struct {
	name  string
	log   string // file that its output is appended to
	make  func() *exec.Cmd
	ready func(context.Context) error

	mu   sync.Mutex
	cmd  *exec.Cmd
	done chan struct{} // closed when cmd has ended
}

const startTimeout = 90 * time.Second

// Start starts it and returns when it is ready; one that does not become ready is killed.
func (p *Process) Start(ctx context.Context) error {
	if err := p.launch(); err != nil {
		return err
	}
	p.mu.Lock()
	done := p.done
	p.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		err := p.ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-done:
			return fmt.Errorf("%s ended at its start: %w\n%s", p.name, err, tail(p.log))
		case <-ctx.Done():
			p.Kill()
			return fmt.Errorf("%s is not ready: %w\n%s", p.name, err, tail(p.log))
		}
	}
}

// launch starts it without waiting. One that runs is an error.
func (p *Process) launch() error {
	if p.Alive() {
		return fmt.Errorf("start %s: it runs", p.name)
	}
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("log of %s: %w", p.name, err)
	}
	cmd, done, started := p.make(), make(chan struct{}), make(chan error, 1)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	go func() {
		defer close(done)
		defer func() { _ = out.Close() }()
		runtime.LockOSThread() // Pdeathsig is tied to the thread that starts the process
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // ExitCode says how it ended
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cmd, p.done = cmd, done
	return nil
}

func (p *Process) signal(s syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return fmt.Errorf("%s was not started", p.name)
	}
	if err := p.cmd.Process.Signal(s); err != nil {
		return fmt.Errorf("send %v to %s: %w", s, p.name, err)
	}
	return nil
}

// Kill ends it by SIGKILL and waits for the end. One that has ended is no error.
func (p *Process) Kill() {
	_ = p.signal(syscall.SIGKILL)
	p.mu.Lock()
	done := p.done
	p.mu.Unlock()
	if done != nil {
		<-done
	}
}

// Stop freezes it, Cont lets it go on, Term asks it to end.
func (p *Process) Stop() error { return p.signal(syscall.SIGSTOP) }

// Cont lets a frozen process go on.
func (p *Process) Cont() error { return p.signal(syscall.SIGCONT) }

// Term asks it to end.
func (p *Process) Term() error { return p.signal(syscall.SIGTERM) }

// Wait returns the exit code, -1 after a signal, when it has ended.
func (p *Process) Wait(ctx context.Context) (int, error) {
	p.mu.Lock()
	done, cmd := p.done, p.cmd
	p.mu.Unlock()
	if done == nil {
		return 0, fmt.Errorf("%s was not started", p.name)
	}
	select {
	case <-done:
		return cmd.ProcessState.ExitCode(), nil
	case <-ctx.Done():
		return 0, fmt.Errorf("%s does not end: %w", p.name, ctx.Err())
	}
}

// Alive tells whether it runs, frozen or not.
func (p *Process) Alive() bool {
	p.mu.Lock()
	done := p.done
	p.mu.Unlock()
	if done == nil {
		return false
	}
	select {
	case <-done:
		return false
	default:
		return true
	}
}

// Pid is the process's id; 0: it was not started.
func (p *Process) Pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil || p.cmd.Process == nil {
		return 0
	}
	return p.cmd.Process.Pid
}

// Log is the file with all its output.
func (p *Process) Log() string { return p.log }

// tail is the end of a file.
func tail(name string) string {
	const most = 4 << 10
	f, err := os.Open(name)
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }()
	if size, err := f.Seek(0, io.SeekEnd); err == nil {
		_, _ = f.Seek(max(0, size-most), io.SeekStart)
	}
	b, _ := io.ReadAll(f)
	return string(b)
}

func freeAddrs(into ...*string) error {
	for _, a := range into {
		var err error
		if *a, err = ports.Free(); err != nil {
			return err
		}
	}
	return nil
}

// dials is a readiness check: something listens.
func dials(addr string) func(context.Context) error {
	return func(ctx context.Context) error {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", addr)
		if err != nil {
			return err
		}
		return c.Close()
	}
}

func need(programs ...string) error {
	var errs []error
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			errs = append(errs, fmt.Errorf("the fault suite needs %s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}

func portOf(addr string) int {
	_, port, _ := net.SplitHostPort(addr)
	n, _ := strconv.Atoi(port)
	return n
}
