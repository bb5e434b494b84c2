package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"strings"
	"time"

	"im-gateway/bench/procstat"
	"im-gateway/test/abuse/attack"
	"im-gateway/test/abuse/users"
	"im-gateway/test/chaos/world"
)

// row is one abuse.
type row struct {
	name, what string // what: what the attackers do
	limit      string // what stops them: the configuration's keys
	spec       attack.Spec
	short      int // attackers in the short form; 0: the row is not in it
	// as is who the attackers log in as: each as a user of its own (the default), oneUser or forger.
	as string
	// settings are those that differ from the defaults; shortSettings differ in the short form too.
	settings, shortSettings map[string]string
	hold                    time.Duration
	// expect are the outcomes that attackers must see, each at least once; allow are those that they may
	// see besides. Any other fails the row. A trailing * stands for anything.
	expect, allow []string
	// most is how many attackers may be in at the end; 0: any number.
	most int
	// moved are the gateway's counters that must have risen.
	moved []string
	// refusals: users' messages may be refused and sent again, which is reported and no error.
	refusals bool
	// arm and during are the coordinator's part of the abuse: before the attackers begin, until disarmed
	// at its end; and once each has got as far as it is meant to. nil: none.
	arm    func(r *running) (disarm func() error, err error)
	during func(ctx context.Context, r *running) error
}

// running is a row that is under way.
type running struct {
	w      *world.World
	g      *world.Gateway
	row    *row
	spec   attack.Spec
	users  int
	failed []string
}

func (r *running) check(ok bool, format string, args ...any) {
	if !ok {
		r.failed = append(r.failed, fmt.Sprintf(format, args...))
	}
}

// outcome is what became of a row.
type outcome struct {
	Name  string            `json:"name"`
	What  string            `json:"what"`
	Limit string            `json:"limit"`
	Set   map[string]string `json:"settings"`
	Users int               `json:"users"`
	// What attackers saw, and what the gateway counted.
	Attackers int                `json:"attackers"`
	Attack    attack.Result      `json:"attack"`
	Counted   map[string]float64 `json:"counted"`
	// The users before and in the abuse, until the attackers' connections were gone, and then.
	Before  users.Window `json:"before"`
	With    users.Window `json:"with"`
	Leaving users.Window `json:"leaving"`
	After   users.Window `json:"after"`
	Ratio   float64      `json:"p99_ratio"` // with / before
	Errors  int          `json:"errors"`
	RSS     [3]int64     `json:"rss_bytes"` // before, peak, after
	Failed  []string     `json:"failed,omitempty"`
	Seconds float64      `json:"seconds"`
}

const (
	patience = 60 * time.Second // for what must come
	// rssSlack is by how much more may be resident afterwards: pools, tables that have grown and pages that
	// the runtime keeps, which 5,000 sessions leave behind once.
	rssSlack = 64 << 20
)

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// until waits for a condition; false: it did not come true in time.
func until(ctx context.Context, ok func() bool) bool {
	for deadline := time.Now().Add(patience); !ok(); sleep(ctx, 200*time.Millisecond) {
		if time.Now().After(deadline) || ctx.Err() != nil {
			return false
		}
	}
	return true
}

