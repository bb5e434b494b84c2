package transport

import (
	"bytes"
	"compress/flate"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"im-gateway/codec"
)

func withDeflate(o *Options) { o.Compression = Compression{Enabled: true, Threshold: 100, Level: 1} }

// offer connects a user with an offer of extensions and returns the answer to it.
func offer(t testing.TB, s *Server, user, extensions string) (*client, string) {
	t.Helper()
	c := dial(t, s)
	c.send("GET /ws HTTP/1.1\r\n", upgradeLines, extensions, "Authorization: Bearer ", token(t, user, time.Hour), "\r\n\r\n")
	resp, body := c.answer()
	if resp.StatusCode != 101 {
		t.Fatalf("%s %s", resp.Status, body)
	}
	return c, strings.Join(resp.Header["Sec-Websocket-Extensions"], ", ")
}

const offerDeflate = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"

// squeeze compresses as a client does, by the standard library.
func squeeze(payload string) string {
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, 9)
	if err != nil {
		panic(err)
	}
	_, _ = w.Write([]byte(payload))
	_ = w.Flush()
	return strings.TrimSuffix(b.String(), "\x00\x00\xff\xff")
}

func stretch(t testing.TB, payload []byte) string {
	t.Helper()
	b, err := io.ReadAll(flate.NewReader(io.MultiReader(bytes.NewReader(payload), strings.NewReader(messageTail))))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// squeezed is a frame with RSV1 set.
func squeezed(fin bool, op ws.OpCode, payload string) string {
	b := []byte(frame(fin, op, payload))
	b[0] |= rsv1
	return string(b)
}

func TestDeflateNegotiation(t *testing.T) {
	s, _ := start(t, withDeflate)
	const yes = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
	for _, c := range []struct{ offers, want string }{
		{"permessage-deflate", yes},
		{"permessage-deflate; client_max_window_bits", yes},
		{"permessage-deflate; client_max_window_bits=10; server_no_context_takeover", yes},
		{"permessage-deflate; server_max_window_bits=15", yes},
		{"x-webkit-deflate-frame, permessage-deflate", yes},
		{"permessage-deflate; server_max_window_bits=8", ""},
		{"permessage-deflate; server_max_window_bits=8, permessage-deflate", yes},
		{"permessage-deflate; server_max_window_bits", ""},
		{"permessage-deflate; server_max_window_bits=15; nonsense", ""},
		{"permessage-deflate; server_no_context_takeover=1", ""},
		{"permessage-deflate; client_max_window_bits=16", ""},
		{"permessage-deflate; client_max_window_bits=08", ""},
		{"permessage-deflate;;", ""},
		{"", ""},
	} {
		_, got := offer(t, s, "u", "Sec-WebSocket-Extensions: "+c.offers+"\r\n")
		if got != c.want {
			t.Errorf("%q was answered by %q", c.offers, got)
		}
	}
	off, _ := start(t, nil)
	if _, got := offer(t, off, "u", offerDeflate); got != "" {
		t.Errorf("without compression: %q", got)
	}
}

// TestDeflate: compressed messages in one frame and in many, both ways, small ones left as they are.
func TestDeflate(t *testing.T) {
	s, sink := start(t, withDeflate)
	c, _ := offer(t, s, "u", offerDeflate)
	open := sink.next(t, codec.EventOpen)
	message := `{"type":"send-message","message_id":"m1","data":"` + strings.Repeat("hello ", 2000) + `"}`
	small := squeeze(message)
	if len(small) > len(message)/10 {
		t.Fatal("the test's message does not compress")
	}
	third := len(small) / 3
	for _, frames := range []string{
		squeezed(true, ws.OpText, small),
		squeezed(false, ws.OpText, small[:third]) + frame(true, ws.OpPing, "") + frame(false, ws.OpContinuation, small[third:2*third]) + frame(true, ws.OpContinuation, small[2*third:]),
		text(message),
	} {
		for i := 0; i < len(frames); i += 1000 { // in pieces that end anywhere
			c.send(frames[i:min(len(frames), i+1000)])
		}
		if e := sink.next(t, codec.EventMessage); !bytes.Contains(e.Upstream.Value, []byte(strings.Repeat("hello ", 2000))) {
			t.Errorf("%d bytes came", len(e.Upstream.Value))
		}
	}
	if f := c.read(); f.Header.OpCode != ws.OpPong || f.Header.Rsv != 0 {
		t.Fatalf("%+v", f.Header)
	}
	for _, payload := range []string{message, `{"type":"x"}`} {
		s.Submit(&codec.EgressBatch{Loop: open.Session.Loop(), Shard: open.Session.Shard(), Commands: []codec.Command{
			{Kind: codec.CommandFrame, Session: open.Session, Payload: []byte(payload)},
		}})
		b := sink.returned(t)
		if b.Commands[0].Outcome == codec.OutcomeGone {
			t.Error("not delivered")
		}
		f := c.read()
		got := string(f.Payload)
		if f.Header.Rsv1() {
			got = stretch(t, f.Payload)
		}
		if got != payload || f.Header.Rsv1() != (len(payload) >= 100) {
			t.Errorf("%d bytes became %d, compressed: %t", len(payload), len(got), f.Header.Rsv1())
		}
	}
}

// TestDeflateRefuses what is not valid, each by its code.
func TestDeflateRefuses(t *testing.T) {
	s, _ := start(t, func(o *Options) { withDeflate(o); o.Settings.MaxMessageBytes = 10_000 })
	bomb := squeeze(`{"data":"` + strings.Repeat("x", 5_000_000) + `"}`)
	for name, c := range map[string]struct {
		frames string
		want   ws.StatusCode
	}{
		"bomb":                    {squeezed(true, ws.OpText, bomb), 1009},
		"bomb in pieces":          {squeezed(false, ws.OpText, bomb[:50]) + frame(true, ws.OpContinuation, bomb[50:]), 1009},
		"one byte too many":       {squeezed(true, ws.OpText, squeeze(strings.Repeat(" ", 10_001))), 1009},
		"no DEFLATE":              {squeezed(true, ws.OpText, "\xff\xff\xff\xff"), 1007},
		"cut off":                 {squeezed(true, ws.OpText, squeeze(strings.Repeat("abc", 300))[:6]), 1007},
		"text that is no UTF-8":   {squeezed(true, ws.OpText, squeeze("\xff")), 1007},
		"RSV1 on a continuation":  {squeezed(false, ws.OpText, bomb[:9]) + squeezed(true, ws.OpContinuation, bomb[9:]), 1002},
		"RSV1 on a control frame": {squeezed(true, ws.OpPing, ""), 1002},
		"RSV2":                    {"\xa1" + frame(true, ws.OpText, "x")[1:], 1002},
	} {
		cl, _ := offer(t, s, "u", offerDeflate)
		cl.send(c.frames)
		if code := cl.closed(); code != c.want {
			t.Errorf("%s: closed with %d, not %d", name, code, c.want)
		}
	}
	plain := connect(t, s, "u")
	plain.send(squeezed(true, ws.OpText, squeeze("{}")))
	if code := plain.closed(); code != 1002 {
		t.Errorf("RSV1 that was not agreed: %d", code)
	}
}

// TestDeflateOnce: a message for many is compressed once for each batch.
func TestDeflateOnce(t *testing.T) {
	d, err := newDeflater(1)
	if err != nil {
		t.Fatal(err)
	}
	payload := []byte(strings.Repeat("hello ", 500))
	noise := make([]byte, 500)
	for i := range noise {
		noise[i] = byte(rand.Uint32())
	}
	d.begin()
	first := d.deflate(payload)
	if stretch(t, first) != string(payload) {
		t.Error("it does not come back")
	}
	if len(d.deflate(noise)) != 0 {
		t.Error("noise was said to become smaller")
	}
	if again := d.deflate(payload); &again[0] != &first[0] && !bytes.Equal(again, first) || len(d.packed) != 2 {
		t.Error("compressed again")
	}
	if other := d.deflate(payload[:600]); stretch(t, other) != string(payload[:600]) {
		t.Error("another message at the same place")
	}
	if n := testing.AllocsPerRun(100, func() { d.begin(); d.deflate(payload) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
	small := []byte(squeeze(string(payload)))
	if n := testing.AllocsPerRun(100, func() {
		if _, err := d.inflate(small, 1<<16); err != nil {
			t.Fatal(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations to inflate", n)
	}
	d.begin()
	copy(payload, "HELLO")
	if stretch(t, d.deflate(payload)) != string(payload) {
		t.Error("the batch before was remembered")
	}
}

func BenchmarkDeflate(b *testing.B) {
	d, err := newDeflater(1)
	if err != nil {
		b.Fatal(err)
	}
	payload := []byte(`{"type":"new-message","message_id":"01J","data":{"content":"` + strings.Repeat("some words of a chat ", 50) + `"}}`)
	b.Run("deflate", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(payload)))
		for b.Loop() {
			d.begin()
			d.deflate(payload)
		}
	})
	small := []byte(squeeze(string(payload)))
	b.Run("inflate", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(payload)))
		for b.Loop() {
			if _, err := d.inflate(small, 1<<16); err != nil {
				b.Fatal(err)
			}
		}
	})
}
