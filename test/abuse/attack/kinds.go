package attack

import (
	"bytes"
	"compress/flate"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gobwas/ws"
	"golang.org/x/sys/unix"
)

// kinds are the abuses. Each function is one attempt and returns what it came to.
var kinds = map[string]func(context.Context, *attacker) string{
	"slow heads":     slowHeads,
	"slow bodies":    slowBodies,
	"never read":     neverRead,
	"dead streams":   deadStreams,
	"pings":          pings,
	"app pings":      appPings,
	"messages":       messages,
	"large messages": largeMessages,
	"fragments":      fragments,
	"half messages":  halfMessages,
	"heads":          heads,
	"invalid frames": invalidFrames,
	"bombs":          bombs,
	"half open":      halfOpen,
	"hold":           hold,
	"storm":          storm,
	"logins":         logins,
	"posts":          posts,
	"TLS stalls":     tlsStalls,
	"TLS handshakes": tlsHandshakes,
}

// repeat returns the same chunk for ever.
func repeat(b []byte) func() []byte { return func() []byte { return b } }

// after returns first once, then what next returns.
func after(first []byte, next func() []byte) func() []byte {
	done := false
	return func() []byte {
		if !done {
			done = true
			return first
		}
		return next()
	}
}

// slowHeads never finish their head, a byte at a time.
func slowHeads(ctx context.Context, a *attacker) string {
	c, outcome := a.dial(ctx, 0)
	if c == nil {
		return outcome
	}
	return c.press(after([]byte(a.head("X-Slow: ")), repeat([]byte("a"))))
}

// slowBodies never finish the body of a request.
func slowBodies(ctx context.Context, a *attacker) string {
	c, outcome := a.dial(ctx, 0)
	if c == nil {
		return outcome
	}
	return c.press(after([]byte("POST /api/auth/login HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"),
		repeat([]byte("{"))))
}

// neverRead opens sessions that read nothing until the attack is over, and then all there is.
func neverRead(ctx context.Context, a *attacker) string {
	c, outcome := a.open(ctx, 4<<10, "")
	if c == nil {
		return outcome
	}
	defer c.hangUp()
	c.leaveUnread(ctx, a)
	return c.outcome()
}

// leaveUnread reads nothing until the attack is over, and leaves 3 s to read all there is.
func (c *conn) leaveUnread(ctx context.Context, a *attacker) {
	c.detach()
	a.begun()
	<-ctx.Done()
	c.ctx = context.WithoutCancel(ctx)
	_ = c.SetDeadline(time.Now().Add(3 * time.Second))
}

// deadStreams is neverRead by event streams.
func deadStreams(ctx context.Context, a *attacker) string {
	c, outcome := a.dial(ctx, 4<<10)
	if c == nil {
		return outcome
	}
	defer c.hangUp()
	if _, err := c.Write([]byte("GET /sse HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer " + a.token() + "\r\n\r\n")); err != nil {
		return outcomeOf(ctx, err, reset)
	}
	if outcome := c.response(); outcome != "HTTP 200" {
		return outcome
	}
	c.leaveUnread(ctx, a)
	return c.streamOutcome()
}

// pings are WebSocket pings, as many as the pace allows.
func pings(ctx context.Context, a *attacker) string {
	c, outcome := a.open(ctx, 0, "")
	if c == nil {
		return outcome
	}
	return c.press(repeat(bytes.Repeat(frame(ws.OpPing, true, make([]byte, 125)), 100)))
}

// appPings are the protocol's own.
func appPings(ctx context.Context, a *attacker) string {
	c, outcome := a.open(ctx, 0, "")
	if c == nil {
		return outcome
	}
	c.text = a.refusals()
	return c.press(repeat(bytes.Repeat(text(`{"type":"ping"}`), 100)))
}

