// Command im-bench drives and measures a gateway: see im-bench -h.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"github.com/spf13/pflag"

	"im-gateway/bench"
	"im-gateway/transport"
)

// Exit codes: 0 done as asked, 1 failed or an invariant was broken, 2 wrong usage.
const (
	exitFailed = 1
	exitUsage  = 2
)

const usage = `im-bench drives a gateway as its clients do, measures it and checks its promises.

  im-bench echo     -addr 127.0.0.1:9001
      the gateway's own WebSocket transport as a plain echo server, without tokens:
      for conformance suites and for the cost of the transport alone
  im-bench upstream -url ws://127.0.0.1:8080/ws -secret-file secret.txt -users 1000 -rate 10000
      connects users and sends messages at a fixed rate; the latency of an ack counts
      from the scheduled send time
  im-bench SCENARIO -h
      the flags of a scenario
`

type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	var wrong usageError
	switch {
	case err == nil, errors.Is(err, pflag.ErrHelp):
	case errors.As(err, &wrong):
		fmt.Fprintf(os.Stderr, "im-bench: %v\n", err)
		os.Exit(exitUsage)
	default:
		fmt.Fprintf(os.Stderr, "im-bench: %v\n", err)
		os.Exit(exitFailed)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return usageError{errors.New("which scenario?")}
	}
	switch args[0] {
	case "echo":
		return echo(ctx, args[1:], stdout, stderr)
	case "-h", "--help", "help":
		fmt.Fprint(stdout, usage)
		return nil
	}
	if slices.Contains(bench.Scenarios(), args[0]) {
		return load(ctx, args[0], args[1:], stdout, stderr)
	}
	fmt.Fprint(stderr, usage)
	return usageError{fmt.Errorf("unknown scenario %q", args[0])}
}

// parse reads flags written with one dash or two.
func parse(fs *pflag.FlagSet, args []string, stderr io.Writer) error {
	fs.SetOutput(stderr)
	fs.SortFlags = false
	long := make([]string, len(args))
	for i, a := range args {
		if len(a) > 2 && a[0] == '-' && a[1] != '-' {
			a = "-" + a
		}
		long[i] = a
	}
	if err := fs.Parse(long); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			return err
		}
		return usageError{err}
	}
	if fs.NArg() > 0 {
		return usageError{fmt.Errorf("unexpected argument %q", fs.Arg(0))}
	}
	return nil
}

func echo(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	fs := pflag.NewFlagSet("im-bench echo", pflag.ContinueOnError)
	addr := fs.String("addr", "127.0.0.1:9001", "address to listen on")
	loops := fs.Int("loops", 0, "event loops; 0: one per core")
	maxMessage := fs.Int("max-message-bytes", 16<<20, "largest message, all its fragments together")
	if err := parse(fs, args, stderr); err != nil {
		return err
	}
	log := zerolog.New(stderr).Level(zerolog.WarnLevel).With().Timestamp().Logger()
	srv, err := transport.New(transport.Options{
		Addr: *addr, Loops: *loops, Echo: true, MaxMessageBytes: *maxMessage,
		EgressBudget: 64 << 20, Logger: log, Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		return usageError{err}
	}
	if err := srv.Start(ctx); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "echo server on ws://%s/ws\n", srv.Addr())
	select {
	case <-ctx.Done():
	case <-srv.Done():
		return srv.Err()
	}
	stopCtx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return srv.Shutdown(stopCtx)
}
