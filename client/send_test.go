package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestReceiptAndBytes(t *testing.T) {
	data := `{"a":  "<b>&\u00e9é", "n": 1.0}`
	got := make(chan string, 1)
	g := newGateway(t, func(_ int, p *peer) {
		p.hello()
		_, b, err := p.ws.Read(p.ctx)
		if err != nil {
			return
		}
		got <- string(b)
		p.accept("c-1")
		p.next()
	})
	c, err := New(Options{URLs: []string{g.url()}, Token: token})
	if err != nil {
		t.Fatal(err)
	}
	sent, err := c.Send(Envelope{Type: "send-message", ID: "c-1", Data: json.RawMessage(data)}) // before Run
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	r, err := wait(t, sent)
	if want := (Receipt{MessageID: "m-c-1", Topic: "up", Partition: 3, Offset: 1}); err != nil || r != want {
		t.Errorf("receipt %+v, %v; want %+v", r, err, want)
	}
	if s := <-got; !strings.Contains(s, `"data":`+data) || !strings.Contains(s, `"message_id":"c-1"`) {
		t.Errorf("frame %s", s)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Run: %v", err)
	}
	if _, err := c.Send(Envelope{Type: "x"}); !errors.Is(err, ErrClosed) {
		t.Errorf("Send after Run: %v", err)
	}
	if err := c.Run(t.Context()); err == nil {
		t.Error("Run ran twice")
	}
}

func TestCutInMidFrame(t *testing.T) {
	g := newGateway(t, func(n int, p *peer) {
		p.hello()
		if n > 2 {
			p.acceptAll()
			return
		}
		p.next()
		p.raw.Write([]byte{0x81, 100, '{', '"'})
		p.raw.Close()
	})
	c := start(t, Options{URLs: []string{g.url()}})
	stored(t, c.send(t, ids(1, 5)...))
	equal(t, "accepted", g.order(), ids(1, 5))
}

func TestLateSuccessAfterOutcomeUnknown(t *testing.T) {
	g := newGateway(t, func(_ int, p *peer) {
		p.hello()
		p.next()
		p.answer("m1", "OUTCOME_UNKNOWN", 0)
		p.accept("m1")
		p.acceptAll()
	})
	c := start(t, Options{URLs: []string{g.url()}})
	stored(t, c.send(t, ids(1, 3)...))
	equal(t, "accepted", g.order(), ids(1, 3))
}

func TestOutcomeUnknownIsSentAgain(t *testing.T) {
	g := newGateway(t, func(_ int, p *peer) {
		p.hello()
		p.next()
		p.answer("m1", "OUTCOME_UNKNOWN", 0)
		p.acceptAll()
	})
	c := start(t, Options{URLs: []string{g.url()}})
	stored(t, c.send(t, ids(1, 3)...))
	equal(t, "accepted", g.order(), ids(1, 3))
}

// Whatever is refused or cut, the order of acceptance is that of Send.
func TestOrderUnderRefusals(t *testing.T) { formats(t, orderUnderRefusals) }

func orderUnderRefusals(t *testing.T, format Format) {
	const messages = 300
	codes := []string{"OVERLOADED", "BROKER_UNAVAILABLE", "RATE_LIMITED"}
	r := rand.New(rand.NewPCG(1, 2))
	refused, cuts := 0, 0
	var mu sync.Mutex // of the variables above: two connections may overlap
	g := newGateway(t, func(_ int, p *peer) {
		p.hello()
		for f, ok := p.next(); ok; f, ok = p.next() {
			mu.Lock()
			n, after := r.IntN(40), 1+r.IntN(3)
			refuse, cut := n < 15, n == 15 && cuts < 4
			if refuse {
				refused++
			}
			if cut {
				cuts++
			}
			mu.Unlock()
			switch {
			case refuse:
				p.answer(f.MessageID, codes[n%3], after)
			case cut:
				if after == 1 { // stored, but the answer is lost
					p.g.mu.Lock()
					p.g.accepted = append(p.g.accepted, f.MessageID)
					p.g.mu.Unlock()
				}
				p.raw.Close()
				return
			default:
				p.accept(f.MessageID)
			}
		}
	})
	c := start(t, Options{URLs: []string{g.url()}, Format: format})
	stored(t, c.send(t, ids(1, messages)...))
	c.stop()
	c.ended(t)
	var first []string
	seen := newRecent(messages)
	for _, id := range g.order() {
		if seen.add(id) {
			first = append(first, id)
		}
	}
	equal(t, "accepted", first, ids(1, messages))
	if refused < 50 || cuts == 0 {
		t.Errorf("%d refusals and %d cuts prove little", refused, cuts)
	}
}

