package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/coder/websocket"

	"im-gateway/test/chaos/traffic"
	"im-gateway/test/chaos/world"
)

func readyz(ctx context.Context, g *world.Gateway) (int, string, error) { return g.Get(ctx, "/readyz") }

func (r *row) login(ctx context.Context) (status int, text string, took time.Duration, err error) {
	return post(ctx, r.g(1), "/api/auth/login", `{"username":"someone","password":"secret"}`)
}

func logicDown(ctx context.Context, r *row) error {
	r.g(1).LogicLink.Down()
	status, text, _, err := r.login(ctx)
	r.check(err == nil && status == 503, "login without im-logic: %d %s %v, want 503", status, text, err)
	if status == 503 {
		r.bite("login was answered 503: %s", strings.TrimSpace(text))
	}
	r.hold(ctx, 5*time.Second)
	if err := r.g(1).LogicLink.Up(); err != nil {
		return err
	}
	r.mend()
	r.check(until(ctx, 30*time.Second, func() bool { s, _, _, _ := r.login(ctx); return s == 200 }), "login does not come back")
	return nil
}

func logicHangs(ctx context.Context, r *row) error {
	r.w.Logic.Set(world.Hang)
	before := r.w.Logic.Calls.Load()
	status, text, took, err := r.login(ctx)
	r.check(err == nil && status == 504, "login with a hanging im-logic: %d %s %v, want 504", status, text, err)
	if r.w.Logic.Calls.Load() > before {
		r.bite("im-logic took the call and answered nothing; the login ended after %s with %d", took.Round(100*time.Millisecond), status)
	}
	return nil
}

func logicSlow(ctx context.Context, r *row) error {
	r.w.Logic.Set(world.Slow)
	status, text, took, err := r.login(ctx)
	r.check(err == nil && status == 200, "login with a slow im-logic: %d %s %v", status, text, err)
	if took >= time.Second {
		r.bite("a login took %s", took.Round(10*time.Millisecond))
	}
	return nil
}

func logicWrong(ctx context.Context, r *row) error {
	r.w.Logic.Set(world.Wrong)
	status, text, _, err := r.login(ctx)
	r.check(err == nil && status >= 500, "an answer without a token became %d %s, %v", status, text, err)
	r.bite("an answer without token and user was passed on as %d", status)
	r.w.Logic.Set(world.Fails)
	status, text, _, err = r.login(ctx)
	r.check(err == nil && status == 500, "a failing im-logic became %d %s, %v", status, text, err)
	return nil
}

func gatewayKilled(ctx context.Context, r *row) error {
	g := r.g(2)
	g.Kill()
	r.died(g)
	var owner string
	taken := until(ctx, 30*time.Second, func() bool {
		_, _, owner = r.leaseOf(ctx, "im-gateway-owners/g2")
		return strings.HasPrefix(owner, "taker:")
	})
	r.check(taken, "nobody took the dead gateway's topic over")
	if taken {
		r.bite("the process is gone; etcd: im-gateway-owners/g2 = %s", owner)
	}
	r.hold(ctx, 5*time.Second)
	return nil
}

func gatewayFrozen(ctx context.Context, r *row) error {
	g := r.g(2)
	if err := g.Stop(); err != nil {
		return err
	}
	var owner string
	taken := until(ctx, 30*time.Second, func() bool {
		_, _, owner = r.leaseOf(ctx, "im-gateway-owners/g2")
		return strings.HasPrefix(owner, "taker:")
	})
	r.check(taken, "nobody took the frozen gateway's topic over")
	r.hold(ctx, 5*time.Second)
	if taken {
		r.bite("etcd: im-gateway-owners/g2 = %s while it was frozen", owner)
	}
	r.died(g)
	if err := g.Cont(); err != nil {
		return err
	}
	r.mend()
	wait, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	code, err := g.Wait(wait)
	if err != nil {
		return err
	}
	r.check(code == 1, "the zombie ended with %d, want 1", code)
	r.died(g)
	return nil
}

