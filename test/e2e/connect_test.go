package e2e

import (
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"im-gateway/codec/gatewaypb"
)

func TestLoginWithIMLogicsAnswer(t *testing.T) {
	g := start(t, user("gw"), nil)
	name, password := user("alice"), hide("correct horse battery")
	body := fmt.Sprintf(`{"username":%q,"password":%q}`, name, password)
	eventually(t, "im-logic is found", func() bool { return post(t, g, "/api/auth/guest", `{"guestName":"g"}`, nil).Status == 200 })
	if a := post(t, g, "/api/auth/register", body, nil); a.Status != 200 || !a.Success || !strings.Contains(string(a.Data), name) {
		t.Fatalf("register: %d %s", a.Status, a.Data)
	}
	a := post(t, g, "/api/auth/login", body, nil)
	var in struct {
		Token, RefreshToken string
		ExpiresAt           int64
		User                struct{ UserID, Username string }
	}
	decode(t, a.Data, &in)
	if a.Status != 200 || in.Token == "" || in.RefreshToken == "" || in.User.Username != name || in.ExpiresAt < time.Now().UnixMilli() {
		t.Fatalf("login: %d %s", a.Status, a.Data)
	}
	hide(in.Token)
	hide(in.RefreshToken)
	if _, err := dial(t, g, name, "/ws", http.Header{"Authorization": {"Bearer " + in.Token}}); err != nil {
		t.Errorf("connect with the token of the login: %v", err)
	}
	for _, tc := range []struct {
		name, path, body string
		status           int
	}{
		{"wrong password", "login", fmt.Sprintf(`{"username":%q,"password":"wrong password"}`, name), 401},
		{"name taken", "register", body, 409},
		{"malformed", "login", `{"username":`, 400},
		{"missing field", "login", `{"username":"x"}`, 422},
		{"too large", "login", `{"username":"` + strings.Repeat("x", 70_000) + `"}`, 413},
		{"unknown field", "login", fmt.Sprintf(`{"username":%q,"password":%q,"more":1}`, name, password), 200},
		{"refresh", "refresh", fmt.Sprintf(`{"refresh_token":%q}`, in.RefreshToken), 200},
		{"refresh token spent", "refresh", fmt.Sprintf(`{"refreshToken":%q}`, in.RefreshToken), 401},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if a := post(t, g, "/api/auth/"+tc.path, tc.body, nil); a.Status != tc.status || a.Success != (tc.status == 200) {
				t.Errorf("%d %v %s, want %d", a.Status, a.Success, a.Code, tc.status)
			}
		})
	}
}

func TestIMLogicDown(t *testing.T) {
	g := start(t, user("gw"), settings{"logic.target": freeAddr()})
	if a := post(t, g, "/api/auth/login", `{"username":"a","password":"b"}`, nil); a.Status != 503 || a.Header.Get("Retry-After") == "" {
		t.Errorf("fixed address: %d %s", a.Status, a.Code)
	}
	g = start(t, user("gw"), settings{"logic.target": "etcd:///nobody-is-called-this"})
	if a := post(t, g, "/api/auth/login", `{"username":"a","password":"b"}`, nil); a.Status != 503 || a.Header.Get("Retry-After") == "" {
		t.Errorf("nobody registered: %d %s", a.Status, a.Code)
	}
}

func TestConnectWithEachTokenWay(t *testing.T) {
	g := start(t, user("gw"), nil)
	good := token(t, "alice", time.Hour)
	for name, f := range map[string]func() (*client, error){
		"header": func() (*client, error) {
			return dial(t, g, "a", "/ws", http.Header{"Authorization": {"Bearer " + good}})
		},
		"query":       func() (*client, error) { return dial(t, g, "a", "/ws?token="+good, nil) },
		"subprotocol": func() (*client, error) { return dial(t, g, "a", "/ws", nil, "im.json.v1", "bearer."+good) },
	} {
		if c, err := f(); err != nil {
			t.Errorf("%s: %v", name, err)
		} else if name == "subprotocol" && c.Subprotocol() != "im.json.v1" {
			t.Errorf("subprotocol %q", c.Subprotocol())
		}
	}
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." +
		base64.RawURLEncoding.EncodeToString([]byte(`{"user_id":"alice","exp":9999999999}`)) + "."
	for name, bad := range map[string]string{"none": "", "expired": token(t, "alice", -time.Hour), "forged": good[:len(good)-4] + "AAAA", "alg none": none} {
		_, err := dial(t, g, "a", "/ws", http.Header{"Authorization": {"Bearer " + bad}})
		if err == nil || !strings.Contains(err.Error(), "status 401") {
			t.Errorf("%s: %v, want 401", name, err)
		}
		if _, err := dial(t, g, "a", "/ws?auth=close&token="+bad, nil); err == nil || !strings.Contains(err.Error(), "4503") {
			t.Errorf("%s with auth=close: %v, want 4503", name, err)
		}
	}
}

