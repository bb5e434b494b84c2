package transport

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/gobwas/ws"
)

// fuzzPipe is a pipe with addresses, which a handshake may want to know.
type fuzzPipe struct{ pipe }

var fuzzAddr = &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1}

func (*fuzzPipe) RemoteAddr() net.Addr { return fuzzAddr }
func (*fuzzPipe) LocalAddr() net.Addr  { return fuzzAddr }

// fuzzToken lets alice in until the year 2286.
var fuzzToken = string(handmade(`{"alg":"HS256","typ":"JWT"}`, `{"user_id":"alice","exp":9999999999}`))

// times are what differs between two runs.
var times = regexp.MustCompile(`"timestamp":[0-9]+`)

type way struct {
	name  string
	parts [][]byte
}

// ways cuts an input whole, in two and in single bytes; a long one in single bytes at its ends only.
func ways(input []byte, cut uint16) [3]way {
	n := min(int(cut), len(input))
	single := bytes.SplitAfter(input, nil)
	if len(single) > 4096 {
		single = append(append(single[:2048:2048], input[2048:len(input)-2048]), single[len(single)-2048:]...)
	}
	return [...]way{{"whole", [][]byte{input}}, {"split", [][]byte{input[:n], input[n:]}}, {"byte by byte", single}}
}

// FuzzHandshakeHead: a connection's first bytes, and frames behind them, have the same outcome however
// they are cut: what is written, where the connection stands, and what net/http is given.
func FuzzHandshakeHead(f *testing.F) {
	good := "GET /ws?token=" + fuzzToken + " HTTP/1.1\r\n" + upgradeLines
	for _, s := range []string{
		good + "\r\n" + text(`{"type":"ping"}`),
		good + "Sec-WebSocket-Protocol: im.json.v1, bearer.x\r\nOrigin: https://good.example\r\n\r\n",
		good + "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n" + squeezed(true, ws.OpText, squeeze(`{"type":"ping"}`)),
		"GET /ws?auth=close&device_id=%41&ack=1 HTTP/1.1\r\n" + upgradeLines + "Authorization: Bearer x\r\n\r\nmore",
		"GET /sse?token=" + fuzzToken + " HTTP/1.1\r\n" + streamLines + "Origin: https://good.example\r\n\r\n" + text(`{"type":"ping"}`),
		"GET /sse?auth=close HTTP/1.0\r\n\r\nGET /sse HTTP/1.1\r\n",
		"GET /sse HTTP/2.0\r\n" + upgradeLines + "\r\n",
		"GET /other HTTP/1.1\r\nHost: h\r\n\r\n",
		"POST /ws HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}",
		strings.Replace(good, "13", "8", 1) + "\r\n",
		strings.ReplaceAll(good, "\r\n", "\n") + "\n",
		strings.Replace(good, "HTTP/1.1", "HTTP/1.0", 1) + "X : a\r\n b\r\n\r\n",
		"GET /ws HTTP/1.1\r\nX: " + strings.Repeat("x", 600) + "\r\n",
		"\x16\x03\x01\x02\x00\x01\r\n\r\n",
	} {
		f.Add([]byte(s), uint16(len(s)/2))
	}
	l := bareLoop(f, &dropSink{}, func(o *Options) {
		o.HeadBytes, o.Settings.MaxMessageBytes = 1<<10, 1<<10
		o.Settings.AllowedOrigins = []string{"https://good.example"}
		withDeflate(o)
	})
	f.Fuzz(func(t *testing.T, input []byte, cut uint16) {
		type outcome struct {
			written, handed string
			state           connState
		}
		run := func(parts [][]byte) outcome {
			p := &fuzzPipe{pipe{keep: true}}
			cn := &conn{c: p, l: l, state: stateHead, head: -1, aside: noAside, lastRead: l.now}
			for _, part := range parts {
				p.in = append(bytes.Clone(p.in), part...)
				l.traffic(cn)
				if cn.state == stateHead && len(p.in) >= l.s.opts.HeadBytes {
					t.Fatalf("%d bytes of a head are waited on", len(p.in))
				}
			}
			l.lingering = l.lingering[:0]
			o := outcome{written: times.ReplaceAllString(string(p.out), ""), state: cn.state}
			switch cn.state {
			case stateBridged:
				<-l.s.http.accepts
				in, _ := cn.bridge.take()
				o.handed = string(in)
				cn.bridge.hangUp()
			case stateOpen:
				l.fail(cn, 1001, "")
				l.lingering = l.lingering[:0]
			}
			return o
		}
		var first *outcome
		for _, w := range ways(input, cut) {
			got := run(w.parts)
			if first == nil {
				first = &got
			}
			if got != *first {
				t.Errorf("%s: %+v, whole: %+v", w.name, got, *first)
			}
		}
		if first.written == "" {
			return
		}
		resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(first.written)), nil)
		if err != nil {
			t.Fatalf("wrote %q: %v", first.written, err)
		}
		defer resp.Body.Close()
		if (resp.StatusCode == 101) != (resp.Header.Get("Sec-WebSocket-Accept") != "") || resp.StatusCode == 500 {
			t.Errorf("wrote %q", first.written)
		}
	})
}

