// Command im-bench drives and measures a gateway: see im-bench -h.
package main

import (
	"context"
	"crypto/tls"
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

// workerVerb is for im-bench itself: a client process of several.
const workerVerb = "worker"

const usage = `im-bench drives a gateway as its clients and its im-logic do, measures it, and checks its
promises while it does so. A broken promise is named, and the exit code is 1.

Scenarios (im-bench SCENARIO -h for the flags):
  connect     a storm of connects, with tokens:      -users 10000
  idle        memory and heartbeats of idle users:   -users 18000 -pid PID
  upstream    messages and their acks:               -users 10000 -rate 10000 -kafka BROKERS
  downstream  records from Kafka to single users:    -users 10000 -rate 8000 -kafka BROKERS
  fanout      records to groups of users:            -users 10000 -group 500 -rate 20 -kafka BROKERS
  chat        both ways, in groups:                  -users 2000 -group 2-40 -rate 500..5000 -kafka BROKERS
  churn       users leave and come back:             -users 5000 -rate 500
  drain       a gateway ends, its users move on:     -url ws://A/ws,ws://B/ws -drain-pid PID
  soak        chat and churn for long:               -users 5000 -rate 1000 -duration 8h -kafka BROKERS
  echo-load   plain echo servers:                    -users 1000 -window 1 -url ws://HOST:PORT/
  shards      the shard actors alone, no sockets:    -sessions 1000000

A rate is kept whatever the server does: a latency counts from the time that the message was due.
-window N keeps N messages outstanding per user instead, which finds the most that a server does.

Also:
  echo        the gateway's transport as a plain echo server, for conformance suites: -addr HOST:PORT
  merge       one report of those of several hosts:  A.json B.json ...
  compare     ratios of two sides, and which are noise:  A.json B.json
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
	case workerVerb:
		return bench.Work(ctx, os.Stdin, stdout)
	case "shards":
		return runShards(ctx, args[1:], stdout, stderr)
	case "merge":
		return merge(args[1:], stdout, stderr)
	case "compare":
		return compare(args[1:], stdout, stderr)
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

// parse reads flags written with one dash or two, and nothing else.
func parse(fs *pflag.FlagSet, args []string, stderr io.Writer) error {
	rest, err := parseFiles(fs, args, stderr)
	if err == nil && len(rest) > 0 {
		err = usageError{fmt.Errorf("unexpected argument %q", rest[0])}
	}
	return err
}

// parseFiles is parse with arguments behind the flags.
func parseFiles(fs *pflag.FlagSet, args []string, stderr io.Writer) ([]string, error) {
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
			return nil, err
		}
		return nil, usageError{err}
	}
	return fs.Args(), nil
}

func echo(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	fs := pflag.NewFlagSet("im-bench echo", pflag.ContinueOnError)
	addr := fs.String("addr", "127.0.0.1:9001", "address to listen on")
	loops := fs.Int("loops", 0, "event loops; 0: one per core")
	maxMessage := fs.Int("max-message-bytes", 16<<20, "largest message, all its fragments together")
	compression := fs.Bool("compression", false, "permessage-deflate for clients that offer it")
	certFile := fs.String("tls-cert", "", "PEM file with a certificate chain: TLS only")
	keyFile := fs.String("tls-key", "", "PEM file with its key")
	if err := parse(fs, args, stderr); err != nil {
		return err
	}
	log := zerolog.New(stderr).Level(zerolog.WarnLevel).With().Timestamp().Logger()
	opts := transport.Options{
		Addr: *addr, Loops: *loops, Echo: true, Logger: log, Registerer: prometheus.NewRegistry(),
		Settings:    transport.Settings{MaxMessageBytes: *maxMessage, MaxFragments: 1 << 20, EgressBudget: 64 << 20},
		Compression: transport.Compression{Enabled: *compression, Level: 1},
	}
	scheme := "ws"
	if *certFile != "" || *keyFile != "" {
		cert, err := tls.LoadX509KeyPair(*certFile, *keyFile)
		if err != nil {
			return usageError{fmt.Errorf("-tls-cert and -tls-key: %w", err)}
		}
		opts.Certificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &cert, nil }
		scheme = "wss"
	}
	srv, err := transport.New(opts)
	if err != nil {
		return usageError{err}
	}
	if err := srv.Start(ctx); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "echo server on %s://%s/ws\n", scheme, srv.Addr())
	select {
	case <-ctx.Done():
	case <-srv.Done():
		return srv.Err()
	}
	stopCtx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return srv.Shutdown(stopCtx)
}
