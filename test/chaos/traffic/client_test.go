package traffic

import (
	"fmt"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

const every = time.Millisecond

func ids(c *ClientLog) []string {
	var out []string
	for _, s := range c.Sent {
		out = append(out, s.ID)
	}
	return out
}

func TestClientSendsOneAfterTheOther(t *testing.T) {
	t.Parallel()
	g := newGateway(t, func(p *peer) {
		p.accept()
		if got := p.request.Header.Get("Authorization"); got != "Bearer token-of-u" {
			t.Errorf("authorization %q", got)
		}
		for n := 1; ; n++ {
			m := p.receive()
			if want := fmt.Sprintf("u-%d", n); m.Type != "send-message" || m.MessageID != want || m.Data.Seq != int64(n) {
				t.Errorf("message %+v, want %s", m, want)
			}
			p.success(m.MessageID, 10+n)
		}
	})
	r := runClient(t, ClientOptions{Every: every, Content: 10}, g)
	r.until("acks", func(c *ClientLog) bool { return successes(c) >= 5 })
	r.StopSending()
	c := r.until("settlement", func(*ClientLog) bool { return r.Outstanding() == 0 })
	stopped := time.Now()
	if later := r.until("some time", func(*ClientLog) bool { return time.Since(stopped) > 50*every }); len(later.Sent) != len(c.Sent) {
		t.Errorf("sent %d messages after the stop", len(later.Sent)-len(c.Sent))
	}
	a := c.Acks[1]
	if a.ID != "u-2" || a.Topic != "up" || a.Partition != 3 || a.Offset != 12 {
		t.Errorf("ack %+v", a)
	}
	if s := c.Sent[0]; s.Sum != Sum([]byte(`{"conversation_id":"c","seq":1,"content":"xxxxxxxxxx"}`)) || s.Addr != g.addr {
		t.Errorf("sent %+v", s)
	}
	if n := c.Connects[0]; n.Gateway != "gw" || n.Session != "s1" || n.Degraded {
		t.Errorf("connected %+v", n)
	}
}

func TestClientSendsRefusedAgainBeforeTheNext(t *testing.T) {
	t.Parallel()
	g := newGateway(t, func(p *peer) {
		p.accept()
		p.failed(p.receive().MessageID, "OVERLOADED", 20)
		p.failed(p.receive().MessageID, "BROKER_UNAVAILABLE", 20)
		p.failed(p.receive().MessageID, "OUTCOME_UNKNOWN", 20)
		p.success(p.receive().MessageID, 1)
		p.failed(p.receive().MessageID, "INVALID_MESSAGE", 0) // for good
		for {
			p.success(p.receive().MessageID, 2)
		}
	})
	r := runClient(t, ClientOptions{Every: every}, g)
	c := r.until("acks", func(c *ClientLog) bool { return successes(c) >= 2 })
	if got, want := ids(c)[:6], []string{"u-1", "u-1", "u-1", "u-1", "u-2", "u-3"}; !slices.Equal(got, want) {
		t.Errorf("sent %v, want %v", got, want)
	}
	for i := 1; i < 4; i++ {
		if wait := c.Sent[i].At.Sub(c.Acks[i-1].At); wait < 19*time.Millisecond {
			t.Errorf("sent again after %v", wait)
		}
	}
}

func TestClientTakesALateSuccess(t *testing.T) {
	t.Parallel()
	g := newGateway(t, func(p *peer) {
		p.accept()
		m := p.receive()
		p.failed(m.MessageID, "OUTCOME_UNKNOWN", 1000000)
		p.success(m.MessageID, 1)
		p.success(p.receive().MessageID, 2)
		p.idle()
	})
	r := runClient(t, ClientOptions{Every: every}, g)
	c := r.until("acks", func(c *ClientLog) bool { return successes(c) == 2 })
	if got, want := ids(c)[:2], []string{"u-1", "u-2"}; !slices.Equal(got, want) {
		t.Errorf("sent %v, want %v", got, want)
	}
}

func TestClientResendsAfterACut(t *testing.T) {
	t.Parallel()
	for name, cut := range map[string]func(p *peer){
		"between frames": func(p *peer) {},
		"within a frame": func(p *peer) {
			p.must(ws.WriteHeader(p.conn, ws.Header{Fin: true, OpCode: ws.OpText, Length: 100}))
			_, err := p.conn.Write([]byte(`{"type":"message-ack","data":{"client_msg_id":"u-1","status":"succ`))
			p.must(err)
		},
	} {
		t.Run(name, func(t *testing.T) {
			first := newGateway(t, func(p *peer) {
				p.accept()
				p.receive()
				cut(p)
			})
			second := newGateway(t, serve)
			r := runClient(t, ClientOptions{Every: every}, first, second)
			c := r.until("acks", func(c *ClientLog) bool { return successes(c) >= 2 })
			if got, want := ids(c)[:3], []string{"u-1", "u-1", "u-2"}; !slices.Equal(got, want) {
				t.Errorf("sent %v, want %v", got, want)
			}
			if c.Sent[0].Addr != first.addr || c.Sent[1].Addr != second.addr {
				t.Errorf("sent to %s, then %s", c.Sent[0].Addr, c.Sent[1].Addr)
			}
			if d := c.Disconnects[0]; d.Session != "s1" || d.Code != -1 || d.Ours || d.Err == "" {
				t.Errorf("disconnect %+v", d)
			}
			if n, ok := c.Online(); !ok || n.Addr != second.addr {
				t.Errorf("online %+v, %v", n, ok)
			}
		})
	}
}

func TestClientObeysCloseCodes(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		code      int
		reconnect func(int) bool
		again     bool
	}{
		{4000, nil, true},
		{4002, nil, true},
		{1001, nil, true},
		{4500, nil, false},
		{4503, nil, false},
		{4502, func(code int) bool { return code == 4502 }, true},
	} {
		t.Run(fmt.Sprint(tc.code), func(t *testing.T) {
			g := newGateway(t, func(p *peer) {
				p.accept()
				p.close(tc.code)
			}, serve)
			r := runClient(t, ClientOptions{Reconnect: tc.reconnect}, g)
			var c *ClientLog
			if tc.again {
				c = r.until("second session", func(c *ClientLog) bool { return len(c.Connects) == 2 })
			} else {
				<-r.done
				if !r.Ended() {
					t.Error("not ended")
				}
				c = r.until("disconnect", func(c *ClientLog) bool { return len(c.Disconnects) == 1 })
			}
			if d := c.Disconnects[0]; d.Code != tc.code || d.Ours {
				t.Errorf("disconnect %+v", d)
			}
			if r.Online() != tc.again {
				t.Errorf("online %v", r.Online())
			}
		})
	}
}

