package transport

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/lestrrat-go/jwx/v2/jwt"

	"im-gateway/codec"
)

// tokenWith signs a token with an id and a time of issue.
func tokenWith(t testing.TB, user, id string, issued time.Time) string {
	t.Helper()
	tok, err := jwt.NewBuilder().Claim("user_id", user).JwtID(id).IssuedAt(issued).Expiration(time.Now().Add(time.Hour)).Build()
	if err != nil {
		t.Fatal(err)
	}
	b, err := jwt.Sign(tok, jwt.WithKey(jwa.HS256, secret))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestRevocation: who is denied is closed with 4501 and does not get in again; others stay.
func TestRevocation(t *testing.T) {
	denials := NewDenials()
	s, sink := start(t, func(o *Options) {
		v, err := NewVerifier(VerifierOptions{Algorithm: "HS256", Secret: secret, Denials: denials})
		if err != nil {
			t.Fatal(err)
		}
		o.Settings.Verifier = v
	})
	now := time.Now()
	open := func(token string) (*client, int) {
		c := dial(t, s)
		c.send("GET /ws HTTP/1.1\r\n", upgradeLines, "Authorization: Bearer ", token, "\r\n\r\n")
		resp, _ := c.answer()
		return c, resp.StatusCode
	}
	sessions := map[string]*client{}
	tokens := map[string]string{
		"by id":      tokenWith(t, "a", "id-1", now),
		"another id": tokenWith(t, "a", "id-2", now),
		"by user":    tokenWith(t, "b", "", now.Add(-time.Minute)),
		"newer":      tokenWith(t, "b", "", now),
		"no time":    tokenWith(t, "b", "", time.Unix(0, 0)),
		"bystander":  tokenWith(t, "c", "id-3", now.Add(-time.Minute)),
	}
	for name, token := range tokens {
		c, code := open(token)
		if code != 101 {
			t.Fatalf("%s: %d", name, code)
		}
		sessions[name] = c
		sink.next(t, codec.EventOpen)
	}
	later := now.Add(time.Hour).Unix()
	denials.Add(Denial{TokenID: "id-1", Until: later})
	denials.Add(Denial{User: "b", IssuedUntil: now.Add(-30 * time.Second).Unix(), Until: later})
	denials.Add(Denial{User: "c", IssuedUntil: now.Unix(), Until: now.Add(-time.Second).Unix()}) // has ended
	for name, token := range tokens {
		denied := name == "by id" || name == "by user" || name == "no time"
		if !denied {
			sessions[name].send(text(`{"type":"ping"}`))
			if f := sessions[name].read(); !strings.Contains(string(f.Payload), "pong") {
				t.Errorf("%s: %s", name, f.Payload)
			}
			if _, code := open(token); code != 101 {
				t.Errorf("%s: refused with %d", name, code)
			}
			continue
		}
		if code := sessions[name].closed(); code != 4501 {
			t.Errorf("%s: closed with %d", name, code)
		}
		if _, code := open(token); code != 401 {
			t.Errorf("%s: got in again, %d", name, code)
		}
		// Nor by a session that a good token has opened.
		c, _ := open(tokenWith(t, "b", "", now))
		c.send(text(fmt.Sprintf(`{"type":"refresh-token","data":{"token":%q}}`, token)))
		if f := c.read(); !strings.Contains(string(f.Payload), "AUTH_FAILED") {
			t.Errorf("%s: refreshed, %s", name, f.Payload)
		}
	}
	// What is taken off the list is good again.
	denials.Replace(nil)
	if _, code := open(tokens["by id"]); code != 101 {
		t.Errorf("after the list was cleared: %d", code)
	}
}

// TestRevocationOfACheckedToken: one that is denied after its check, off the loop, and before its session.
func TestRevocationOfACheckedToken(t *testing.T) {
	d := NewDenials()
	v, err := NewVerifier(VerifierOptions{Algorithm: "HS256", Secret: secret, Denials: d})
	if err != nil {
		t.Fatal(err)
	}
	l := bareLoop(t, &dropSink{}, func(o *Options) { o.Settings.Verifier = v })
	l.s.denials, l.now = d, time.Now().UnixMilli()
	who, err := v.Verify([]byte(tokenWith(t, "a", "id-1", time.Now())))
	if err != nil {
		t.Fatal(err)
	}
	if again, err := l.recheck(who, nil); err != nil || again != who {
		t.Errorf("a good one: %v", err)
	}
	d.Add(Denial{TokenID: "id-1", Until: time.Now().Add(time.Hour).Unix()})
	if _, err := l.recheck(who, nil); !errors.Is(err, ErrTokenRevoked) {
		t.Errorf("a denied one: %v", err)
	}
	if _, err := l.recheck(Identity{}, ErrTokenExpired); !errors.Is(err, ErrTokenExpired) {
		t.Errorf("a refused one: %v", err)
	}
}

// TestRevocationOfMany looks at more sessions than one turn of a loop does.
func TestRevocationOfMany(t *testing.T) {
	d := NewDenials()
	l := bareLoop(t, &dropSink{}, func(o *Options) {
		v, err := NewVerifier(VerifierOptions{Algorithm: "HS256", Secret: secret, Denials: d})
		if err != nil {
			t.Fatal(err)
		}
		o.Settings.Verifier = v
	})
	const n = 3*revokeStep + 7
	for i := range n {
		link := &l.shards[i%len(l.shards)]
		link.slots = append(link.slots, slot{conn: &conn{l: l, state: stateClosed, aside: noAside, user: "u", token: d.hash(fmt.Sprint(i))}})
	}
	d.Add(Denial{TokenID: fmt.Sprint(n - 1), Until: 1 << 40})
	l.tickRevoked()
	for steps := 0; l.revoker.busy; steps++ {
		if steps > 4 {
			t.Fatal("it does not end")
		}
		l.revokeSome()
	}
	if l.tickRevoked(); l.revoker.busy {
		t.Error("it looks again though nothing has changed")
	}
}

func BenchmarkDenied(b *testing.B) {
	d := NewDenials()
	for i := range 100_000 {
		d.Add(Denial{TokenID: fmt.Sprint("id-", i), Until: 1 << 40})
	}
	h := d.hash("somebody else's")
	b.ReportAllocs()
	for b.Loop() {
		if d.denies(h, "user", 1, 1000) {
			b.Fatal("denied")
		}
	}
}
