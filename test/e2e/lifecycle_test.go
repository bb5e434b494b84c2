package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// entry returns the gateway's entry in etcd, or nothing.
func entry(t *testing.T, g *gateway) (addr, metadata string, lease clientv3.LeaseID) {
	t.Helper()
	resp, err := env.keys.Get(deadline(t), "im-gateway/"+g.id)
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Kvs) == 0 {
		return "", "", 0
	}
	var e struct {
		Addr     string
		Metadata string
	}
	decode(t, resp.Kvs[0].Value, &e)
	return e.Addr, e.Metadata, clientv3.LeaseID(resp.Kvs[0].Lease)
}

func TestEtcdEntry(t *testing.T) {
	g := start(t, user("gw"), nil)
	addr, metadata, lease := entry(t, g)
	var m struct {
		HTTP    string `json:"http"`
		Version string `json:"version"`
	}
	if err := json.Unmarshal([]byte(metadata), &m); err != nil || addr != g.grpc || m.HTTP != g.addr || m.Version == "" {
		t.Fatalf("entry %s %s: %v", addr, metadata, err)
	}
	if _, err := env.keys.Revoke(deadline(t), lease); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the entry is back under a new lease", func() bool {
		again, _, l := entry(t, g)
		return again == g.grpc && l != lease
	})
	g.kill()
	eventually(t, "the entry goes with its lease", func() bool {
		addr, _, _ := entry(t, g)
		return addr == ""
	})
}

// TestSIGTERM: clients are told, closed with 4002, nothing is left behind, exit code 0.
func TestSIGTERM(t *testing.T) {
	g := start(t, user("gw"), nil)
	name := user("alice")
	c := connect(t, g, name)
	c.send("m", "c-1", 1)
	if err := g.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	acked, told := false, false
	for {
		f, err := c.next()
		if err != nil {
			if !strings.Contains(err.Error(), "4002") {
				t.Errorf("closed: %v", err)
			}
			break
		}
		switch f.Type {
		case "message-ack":
			acked = true
		case "reconnect":
			told = strings.Contains(string(f.Data), "retry_after_ms")
		}
	}
	if !acked || !told {
		t.Errorf("acked %v, told to reconnect %v", acked, told)
	}
	if code := g.exit(); code != 0 {
		t.Errorf("exit code %d:\n%s", code, g.log)
	}
	if e := presence(t, name); len(e) > 0 {
		t.Errorf("presence left: %v", e)
	}
	if addr, _, _ := entry(t, g); addr != "" {
		t.Error("the entry in etcd is left")
	}
	if resp, err := env.keys.Get(deadline(t), "im-gateway-owners/"+g.id); err != nil || len(resp.Kvs) > 0 {
		t.Errorf("the owner's key is left: %v", err)
	}
	if !strings.Contains(g.log.String(), "drained and stopped") {
		t.Error("no account of the stop in the log")
	}
}

func TestSecondSIGTERMStopsAtOnce(t *testing.T) {
	g := start(t, user("gw"), settings{"drain.window": "5m", "drain.deadline": "10m"})
	connect(t, g, user("alice"))
	for range 2 {
		if err := g.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the signal is taken", func() bool { return strings.Contains(g.log.String(), "a second signal stops at once") })
	}
	if code := g.exit(); code != 1 {
		t.Errorf("exit code %d", code)
	}
}

// TestBacklogFindsItsUsersBack: what was produced while a gateway was down is delivered after its
// restart, under the same id, to the user who has come back.
func TestBacklogFindsItsUsersBack(t *testing.T) {
	id := user("gw")
	g := start(t, id, nil)
	name := user("alice")
	connect(t, g, name)
	if code := g.stop(); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	produce(t, g, name, fmt.Sprintf(`{"target_user_id":%q,"message_id":"m-1","data":"while you were away"}`, name))
	g = start(t, id, settings{"kafka.start_grace": "3s"})
	c := connect(t, g, name)
	if f := c.wait("new-message"); f.MessageID != "m-1" {
		t.Errorf("got %+v", f)
	}
}

func TestWaitsForWhatIsMissing(t *testing.T) {
	g := launch(t, user("gw"), settings{"redis.addrs": freeAddr()})
	eventually(t, "/readyz names redis", func() bool {
		resp, err := http.Get("http://" + g.admin + "/readyz")
		if err != nil {
			return false
		}
		defer func() { _ = resp.Body.Close() }()
		var r struct {
			Missing []struct{ Name, Reason string }
		}
		if err := json.NewDecoder(resp.Body).Decode(&r); err != nil {
			return false
		}
		return resp.StatusCode == 503 && len(r.Missing) > 0 && r.Missing[0].Name == "redis" && strings.Contains(g.log.String(), "waiting for redis")
	})
	if code := g.stop(); code != 0 {
		t.Errorf("exit code %d of a gateway stopped while it waits", code)
	}
}

func TestRefusesToStart(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change settings
		code   int
		want   []string
	}{
		{"bad configuration", settings{"http.addr": "nonsense", "websocket.heartbeat": "1ns", "kafka.no_such_key": "1"}, 2,
			[]string{"http.addr", "websocket.heartbeat", "IM_KAFKA_NO_SUCH_KEY"}},
		{"missing shared topic", settings{"kafka.upstream_topic": "no-such-topic"}, 1, []string{"no-such-topic", "does not exist"}},
		{"strict", settings{"kafka.strict": "true"}, 1, []string{"replication", "kafka.strict"}},
		{"port in use", settings{"http.addr": "127.0.0.1:" + strings.Split(env.redis, ":")[1]}, 1, []string{"http.addr", "address already in use"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := launch(t, user("gw"), tc.change)
			if code := g.exit(); code != tc.code {
				t.Errorf("exit code %d, want %d", code, tc.code)
			}
			for _, want := range tc.want {
				if !strings.Contains(g.log.String(), want) {
					t.Errorf("the log does not say %q:\n%s", want, g.log)
				}
			}
		})
	}
}

// TestSameIDTwice: one gateway_id, two processes. The second waits for the first, which goes on.
func TestSameIDTwice(t *testing.T) {
	id := user("gw")
	first := start(t, id, nil)
	second := launch(t, id, nil)
	eventually(t, "the second says why it waits", func() bool {
		return strings.Contains(second.log.String(), id+" is in use") || strings.Contains(second.log.String(), "owner")
	})
	name := user("alice")
	c := connect(t, first, name)
	produce(t, first, name, fmt.Sprintf(`{"target_user_id":%q,"data":1}`, name))
	c.wait("new-message")
	if code := first.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	eventually(t, "the second takes over", func() bool {
		resp, err := http.Get("http://" + second.admin + "/readyz")
		if err != nil {
			return false
		}
		_ = resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
}
