package transport

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"im-gateway/codec"
)

// TestListensOnEveryAddress: without a host both IP versions are served.
func TestListensOnEveryAddress(t *testing.T) {
	s, _ := start(t, func(o *Options) { o.Addr = ":0" })
	_, port, err := net.SplitHostPort(s.Addr().String())
	if err != nil || port == "0" {
		t.Fatalf("address %s: %v", s.Addr(), err)
	}
	for _, host := range []string{"127.0.0.1", "::1"} {
		conn, err := net.Dial("tcp", net.JoinHostPort(host, port))
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.Close()
	}
}

func TestPortTaken(t *testing.T) {
	first, _ := start(t, nil)
	s, err := New(Options{Addr: first.Addr().String(), Echo: true, Logger: zerolog.Nop(), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(t.Context()); !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), first.Addr().String()) {
		t.Errorf("Start: %v", err)
	}
}

func TestStartGivenUp(t *testing.T) {
	s, err := New(Options{Addr: "127.0.0.1:0", Echo: true, Logger: zerolog.Nop(), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Start(ctx); err == nil { // it may have been faster
		if err := s.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
	}
} // what it had begun would be seen as a leak

func TestOptions(t *testing.T) {
	v, err := NewVerifier(VerifierOptions{Algorithm: "HS256", Secret: secret})
	if err != nil {
		t.Fatal(err)
	}
	whole := func() Options {
		return Options{Addr: ":0", Sink: &dropSink{}, Settings: Settings{Verifier: v}, API: http.NotFoundHandler(), Registerer: prometheus.NewRegistry()}
	}
	for name, change := range map[string]func(*Options){
		"no address":    func(o *Options) { o.Addr = "" },
		"too many":      func(o *Options) { o.Loops = codec.MaxLoops + 1 },
		"no registerer": func(o *Options) { o.Registerer = nil },
		"no sink":       func(o *Options) { o.Sink = nil },
		"no verifier":   func(o *Options) { o.Settings.Verifier = nil },
		"no API":        func(o *Options) { o.API = nil },
	} {
		o := whole()
		change(&o)
		if _, err := New(o); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	o := whole()
	o.Settings.MaxConnections = 1 << 30
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if s.rules.Load().MaxConnections >= int(limit.Cur)-255 {
		t.Errorf("%d connections with %d files", s.rules.Load().MaxConnections, limit.Cur)
	}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Errorf("Shutdown of what never started: %v", err)
	}
}

// TestUnaskedEnd: when the engine ends by itself, Done says so and nothing hangs.
func TestUnaskedEnd(t *testing.T) {
	s, sink := start(t, nil)
	c := connect(t, s, "alice")
	id := sink.next(t, codec.EventOpen).Session
	s.endEngine()
	<-s.Done()
	if err := s.Err(); !errors.Is(err, ErrEngineEnded) {
		t.Errorf("Err: %v", err)
	}
	if e := sink.next(t, codec.EventClose); e.Session != id {
		t.Errorf("closed %v", e.Session)
	}
	submit(s, id, command(codec.CommandFrame, id, "x"))
	if b := sink.returned(t); b.Commands[0].Outcome != codec.OutcomeGone {
		t.Errorf("outcome %d", b.Commands[0].Outcome)
	}
	s.Resume(0, 0)
	if _, err := io.ReadAll(c.r); err != nil && !errors.Is(err, unix.ECONNRESET) {
		t.Error(err)
	}
}

// TestShutdownWaitsForCloseCodes: what the shards closed just before reaches its clients.
// TestShutdownAmidConnects: clients that go on connecting do not hold a shutdown up.
func TestShutdownAmidConnects(t *testing.T) {
	s, _ := start(t, func(o *Options) { o.Loops = 1 })
	s.StopAccepting()
	turnAway := func() bool { // the connection stays open, for as long as it may
		c, err := net.Dial("tcp", s.Addr().String())
		if err == nil {
			t.Cleanup(func() { _ = c.Close() })
		}
		return err == nil
	}
	turnAway()
	eventually(t, func() bool { return s.lingering.Load() > 0 })
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	ended, again := make(chan struct{}), time.NewTicker(50*time.Millisecond)
	defer again.Stop()
	go func() {
		defer close(ended)
		for turnAway() {
			select {
			case <-again.C:
			case <-ctx.Done(): // whoever has the port by now
				return
			}
		}
	}()
	if err := s.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	cancel()
	<-ended
}

func TestShutdownWaitsForCloseCodes(t *testing.T) {
	s, sink := start(t, nil)
	var clients []*client
	for i := range 20 {
		c := connect(t, s, "u"+strconv.Itoa(i))
		id := sink.next(t, codec.EventOpen).Session
		c.send(text(`{"type":"ping"}`)[:5]) // unread input would turn the close into a reset
		submit(s, id, codec.Command{Kind: codec.CommandClose, Session: id, Code: codec.CloseDraining, Reason: "draining"})
		sink.returned(t)
		clients = append(clients, c)
	}
	stopped := make(chan error, 1)
	go func() { stopped <- s.Shutdown(t.Context()) }()
	for _, c := range clients {
		if code := c.closed(); code != ws.StatusCode(codec.CloseDraining) {
			t.Errorf("closed with %d", code)
		}
		_ = c.Close()
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// TestNothingIsClaimedForALostConnection: what was buffered when the peer broke off was not delivered.
func TestNothingIsClaimedForALostConnection(t *testing.T) {
	s, sink := start(t, func(o *Options) { o.Settings.EgressBudget = 64 << 20 })
	c := connect(t, s, "slow")
	id := sink.next(t, codec.EventOpen).Session
	payload := strings.Repeat("x", 60_000)
	var position uint64
	for range 400 {
		submit(s, id, command(codec.CommandFrame, id, payload))
		if b := sink.returned(t); b.Commands[0].Outcome == codec.OutcomeBuffered {
			position = b.Commands[0].Position
		}
	}
	if position == 0 {
		t.Fatal("24 MB were flushed to a client that does not read")
	}
	tcp, ok := c.Conn.(*net.TCPConn)
	if !ok {
		t.Fatal("no TCP connection")
	}
	_ = tcp.SetLinger(0) // a reset
	_ = tcp.Close()
	late := time.After(patience)
	for {
		select {
		case e := <-sink.events:
			switch {
			case e.Kind == codec.EventFlushed && uint64(e.Value) >= position:
				t.Fatalf("%d of %d bytes are said to be flushed", e.Value, position)
			case e.Kind == codec.EventClose:
				if e.Code != codec.CloseAbnormal {
					t.Errorf("closed with %d", e.Code)
				}
				return
			}
		case <-late:
			t.Fatal("the session did not end")
		}
	}
}

// TestHalfOpenPeer: a peer that has shut its side down has left.
func TestHalfOpenPeer(t *testing.T) {
	s, sink := start(t, nil)
	c := connect(t, s, "alice")
	id := sink.next(t, codec.EventOpen).Session
	tcp, ok := c.Conn.(*net.TCPConn)
	if !ok {
		t.Fatal("no TCP connection")
	}
	if err := tcp.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if e := sink.next(t, codec.EventClose); e.Session != id {
		t.Errorf("closed %v", e.Session)
	}
	eventually(t, func() bool { return s.Connections() == 0 })
}

// TestChurn: however connections end, each session opens once and closes once, last.
func TestChurn(t *testing.T) {
	s, sink := start(t, nil)
	const workers, rounds = 8, 60
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range rounds {
				c := connect(t, s, "u"+strconv.Itoa(w*rounds+i))
				c.send(text(`{"type":"m","message_id":"1","data":{}}`))
				switch rand.IntN(5) {
				case 0:
					c.send(frame(true, ws.OpClose, "\x03\xe8"))
				case 1:
					c.send("\x83\x80\x00\x00\x00\x00") // a protocol error
				case 2:
					if tcp, ok := c.Conn.(*net.TCPConn); ok {
						_ = tcp.SetLinger(0)
					}
				case 3:
					c.send(text(`{"type":"ping"}`)[:7])
				}
				_ = c.Close()
			}
		})
	}
	wg.Wait()
	states := map[codec.SessionID]codec.EventKind{}
	for closes := 0; closes < workers*rounds; {
		e := <-sink.events
		switch was := states[e.Session]; {
		case e.Kind == codec.EventOpen && was != 0, e.Kind != codec.EventOpen && was == 0, was == codec.EventClose:
			t.Fatalf("event %d after %d for one session", e.Kind, was)
		case e.Kind == codec.EventClose:
			closes++
		}
		states[e.Session] = e.Kind
	}
	eventually(t, func() bool { return s.Connections() == 0 })
	if len(sink.events) > 0 {
		t.Errorf("%d events after all were closed", len(sink.events))
	}
}

// TestShedding: beyond the bound clients are told so, though they have sent something already.
func TestShedding(t *testing.T) {
	s, _ := start(t, func(o *Options) { o.Settings.MaxConnections = 1 })
	connect(t, s, "a")
	for range 30 {
		c := dial(t, s)
		c.send("GET /ws HTTP/1.1\r\n", upgradeLines, "\r\n")
		if resp, body := c.answer(); resp.StatusCode != 503 || !strings.Contains(body, "OVERLOADED") {
			t.Fatalf("%s %s", resp.Status, body)
		}
		_ = c.Close()
	}
	eventually(t, func() bool { return s.Connections() == 1 })
	// A crowd that does not leave is not waited for.
	var crowd []net.Conn
	for range 3 * courtesy {
		c, err := net.Dial("tcp", s.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		crowd = append(crowd, c)
	}
	eventually(t, func() bool { return s.Connections() <= 1+courtesy })
	for _, c := range crowd {
		_ = c.Close()
	}
}
