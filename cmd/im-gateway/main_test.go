package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"im-gateway/engine"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// gnet starts a worker pool that lives as long as the process.
		goleak.IgnoreAnyFunction("github.com/panjf2000/ants/v2.(*poolCommon).purgeStaleWorkers"),
		goleak.IgnoreAnyFunction("github.com/panjf2000/ants/v2.(*poolCommon).ticktock"))
}

const secret = "IM_AUTH_HS256_SECRET=0123456789abcdef0123456789abcdef"

// fakeGateway drains until its drained channel is closed.
type fakeGateway struct {
	running  chan struct{}
	drained  chan struct{}
	aborted  chan struct{}
	reloaded chan struct{}
	err      error // of Run
}

func newFake() *fakeGateway {
	return &fakeGateway{running: make(chan struct{}), drained: make(chan struct{}), aborted: make(chan struct{}),
		reloaded: make(chan struct{}, 1)}
}

func (g *fakeGateway) Run(ctx context.Context) error {
	close(g.running)
	if g.err != nil {
		return g.err
	}
	<-ctx.Done()
	select {
	case <-g.drained:
		return nil
	case <-g.aborted:
		return errors.New("aborted")
	}
}

func (g *fakeGateway) Abort() { close(g.aborted) }

func (g *fakeGateway) Reload() { g.reloaded <- struct{}{} }

// result is what a run of the command left.
type result struct {
	code           int
	stdout, stderr string
}

func (r *result) String() string { return r.stdout + r.stderr }

func runWith(t *testing.T, args, environ []string, gw *fakeGateway, startErr error, in signals) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	code := run(args, environ, &stdout, &stderr, in, func(*engine.Loaded, zerolog.Logger) (gateway, error) {
		if gw == nil && startErr == nil {
			t.Error("the gateway was started")
		}
		return gw, startErr
	})
	return result{code, stdout.String(), stderr.String()}
}

func TestCommandLine(t *testing.T) {
	file := filepath.Join(t.TempDir(), "g.yaml")
	if err := os.WriteFile(file, []byte("log: {level: debug}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name    string
		args    string
		environ string
		code    int
		stdout  string
		stderr  string
	}{
		{"help", "-h", "", 0, "* log.level  ", ""},
		{"help word", "help", "", 0, "Usage:", ""},
		{"help of config", "config -h", "", 0, "Usage:", ""},
		{"help after keys", "-log.level=debug --help", "", 0, "Usage:", ""},
		{"version", "-version", "", 0, "im-gateway ", ""},
		{"version with double dash", "--version", "", 0, ", go1.", ""},
		{"version word", "version", "", 0, "im-gateway ", ""},
		{"reference", "config reference", "", 0, "# Configuration", ""},
		{"check", "config check", secret, 0, "the configuration is good", ""},
		{"check warns", "config check", "IM_AUTH_HS256_SECRET=short", 0, "good", "warning: auth.hs256_secret has 5 bytes"},
		{"check fails", "config check", "", 2, "", "auth.hs256_secret"},
		{"check several", "config check -log.level=loud -shard.count many", secret, 2, "", "configuration: 2 problems"},
		{"print", "config print -config " + file, secret, 0, `log.level: "debug"`, ""},
		{"print with double dash", "config print --log.level warn", secret, 0, `log.level: "warn"`, ""},
		{"print bool", "config print -kafka.strict", secret, 0, "kafka.strict: true", ""},
		{"run unconfigured", "", "", 2, "", "auth.hs256_secret"},
		{"no file", "-config /does/not/exist", "", 2, "", "cannot be read"},
		{"config what", "config", "", 2, "", "print, check or reference"},
		{"config other", "config edit", "", 2, "", "print, check or reference"},
		{"unknown flag", "-nope", "", 2, "", "-nope"},
		{"argument", "serve", "", 2, "", `unexpected argument "serve"`},
		{"value missing", "-log.level", "", 2, "", "log.level"},
		{"secret flag", "-auth.hs256_secret=hunter2", "", 2, "", "auth.hs256_secret_file"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := runWith(t, strings.Fields(tc.args), []string{tc.environ}, nil, nil, signals{})
			if r.code != tc.code || !strings.Contains(r.stdout, tc.stdout) || !strings.Contains(r.stderr, tc.stderr) {
				t.Errorf("code %d, want %d with %q and %q; stdout:\n%s\nstderr:\n%s",
					r.code, tc.code, tc.stdout, tc.stderr, r.stdout, r.stderr)
			}
			if (r.stdout == "") != (tc.stdout == "") || (r.stderr == "") != (tc.stderr == "") {
				t.Errorf("on the wrong stream; stdout:\n%s\nstderr:\n%s", r.stdout, r.stderr)
			}
			if strings.Contains(r.String(), "hunter2") {
				t.Error("the secret was repeated")
			}
		})
	}
}

// TestHelpFits keeps the help readable on a terminal.
func TestHelpFits(t *testing.T) {
	r := runWith(t, []string{"-h"}, nil, nil, nil, signals{})
	for line := range strings.Lines(r.stdout) {
		if len(strings.TrimRight(line, "\n")) > 104 {
			t.Errorf("%d columns: %s", len(line)-1, line)
		}
	}
}

func TestSignals(t *testing.T) {
	t.Run("drain", func(t *testing.T) {
		gw, in := newFake(), signals{stop: make(chan os.Signal, 2)}
		in.stop <- syscall.SIGTERM
		close(gw.drained)
		if r := runWith(t, nil, []string{secret}, gw, nil, in); r.code != exitOK {
			t.Errorf("code %d: %s", r.code, r.stderr)
		}
	})
	t.Run("second signal", func(t *testing.T) {
		gw, in := newFake(), signals{stop: make(chan os.Signal, 2)}
		in.stop <- syscall.SIGTERM
		in.stop <- syscall.SIGINT
		if r := runWith(t, nil, []string{secret}, gw, nil, in); r.code != exitFailed {
			t.Errorf("code %d: %s", r.code, r.stderr)
		}
		<-gw.aborted
	})
	t.Run("reload", func(t *testing.T) {
		gw, in := newFake(), signals{stop: make(chan os.Signal), reload: make(chan os.Signal)}
		go func() {
			defer close(gw.drained)
			in.reload <- syscall.SIGHUP
			<-gw.reloaded
			in.stop <- syscall.SIGTERM
			in.reload <- syscall.SIGHUP // while it drains
			<-gw.reloaded
		}()
		if r := runWith(t, nil, []string{secret}, gw, nil, in); r.code != exitOK {
			t.Errorf("code %d: %s", r.code, r.stderr)
		}
	})
	t.Run("failure", func(t *testing.T) {
		gw := newFake()
		gw.err = errors.New("the listener ended")
		r := runWith(t, nil, []string{secret}, gw, nil, signals{})
		if r.code != exitFailed || !strings.Contains(r.stderr, "the listener ended") {
			t.Errorf("code %d: %s", r.code, r.stderr)
		}
	})
	t.Run("not started", func(t *testing.T) {
		r := runWith(t, nil, []string{secret}, nil, errors.New("port 8080 is taken"), signals{})
		if r.code != exitFailed || !strings.Contains(r.stderr, "port 8080 is taken") {
			t.Errorf("code %d: %s", r.code, r.stderr)
		}
	})
}
