package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"im-gateway/test/chaos/judge"
	"im-gateway/test/chaos/traffic"
	"im-gateway/test/chaos/world"
)

// fault is one row of the suite.
type fault struct {
	name, what string
	short      bool // in the short form too
	users      int  // 0: defaultUsers
	every      time.Duration
	patience   time.Duration                           // for what is under way to end afterwards; 0: a minute
	front      bool                                    // clients connect through the proxies before the gateways
	do         func(ctx context.Context, r *row) error // breaks, looks, mends
}

const defaultUsers = 60

// row is a fault that is under way.
type row struct {
	w       *world.World
	f       *fault
	short   bool
	swarm   *traffic.Swarm
	began   time.Time // of the fault
	mended  time.Time // zero: by the end of do
	bit     []string
	failed  []string
	deaths  []judge.Death
	deleted []judge.OffsetRange
}

func (r *row) bite(format string, args ...any) { r.bit = append(r.bit, fmt.Sprintf(format, args...)) }
func (r *row) fail(format string, args ...any) {
	r.failed = append(r.failed, fmt.Sprintf(format, args...))
}
func (r *row) mend() { r.mended = time.Now() }

func (r *row) check(ok bool, format string, args ...any) {
	if !ok {
		r.fail(format, args...)
	}
}

// hold lets a fault last: d, or in the short form at most four seconds.
func (r *row) hold(ctx context.Context, d time.Duration) {
	if r.short {
		d = min(d, 4*time.Second)
	}
	sleep(ctx, d)
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// until waits for a condition; false: it did not come true in time.
func until(ctx context.Context, timeout time.Duration, ok func() bool) bool {
	for deadline := time.Now().Add(timeout); !ok(); sleep(ctx, 50*time.Millisecond) {
		if time.Now().After(deadline) || ctx.Err() != nil {
			return false
		}
	}
	return true
}

// g is a gateway, from 1.
func (r *row) g(n int) *world.Gateway { return r.w.Gateways[n-1] }

// died notes that a gateway was ended.
func (r *row) died(g *world.Gateway) {
	r.deaths = append(r.deaths, judge.Death{Gateway: g.ID, At: time.Now()})
}

// acks counts successes of a time.
func (r *row) acks(from, to time.Time) (n int) {
	for _, c := range r.swarm.Log.Snapshot().Clients {
		for _, a := range c.Acks {
			if a.Success() && a.At.After(from) && a.At.Before(to) {
				n++
			}
		}
	}
	return n
}

// runFault runs one row: everything whole, traffic, the fault, everything whole again, the judgement.
func runFault(ctx context.Context, w *world.World, f fault, short bool) (judge.Row, error) {
	out := judge.Row{Name: f.name, Fault: f.what}
	if err := whole(ctx, w); err != nil {
		return out, fmt.Errorf("before: %w", err)
	}
	r := &row{w: w, f: &f, short: short}
	users := f.users
	if users == 0 {
		users = defaultUsers
	}
	if short {
		users = min(users, 1000)
	}
	patience := cmp.Or(f.patience, time.Minute)
	every := f.every
	if every == 0 {
		every = 250 * time.Millisecond
	}
	name := strings.ReplaceAll(f.name, " ", "-") + "-" + fmt.Sprint(time.Now().Unix()%100000)
	o := traffic.SwarmOptions{
		Undelivered: world.UndeliveredTopic, Deadletter: world.DeadletterTopic,
		Sender: traffic.SenderOptions{Brokers: w.Kafka.Brokers(), Redis: w.RedisAddr, Prefix: world.DownstreamPrefix, Every: 2 * every},
	}
	var addrs []string
	for _, g := range w.Gateways {
		if f.front {
			addrs = append(addrs, g.Front.Addr())
		} else {
			addrs = append(addrs, g.Addr)
		}
	}
	for i := range users {
		u := fmt.Sprintf("%s-%d", name, i)
		o.Clients = append(o.Clients, traffic.ClientOptions{
			User: u, Addrs: addrs, First: i, Token: world.Token, Ack: i%2 == 0, Every: every, Content: 100, Silence: 5 * time.Second,
		})
		o.Sender.Users = append(o.Sender.Users, u)
	}
	var err error
	if r.swarm, err = traffic.Start(ctx, o); err != nil {
		return out, err
	}
	defer r.swarm.Close()
	online, cancel := context.WithTimeout(ctx, 60*time.Second)
	err = r.swarm.WaitOnline(online)
	cancel()
	if err != nil {
		return out, fmt.Errorf("clients: %w", err)
	}
	sleep(ctx, 2*time.Second)
	r.began = time.Now()
	if err := f.do(ctx, r); err != nil {
		r.fail("the fault: %v", err)
	}
	if r.mended.IsZero() {
		r.mend()
	}
	if err := whole(ctx, w); err != nil {
		return out, fmt.Errorf("after: %w", err)
	}
	if !until(ctx, 90*time.Second, func() bool { return recovered(r.swarm.Log.Snapshot(), r.mended) > 0 }) {
		r.fail("not every client got through again within 90 s")
	}
	sleep(ctx, 2*time.Second)
	r.swarm.StopSending()
	if err := r.swarm.WaitQuiet(ctx, patience); err != nil {
		r.fail("%v", err)
	}
	ledgers := r.ledgers(ctx, patience)
	logs := r.swarm.Log.Snapshot()
	e := judge.Evidence{
		Logs: logs, UpstreamTopic: world.UpstreamTopic, UndeliveredTopic: world.UndeliveredTopic,
		DeadletterTopic: world.DeadletterTopic, DownstreamPrefix: world.DownstreamPrefix, Brokers: w.Kafka.Brokers(),
		Redis: w.RedisAddr, Etcd: w.EtcdAddr, Gateways: []string{"g1", "g2", "g3"}, Deaths: r.deaths,
		PresenceTTL: presenceTTL, Deleted: r.deleted,
	}
	if out.Verdict, err = judge.Judge(ctx, e); err != nil {
		return out, fmt.Errorf("judge: %w", err)
	}
	out.Recovery = max(0, recovered(logs, r.mended))
	out.Bit, out.Failed, out.Ledger = strings.Join(r.bit, "; "), r.failed, ledgers+"; "+gaps(logs)
	if len(out.Failures()) > 0 {
		return out, logs.WriteFile(filepath.Join(w.Dir(), name+".jsonl"))
	}
	return out, nil
}

// recovered is how long after the mending the last client had a success; 0: one has had none yet.
func recovered(logs traffic.Logs, mended time.Time) (last time.Duration) {
	for _, c := range logs.Clients {
		if c.Every == 0 {
			continue
		}
		i := sort.Search(len(c.Acks), func(i int) bool { return c.Acks[i].At.After(mended) })
		for i < len(c.Acks) && !c.Acks[i].Success() {
			i++
		}
		if i == len(c.Acks) {
			return 0
		}
		last = max(last, c.Acks[i].At.Sub(mended))
	}
	return last
}

// gaps says how many users had which longest gap between two successes.
func gaps(logs traffic.Logs) string {
	bounds := []time.Duration{time.Second, 2 * time.Second, 5 * time.Second, 10 * time.Second, 30 * time.Second, time.Hour}
	counts := make([]int, len(bounds))
	for _, c := range logs.Clients {
		var last time.Time
		var longest time.Duration
		for _, a := range c.Acks {
			if !a.Success() {
				continue
			}
			if !last.IsZero() {
				longest = max(longest, a.At.Sub(last)-c.Every)
			}
			last = a.At
		}
		i := 0
		for longest > bounds[i] {
			i++
		}
		counts[i]++
	}
	var parts []string
	for i, n := range counts {
		if n > 0 {
			parts = append(parts, fmt.Sprintf("up to %s: %d", bounds[i], n))
		}
	}
	return "users by their longest gap beyond their own pace, " + strings.Join(parts, ", ")
}

// ledgers waits until nothing is open on any gateway and checks that the accounts balance.
func (r *row) ledgers(ctx context.Context, patience time.Duration) string {
	var parts []string
	for _, g := range r.w.Gateways {
		var l world.Ledger
		var err error
		settled := until(ctx, patience, func() bool {
			l, err = g.Ledger(ctx)
			return err == nil && l.Downstream.Open == 0 && l.Upstream.Open == 0
		})
		r.check(settled, "ledger of %s: open %d down, %d up, %v", g.ID, l.Downstream.Open, l.Upstream.Open, err)
		r.check(l.Downstream.Balanced && l.Upstream.Balanced, "ledger of %s is not balanced: %+v", g.ID, l)
		parts = append(parts, fmt.Sprintf("%s: %d up, %d down", g.ID, l.Upstream.In, l.Downstream.In))
	}
	return strings.Join(parts, "; ")
}

// whole brings everything back: servers, links, gateways.
func whole(ctx context.Context, w *world.World) error {
	var errs []error
	for i := range w.Kafka.N() {
		_ = w.Kafka.Broker(i).Cont() // one that does not run cannot be frozen
	}
	errs = append(errs, w.Kafka.StartAll(ctx), w.Kafka.Link.Restore(ctx))
	for _, p := range []*world.Process{w.Etcd, w.Redis, w.Standby} {
		if p.Alive() {
			errs = append(errs, p.Cont())
		} else {
			errs = append(errs, p.Start(ctx))
		}
	}
	w.Logic.Set(world.Up)
	for _, g := range w.Gateways {
		for _, l := range []*world.Link{g.EtcdLink, g.RedisLink, g.LogicLink, g.Front} {
			errs = append(errs, l.Restore(ctx))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, g := range w.Gateways {
		if g.Alive() {
			_ = g.Cont()
			continue
		}
		if err := g.With(nil).Start(ctx); err != nil {
			return err
		}
	}
	return nil
}

// restart ends a gateway in order and starts it with other settings.
func (r *row) restart(ctx context.Context, g *world.Gateway, settings map[string]string) error {
	if g.Alive() {
		if err := g.Term(); err != nil {
			return err
		}
		wait, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		code, err := g.Wait(wait)
		if err != nil {
			return err
		}
		r.check(code == 0, "%s ended with %d when asked to", g.ID, code)
		r.died(g)
	}
	return g.With(settings).Start(ctx)
}
