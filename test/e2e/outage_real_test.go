//go:build real

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/twmb/franz-go/pkg/kgo"

	"im-gateway/test/servers"
)

// outage is how long a server is away under load.
const outage = 30 * time.Second

func (g *gateway) rss(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", g.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.Atoi(strings.Fields(value)[0])
			if err != nil {
				t.Fatal(err)
			}
			return kb << 10
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// sender sends numbered messages at a fixed pace until ctx ends and notes the answers.
type sender struct {
	*client
	mu      sync.Mutex
	acked   map[string]ack
	refused map[string]string // last code by name
	sent    int
}

func (s *sender) read() {
	for {
		f, err := s.next()
		if err != nil {
			return
		}
		if f.Type != "message-ack" {
			continue
		}
		var a ack
		if json.Unmarshal(f.Data, &a) != nil {
			return
		}
		s.mu.Lock()
		if a.Status == "success" {
			s.acked[a.ClientMsgID] = a
		} else {
			s.refused[a.ClientMsgID] = a.Code
		}
		s.mu.Unlock()
	}
}

func (s *sender) run(ctx context.Context) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			b := fmt.Appendf(nil, `{"type":"load","message_id":"%s-%d","data":{"n":%d,"pad":%q}}`, s.name, s.sent, s.sent, strings.Repeat("x", 500))
			if s.Write(context.Background(), websocket.MessageText, b) != nil {
				return
			}
			s.sent++
		case <-ctx.Done():
			return
		}
	}
}

// unanswered is how many messages have had no answer, or OUTCOME_UNKNOWN alone.
func (s *sender) unanswered() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.sent {
		name := fmt.Sprintf("%s-%d", s.name, i)
		if _, ok := s.acked[name]; !ok && (s.refused[name] == "" || s.refused[name] == "OUTCOME_UNKNOWN") {
			n++
		}
	}
	return n
}

// TestKafkaAwayUnderLoad: the broker is killed for 30 s under load. Nothing acked is lost, memory
// stays bounded, traffic resumes by itself.
func TestKafkaAwayUnderLoad(t *testing.T) {
	g := start(t, user("gw"), settings{"log.level": "info"})
	var senders []*sender
	for range 50 {
		s := &sender{client: connect(t, g, user("load")), acked: map[string]ack{}, refused: map[string]string{}}
		senders = append(senders, s)
		go s.read()
	}
	before := g.rss(t)
	ctx, cancel := context.WithTimeout(context.Background(), outage+20*time.Second)
	defer cancel()
	var load sync.WaitGroup
	for _, s := range senders {
		load.Go(func() { s.run(ctx) })
	}
	<-time.After(3 * time.Second)
	env.real.kafka.Kill()
	<-time.After(outage)
	during := g.rss(t)
	if err := env.real.kafka.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	load.Wait()
	eventually(t, "every message is answered", func() bool {
		open := 0
		for _, s := range senders {
			open += s.unanswered()
		}
		return open == 0
	})
	// Traffic goes on by itself.
	c := connect(t, g, user("after"))
	c.send("m", "c-1", 1)
	if a := c.ack(); a.Status != "success" {
		t.Errorf("after the outage: %+v", a)
	}
	// The checker reads the topic, not the gateway.
	stored := places(t, "im-upstream-topic")
	acked, refused, lost, twice := 0, 0, 0, 0
	for _, s := range senders {
		s.mu.Lock()
		acked += len(s.acked)
		for name, a := range s.acked {
			place := fmt.Sprintf("%d/%d", a.Partition, a.Offset)
			at := stored[name]
			if len(at) == 0 || a.Offset >= 0 && at[place] == 0 {
				lost++
			}
			if len(at) > 1 {
				twice++
			}
		}
		for name, code := range s.refused {
			if _, late := s.acked[name]; !late && code != "OUTCOME_UNKNOWN" {
				refused++
				if len(stored[name]) > 0 {
					t.Errorf("%s was refused with %s and is stored", name, code)
				}
			}
		}
		s.mu.Unlock()
	}
	t.Logf("acked %d, refused %d, lost %d, stored twice %d; RSS %d MiB before, %d MiB in the outage", acked, refused, lost, twice, before>>20, during>>20)
	if lost > 0 || acked == 0 || refused == 0 {
		t.Errorf("acked %d, refused %d, lost %d", acked, refused, lost)
	}
	if during > before+(192<<20) {
		t.Errorf("RSS went from %d to %d MiB; the cap on bytes in flight is 64 MiB", before>>20, during>>20)
	}
}