func gatewayFiles(ctx context.Context, r *row) error {
	g := r.g(2)
	if err := r.restart(ctx, g, map[string]string{"ulimit": "600"}); err != nil {
		return err
	}
	crowd := traffic.Storm(ctx, 1000, g.Addr, func(i int) (string, error) { return world.Token(fmt.Sprintf("files-%d-%d", r.began.UnixNano(), i)) })
	seen := crowd.Seen()
	r.check(g.Alive(), "the gateway died")
	crowd.Close()
	if seen.Accepted < 1000 {
		r.bite("%d of 1,000 were accepted, the others refused: %v", seen.Accepted, seen.Refused)
	}
	r.check(seen.Accepted > 0 && seen.Refused["503"]+seen.Refused["dial"] > 0, "accepted %d, refused %v", seen.Accepted, seen.Refused)
	served := until(ctx, 20*time.Second, func() bool {
		c, err := dial(ctx, g.Addr, fmt.Sprint("after-", r.began.UnixNano()))
		if err == nil {
			_ = c.CloseNow()
		}
		return err == nil
	})
	r.check(served, "the gateway takes no connection after the crowd has gone")
	r.mend()
	return r.restart(ctx, g, nil)
}

func gatewayMemory(ctx context.Context, r *row) error {
	g := r.g(2)
	const budget = 1 << 20
	if err := r.restart(ctx, g, map[string]string{"websocket.node_egress_budget_bytes": fmt.Sprint(budget), "GOMEMLIMIT": "64MiB"}); err != nil {
		return err
	}
	stuck, prefix, err := r.stuck(ctx, g, 16, traffic.NeverReads)
	if err != nil {
		return err
	}
	var most float64
	watch, stop := context.WithCancel(ctx)
	go func() {
		for watch.Err() == nil {
			if m, err := g.Metrics(watch); err == nil {
				most = max(most, m["im_gateway_shard_egress_bytes"])
			}
			sleep(watch, 20*time.Millisecond)
		}
	}()
	err = r.load(ctx, g, prefix, 16, 64, 16<<10)
	stop()
	if err != nil {
		return err
	}
	m, err := g.Metrics(ctx)
	if err != nil {
		return err
	}
	r.check(most < 4*budget, "%.0f bytes waited, the budget is %d", most, budget)
	if slow := m["im_gateway_shard_slow_consumers_total"]; slow > 0 {
		r.bite("%.0f slow clients were closed; at most %.0f bytes waited", slow, most)
	}
	for _, o := range stuck {
		o.Close()
	}
	r.mend()
	return r.restart(ctx, g, nil)
}

// stuck opens clients of users of their own that do not read as they should.
func (r *row) stuck(ctx context.Context, g *world.Gateway, n int,
	open func(context.Context, string, string) (*traffic.Odd, error)) (list []*traffic.Odd, prefix string, err error) {
	prefix = fmt.Sprintf("odd-%d-", time.Now().UnixNano())
	for i := range n {
		token, err := world.Token(prefix + fmt.Sprint(i))
		if err != nil {
			return nil, "", err
		}
		o, err := open(ctx, g.Addr, token)
		if err != nil {
			return nil, "", err
		}
		list = append(list, o)
	}
	return list, prefix, nil
}

// load writes records for them and waits until each has an end.
func (r *row) load(ctx context.Context, g *world.Gateway, prefix string, users, records, bytes int) error {
	for i := range users {
		if err := produce(ctx, r.w, g.ID, prefix+fmt.Sprint(i), prefix+fmt.Sprint(i), records, bytes); err != nil {
			return err
		}
	}
	settled := until(ctx, 90*time.Second, func() bool {
		l, err := g.Ledger(ctx)
		return err == nil && l.Downstream.In >= int64(users*records) && l.Downstream.Open < 100
	})
	r.check(settled, "what was written for clients that do not read has no end")
	return nil
}