// runRow runs one row on a gateway that is up with the row's settings.
func runRow(ctx context.Context, w *world.World, o *row, short bool) (out outcome, err error) {
	began := time.Now()
	r := &running{w: w, g: w.Gateways[0], row: o, spec: o.spec, users: 1000}
	warmup, baseline, rest := time.Second, 8*time.Second, 4*time.Second
	hold := o.hold
	if short {
		r.users, r.spec.N = 200, o.short
		if o.short == 0 { // asked for by name
			r.spec.N = o.spec.N / 10
		}
		warmup, baseline, rest, hold = 500*time.Millisecond, 1500*time.Millisecond, time.Second, min(hold, 4*time.Second)
		r.spec.Total = min(r.spec.Total, 20_000)
	}
	out = outcome{Name: o.name, What: o.what, Limit: o.limit, Set: o.with(short), Users: r.users, Attackers: r.spec.N}
	pid := r.g.Pid()

	id := time.Now().Unix() % 1_000_000
	uo := users.Options{
		URL: o.scheme() + "://" + r.g.Addr + "/ws", Users: r.users, Every: 3 * time.Second,
		AckWithin: 20 * time.Second, PushWithin: 40 * time.Second, // above kafka.ack_deadline and websocket.delivery_timeout
		Broker: w.Kafka.Brokers()[0], Topic: world.DownstreamPrefix + r.g.ID,
	}
	if short {
		uo.Every = time.Second
	}
	for i := range r.users + 1000 {
		name := fmt.Sprintf("u%d-%d", id, i)
		token, err := world.Token(name)
		if err != nil {
			return out, err
		}
		uo.Names, uo.Tokens = append(uo.Names, name), append(uo.Tokens, token)
	}
	r.spec.Addr = r.g.Addr
	if r.spec.Tokens, err = o.tokens(r.spec.N); err != nil {
		return out, err
	}

	good, err := startChild(roleUsers, uo)
	if err != nil {
		return out, err
	}
	defer good.end()
	if err := good.started(); err != nil {
		return out, err
	}
	sleep(ctx, warmup)
	if _, err = good.window(askWindow); err != nil { // the start is not measured
		return out, err
	}
	sleep(ctx, baseline)
	if out.Before, err = good.window(askWindow); err != nil {
		return out, err
	}
	before, err := r.g.Metrics(ctx)
	if err != nil {
		return out, err
	}
	sampler, err := procstat.Start([]string{"gateway"}, []int{pid})
	if err != nil {
		return out, err
	}
	defer sampler.Stop()
	if out.RSS[0], err = r.resident(ctx, sampler); err != nil {
		return out, err
	}
	sampler.Mark()

	disarm := func() error { return nil }
	if o.arm != nil {
		if disarm, err = o.arm(r); err != nil {
			return out, err
		}
	}
	bad, err := startChild(roleAttackers, r.spec)
	if err != nil {
		return out, err
	}
	defer bad.end()
	if err := bad.started(); err != nil {
		return out, err
	}
	finished := make(chan error, 1)
	go func() { finished <- bad.answer(&out.Attack) }()
	r.abuse(ctx, hold, finished)
	if out.With, err = good.window(askWindow); err != nil {
		return out, err
	}
	if err := disarm(); err != nil {
		return out, fmt.Errorf("disarm: %w", err)
	}
	_ = bad.in.Close()
	if err := <-finished; err != nil {
		return out, err
	}
	bad.end()

	r.settled(ctx)
	if out.Leaving, err = good.window(askWindow); err != nil {
		return out, err
	}
	sleep(ctx, rest)
	if out.After, err = good.window(askSettle); err != nil {
		return out, err
	}
	// Resident again as before, as far as the runtime gives pages back.
	most := out.RSS[0] + out.RSS[0]/4 + rssSlack
	back := until(ctx, func() bool {
		out.RSS[2], err = r.resident(ctx, sampler)
		return err == nil && out.RSS[2] <= most
	})
	sampler.Unmark()
	r.check(back && err == nil, "%d MiB were resident before, %d MiB are after: %v", out.RSS[0]>>20, out.RSS[2]>>20, err)
	r.check(r.g.Alive() && r.g.Pid() == pid, "the gateway did not live through it")
	if procs, err := sampler.Processes(); err == nil {
		out.RSS[1] = procs[0].RSSPeak
	}
	after, err := r.g.Metrics(ctx)
	if err != nil {
		r.check(false, "%v", err)
	}
	r.judge(&out, before, after)
	out.Failed, out.Seconds = r.failed, time.Since(began).Seconds()
	return out, nil
}

// attacker is the user that an attacker logs in as.
func attacker(i int) string { return fmt.Sprintf("x-%d", i) }

// Values of row.as.
const (
	oneUser = "one user"
	forger  = "forger"
)

