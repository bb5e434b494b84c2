package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"go.uber.org/goleak"

	"im-gateway/bench/report"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// gnet's pool of goroutines is the process's and has no end.
		goleak.IgnoreAnyFunction("github.com/panjf2000/ants/v2.(*poolCommon).purgeStaleWorkers"),
		goleak.IgnoreAnyFunction("github.com/panjf2000/ants/v2.(*poolCommon).ticktock"))
}

const testTopic = "im-upstream-topic"

// gateway is a stand-in whose ways of breaking promises the tests choose.
type gateway struct {
	t      *testing.T
	client *kgo.Client // nil: acks are made up
	// answer says what to send for the n-th message, from 0; nil: store and ack it.
	answer func(g *gateway, c *client, n int64, id string)
	seen   atomic.Int64

	mu      sync.Mutex
	clients map[string]*client
}

type client struct {
	conn *websocket.Conn
	user string
}

func (c *client) say(format string, args ...any) {
	_ = c.conn.Write(context.Background(), websocket.MessageText, fmt.Appendf(nil, format, args...)) // a lost client shows elsewhere
}

func startGateway(t *testing.T, brokers []string, answer func(g *gateway, c *client, n int64, id string)) (*gateway, string) {
	t.Helper()
	g := &gateway{t: t, answer: answer, clients: map[string]*client{}}
	if brokers != nil {
		var err error
		if g.client, err = kgo.NewClient(kgo.SeedBrokers(brokers...)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(g.client.Close)
	}
	srv := httptest.NewServer(http.HandlerFunc(g.serve))
	t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
	return g, "ws" + strings.TrimPrefix(srv.URL, "http") + "/ws"
}

// serve takes the user's name from the token as it is: user n has the token "bench-n".
func (g *gateway) serve(w http.ResponseWriter, r *http.Request) {
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer conn.CloseNow() //nolint:errcheck // the client may be gone
	c := &client{conn: conn, user: strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")}
	g.mu.Lock()
	g.clients[c.user] = c
	g.mu.Unlock()
	c.say(`{"type":"connected","data":{"gateway_id":"g"}}`)
	for {
		_, b, err := conn.Read(r.Context())
		if err != nil {
			return
		}
		var m struct {
			ID string `json:"message_id"`
		}
		if json.Unmarshal(b, &m) != nil {
			return
		}
		n := g.seen.Add(1) - 1
		if g.answer != nil {
			g.answer(g, c, n, m.ID)
		} else {
			g.ack(c, m.ID, g.store(c.user, m.ID))
		}
	}
}

func (g *gateway) store(user, id string) *kgo.Record {
	rec := &kgo.Record{Topic: testTopic, Key: []byte(user), Value: []byte("{}"), Headers: []kgo.RecordHeader{{Key: "client_msg_id", Value: []byte(id)}}}
	if g.client != nil {
		if err := g.client.ProduceSync(context.Background(), rec).FirstErr(); err != nil {
			g.t.Error(err)
		}
	}
	return rec
}

func (g *gateway) ack(c *client, id string, rec *kgo.Record) {
	c.say(`{"type":"message-ack","data":{"client_msg_id":%q,"status":"success","topic":%q,"partition":%d,"offset":%d}}`, id, testTopic, rec.Partition, rec.Offset)
}

func (g *gateway) refuse(c *client, id, code string) {
	c.say(`{"type":"message-ack","data":{"client_msg_id":%q,"status":"error","code":%q}}`, id, code)
}

func fakeKafka(t *testing.T) []string {
	t.Helper()
	k, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.SeedTopics(2, testTopic), kfake.SeedTopics(1, "im-downstream-topic-g"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	return k.ListenAddrs()
}

func testOptions(scenario, url string, kafka []string) Options {
	o := DefaultOptions()
	o.Scenario, o.URLs, o.Kafka = scenario, []string{url}, kafka
	o.Users, o.Rates = 4, []Rate{{200, 200}}
	o.Warmup, o.Duration, o.Settle = 100*time.Millisecond, 400*time.Millisecond, time.Minute
	o.Group = Fixed(2)
	for n := range o.Users {
		o.Tokens.given = append(o.Tokens.given, o.user(n))
	}
	return o
}

func runOne(t *testing.T, o Options) *report.Report {
	t.Helper()
	reports, err := Run(t.Context(), o, Hooks{})
	if err != nil {
		t.Fatal(err)
	}
	if len(reports) != 1 {
		t.Fatalf("%d reports", len(reports))
	}
	return reports[0]
}

// unanswered is Options.Settle where something is never answered.
const unanswered = time.Second

// Each way to break a promise fails the check of that promise and no other.
func TestUpstreamChecks(t *testing.T) {
	const bad = 20 // the message that goes wrong
	normal := func(g *gateway, c *client, id string) { g.ack(c, id, g.store(c.user, id)) }
	for name, tc := range map[string]struct {
		broken     string
		answer     func(g *gateway, c *client, id string)
		unanswered bool // something has no answer
	}{
		"nothing": {broken: "", answer: normal},
		"acked twice": {broken: answersOnce, answer: func(g *gateway, c *client, id string) {
			rec := g.store(c.user, id)
			g.ack(c, id, rec)
			g.ack(c, id, rec)
		}},
		"never answered": {broken: answersAll, answer: func(g *gateway, c *client, id string) { g.store(c.user, id) }, unanswered: true},
		"acked and not stored": {broken: storesAcked, answer: func(g *gateway, c *client, id string) {
			c.say(`{"type":"message-ack","data":{"client_msg_id":%q,"status":"success"}}`, id)
		}},
		"stored twice": {broken: storesAcked, answer: func(g *gateway, c *client, id string) {
			rec := g.store(c.user, id)
			g.store(c.user, id)
			g.ack(c, id, rec)
		}},
		"acked at a wrong offset": {broken: storesAcked, answer: func(g *gateway, c *client, id string) {
			rec := g.store(c.user, id)
			rec.Offset++
			g.ack(c, id, rec)
		}},
		"refused and stored": {broken: storesNoRefused, answer: func(g *gateway, c *client, id string) {
			g.store(c.user, id)
			g.refuse(c, id, "OVERLOADED")
		}},
		"refused": {broken: "", answer: func(g *gateway, c *client, id string) { g.refuse(c, id, "OVERLOADED") }},
		"unknown, stored, acked late": {broken: "", answer: func(g *gateway, c *client, id string) {
			g.refuse(c, id, "OUTCOME_UNKNOWN")
			g.ack(c, id, g.store(c.user, id))
		}},
		"unknown and stored": {broken: "", answer: func(g *gateway, c *client, id string) {
			g.store(c.user, id)
			g.refuse(c, id, "OUTCOME_UNKNOWN")
		}},
		"stored under another's name": {broken: storesOwn, answer: func(g *gateway, c *client, id string) {
			g.ack(c, id, g.store("bench-9", id))
		}},
		"the ack of another's message": {broken: answersOnce, answer: func(g *gateway, c *client, id string) {
			normal(g, c, id)
			c.say(`{"type":"message-ack","data":{"client_msg_id":"x-1","status":"success"}}`)
		}},
		"cut off": {broken: keepsConnections, answer: func(g *gateway, c *client, id string) {
			normal(g, c, id)
			_ = c.conn.Close(websocket.StatusInternalError, "")
		}, unanswered: true},
	} {
		t.Run(name, func(t *testing.T) {
			kafka := fakeKafka(t)
			_, url := startGateway(t, kafka, func(g *gateway, c *client, n int64, id string) {
				if n == bad {
					tc.answer(g, c, id)
				} else {
					normal(g, c, id)
				}
			})
			o := testOptions("upstream", url, kafka)
			if tc.unanswered {
				o.Settle = unanswered
			}
			rep := runOne(t, o)
			failed := rep.Failed()
			if tc.unanswered { // and what it had sent when it was cut off
				failed = slices.DeleteFunc(failed, func(c report.Check) bool { return c.Name == answersAll && c.Name != tc.broken })
			}
			if tc.broken == storesOwn { // another's partition has an order of its own
				failed = slices.DeleteFunc(failed, func(c report.Check) bool { return c.Name == storesInOrder })
			}
			switch {
			case tc.broken == "" && len(failed) > 0, len(failed) > 1:
				t.Errorf("broken: %+v", failed)
			case tc.broken != "" && (len(failed) != 1 || failed[0].Name != tc.broken):
				t.Errorf("broken: %+v, want %q", failed, tc.broken)
			}
			if n := rep.Count("read back from Kafka"); n < bad {
				t.Errorf("%d records read back", n)
			}
		})
	}
}

// Two messages of one user, stored the other way round.
func TestUpstreamOrder(t *testing.T) {
	kafka := fakeKafka(t)
	const user = "bench-0"
	held := make(chan string, 1) // one message of the user's, until its next one has been stored
	var once atomic.Bool
	_, url := startGateway(t, kafka, func(g *gateway, c *client, n int64, id string) {
		if n >= 20 && c.user == user && once.CompareAndSwap(false, true) {
			held <- id
			return
		}
		g.ack(c, id, g.store(c.user, id))
		if c.user != user {
			return
		}
		select {
		case first := <-held:
			g.ack(c, first, g.store(user, first))
		default:
		}
	})
	failed := runOne(t, testOptions("upstream", url, kafka)).Failed()
	if len(failed) != 1 || failed[0].Name != storesInOrder {
		t.Errorf("%+v", failed)
	}
}

// A stall of the server counts for every message that was due meanwhile.
func TestLatencyCountsFromTheSchedule(t *testing.T) {
	const stall = 300 * time.Millisecond
	_, url := startGateway(t, nil, func(g *gateway, c *client, n int64, id string) {
		if n == 30 {
			time.Sleep(stall)
		}
		g.ack(c, id, &kgo.Record{})
	})
	o := testOptions("upstream", url, nil)
	o.Users = 1
	o.Tokens.given = o.Tokens.given[:1]
	rep := runOne(t, o)
	if len(rep.Failed()) > 0 || len(rep.Latency) == 0 {
		t.Fatalf("%+v", rep.Failed())
	}
	h, err := rep.Latency[0].Histogram()
	if err != nil {
		t.Fatal(err)
	}
	late := 0
	for _, bar := range h.Distribution() {
		if bar.From >= stall.Microseconds()/3 {
			late += int(bar.Count)
		}
	}
	if late < 20 { // 200 a second for the first 200 ms of the stall: 40
		t.Errorf("%d of %d messages were late; a stall of %s held up at least 20", late, h.TotalCount(), stall)
	}
}

func TestWindow(t *testing.T) {
	var most, open atomic.Int64
	_, url := startGateway(t, nil, func(g *gateway, c *client, n int64, id string) {
		k := open.Add(1)
		for m := most.Load(); k > m && !most.CompareAndSwap(m, k); m = most.Load() {
		}
		time.Sleep(time.Millisecond)
		open.Add(-1)
		g.ack(c, id, &kgo.Record{})
	})
	o := testOptions("upstream", url, nil)
	o.Window = 3
	rep := runOne(t, o)
	if len(rep.Failed()) > 0 || rep.Count("acked") < 20 || most.Load() > int64(o.Users) {
		t.Errorf("%d acked, %d handled at once, %+v", rep.Count("acked"), most.Load(), rep.Failed())
	}
}

// pusher stands between Kafka's downstream topic and the clients, and breaks promises.
func pusher(t *testing.T, g *gateway, brokers []string, push func(n int, targets []string, frame string)) {
	t.Helper()
	reader, err := kgo.NewClient(kgo.SeedBrokers(brokers...), kgo.ConsumeTopics("im-downstream-topic-g"), kgo.FetchMaxWait(10*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		n := 0
		for ctx.Err() == nil {
			reader.PollFetches(ctx).EachRecord(func(rec *kgo.Record) {
				var v struct {
					ID   string   `json:"message_id"`
					One  string   `json:"target_user_id"`
					Many []string `json:"target_user_ids"`
				}
				if err := json.Unmarshal(rec.Value, &v); err != nil {
					t.Errorf("%s: %v", rec.Value, err)
				}
				if v.One != "" {
					v.Many = []string{v.One}
				}
				push(n, v.Many, fmt.Sprintf(`{"type":"new-message","message_id":%q,"data":{}}`, v.ID))
				n++
			})
		}
	})
	t.Cleanup(func() { cancel(); done.Wait(); reader.Close() })
}

func (g *gateway) to(user string) *client {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.clients[user]
}

func TestPushChecks(t *testing.T) {
	const bad = 15
	for name, tc := range map[string]struct {
		broken []string
		push   func(g *gateway, targets []string, frame string)
	}{
		"nothing": {nil, func(g *gateway, targets []string, frame string) { g.to(targets[0]).say("%s", frame) }},
		"twice": {[]string{pushesOnce}, func(g *gateway, targets []string, frame string) {
			g.to(targets[0]).say("%s", frame)
			g.to(targets[0]).say("%s", frame)
		}},
		"lost": {[]string{answersAll, pushesOnce}, func(*gateway, []string, string) {}},
		"to another": {[]string{answersAll, pushesOnce, pushesToTarget}, func(g *gateway, targets []string, frame string) {
			other := "bench-0"
			if targets[0] == other {
				other = "bench-1"
			}
			g.to(other).say("%s", frame)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			kafka := fakeKafka(t)
			g, url := startGateway(t, kafka, nil)
			pusher(t, g, kafka, func(n int, targets []string, frame string) {
				if n == bad {
					tc.push(g, targets, frame)
				} else {
					g.to(targets[0]).say("%s", frame)
				}
			})
			o := testOptions("downstream", url, kafka)
			if slices.Contains(tc.broken, answersAll) {
				o.Settle = unanswered
			}
			rep := runOne(t, o)
			var failed []string
			for _, c := range rep.Failed() {
				failed = append(failed, c.Name)
			}
			if fmt.Sprint(failed) != fmt.Sprint(tc.broken) {
				t.Errorf("broken: %q, want %q", failed, tc.broken)
			}
			if n := rep.Count("pushed"); n < bad {
				t.Errorf("%d pushes", n)
			}
		})
	}
}

func TestPushOrder(t *testing.T) {
	kafka := fakeKafka(t)
	g, url := startGateway(t, kafka, nil)
	held := ""
	pusher(t, g, kafka, func(n int, targets []string, frame string) {
		if n == 10 {
			held = frame
			return
		}
		g.to(targets[0]).say("%s", frame)
		if held != "" {
			g.to(targets[0]).say("%s", held)
			held = ""
		}
	})
	o := testOptions("downstream", url, kafka)
	o.Users = 1
	o.Tokens.given = o.Tokens.given[:1]
	failed := runOne(t, o).Failed()
	if len(failed) != 1 || failed[0].Name != pushesInOrder {
		t.Errorf("%+v", failed)
	}
}

// The bench plays im-logic: what a user sends reaches its group, itself included, and no other.
func TestChatAndFanout(t *testing.T) {
	for _, scenario := range []string{"chat", "fanout", "soak"} {
		t.Run(scenario, func(t *testing.T) {
			kafka := fakeKafka(t)
			g, url := startGateway(t, kafka, nil)
			pusher(t, g, kafka, func(_ int, targets []string, frame string) {
				for _, u := range targets {
					g.to(u).say("%s", frame)
				}
			})
			rep := runOne(t, testOptions(scenario, url, kafka))
			if len(rep.Failed()) > 0 || rep.Count("pushed") < 40 {
				t.Errorf("%d pushes, broken: %+v", rep.Count("pushed"), rep.Failed())
			}
			if scenario == "fanout" && rep.Count("pushed") != 2*rep.Count("records") {
				t.Errorf("%d pushes of %d records to groups of two", rep.Count("pushed"), rep.Count("records"))
			}
		})
	}
}

func TestChurnAndConnectAndIdle(t *testing.T) {
	for _, scenario := range []string{"churn", "connect", "idle"} {
		t.Run(scenario, func(t *testing.T) {
			_, url := startGateway(t, nil, nil)
			o := testOptions(scenario, url, nil)
			o.Steps = 2
			var rested []int
			reports, err := Run(t.Context(), o, Hooks{Rested: func(n int) error { rested = append(rested, n); return nil }})
			if err != nil || len(reports) != 1 || len(reports[0].Failed()) > 0 {
				t.Fatalf("%v, %+v", err, reports)
			}
			switch rep := reports[0]; scenario {
			case "churn":
				if rep.Count("left") < 10 || rep.Count("connected") != rep.Count("left") {
					t.Errorf("%d left, %d came back", rep.Count("left"), rep.Count("connected"))
				}
			case "connect":
				if rep.Count("connected") != int64(o.Users) {
					t.Errorf("%d connected", rep.Count("connected"))
				}
			case "idle":
				if fmt.Sprint(rested) != "[2 4]" {
					t.Errorf("rested at %v", rested)
				}
			}
		})
	}
}

// A gateway that drains: told and closed with 4002, or only cut off.
func TestDrain(t *testing.T) {
	for _, told := range []bool{true, false} {
		t.Run(fmt.Sprint("told ", told), func(t *testing.T) {
			g, url := startGateway(t, nil, nil)
			_, other := startGateway(t, nil, nil)
			o := testOptions("drain", url, nil)
			o.URLs = append(o.URLs, other)
			reports, err := Run(t.Context(), o, Hooks{Measure: func(int) {
				g.mu.Lock()
				defer g.mu.Unlock()
				for _, c := range g.clients {
					if told {
						c.say(`{"type":"reconnect","data":{"retry_after_ms":20,"reason":"draining"}}`)
						go c.conn.Close(4002, "draining") //nolint:errcheck // the client may be gone
					} else {
						go c.conn.CloseNow() //nolint:errcheck // on purpose
					}
				}
			}})
			if err != nil {
				t.Fatal(err)
			}
			failed := reports[0].Failed()
			if told && (len(failed) > 0 || reports[0].Count("back") != 2) {
				t.Errorf("%d back, %+v", reports[0].Count("back"), failed)
			}
			if !told && (len(failed) != 1 || failed[0].Name != toldToGo) {
				t.Errorf("%+v", failed)
			}
		})
	}
}

func TestRunErrors(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, `{"code":"AUTH_FAILED"}`, http.StatusUnauthorized)
	}))
	defer srv.Close()
	_, err := Run(t.Context(), testOptions("upstream", "ws"+strings.TrimPrefix(srv.URL, "http")+"/", nil), Hooks{})
	if err == nil || !strings.Contains(err.Error(), "401") || !strings.Contains(err.Error(), "AUTH_FAILED") {
		t.Errorf("a refused token: %v", err)
	}
	o := DefaultOptions()
	o.Scenario, o.Users, o.Duration, o.Size = "nonsense", 0, 0, Fixed(70_000)
	_, err = Run(t.Context(), o, Hooks{})
	for _, want := range []string{"users:", "duration:", "size:", `scenario "nonsense"`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no word of %q in: %v", want, err)
		}
	}
}