func shardPanic(ctx context.Context, r *row) error { return r.panics(ctx, "shard") }
func loopPanic(ctx context.Context, r *row) error  { return r.panics(ctx, "loop") }

func (r *row) panics(ctx context.Context, where string) error {
	g := r.g(1)
	mark := g.Mark()
	for i := range 3 {
		code, err := ask(ctx, g.Addr, fmt.Sprintf("panic-%d-%d", r.began.UnixNano(), i),
			`{"type":"chaos-panic-`+where+`","message_id":"p","data":1}`)
		if err != nil {
			return err
		}
		r.check(code == websocket.StatusInternalError, "the session at fault was closed with %d, want 1011", code)
	}
	if g.LogHas(mark, `"panic":"asked for"`) {
		r.bite("three panics are in the log, with stacks; the process is %d still", g.Pid())
	}
	return nil
}

func neverReads(ctx context.Context, r *row) error { return r.slowClients(ctx, traffic.NeverReads) }
func dripReads(ctx context.Context, r *row) error  { return r.slowClients(ctx, traffic.DripReader) }

func (r *row) slowClients(ctx context.Context, open func(context.Context, string, string) (*traffic.Odd, error)) error {
	g := r.g(1)
	list, prefix, err := r.stuck(ctx, g, 4, open)
	if err != nil {
		return err
	}
	if err := r.load(ctx, g, prefix, 4, 128, 64<<10); err != nil {
		return err
	}
	found, err := undelivered(ctx, r.w, prefix)
	if err != nil {
		return err
	}
	if found["slow_consumer"] > 0 {
		r.bite("undelivered by reason: %v", found)
	}
	for _, o := range list {
		o.Close()
	}
	return nil
}

func vanishes(ctx context.Context, r *row) error {
	g := r.g(1)
	user := fmt.Sprint("vanish-", time.Now().UnixNano())
	token, err := world.Token(user)
	if err != nil {
		return err
	}
	o, err := traffic.Vanisher(ctx, g.Front.Addr(), token)
	if err != nil {
		return err
	}
	defer o.Close()
	key := "user_session:" + user
	there, err := world.RedisCommand(ctx, r.w.RedisAddr, "HGET", key, "gateway_id")
	if err != nil {
		return err
	}
	if err := g.Front.Cut(); err != nil {
		return err
	}
	gone := until(ctx, 30*time.Second, func() bool {
		n, err := world.RedisCommand(ctx, r.w.RedisAddr, "HGET", key, "gateway_id")
		return err != nil && n == ""
	})
	r.check(gone, "presence still names a client that has vanished")
	if gone && there == g.ID {
		r.bite("Redis named %s, and after the heartbeat's timeout nobody", there)
	}
	return nil
}

func storm(ctx context.Context, r *row) error {
	n := 2000
	if r.short {
		n = 500
	}
	crowd := traffic.Storm(ctx, n, r.g(1).Addr, func(i int) (string, error) { return world.Token(fmt.Sprintf("storm-%d-%d", r.began.UnixNano(), i)) })
	defer crowd.Close()
	first := crowd.Seen()
	crowd.Again(ctx)
	both := crowd.Seen()
	r.check(both.Accepted == 2*n, "%d of %d handshakes were accepted: %v", both.Accepted, 2*n, both.Refused)
	r.bite("%d clients, then again %d at once, were let in", first.Accepted, both.Accepted-first.Accepted)
	return nil
}