// tokens are the attackers'.
func (o *row) tokens(attackers int) (list []string, err error) {
	if o.as == oneUser {
		attackers = 1
	}
	for i := range attackers {
		token, err := world.Token(attacker(i))
		if err != nil {
			return nil, err
		}
		if o.as == forger {
			head, _, _ := strings.Cut(token, ".")
			_, signature, _ := strings.Cut(token[len(head)+1:], ".")
			token = head + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"user_id":"root","exp":4102444800}`)) + "." + signature
		}
		list = append(list, token)
	}
	return list, nil
}

// with are the settings of the row's gateway.
func (o *row) with(short bool) map[string]string {
	s := maps.Clone(o.settings)
	if s == nil {
		s = map[string]string{}
	}
	if short {
		maps.Copy(s, o.shortSettings)
	}
	return s
}

// scheme is that of the public port.
func (o *row) scheme() string {
	if o.settings["http.tls.cert_file"] != "" {
		return "wss"
	}
	return "ws"
}

// abuse lasts for as long as it is to, or until the attackers have used up their attempts.
func (r *running) abuse(ctx context.Context, hold time.Duration, finished chan error) {
	ctx, cancel := context.WithTimeout(ctx, hold)
	defer cancel()
	during := make(chan error, 1)
	go func() {
		if r.row.during != nil {
			during <- r.row.during(ctx, r)
			return
		}
		during <- nil
	}()
	select {
	case err := <-finished:
		r.check(r.spec.Total > 0 || !r.spec.Again, "the attackers ended early")
		finished <- err
	case <-ctx.Done():
	}
	cancel()
	if err := <-during; err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		r.check(false, "%v", err)
	}
}

// resident is what the gateway has resident after a collection, in bytes.
func (r *running) resident(ctx context.Context, s *procstat.Sampler) (int64, error) {
	if status, _, err := r.g.Get(ctx, "/debug/pprof/heap?gc=1"); err != nil || status != http.StatusOK {
		return 0, fmt.Errorf("collect: status %d, %w", status, err)
	}
	return s.RSS(1)
}

// settled waits until only the users are left, their sessions and connections, and memory is not short.
func (r *running) settled(ctx context.Context) {
	const slack = 4 // newcomers
	var sessions, connections float64
	left := until(ctx, func() bool {
		m, err := r.g.Metrics(ctx)
		sessions, connections = m["im_gateway_shard_sessions"], m["im_gateway_transport_connections"]
		return err == nil && m["im_gateway_memory_pressure"] == 0 && sessions <= float64(r.users+slack) && connections <= float64(r.users+slack)
	})
	r.check(left, "%d users are there, but %v sessions and %v connections", r.users, sessions, connections)
}

// judge fills in what was counted, and what must hold.
func (r *running) judge(out *outcome, before, after map[string]float64) {
	r.check(after["im_gateway_transport_panics_total"] == 0, "a panic")
	out.Counted = map[string]float64{}
	for name, v := range after {
		grown := v - before[name]
		if grown <= 0 {
			continue
		}
		for _, family := range []string{"_transport_closes_total", "_transport_handshakes_total", "_refused_total", "_limited_total", "_accept_"} {
			if strings.Contains(name, family) {
				out.Counted[name] = grown
			}
		}
	}
	for _, name := range r.row.moved {
		grown := after[name] - before[name]
		r.check(grown > 0, "%s has not risen", name)
		out.Counted[name] = grown
	}
	for _, want := range r.row.expect {
		r.check(slices.ContainsFunc(slices.Collect(maps.Keys(out.Attack.Outcomes)), func(got string) bool { return matches(want, got) }),
			"no attacker saw %q", want)
	}
	for got, n := range out.Attack.Outcomes {
		r.check(slices.ContainsFunc(append(slices.Clone(r.row.expect), r.row.allow...), func(may string) bool { return matches(may, got) }),
			"%d attempts came to %q", n, got)
	}
	r.check(r.row.most == 0 || out.Attack.Outcomes[open] <= r.row.most, "%d attackers are in, %d may be", out.Attack.Outcomes[open], r.row.most)
	r.check(r.row.refusals || len(out.With.SentAgain) == 0, "users had to send again: %v", out.With.SentAgain)
	r.check(out.Before.Acks > 0 && out.With.Acks > 0 && out.After.Acks > 0, "acks before, in and after it: %d, %d, %d",
		out.Before.Acks, out.With.Acks, out.After.Acks)
	r.check(out.Before.Pushes > 0 && out.With.Pushes > 0 && out.After.Pushes > 0, "pushes before, in and after it: %d, %d, %d",
		out.Before.Pushes, out.With.Pushes, out.After.Pushes)
	r.check(out.After.Open == r.users && out.After.Outstanding == 0, "%d of %d users are connected, %d things outstanding",
		out.After.Open, r.users, out.After.Outstanding)
	r.check(len(out.After.NewcomersRefused) == 0 && out.After.Newcomers > 0, "newcomers afterwards: %d came in, others saw %v",
		out.After.Newcomers, out.After.NewcomersRefused)
	for _, w := range []users.Window{out.Before, out.With, out.Leaving, out.After} {
		for what, n := range w.Errors {
			out.Errors += n
			r.check(false, "users saw %d times: %s", n, what)
		}
	}
	if out.Before.P99 > 0 {
		out.Ratio = math.Round(100*float64(out.With.P99)/float64(out.Before.P99)) / 100
	}
}

func matches(pattern, s string) bool {
	prefix, wild := strings.CutSuffix(pattern, "*")
	return s == pattern || wild && strings.HasPrefix(s, prefix)
}
