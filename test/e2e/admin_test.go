package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"testing"

	"github.com/coder/websocket"
)

const operatorToken = "operator-token-7714"

// operated starts a gateway that operators may act on.
func operated(t *testing.T, change settings) *gateway {
	t.Helper()
	all := settings{"admin.token": hide(operatorToken), "sessions.policy": "allow:3"}
	for k, v := range change {
		all[k] = v
	}
	return start(t, user("gw"), all)
}

// ctl runs `im-gateway ctl` against the gateway and returns what it wrote and its exit code.
func (g *gateway) ctl(token string, args ...string) (stdout, stderr string, code int) {
	g.t.Helper()
	cmd := exec.CommandContext(deadline(g.t), env.binary, append([]string{"ctl", "-addr", g.grpc}, args...)...)
	if token != "" {
		cmd.Env = []string{"IM_ADMIN_TOKEN=" + token}
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		g.t.Fatal(err)
	}
	if strings.Contains(out.String()+errs.String(), operatorToken) {
		g.t.Errorf("ctl %v shows the token", args)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// ask is ctl with -o json, which must succeed.
func (g *gateway) ask(into any, args ...string) {
	g.t.Helper()
	stdout, stderr, code := g.ctl(operatorToken, append(args, "-o", "json")...)
	if code != 0 {
		g.t.Fatalf("ctl %v: exit code %d: %s", args, code, stderr)
	}
	decode(g.t, []byte(stdout), into)
}

// states asks for the states of the dependencies by name.
func (g *gateway) states() map[string]string {
	var s struct {
		Dependencies []struct{ Name, State string } `json:"dependencies"`
	}
	g.ask(&s, "status")
	byName := map[string]string{}
	for _, d := range s.Dependencies {
		byName[d.Name] = d.State
	}
	return byName
}

// talk sends messages until the test ends.
func (c *client) talk(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	t.Cleanup(func() {
		cancel()
		<-done
	})
	go func() {
		defer close(done)
		for i := 0; ctx.Err() == nil; i++ {
			frame := fmt.Sprintf(`{"type":"m","message_id":"talk-%d","data":"hello"}`, i)
			if c.Write(ctx, websocket.MessageText, []byte(frame)) != nil {
				return // closed
			}
			if _, _, err := c.Read(ctx); err != nil { // the ack
				return
			}
		}
	}()
}

// TestCtl: each command over a running gateway.
func TestCtl(t *testing.T) {
	g := operated(t, settings{"grpc.token": hide("grpc-token-2208"), "log.level": "info"})
	other := start(t, user("gw"), settings{"sessions.policy": "allow:3"})
	alice, bob := user("alice"), user("bob")
	first, second := connect(t, g, alice), connect(t, g, alice)
	connect(t, other, bob)
	first.send("m", "c-1", 1)
	if a := first.ack(); a.Status != "success" {
		t.Fatalf("ack %+v", a)
	}

	var status struct {
		GatewayID   string `json:"gateway_id"`
		State       string
		Sessions    int
		Users       int
		Connections int
		LogLevel    string `json:"log_level"`
		Acting      bool
	}
	g.ask(&status, "status")
	if status.GatewayID != g.id || status.State != "ready" || status.Sessions != 2 || status.Users != 1 || status.Connections < 2 ||
		status.LogLevel != "info" || !status.Acting {
		t.Errorf("status %+v", status)
	}
	eventually(t, "all dependencies are up", func() bool {
		s := g.states()
		return len(s) == 4 && s["kafka"] == "up" && s["etcd"] == "up" && s["redis"] == "up" && s["im-logic"] == "up"
	})
	var l ledger
	g.ask(&l, "ledger")
	if l.Upstream.Ends["stored"] != 1 || !l.Upstream.Balanced {
		t.Errorf("ledger %+v", l)
	}
	var queues struct {
		Queues []struct {
			Name         string
			Bound, Depth int64
		}
	}
	g.ask(&queues, "queues")
	if len(queues.Queues) < 15 {
		t.Errorf("%d queues", len(queues.Queues))
	}
	for _, q := range queues.Queues {
		if q.Bound <= 0 || q.Name == "connections" && q.Depth < 2 {
			t.Errorf("queue %+v", q)
		}
	}

	// Looking takes either token, and the one for the gateways acts on nothing.
	for _, try := range []struct {
		token, command string
		code           int
	}{
		{"", "status", 1}, {"grpc-token-2208", "status", 0}, {operatorToken, "status", 0}, {"wrong", "status", 1},
		{"", "drain", 1}, {"grpc-token-2208", "drain", 1}, {"wrong", "drain", 1},
	} {
		if _, stderr, code := g.ctl(try.token, try.command); code != try.code || (code != 0) != strings.Contains(stderr, "refuses") {
			t.Errorf("%s with token %q: exit code %d: %s", try.command, try.token, code, stderr)
		}
	}

	var found struct {
		Sessions []struct {
			SessionID  string `json:"session_id"`
			MessagesIn int    `json:"messages_in"`
		}
		Elsewhere []struct {
			GatewayID string `json:"gateway_id"`
		}
	}
	g.ask(&found, "find", alice)
	in := map[string]int{}
	for _, s := range found.Sessions {
		in[s.SessionID] = s.MessagesIn
	}
	if len(in) != 2 || in[first.session] != 1 || len(found.Elsewhere) != 0 {
		t.Errorf("alice: %+v", found)
	}
	g.ask(&found, "find", bob)
	if len(found.Sessions) != 0 || len(found.Elsewhere) != 1 || found.Elsewhere[0].GatewayID != other.id {
		t.Errorf("bob: %+v", found)
	}
	if _, stderr, code := g.ctl(operatorToken, "find", "nobody-at-all"); code != 1 || !strings.Contains(stderr, "has no session on "+g.id) {
		t.Errorf("find nobody: %d %s", code, stderr)
	}

	first.talk(t)
	eventually(t, "alice is a top talker", func() bool {
		stdout, stderr, code := g.ctl(operatorToken, "top", "-window", "300ms")
		if code != 0 {
			t.Fatalf("top: %d %s", code, stderr)
		}
		return strings.Contains(stdout, alice)
	})

	if _, stderr, code := g.ctl(operatorToken, "kick", bob); code != 1 || !strings.Contains(stderr, "nothing was closed") {
		t.Errorf("kick of who is elsewhere: %d %s", code, stderr)
	}
	if stdout, stderr, code := g.ctl(operatorToken, "kick", alice, "-session", second.session, "-reason", "come back later"); code != 0 {
		t.Errorf("kick: %d %s %s", code, stdout, stderr)
	}
	if _, err := second.next(); websocket.CloseStatus(err) != 4501 || !strings.Contains(err.Error(), "come back later") {
		t.Errorf("closed: %v", err)
	}
	g.ask(&found, "find", alice)
	if len(found.Sessions) != 1 || found.Sessions[0].SessionID != first.session {
		t.Errorf("after the kick: %+v", found)
	}

	if _, stderr, code := g.ctl(operatorToken, "log-level", "loud"); code != 1 || !strings.Contains(stderr, "debug, info, warn or error") {
		t.Errorf("log-level loud: %d %s", code, stderr)
	}
	if stdout, _, code := g.ctl(operatorToken, "log-level", "debug"); code != 0 || stdout != "debug\n" {
		t.Errorf("log-level: %d %s", code, stdout)
	}
	third := connect(t, g, user("carol"))
	eventually(t, "details are logged", func() bool {
		return strings.Contains(g.log.String(), `"level":"debug"`) && strings.Contains(g.log.String(), third.session)
	})

	if stdout, stderr, code := g.ctl(operatorToken, "drain"); code != 0 || !strings.Contains(stdout, "draining") {
		t.Errorf("drain: %d %s", code, stderr)
	}
	if code := third.closed(); code != 4002 {
		t.Errorf("closed with %d", code)
	}
	if code := g.exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if _, stderr, code := g.ctl(operatorToken, "status"); code != 1 || !strings.Contains(stderr, "no gateway can be reached") {
		t.Errorf("status of a stopped gateway: %d %s", code, stderr)
	}
}

// TestDependenciesAreWatched: an outage shows, readiness stays, and the end of it shows too.
func TestDependenciesAreWatched(t *testing.T) {
	link := newWire(t, env.redis)
	g := operated(t, settings{"redis.addrs": link.ln.Addr().String()})
	eventually(t, "Redis is up", func() bool { return g.states()["redis"] == "up" })
	link.set(true)
	eventually(t, "Redis is down", func() bool { return g.states()["redis"] == "down" })
	var status struct{ State string }
	g.ask(&status, "status")
	if s := g.states(); status.State != "ready" || s["kafka"] != "up" {
		t.Errorf("state %s, %v", status.State, s)
	}
	if m := g.metric(`im_gateway_dependency_up{dependency="redis"}`); m != "0" {
		t.Errorf("the metric says %q", m)
	}
	link.set(false)
	eventually(t, "Redis is up again", func() bool { return g.states()["redis"] == "up" })
}

// TestAdminPageActions: what the page calls, called by hand.
func TestAdminPageActions(t *testing.T) {
	g := operated(t, nil)
	name := user("alice")
	c := connect(t, g, name)
	post := func(path, token, body string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(deadline(t), http.MethodPost, "http://"+g.admin+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(text)
	}
	kick := fmt.Sprintf(`{"user_id":%q,"reason":"by hand"}`, name)
	if code, text := post("/kick", "wrong", kick); code != http.StatusForbidden {
		t.Errorf("a wrong token: %d %s", code, text)
	}
	if code, text := post("/kick", operatorToken, kick); code != http.StatusOK || !strings.Contains(text, `"closed":1`) {
		t.Errorf("kick: %d %s", code, text)
	}
	if _, err := c.next(); websocket.CloseStatus(err) != 4501 || !strings.Contains(err.Error(), "by hand") {
		t.Errorf("closed: %v", err)
	}
	if code, text := post("/log-level", operatorToken, `{"level":"warn"}`); code != http.StatusOK {
		t.Errorf("log level: %d %s", code, text)
	}
	if code, _ := post("/token", operatorToken, ""); code != http.StatusNoContent {
		t.Errorf("token: %d", code)
	}
	// Guessing ends: with the right token, too.
	for range 10 {
		if code, _ := post("/drain", "guess", ""); code == http.StatusAccepted {
			t.Fatal("a guess was taken")
		}
	}
	if code, text := post("/drain", operatorToken, ""); code != http.StatusTooManyRequests {
		t.Errorf("after too many guesses: %d %s", code, text)
	}
	if n := g.metric(`im_gateway_admin_refused_total{reason="wrong"}`); n != "10" {
		t.Errorf("%s wrong tokens are counted", n)
	}
}

// TestAdminPageInChromium: an operator watches, finds a user, and acts; nothing is loaded anew.
func TestAdminPageInChromium(t *testing.T) {
	g := operated(t, settings{"log.level": "info"})
	name, silent := user("alice"), user("bob")
	talker := connect(t, g, name)
	browser := chromium(t)
	p := newTab(t, browser, "http://"+g.admin+"/")
	p.do(`window.sameDocument = true`)
	text := func(id string) string { return fmt.Sprintf(`document.getElementById(%q).textContent`, id) }
	p.is("it is ready", text("state")+` === "ready"`)
	p.is("one session", text("sessions")+` === "1"`)
	c := connect(t, g, silent)
	p.is("two sessions", text("sessions")+` === "2"`)
	talker.talk(t)
	p.is("messages are counted", `Number(`+text("upstream-in")+`.replaceAll(",", "")) > 0`)
	p.is("and their rate", `Number(`+text("rate-in")+`.replaceAll(",", "")) > 0`)
	p.is("the dependencies are up", `document.querySelectorAll("#dependencies .badge.up").length === 4`)
	p.is("alice is a top talker", fmt.Sprintf(`[...document.querySelectorAll("#senders a")].some(a => a.textContent === %q)`, name))

	// Without the token everything is only shown.
	p.is("acting is locked", `[...document.querySelectorAll(".act")].every(b => b.disabled)`)
	p.fill("token", "wrong")
	p.click("unlock-button")
	p.is("a wrong token is refused", text("notice")+`.includes("not the token") && document.getElementById("main").dataset.acting === "locked"`)
	p.is("and not kept", `sessionStorage.length === 0 && document.getElementById("token").value === ""`)
	p.fill("token", operatorToken)
	p.click("unlock-button")
	p.is("the right one unlocks", `document.getElementById("main").dataset.acting === "unlocked"`)
	p.is("it is in no cookie, address or text", fmt.Sprintf(
		`!(document.cookie + location.href + document.documentElement.outerHTML).includes(%q)`, operatorToken))

	p.fill("user", silent)
	p.click("find-user")
	p.is("bob's session", fmt.Sprintf(`document.getElementById("found-sessions")?.textContent.includes(%q)`, c.session))
	p.do(`document.querySelector("#found-sessions .kick").click()`)
	p.is("it asks", `document.getElementById("ask").open`)
	p.fill("ask-reason", "seen in Chromium")
	p.click("ask-yes")
	if _, err := c.next(); websocket.CloseStatus(err) != 4501 || !strings.Contains(err.Error(), "seen in Chromium") {
		t.Errorf("closed: %v", err)
	}
	p.is("bob is gone", `document.getElementById("found-none")`)
	p.is("one session again", text("sessions")+` === "1"`)

	p.do(`document.querySelector('#log-level [value=warn]').click()`)
	p.is("the level is shown", `document.querySelector('#log-level [value=warn]').getAttribute("aria-pressed") === "true"`)
	var status struct {
		LogLevel string `json:"log_level"`
	}
	if g.ask(&status, "status"); status.LogLevel != "warn" {
		t.Errorf("the level is %s", status.LogLevel)
	}

	p.click("drain")
	p.is("it asks", `document.getElementById("ask").open`)
	p.click("ask-no")
	p.is("no is no", `!document.getElementById("ask").open && `+text("state")+` === "ready"`)
	p.is("the same document all the time", `window.sameDocument`)
	p.click("drain")
	p.is("it asks", `document.getElementById("ask").open`)
	p.click("ask-yes")
	if code := g.exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	p.is("the page says that nobody answers", `document.body.classList.contains("stale") && `+text("stale")+`.includes("no answer")`)
}

// TestDrainWhileStarting: who waits for Kafka stops too, in order.
func TestDrainWhileStarting(t *testing.T) {
	g := launch(t, user("gw"), settings{"kafka.brokers": freeAddr(), "admin.token": hide(operatorToken)})
	ask := func(method, path string) (code int, body string) {
		req, err := http.NewRequestWithContext(deadline(t), method, "http://"+g.admin+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+operatorToken)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, "" // not listening yet
		}
		defer func() { _ = resp.Body.Close() }()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
	eventually(t, "the page says what is waited for", func() bool {
		_, page := ask(http.MethodGet, "/")
		return strings.Contains(page, `id="state">starting<`) && strings.Contains(page, "connection refused")
	})
	if code, body := ask(http.MethodPost, "/drain"); code != http.StatusAccepted {
		t.Errorf("%d %s", code, body)
	}
	if code := g.exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestAdminPageWithoutAToken: the page says why nobody can act.
func TestAdminPageWithoutAToken(t *testing.T) {
	g := start(t, user("gw"), nil)
	resp, err := http.Get("http://" + g.admin + "/")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	page, err := io.ReadAll(resp.Body)
	if err != nil || !bytes.Contains(page, []byte("no <code>admin.token</code> is configured")) || bytes.Contains(page, []byte(`id="token"`)) {
		t.Errorf("%v: %s", err, page)
	}
	if _, stderr, code := g.ctl("", "drain"); code != 1 || !strings.Contains(stderr, "no admin.token is configured") {
		t.Errorf("drain: %d %s", code, stderr)
	}
	var s json.RawMessage
	g.ask(&s, "status") // looking needs no token on loopback
}
