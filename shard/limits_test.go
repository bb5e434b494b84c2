package shard

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"im-gateway/codec"
)

// limited is a shard whose clock the test moves, with the answers that its sessions got.
type limited struct {
	*quiet
	t       *testing.T
	now     time.Time
	builder *codec.Builder
	names   int
}

// limitedUser is a shard that takes so much of each user.
func limitedUser(t *testing.T, messages, bytes int) *limited {
	l := &limited{t: t, now: time.Unix(1_760_000_000, 0), builder: codec.NewBuilder("g", 7, nil)}
	l.quiet = newQuiet(t, func() time.Time { return l.now })
	l.s.opts.MaxSessions = 4
	l.alter(func(n *Settings) {
		n.UserMessagesPerSecond, n.UserBytesPerSecond, n.MaxSessionInFlight = messages, bytes, MaxSessionInFlight
	})
	return l
}

// alter puts other settings into force.
func (l *limited) alter(change func(*Settings)) {
	l.t.Helper()
	alter(l.t, l.s.set, change)
	l.s.clock()
}

func (l *limited) wait(d time.Duration) {
	l.now = l.now.Add(d)
	l.s.clock()
	l.s.sweepAccounts()
}

func (l *limited) connect(index uint32, user string) codec.SessionID {
	id := sessionID(index, 1)
	l.s.onEvent(&codec.Event{Kind: codec.EventOpen, Session: id, Open: &codec.Open{
		User: user, ExpiresAt: 1 << 60, ConnectedAt: l.s.now}})
	l.s.onPresence([]PresenceResult{{Kind: Claim, Session: id, Version: 1}})
	l.settle()
	return id
}

func (l *limited) disconnect(id codec.SessionID) {
	l.s.onEvent(&codec.Event{Kind: codec.EventClose, Session: id, Code: codec.CloseAbnormal})
	l.settle()
}

func (l *limited) record(user string, id codec.SessionID, size int) *codec.Upstream {
	l.names++
	m := codec.ClientMessage{Type: typeM, ClientMsgID: fmt.Append(nil, "n", l.names), Data: []byte(`"` + strings.Repeat("x", size) + `"`)}
	return l.builder.Build(&m, user, id, l.s.now)
}

// say sends a message and returns the code of its refusal, and when to try again; "closed 1008" when the
// session was closed for it.
func (l *limited) say(user string, id codec.SessionID, size int) (code string, retryAfter time.Duration) {
	l.t.Helper()
	l.s.onEvent(&codec.Event{Kind: codec.EventMessage, Session: id, Upstream: l.record(user, id, size)})
	l.s.flush()
	for len(l.sent) > 0 {
		b := l.sent[0]
		l.sent = l.sent[1:]
		for i := range b.Commands {
			c := &b.Commands[i]
			c.Outcome = codec.OutcomeFlushed
			if c.Kind == codec.CommandClose {
				code = fmt.Sprint("closed ", c.Code)
				continue
			}
			var f struct {
				Data struct {
					Code  string
					Retry int64 `json:"retry_after_ms"`
				}
			}
			if err := json.Unmarshal(c.Payload, &f); err != nil {
				l.t.Fatal(err)
			}
			code, retryAfter = f.Data.Code, time.Duration(f.Data.Retry)*time.Millisecond
		}
		l.s.onReturn(b)
		l.s.flush()
	}
	return code, retryAfter
}

// post publishes a message of the HTTP API.
func (l *limited) post(user string) codec.UpstreamResult {
	u := l.record(user, 0, 1)
	reply := make(chan codec.UpstreamResult, 1)
	u.Reply = reply
	l.s.onPublish(u)
	l.s.flush()
	select {
	case r := <-reply:
		return r
	default:
		return codec.UpstreamResult{} // accepted
	}
}

const rateLimited = string(codec.RateLimited)

func TestUserMessagesPerSecond(t *testing.T) {
	l := limitedUser(t, 10, 0)
	alice, bob := l.connect(0, "alice"), l.connect(1, "bob")
	for i := range 20 { // two seconds' worth at once
		if code, _ := l.say("alice", alice, 1); code != "" {
			t.Fatalf("message %d: %s", i, code)
		}
	}
	code, retry := l.say("alice", alice, 1)
	if code != rateLimited || retry < 100*time.Millisecond || retry > 300*time.Millisecond {
		t.Fatalf("beyond the limit: %q, again after %s", code, retry)
	}
	if code, _ := l.say("bob", bob, 1); code != "" {
		t.Errorf("another user: %s", code)
	}
	l.wait(retry - time.Millisecond)
	if code, _ := l.say("bob", bob, 1); code != "" {
		t.Errorf("another user: %s", code)
	}
	l.wait(time.Millisecond)
	if code, _ := l.say("alice", alice, 1); code != "" {
		t.Errorf("after the time told: %s", code)
	}
	// Then as many as the rate allows, and no more.
	accepted := 0
	for range 100 {
		l.wait(100 * time.Millisecond)
		if code, _ := l.say("alice", alice, 1); code == "" {
			accepted++
		}
	}
	if accepted != 100 {
		t.Errorf("%d of 100 accepted at the rate", accepted)
	}
	if n := value(l.s.metrics.userRate); n != 1 {
		t.Errorf("%d refusals counted", n)
	}
}