// refusals counts what the gateway refuses.
func (a *attacker) refusals() func([]byte) {
	return func(b []byte) {
		var f struct {
			Type string
			Data struct{ Code string }
		}
		switch err := json.Unmarshal(b, &f); {
		case err != nil:
			a.count("unreadable frame")
		case f.Data.Code != "":
			a.count("refused " + f.Data.Code)
		case f.Type == "message-ack":
			a.count("accepted")
		}
	}
}

// messages are sent without waiting for anything.
func messages(ctx context.Context, a *attacker) string {
	c, outcome := a.open(ctx, 0, "")
	if c == nil {
		return outcome
	}
	c.text = a.refusals()
	n := 0
	return c.press(func() (b []byte) {
		for range 100 {
			n++
			b = append(b, text(fmt.Sprintf(`{"type":"send-message","message_id":"x-%d-%d","data":{}}`, a.attempt, n))...)
		}
		return b
	})
}

// largeMessages are as large as is allowed, again and again.
func largeMessages(ctx context.Context, a *attacker) string {
	c, outcome := a.open(ctx, 0, "")
	if c == nil {
		return outcome
	}
	c.text = a.refusals()
	body := strings.Repeat("x", 60<<10)
	n := 0
	return c.press(func() []byte {
		n++
		return text(fmt.Sprintf(`{"type":"send-message","message_id":"l-%d-%d","data":%q}`, a.attempt, n, body))
	})
}

// fragments are of one byte, or of none, of a message that never ends.
func fragments(ctx context.Context, a *attacker) string {
	c, outcome := a.open(ctx, 0, "")
	if c == nil {
		return outcome
	}
	payload := []byte("x")
	if a.i%2 == 1 {
		payload = nil
	}
	return c.press(after(frame(ws.OpText, false, []byte(`"`)), repeat(bytes.Repeat(frame(ws.OpContinuation, false, payload), 200))))
}

// halfMessages begin a message of the largest size and take their time with its end.
func halfMessages(ctx context.Context, a *attacker) string {
	c, outcome := a.open(ctx, 0, "")
	if c == nil {
		return outcome
	}
	whole := frame(ws.OpText, true, bytes.Repeat([]byte("x"), 64<<10))
	at := 60 << 10
	return c.press(after(whole[:at], func() []byte {
		if at++; at == len(whole) {
			return nil
		}
		return whole[at-1 : at]
	}))
}

// headBytes is websocket.head_bytes.
const headBytes = 8 << 10

// heads are of the largest size allowed, and beyond.
func heads(ctx context.Context, a *attacker) string {
	pad := func(head string, size int) []byte {
		const name = "X-Pad: "
		return []byte(head + name + strings.Repeat("a", max(0, size-len(head)-len(name)-4)) + "\r\n\r\n")
	}
	if a.attempt%4 == 0 {
		c, outcome := a.dial(ctx, 0)
		if c == nil {
			return outcome
		}
		defer c.hangUp()
		if _, err := c.Write(pad(a.head(""), headBytes)); err != nil {
			return outcomeOf(ctx, err, reset)
		}
		return c.response()
	}
	c, outcome := a.dial(ctx, 0)
	if c == nil {
		return outcome
	}
	switch a.attempt % 4 {
	case 1: // a byte too many
		return c.press(after(pad(a.head(""), headBytes+1), func() []byte { return nil }))
	case 2: // an upgrade's that never ends
		return c.press(after([]byte(a.head("")), repeat([]byte("X-More: "+strings.Repeat("a", 1000)+"\r\n"))))
	default: // another request's that never ends
		return c.press(after([]byte("GET /healthz HTTP/1.1\r\nHost: gateway\r\n"), repeat([]byte("X-More: "+strings.Repeat("a", 1000)+"\r\n"))))
	}
}