// places returns, by client_msg_id, the places where records are stored.
func places(t *testing.T, topic string) map[string]map[string]int {
	t.Helper()
	stored := map[string]map[string]int{}
	err := readAll(deadline(t), []string{topic}, func(r *kgo.Record) {
		name := header(r, "client_msg_id")
		if stored[name] == nil {
			stored[name] = map[string]int{}
		}
		stored[name][fmt.Sprintf("%d/%d", r.Partition, r.Offset)]++
	})
	if err != nil {
		t.Fatal(err)
	}
	return stored
}

// TestStopWhileKafkaIsAway: SIGTERM ends in time, with what could not be stored answered.
func TestStopWhileKafkaIsAway(t *testing.T) {
	g := start(t, user("gw"), settings{"drain.deadline": "8s"})
	c := connect(t, g, user("alice"))
	env.real.kafka.Kill()
	c.send("m", "c-1", 1)
	code := g.stop()
	if err := env.real.kafka.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	if code != 0 {
		t.Errorf("exit code %d:\n%s", code, g.log)
	}
}

// TestDependenciesAway: Redis, then etcd go away; connects and messages go on, degraded.
func TestDependenciesAway(t *testing.T) {
	g := start(t, user("gw"), settings{"redis.refresh_interval": "1s", "redis.presence_ttl": "5s"})
	name := user("alice")
	c := connect(t, g, name)
	env.real.redis.Kill()
	env.real.etcd.Kill()
	other := connectDegraded(t, g, user("bob"))
	for _, c := range []*client{c, other} {
		c.send("m", "c-1", 1)
		if a := c.ack(); a.Status != "success" {
			t.Errorf("%s without Redis and etcd: %+v", c.name, a)
		}
	}
	if err := errors.Join(env.real.redis.Start(context.Background()), env.real.etcd.Start(context.Background())); err != nil {
		t.Fatal(err)
	}
	for _, c := range []*client{c, other} {
		eventually(t, "presence of "+c.name+" is back", func() bool { return presence(t, c.name)["session_id"] == c.session })
	}
	eventually(t, "the entry in etcd is back", func() bool { addr, _, _ := entry(t, g); return addr == g.grpc })
	select {
	case <-g.done:
		t.Error("the gateway ended")
	default:
	}
}

func connectDegraded(t *testing.T, g *gateway, name string) *client {
	t.Helper()
	ctx := deadline(t)
	conn, _, err := websocket.Dial(ctx, "ws://"+g.addr+"/ws?token="+token(t, name, time.Hour), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.CloseNow() })
	c := &client{t: t, name: name, Conn: conn}
	f := c.wait("connected")
	var d struct {
		SessionID string `json:"session_id"`
		Presence  string
	}
	decode(t, f.Data, &d)
	if d.Presence != "degraded" {
		t.Errorf("connected without Redis: %s", f.Data)
	}
	c.session = d.SessionID
	return c
}

// TestLogins: SASL to Kafka by both mechanisms and a password to Redis.
func TestLogins(t *testing.T) {
	password := hide("redis-pass-1337")
	redis, err := servers.StartRedis(context.Background(), t.TempDir(), password)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(redis.Kill)
	k := env.real.kafka
	for _, mechanism := range []string{"PLAIN", "SCRAM-SHA-256"} {
		g := start(t, user("gw"), settings{
			"kafka.brokers": k.SASLBroker, "kafka.sasl.mechanism": mechanism, "kafka.sasl.username": k.User,
			"kafka.sasl.password": hide(k.Password), "redis.addrs": redis.Addr, "redis.password": password,
		})
		c := connect(t, g, user("alice"))
		c.send("m", "c-1", 1)
		if a := c.ack(); a.Status != "success" {
			t.Errorf("%s: %+v", mechanism, a)
		}
		if code := g.stop(); code != 0 {
			t.Errorf("%s: exit code %d", mechanism, code)
		}
	}
	bad := launch(t, user("gw"), settings{
		"kafka.brokers": k.SASLBroker, "kafka.sasl.mechanism": "PLAIN", "kafka.sasl.username": k.User, "kafka.sasl.password": "wrong",
	})
	if code := bad.exit(); code != 1 || !strings.Contains(bad.log.String(), "refuses the login") {
		t.Errorf("wrong password: exit code %d\n%s", code, bad.log)
	}
}
