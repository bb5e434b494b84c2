package e2e

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// TestUserRate: what a user sends on all sessions and over HTTP is one sum; beyond it RATE_LIMITED, 429 over
// HTTP, and 1008 for a session that goes on regardless. Others are not touched.
func TestUserRate(t *testing.T) {
	g := start(t, user("gw"), settings{"sessions.policy": "allow:3", "limits.user_messages_per_second": "1"})
	name := user("alice")
	first, second, bob := connect(t, g, name), connect(t, g, name), connect(t, g, user("bob"))
	counts := map[string]int{}
	for i, c := range []*client{first, second} { // two seconds' worth
		c.send("post", fmt.Sprint("c-", i), i)
		counts[c.ack().Code]++
	}
	if counts[""] != 2 {
		t.Fatalf("within the limit: %v", counts)
	}
	bearer := http.Header{"Authorization": {"Bearer " + token(t, name, time.Hour)}}
	const body = `{"type":"post","message_id":"h-%d","data":1}`
	refused := answer{}
	for i := range 5 { // some time passes
		if refused = post(t, g, "/api/messages", fmt.Sprintf(body, i), bearer); refused.Status != http.StatusOK {
			break
		}
	}
	if refused.Status != http.StatusTooManyRequests || refused.Code != "RATE_LIMITED" || refused.Header.Get("Retry-After") == "" {
		t.Errorf("over HTTP: %+v", refused)
	}
	for i := range 20 {
		second.send("post", fmt.Sprint("d-", i), i)
	}
	limited := 0
	var err error
	for err == nil {
		var f frame
		if f, err = second.next(); err == nil && strings.Contains(string(f.Data), `"code":"RATE_LIMITED","retry_after_ms":`) {
			limited++
		}
	}
	if websocket.CloseStatus(err) != websocket.StatusPolicyViolation || limited == 0 {
		t.Errorf("%d refusals, then %v", limited, err)
	}
	bob.send("post", "b-1", 1)
	if a := bob.ack(); a.Status != "success" {
		t.Errorf("another user: %+v", a)
	}
	eventually(t, "the user is heard again", func() bool {
		return post(t, g, "/api/messages", fmt.Sprintf(body, 9), bearer).Status == http.StatusOK
	})
	if g.metric(`im_gateway_shard_limited_total{limit="user_rate"}`) == "0" || g.metric(`im_gateway_shard_limited_total{limit="user_flood"}`) != "1" {
		t.Error("not counted")
	}
}
