package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	imclient "im-gateway/client"
)

// TestClientLibraryMovesBetweenGateways: one gateway drains, another is killed; what the outbox took is
// stored in its order, and what was pushed meanwhile is handled once.
func TestClientLibraryMovesBetweenGateways(t *testing.T) {
	change := settings{"takeover.after": "2s", "takeover.max_topics": "500", "kafka.ack_deadline": "2s"}
	a, b := start(t, user("gw"), change), start(t, user("gw"), change)
	name := user("alice")
	var mu sync.Mutex
	handled := map[string]int{}
	c, err := imclient.New(imclient.Options{
		URLs:  []string{"ws://" + a.addr + "/ws", "ws://" + b.addr + "/ws"},
		Token: func(context.Context, imclient.TokenReason) (string, error) { return token(t, name, time.Hour), nil },
		Handle: func(m imclient.Message) {
			mu.Lock()
			defer mu.Unlock()
			handled[m.ID]++
		},
		Format: imclient.Protobuf, AckDeliveries: true, Outbox: 2000,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan struct{})
	go func() {
		defer close(ran)
		_ = c.Run(ctx) // ends with ctx
	}()
	t.Cleanup(func() { cancel(); <-ran })
	var pending []*imclient.Pending
	send := func(n int) {
		for range n {
			p, err := c.Send(imclient.Envelope{Type: "m", ID: fmt.Sprintf("m-%d", len(pending)), Data: json.RawMessage(fmt.Sprint(len(pending)))})
			if err != nil {
				t.Fatal(err)
			}
			pending = append(pending, p)
		}
	}
	push := func(g *gateway, id string) {
		produce(t, g, name, fmt.Sprintf(`{"target_user_id":%q,"message_id":"%s-%s","data":1}`, name, id, name))
	}
	send(50)
	if _, err := pending[0].Wait(deadline(t)); err != nil {
		t.Fatal(err)
	}
	push(a, "one")
	if err := a.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	send(50)
	if _, err := pending[99].Wait(deadline(t)); err != nil {
		t.Fatal(err)
	}
	if code := a.exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	a = start(t, a.id, settings{"takeover.after": "2s", "takeover.max_topics": "500", "http.addr": a.addr})
	push(b, "two")
	send(50)
	b.kill()
	send(50)
	push(b, "three") // nobody reads it until it is taken over
	for i, p := range pending {
		if _, err := p.Wait(deadline(t)); err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
	}
	// First occurrences are in order: a killed gateway may have stored some without saying so.
	next := 0
	find(t, "im-upstream-topic", func(r *kgo.Record) bool {
		if string(r.Key) != name {
			return false
		}
		id := strings.TrimPrefix(header(r, "client_msg_id"), "m-")
		if id == fmt.Sprint(next) {
			next++
		} else if n := 0; func() bool { _, err := fmt.Sscan(id, &n); return err != nil || n > next }() {
			t.Errorf("message %s is stored before %d", id, next)
		}
		return next == 200
	})
	eventually(t, "every push was handled, once", func() bool {
		mu.Lock()
		defer mu.Unlock()
		for _, id := range []string{"one", "two", "three"} {
			if handled[id+"-"+name] != 1 {
				return false
			}
		}
		return true
	})
	a.settled()
}