func TestUserBytesPerSecond(t *testing.T) {
	l := limitedUser(t, 0, 10_000)
	alice := l.connect(0, "alice")
	sent := 0
	for {
		code, retry := l.say("alice", alice, 1000)
		if code == rateLimited && retry > 0 {
			break
		}
		if sent++; code != "" || sent > 20 {
			t.Fatalf("message %d: %q", sent, code)
		}
	}
	if sent < 12 || sent > 19 { // of 1,000 bytes and what a record holds besides
		t.Errorf("%d messages at once", sent)
	}
	// A message by itself is never too much.
	l.wait(time.Minute)
	if code, _ := l.say("alice", alice, 30_000); code != "" {
		t.Errorf("a message larger than the limit: %s", code)
	}
	if code, _ := l.say("alice", alice, 1); code == "" {
		t.Error("a message behind it is accepted")
	}
}

// TestUserRateIsOfAllSessions, of the HTTP API, and of sessions that have ended.
func TestUserRateIsOfAllSessions(t *testing.T) {
	l := limitedUser(t, 10, 0)
	first, second := l.connect(0, "alice"), l.connect(1, "alice")
	for range 6 {
		if code, _ := l.say("alice", first, 1); code != "" {
			t.Fatal(code)
		}
		if code, _ := l.say("alice", second, 1); code != "" {
			t.Fatal(code)
		}
		if r := l.post("alice"); r.Code != codec.OK {
			t.Fatal(r)
		}
	}
	l.disconnect(second) // the one whose account counts
	third := l.connect(2, "alice")
	if code, _ := l.say("alice", third, 1); code != "" {
		t.Fatal(code)
	}
	l.disconnect(first)
	l.disconnect(third)
	if r := l.post("alice"); r.Code != codec.OK { // the twentieth
		t.Fatal(r)
	}
	for range 100 { // what is refused is not charged
		if r := l.post("alice"); r.Code != codec.RateLimited || r.RetryAfterMS != 100 {
			t.Fatalf("beyond the limit: %+v", r)
		}
	}
	fourth := l.connect(3, "alice")
	if len(l.s.accounts) != 0 {
		t.Error("the account is in two places")
	}
	if code, _ := l.say("alice", fourth, 1); code != rateLimited {
		t.Errorf("connecting again made it %q", code)
	}
	l.disconnect(fourth)
	if len(l.s.accounts) != 1 {
		t.Error("the account is lost")
	}
	l.wait(3 * time.Second)
	if len(l.s.accounts) != 0 {
		t.Error("an account that is paid for is kept")
	}
}

// TestUserFlood: who goes on regardless is closed; who slows down is heard again.
func TestUserFlood(t *testing.T) {
	l := limitedUser(t, 10, 0)
	alice := l.connect(0, "alice")
	counts := map[string]int{}
	for range 100 {
		code, _ := l.say("alice", alice, 1)
		counts[code]++
		if strings.HasPrefix(code, "closed") {
			break
		}
	}
	if counts[""] != 20 || counts[rateLimited] != 20 || counts["closed 1008"] != 1 {
		t.Errorf("%v", counts)
	}
	if n := value(l.s.metrics.userFlood); n != 1 {
		t.Errorf("%d floods counted", n)
	}
	again := l.connect(1, "alice")
	if code, _ := l.say("alice", again, 1); code != "closed 1008" {
		t.Errorf("at once again: %q", code)
	}
	l.wait(4 * time.Second)
	once := l.connect(2, "alice")
	if code, _ := l.say("alice", once, 1); code != "" {
		t.Errorf("after the time told: %q", code)
	}
}

func TestNoUserLimit(t *testing.T) {
	l := limitedUser(t, 0, 0)
	alice := l.connect(0, "alice")
	for range 1000 {
		if code, _ := l.say("alice", alice, 1000); code != "" {
			t.Fatal(code)
		}
	}
	if r := l.post("bob"); r.Code != codec.OK || len(l.s.accounts) != 0 {
		t.Errorf("%+v, %d accounts", r, len(l.s.accounts))
	}
}

// TestUnackedMessages: beyond the bound of one session OVERLOADED, until an answer has come.
func TestUnackedMessages(t *testing.T) {
	l := limitedUser(t, 0, 0)
	l.alter(func(n *Settings) { n.MaxSessionInFlight = 3 })
	alice, other := l.connect(0, "alice"), l.connect(1, "alice")
	for i := range 4 {
		if code, _ := l.say("alice", alice, 1); (code == string(codec.Overloaded)) != (i == 3) {
			t.Errorf("message %d: %q", i, code)
		}
	}
	if code, _ := l.say("alice", other, 1); code != "" {
		t.Errorf("another session: %s", code)
	}
	if n := value(l.s.metrics.unacked); n != 1 {
		t.Errorf("%d refusals counted", n)
	}
	l.s.onResults(&codec.UpstreamBatch{Records: l.s.up.Records[:1]}, time.Now())
	l.settle()
	if code, _ := l.say("alice", alice, 1); code != "" {
		t.Errorf("after an answer: %s", code)
	}
}
