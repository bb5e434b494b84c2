package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"im-gateway/bench"
	"im-gateway/bench/report"
)

// flags are those of every scenario that loads a gateway.
type flags struct {
	o                                 bench.Options
	urls, kafka, pids                 []string
	secretFile, jwks, tokens, sources string
	rate, size, group                 string
	startAt                           string
	processes                         int
	source                            bench.TokenSource
	json, csv, html                   string
}

func (f *flags) register(fs *pflag.FlagSet, scenario string) {
	o := bench.DefaultOptions()
	o.Scenario = scenario
	f.o = o
	fs.StringSliceVar(&f.urls, "url", o.URLs, "WebSocket addresses of the gateways; user n connects to the n-th, in turn")
	fs.IntVar(&f.o.Users, "users", o.Users, "users connected at once")
	fs.IntVar(&f.o.FirstUser, "first-user", 0, "number of the first user, for benches that run side by side")
	fs.StringVar(&f.o.Prefix, "prefix", o.Prefix, "users are named by this and their number")
	fs.StringVar(&f.secretFile, "secret-file", "", "file with the HS256 secret that signs the users' tokens (or IM_AUTH_HS256_SECRET)")
	fs.StringVar(&f.jwks, "jwks", "", "file with a private JWK set that signs the users' tokens")
	fs.StringVar(&f.tokens, "tokens", "", "file with a token a line, one for each user")
	fs.StringVar(&f.sources, "sources", "", "local addresses to connect from, as in 127.0.0.2-127.0.0.9")
	fs.Float64Var(&f.o.ConnectRate, "connect-rate", 0, "connects per second; 0: as fast as possible")
	fs.IntVar(&f.o.Dialers, "dialers", 64, "connects in flight")
	fs.StringVar(&f.rate, "rate", "1000", "events per second, all users together: 5000, or 1000,5000 (a stage each), or 1000..5000 (a ramp)")
	fs.IntVar(&f.o.Window, "window", 0, "closed loop instead of a rate: messages that each user keeps outstanding")
	fs.DurationVar(&f.o.Warmup, "warmup", o.Warmup, "load before the measured time")
	fs.DurationVar(&f.o.Duration, "duration", o.Duration, "measured time")
	fs.DurationVar(&f.o.Settle, "settle", o.Settle, "longest wait for what is outstanding")
	fs.StringVar(&f.size, "size", o.Size.String(), "bytes of content per message: 128, or 64-1024, or lognormal:MEDIAN,SIGMA,MAX")
	fs.StringVar(&f.group, "group", o.Group.String(), "users per group, in fanout and chat; as for size")
	fs.IntVar(&f.o.Steps, "steps", o.Steps, "idle: numbers of users at which memory is read")
	fs.BoolVar(&f.o.Plain, "plain", false, "connect, idle: the servers are no gateways; connected means upgraded")
	fs.StringVar(&f.o.Hello, "hello", "", "with -plain: a text message that each user sends when it is connected")
	fs.IntVar(&f.o.DrainPID, "drain-pid", 0, "drain: the gateway process to end with SIGTERM; 0: somebody else ends one")
	fs.StringSliceVar(&f.kafka, "kafka", nil, "brokers; acks are then checked against the log (or IM_KAFKA_BROKERS)")
	fs.StringVar(&f.o.UpstreamTopic, "upstream-topic", o.UpstreamTopic, "as the gateway's kafka.upstream_topic")
	fs.StringVar(&f.o.DownstreamPrefix, "downstream-prefix", o.DownstreamPrefix, "as the gateway's kafka.downstream_topic_prefix")
	fs.StringSliceVar(&f.pids, "pid", nil, "server processes to watch, as in 4711 or gateway=4711")
	fs.StringVar(&f.o.Label, "label", "", "who is measured, for the report")
	fs.IntVar(&f.processes, "processes", 1, "client processes that share the users and the rate; one has one event loop")
	fs.StringVar(&f.startAt, "start-at", "", "begin the load at this time (RFC 3339), so that several hosts begin together; merge their reports afterwards")
	fs.StringVar(&f.json, "json", "", "write the report to this file as JSON; -: to stdout instead of text")
	fs.StringVar(&f.csv, "csv", "", "write a row a second to this file")
	fs.StringVar(&f.html, "html", "", "write a page with charts to this file")
}

func (f *flags) options() (o bench.Options, names []string, pids []int, err error) {
	var errs []error
	f.o.URLs, f.o.Kafka = f.urls, f.kafka
	if env := os.Getenv("IM_KAFKA_BROKERS"); len(f.kafka) == 0 && env != "" {
		f.o.Kafka = strings.Split(env, ",")
	}
	f.o.Rates, err = bench.ParseRates(f.rate)
	errs = append(errs, err)
	f.o.Size, err = bench.ParseDist(f.size)
	errs = append(errs, err)
	f.o.Group, err = bench.ParseDist(f.group)
	errs = append(errs, err)
	f.o.Sources, err = parseSources(f.sources)
	errs = append(errs, err)
	f.source, err = f.tokenSource()
	errs = append(errs, err)
	f.o.Tokens, err = f.source.Open()
	errs = append(errs, err)
	for _, p := range f.pids {
		name, num, named := strings.Cut(p, "=")
		if !named {
			name, num = "server", p
		}
		pid, err := strconv.Atoi(num)
		if err != nil {
			errs = append(errs, fmt.Errorf("pid %q: give a number, or NAME=number", p))
		}
		names, pids = append(names, name), append(pids, pid)
	}
	return f.o, names, pids, errors.Join(errs...)
}

