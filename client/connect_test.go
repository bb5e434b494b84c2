package client

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync/atomic"
	"testing"
	"time"
)

func TestFinalCloses(t *testing.T) {
	for _, code := range []int{4500, 4501, 4503} {
		g := newGateway(t, func(_ int, p *peer) {
			p.hello()
			p.next()
			p.close(code)
		})
		c := start(t, Options{URLs: []string{g.url()}})
		ps := c.send(t, "m1")
		err := c.ended(t)
		if ce, ok := errors.AsType[*CloseError](err); !ok || ce.Code != code || ce.Reason != "why" {
			t.Errorf("Run after %d: %v", code, err)
		}
		if s := c.await(t, Closed); s.Code != code || s.Reason != "why" {
			t.Errorf("closed state %+v", s)
		}
		if _, err := wait(t, ps[0]); !errors.Is(err, ErrClosed) {
			t.Errorf("Wait: %v", err)
		}
		if n := g.connections(); n != 1 {
			t.Errorf("%d connections after %d", n, code)
		}
	}
}

func TestComesBackAfterOtherCloses(t *testing.T) {
	for _, code := range []int{4000, 4001, 4002, 1000, 1001, 1009, 1011, 1013} {
		g := newGateway(t, func(n int, p *peer) {
			p.hello()
			if n == 1 {
				p.close(code)
				return
			}
			p.acceptAll()
		})
		c := start(t, Options{URLs: []string{g.url()}})
		stored(t, c.send(t, "m1"))
		if s := c.await(t, Reconnecting); s.Code != code || s.Reason != "why" {
			t.Errorf("close %d was told as %+v", code, s)
		}
	}
}

func TestExpiredToken(t *testing.T) {
	for _, way := range []string{"4502", "401"} {
		for _, lasting := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s lasting %t", way, lasting), func(t *testing.T) {
				g := newGateway(t, func(_ int, p *peer) {
					p.hello()
					if p.r.Header.Get("Authorization") == "Bearer t1" || lasting {
						p.close(4502)
						return
					}
					p.acceptAll()
				})
				if way == "401" {
					g.refuse = func(_ int, w http.ResponseWriter, r *http.Request) bool {
						if r.Header.Get("Authorization") != "Bearer t1" && !lasting {
							return false
						}
						w.WriteHeader(401)
						fmt.Fprint(w, `{"success":false,"code":"TOKEN_EXPIRED","message":"why"}`)
						return true
					}
				}
				var n atomic.Int64
				c := start(t, Options{URLs: []string{g.url()}, Token: func(_ context.Context, why TokenReason) (string, error) {
					if first := n.Load() == 0; first != (why == ToConnect) || !first && why != TokenRefused {
						t.Errorf("token %d is asked for %s", n.Load()+1, why)
					}
					return fmt.Sprintf("t%d", n.Add(1)), nil
				}})
				if !lasting {
					stored(t, c.send(t, "m1"))
					return
				}
				err := c.ended(t)
				if ce, ok := errors.AsType[*CloseError](err); !ok || ce.Code != 4502 || n.Load() != 1+tokenTries {
					t.Errorf("Run: %v after %d tokens", err, n.Load())
				}
			})
		}
	}
}

// One that was refused is not tried again.
func TestRefusedToken(t *testing.T) {
	g := newGateway(t, nil)
	g.refuse = func(_ int, w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(401)
		fmt.Fprint(w, `{"success":false,"code":"AUTH_FAILED","message":"why"}`)
		return true
	}
	err := start(t, Options{URLs: []string{g.url()}}).ended(t)
	if ce, ok := errors.AsType[*CloseError](err); !ok || ce.Code != 4503 || ce.Reason != "AUTH_FAILED why" {
		t.Errorf("Run: %v", err)
	}
	if n := g.connections(); n != 1 {
		t.Errorf("%d connections with one token", n)
	}
}

func TestTokenErrorIsTriedAgain(t *testing.T) {
	g := newGateway(t, func(_ int, p *peer) { p.hello(); p.acceptAll() })
	var n atomic.Int64
	c := start(t, Options{URLs: []string{g.url()}, Token: func(context.Context, TokenReason) (string, error) {
		if n.Add(1) < 3 {
			return "", errors.New("no token yet")
		}
		return "t", nil
	}})
	stored(t, c.send(t, "m1"))
}

