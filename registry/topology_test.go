//go:build real

package registry

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestPresenceFrozen: a Redis that takes everything and answers nothing holds nobody beyond the
// deadline, and is used again when it goes on.
func TestPresenceFrozen(t *testing.T) {
	t.Parallel()
	s := startRedis(t, "")
	c := dialRedis(t, RedisOptions{Addrs: []string{s.addr()}})
	a, _ := newPresence(t, c, "gw-a")
	version := claim(t, a, "alice", "s1").Version
	if err := s.process.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	entries := make([]Entry, 3*presenceChunk)
	for i := range entries {
		entries[i] = Entry{User: fmt.Sprint("u", i), Session: "s"}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	began := time.Now()
	for i, r := range a.Claim(ctx, entries) {
		if r.Err == nil {
			t.Fatalf("entry %d: claimed", i)
		}
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %s", took)
	}
	if err := s.process.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	eventually(t, "Redis answers", func() bool { return RedisReachable(t.Context(), c) == nil })
	if refresh(t, a, "alice", "s1", version) {
		t.Error("superseded")
	}
}

// TestPresenceSentinel: the master fails, the replica takes over.
func TestPresenceSentinel(t *testing.T) {
	t.Parallel()
	const password, sentinelPassword = "secret", "watch"
	master := startRedisWith(t, password, "--masterauth", password)
	replica := startRedisWith(t, password, "--masterauth", password, "--replicaof", "127.0.0.1 "+strconv.Itoa(master.port))
	eventually(t, "the replica follows", func() bool {
		info, err := replica.do(t.Context(), "INFO", "replication").ToString()
		return err == nil && strings.Contains(info, "master_link_status:up")
	})
	conf := filepath.Join(t.TempDir(), "sentinel.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, "sentinel monitor im 127.0.0.1 %d 1\nsentinel auth-pass im %s\n"+
		"sentinel down-after-milliseconds im 500\nsentinel failover-timeout im 3000\n", master.port, password), 0o600); err != nil {
		t.Fatal(err)
	}
	sentinel := &redisServer{t: t, port: freePort(t), password: sentinelPassword}
	sentinel.process = launch(t, "redis-server", "redis-server", conf, "--sentinel", "--bind", "127.0.0.1",
		"--port", strconv.Itoa(sentinel.port), "--requirepass", sentinelPassword)
	t.Cleanup(sentinel.stop)
	sentinel.process.await(t, func(ctx context.Context) error { return sentinel.do(ctx, "PING").Error() })
	eventually(t, "the Sentinel knows the replica", func() bool {
		list, err := sentinel.do(t.Context(), "SENTINEL", "REPLICAS", "im").ToArray()
		return err == nil && len(list) == 1
	})

	c := dialRedis(t, RedisOptions{
		Addrs: []string{sentinel.addr()}, SentinelMaster: "im", Password: password, SentinelPassword: sentinelPassword,
	})
	a, _ := newPresence(t, c, "gw-a")
	version := claim(t, a, "alice", "s1").Version
	master.stop()
	var last error
	began := time.Now()
	eventually(t, "presence works on the new master", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		r := a.Refresh(ctx, []Entry{{User: "alice", Session: "s1", Version: version}})[0]
		last = r.Err
		return r.Err == nil && !r.Superseded
	})
	t.Logf("took %s over; last error %v", time.Since(began), last)
	if v, err := replica.do(t.Context(), "HGET", PresenceKey("alice"), "session_id").ToString(); err != nil || v != "s1" {
		t.Errorf("on the new master: %q, %v", v, err)
	}
	if got := claim(t, a, "alice", "s2"); got.Version <= version {
		t.Errorf("claim %+v after version %d", got, version)
	}
}

