package servers

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// startTimeout is how long a server may take to answer.
const startTimeout = 3 * time.Minute

// Process is one server that can be killed and started again on the same port and data. Its methods
// may be called from any goroutine.
type Process struct {
	name  string
	make  func() *exec.Cmd
	ready func(context.Context) error

	mu   sync.Mutex
	cmd  *exec.Cmd
	done chan struct{} // closed when cmd has ended
}

// program is what a server needs, and where Debian has it.
type program struct{ name, debianPackage string }

// need says what to install when programs are missing.
func need(programs ...program) error {
	var names, packages []string
	for _, p := range programs {
		if _, err := exec.LookPath(p.name); err != nil {
			names, packages = append(names, p.name), append(packages, p.debianPackage)
		}
	}
	if len(names) == 0 {
		return nil
	}
	return fmt.Errorf("the tests on real servers need %s: apt-get install %s",
		strings.Join(names, " and "), strings.Join(packages, " "))
}

func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// Start starts the server and returns when it answers.
func (p *Process) Start(ctx context.Context) error {
	cmd, out, done := p.make(), &output{}, make(chan struct{})
	cmd.Stdout, cmd.Stderr = out, out
	// The server must not outlive the test, however that ends.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	started := make(chan error, 1)
	go func() {
		defer close(done)
		// Pdeathsig strikes when the thread that started the process ends: this one waits with it.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended is in its output
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	p.mu.Lock()
	p.cmd, p.done = cmd, done
	p.mu.Unlock()
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
			return fmt.Errorf("%s ended at its start:\n%s", p.name, out.tail())
		case <-ctx.Done():
			p.Kill()
			return fmt.Errorf("%s did not answer: %w\n%s", p.name, err, out.tail())
		}
	}
}

// Freeze stops the server without ending it: its connections stay and nothing answers.
func (p *Process) Freeze() error { return p.signal(syscall.SIGSTOP) }

// Thaw lets a frozen server go on.
func (p *Process) Thaw() error { return p.signal(syscall.SIGCONT) }

func (p *Process) signal(s syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.cmd.Process.Signal(s); err != nil {
		return fmt.Errorf("send %v to %s: %w", s, p.name, err)
	}
	return nil
}

// Kill ends the server at once and waits for its end. It may be called more than once.
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

// output keeps the end of what a server prints.
type output struct {
	mu sync.Mutex
	b  []byte
}

const outputTail = 8 << 10

// Write implements io.Writer.
func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.b = append(o.b, p...)
	if len(o.b) > 4*outputTail {
		o.b = append(o.b[:0], o.b[len(o.b)-outputTail:]...)
	}
	return len(p), nil
}

func (o *output) tail() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.b[max(0, len(o.b)-outputTail):])
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