// FuzzDeflateFrames is FuzzFeed with compression agreed.
func FuzzDeflateFrames(f *testing.F) {
	small := squeeze(strings.Repeat("hello ", 40))
	f.Add([]byte(squeezed(true, ws.OpText, small)+text("plain")), uint16(3))
	f.Add([]byte(squeezed(false, ws.OpText, small[:5])+frame(true, ws.OpPing, "p")+frame(true, ws.OpContinuation, small[5:])), uint16(8))
	f.Add([]byte(squeezed(true, ws.OpBinary, squeeze(strings.Repeat("\x00", 1<<20)))), uint16(4))
	f.Add([]byte(squeezed(true, ws.OpText, "\x00\x05\x00\xfa\xffHello\x00")), uint16(9))
	f.Add([]byte(squeezed(true, ws.OpText, "\xff\xff")), uint16(2))
	l := bareLoop(f, &dropSink{}, func(o *Options) {
		o.Echo, o.Settings.MaxMessageBytes = true, 1<<10
		o.Compression = Compression{Enabled: true, Threshold: 20, Level: 1}
	})
	f.Fuzz(func(t *testing.T, input []byte, cut uint16) {
		var first []byte
		var end connState
		for _, w := range ways(input, cut) {
			cn, p := opened(l, "")
			cn.deflate, p.keep = true, true
			for _, part := range w.parts {
				p.in = append(bytes.Clone(p.in), part...)
				l.traffic(cn)
			}
			l.lingering = l.lingering[:0]
			if first == nil {
				first, end = append([]byte{}, p.out...), cn.state
			}
			if !bytes.Equal(first, p.out) || end != cn.state {
				t.Errorf("%s: %x and state %d, whole: %x and state %d", w.name, p.out, cn.state, first, end)
			}
		}
		for r := bytes.NewReader(first); r.Len() > 0; {
			got, err := readServed(r)
			if err != nil {
				t.Fatalf("wrote %x: %v", first, err)
			}
			if got.first&rsv1 != 0 && len(stretch(t, []byte(got.payload))) > l.rules.MaxMessageBytes {
				t.Errorf("echoed more than a message may hold")
			}
		}
	})
}

