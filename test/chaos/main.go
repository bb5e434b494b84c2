// Command chaos is the fault suite: real servers, continuous traffic both ways, one fault at a time, and a
// judge who reads Kafka, Redis, etcd and the clients' logs afterwards. It writes a table of what each
// fault did, and exits with 1 when anything was lost, false or not seen to happen.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"im-gateway/test/chaos/judge"
	"im-gateway/test/chaos/world"
)

type options struct {
	short bool
	only  string
	out   string
	keep  bool
}

func main() {
	var o options
	flag.BoolVar(&o.short, "short", false, "the short form: fewer faults, shorter ones")
	flag.StringVar(&o.only, "only", "", "only faults whose names contain one of these, separated by commas")
	flag.StringVar(&o.out, "out", "", "write PATH.md and PATH.json")
	flag.BoolVar(&o.keep, "keep", false, "keep the scratch directory with all logs")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	failed, err := run(ctx, o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
		os.Exit(1)
	}
	if failed > 0 {
		fmt.Fprintf(os.Stderr, "chaos: %d rows failed\n", failed)
		os.Exit(1)
	}
}

// settings make gateways notice everything within seconds.
var settings = map[string]string{
	"etcd.lease_ttl": "2s", "takeover.after": "8s", "takeover.quiet": "5s", "drain.window": "2s", "drain.deadline": "20s",
	"redis.presence_ttl": "6s", "redis.refresh_interval": "2s", "kafka.start_grace": "1s",
	"websocket.delivery_timeout": "10s", "websocket.heartbeat": "2s", "websocket.heartbeat_timeout": "6s",
	"kafka.downstream_replication": "3",
}

const presenceTTL = 6 * time.Second

func run(ctx context.Context, o options) (failed int, err error) {
	zerolog.SetGlobalLevel(zerolog.Disabled) // the proxies' own
	began := time.Now()
	dir, err := os.MkdirTemp("", "im-chaos-")
	if err != nil {
		return 0, fmt.Errorf("scratch directory: %w", err)
	}
	defer func() {
		if o.keep || failed > 0 || err != nil {
			fmt.Fprintln(os.Stderr, "chaos: logs are in", dir)
			return
		}
		err = errors.Join(err, os.RemoveAll(dir))
	}()
	binary := filepath.Join(dir, "im-gateway")
	build := exec.CommandContext(ctx, "go", "build", "-tags", "chaos", "-o", binary, "im-gateway/cmd/im-gateway")
	if out, err := build.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build the gateway: %w\n%s", err, out)
	}
	w, err := world.Start(ctx, world.Options{
		Dir: dir, Gateway: binary, Brokers: 3, Gateways: []string{"g1", "g2", "g3"}, DiskMB: 1024, Settings: settings,
	})
	defer func() { err = errors.Join(err, w.Close()) }()
	if err != nil {
		return 0, fmt.Errorf("start the servers: %w", err)
	}
	fmt.Printf("servers started in %s\n", time.Since(began).Round(time.Second))

	var rows []judge.Row
	for _, f := range append(faults, healthy...) {
		if !f.chosen(o) {
			continue
		}
		row, err := runFault(ctx, w, f, o.short)
		if err != nil {
			return failed, fmt.Errorf("%s: %w", f.name, err)
		}
		rows = append(rows, row)
		if problems := row.Failures(); len(problems) > 0 {
			failed++
			fmt.Printf("FAIL %s\n  %s\n", f.name, strings.Join(problems, "\n  "))
		} else {
			fmt.Printf("ok   %s: %s; back in %s\n", f.name, row.Bit, row.Recovery.Round(time.Millisecond))
		}
	}
	var caught []string
	if o.only == "" || strings.Contains(o.only, "defect") {
		if caught, err = selfTest(ctx, w, o.short); err != nil {
			return failed, fmt.Errorf("self-test: %w", err)
		}
	} else if len(rows) == 0 {
		return 0, errors.New("no fault of that name")
	}
	fmt.Printf("%d rows, %d failed, %s\n", len(rows), failed, time.Since(began).Round(time.Second))
	return failed, report(o, rows, caught)
}

func (f *fault) chosen(o options) bool {
	if o.only == "" {
		return !o.short || f.short
	}
	for _, part := range strings.Split(o.only, ",") {
		if strings.Contains(f.name, part) {
			return true
		}
	}
	return false
}

func report(o options, rows []judge.Row, caught []string) error {
	if o.out == "" {
		return nil
	}
	form := "full"
	if o.short {
		form = "short"
	}
	header := fmt.Sprintf("# What faults do\n\nWritten by `make chaos` (%s form, %s): three Kafka brokers with replication 3, etcd, Redis with a replica, "+
		"three gateways whose leases, heartbeats and delays are shortened (etcd lease 2 s, presence TTL 6 s, takeover after 8 s), "+
		"one fault at a time under traffic both ways. The judge reads Kafka, Redis, etcd and the clients' logs.\n",
		form, time.Now().Format("2006-01-02"))
	if len(caught) > 0 {
		header += "\nThe suite was tried on gateways with deliberate defects too, and caught each:\n\n"
		for _, c := range caught {
			header += "- " + c + "\n"
		}
	}
	md, err := os.Create(o.out + ".md")
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	js, err := os.Create(o.out + ".json")
	if err != nil {
		return fmt.Errorf("report: %w", errors.Join(err, md.Close()))
	}
	return errors.Join(judge.WriteMarkdown(md, rows, header), judge.WriteJSON(js, rows), md.Close(), js.Close())
}
