package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"im-gateway/bench"
	"im-gateway/bench/report"
	"im-gateway/transport"
)

// The test binary is im-bench when it is started as a worker.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == workerVerb {
		if err := bench.Work(context.Background(), os.Stdin, os.Stdout); err != nil {
			os.Stderr.WriteString(err.Error())
			os.Exit(exitFailed)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m,
		// gnet's pool of goroutines is the process's and has no end.
		goleak.IgnoreAnyFunction("github.com/panjf2000/ants/v2.(*poolCommon).purgeStaleWorkers"),
		goleak.IgnoreAnyFunction("github.com/panjf2000/ants/v2.(*poolCommon).ticktock"))
}

func echoURL(t *testing.T) string {
	t.Helper()
	s, err := transport.New(transport.Options{Addr: "127.0.0.1:0", Loops: 1, Echo: true, Logger: zerolog.Nop(), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Error(err)
		}
	})
	return "ws://" + s.Addr().String() + "/ws"
}

func TestWrongUsage(t *testing.T) {
	t.Setenv("IM_AUTH_HS256_SECRET", "")
	for line, want := range map[string]string{
		"":                                    "which scenario",
		"nonsense":                            `unknown scenario "nonsense"`,
		"upstream":                            "no tokens",
		"echo-load -rate fast":                `rate "fast"`,
		"echo-load -size big":                 `"big"`,
		"echo-load -sources 127.0.0.9-1":      "sources",
		"echo-load -users 20000":              "-processes",
		"echo-load -processes 65":             "processes: 1 to 64",
		"echo-load -pid gateway=x":            `pid "gateway=x"`,
		"echo-load -url http://127.0.0.1:1":   "ws://",
		"echo-load -nonsense 1":               "unknown flag",
		"echo-load extra":                     `unexpected argument "extra"`,
		"echo-load -start-at noon":            "noon",
		"upstream -secret-file /no/such":      "read the secret",
		"upstream -tokens /no/such":           "read the tokens",
		"downstream -plain":                   "kafka",
		"merge a.json":                        "at least two",
		"compare a.json":                      "two sides",
		"compare /no/such.json /no/such.json": "read the report",
	} {
		var out, log bytes.Buffer
		err := run(t.Context(), strings.Fields(line), &out, &log)
		var wrong usageError
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want a word of %q", line, err, want)
		} else if !errors.As(err, &wrong) && !strings.Contains(line, "http://") {
			t.Errorf("%q is no wrong usage: %v", line, err)
		}
	}
}

// Two worker processes drive one server; their reports make one.
func TestProcesses(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a.json"), filepath.Join(dir, "b.json")
	url := echoURL(t)
	for _, file := range []string{a, b} {
		var out, log bytes.Buffer
		err := run(t.Context(), []string{"echo-load", "-url", url, "-processes", "2", "-users", "31", "-rate", "400",
			"-warmup", "100ms", "-duration", "1s", "-json", file, "-html", file + ".html", "-csv", file + ".csv"}, &out, &log)
		if err != nil {
			t.Fatalf("%v\n%s", err, log.String())
		}
		if !strings.Contains(out.String(), "ok      every push arrived once") {
			t.Errorf("no checks in:\n%s", out.String())
		}
	}
	s, err := report.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	r := s.Runs[0]
	if n := r.Count("echoed"); n < 400 || n > 480 || n != r.Count("sent") {
		t.Errorf("%d echoed of %d, at 400/s for 1.1 s", n, r.Count("sent"))
	}
	if len(r.Clients) != 2 || r.Options["users"] != 31.0 || r.Options["rate"] != "400" || len(r.Latency) != 1 {
		t.Errorf("%d clients, options %v", len(r.Clients), r.Options)
	}
	for _, f := range []string{a + ".html", a + ".csv"} {
		if info, err := os.Stat(f); err != nil || info.Size() == 0 {
			t.Errorf("%s: %v", f, err)
		}
	}
	var out, log bytes.Buffer
	if err := run(t.Context(), []string{"compare", a, b}, &out, &log); err != nil || !strings.Contains(out.String(), "echoed p50") {
		t.Errorf("%v: %s", err, out.String())
	}
	out.Reset()
	if err := run(t.Context(), []string{"merge", a, b}, &out, &log); err != nil || !strings.Contains(out.String(), "62 users") {
		t.Errorf("%v: %s", err, out.String())
	}
}

// A worker that cannot connect is named with what it said.
func TestProcessesFail(t *testing.T) {
	var out, log bytes.Buffer
	err := run(t.Context(), []string{"echo-load", "-url", "ws://127.0.0.1:1/", "-processes", "2", "-users", "2", "-duration", "1s"}, &out, &log)
	if err == nil || !strings.Contains(err.Error(), "worker") || !strings.Contains(err.Error(), "refused") {
		t.Errorf("%v", err)
	}
}

func TestHelp(t *testing.T) {
	var out, log bytes.Buffer
	if err := run(t.Context(), []string{"-h"}, &out, &log); err != nil {
		t.Fatal(err)
	}
	for _, name := range append(bench.Scenarios(), "shards", "merge", "compare", "echo") {
		if !strings.Contains(out.String(), "\n  "+name) {
			t.Errorf("no word of %s", name)
		}
	}
}
