// Command suite is `make bench`: it starts real Kafka, etcd and Redis, then this gateway and the
// peers of bench/peers in turn, several times, drives each by the same scenarios of im-bench, and
// prints the figures side by side with their ratios.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"

	"im-gateway/bench/report"
	"im-gateway/test/servers"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil && !errors.Is(err, pflag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "suite:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	fs := pflag.NewFlagSet("suite", pflag.ContinueOnError)
	rounds := fs.Int("rounds", 3, "how often each program is measured by each scenario")
	only := fs.StringSlice("only", nil, "measure these only: "+strings.Join(ids(), ", "))
	bin := fs.String("bin", "bin", "directory with the built programs")
	out := fs.String("out", "", "directory for the reports of every run; default: a temporary one")
	if err := fs.Parse(os.Args[1:]); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "im-bench-suite-")
	if err != nil {
		return fmt.Errorf("temporary directory: %w", err)
	}
	if *out == "" {
		*out = dir
	} else {
		defer os.RemoveAll(dir) //nolint:errcheck // temporary
	}
	if err := os.MkdirAll(*out, 0o755); err != nil {
		return fmt.Errorf("directory for the reports: %w", err)
	}
	e := &env{bin: *bin, dir: dir, out: *out, secret: "0123456789abcdef0123456789abcdef"}
	if e.kafka, err = servers.StartKafka(ctx, dir); err != nil {
		return err
	}
	defer e.kafka.Kill()
	if e.etcd, err = servers.StartEtcd(ctx, dir); err != nil {
		return err
	}
	defer e.etcd.Kill()
	if e.redis, err = servers.StartRedis(ctx, dir, ""); err != nil {
		return err
	}
	defer e.redis.Kill()

	res := results{}
	began := time.Now()
	for round := range *rounds {
		for _, m := range measures {
			if len(*only) > 0 && !slices.Contains(*only, m.id) {
				continue
			}
			if m.halfOf != "" {
				most := res[m.halfOf][seed.name]["acked"]
				if len(most) == 0 {
					return fmt.Errorf("%s needs the results of %s: name it in --only too", m.id, m.halfOf)
				}
				m.args += fmt.Sprintf(" -rate %.0f", median(most)/2)
			}
			for i := range m.subjects {
				if round%2 == 1 { // nobody always goes first
					i = len(m.subjects) - 1 - i
				}
				s := m.subjects[i]
				values, err := e.measure(ctx, m, s, filepath.Join(*out, fmt.Sprintf("%s.%s.%d.json", m.id, s.name, round+1)))
				if err != nil {
					return fmt.Errorf("%s of %s: %w", m.id, s.name, err)
				}
				res.add(m.id, s.name, values)
				fmt.Fprintf(os.Stderr, "%6s  round %d  %-12s %-14s %s\n",
					time.Since(began).Round(time.Second), round+1, m.id, s.name, line(values))
			}
		}
	}
	machine := report.ThisMachine()
	fmt.Printf("%d cores of %s, %.0f GiB, %s, %s; %d rounds, alternating; medians (lowest - highest)\n\n",
		machine.CPUs, machine.CPU, float64(machine.Memory)/(1<<30), machine.Kernel, machine.Go, *rounds)
	res.print(os.Stdout)
	fmt.Printf("\nreports of every run: %s\n", *out)
	return nil
}

func line(values map[string]float64) string {
	names := make([]string, 0, len(values))
	for n := range values {
		names = append(names, n)
	}
	slices.Sort(names)
	var b strings.Builder
	for _, n := range names {
		fmt.Fprintf(&b, "  %s %.4g", n, values[n])
	}
	return b.String()
}
