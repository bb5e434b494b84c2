package users

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, // gnet's pool, which lives as long as the process
		goleak.IgnoreAnyFunction("github.com/panjf2000/ants/v2.(*poolCommon).purgeStaleWorkers"),
		goleak.IgnoreAnyFunction("github.com/panjf2000/ants/v2.(*poolCommon).ticktock"))
}

// gateway is a fake one. It knows users by their tokens; what it does to them says their names.
type gateway struct {
	t  *testing.T
	mu sync.Mutex
	up map[string]*websocket.Conn
}

func (g *gateway) serve(w http.ResponseWriter, r *http.Request) {
	user := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	if user == "stranger" {
		http.Error(w, "full", http.StatusServiceUnavailable)
		return
	}
	c, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer func() { _ = c.CloseNow() }()
	g.write(c, `{"type":"connected","data":{}}`)
	g.mu.Lock()
	g.up[user] = c
	g.mu.Unlock()
	refused := false
	for {
		_, b, err := c.Read(r.Context())
		if err != nil {
			return
		}
		var m struct {
			MessageID string `json:"message_id"`
		}
		if err := json.Unmarshal(b, &m); err != nil {
			g.t.Errorf("%s sent %s", user, b)
		}
		code, status := "", "success"
		switch {
		case user == "unheard":
			continue
		case user == "refused" && !refused:
			refused, code, status = true, "OVERLOADED", "error"
		case user == "wrong":
			code, status = "OUTCOME_UNKNOWN", "error"
		case user == "closed":
			_ = c.Close(4000, "slow")
			return
		}
		g.write(c, fmt.Sprintf(`{"type":"message-ack","data":{"client_msg_id":%q,"status":%q,"code":%q,"retry_after_ms":50}}`, m.MessageID, status, code))
	}
}

func (g *gateway) write(c *websocket.Conn, s string) {
	_ = c.Write(context.Background(), websocket.MessageText, []byte(s)) // a client that has gone
}

// push hands records on, but for those of one user.
func (g *gateway) push(ctx context.Context, k *kgo.Client) {
	for ctx.Err() == nil {
		for _, r := range k.PollFetches(ctx).Records() {
			var v struct {
				Target string          `json:"target_user_id"`
				Data   json.RawMessage `json:"data"`
			}
			if err := json.Unmarshal(r.Value, &v); err != nil {
				g.t.Errorf("a record is %s", r.Value)
			}
			g.mu.Lock()
			c := g.up[v.Target]
			g.mu.Unlock()
			if v.Target != "forgotten" {
				g.write(c, fmt.Sprintf(`{"type":"new-message","data":%s}`, v.Data))
			}
		}
	}
}

// TestWindows holds that each way in which a user can be harmed is seen, and counted once.
func TestWindows(t *testing.T) {
	cluster, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.SeedTopics(1, "down"))
	if err != nil {
		t.Fatal(err)
	}
	defer cluster.Close()
	consumer, err := kgo.NewClient(kgo.SeedBrokers(cluster.ListenAddrs()...), kgo.ConsumeTopics("down"))
	if err != nil {
		t.Fatal(err)
	}
	g := &gateway{t: t, up: map[string]*websocket.Conn{}}
	srv := httptest.NewServer(http.HandlerFunc(g.serve))
	defer srv.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { g.push(ctx, consumer) })
	defer func() { cancel(); wg.Wait(); consumer.Close() }()

	names := []string{"well", "unheard", "refused", "wrong", "closed", "forgotten"}
	group, err := Start(ctx, Options{
		URL: "ws" + strings.TrimPrefix(srv.URL, "http") + "/ws", Users: len(names),
		Names: append(names, "guest", "stranger"), Tokens: append(names, "guest", "stranger"),
		Every: 200 * time.Millisecond, AckWithin: time.Second, PushWithin: 2 * time.Second,
		Broker: cluster.ListenAddrs()[0], Topic: "down",
	})
	if err != nil {
		t.Fatal(err)
	}
	wg.Go(func() { group.Run(ctx) })
	time.Sleep(time.Second)
	w := group.Window(true)
	if w.Acks == 0 || w.Pushes == 0 || w.P99 == 0 || w.PushP99 == 0 || w.Outstanding != 0 || w.Open != len(names)-1 {
		t.Errorf("%+v", w)
	}
	if w.SentAgain["OVERLOADED"] != 1 || len(w.SentAgain) != 1 {
		t.Errorf("sent again: %v", w.SentAgain)
	}
	for what, n := range w.Errors {
		switch what {
		case "closed with 4000":
			if n != 1 {
				t.Errorf("%d times: %s", n, what)
			}
		case "ack OUTCOME_UNKNOWN", "lost ack", "lost push":
		default:
			t.Errorf("%d times: %s", n, what)
		}
	}
	if len(w.Errors) != 4 {
		t.Errorf("errors: %v", w.Errors)
	}
	if w.Newcomers != 1 || w.NewcomersRefused["503 Service Unavailable full"] != 1 {
		t.Errorf("newcomers: %d, turned away: %v", w.Newcomers, w.NewcomersRefused)
	}
	if next := group.Window(false); next.Acks != 0 || len(next.Errors) != 0 {
		t.Errorf("a window has what was in the one before: %+v", next)
	}
	cancel()
	wg.Wait()
	if err := group.Close(); err != nil {
		t.Error(err)
	}
}