// invalid are frames that RFC 6455 forbids, and some that the protocol does.
var invalid = [][]byte{
	{0x81, 0x01, 'x'},                                            // not masked
	{0xc1, 0x81, 0, 0, 0, 0, 'x'},                                // a reserved bit
	{0x83, 0x81, 0, 0, 0, 0, 'x'},                                // a reserved opcode
	{0x8b, 0x80, 0, 0, 0, 0},                                     // a reserved control opcode
	{0x09, 0x80, 0, 0, 0, 0},                                     // a ping in pieces
	append([]byte{0x89, 0xfe, 0, 126}, make([]byte, 130)...),     // a ping of 126 bytes
	{0x80, 0x81, 0, 0, 0, 0, 'x'},                                // a continuation of nothing
	{0x01, 0x81, 0, 0, 0, 0, 'x', 0x81, 0x81, 0, 0, 0, 0, 'x'},   // a message within a message
	{0x88, 0x81, 0, 0, 0, 0, 3},                                  // a close of one byte
	{0x88, 0x82, 0, 0, 0, 0, 3, 236},                             // a close code that must not be sent, 1004
	{0x81, 0x82, 0, 0, 0, 0, 0xc0, 0x80},                         // no UTF-8
	{0x82, 0x81, 0, 0, 0, 0, 'x'},                                // binary in a text protocol
	{0x81, 0xff, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0}, // of 2 GiB
	{0x81, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0},          // of a negative length
}

// invalidFrames sends one of them.
func invalidFrames(ctx context.Context, a *attacker) string {
	c, outcome := a.open(ctx, 0, "")
	if c == nil {
		return outcome
	}
	return c.press(after(invalid[a.attempt%len(invalid)], func() []byte { return nil }))
}

// bomb is a message of 32 MiB, compressed to less than the limit of a message.
var bomb = sync.OnceValue(func() []byte {
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, flate.BestCompression)
	if err != nil {
		panic(err) // the level exists
	}
	zeros := make([]byte, 1<<20)
	for range 32 {
		_, _ = w.Write(zeros) // to memory
	}
	_ = w.Flush()
	return bytes.TrimSuffix(b.Bytes(), []byte{0, 0, 0xff, 0xff})
})

// bombs inflate to a thousand times their size; every other one comes in pieces.
func bombs(ctx context.Context, a *attacker) string {
	const compressed = 0x40 // RSV1, in a message's first frame
	var message []byte
	if b := bomb(); a.attempt%2 == 0 {
		message = frame(ws.OpText, true, b)
	} else {
		message = frame(ws.OpText, false, b[:1000])
		for piece := range slices.Chunk(b[1000:], 1000) {
			message = append(message, frame(ws.OpContinuation, false, piece)...)
		}
		message = append(message, frame(ws.OpContinuation, true, nil)...)
	}
	message[0] |= compressed
	c, outcome := a.open(ctx, 0, "Sec-WebSocket-Extensions: permessage-deflate; client_no_context_takeover; server_no_context_takeover\r\n")
	if c == nil {
		return outcome
	}
	return c.press(after(message, func() []byte { return nil }))
}

// halfOpen connections say nothing: after the connect, after the upgrade, or as their host is gone.
func halfOpen(ctx context.Context, a *attacker) string {
	switch a.i % 3 {
	case 0:
		c, outcome := a.dial(ctx, 0)
		if c == nil {
			return outcome
		}
		defer c.hangUp()
		a.begun()
		return c.outcome()
	case 1:
		c, outcome := a.open(ctx, 0, "")
		if c == nil {
			return outcome
		}
		defer c.hangUp()
		a.begun()
		return c.outcome()
	}
	c, outcome := a.open(ctx, 0, "")
	if c == nil {
		return outcome
	}
	defer c.hangUp()
	rc, err := c.SyscallConn()
	if err == nil {
		if cerr := rc.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR, 1)
		}); cerr != nil {
			err = cerr
		}
	}
	if err != nil {
		return reset // not root: the end is told by a reset
	}
	return vanished // a socket under repair is closed without a word
}

// hold opens a session, or whatever it gets, and keeps it.
func hold(ctx context.Context, a *attacker) string {
	c, outcome := a.open(ctx, 0, "")
	a.begun()
	if c == nil {
		return outcome
	}
	return c.press(func() []byte { return nil })
}