// After a refusal a wide window drains, then goes on from the refused message, one at a time.
func TestWideWindowAfterRefusal(t *testing.T) {
	var seen []string // read after the acks that follow its writes
	g := newGateway(t, func(_ int, p *peer) {
		p.hello()
		next := func() {
			f, _ := p.next()
			seen = append(seen, f.MessageID)
		}
		for range 3 {
			next()
		}
		p.answer("m1", "OVERLOADED", 1)
		p.accept("m2")
		p.answer("m3", "OVERLOADED", 1)
		next()
		p.answer("m1", "OVERLOADED", 1)
		next()
		p.accept("m1")
		next()
		p.accept("m3")
		p.acceptAll()
	})
	c := start(t, Options{URLs: []string{g.url()}, Window: 3})
	stored(t, c.send(t, ids(1, 8)...))
	equal(t, "sent", seen, []string{"m1", "m2", "m3", "m1", "m1", "m3"})
	equal(t, "accepted", g.order(), []string{"m2", "m1", "m3", "m4", "m5", "m6", "m7", "m8"})
}

func TestWideWindowKeepsOrderAcrossCuts(t *testing.T) {
	g := newGateway(t, func(n int, p *peer) {
		p.hello()
		for i := 0; n < 4 && i < 10; i++ {
			f, _ := p.next()
			if i < 4 {
				p.accept(f.MessageID)
			}
		}
		if n < 4 {
			p.raw.Close()
			return
		}
		p.acceptAll()
	})
	c := start(t, Options{URLs: []string{g.url()}, Window: 16})
	stored(t, c.send(t, ids(1, 100)...))
	seen := newRecent(100)
	var first []string
	for _, id := range g.order() {
		if seen.add(id) {
			first = append(first, id)
		}
	}
	equal(t, "accepted", first, ids(1, 100))
}

func TestFinalRefusals(t *testing.T) {
	g := newGateway(t, func(_ int, p *peer) {
		p.hello()
		for f, ok := p.next(); ok; f, ok = p.next() {
			switch f.MessageID {
			case "m1":
				p.answer("m1", "INVALID_MESSAGE", 0)
			case "m2":
				p.answer("m2", "MESSAGE_TOO_LARGE", 0)
			default:
				p.accept(f.MessageID)
			}
		}
	})
	c := start(t, Options{URLs: []string{g.url()}})
	ps := c.send(t, ids(1, 3)...)
	big, err := c.Send(Envelope{Type: "send-message", Data: json.RawMessage(`"` + strings.Repeat("x", 1000) + `"`)})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"INVALID_MESSAGE", "MESSAGE_TOO_LARGE"} {
		_, err := wait(t, ps[i])
		if re, ok := errors.AsType[*RefusedError](err); !ok || re.Code != want || re.ID != ps[i].Envelope.ID {
			t.Errorf("message %d: %v, want %s", i, err, want)
		}
	}
	stored(t, ps[2:])
	_, err = wait(t, big) // more than max_message_bytes: never sent
	if re, ok := errors.AsType[*RefusedError](err); !ok || re.Code != "MESSAGE_TOO_LARGE" {
		t.Errorf("big message: %v", err)
	}
	equal(t, "accepted", g.order(), []string{"m3"})
}