func flood(ctx context.Context, r *row) error {
	user := fmt.Sprint("flood-", time.Now().UnixNano())
	token, err := world.Token(user)
	if err != nil {
		return err
	}
	log := &traffic.Log{}
	o, err := traffic.Flooder(ctx, traffic.FloodOptions{User: user, Addr: r.g(1).Addr, Token: token, PerSecond: 20_000, Bytes: 200}, log)
	if err != nil {
		return err
	}
	r.hold(ctx, 10*time.Second)
	o.Close()
	logs := log.Snapshot()
	acked, refused := 0, 0
	for _, a := range logs.Clients[0].Acks {
		if a.Success() {
			acked++
		} else {
			refused++
		}
	}
	seen := o.Seen()
	r.check(acked > 0, "nothing of the flood was acknowledged")
	r.check(seen.CloseCode == 1008, "the flood was not stopped: %+v", seen)
	r.bite("%d messages sent, %d acknowledged, %d refused: %v; closed with %d", len(logs.Clients[0].Sent), acked, refused, seen.Refused, seen.CloseCode)
	return nil
}

// hops: at every moment in which a session is open and its hop long done, Redis names its gateway.
func hops(ctx context.Context, r *row) error {
	user := fmt.Sprint("hopper-", time.Now().UnixNano())
	key := "user_session:" + user
	n, wrong := 0, 0
	var last *websocket.Conn
	look := func() {
		got, err := r.w.Cache.Do(ctx, r.w.Cache.B().Hget().Key(key).Field("gateway_id").Build()).ToString()
		if err != nil || got != r.g(1+(n-1)%2).ID {
			wrong++
		}
	}
	began := time.Now()
	for time.Since(began) < 5*time.Second && ctx.Err() == nil {
		c, err := dial(ctx, r.g(1+n%2).Addr, user)
		if err != nil {
			return err
		}
		if last != nil {
			_ = last.CloseNow()
		}
		last = c
		n++
		sleep(ctx, 2*time.Millisecond) // the session before has ended meanwhile
		look()
	}
	r.check(wrong == 0, "Redis did not name the gateway of the session that was open in %d of %d looks between hops", wrong, n)
	defer func() { _ = last.CloseNow() }()
	rate := float64(n) / time.Since(began).Seconds()
	want := r.g(1 + (n-1)%2).ID
	go func() { // keeps the last session alive: it answers pings
		for {
			if _, _, err := last.Read(ctx); err != nil {
				return
			}
		}
	}()
	wrong = 0
	for checks := 0; checks < 300 && ctx.Err() == nil; checks++ {
		look()
		sleep(ctx, 20*time.Millisecond)
	}
	r.check(wrong == 0, "Redis did not name %s in %d of 300 looks after the last hop", want, wrong)
	r.bite("%d hops, %.0f per second", n, rate)
	return nil
}

func rollingRestart(ctx context.Context, r *row) error {
	for _, g := range r.w.Gateways {
		pid := g.Pid()
		if err := r.restart(ctx, g, nil); err != nil {
			return err
		}
		r.check(g.LogHas(0, "drained and stopped"), "no account of the stop in the log of %s", g.ID)
		r.bite("%s: process %d became %d", g.ID, pid, g.Pid())
		sleep(ctx, 2*time.Second)
	}
	return nil
}

func adminDrain(ctx context.Context, r *row) error {
	g := r.g(3)
	if err := r.restart(ctx, g, map[string]string{"admin.token": "operators-token"}); err != nil {
		return err
	}
	sleep(ctx, time.Second)
	mark := g.Mark()
	status, err := g.Drain(ctx, "operators-token")
	if err != nil {
		return err
	}
	r.check(status == 202, "POST /drain was answered %d", status)
	wait, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	code, err := g.Wait(wait)
	if err != nil {
		return err
	}
	r.died(g)
	r.check(code == 0, "it ended with %d", code)
	if g.LogHas(mark, "drained and stopped") {
		r.bite("exit code %d, and an account in the log", code)
	}
	return nil
}

// publishBy sends a message over HTTP.
func publishBy(ctx context.Context, g *world.Gateway, user, id string, bytes int) (int, string, time.Duration, error) {
	return postAs(ctx, g, user, "/api/messages", fmt.Sprintf(`{"type":"m","message_id":%q,"data":%q}`, id, strings.Repeat("x", bytes)))
}
