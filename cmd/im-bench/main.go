// Command im-bench drives and measures a gateway: see im-bench -h.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
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
	case "upstream":
		return upstream(ctx, args[1:], stdout, stderr)
	case "-h", "--help", "help":
		fmt.Fprint(stdout, usage)
		return nil
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

func upstream(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	fs := pflag.NewFlagSet("im-bench upstream", pflag.ContinueOnError)
	var o bench.UpstreamOptions
	fs.StringVar(&o.URL, "url", "ws://127.0.0.1:8080/ws", "the gateway's WebSocket address")
	secretFile := fs.String("secret-file", "", "file with the HS256 secret that signs the users' tokens (or IM_AUTH_HS256_SECRET)")
	fs.IntVar(&o.Users, "users", 100, "users connected at once, up to 15000")
	fs.Float64Var(&o.Rate, "rate", 1000, "messages per second, all users together")
	fs.DurationVar(&o.Warmup, "warmup", 2*time.Second, "load before the measured time")
	fs.DurationVar(&o.Duration, "duration", 10*time.Second, "measured time")
	fs.IntVar(&o.Size, "size", 128, "bytes of content per message")
	asJSON := fs.Bool("json", false, "print the report as JSON")
	if err := parse(fs, args, stderr); err != nil {
		return err
	}
	secret := os.Getenv("IM_AUTH_HS256_SECRET")
	if *secretFile != "" {
		b, err := os.ReadFile(*secretFile)
		if err != nil {
			return usageError{fmt.Errorf("read the secret: %w", err)}
		}
		secret = strings.TrimSpace(string(b))
	}
	if secret == "" {
		return usageError{errors.New("no secret: give -secret-file or IM_AUTH_HS256_SECRET, the same as the gateway's auth.hs256_secret")}
	}
	o.Secret = []byte(secret)
	rep, err := bench.Upstream(ctx, o)
	if rep == nil {
		return err
	}
	if *asJSON {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		if encErr := enc.Encode(rep); encErr != nil {
			return fmt.Errorf("write the report: %w", encErr)
		}
		return err
	}
	fmt.Fprint(stdout, rep.Text())
	return err
}
