package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	imclient "im-gateway/client"
)

// configured is a gateway with a configuration file and a secret in a directory that is mounted as
// Kubernetes does it: by links.
type configured struct {
	*gateway
	dir  string
	seen int // of the log
}

// startConfigured starts a gateway with this configuration file; its secret is in SECRET.
func startConfigured(t *testing.T, config string) *configured {
	t.Helper()
	c := &configured{dir: t.TempDir()}
	c.gateway = &gateway{t: t}
	c.mount("..v1", secret)
	if err := os.Symlink("..data/secret", filepath.Join(c.dir, "secret")); err != nil {
		t.Fatal(err)
	}
	c.rewrite(config)
	c.gateway = start(t, user("gw"), settings{"auth.hs256_secret": "", "log.level": "", "-config": c.file()})
	return c
}

func (c *configured) file() string { return filepath.Join(c.dir, "gateway.yaml") }

func (c *configured) text(config string) []byte {
	return []byte(strings.ReplaceAll(config, "SECRET", filepath.Join(c.dir, "secret")))
}

// rewrite writes the file in place.
func (c *configured) rewrite(config string) {
	c.t.Helper()
	if err := os.WriteFile(c.file(), c.text(config), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// replace puts another file in the place, as editors do.
func (c *configured) replace(config string) {
	c.t.Helper()
	next := filepath.Join(c.dir, "gateway.yaml~")
	if err := os.WriteFile(next, c.text(config), 0o600); err != nil {
		c.t.Fatal(err)
	}
	if err := os.Rename(next, c.file()); err != nil {
		c.t.Fatal(err)
	}
}

// mount makes a directory with a secret and swaps the link to it.
func (c *configured) mount(version, secret string) {
	c.t.Helper()
	if err := os.Mkdir(filepath.Join(c.dir, version), 0o700); err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(c.dir, version, "secret"), []byte(secret), 0o600); err != nil {
		c.t.Fatal(err)
	}
	if err := os.Symlink(version, filepath.Join(c.dir, "..data_tmp")); err != nil {
		c.t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(c.dir, "..data_tmp"), filepath.Join(c.dir, "..data")); err != nil {
		c.t.Fatal(err)
	}
}

func (c *configured) hangUp() {
	c.t.Helper()
	if err := c.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		c.t.Fatal(err)
	}
}

// logs waits for a line that holds all these, behind those that were waited for before.
func (c *configured) logs(words ...string) {
	c.t.Helper()
	eventually(c.t, fmt.Sprintf("the log has a line with %q", words), func() bool {
		text := c.log.String()
		at := c.seen
	next:
		for line := range strings.Lines(text[c.seen:]) {
			at += len(line)
			for _, w := range words {
				if !strings.Contains(line, w) {
					continue next
				}
			}
			c.seen = at
			return true
		}
		return false
	})
}

func (c *configured) want(metric, value string) {
	c.t.Helper()
	if got := c.metric(metric); got != value {
		c.t.Errorf("%s is %s, want %s", metric, got, value)
	}
}

// open tries a handshake and returns why it was refused, or nil.
func (c *configured) open(name, token, origin string) (*client, error) {
	h := http.Header{"Authorization": {"Bearer " + token}}
	if origin != "" {
		h.Set("Origin", origin)
	}
	return dial(c.t, c.gateway, name, "/ws", h)
}