func TestClientLogsRefusedHandshakes(t *testing.T) {
	t.Parallel()
	g := newGateway(t, func(p *peer) { p.refuse(http.StatusServiceUnavailable, "OVERLOADED") }, serve)
	r := runClient(t, ClientOptions{}, g)
	c := r.until("session", func(c *ClientLog) bool { return len(c.Connects) == 1 })
	if f := c.Failures[0]; f.What != "dial" || f.Status != 503 || f.Code != "OVERLOADED" {
		t.Errorf("failure %+v", f)
	}
}

func TestClientAcknowledgesDeliveries(t *testing.T) {
	t.Parallel()
	acked := make(chan int64, 3) // the script's
	g := newGateway(t, func(p *peer) {
		p.accept()
		if q := p.request.URL.Query(); q.Get("ack") != "1" || q.Get("device_id") != "d1" || q.Get("device") != "web" {
			t.Errorf("query %v", q)
		}
		for n, id := range []string{"m1", "m2", "m1"} {
			p.push(id, n+1, 7)
			m := p.receive()
			if m.Type != "delivery-ack" {
				t.Errorf("received %+v", m)
			}
			acked <- m.Data.DeliveryID
		}
		p.raw(`{"type":"new-message","message_id":"m3","data":1}`) // without delivery_id: not allowed
		p.idle()
	})
	r := runClient(t, ClientOptions{Ack: true, DeviceID: "d1", Device: "web"}, g)
	c := r.until("pushes", func(c *ClientLog) bool { return len(c.Pushes) == 4 && len(c.Failures) == 1 })
	for n := int64(1); n <= 3; n++ {
		if got := <-acked; got != n {
			t.Errorf("acknowledged %d, want %d", got, n)
		}
	}
	for n, p := range c.Pushes {
		if p.Session != "s1" || p.Duplicate != (n == 2) {
			t.Errorf("push %+v", p)
		}
	}
	if p := c.Pushes[1]; p.MessageID != "m2" || p.Seq != 7 || string(p.Data) != `{"seq":7}` || p.DeliveryID != 2 {
		t.Errorf("push %+v", p)
	}
	if f := c.Failures[0]; f.What != "protocol" {
		t.Errorf("failure %+v", f)
	}
}