func TestNeverAcks(t *testing.T) {
	g := newGateway(t, func(n int, p *peer) {
		p.hello()
		if n == 1 {
			for _, ok := p.next(); ok; _, ok = p.next() {
			}
			return
		}
		p.acceptAll()
	})
	c := start(t, Options{URLs: []string{g.url()}, AckTimeout: 200 * time.Millisecond})
	ps := c.send(t, ids(1, 3)...)
	short, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := ps[2].Wait(short); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait: %v", err)
	}
	if s := c.await(t, Reconnecting); !errors.Is(s.Err, errNoAnswer) {
		t.Errorf("ended by %v", s.Err)
	}
	stored(t, ps)
	equal(t, "accepted", g.order(), ids(1, 3))
}

func TestSendRefusesAtOnce(t *testing.T) {
	c, err := New(Options{URLs: []string{"ws://127.0.0.1:1"}, Token: token, Outbox: 2})
	if err != nil {
		t.Fatal(err)
	}
	for name, e := range map[string]Envelope{
		"no type":      {},
		"kept type":    {Type: "refresh-token"},
		"long id":      {Type: "x", ID: strings.Repeat("x", 129)},
		"control byte": {Type: "x", ID: "a\nb"},
		"not UTF-8":    {Type: "x", ID: "a\xff"},
		"not JSON":     {Type: "x", Data: json.RawMessage(`{`)},
		"other bytes":  {Type: "x", Data: json.RawMessage("\"caf\xe9\"")},
	} {
		if _, err := c.Send(e); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	p, err := c.Send(Envelope{Type: "x", ID: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Send(Envelope{Type: "x", ID: "a"}); !errors.Is(err, ErrDuplicateID) {
		t.Errorf("same id: %v", err)
	}
	made, err := c.Send(Envelope{Type: "x"})
	if err != nil || len(made.Envelope.ID) != 26 {
		t.Errorf("made up id %q, %v", made.Envelope.ID, err)
	}
	if _, err := c.Send(Envelope{Type: "x"}); !errors.Is(err, ErrOutboxFull) {
		t.Errorf("full: %v", err)
	}
	p.Cancel()
	p.Cancel()
	if _, err := wait(t, p); !errors.Is(err, ErrCancelled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := c.Send(Envelope{Type: "x", ID: "a"}); err != nil {
		t.Errorf("after Cancel: %v", err)
	}
}

func TestCancelFreesTheWay(t *testing.T) {
	refused := make(chan struct{}, 1)
	g := newGateway(t, func(_ int, p *peer) {
		p.hello()
		for f, ok := p.next(); ok; f, ok = p.next() {
			if f.MessageID == "m1" {
				p.answer("m1", "BROKER_UNAVAILABLE", 60_000)
				refused <- struct{}{}
				continue
			}
			p.accept(f.MessageID)
		}
	})
	c := start(t, Options{URLs: []string{g.url()}})
	ps := c.send(t, ids(1, 3)...)
	<-refused
	ps[0].Cancel()
	stored(t, ps[1:])
	equal(t, "accepted", g.order(), ids(2, 3))
}

func TestNewRefuses(t *testing.T) {
	for i, o := range []Options{
		{Token: token},
		{URLs: []string{"ws://a"}},
		{URLs: []string{"http://a"}, Token: token},
		{URLs: []string{"ws://"}, Token: token},
		{URLs: []string{"ws://a"}, Token: token, Window: -1},
	} {
		if _, err := New(o); err == nil {
			t.Errorf("options %d: accepted", i)
		}
	}
}

func TestRecent(t *testing.T) {
	r := newRecent(3)
	for i := range 3 {
		if !r.add(fmt.Sprint(i)) {
			t.Errorf("%d is not new", i)
		}
	}
	if r.add("0") || !r.add("3") || !r.add("0") || r.add("2") || !r.add("") || !r.add("") {
		t.Error("the last three are not what is remembered")
	}
	if len(r.set) != 3 {
		t.Errorf("%d remembered", len(r.set))
	}
}
