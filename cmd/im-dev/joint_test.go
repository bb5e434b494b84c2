package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"im-gateway/client"
)

// system is an im-dev that runs: gateway, reference im-logic and all.
type system struct {
	*session
	t       *testing.T
	gateway string // http:// address
}

func startSystem(t *testing.T) *system {
	t.Helper()
	s := &system{session: launch(start, slices.Concat(free, []string{"-data", t.TempDir()})...), t: t}
	text := s.out.waitFor(t, `Servers `)
	s.gateway = regexp.MustCompile(`curl -s (http://\S+)/api/auth/login`).FindStringSubmatch(text)[1]
	t.Cleanup(func() {
		s.signals <- syscall.SIGINT
		if code := s.exit(t); code != exitOK {
			t.Errorf("exit code %d:\n%s", code, s.log)
		}
	})
	return s
}

// token logs a demo user in.
func (s *system) token(name string) (string, error) {
	password := map[string]string{}
	for _, u := range demoUsers {
		password[u.name] = u.password
	}
	body := fmt.Sprintf(`{"username":%q,"password":%q}`, name, password[name])
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: testDeadline}
	resp, err := c.Post(s.gateway+"/api/auth/login", "application/json", strings.NewReader(body))
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	var answer struct{ Data struct{ Token string } }
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || answer.Data.Token == "" {
		return "", fmt.Errorf("login of %s: %s %w", name, resp.Status, err)
	}
	return answer.Data.Token, nil
}

// talker is a demo user's client, whose connection the test may cut.
type talker struct {
	*client.Client
	t    *testing.T
	stop func()

	mu    sync.Mutex
	conns []net.Conn
	token string
	got   []client.Message
	more  chan struct{} // capacity 1: something has come
}

func (s *system) talker(name string, o client.Options) *talker {
	s.t.Helper()
	p := &talker{t: s.t, more: make(chan struct{}, 1)}
	o.URLs = []string{"ws" + strings.TrimPrefix(s.gateway, "http") + "/ws"}
	o.Token = func(_ context.Context, why client.TokenReason) (string, error) {
		if p.token == "" || why != client.ToConnect { // logins are counted
			token, err := s.token(name)
			if err != nil {
				return "", err
			}
			p.token = token
		}
		return p.token, nil
	}
	o.Handle = func(m client.Message) {
		p.mu.Lock()
		p.got = append(p.got, m)
		p.mu.Unlock()
		select {
		case p.more <- struct{}{}:
		default:
		}
	}
	o.HTTPClient = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		if err == nil {
			p.mu.Lock()
			p.conns = append(p.conns, c)
			p.mu.Unlock()
		}
		return c, err
	}}}
	var err error
	if p.Client, err = client.New(o); err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	p.stop = sync.OnceFunc(func() { cancel(); <-ended })
	s.t.Cleanup(p.stop)
	return p
}

// cut closes the connection that is open without a word.
func (p *talker) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.conns); n > 0 {
		_ = p.conns[n-1].Close()
	}
}

func (p *talker) send(kind, id string, data any) *client.Pending {
	p.t.Helper()
	b, err := json.Marshal(data)
	if err != nil {
		p.t.Fatal(err)
	}
	sent, err := p.Send(client.Envelope{Type: kind, ID: id, Data: b})
	if err != nil {
		p.t.Fatal(err)
	}
	return sent
}

func (p *talker) stored(list ...*client.Pending) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testDeadline)
	defer cancel()
	for _, sent := range list {
		if _, err := sent.Wait(ctx); err != nil {
			p.t.Fatalf("message %s: %v", sent.Envelope.ID, err)
		}
	}
}

// said is what is in messages and syncs.
type said struct {
	ConversationID string          `json:"conversation_id"`
	MessageID      string          `json:"message_id"`
	ClientMsgID    string          `json:"client_msg_id"`
	Seq            int             `json:"seq"`
	From           string          `json:"from"`
	Content        json.RawMessage `json:"content"`
	DeliveredTo    []string        `json:"delivered_to"`
	Messages       []said          `json:"messages"`
}

// all waits for so many frames of a type and returns them.
func (p *talker) all(kind string, n int) []said {
	p.t.Helper()
	late := time.After(testDeadline)
	for {
		var list []said
		p.mu.Lock()
		for _, m := range p.got {
			if m.Type == kind {
				var d said
				if err := json.Unmarshal(m.Data, &d); err != nil {
					p.t.Error(err)
				}
				list = append(list, d)
			}
		}
		p.mu.Unlock()
		if len(list) >= n {
			return list
		}
		select {
		case <-p.more:
		case <-late:
			p.t.Fatalf("%d of %d frames %s have come", len(list), n, kind)
		}
	}
}