// startCluster starts a Cluster of masters that share the slots.
func startCluster(t *testing.T, nodes int) []*redisServer {
	t.Helper()
	servers := make([]*redisServer, nodes)
	for i := range servers {
		servers[i] = startRedisWith(t, "", "--cluster-enabled", "yes", "--cluster-node-timeout", "1000",
			"--cluster-require-full-coverage", "no", "--cluster-config-file", "nodes.conf",
			"--cluster-port", strconv.Itoa(freePort(t)))
	}
	const slots = 16384
	for i, s := range servers {
		must(t, s, "CLUSTER", "ADDSLOTSRANGE", strconv.Itoa(slots*i/nodes), strconv.Itoa(slots*(i+1)/nodes-1))
		bus := s.args[len(s.args)-1]
		if i > 0 {
			must(t, servers[0], "CLUSTER", "MEET", "127.0.0.1", strconv.Itoa(s.port), bus)
		}
	}
	for _, s := range servers {
		eventually(t, "the cluster knows all slots", func() bool {
			info, err := s.do(t.Context(), "CLUSTER", "INFO").ToString()
			return err == nil && strings.Contains(info, "cluster_state:ok") &&
				strings.Contains(info, "cluster_slots_assigned:16384") &&
				strings.Contains(info, fmt.Sprintf("cluster_known_nodes:%d", nodes))
		})
	}
	return servers
}

func must(t *testing.T, s *redisServer, args ...string) string {
	t.Helper()
	answer, err := s.do(t.Context(), args...).ToAny()
	if err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	return fmt.Sprint(answer)
}

// TestPresenceCluster: users on every node; a slot that moves; a node that dies takes only its own
// users with it.
func TestPresenceCluster(t *testing.T) {
	t.Parallel()
	servers := startCluster(t, 3)
	c := dialRedis(t, RedisOptions{Addrs: []string{servers[0].addr(), servers[1].addr()}, Cluster: true})
	a, _ := newPresence(t, c, "gw-a")
	entries := make([]Entry, presenceChunk+100)
	for i := range entries {
		entries[i] = Entry{User: fmt.Sprint("u", i), Session: fmt.Sprint("s", i)}
	}
	for i, r := range a.Claim(t.Context(), entries) {
		if r.Err != nil {
			t.Fatalf("claim %d: %v", i, r.Err)
		}
		entries[i].Version = r.Version
	}
	held := make([]int, len(servers))
	for i, s := range servers {
		n, err := s.do(t.Context(), "DBSIZE").AsInt64()
		if err != nil || n == 0 {
			t.Fatalf("node %d holds %d users, error %v", i, n, err)
		}
		held[i] = int(n)
	}

	// The slot of one user moves to another node; the client still asks the old one.
	mover := entries[0]
	slot := strconv.Itoa(slotOf(t, servers[0], PresenceKey(mover.User)))
	from := 0
	for i, s := range servers {
		if n, err := s.do(t.Context(), "CLUSTER", "COUNTKEYSINSLOT", slot).AsInt64(); err == nil && n > 0 {
			from = i
		}
	}
	to := (from + 1) % len(servers)
	must(t, servers[from], "DEL", PresenceKey(mover.User))
	id := must(t, servers[to], "CLUSTER", "MYID")
	for _, i := range []int{to, from, 3 - to - from} {
		must(t, servers[i], "CLUSTER", "SETSLOT", slot, "NODE", id)
	}
	eventually(t, "the moved user is found on the other node", func() bool {
		r := a.Refresh(t.Context(), []Entry{mover})[0]
		return r.Err == nil && !r.Superseded
	})
	if got := must(t, servers[to], "HGET", PresenceKey(mover.User), "session_id"); got != mover.Session {
		t.Errorf("session %q on the other node", got)
	}

	dead := 3 - to - from
	servers[dead].stop()
	eventually(t, "only the dead node's users fail", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		failed := 0
		for _, r := range a.Refresh(ctx, entries) {
			if r.Err != nil {
				failed++
			}
		}
		return failed == held[dead]
	})
	servers[dead].start()
	eventually(t, "all users are back", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		for _, r := range a.Refresh(ctx, entries) {
			if r.Err != nil {
				return false
			}
		}
		return true
	})
}

func slotOf(t *testing.T, s *redisServer, key string) int {
	t.Helper()
	n, err := s.do(t.Context(), "CLUSTER", "KEYSLOT", key).AsInt64()
	if err != nil {
		t.Fatal(err)
	}
	return int(n)
}
