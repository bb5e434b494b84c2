package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"im-gateway/test/chaos/world"
)

func etcdStopped(ctx context.Context, r *row) error {
	r.w.Etcd.Kill()
	down := time.Now()
	_, err := roundTrip(ctx, r.w.EtcdAddr, http2Preface, time.Second)
	r.hold(ctx, 60*time.Second)
	if err != nil {
		r.bite("nothing listened on etcd's port; %d acks meanwhile", r.acks(down, time.Now()))
	}
	for _, g := range r.w.Gateways {
		status, _, err := readyz(ctx, g)
		r.check(err == nil && status == 200, "%s is not ready without etcd: %d, %v", g.ID, status, err)
	}
	r.mend()
	return r.w.Etcd.Start(ctx)
}

func (r *row) leaseOf(ctx context.Context, key string) (lease int64, revision int64, value string) {
	resp, err := r.w.Keys.Get(ctx, key)
	if err != nil || len(resp.Kvs) == 0 {
		return 0, 0, ""
	}
	return resp.Kvs[0].Lease, resp.Kvs[0].ModRevision, string(resp.Kvs[0].Value)
}

func leaseRevoked(ctx context.Context, r *row) error {
	for _, key := range []string{"im-gateway-owners/g2", "im-gateway/g2"} {
		before, _, _ := r.leaseOf(ctx, key)
		if err := r.w.RevokeLease(ctx, key); err != nil {
			return err
		}
		var after int64
		back := until(ctx, 20*time.Second, func() bool {
			after, _, _ = r.leaseOf(ctx, key)
			return after != 0 && after != before
		})
		r.check(back, "%s did not come back", key)
		if back {
			r.bite("%s: lease %x became %x", key, before, after)
		}
	}
	return nil
}

// slow adds latency to the links of all gateways and looks at it by a round trip through one of them.
func (r *row) slow(ctx context.Context, links []*world.Link, d time.Duration, command string) error {
	for _, l := range links {
		if err := l.Latency(d); err != nil {
			return err
		}
	}
	took, err := roundTrip(ctx, links[0].Addr(), command, 10*time.Second)
	r.hold(ctx, 15*time.Second)
	if err == nil && took > d*18/10 {
		r.bite("a round trip through the proxy took %s", took.Round(10*time.Millisecond))
	}
	return nil
}

func etcdSlow(ctx context.Context, r *row) error {
	return r.slow(ctx, []*world.Link{r.g(1).EtcdLink, r.g(2).EtcdLink, r.g(3).EtcdLink}, 400*time.Millisecond, http2Preface)
}

func redisSlow(ctx context.Context, r *row) error {
	return r.slow(ctx, []*world.Link{r.g(1).RedisLink, r.g(2).RedisLink, r.g(3).RedisLink}, 300*time.Millisecond, redisPing)
}

// etcdCut: the others take the topic over; the gateway is fenced by Kafka, ends, and its clients go
// elsewhere.
func etcdCut(ctx context.Context, r *row) error {
	g := r.g(2)
	if err := g.EtcdLink.Cut(); err != nil {
		return err
	}
	var owner string
	taken := until(ctx, 30*time.Second, func() bool {
		_, _, owner = r.leaseOf(ctx, "im-gateway-owners/g2")
		return strings.HasPrefix(owner, "taker:")
	})
	r.check(taken, "nobody took the topic over")
	if taken {
		r.bite("etcd: im-gateway-owners/g2 = %s", owner)
	}
	wait, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	code, err := g.Wait(wait)
	if err != nil {
		return err
	}
	r.check(code == 1, "the fenced gateway ended with %d, want 1", code)
	r.died(g)
	return nil
}

func redisStopped(ctx context.Context, r *row) error {
	if err := r.w.Redis.Stop(); err != nil {
		return err
	}
	down := time.Now()
	_, err := roundTrip(ctx, r.w.RedisAddr, redisPing, time.Second)
	// Connecting goes on without presence.
	c, dialErr := dial(ctx, r.g(1).Addr, fmt.Sprint("no-redis-", down.UnixNano()))
	r.check(dialErr == nil, "no session without Redis: %v", dialErr)
	if dialErr == nil {
		_ = c.CloseNow()
	}
	r.hold(ctx, 20*time.Second)
	if err != nil {
		r.bite("Redis did not answer; %d acks meanwhile", r.acks(down, time.Now()))
	}
	r.mend()
	return r.w.Redis.Cont()
}