func TestUnavailable(t *testing.T) {
	a := newGateway(t, nil)
	a.refuse = func(_ int, w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Retry-After", "100")
		w.WriteHeader(503)
		return true
	}
	b := newGateway(t, func(n int, p *peer) {
		p.hello()
		if n < 4 {
			p.close(4002)
			return
		}
		p.acceptAll()
	})
	c := start(t, Options{URLs: []string{a.url(), b.url()}})
	stored(t, c.send(t, "m1"))
	if a.connections() != 1 || b.connections() != 4 {
		t.Errorf("%d attempts at the one that is away for 100 s, %d at the other", a.connections(), b.connections())
	}
}

func TestUnavailableAlone(t *testing.T) {
	g := newGateway(t, func(_ int, p *peer) { p.hello(); p.acceptAll() })
	g.refuse = func(n int, w http.ResponseWriter, _ *http.Request) bool {
		if n == 1 {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(503)
		}
		return n == 1
	}
	c := start(t, Options{URLs: []string{g.url()}})
	stored(t, c.send(t, "m1"))
}

func TestRetryAfter(t *testing.T) {
	for v, want := range map[string]time.Duration{
		"": 0, "x": 0, "-1": 0, "7": 7 * time.Second, "999999999999": maxHint,
		"Mon, 02 Jan 2006 15:04:05 GMT": 0, "Mon, 02 Jan 2106 15:04:05 GMT": maxHint,
	} {
		if got := retryAfter(v); got != want {
			t.Errorf("%q: %s, want %s", v, got, want)
		}
	}
}

// A hint moves the client to the next address, once what is outstanding is answered.
func TestReconnectHint(t *testing.T) {
	next := newGateway(t, func(_ int, p *peer) { p.hello(); p.acceptAll() })
	sent := make(chan struct{})
	closed := make(chan bool, 1)
	old := newGateway(t, func(_ int, p *peer) {
		p.hello()
		p.next()
		p.send(`{"type":"reconnect","data":{"retry_after_ms":0,"reason":"drain"}}`)
		<-sent
		p.accept("m1")
		_, ok := p.next()
		closed <- !ok
	})
	c := start(t, Options{URLs: []string{old.url(), next.url()}})
	first := c.send(t, "m1")
	rest := c.send(t, ids(2, 4)...)
	close(sent)
	stored(t, slices.Concat(first, rest))
	equal(t, "old gateway", old.order(), ids(1, 1))
	equal(t, "next gateway", next.order(), ids(2, 4))
	if !<-closed {
		t.Error("the old gateway got more")
	}
}

func TestReconnectHintThenClose(t *testing.T) {
	next := newGateway(t, func(_ int, p *peer) { p.hello(); p.acceptAll() })
	old := newGateway(t, func(_ int, p *peer) {
		p.hello()
		p.next()
		p.send(`{"type":"reconnect","data":{"retry_after_ms":0}}`)
		p.close(4002)
	})
	c := start(t, Options{URLs: []string{old.url(), next.url()}})
	stored(t, c.send(t, ids(1, 2)...))
	if s := c.await(t, Reconnecting); s.After != 0 {
		t.Errorf("backs off for %s, the hint said 0", s.After)
	}
	equal(t, "next gateway", next.order(), ids(1, 2))
}

func TestSilence(t *testing.T) {
	g := newGateway(t, func(n int, p *peer) {
		if n > 1 {
			p.hello()
			p.acceptAll()
			return
		}
		p.helloEvery(40)
		for _, ok := p.next(); ok; _, ok = p.next() {
		}
	})
	c := start(t, Options{URLs: []string{g.url()}})
	if s := c.await(t, Reconnecting); !errors.Is(s.Err, errSilence) {
		t.Errorf("ended by %v", s.Err)
	}
	stored(t, c.send(t, "m1"))
}

