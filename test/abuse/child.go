package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"im-gateway/test/abuse/attack"
	"im-gateway/test/abuse/users"
)

// The two sides run in processes of their own, which are this program again. They are told what to do by
// JSON on their standard input and answer by JSON on their standard output.
const (
	roleUsers     = "users"
	roleAttackers = "attackers"
)

// What the users are asked for.
const (
	askWindow = "window" // end a window
	askSettle = "settle" // begin nothing new, wait for what is outstanding, end a window
)

// started is a child's first answer.
type started struct{ Error string }

func startedBy(err error) started {
	if err == nil {
		return started{}
	}
	return started{Error: err.Error()}
}

// serveUsers is the users' process. It ends with its input.
func serveUsers(ctx context.Context, in io.Reader, out io.Writer) error {
	asks, answers := json.NewDecoder(in), json.NewEncoder(out)
	var o users.Options
	if err := asks.Decode(&o); err != nil {
		return fmt.Errorf("users: options: %w", err)
	}
	g, err := users.Start(ctx, o)
	if aerr := answers.Encode(startedBy(err)); err != nil || aerr != nil {
		return errors.Join(err, aerr)
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { defer close(done); g.Run(ctx) }()
	for err == nil {
		var ask string
		if err = asks.Decode(&ask); err == nil {
			err = answers.Encode(g.Window(ask == askSettle))
		}
	}
	cancel()
	<-done
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return errors.Join(err, g.Close())
}

// serveAttackers is the attackers' process. The attack ends with its input.
func serveAttackers(ctx context.Context, in io.Reader, out io.Writer) error {
	asks, answers := json.NewDecoder(in), json.NewEncoder(out)
	var spec attack.Spec
	if err := asks.Decode(&spec); err != nil {
		return fmt.Errorf("attackers: spec: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer cancel()
		var none struct{}
		_ = asks.Decode(&none) // the end of the input
	}()
	ready := make(chan error, 1)
	result, err := attack.Run(ctx, spec, func() { ready <- answers.Encode(started{}) })
	if err != nil {
		return errors.Join(err, answers.Encode(startedBy(err)))
	}
	return errors.Join(<-ready, answers.Encode(result))
}

// child is the coordinator's side of a process.
type child struct {
	role    string
	cmd     *exec.Cmd
	in      io.WriteCloser
	asks    *json.Encoder
	answers *json.Decoder
	done    chan struct{}
}

// startChild starts a process and gives it its first input. Its first answer is still to be read.
func startChild(role string, first any) (*child, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("start the %s: %w", role, err)
	}
	c := &child{role: role, cmd: exec.Command(exe, "-role", role), done: make(chan struct{})}
	c.cmd.Stderr = os.Stderr
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("start the %s: %w", role, err)
	}
	r, w := io.Pipe()
	c.cmd.Stdout = w
	c.asks, c.answers = json.NewEncoder(c.in), json.NewDecoder(bufio.NewReader(r))
	failed := make(chan error, 1)
	go func() {
		defer close(c.done)
		runtime.LockOSThread() // Pdeathsig is tied to the thread that starts the process
		err := c.cmd.Start()
		failed <- err
		if err == nil {
			_ = w.CloseWithError(errors.Join(c.cmd.Wait(), io.EOF))
		}
	}()
	if err := <-failed; err != nil {
		return nil, fmt.Errorf("start the %s: %w", role, err)
	}
	if err := c.asks.Encode(first); err != nil {
		c.kill()
		return nil, fmt.Errorf("start the %s: %w", role, err)
	}
	return c, nil
}

// started reads the first answer.
func (c *child) started() error {
	var s started
	if err := c.answers.Decode(&s); err != nil {
		return fmt.Errorf("the %s do not start: %w", c.role, err)
	}
	if s.Error != "" {
		return fmt.Errorf("the %s do not start: %s", c.role, s.Error)
	}
	return nil
}

// answer reads an answer.
func (c *child) answer(into any) error {
	if err := c.answers.Decode(into); err != nil {
		return fmt.Errorf("the %s do not answer: %w", c.role, err)
	}
	return nil
}

// end ends the input and waits for the process to follow; one that does not is killed.
func (c *child) end() {
	_ = c.in.Close()
	select {
	case <-c.done:
	case <-time.After(20 * time.Second):
		c.kill()
	}
}

func (c *child) kill() {
	_ = c.cmd.Process.Kill()
	<-c.done
}

// window asks the users for a window.
func (c *child) window(ask string) (w users.Window, err error) {
	if err = c.asks.Encode(ask); err == nil {
		err = c.answer(&w)
	}
	return w, err
}