func redisEmpty(ctx context.Context, r *row) error {
	r.w.Redis.Kill()
	sleep(ctx, time.Second)
	r.mend()
	if err := r.w.Redis.Start(ctx); err != nil {
		return err
	}
	info, err := world.RedisCommand(ctx, r.w.RedisAddr, "INFO", "server")
	if err != nil {
		return err
	}
	for line := range strings.Lines(info) {
		if strings.HasPrefix(line, "uptime_in_seconds:") {
			r.bite("a new Redis: %s", strings.TrimSpace(line))
		}
	}
	return nil
}

func redisReadOnly(ctx context.Context, r *row) error {
	port := func(addr string) string { return addr[strings.LastIndexByte(addr, ':')+1:] }
	if _, err := world.RedisCommand(ctx, r.w.StandbyAddr, "REPLICAOF", "NO", "ONE"); err != nil {
		return err
	}
	if _, err := world.RedisCommand(ctx, r.w.RedisAddr, "REPLICAOF", "127.0.0.1", port(r.w.StandbyAddr)); err != nil {
		return err
	}
	_, err := world.RedisCommand(ctx, r.w.RedisAddr, "SET", "probe", "1")
	r.hold(ctx, 15*time.Second)
	if err != nil && strings.Contains(err.Error(), "READONLY") {
		r.bite("a write was answered: %v", err)
	}
	r.mend()
	if _, err := world.RedisCommand(ctx, r.w.RedisAddr, "REPLICAOF", "NO", "ONE"); err != nil {
		return err
	}
	_, err = world.RedisCommand(ctx, r.w.StandbyAddr, "REPLICAOF", "127.0.0.1", port(r.w.RedisAddr))
	return err
}

func redisFailover(ctx context.Context, r *row) error {
	var links []*world.Link
	for _, g := range r.w.Gateways {
		links = append(links, g.RedisLink)
	}
	point := func(to string) error {
		for _, l := range links {
			l.Down()
			l.Point(to)
			if err := l.Up(); err != nil {
				return err
			}
		}
		return nil
	}
	r.w.Redis.Kill()
	if _, err := world.RedisCommand(ctx, r.w.StandbyAddr, "REPLICAOF", "NO", "ONE"); err != nil {
		return err
	}
	if err := point(r.w.StandbyAddr); err != nil {
		return err
	}
	c, err := dial(ctx, r.g(1).Addr, fmt.Sprint("failover-", time.Now().UnixNano()))
	if err != nil {
		return err
	}
	_ = c.CloseNow()
	r.hold(ctx, 10*time.Second)
	role, err := world.RedisCommand(ctx, r.w.StandbyAddr, "DBSIZE")
	if err == nil && !r.w.Redis.Alive() {
		r.bite("the old master is dead, the promoted one holds %s entries", role)
	}
	// Every gateway's presence is on the new master before all goes back.
	logs := r.swarm.Log.Snapshot()
	missing := 0
	until(ctx, presenceTTL, func() bool {
		missing = 0
		for _, c := range logs.Clients {
			got, err := world.RedisCommand(ctx, r.w.StandbyAddr, "HGET", "user_session:"+c.User, "gateway_id")
			if err != nil || got == "" {
				missing++
			}
		}
		return missing == 0
	})
	r.check(missing == 0, "%d users are missing on the promoted Redis after one TTL", missing)
	r.mend()
	if err := r.w.Redis.Start(ctx); err != nil {
		return err
	}
	if err := point(r.w.RedisAddr); err != nil {
		return err
	}
	port := r.w.RedisAddr[strings.LastIndexByte(r.w.RedisAddr, ':')+1:]
	_, err = world.RedisCommand(ctx, r.w.StandbyAddr, "REPLICAOF", "127.0.0.1", port)
	return err
}
