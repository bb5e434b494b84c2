package transport

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strings"
	"testing"

	"github.com/gobwas/ws"
	"github.com/panjf2000/gnet/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"im-gateway/codec"
)

// pipe stands in for a gnet connection: what is fed lies in one buffer, as gnet keeps it.
type pipe struct {
	gnet.Conn
	in      []byte
	out     []byte
	keep    bool // keep what is written
	written int
	backlog int // what the kernel is said not to have taken
}

func (p *pipe) Peek(int) ([]byte, error) { return p.in, nil }
func (p *pipe) InboundBuffered() int     { return len(p.in) }
func (p *pipe) OutboundBuffered() int    { return p.backlog }
func (p *pipe) Fd() int                  { return -1 }

func (p *pipe) Discard(n int) (int, error) {
	if n <= 0 || n > len(p.in) {
		n = len(p.in)
	}
	p.in = p.in[n:]
	return n, nil
}

func (p *pipe) Write(b []byte) (int, error) {
	p.written++
	if p.keep {
		p.out = append(p.out, b...)
	}
	return len(b), nil
}

// dropSink forgets what it is offered.
type dropSink struct{ messages int }

func (d *dropSink) N() int { return 1 }

func (d *dropSink) Offer(_ int, b *codec.IngressBatch) bool {
	for i := range b.Events {
		if u := b.Events[i].Upstream; u != nil {
			d.messages++
			u.Release()
		}
	}
	b.Release()
	return true
}

func (d *dropSink) Return(*codec.EgressBatch) {}

// bareLoop is a loop without gnet; its batches go to the sink at once.
func bareLoop(t testing.TB, sink Sink, change func(*Options)) *loop {
	t.Helper()
	v, err := NewVerifier(VerifierOptions{Algorithm: "HS256", Secret: secret})
	if err != nil {
		t.Fatal(err)
	}
	o := Options{Addr: "127.0.0.1:0", Loops: 1, GatewayID: "g", Sink: sink, Settings: Settings{Verifier: v}, API: http.NotFoundHandler(),
		Logger: zerolog.Nop(), Registerer: prometheus.NewRegistry()}
	if change != nil {
		change(&o)
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	l := s.loops[0]
	l.now = 1_760_000_000_000
	return l
}

// opened is an open connection over a pipe.
func opened(l *loop, user string) (*conn, *pipe) {
	p := &pipe{}
	cn := &conn{c: p, l: l, state: stateOpen, head: -1, aside: noAside, lastRead: l.now}
	if !l.s.opts.Echo {
		l.startSession(cn, Identity{User: user, ExpiresAt: l.now + 1e6}, wish{})
	}
	return cn, p
}

// TestUpgradeAllocations bounds what an upgrade allocates and copies, the token's check apart: the head
// is read where it lies, and copied once, into the upgrader's pooled buffer.
func TestUpgradeAllocations(t *testing.T) {
	head := []byte("GET /ws HTTP/1.1\r\n" + upgradeLines + "Sec-WebSocket-Protocol: im.json.v1, bearer.abc\r\n\r\n")
	var h upgradeHead
	h.read(head)
	if string(h.token) != "abc" || !h.upgrade || &h.token[0] != &head[len(head)-7] {
		t.Fatal("the token was not read in place")
	}
	l := bareLoop(t, &dropSink{}, nil)
	who := Identity{User: "alice", ExpiresAt: l.now + 1e6}
	p := &pipe{}
	cn := &conn{c: p, l: l, head: -1, aside: noAside}
	upgrade := func() {
		cn.state, p.in = stateHead, head
		h.read(head)
		cn.finishUpgrade(head, len(head), wish{}, who, nil)
		if cn.state != stateOpen || len(p.in) > 0 || len(l.hs.in) > 0 {
			t.Fatal("the upgrade was not done")
		}
		l.endSession(cn, codec.CloseNormal, reasonPeer)
	}
	upgrade()
	answer := string(l.hs.out)
	const most = 6
	allocs := testing.AllocsPerRun(200, upgrade)
	var before, after runtime.MemStats
	const rounds = 1000
	runtime.ReadMemStats(&before)
	for range rounds {
		upgrade()
	}
	runtime.ReadMemStats(&after)
	bytes := (after.TotalAlloc - before.TotalAlloc) / rounds
	t.Logf("an upgrade of %d bytes, answered by %d: %.0f allocations, %d bytes", len(head), len(answer), allocs, bytes)
	if raceEnabled {
		return // pools forget at random
	}
	if allocs > most || bytes > uint64(len(head)) {
		t.Errorf("%.0f allocations, %d bytes; want %d and less than the head's %d", allocs, bytes, most, len(head))
	}
}

func TestReadPathAllocations(t *testing.T) {
	sink := &dropSink{}
	l := bareLoop(t, sink, nil)
	cn, p := opened(l, "alice")
	body := `{"type":"send-message","message_id":"c-1","data":{"conversation_id":"v1","content":"` + strings.Repeat("x", 100) +
		`"},"timestamp":1760000000000}`
	for _, tc := range []struct {
		name, input string
		cut         int     // the input comes in two reads
		most        float64 // allocations
	}{
		{"message", text(body), 0, 1}, // the record's ULID
		{"message in two reads", text(body), 50, 1},
		{"message in fragments", frame(false, ws.OpText, body[:50]) + frame(true, ws.OpPing, "p") + frame(true, ws.OpContinuation, body[50:]), 0, 1},
		{"ping", text(`{"type":"ping"}`), 0, 0},
		{"WebSocket ping", frame(true, ws.OpPing, "abc"), 0, 0},
		{"refused", text(`{"type":"m","message_id":"x"}`), 0, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			masked, own := []byte(tc.input), make([]byte, len(tc.input))
			allocs := testing.AllocsPerRun(500, func() {
				copy(own, masked) // it is unmasked in place
				p.in = own[:tc.cut]
				if tc.cut > 0 {
					l.traffic(cn)
				}
				p.in = own[tc.cut-len(p.in):]
				l.traffic(cn)
				if cn.state != stateOpen || len(p.in) > 0 || cn.asm != nil {
					t.Fatal("the frame was not handled")
				}
			})
			if allocs > tc.most && !raceEnabled { // under -race pools forget at random
				t.Errorf("%.1f allocations", allocs)
			}
		})
	}
	if sink.messages == 0 {
		t.Error("no message came through")
	}
}

