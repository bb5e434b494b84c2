package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// patience is how long a block may take; what it builds has been built before, mostly.
	patience = 5 * time.Minute
	// atOnce is how many documents are run at a time, where their networks are apart: they wait a lot.
	atOnce = 2
	// soon is how long something that others bring about may take.
	soon = time.Minute
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	room := 1
	if ownNetwork(ctx) != nil {
		room = atOnce
	}
	var failed atomic.Bool
	var all sync.WaitGroup
	free := make(chan struct{}, room)
	for _, path := range os.Args[1:] {
		free <- struct{}{}
		all.Go(func() {
			defer func() { <-free }()
			if err := try(ctx, path); err != nil {
				fmt.Fprintf(os.Stderr, "docs: %v\n", err)
				failed.Store(true)
			}
		})
	}
	all.Wait()
	if failed.Load() || len(os.Args) == 1 {
		os.Exit(1)
	}
}

// try runs the blocks of one document.
func try(ctx context.Context, path string) (err error) {
	blocks, err := readBlocks(path)
	if err != nil {
		return err
	}
	dir, err := clone(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(filepath.Dir(dir))) }()
	if err := takeAlong(dir); err != nil {
		return errors.Join(err, os.RemoveAll(filepath.Dir(dir)))
	}
	s := &session{path: path, dir: dir, wrap: ownNetwork(ctx)}
	defer s.stop()
	if err := s.begin(ctx); err != nil {
		return err
	}
	var last string
	count := map[mode]int{}
	for _, b := range blocks {
		count[b.mode]++
		began := time.Now()
		switch b.mode {
		case run:
			last, err = s.run(ctx, b)
		case background:
			last, err = s.start(ctx, b)
		case output:
			if err = matches(last, b.text); err != nil {
				err = fmt.Errorf("%w\nit printed:\n%s", err, last)
			}
		case outputLater:
			err = s.printsLater(b)
		case notRun, ignored:
		}
		if err != nil {
			return fmt.Errorf("%s:%d: %w", path, b.line, err)
		}
		if b.mode == run || b.mode == background {
			fmt.Printf("%s:%d: ok, %s\n", path, b.line, time.Since(began).Round(100*time.Millisecond))
		}
	}
	fmt.Printf("%s: %d blocks run, %d outputs compared, %d not run\n", path, count[run]+count[background], count[output]+count[outputLater], count[notRun])
	return nil
}

// clone makes a clone of the repository as it is committed, and returns its directory.
func clone(ctx context.Context) (string, error) {
	parent, err := os.MkdirTemp("", "docs-")
	if err != nil {
		return "", fmt.Errorf("temporary directory: %w", err)
	}
	dir := filepath.Join(parent, "im-gateway")
	if out, err := exec.CommandContext(ctx, "git", "clone", "-q", ".", dir).CombinedOutput(); err != nil {
		return "", errors.Join(fmt.Errorf("clone the repository: %w: %s", err, out), os.RemoveAll(parent))
	}
	return dir, nil
}

// takeAlong links into a clone what git does not hold but building and fetching leave, as in the directory of
// somebody who has done so before: programs that need no linking again, and Kafka's jars.
func takeAlong(clone string) error {
	for _, name := range []string{"bin", ".cache"} {
		if _, err := os.Stat(name); err != nil {
			continue // not built, or not fetched, yet
		}
		if out, err := exec.Command("cp", "-a", name, filepath.Join(clone, name)).CombinedOutput(); err != nil {
			return fmt.Errorf("take %s along: %w: %s", name, err, out)
		}
	}
	return nil
}

// ownNetwork returns the command that gives another one a network of its own, with loopback alone; none where
// that is not allowed.
func ownNetwork(ctx context.Context) []string {
	wrap := []string{"unshare", "--net", "--"}
	if exec.CommandContext(ctx, wrap[0], append(wrap[1:], "ip", "link", "set", "lo", "up")...).Run() != nil {
		return nil
	}
	return wrap
}

// session is one document's shell, whose variables and directory go on from block to block, and what it has
// started.
type session struct {
	path, dir string
	wrap      []string

	holder  *exec.Cmd // keeps the network
	started []*exec.Cmd
	printed *printer // by what was started last
}