// storm connects, is welcomed, cuts the connection and comes again.
func storm(ctx context.Context, a *attacker) string {
	c, outcome := a.open(ctx, 0, "")
	if c == nil {
		return outcome
	}
	defer c.hangUp()
	welcome := false
	c.text = func(b []byte) {
		if welcome = welcome || bytes.Contains(b, []byte(`"connected"`)); welcome {
			_ = c.CloseRead() // the outcome below is ours
		}
	}
	switch outcome = c.outcome(); {
	case welcome:
		return "welcomed"
	default:
		return outcome
	}
}

// logins guess passwords: half of the attackers many names from one address, the others one name from
// many addresses.
func logins(ctx context.Context, a *attacker) string {
	from, name := a, "victim"
	if a.i%2 == 0 {
		from, name = &attacker{run: &run{spec: Spec{From: OneAddress}}}, fmt.Sprintf("guess-%d", a.attempt)
	}
	t := &http.Transport{DialContext: from.dialer(0).DialContext, DisableKeepAlives: true}
	defer t.CloseIdleConnections()
	return a.post(ctx, t, "/api/auth/login", fmt.Sprintf(`{"username":%q,"password":"guess-%d"}`, name, a.attempt))
}

// posts are messages over HTTP, one after the other on a connection.
func posts(ctx context.Context, a *attacker) string {
	t := &http.Transport{DialContext: a.dialer(0).DialContext, MaxConnsPerHost: 1}
	defer t.CloseIdleConnections()
	for n := 0; ; n++ {
		outcome := a.post(ctx, t, "/api/messages", fmt.Sprintf(`{"type":"send-message","message_id":"h-%d-%d-%d","data":{}}`, a.i, a.attempt, n))
		if !strings.HasPrefix(outcome, "HTTP ") {
			return outcome
		}
		a.count(outcome)
		wait(ctx, a.spec.Pace)
	}
}

// post sends a request and says what came of it.
func (a *attacker) post(ctx context.Context, t *http.Transport, path, body string) string {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+a.spec.Addr+path, strings.NewReader(body))
	if err != nil {
		return unreachable
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+a.token())
	resp, err := t.RoundTrip(req)
	if err != nil {
		return outcomeOf(ctx, err, unreachable)
	}
	_, _ = io.Copy(io.Discard, resp.Body) // the status is all that counts
	_ = resp.Body.Close()
	a.begun()
	return fmt.Sprintf("HTTP %d", resp.StatusCode)
}

// anyServer is a client that does not care who answers.
var anyServer = &tls.Config{InsecureSkipVerify: true} //nolint:gosec // it is the suite's own gateway

// hello is a client's first record.
var hello = sync.OnceValue(func() []byte {
	ours, theirs := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() { _ = tls.Client(theirs, anyServer).Handshake() }) // until the pipe is closed
	b := make([]byte, 16<<10)
	n, err := ours.Read(b)
	if err != nil {
		panic(err) // a client begins by itself
	}
	_ = ours.Close()
	wg.Wait()
	return b[:n]
})

// tlsStalls begin a handshake that never goes on.
func tlsStalls(ctx context.Context, a *attacker) string {
	c, outcome := a.dial(ctx, 0)
	if c == nil {
		return outcome
	}
	defer c.hangUp()
	if _, err := c.Write(hello()); err != nil {
		return outcomeOf(ctx, err, reset)
	}
	a.begun()
	if _, err := io.Copy(io.Discard, c.r); err != nil {
		return outcomeOf(ctx, err, reset)
	}
	return ended
}

// tlsHandshakes are whole.
func tlsHandshakes(ctx context.Context, a *attacker) string {
	c, outcome := a.dial(ctx, 0)
	if c == nil {
		return outcome
	}
	defer c.hangUp()
	if err := tls.Client(c, anyServer).HandshakeContext(ctx); err != nil {
		return outcomeOf(ctx, err, "handshake failed")
	}
	a.begun()
	return "handshake done"
}