// FuzzFramesDifferential: what a client sends has the same outcome here and with another server,
// github.com/coder/websocket: the messages and pongs that come back, in their order, and the close
// code. That server is more lenient on purpose in what follows, so the test makes up for it:
//   - it takes lengths that are not minimal, which RFC 6455, section 5.2, forbids: here 1002;
//   - it leaves UTF-8 to its user, in texts and in close reasons: here 1007;
//   - it counts a message's bytes as they come: here a header that announces too many is enough (1009);
//   - it drops connections whose frames are not masked, or whose length is negative, without a close
//     frame: here 1002;
//   - it wants a frame's header whole before it looks: here two bytes can be enough. Unfinished headers
//     are cut off; FuzzFeed has them.
func FuzzFramesDifferential(f *testing.F) {
	for _, c := range slices.Concat(framingCases()[:4], pingCases(), reservedBitCases(), opcodeCases(), fragmentCases(), utf8Cases()[:40], closeCases()) {
		if s := c.make(); len(s.input) < 2000 {
			f.Add([]byte(s.input))
		}
	}
	for _, s := range []string{
		"\x81\xfe\x00\x01" + wireMask + wireMasked("a"), "\x81\xff\x00\x00\x00\x00\x00\x00\x01\x00" + wireMask,
		"\x81\xff\x80\x00\x00\x00\x00\x00\x00\x00" + wireMask, "\x81\x01a",
		wire(opText, strings.Repeat("a", 1000)) + wireHead(fin|opCont, 25), wireHead(fin|opCont, 2000), wireHead(opText, 10) + wireMasked("a\xff"),
	} {
		f.Add([]byte(s))
	}
	l := bareLoop(f, &dropSink{}, func(o *Options) { o.Echo, o.Settings.MaxMessageBytes, o.Settings.MaxFragments = true, 1<<10, 1<<20 })
	f.Fuzz(func(t *testing.T, input []byte) {
		input, at, code := strictness(input, l.rules.MaxMessageBytes)
		cn, p := opened(l, "")
		p.keep, p.in = true, bytes.Clone(input)
		l.traffic(cn)
		l.lingering = l.lingering[:0]
		ours := answersOf(t, p.out)
		theirs := otherServer(t, input[:at])
		if theirs.code == 0 {
			theirs.code = code
		}
		if !slices.Equal(ours.frames, theirs.frames) || ours.code != theirs.code {
			t.Errorf("%x:\nhere  %v and %d\nthere %v and %d", input, ours.frames, ours.code, theirs.frames, theirs.code)
		}
	})
}

// strictness cuts an unfinished header off, and returns where the first frame begins that only we
// refuse, and by which code; the input's length and 0: there is none.
func strictness(input []byte, limit int) (_ []byte, at, code int) {
	message, open := 0, false
	for at < len(input) {
		b := input[at:]
		if len(b) < 2 {
			return input[:at], at, 0
		}
		size, length := 6, uint64(b[1]&0x7f)
		least := uint64(0)
		switch length {
		case 126:
			if size = 8; len(b) >= 4 {
				length, least = uint64(binary.BigEndian.Uint16(b[2:])), 126
			}
		case 127:
			if size = 14; len(b) >= 10 {
				length, least = binary.BigEndian.Uint64(b[2:]), 1<<16
			}
		}
		if b[1]&0x80 == 0 {
			size -= 4
		}
		data := b[0]&0x08 == 0
		switch {
		case len(b) < size:
			return input[:at], at, 0
		case b[1]&0x80 == 0 || length>>63 != 0:
			return input, len(input), 0 // both refuse it, or what is wrong besides
		case length < least:
			return input, at, 1002
		case data && uint64(message)+length > uint64(limit):
			if op := b[0] & 0x0f; b[0]&0x70 != 0 || op > opBin || (op == opCont) != open {
				return input, at, 1002 // that is looked at first
			}
			return input, at, 1009
		case length > uint64(len(b)-size):
			return input, len(input), 0
		}
		if data {
			message += int(length)
			if open = b[0]&fin == 0; !open {
				message = 0
			}
		}
		at += size + int(length)
	}
	return input, at, 0
}

// answers are what a server sent, up to its close and with its code; 0: it did not close.
type answers struct {
	frames []served
	code   int
}

func answersOf(t *testing.T, out []byte) (a answers) {
	for r := bytes.NewReader(out); r.Len() > 0; {
		f, err := readServed(r)
		switch {
		case err != nil:
			t.Fatalf("wrote %x: %v", out, err)
		case f.first == fin|opClose && len(f.payload) == 0:
			a.code = noStatus
			return a
		case f.first == fin|opClose:
			a.code = int(binary.BigEndian.Uint16([]byte(f.payload)))
			return a
		}
		a.frames = append(a.frames, f)
	}
	return a
}

