// Command abuse is the abuse suite: one gateway on real servers, a thousand well-behaved users in one
// process and attackers in another, one abuse at a time. It writes a table of what each abuse met and what
// the users felt of it, and exits with 1 when a user was harmed, a limit did not hold or memory did not
// come back.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/rs/zerolog"

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
	role := flag.String("role", "", "what this process is to be; the suite's own")
	flag.BoolVar(&o.short, "short", false, "the short form: fewer abuses, fewer attackers and users")
	flag.StringVar(&o.only, "only", "", "only abuses whose names contain one of these, separated by commas")
	flag.StringVar(&o.out, "out", "", "write PATH.md and PATH.json")
	flag.BoolVar(&o.keep, "keep", false, "keep the scratch directory with all logs")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	failed := 0
	switch *role {
	case roleUsers:
		err = serveUsers(ctx, os.Stdin, os.Stdout)
	case roleAttackers:
		err = serveAttackers(ctx, os.Stdin, os.Stdout)
	default:
		failed, err = run(ctx, o)
	}
	if err == nil && failed > 0 {
		err = fmt.Errorf("%d rows failed", failed)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "abuse:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (failed int, err error) {
	zerolog.SetGlobalLevel(zerolog.Disabled) // the proxies' own
	began := time.Now()
	dir, err := os.MkdirTemp("", "im-abuse-")
	if err != nil {
		return 0, fmt.Errorf("scratch directory: %w", err)
	}
	defer func() {
		if o.keep || failed > 0 || err != nil {
			fmt.Fprintln(os.Stderr, "abuse: logs are in", dir)
			return
		}
		err = errors.Join(err, os.RemoveAll(dir))
	}()
	binary := filepath.Join(dir, "im-gateway")
	build := exec.CommandContext(ctx, "go", "build", "-o", binary, "im-gateway/cmd/im-gateway")
	if out, err := build.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build the gateway: %w\n%s", err, out)
	}
	if err := writeCertificate(dir); err != nil {
		return 0, err
	}
	w, err := world.Start(ctx, world.Options{Dir: dir, Gateway: binary, Brokers: 1, Gateways: []string{"g1"}})
	defer func() { err = errors.Join(err, w.Close()) }()
	if err != nil {
		return 0, fmt.Errorf("start the servers: %w", err)
	}
	fmt.Printf("servers started in %s\n", time.Since(began).Round(time.Second))

	var done []outcome
	var settings map[string]string
	for i := range rows {
		r := &rows[i]
		if !r.chosen(o) {
			continue
		}
		if next := r.with(o.short); !w.Gateways[0].Alive() || !maps.Equal(next, settings) {
			if err := restart(ctx, w, next); err != nil {
				return failed, fmt.Errorf("%s: %w", r.name, err)
			}
			settings = next
		}
		out, err := runRow(ctx, w, r, o.short)
		if err != nil {
			return failed, fmt.Errorf("%s: %w", r.name, err)
		}
		done = append(done, out)
		fmt.Println(out.line())
		if len(out.Failed) > 0 {
			failed++
			fmt.Printf("  FAIL %s\n", strings.Join(out.Failed, "\n  FAIL "))
		}
	}
	if len(done) == 0 {
		return 0, errors.New("no abuse of that name")
	}
	fmt.Printf("%d rows, %d failed, %s\n", len(done), failed, time.Since(began).Round(time.Second))
	return failed, report(o, done)
}

func (r *row) chosen(o options) bool {
	if o.only == "" {
		return !o.short || r.short > 0
	}
	for _, part := range strings.Split(o.only, ",") {
		if strings.Contains(r.name, part) {
			return true
		}
	}
	return false
}

// restart ends the gateway, when it runs, and starts it with other settings. It reaches its servers
// directly, not through the fault suite's proxies.
func restart(ctx context.Context, w *world.World, settings map[string]string) error {
	g := w.Gateways[0]
	if g.Alive() {
		if err := g.Term(); err != nil {
			return err
		}
		wait, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		if code, err := g.Wait(wait); err != nil || code != 0 {
			return errors.Join(fmt.Errorf("the gateway ended with %d when asked to", code), err)
		}
	}
	s := map[string]string{
		"kafka.brokers": strings.Join(w.Kafka.Brokers(), ","), "redis.addrs": w.RedisAddr,
		"etcd.endpoints": w.EtcdAddr, "logic.target": w.Logic.Addr,
		"kafka.start_grace": "1s", "drain.window": "0s",
	}
	for k, v := range settings {
		s[k] = strings.ReplaceAll(v, "{dir}", w.Dir())
	}
	return g.With(s).Start(ctx)
}
