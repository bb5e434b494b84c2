package transport

import (
	"io"
	"strings"
	"testing"

	"github.com/gobwas/ws"

	"im-gateway/codec"
)

func startEcho(t testing.TB, change func(*Options)) *Server {
	s, _ := start(t, func(o *Options) {
		o.Echo, o.Sink, o.Settings.Verifier, o.API = true, nil, nil, nil
		if change != nil {
			change(o)
		}
	})
	return s
}

func echoClient(t testing.TB, s *Server) *client {
	t.Helper()
	c := dial(t, s)
	c.send("GET /anything HTTP/1.1\r\n", upgradeLines, "\r\n")
	if resp, _ := c.answer(); resp.StatusCode != 101 {
		t.Fatal(resp.Status)
	}
	return c
}

// TestFrames feeds sequences of frames whole and byte by byte; the answers must be the same.
func TestFrames(t *testing.T) {
	s := startEcho(t, func(o *Options) { o.Settings.MaxMessageBytes = 70_000 })
	big := strings.Repeat("é", 30_000)
	for _, tc := range []struct {
		name, input string
		want        []string      // messages and pongs that come back
		code        ws.StatusCode // of the close, 0: the client closes with 1000
	}{
		{"text", text("hello"), []string{"hello"}, 0},
		{"empty", text(""), []string{""}, 0},
		{"binary", frame(true, ws.OpBinary, "\xff\x00"), []string{"\xff\x00"}, 0},
		{"126 bytes", text(strings.Repeat("a", 126)), []string{strings.Repeat("a", 126)}, 0},
		{"65536 bytes", text(strings.Repeat("a", 65536)), []string{strings.Repeat("a", 65536)}, 0},
		{"large", text(big), []string{big}, 0},
		{"fragments", frame(false, ws.OpText, "ab") + frame(false, ws.OpContinuation, "") + frame(true, ws.OpContinuation, "cd"), []string{"abcd"}, 0},
		{"ping between fragments", frame(false, ws.OpText, "ab") + frame(true, ws.OpPing, "p") + frame(true, ws.OpContinuation, "cd"), []string{"p", "abcd"}, 0},
		{"rune across fragments", frame(false, ws.OpText, "\xc3") + frame(true, ws.OpContinuation, "\xa9"), []string{"é"}, 0},
		{"unasked pong", frame(true, ws.OpPong, "x") + text("y"), []string{"y"}, 0},
		{"two messages", text("1") + text("2"), []string{"1", "2"}, 0},
		{"invalid UTF-8", text("a\xff"), nil, 1007},
		{"invalid UTF-8 before the end", frame(false, ws.OpText, "a\xf4\x90"), nil, 1007},
		{"rune cut off", frame(false, ws.OpText, "\xc3") + frame(true, ws.OpContinuation, ""), nil, 1007},
		{"too big", text(strings.Repeat("a", 70_001)), nil, 1009},
		{"too big in fragments", frame(false, ws.OpText, strings.Repeat("a", 60_000)) + frame(true, ws.OpContinuation, strings.Repeat("a", 10_001)), nil, 1009},
		{"unmasked", "\x81\x01a", nil, 1002},
		{"reserved bit", "\xc1\x80\x00\x00\x00\x00", nil, 1002},
		{"reserved opcode", "\x83\x80\x00\x00\x00\x00", nil, 1002},
		{"reserved control opcode", "\x8b\x80\x00\x00\x00\x00", nil, 1002},
		{"fragmented ping", "\x09\x80\x00\x00\x00\x00", nil, 1002},
		{"long ping", "\x89\xfe\x00\x7e\x00\x00\x00\x00", nil, 1002},
		{"continuation of nothing", frame(true, ws.OpContinuation, "a"), nil, 1002},
		{"text within a message", frame(false, ws.OpText, "a") + text("b"), nil, 1002},
		{"length not minimal", "\x81\xfe\x00\x01\x00\x00\x00\x00a", nil, 1002},
		{"long length not minimal", "\x81\xff\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00a", nil, 1002},
		{"negative length", "\x81\xff\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", nil, 1002},
		{"close of one byte", frame(true, ws.OpClose, "\x03"), nil, 1002},
		{"close with a reserved code", frame(true, ws.OpClose, "\x03\xed"), nil, 1002},
		{"close reason no UTF-8", frame(true, ws.OpClose, "\x03\xe8\xff"), nil, 1007},
		{"close 3000", frame(true, ws.OpClose, "\x0b\xb8bye"), nil, 3000},
		{"nothing after close", frame(true, ws.OpClose, "\x03\xe8") + text("x"), nil, 1000},
	} {
		for _, split := range []bool{false, true} {
			if split && len(tc.input) > 1000 {
				continue
			}
			name := tc.name
			if split {
				name += " split"
			}
			t.Run(name, func(t *testing.T) {
				c := echoClient(t, s)
				if split {
					for i := range len(tc.input) {
						if _, err := io.WriteString(c.Conn, tc.input[i:i+1]); err != nil {
							break // refused before its end
						}
					}
				} else {
					c.send(tc.input)
				}
				for _, want := range tc.want {
					if f := c.read(); string(f.Payload) != want {
						t.Fatalf("got %d bytes %.40q, want %.40q", len(f.Payload), f.Payload, want)
					}
				}
				want := tc.code
				if want == 0 {
					want = 1000
					c.send(frame(true, ws.OpClose, "\x03\xe8"))
				}
				if code := c.closed(); code != want {
					t.Errorf("closed with %d, want %d", code, want)
				}
				if rest, err := io.ReadAll(c.r); err != nil || len(rest) > 0 {
					t.Errorf("after the close: %q, %v", rest, err)
				}
			})
		}
	}
}

// TestCloseCodeReachesAClientWithUnreadInput: what the client goes on sending must not turn the
// close into a reset.
func TestCloseCodeReachesAClientWithUnreadInput(t *testing.T) {
	s := startEcho(t, nil)
	for range 50 {
		c := echoClient(t, s)
		c.send("\x83\x80\x00\x00\x00\x00", strings.Repeat("x", 300_000))
		if code := c.closed(); code != 1002 {
			t.Fatalf("closed with %d", code)
		}
	}
}

// TestPanicIsContained: a panic costs the connection at fault, no other.
func TestPanicIsContained(t *testing.T) {
	s, sink := start(t, func(o *Options) { o.Loops = 1 })
	bad, good := connect(t, s, "bad"), connect(t, s, "good")
	id := sink.next(t, codec.EventOpen).Session
	s.loops[0].execute(func() {
		cn := s.loops[0].lookup(id)
		s.loops[0].guard(cn, func() { panic("injected") })
	})
	if code := bad.closed(); code != 1011 {
		t.Errorf("closed with %d", code)
	}
	good.send(text(`{"type":"ping"}`))
	if f := good.read(); !strings.Contains(string(f.Payload), "pong") {
		t.Errorf("got %q", f.Payload)
	}
}