// otherServer echoes by another library what the input asks for.
func otherServer(t *testing.T, input []byte) answers {
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	for key, value := range map[string]string{"Connection": "Upgrade", "Upgrade": "websocket",
		"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="} {
		r.Header.Set(key, value)
	}
	m := &memoryConn{in: input}
	c, err := websocket.Accept(hijacked{httptest.NewRecorder(), m}, r, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseNow()
	c.SetReadLimit(-1)
	err = echoAll(c)
	a := answersOf(t, m.out)
	var closed websocket.CloseError
	switch {
	case errors.As(err, &closed) && utf8Dead(closed.Reason) >= 0, errors.As(err, &closed) && utf8Cut(closed.Reason), errors.Is(err, errNotText):
		a.code = 1007
	case a.code == 0 && (strings.Contains(err.Error(), "unmasked") || strings.Contains(err.Error(), "negative")):
		a.code = 1002
	}
	return a
}

var errNotText = errors.New("a text that is no UTF-8")

func echoAll(c *websocket.Conn) error {
	ctx := context.Background()
	for {
		kind, r, err := c.Reader(ctx)
		if err != nil {
			return err
		}
		message := []byte{}
		for b := make([]byte, 1); ; {
			n, err := r.Read(b)
			message = append(message, b[:n]...)
			if kind == websocket.MessageText && n > 0 && utf8Dead(string(message)) >= 0 {
				return errNotText
			}
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return err
			}
		}
		if kind == websocket.MessageText && utf8Cut(string(message)) {
			return errNotText
		}
		if err := c.Write(ctx, kind, message); err != nil {
			return err
		}
	}
}

// utf8Cut tells of a text that ends within a character.
func utf8Cut(s string) bool { return utf8Dead(s) < 0 && utf8Dead(s+" ") >= 0 }

// memoryConn gives what lies in it, then the end, and keeps what is written.
type memoryConn struct {
	net.Conn
	in, out []byte
}

func (m *memoryConn) Read(b []byte) (int, error) {
	if len(m.in) == 0 {
		return 0, io.ErrUnexpectedEOF // io.EOF would be taken for a message's end
	}
	n := copy(b, m.in)
	m.in = m.in[n:]
	return n, nil
}

func (m *memoryConn) Write(b []byte) (int, error) {
	m.out = append(m.out, b...)
	return len(b), nil
}

func (*memoryConn) Close() error                     { return nil }
func (*memoryConn) SetDeadline(time.Time) error      { return nil }
func (*memoryConn) SetReadDeadline(time.Time) error  { return nil }
func (*memoryConn) SetWriteDeadline(time.Time) error { return nil }

// hijacked answers an upgrade and gives the connection away.
type hijacked struct {
	http.ResponseWriter
	m *memoryConn
}

func (h hijacked) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return h.m, bufio.NewReadWriter(bufio.NewReader(h.m), bufio.NewWriter(h.m)), nil
}

// FuzzVerifyMutated: a token in which anything is changed is refused.
func FuzzVerifyMutated(f *testing.F) {
	v, err := NewVerifier(VerifierOptions{Algorithm: "HS256", Secret: secret})
	if err != nil {
		f.Fatal(err)
	}
	if _, err := v.Verify([]byte(fuzzToken)); err != nil {
		f.Fatal(err)
	}
	last := uint16(len(fuzzToken) - 1)
	f.Add(uint16(0), byte(1), uint16(0), "")
	f.Add(last, fuzzToken[last]^(fuzzToken[last]+1), uint16(0), "")
	f.Add(uint16(9), byte(0), last, "=")
	f.Add(uint16(9), byte(0), uint16(20), "\n")
	f.Fuzz(func(t *testing.T, at uint16, flip byte, where uint16, insert string) {
		b := []byte(fuzzToken)
		b[int(at)%len(b)] ^= flip
		b = slices.Insert(b, int(where)%(len(b)+1), []byte(insert)...)
		who, err := v.Verify(b)
		if same := string(b) == fuzzToken; (err == nil) != same {
			t.Errorf("%q: %+v, %v", b, who, err)
		}
	})
}