func TestClientGivesASilentConnectionUp(t *testing.T) {
	t.Parallel()
	g := newGateway(t, func(p *peer) {
		p.accept()
		p.idle()
	}, serve)
	r := runClient(t, ClientOptions{Silence: 200 * time.Millisecond}, g)
	c := r.until("second session", func(c *ClientLog) bool { return len(c.Connects) == 2 })
	if f := c.Failures[0]; f.What != "connection" {
		t.Errorf("failure %+v", f)
	}
	// The second one answers pings and nothing else, and is kept.
	heard := time.Now()
	c = r.until("quiet time", func(*ClientLog) bool { return time.Since(heard) > time.Second })
	if len(c.Connects) != 2 {
		t.Errorf("connects %+v", c.Connects)
	}
}

func TestClientLeavesOnAHint(t *testing.T) {
	t.Parallel()
	g := newGateway(t, func(p *peer) {
		p.accept()
		p.send("reconnect", `{"retry_after_ms":50,"reason":"drain"}`)
		for n := 0; ; n++ {
			p.success(p.receive().MessageID, n)
		}
	})
	other := newGateway(t, serve)
	r := runClient(t, ClientOptions{Ack: true, Every: every}, g, other)
	c := r.until("second session", func(c *ClientLog) bool { return len(c.Connects) == 2 })
	if h := c.Hints[0]; h.RetryAfter != 50 || h.Session != "s1" {
		t.Errorf("hint %+v", h)
	}
	if d := c.Disconnects[0]; !d.Ours {
		t.Errorf("disconnect %+v", d)
	}
	last := 0
	for i, s := range c.Sent {
		if s.Addr == g.addr {
			last = i
		}
	}
	if a, at := c.Sent[last], c.Hints[0].At; a.At.After(at.Add(50 * time.Millisecond)) {
		t.Errorf("sent %v after the hint", a.At.Sub(at))
	}
	c = r.until("messages", func(c *ClientLog) bool { return successes(c) > last+2 })
	if got := ids(c); len(slices.Compact(got)) != len(c.Sent) {
		t.Errorf("sent twice: %v", ids(c))
	}
}

func TestClientWithAWindow(t *testing.T) {
	t.Parallel()
	g := newGateway(t, func(p *peer) {
		p.accept()
		var first []string
		for range 4 {
			first = append(first, p.receive().MessageID)
		}
		p.failed(first[1], "OVERLOADED", 1000)
		for _, i := range []int{3, 2, 0} {
			p.success(first[i], i)
		}
		for {
			p.success(p.receive().MessageID, 9)
		}
	})
	r := runClient(t, ClientOptions{Every: every, Window: 4}, g)
	c := r.until("u-2 again", func(c *ClientLog) bool {
		return successes(c) >= 8 && slices.ContainsFunc(c.Acks, func(a Ack) bool { return a.ID == "u-2" && a.Success() })
	})
	if got, want := ids(c)[:5], []string{"u-1", "u-2", "u-3", "u-4", "u-5"}; !slices.Equal(got, want) {
		t.Errorf("sent %v, want %v first", got, want)
	}
	if i := slices.Index(ids(c)[4:], "u-2"); i < 1 {
		t.Errorf("u-2 was not sent again out of order: %v", ids(c))
	}
	if c.Ordered {
		t.Error("said to be ordered")
	}
}