// TestChat is two users of the reference im-logic who talk through the gateway, by JSON and by protobuf,
// while one's connection is cut: everything said arrives once and in order, what was missed is told later.
func TestChat(t *testing.T) {
	s := startSystem(t)
	alice := s.talker("alice", client.Options{Window: 8})
	bob := s.talker("bob", client.Options{Format: client.Protobuf, AckDeliveries: true})
	bob.stored(bob.send("sync", "", map[string]int{"after": 0}))
	bob.all("sync", 1) // he is there

	const messages = 60
	var sent []*client.Pending
	for i := range messages {
		sent = append(sent, alice.send("send-message", fmt.Sprint("a-", i), map[string]any{"to": "bob", "content": i}))
		if i%20 == 10 {
			alice.stored(sent[i-5])
			alice.cut() // what was on its way is sent again
		}
	}
	alice.stored(sent...)
	got := bob.all("new-message", messages)
	seen := map[string]bool{}
	for i, m := range got {
		if seen[m.ClientMsgID] || m.From != "alice" || m.Seq != i+1 {
			t.Errorf("message %d: %+v", i, m)
		}
		seen[m.ClientMsgID] = true
	}
	if len(got) != messages || len(seen) != messages {
		t.Errorf("%d messages came, %d different ones", len(got), len(seen))
	}

	last := got[messages-1]
	bob.stored(bob.send("delivered", "", map[string]string{"conversation_id": last.ConversationID, "message_id": last.MessageID}))
	if r := alice.all("message-delivered", 1)[0]; r.ClientMsgID != last.ClientMsgID || !slices.Equal(r.DeliveredTo, []string{"bob"}) {
		t.Errorf("receipt %+v", r)
	}

	bob.stop()
	alice.stored(alice.send("send-message", "missed", map[string]string{"to": "bob", "content": "are you there?"}))
	again := s.talker("bob", client.Options{})
	again.stored(again.send("sync", "", map[string]int{"after": 0}))
	var texts []string
	for _, m := range again.all("sync", 1)[0].Messages {
		texts = append(texts, string(m.Content))
	}
	if len(texts) != messages+1 || texts[messages] != `"are you there?"` {
		t.Errorf("told of %d messages: %v", len(texts), texts)
	}
	alice.stored(alice.send("send-message", "", map[string]string{"to": "bob"}))
	if e := alice.all("chat-error", 1)[0]; e.ClientMsgID == "" {
		t.Errorf("refusal %+v", e)
	}
	// A token of the same second expires no later than the one before, and is refused.
	ctx, cancel := context.WithTimeout(t.Context(), testDeadline)
	defer cancel()
	for {
		at, err := alice.Refresh(ctx)
		if _, refused := errors.AsType[*client.RefusedError](err); refused {
			time.Sleep(300 * time.Millisecond) // logins are counted
			continue
		}
		if err != nil || time.Until(at) <= 0 {
			t.Errorf("refreshed until %s: %v", at, err)
		}
		break
	}
}

// TestExamples builds the example programs of the Go client and lets them talk to each other.
func TestExamples(t *testing.T) {
	s := startSystem(t)
	dir := t.TempDir()
	if out, err := exec.Command("go", "build", "-o", dir+string(filepath.Separator), "im-gateway/client/examples/...").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	begin := func(name, user string, args ...string) (*exec.Cmd, *screen) {
		c := exec.CommandContext(t.Context(), filepath.Join(dir, name), append([]string{"-gateway", s.gateway, "-user", user}, args...)...)
		out := newScreen()
		c.Stdout, c.Stderr = out, out
		for _, u := range demoUsers {
			if u.name == user {
				c.Env = append(os.Environ(), "IM_PASSWORD="+u.password)
			}
		}
		return c, out
	}
	running := func(c *exec.Cmd) {
		t.Helper()
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
	}
	interrupted := func(c *exec.Cmd, out fmt.Stringer) {
		t.Helper()
		if err := c.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		if err := c.Wait(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}

	bot, botOut := begin("echo", "bob")
	running(bot)
	botOut.waitFor(t, `connected \S+`)
	chat, chatOut := begin("chat", "alice")
	typed, err := chat.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	running(chat)
	chatOut.waitFor(t, `\* connected to`)
	if _, err := io.WriteString(typed, "bob hällo\nnonsense\n"); err != nil {
		t.Fatal(err)
	}
	chatOut.waitFor(t, "bob: hällo")
	chatOut.waitFor(t, `\* type a user's name`)
	interrupted(chat, chatOut)

	// The bot answers while alice is away; she is told of it when she is back, and of what she said herself.
	for range 2 { // the second is not said again
		notify, out := begin("notify", "alice", "-to", "bob", "-id", "n-1", "the backup", "is done")
		if err := notify.Run(); err != nil || !strings.Contains(out.String(), "stored in im-upstream-topic, partition") {
			t.Errorf("%v\n%s", err, out)
		}
	}
	back, backOut := begin("chat", "alice")
	running(back)
	text := backOut.waitFor(t, "(?s)bob: the backup is done")
	if n := strings.Count(text, "bob: the backup is done"); n != 1 || strings.Count(text, "bob: hällo") != 1 {
		t.Errorf("told of the backup %d times:\n%s", n, text)
	}
	interrupted(back, backOut)
	interrupted(bot, botOut)

	for want, args := range map[string][]string{
		"IM_PASSWORD":           {"-to", "bob", "x"},
		"-to or what to say":    {},
		"flag provided but not": {"-nonsense"},
	} {
		c, out := begin("notify", "alice", args...)
		if want == "IM_PASSWORD" {
			c.Env = os.Environ()
		}
		if err := c.Run(); err == nil || !strings.Contains(out.String(), want) {
			t.Errorf("notify %v: %v\n%s", args, err, out)
		}
	}
	for _, out := range []*screen{botOut, chatOut, backOut} {
		t.Logf("printed:\n%s", out)
		for _, u := range demoUsers {
			if strings.Contains(out.String(), u.password) {
				t.Error("a password was printed")
			}
		}
	}
}