func (f *flags) tokenSource() (bench.TokenSource, error) {
	src := bench.TokenSource{File: f.tokens, JWKS: f.jwks}
	if src != (bench.TokenSource{}) {
		return src, nil
	}
	src.Secret = os.Getenv("IM_AUTH_HS256_SECRET")
	if f.secretFile != "" {
		b, err := os.ReadFile(f.secretFile)
		if err != nil {
			return src, fmt.Errorf("read the secret: %w", err)
		}
		src.Secret = strings.TrimSpace(string(b))
	}
	if src.Secret == "" && !f.o.Plain && f.o.Scenario != "echo-load" {
		return src, errors.New("no tokens: give -secret-file, -jwks, -tokens or IM_AUTH_HS256_SECRET, to match the gateway's auth settings")
	}
	return src, nil
}

// parseSources reads "127.0.0.2", or "127.0.0.2-127.0.0.9", or a comma list of either.
func parseSources(s string) ([]netip.Addr, error) {
	if s == "" {
		return nil, nil
	}
	var out []netip.Addr
	for _, part := range strings.Split(s, ",") {
		lo, hi, span := strings.Cut(part, "-")
		a, err := netip.ParseAddr(lo)
		b := a
		if err == nil && span {
			b, err = netip.ParseAddr(hi)
		}
		if err != nil || b.Less(a) {
			return nil, fmt.Errorf("sources %q: give addresses as in 127.0.0.2-127.0.0.9", s)
		}
		for ; !b.Less(a) && len(out) < 4096; a = a.Next() {
			out = append(out, a)
		}
	}
	return out, nil
}

func load(ctx context.Context, scenario string, args []string, stdout, stderr io.Writer) error {
	fs := pflag.NewFlagSet("im-bench "+scenario, pflag.ContinueOnError)
	var f flags
	f.register(fs, scenario)
	if err := parse(fs, args, stderr); err != nil {
		return err
	}
	o, names, pids, err := f.options()
	if err == nil && (f.processes < 1 || f.processes > 64) {
		err = errors.New("processes: 1 to 64")
	}
	var start time.Time
	if err == nil && f.startAt != "" {
		start, err = time.Parse(time.RFC3339, f.startAt)
	}
	if err == nil {
		err = o.Check(f.processes)
	}
	if err != nil {
		return usageError{err}
	}
	h := progress(stderr, &o)
	h.Ready = func() error { return waitUntil(ctx, start) }
	servers := bench.Servers{Names: names, PIDs: pids}
	var reports []*report.Report
	if f.processes > 1 {
		reports, err = bench.MeasureMany(ctx, o, f.source, f.processes, workerCommand, servers, h)
	} else {
		reports, err = bench.Measure(ctx, o, servers, h)
	}
	set := report.Set{Schema: 1, Runs: reports}
	if werr := f.write(&set, stdout); err == nil {
		err = werr
	}
	return err
}

// errBroken ends a run that saw a promise broken.
var errBroken = errors.New("a promise was broken: see the checks of the report")

func (f *flags) write(set *report.Set, stdout io.Writer) error {
	for _, out := range []struct {
		file  string
		write func(io.Writer, *report.Set) error
	}{{f.json, report.WriteJSON}, {f.csv, report.WriteCSV}, {f.html, report.WriteHTML}} {
		if out.file == "" || out.file == "-" {
			continue
		}
		if err := toFile(out.file, set, out.write); err != nil {
			return err
		}
	}
	if f.json == "-" {
		if err := report.WriteJSON(stdout, set); err != nil {
			return fmt.Errorf("write the report: %w", err)
		}
	}
	broken := false
	for _, r := range set.Runs {
		if f.json != "-" {
			fmt.Fprintln(stdout, r.Text())
		}
		broken = broken || len(r.Failed()) > 0
	}
	if broken {
		return errBroken
	}
	return nil
}

func toFile(name string, set *report.Set, write func(io.Writer, *report.Set) error) error {
	w, err := os.Create(name) // #nosec G304 -- named on the command line
	if err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	err = write(w, set)
	if cerr := w.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("write the report %s: %w", name, err)
	}
	return nil
}

// waitUntil waits for the common start of several hosts.
func waitUntil(ctx context.Context, start time.Time) error {
	timer := time.NewTimer(time.Until(start))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// workerCommand starts this program as one of several client processes.
func workerCommand(ctx context.Context) *exec.Cmd {
	self, err := os.Executable()
	if err != nil {
		self = os.Args[0]
	}
	return exec.CommandContext(ctx, self, workerVerb) // #nosec G204 G702 -- this program itself
}