// TestReload changes a gateway that runs, in each way in which a file changes, while a client stays
// connected.
func TestReload(t *testing.T) {
	const base = "auth: {hs256_secret_file: SECRET}\nlog: {level: info}\n"
	g := startConfigured(t, base)
	name := user("alice")
	c, err := g.open(name, token(t, name, time.Hour), "https://a.example")
	if err != nil {
		t.Fatal(err)
	}
	sent := 0
	say := func() ack {
		t.Helper()
		sent++
		c.send("m", fmt.Sprintf("m-%d", sent), sent)
		return c.ack()
	}
	stored := func(when string) {
		t.Helper()
		if a := say(); a.Status != "success" {
			t.Errorf("%s: %+v", when, a)
		}
	}
	stored("at first")

	g.hangUp()
	g.logs("configuration reloaded: no value has changed", "asked for")
	g.want(`im_gateway_config_reloads_total{result="unchanged"}`, "1")

	// A limit lowered holds for the connection that is open, and raised again, too.
	g.replace(base + "limits: {user_messages_per_second: 1}\nwebsocket: {allowed_origins: [\"https://b.example\"]}\n")
	g.logs(`"level":"info"`, "limits.user_messages_per_second: 2000 -> 1", "websocket.allowed_origins: (empty) -> https://b.example", "configuration reloaded")
	limited := false
	for range 5 {
		limited = limited || say().Code == "RATE_LIMITED"
	}
	if !limited {
		t.Error("five messages in a moment, and none is beyond one a second")
	}
	if _, err := g.open(user("bob"), token(t, name, time.Hour), "https://a.example"); err == nil || !strings.Contains(err.Error(), "403") {
		t.Errorf("a page of an origin that is no longer allowed: %v", err)
	}
	g.rewrite(base) // in place
	g.logs("limits.user_messages_per_second: 1 -> 2000")
	eventually(t, "messages are stored again", func() bool { return say().Status == "success" })
	for range 20 {
		stored("with the limit raised")
	}

	// Refused as a whole: what is not valid, and what needs a restart.
	g.replace(base + "limits: {user_messages_per_second: 1, unacked_messages: many}\n")
	g.hangUp()
	g.logs(`"level":"error"`, "configuration not reloaded", `limits.unacked_messages = \"many\"`, "must be a whole number")
	g.want("im_gateway_config_last_reload_successful", "0")
	g.replace(base + "limits: {user_messages_per_second: 1}\nshard: {count: 7}\n")
	g.hangUp()
	g.logs(`"level":"error"`, "configuration not reloaded", "a restart is needed to change shard.count", "shard.count: 0 -> 7")
	if err := os.Remove(g.file()); err != nil {
		t.Fatal(err)
	}
	g.logs("configuration not reloaded", "no such file")
	for range 5 {
		stored("after refusals")
	}
	g.want("im_gateway_config_last_reload_successful", "0")
	if n := g.metric(`im_gateway_config_reloads_total{result="refused"}`); n < "3" {
		t.Errorf("%s refusals counted", n)
	}

	// A rotation disconnects nobody.
	g.replace(strings.Replace(base, "info", "debug", 1))
	g.hangUp()
	g.logs("log.level: info -> debug")
	g.want("im_gateway_config_last_reload_successful", "1")
	other := hide("rotated-0123456789abcdef-0123456789")
	g.mount("..v2", other)
	g.logs("auth.hs256_secret: changed", "files changed")
	stored("after the secret was rotated")
	if _, err := g.open(user("bob"), token(t, name, time.Hour), ""); err == nil || !strings.Contains(err.Error(), "401") {
		t.Errorf("a token of the old secret: %v", err)
	}
	bob := user("bob")
	if _, err := g.open(bob, tokenBy(t, other, bob, time.Hour), ""); err != nil {
		t.Errorf("a token of the new secret: %v", err)
	}
	if a := post(t, g.gateway, "/api/messages", `{"type":"m","message_id":"h-1","data":1}`,
		http.Header{"Authorization": {"Bearer " + token(t, name, time.Hour)}}); a.Status != http.StatusUnauthorized {
		t.Errorf("over HTTP, a token of the old secret: %d", a.Status)
	}
	c.send("refresh-token", "", map[string]string{"token": token(t, name, 2*time.Hour)})
	if f := c.wait("error"); !strings.Contains(string(f.Data), "AUTH_FAILED") {
		t.Errorf("refreshed by the old secret: %s", f.Data)
	}
	c.send("refresh-token", "", map[string]string{"token": tokenBy(t, other, name, 2*time.Hour)})
	c.wait("token-refreshed")
	g.rewrite("auth: {hs256_secret_file: SECRET, previous_secret: " + secret + "}\n")
	g.hangUp()
	g.logs("auth.previous_secret: set")
	if _, err := g.open(user("bob"), token(t, name, time.Hour), ""); err != nil {
		t.Errorf("a token of the previous secret: %v", err)
	}
	if code := g.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestReloadsUnderLoad: reloads one after the other, each of which changes limits and keys, lose nothing
// and disconnect nobody.
func TestReloadsUnderLoad(t *testing.T) {
	config := func(i int) string {
		return fmt.Sprintf("auth: {hs256_secret_file: SECRET, previous_secret: previous-0123456789abcdef-%d}\n"+
			"limits: {messages_per_second: %d, user_messages_per_second: %d}\nwebsocket: {max_message_bytes: %d, allowed_origins: [\"https://%d.example\"]}\n",
			i, 100_000+i, 100_000+i, 65_536+i, i)
	}
	g := startConfigured(t, config(0))
	const clients, messages, reloads = 4, 500, 25
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, clients)
	t.Cleanup(func() {
		cancel()
		for range clients {
			<-ended
		}
	})
	pending := make([][]*imclient.Pending, clients)
	names := make([]string, clients)
	var connects [clients]int
	begun := make([]*imclient.Client, clients)
	for i := range clients {
		names[i] = user("busy")
		c, err := imclient.New(imclient.Options{
			URLs: []string{"ws://" + g.addr + "/ws"}, Outbox: messages,
			Token: func(context.Context, imclient.TokenReason) (string, error) {
				connects[i]++
				return token(t, names[i], time.Hour), nil
			},
			Handle: func(imclient.Message) {},
		})
		if err != nil {
			t.Fatal(err)
		}
		begun[i] = c
		go func() { ended <- c.Run(ctx) }()
	}
	for n := range messages {
		for i, c := range begun {
			p, err := c.Send(imclient.Envelope{Type: "m", ID: fmt.Sprintf("m-%d", n), Data: json.RawMessage(fmt.Sprint(n))})
			if err != nil {
				t.Fatal(err)
			}
			pending[i] = append(pending[i], p)
		}
	}
	for i := 1; i <= reloads; i++ {
		g.replace(config(i))
		g.hangUp()
		g.logs(fmt.Sprintf("limits.messages_per_second: %d -> %d", 100_000+i-1, 100_000+i), "configuration reloaded")
	}
	for i := range pending {
		for n, p := range pending[i] {
			if _, err := p.Wait(deadline(t)); err != nil {
				t.Fatalf("client %d, message %d: %v", i, n, err)
			}
		}
		if connects[i] != 1 {
			t.Errorf("client %d has connected %d times", i, connects[i])
		}
	}
	next := map[string]int{}
	left := clients * messages
	find(t, "im-upstream-topic", func(r *kgo.Record) bool {
		for _, name := range names {
			if string(r.Key) == name {
				if id := header(r, "client_msg_id"); id != fmt.Sprintf("m-%d", next[name]) {
					t.Errorf("of %s message %s is stored, want number %d", name, id, next[name])
				}
				next[name]++
				left--
			}
		}
		return left == 0
	})
	g.want("im_gateway_config_last_reload_successful", "1")
	if code := g.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
