package transport

import (
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"im-gateway/codec"
)

// deafen makes the kernel drop all that comes for a connection, as if its host were gone.
func deafen(t *testing.T, c net.Conn) {
	t.Helper()
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		t.Fatalf("%T", c)
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	nothing := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}
	if cerr := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &nothing})
	}); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
}

// TestStreamOfDeadPeer: a peer that acknowledges nothing any more is given up, though it has closed nothing
// and nothing was expected of it; one that is only quiet lives on.
func TestStreamOfDeadPeer(t *testing.T) {
	s, sink := start(t, func(o *Options) { o.Loops, o.Settings.HeartbeatTimeout = 1, 500*time.Millisecond })
	quiet := stream(t, s, "quiet")
	quietID := sink.next(t, codec.EventOpen).Session
	dead := stream(t, s, "dead")
	deadID := sink.next(t, codec.EventOpen).Session
	deafen(t, dead.Conn)
	pings := time.NewTicker(50 * time.Millisecond)
	defer pings.Stop()
	late := time.After(patience)
	for sent := 0; ; sent++ {
		select {
		case <-pings.C:
			b := &codec.EgressBatch{Commands: []codec.Command{{Kind: codec.CommandPing, Session: quietID}, {Kind: codec.CommandPing, Session: deadID}}}
			s.Submit(b)
			sink.returned(t)
			if got := quiet.event(); got != ": ping\n" {
				t.Fatalf("got %q", got)
			}
		case e := <-sink.events:
			if e.Kind != codec.EventClose || e.Session != deadID || e.Code != codec.CloseAbnormal {
				t.Errorf("%+v", e)
			}
			return
		case <-late:
			t.Fatalf("it lives on after %d heartbeats", sent)
		}
	}
}