func TestPingsAreLife(t *testing.T) {
	g := newGateway(t, func(_ int, p *peer) {
		p.helloEvery(400) // so that 1 s of silence is too long
		read := p.ws.CloseRead(p.ctx)
		for range 15 {
			_ = p.ws.Ping(p.ctx)
			time.Sleep(100 * time.Millisecond)
		}
		p.send(`{"type":"done","data":1}`)
		<-read.Done()
	})
	done := make(chan struct{})
	c := start(t, Options{URLs: []string{g.url()}, Handle: func(Message) { close(done) }})
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("never delivered")
	}
	c.stop()
	c.ended(t)
	if n := g.connections(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

func TestDeliveries(t *testing.T) { formats(t, deliveries) }

func deliveries(t *testing.T, format Format) {
	query := make(chan string, 10)
	acked := make(chan int, 10)
	g := newGateway(t, func(n int, p *peer) {
		query <- p.r.URL.RawQuery
		p.hello()
		for i, id := range []string{"a", "b", "a", "c", "b", "d"} {
			p.send(`{"type":"new-message","message_id":%q,"delivery_id":%d,"timestamp":1760000000000,"data":{"n":  "<%d>"}}`, id, i+1, n)
		}
		p.send(`{"type":"new-message","delivery_id":7,"data":null}`)
		for last := uint64(0); last < 7; {
			id, ok := p.nextAck()
			if !ok {
				return
			}
			if id <= last {
				t.Errorf("ack of %d after %d", id, last)
			}
			last = id
		}
		acked <- n
		if n == 1 {
			p.close(4000)
			return
		}
		p.next()
	})
	got := make(chan Message, 100)
	c := start(t, Options{URLs: []string{g.url()}, AckDeliveries: true, Format: format, DeviceID: "d 1", Device: "phone",
		Handle: func(m Message) { got <- m }})
	for range 2 {
		if q := <-query; q != "ack=1&device=phone&device_id=d+1" {
			t.Errorf("query %q", q)
		}
		select {
		case <-acked:
		case <-time.After(patience):
			t.Fatal("not acknowledged")
		}
	}
	c.stop()
	c.ended(t)
	close(got)
	var order []string
	for m := range got {
		order = append(order, m.ID)
		if m.ID != "" && (string(m.Data) != `{"n":  "<1>"}` || m.Time.UnixMilli() != 1760000000000) {
			t.Errorf("data %s of %s", m.Data, m.Time)
		}
	}
	equal(t, "handled", order, []string{"a", "b", "c", "d", "", ""}) // those without an id each time
}

// A flood is acknowledged in few frames, as each counts against the gateway's rate.
func TestFloodIsAcknowledgedTogether(t *testing.T) {
	const n = 2000
	frames := make(chan int, 1)
	g := newGateway(t, func(_ int, p *peer) {
		p.hello()
		go func() {
			for i := range n {
				p.send(`{"type":"new-message","message_id":"m%d","delivery_id":%d,"data":1}`, i+1, i+1)
			}
		}()
		for count := 1; ; count++ {
			if id, ok := p.nextAck(); !ok || id == n {
				frames <- count
				break
			}
		}
		p.next()
	})
	start(t, Options{URLs: []string{g.url()}, AckDeliveries: true})
	select {
	case count := <-frames:
		if count > n/4 {
			t.Errorf("%d frames for %d deliveries", count, n)
		}
	case <-time.After(patience):
		t.Fatal("not acknowledged")
	}
}

// The gateway gives up what is 256 behind: so many deliveries do not wait for the delay.
func TestManyAreAcknowledgedAtOnce(t *testing.T) {
	fastest := make(chan time.Duration, 1)
	g := newGateway(t, func(_ int, p *peer) {
		p.hello()
		least := patience
		for last := range 50 {
			start := time.Now()
			for i := last*ackBatch + 1; i <= (last+1)*ackBatch; i++ {
				p.send(`{"type":"new-message","message_id":"m%d","delivery_id":%d,"data":1}`, i, i)
			}
			for id := uint64(0); id < uint64(last+1)*ackBatch; {
				var ok bool
				if id, ok = p.nextAck(); !ok {
					return
				}
			}
			least = min(least, time.Since(start))
		}
		fastest <- least
		p.next()
	})
	start(t, Options{URLs: []string{g.url()}, AckDeliveries: true})
	select {
	case d := <-fastest:
		if d >= ackDelay {
			t.Errorf("the fastest of 50 batches was acknowledged after %s", d)
		}
	case <-time.After(patience):
		t.Fatal("not acknowledged")
	}
}

// What was handled is told before the client goes, when it ends and when it moves.
func TestHandledIsToldBeforeTheClose(t *testing.T) {
	for _, way := range []string{"end", "move"} {
		t.Run(way, func(t *testing.T) {
			last := make(chan uint64, 1)
			handled := make(chan struct{})
			g := newGateway(t, func(n int, p *peer) {
				p.hello()
				if n > 1 {
					p.next()
					return
				}
				for i := range 3 {
					p.send(`{"type":"new-message","message_id":"m%d","delivery_id":%d,"data":1}`, i+1, i+1)
				}
				if way == "move" {
					<-handled
					p.send(`{"type":"reconnect","data":{"retry_after_ms":0}}`)
				}
				var id uint64
				for next, ok := p.nextAck(); ok; next, ok = p.nextAck() {
					id = next
				}
				last <- id
			})
			c := start(t, Options{URLs: []string{g.url()}, AckDeliveries: true})
			c.await(t, Connected)
			c.mu.Lock()
			s := c.session
			c.mu.Unlock()
			for s.acked.Load() != 3 {
				time.Sleep(time.Millisecond / 10)
			}
			if close(handled); way == "end" {
				c.stop()
			}
			select {
			case id := <-last:
				if id != 3 {
					t.Errorf("acknowledged up to %d", id)
				}
			case <-time.After(patience):
				t.Fatal("not closed")
			}
		})
	}
}

// A gateway that reads nothing more does not hold the client: neither the ack nor the close is waited for.
func TestDeadGatewayDoesNotHoldTheClose(t *testing.T) {
	gone := make(chan struct{})
	g := newGateway(t, func(_ int, p *peer) {
		p.hello()
		p.send(`{"type":"new-message","message_id":"m1","delivery_id":1,"data":1}`)
		<-gone
	})
	handled := make(chan struct{})
	c := start(t, Options{URLs: []string{g.url()}, AckDeliveries: true, Handle: func(Message) { close(handled) }})
	<-handled
	begun := time.Now()
	c.stop()
	c.ended(t)
	close(gone)
	if d := time.Since(begun); d >= 5*time.Second { // for so long the library waits by itself
		t.Errorf("Run took %s to end", d)
	}
}

// A record is one whatever its type; the gateway's own frames have no message_id.
func TestRecordsOfReservedTypes(t *testing.T) { formats(t, recordsOfReservedTypes) }

func recordsOfReservedTypes(t *testing.T, format Format) {
	types := []string{typeMessageAck, typeReconnect, typeTokenRefreshed, typeError, typeConnected, typePong}
	g := newGateway(t, func(_ int, p *peer) {
		p.hello()
		p.next()
		for i, kind := range types {
			p.send(`{"type":%q,"message_id":"r%d","data":{"client_msg_id":"m1","status":"success","retry_after_ms":0}}`, kind, i)
		}
		p.accept("m1")
		p.next()
	})
	got := make(chan string, len(types))
	c := start(t, Options{URLs: []string{g.url()}, Format: format, Handle: func(m Message) { got <- m.Type },
		OnError: func(code, message string) { t.Errorf("told: %s %s", code, message) }})
	r, err := wait(t, c.send(t, "m1")[0])
	if err != nil || r.MessageID != "m-m1" {
		t.Errorf("receipt %+v, %v", r, err)
	}
	for _, want := range types {
		select {
		case kind := <-got:
			if kind != want {
				t.Errorf("got a %s, want a %s", kind, want)
			}
		case <-time.After(patience):
			t.Fatalf("no %s", want)
		}
	}
	if n := g.connections(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// A program may have put something else in place of the default transport, such as a tracer.
func TestWrappedDefaultTransport(t *testing.T) {
	before := http.DefaultTransport
	http.DefaultTransport = struct{ http.RoundTripper }{before}
	defer func() { http.DefaultTransport = before }()
	g := newGateway(t, func(_ int, p *peer) { p.hello(); p.acceptAll() })
	c := start(t, Options{URLs: []string{g.url()}})
	stored(t, c.send(t, "m1"))
	c.stop()
	c.ended(t)
}

// What was received is handled, though Run was told to end.
func TestReceivedIsHandled(t *testing.T) {
	g := newGateway(t, func(_ int, p *peer) {
		p.hello()
		for i := range 50 {
			p.send(`{"type":"new-message","message_id":"m%d","data":1}`, i+1)
		}
		p.next()
	})
	var c *running
	var got []string
	ready := make(chan struct{})
	c = start(t, Options{URLs: []string{g.url()}, Handle: func(m Message) {
		<-ready
		got = append(got, m.ID)
	}})
	for len(c.inbox) < 49 {
		time.Sleep(time.Millisecond)
	}
	c.stop()
	close(ready)
	c.ended(t)
	equal(t, "handled", got, ids(1, 50))
}

func TestRefresh(t *testing.T) {
	g := newGateway(t, func(_ int, p *peer) {
		p.hello()
		for n := 1; ; n++ {
			f, ok := p.next()
			switch {
			case !ok:
				return
			case f.Type != "refresh-token" || string(f.Data) != `{"token":"t"}`:
				p.close(1008)
			case n == 1:
				p.send(`{"type":"token-refreshed","data":{"expires_at":1760000000000}}`)
			case n == 2:
				p.send(`{"type":"error","data":{"code":"AUTH_FAILED","message":"no"}}`)
			default:
				p.close(4002)
			}
		}
	})
	errs := make(chan string, 10)
	c := start(t, Options{URLs: []string{g.url()}, OnError: func(code, message string) { errs <- code + " " + message }})
	c.await(t, Connected)
	at, err := c.Refresh(t.Context())
	if err != nil || at.UnixMilli() != 1760000000000 {
		t.Errorf("refreshed until %s, %v", at, err)
	}
	_, err = c.Refresh(t.Context())
	if re, ok := errors.AsType[*RefusedError](err); !ok || re.Code != "AUTH_FAILED" {
		t.Errorf("refused: %v", err)
	}
	if s := <-errs; s != "AUTH_FAILED no" {
		t.Errorf("error frame %q", s)
	}
	if _, err := c.Refresh(t.Context()); !errors.Is(err, ErrNotConnected) {
		t.Errorf("cut: %v", err)
	}
	c.stop()
	c.ended(t)
	if _, err := c.Refresh(t.Context()); !errors.Is(err, ErrNotConnected) {
		t.Errorf("closed: %v", err)
	}
}

func TestStopClosesProperly(t *testing.T) {
	code := make(chan int, 1)
	g := newGateway(t, func(_ int, p *peer) {
		p.hello()
		_, _, err := p.ws.Read(p.ctx)
		n, _ := closeCode(err)
		code <- n
	})
	c := start(t, Options{URLs: []string{g.url()}})
	if s := c.await(t, Connected); s.Gateway != "gw" || s.Session != "s1" || s.Degraded || s.URL != g.url() {
		t.Errorf("state %+v", s)
	}
	c.stop()
	if err := c.ended(t); !errors.Is(err, context.Canceled) {
		t.Errorf("Run: %v", err)
	}
	if n := <-code; n != 1000 {
		t.Errorf("the gateway saw close code %d", n)
	}
}

// While Handle keeps the client from reading, the gateway's silence proves nothing.
func TestSlowHandleIsNoSilence(t *testing.T) {
	const messages = inboxSize + 100
	g := newGateway(t, func(n int, p *peer) {
		p.helloEvery(200) // so that 0.5 s of silence is too long
		if n == 1 {
			for i := range messages {
				p.send(`{"type":"new-message","message_id":"m%d","data":1}`, i+1)
			}
		}
		p.next()
	})
	var got []string
	all := make(chan struct{})
	start(t, Options{URLs: []string{g.url()}, Handle: func(m Message) {
		if got = append(got, m.ID); len(got) == 1 {
			time.Sleep(time.Second)
		}
		if len(got) == messages {
			close(all)
		}
	}})
	select {
	case <-all:
	case <-time.After(patience):
		t.Fatal("messages are missing")
	}
	equal(t, "handled", got, ids(1, messages))
}