// TestConnectHeartbeatAndDisconnectAreLogged: a client that answers no ping is closed with 4001.
func TestConnectHeartbeatAndDisconnectAreLogged(t *testing.T) {
	g := start(t, user("gw"), settings{"websocket.heartbeat": "200ms", "websocket.heartbeat_timeout": "700ms"})
	name := user("silent")
	conn, err := net.Dial("tcp", g.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_, err = fmt.Fprintf(conn, "GET /ws HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"+
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nAuthorization: Bearer %s\r\n\r\n", token(t, name, time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	alive := connect(t, g, user("alive"))
	go func() { // answers the pings
		for {
			if _, err := alive.next(); err != nil {
				return
			}
		}
	}()
	eventually(t, "the log has it", func() bool {
		text := g.log.String()
		return strings.Contains(text, `"message":"connected"`) && strings.Contains(text, `"message":"heartbeat missed"`) &&
			strings.Contains(text, `"reason":"heartbeat missed","code":4001`) && strings.Contains(text, name)
	})
	stats, err := g.service().Stats(deadline(t), &gatewaypb.StatsRequest{})
	if err != nil || stats.Sessions != 1 {
		t.Errorf("%v sessions, want the one that answers; %v", stats.GetSessions(), err)
	}
}

// TestManyClientsAndChurn: 5,000 clients at once; after random churn Redis and the gateway know
// exactly those that are left.
func TestManyClientsAndChurn(t *testing.T) {
	// The clients do not read, so nobody answers pings.
	g := start(t, user("gw"), settings{"log.level": "info", "websocket.heartbeat": "10m", "websocket.heartbeat_timeout": "1h"})
	const n = 5000
	prefix := user("many")
	clients := make([]*client, n)
	each := func(f func(i int)) {
		var wg sync.WaitGroup
		work := make(chan int)
		for range 32 {
			wg.Go(func() {
				for i := range work {
					f(i)
				}
			})
		}
		for i := range n {
			work <- i
		}
		close(work)
		wg.Wait()
	}
	open := func(i int) {
		name := fmt.Sprintf("%s-%d", prefix, i)
		c, err := dial(t, g, name, "/ws", http.Header{"Authorization": {"Bearer " + token(t, name, time.Hour)}})
		if err != nil {
			t.Errorf("client %d: %v", i, err)
		}
		clients[i] = c
	}
	each(open)
	if t.Failed() {
		t.FailNow()
	}
	each(func(i int) {
		switch rand.IntN(4) {
		case 0: // gone for good
			_ = clients[i].CloseNow()
			clients[i] = nil
		case 1: // connects again while the old connection lives
			open(i)
		case 2: // closes, then connects again
			_ = clients[i].CloseNow()
			open(i)
		}
	})
	live := 0
	for _, c := range clients {
		if c != nil {
			live++
		}
	}
	keys := func() (count int) {
		cursor := uint64(0)
		for {
			e, err := env.cache.Do(deadline(t), env.cache.B().Scan().Cursor(cursor).Match("user_session:"+prefix+"-*").Count(1000).Build()).AsScanEntry()
			if err != nil {
				t.Fatal(err)
			}
			count += len(e.Elements)
			if cursor = e.Cursor; cursor == 0 {
				return count
			}
		}
	}
	eventually(t, fmt.Sprintf("%d sessions in the gateway and in Redis", live), func() bool {
		s, err := g.service().Stats(deadline(t), &gatewaypb.StatsRequest{})
		return err == nil && s.Sessions == int64(live) && s.Users == int64(live) && keys() == live
	})
	for i, c := range clients {
		entry := presence(t, fmt.Sprintf("%s-%d", prefix, i))
		if c == nil && len(entry) > 0 || c != nil && (entry["session_id"] != c.session || entry["gateway_id"] != g.id) {
			t.Fatalf("client %d: entry %v, session %+v", i, entry, c)
		}
	}
}

func TestPresenceNamesTheGateway(t *testing.T) {
	a, b := start(t, user("gw"), nil), start(t, user("gw"), nil)
	name := user("alice")
	first := connect(t, a, name)
	id, err := env.cache.Do(deadline(t), env.cache.B().Hget().Key("user_session:"+name).Field("gateway_id").Build()).ToString()
	if err != nil || id != a.id {
		t.Errorf("HGET gateway_id: %q, %v", id, err)
	}
	connect(t, b, name)
	if code := first.closed(); code != 4500 {
		t.Errorf("the older session on the other gateway is closed with %d, want 4500", code)
	}
	if entry := presence(t, name); entry["gateway_id"] != b.id {
		t.Errorf("entry %v", entry)
	}
	if code := a.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if entry := presence(t, name); entry["gateway_id"] != b.id {
		t.Errorf("after the old gateway's stop: %v", entry)
	}
}

func TestRefreshTokenAndExpiry(t *testing.T) {
	g := start(t, user("gw"), settings{"auth.leeway": "0s"})
	name := user("alice")
	c, err := dial(t, g, name, "/ws?token="+token(t, name, 3*time.Second), nil)
	if err != nil {
		t.Fatal(err)
	}
	c.send("refresh-token", "", map[string]string{"token": token(t, name, 6*time.Second)})
	c.wait("token-refreshed")
	c.send("refresh-token", "", map[string]string{"token": token(t, user("bob"), time.Hour)})
	var refusal ack
	decode(t, c.wait("error").Data, &refusal)
	if refusal.Code != "AUTH_FAILED" {
		t.Errorf("another user's token: %+v", refusal)
	}
	if code := c.closed(); code != 4502 {
		t.Errorf("closed with %d, want 4502", code)
	}
}

func TestRedisEntryComesBack(t *testing.T) {
	g := start(t, user("gw"), settings{"redis.refresh_interval": "300ms", "redis.presence_ttl": "2s"})
	name := user("alice")
	c := connect(t, g, name)
	if err := env.cache.Do(deadline(t), env.cache.B().Del().Key("user_session:"+name).Build()).Error(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the entry is written again", func() bool { return presence(t, name)["session_id"] == c.session })
	_ = c.CloseNow()
	eventually(t, "the entry is deleted", func() bool { return len(presence(t, name)) == 0 })
}
