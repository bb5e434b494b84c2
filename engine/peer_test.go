package engine

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/rs/zerolog"
)

// peers runs Peers until the test ends.
func peers(t *testing.T, o PeersOptions) *Peers {
	t.Helper()
	o.Logger, o.Registerer = zerolog.Nop(), prometheus.NewRegistry()
	p, err := NewPeers(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		p.Run(ctx)
		close(done)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return p
}

// eventually waits until ok holds.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("never: %s", what)
		}
	}
}

func counted(c prometheus.Collector, want float64) func() bool {
	return func() bool { return testutil.ToFloat64(c) == want }
}

func TestPeersKick(t *testing.T) {
	kicked := make(chan PeerKick, 10)
	_, conn := grpcServer(t, &fakeSessions{kick: func(user, session string, replaced bool, reason string) (int, error) {
		if !replaced {
			t.Error("the session was not kicked as replaced")
		}
		kicked <- PeerKick{User: user, Session: session, Reason: reason}
		return 1, nil
	}}, func(o *GRPCOptions) { o.Token = "t" }, nil)
	addr := conn.Target()[len("passthrough:///"):]
	p := peers(t, PeersOptions{
		Token: "t", Conns: 1, Workers: 1,
		Lookup: func(_ context.Context, id string) (string, error) {
			switch id {
			case "g-2":
				return addr, nil
			case "g-3": // makes room for itself
				return "127.0.0.1:1", nil
			}
			return "", errors.New("no such gateway")
		},
	})
	for i, k := range []PeerKick{
		{GatewayID: "g-2", User: "a", Session: "s1", Reason: "r"},
		{GatewayID: "nobody", User: "a", Session: "s1"},
		{GatewayID: "g-3", User: "a", Session: "s2"},
		{GatewayID: "g-2", User: "b", Session: "s3"},
	} {
		if !p.Kick(k) {
			t.Fatalf("kick %d was dropped", i)
		}
	}
	if k := <-kicked; k != (PeerKick{User: "a", Session: "s1", Reason: "r"}) {
		t.Errorf("first kick %+v", k)
	}
	if k := <-kicked; k.Session != "s3" {
		t.Errorf("second kick %+v", k)
	}
	eventually(t, "every kick counted", func() bool {
		return counted(p.sent, 2)() && counted(p.unknown, 1)() && counted(p.failed, 1)()
	})
}

// TestPeersBlackHole kicks on a gateway that takes connections and says nothing.
func TestPeersBlackHole(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	p := peers(t, PeersOptions{
		Deadline: 30 * time.Millisecond,
		Lookup:   func(context.Context, string) (string, error) { return ln.Addr().String(), nil },
	})
	p.Kick(PeerKick{GatewayID: "x"})
	eventually(t, "the kick failed", counted(p.failed, 1))
}

func TestPeersQueueFull(t *testing.T) {
	entered := make(chan struct{}, 1)
	p := peers(t, PeersOptions{
		Workers: 1, Queue: 2, Deadline: time.Hour,
		Lookup: func(ctx context.Context, _ string) (string, error) {
			entered <- struct{}{}
			<-ctx.Done() // the end of Run
			return "", ctx.Err()
		},
	})
	p.Kick(PeerKick{})
	<-entered
	for i, want := range []bool{true, true, false, false} {
		if got := p.Kick(PeerKick{}); got != want {
			t.Errorf("kick %d: taken %t, want %t", i, got, want)
		}
	}
	if !counted(p.full, 2)() {
		t.Errorf("%v drops counted, want 2", testutil.ToFloat64(p.full))
	}
	t.Cleanup(func() {}) // Run ends with two kicks waiting and does not hang
}

func TestPeersCloseIdle(t *testing.T) {
	w := &peerWorker{p: &Peers{o: PeersOptions{Conns: 2}}, conns: map[string]*peerConn{}}
	for _, addr := range []string{"127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", "127.0.0.1:3"} {
		if _, err := w.conn(addr); err != nil {
			t.Fatal(err)
		}
	}
	if len(w.conns) > 2 || w.conns["127.0.0.1:3"] == nil || w.conns["127.0.0.1:1"] != nil {
		t.Errorf("kept %v, want at most 2 and not the oldest", w.conns)
	}
	w.closeUnused(time.Now().Add(time.Second))
	if len(w.conns) != 0 {
		t.Errorf("%d connections are left", len(w.conns))
	}
}