func TestEgressPathAllocations(t *testing.T) {
	l := bareLoop(t, &dropSink{}, nil)
	const users, frames = 50, 200
	var pipes []*pipe
	var ids []codec.SessionID
	for i := range users {
		cn, p := opened(l, fmt.Sprint("u", i))
		pipes, ids = append(pipes, p), append(ids, cn.id)
	}
	b := &codec.EgressBatch{}
	for i := range frames {
		b.Commands = append(b.Commands, command(codec.CommandFrame, ids[i%users], `{"type":"new-message"}`))
	}
	task := &egressTask{l: l}
	allocs := testing.AllocsPerRun(200, func() {
		task.batch = b
		if err := task.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	if allocs > 0 {
		t.Errorf("%.1f allocations for a batch", allocs)
	}
	for i, c := range b.Commands {
		if c.Outcome != codec.OutcomeFlushed {
			t.Fatalf("command %d: outcome %d", i, c.Outcome)
		}
	}
	if pipes[0].written != 201 {
		t.Errorf("%d writes for %d batches: a batch is one write", pipes[0].written, 201)
	}
}

// TestPositionsOfBufferedFrames: what the kernel has not taken is buffered, up to the byte.
func TestPositionsOfBufferedFrames(t *testing.T) {
	l := bareLoop(t, &dropSink{}, nil)
	cn, p := opened(l, "alice")
	b := &codec.EgressBatch{Commands: []codec.Command{
		command(codec.CommandFrame, cn.id, "0123456789"), command(codec.CommandFrame, cn.id, "0123456789"),
		command(codec.CommandPing, cn.id, ""), command(codec.CommandFrame, cn.id, "0123456789")}}
	p.backlog = 15 // the last frame (12 bytes), the ping (2) and one byte of the second frame
	l.run(b)
	for i, want := range []codec.Outcome{codec.OutcomeFlushed, codec.OutcomeBuffered, codec.OutcomeNone, codec.OutcomeBuffered} {
		if i != 2 && b.Commands[i].Outcome != want {
			t.Errorf("frame %d: outcome %d, want %d", i, b.Commands[i].Outcome, want)
		}
	}
	if got := b.Commands[1].Position; got != 24 {
		t.Errorf("position %d, want 24", got)
	}
	if got := b.Commands[3].Position; got != 38 {
		t.Errorf("position %d, want 38", got)
	}
}

// FuzzFeed feeds any bytes whole, and split in two and byte by byte: what is written must be the same.
func FuzzFeed(f *testing.F) {
	f.Add([]byte(text("hello")+frame(true, ws.OpPing, "p")), uint16(3))
	f.Add([]byte(frame(false, ws.OpText, "\xc3")+frame(true, ws.OpContinuation, "\xa9")), uint16(8))
	f.Add([]byte("\x81\xff\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00a"), uint16(4))
	f.Add([]byte(frame(false, ws.OpBinary, "a")+frame(true, ws.OpPing, "")+frame(true, ws.OpContinuation, "b")), uint16(9))
	f.Add([]byte(frame(true, ws.OpClose, "\x03\xe8bye")+text("x")), uint16(2))
	l := bareLoop(f, &dropSink{}, func(o *Options) { o.Echo = true; o.Settings.MaxMessageBytes = 1 << 10 })
	f.Fuzz(func(t *testing.T, input []byte, cut uint16) {
		run := func(parts [][]byte) ([]byte, connState) {
			cn, p := opened(l, "")
			p.keep = true
			for _, part := range parts {
				p.in = append(bytes.Clone(p.in), part...)
				l.traffic(cn)
				if cn.state == stateOpen && len(p.in) > 14+maxControl {
					t.Fatalf("%d bytes are left in gnet's buffer", len(p.in))
				}
			}
			l.lingering = l.lingering[:0]
			return p.out, cn.state
		}
		n := min(int(cut), len(input))
		whole, state := run([][]byte{input})
		for name, parts := range map[string][][]byte{
			"split": {input[:n], input[n:]}, "byte by byte": bytes.SplitAfter(input, nil),
		} {
			if out, end := run(parts); end != state || !bytes.Equal(out, whole) {
				t.Errorf("%s: %x and state %d, whole: %x and state %d", name, out, end, whole, state)
			}
		}
		// What was written must be frames of ours.
		for r := bytes.NewReader(whole); r.Len() > 0; {
			h, err := ws.ReadHeader(r)
			if err != nil || h.Masked || !h.Fin || ws.CheckHeader(h, ws.StateClientSide) != nil {
				t.Fatalf("wrote %x: %v", whole, err)
			}
			if _, err := io.CopyN(io.Discard, r, h.Length); err != nil {
				t.Fatalf("wrote %x: %v", whole, err)
			}
		}
	})
}

func BenchmarkReadPath(b *testing.B) {
	l := bareLoop(b, &dropSink{}, nil)
	cn, p := opened(l, "alice")
	masked := []byte(text(`{"type":"send-message","message_id":"c-1","data":{"conversation_id":"v1","content":"` +
		strings.Repeat("x", 100) + `"},"timestamp":1760000000000}`))
	own := make([]byte, len(masked))
	b.ReportAllocs()
	for b.Loop() {
		copy(own, masked)
		p.in = own
		l.traffic(cn)
	}
}

func BenchmarkEgressPath(b *testing.B) {
	l := bareLoop(b, &dropSink{}, nil)
	batch := &codec.EgressBatch{}
	payload := []byte(strings.Repeat("x", 200))
	for i := range 200 {
		cn, _ := opened(l, fmt.Sprint("u", i))
		batch.Commands = append(batch.Commands, codec.Command{Kind: codec.CommandFrame, Session: cn.id, Payload: payload})
	}
	b.ReportAllocs()
	for b.Loop() {
		l.run(batch)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/200, "ns/frame")
}

func BenchmarkVerify(b *testing.B) {
	v, err := NewVerifier(VerifierOptions{Algorithm: "HS256", Secret: secret})
	if err != nil {
		b.Fatal(err)
	}
	good := []byte(token(b, "alice", 1e12))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := v.Verify(good); err != nil {
			b.Fatal(err)
		}
	}
}
