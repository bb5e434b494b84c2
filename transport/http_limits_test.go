package transport

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"im-gateway/codec"
)

// TestHTTPTimeouts: a request that takes too long to send, to answer or to come at all loses its
// connection, and its reason is counted.
func TestHTTPTimeouts(t *testing.T) {
	gone := make(chan error, 1)
	s, _ := start(t, func(o *Options) {
		o.HTTPReadTimeout, o.HTTPWriteTimeout, o.HTTPIdleTimeout = 200*time.Millisecond, 400*time.Millisecond, 300*time.Millisecond
		o.API = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/endless" {
				_, _ = io.Copy(io.Discard, r.Body)
				return
			}
			for {
				if _, err := io.WriteString(w, strings.Repeat("x", 64<<10)); err != nil {
					gone <- err
					return
				}
			}
		})
	})
	ends := func(c *client) {
		t.Helper()
		if _, err := io.Copy(io.Discard, c.r); err != nil && strings.Contains(err.Error(), "timeout") {
			t.Errorf("the connection lives on: %v", err)
		}
	}
	counted := func(what string, read, write, idle float64) {
		t.Helper()
		late := &s.metrics.httpLate
		eventually(t, func() bool {
			return testutil.ToFloat64(late.read) == read && testutil.ToFloat64(late.write) == write && testutil.ToFloat64(late.idle) == idle
		})
	}
	c := dial(t, s)
	c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
	if resp, _ := c.answer(); resp.StatusCode != 200 {
		t.Fatal(resp.Status)
	}
	ends(c)
	counted("idle", 0, 0, 1)

	c = dial(t, s)
	c.send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nslow")
	ends(c)
	counted("read", 1, 0, 1)

	c = dial(t, s)
	c.send("GET /endless HTTP/1.1\r\nHost: h\r\n\r\n")
	select {
	case <-gone:
	case <-time.After(patience):
		t.Fatal("the answer to a client that does not read goes on")
	}
	counted("write", 1, 1, 1)

	// An upgrade stops net/http's reader by a deadline long past; that is none of these.
	c = dial(t, s)
	c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
	if resp, _ := c.answer(); resp.StatusCode != 200 {
		t.Fatal(resp.Status)
	}
	c.send("GET /ws HTTP/1.1\r\n", upgradeLines, "Authorization: Bearer ", token(t, "u", time.Hour), "\r\n\r\n")
	if resp, body := c.answer(); resp.StatusCode != 101 {
		t.Fatal(resp.Status, body)
	}
	counted("upgrade", 1, 1, 1)
}

// TestPressure: while memory is short nothing new is taken, and sessions stay.
func TestPressure(t *testing.T) {
	s, sink := start(t, nil)
	session := connect(t, s, "u")
	kept := dial(t, s)
	const get = "GET /x HTTP/1.1\r\nHost: h\r\n\r\n"
	kept.send(get)
	if resp, _ := kept.answer(); resp.StatusCode != 200 {
		t.Fatal(resp.Status)
	}
	early := dial(t, s)
	early.send("GET /ws HTTP/1.1\r\n")
	eventually(t, func() bool { return s.Connections() == 3 })

	s.SetPressure(true)
	shed := func(c *client) {
		t.Helper()
		if resp, body := c.answer(); resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" || !strings.Contains(body, "OVERLOADED") {
			t.Errorf("%s %q %s", resp.Status, resp.Header.Get("Retry-After"), body)
		}
	}
	shed(dial(t, s))
	kept.send(get)
	shed(kept)
	early.send(upgradeLines, "Authorization: Bearer ", token(t, "v", time.Hour), "\r\n\r\n")
	shed(early)
	session.send(text(`{"type":"send-message","message_id":"m1","data":{}}`))
	if f := session.read(); !strings.Contains(string(f.Payload), `"OVERLOADED"`) || !strings.Contains(string(f.Payload), `"m1"`) {
		t.Errorf("the message was answered %s", f.Payload)
	}
	session.send(text(`{"type":"ping"}`))
	if f := session.read(); !strings.Contains(string(f.Payload), `"pong"`) {
		t.Errorf("the ping was answered %s", f.Payload)
	}
	p := &s.metrics.pressed
	if c, r, m := testutil.ToFloat64(p.connections), testutil.ToFloat64(p.requests), testutil.ToFloat64(p.messages); c != 2 || r != 1 || m != 1 {
		t.Errorf("counted %v connections, %v requests, %v messages", c, r, m)
	}

	s.SetPressure(false)
	session.send(text(`{"type":"send-message","message_id":"m2","data":{}}`))
	sink.next(t, codec.EventMessage)
	connect(t, s, "v")
}
