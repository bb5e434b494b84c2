package traffic

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"testing"
	"time"
)

func untilSeen(t *testing.T, ctx context.Context, what string, seen func() Seen, ok func(s Seen) bool) Seen {
	t.Helper()
	var s Seen
	if err := poll(ctx, func() error {
		if s = seen(); ok(s) {
			return nil
		}
		return fmt.Errorf("no %s: %+v", what, s)
	}); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestNeverReads(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	stuck := make(chan struct{})
	g := newGateway(t, func(p *peer) {
		p.accept()
		p.must(p.conn.(*net.TCPConn).SetWriteBuffer(4096))
		// A client that reads would take this in no time.
		p.must(p.conn.SetWriteDeadline(time.Now().Add(time.Second)))
		written, err := p.conn.Write(make([]byte, 4<<20))
		if !errors.Is(err, os.ErrDeadlineExceeded) || written > 128<<10 {
			t.Errorf("wrote %d bytes: %v", written, err)
		}
		close(stuck)
		p.idle()
	})
	o, err := NeverReads(ctx, g.addr, "t")
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	<-stuck
	if s := o.Seen(); s.Accepted != 1 || s.Frames != 0 {
		t.Errorf("seen %+v", s)
	}
}

func TestReadRestTellsTheCloseCode(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	g := newGateway(t, func(p *peer) {
		p.accept()
		p.close(4000)
	})
	o, err := NeverReads(ctx, g.addr, "t")
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	o.ReadRest(time.Second)
	if s := o.Seen(); s.Frames != 2 || s.CloseCode != 4000 {
		t.Errorf("seen %+v", s)
	}
	log := &Log{}
	o.LogTo(log, "u")
	c := log.Snapshot().Clients[0]
	if _, online := c.Online(); online || c.User != "u" || c.Disconnects[0].Code != 4000 {
		t.Errorf("log %+v", c)
	}
}

func TestDripReaderTakesItsTime(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	g := newGateway(t, func(p *peer) {
		p.accept()
		p.idle()
	})
	o, err := DripReader(ctx, g.addr, "t")
	if err != nil {
		t.Fatal(err)
	}
	sleep(ctx, 1500*time.Millisecond)
	o.Close()
	if s := o.Seen(); s.Accepted != 1 || s.Frames != 0 {
		t.Errorf("seen %+v", s)
	}
}

func TestVanisherSeesItsEnd(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	g := newGateway(t, func(p *peer) {
		p.accept()
		p.push("m", 1, 1)
	})
	o, err := Vanisher(ctx, g.addr, "t")
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	untilSeen(t, ctx, "end", o.Seen, func(s Seen) bool { return s.Frames == 2 && s.CloseCode == -1 })
}

func TestRefusedOddClients(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	g := newGateway(t, func(p *peer) { p.refuse(http.StatusServiceUnavailable, "OVERLOADED") })
	for name, dial := range map[string]func() (*Odd, error){
		"never reads": func() (*Odd, error) { return NeverReads(ctx, g.addr, "t") },
		"drip":        func() (*Odd, error) { return DripReader(ctx, g.addr, "t") },
		"vanisher":    func() (*Odd, error) { return Vanisher(ctx, g.addr, "t") },
		"flooder": func() (*Odd, error) {
			return Flooder(ctx, FloodOptions{User: "u", Addr: g.addr, PerSecond: 1}, &Log{})
		},
	} {
		o, err := dial()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if s := o.Seen(); s.Accepted != 0 || s.Refused["503"] != 1 {
			t.Errorf("%s: seen %+v", name, s)
		}
		o.Close()
	}
}

func TestStorm(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	refuse := func(p *peer) { p.refuse(http.StatusServiceUnavailable, "OVERLOADED") }
	g := newGateway(t, refuse, refuse, func(p *peer) {
		p.accept()
		p.idle()
	})
	const n = 50
	c := Storm(ctx, n, g.addr, func(i int) (string, error) {
		if i == 7 {
			return "", errors.New("no token")
		}
		return fmt.Sprint(i), nil
	})
	defer c.Close()
	s := untilSeen(t, ctx, "frames", c.Seen, func(s Seen) bool { return s.Frames == n-3 })
	if s.Accepted != n-3 || s.Refused["503"] != 2 || s.Refused["token"] != 1 {
		t.Errorf("seen %+v", s)
	}
	c.Again(ctx)
	s = untilSeen(t, ctx, "frames", c.Seen, func(s Seen) bool { return s.Frames == 2*n-4 })
	if s.Accepted != 2*n-4 {
		t.Errorf("seen %+v", s)
	}
}

func TestFlooder(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	g := newGateway(t, func(p *peer) {
		p.accept()
		for n := 0; n < 100; n++ {
			m := p.receive()
			if n%2 == 0 {
				p.success(m.MessageID, n)
			} else {
				p.failed(m.MessageID, "RATE_LIMITED", 0)
			}
		}
		p.close(1008)
	})
	log := &Log{}
	o, err := Flooder(ctx, FloodOptions{User: "u", Addr: g.addr, Token: "t", PerSecond: 2000, Bytes: 100}, log)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	s := untilSeen(t, ctx, "close", o.Seen, func(s Seen) bool { return s.CloseCode != 0 })
	if s.CloseCode != 1008 || s.Refused["RATE_LIMITED"] != 50 || s.Frames != 101 {
		t.Errorf("seen %+v", s)
	}
	c := log.Snapshot().Clients[0]
	if len(c.Sent) < 100 || len(c.Acks) != 100 || c.Ordered || len(c.Disconnects) != 1 || c.Connects[0].Session != "s1" {
		t.Errorf("log of %d sent, %d acks, %+v", len(c.Sent), len(c.Acks), c.Disconnects)
	}
}