// begin makes the network.
func (s *session) begin(ctx context.Context) error {
	if s.wrap == nil {
		return nil
	}
	s.holder = exec.CommandContext(ctx, s.wrap[0], append(s.wrap[1:], "sh", "-c", "ip link set lo up && echo up && exec sleep 3600")...)
	out, err := s.holder.StdoutPipe()
	if err != nil {
		return fmt.Errorf("make a network: %w", err)
	}
	if err := s.holder.Start(); err != nil {
		return fmt.Errorf("make a network: %w", err)
	}
	if _, err := out.Read(make([]byte, 8)); err != nil {
		return fmt.Errorf("make a network: %w", err)
	}
	s.wrap = []string{"nsenter", "--net=" + fmt.Sprintf("/proc/%d/ns/net", s.holder.Process.Pid), "--"}
	return nil
}

// keepState takes over what the shell before has left in a file, and leaves the same at the end.
const keepState = `set -eo pipefail
state=%q
[ ! -f "$state" ] || . "$state"
leave() {
	code=$?
	for v in $(compgen -v); do
		case $v in BASH*|DIRSTACK|EPOCH*|EUID|FUNCNAME|GROUPS|LINENO|PIPESTATUS|PPID|RANDOM|SECONDS|SHELLOPTS|SRANDOM|UID|_|code|v) ;;
		*) declare -p "$v" ;;
		esac
	done >"$state"
	echo "cd '$PWD'" >>"$state"
	exit $code
}
trap leave EXIT
`

// shell is bash in the state that the blocks before have left: their directory and their variables.
func (s *session) shell(ctx context.Context, text string) *exec.Cmd {
	state := filepath.Join(filepath.Dir(s.dir), "state")
	script := fmt.Sprintf(keepState, state) + text
	args := append(append([]string(nil), s.wrap...), "bash", "-c", script)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir = s.dir
	cmd.Env = append(os.Environ(), "GOFLAGS=-trimpath") // what was built in one clone counts for all
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// run runs a block and returns what it printed.
func (s *session) run(ctx context.Context, b block) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	end := time.Now().Add(soon)
	for {
		out, err := s.shell(ctx, b.text).CombinedOutput()
		printed := string(out)
		switch {
		case err == nil && strings.Contains(printed, b.until):
			return printed, nil
		case b.until == "" || time.Now().After(end) || ctx.Err() != nil:
			return printed, fmt.Errorf("%s\n%s%w", b.text, printed, errors.Join(err, context.Cause(ctx)))
		}
		time.Sleep(500 * time.Millisecond)
	}
}

// printer collects what a process prints.
type printer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write implements io.Writer.
func (p *printer) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.b.Write(b)
}

// String returns what has been printed.
func (p *printer) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.b.String()
}

// start starts a block that runs on, and returns what it had printed when it was ready.
func (s *session) start(ctx context.Context, b block) (string, error) {
	out := new(printer)
	cmd := s.shell(ctx, b.text)
	cmd.Stdout, cmd.Stderr = out, out
	if _, err := cmd.StdinPipe(); err != nil { // as a terminal's, it does not end
		return "", fmt.Errorf("start: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return "", fmt.Errorf("start: %w", err)
	}
	s.started, s.printed = append(s.started, cmd), out
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	late := time.After(patience)
	for !strings.Contains(out.String(), b.until) {
		select {
		case err := <-ended:
			return out.String(), fmt.Errorf("%s\n%sit ended before it printed %q: %w", b.text, out.String(), b.until, err)
		case <-late:
			return out.String(), fmt.Errorf("%s\n%sit has not printed %q", b.text, out.String(), b.until)
		case <-time.After(100 * time.Millisecond):
		}
	}
	return out.String(), nil
}

// printsLater waits until what was started last has printed a block.
func (s *session) printsLater(b block) error {
	if s.printed == nil {
		return errors.New("nothing was started that could have printed this")
	}
	for end := time.Now().Add(soon); ; time.Sleep(100 * time.Millisecond) {
		printed := s.printed.String()
		err := matches(printed, b.text)
		if err == nil {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%w\nit printed:\n%s", err, printed)
		}
	}
}

// stop ends what was started, as Ctrl-C does, then for good.
func (s *session) stop() {
	for _, cmd := range s.started {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) // it may have ended
	}
	for _, cmd := range s.started {
		for end := time.Now().Add(20 * time.Second); syscall.Kill(-cmd.Process.Pid, 0) == nil; time.Sleep(50 * time.Millisecond) {
			if time.Now().After(end) {
				_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			}
		}
	}
	if s.holder != nil && s.holder.Process != nil {
		_ = s.holder.Process.Kill()
		_ = s.holder.Wait()
	}
}
