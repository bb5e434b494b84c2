package transport

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"

	"im-gateway/codec"
)

// The cases of the well-known conformance suite for WebSocket endpoints, by its numbers and in our own
// words, against a server that echoes. Frames are written and read by the few functions below, not by
// the library that the server uses.

// First bytes of frames: FIN, and the opcodes of RFC 6455, section 5.2.
const (
	fin     = 0x80
	opCont  = 0x0
	opText  = 0x1
	opBin   = 0x2
	opClose = 0x8
	opPing  = 0x9
	opPong  = 0xa
)

// wire is a client's frame: masked, its length in as few bytes as possible.
func wire(first byte, payload string) string {
	return wireHead(first, len(payload)) + wireMasked(payload)
}

const wireMask = "\x37\xfa\x21\x3d"

// wireHead is the header of a frame whose payload of n bytes comes later.
func wireHead(first byte, n int) string {
	b := []byte{first}
	switch {
	case n < 126:
		b = append(b, 0x80|byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, 0x80|126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 0x80|127), uint64(n))
	}
	return string(b) + wireMask
}

// wireMasked is a payload, or the beginning of one.
func wireMasked(payload string) string {
	b := []byte(payload)
	for i := range b {
		b[i] ^= wireMask[i%4]
	}
	return string(b)
}

// wireClose is a close frame; code 0: without one.
func wireClose(code int, reason string) string {
	if code == 0 {
		return wire(fin|opClose, "")
	}
	return wire(fin|opClose, string(binary.BigEndian.AppendUint16(nil, uint16(code)))+reason)
}

// wireMessage is a message in frames of size bytes; size 0: in one.
func wireMessage(op byte, payload string, size int) string {
	if size == 0 || len(payload) <= size {
		return wire(fin|op, payload)
	}
	var b strings.Builder
	for ; len(payload) > size; op = opCont {
		b.WriteString(wire(op, payload[:size]))
		payload = payload[size:]
	}
	b.WriteString(wire(fin|opCont, payload))
	return b.String()
}

// served is a frame that came from the server.
type served struct {
	first   byte
	payload string
}

func (f served) String() string {
	if len(f.payload) > 40 {
		return fmt.Sprintf("%02x %q... of %d bytes", f.first, f.payload[:40], len(f.payload))
	}
	return fmt.Sprintf("%02x %q", f.first, f.payload)
}

// readServed reads a frame as strictly as a client may: not masked, its length minimal.
func readServed(r io.Reader) (served, error) {
	var head [8]byte
	if _, err := io.ReadFull(r, head[:2]); err != nil {
		return served{}, err
	}
	first, short := head[0], head[1]
	n, least := uint64(short), uint64(0)
	switch short {
	case 126:
		if _, err := io.ReadFull(r, head[:2]); err != nil {
			return served{}, err
		}
		n, least = uint64(binary.BigEndian.Uint16(head[:])), 126
	case 127:
		if _, err := io.ReadFull(r, head[:8]); err != nil {
			return served{}, err
		}
		n, least = binary.BigEndian.Uint64(head[:]), 1<<16
	}
	if short > 127 || n < least || n > 64<<20 {
		return served{}, fmt.Errorf("a frame with the length %d in %d", n, short)
	}
	payload := make([]byte, n)
	_, err := io.ReadFull(r, payload)
	return served{first, string(payload)}, err
}

// script is what a client sends and what must come back.
type script struct {
	input  string
	want   []served // RSV1: compressed, if that makes it smaller; the payload is what was compressed
	code   int      // of the server's close; 0: the connection is still good, the client closes it
	offer  string   // of extensions, a line
	agreed bool     // an extension is
}

// noStatus is the code of a close frame without one.
const noStatus = int(codec.CloseNoStatus)

// conformanceCase is a case under its number. make builds the script when it is played: some are large.
type conformanceCase struct {
	id, what string
	make     func() script
	chops    []chop
}

// chop is how input is cut for the socket's writes.
type chop struct {
	name string
	cut  func(input string) []string
}

var (
	wholeChop  = chop{"whole", func(s string) []string { return []string{s} }}
	octetsChop = chop{"octets", octets}
	blocksChop = chop{"64KiB", func(s string) []string { return pieces(s, 64<<10) }}
)

func pieces(s string, size int) []string {
	var parts []string
	for ; len(s) > size; s = s[size:] {
		parts = append(parts, s[:size])
	}
	return append(parts, s)
}

// octets cuts in single bytes; of a long input its two ends, where the headers are.
func octets(s string) []string {
	const end = 4 << 10
	if len(s) <= 3*end {
		return pieces(s, 1)
	}
	parts := pieces(s[:end], 1)
	parts = append(parts, pieces(s[end:len(s)-end], 64<<10)...)
	return append(parts, pieces(s[len(s)-end:], 1)...)
}

func TestConformance(t *testing.T) {
	s := startEcho(t, func(o *Options) {
		o.Settings.MaxMessageBytes, o.Settings.MaxFragments, o.Settings.EgressBudget = 17<<20, 1<<17, 64<<20
	})
	playAll(t, s, conformanceCases())
}

func playAll(t *testing.T, s *Server, cases []conformanceCase) {
	seen := map[string]bool{}
	for _, c := range cases {
		if seen[c.id] {
			t.Fatalf("two cases %s", c.id)
		}
		seen[c.id] = true
		t.Run(c.id, func(t *testing.T) {
			t.Parallel()
			sc := c.make()
			for _, chop := range append([]chop{wholeChop, octetsChop}, c.chops...) {
				parts := chop.cut(sc.input)
				if chop.name == blocksChop.name && len(parts) == 1 {
					continue
				}
				if err := play(t, s, &sc, parts); err != nil {
					t.Errorf("%s, %s: %v", c.what, chop.name, err)
				}
			}
		})
	}
}

// play sends the parts and reads the answers to the end of the connection.
func play(t *testing.T, s *Server, sc *script, parts []string) error {
	c := dial(t, s)
	c.send("GET / HTTP/1.1\r\n", upgradeLines, sc.offer, "\r\n")
	resp, _ := c.answer()
	if agreed := resp.Header.Get("Sec-WebSocket-Extensions"); resp.StatusCode != 101 || (agreed != "") != sc.agreed {
		return fmt.Errorf("%q upgrades by %s, %q", sc.offer, resp.Status, agreed)
	}
	defer c.Close()
	written := make(chan error, 1)
	go func() {
		for _, p := range parts {
			if _, err := io.WriteString(c.Conn, p); err != nil {
				written <- err
				return
			}
		}
		written <- nil
	}()
	err := readAnswers(c, sc, written)
	if err != nil {
		_ = c.Close() // or the writer waits
	}
	if sc.code != 0 {
		<-written // it may have been cut off
	}
	return err
}

func readAnswers(c *client, sc *script, written <-chan error) error {
	for i, want := range sc.want {
		got, err := readServed(c.r)
		if err == nil && want.first&rsv1 != 0 && got.first&rsv1 == 0 {
			want.first &^= rsv1 // too small to be compressed
		}
		if err == nil && got.first&rsv1 != 0 && want.first&rsv1 != 0 {
			got.payload = stretch(c.t, []byte(got.payload))
		}
		if err != nil || got != want {
			return fmt.Errorf("frame %d is %v (%v), want %v", i, got, err, want)
		}
	}
	code := sc.code
	if code == 0 {
		if err := <-written; err != nil {
			return err
		}
		code = 1000
		if _, err := io.WriteString(c.Conn, wireClose(code, "")); err != nil {
			return err
		}
	}
	f, err := readServed(c.r)
	if err != nil || f.first != fin|opClose {
		return fmt.Errorf("got %v (%v), want a close with %d", f, err, code)
	}
	switch n := len(f.payload); {
	case n == 0 && code == noStatus:
	case n < 2 || int(binary.BigEndian.Uint16([]byte(f.payload))) != code || utf8Dead(f.payload[2:]) >= 0:
		return fmt.Errorf("closed by %q, want %d", f.payload, code)
	}
	if tcp, ok := c.Conn.(*net.TCPConn); ok && sc.code != 0 {
		defer tcp.CloseWrite() //nolint:errcheck // the server ends first
	}
	if rest, err := io.ReadAll(c.r); err != nil || len(rest) > 0 {
		return fmt.Errorf("after the close came %q (%v)", rest, err)
	}
	return nil
}

// utf8Dead is the index of the byte by which s can be told to be no beginning of any UTF-8 text, by the
// grammar of RFC 3629, section 4; -1: it may be one.
func utf8Dead(s string) int {
	for i := 0; i < len(s); {
		lead := s[i]
		var tails int
		low, high := byte(0x80), byte(0xbf)
		switch {
		case lead <= 0x7f:
		case lead >= 0xc2 && lead <= 0xdf:
			tails = 1
		case lead >= 0xe0 && lead <= 0xef:
			tails = 2
			if lead == 0xe0 {
				low = 0xa0
			}
			if lead == 0xed {
				high = 0x9f
			}
		case lead >= 0xf0 && lead <= 0xf4:
			tails = 3
			if lead == 0xf0 {
				low = 0x90
			}
			if lead == 0xf4 {
				high = 0x8f
			}
		default:
			return i
		}
		i++
		for ; tails > 0; tails-- {
			if i == len(s) {
				return -1
			}
			if s[i] < low || s[i] > high {
				return i
			}
			low, high = 0x80, 0xbf
			i++
		}
	}
	return -1
}

// TestConformanceCodec: what the cases are written with, against examples of RFC 6455, section 5.7.
func TestConformanceCodec(t *testing.T) {
	if got := wire(fin|opText, "Hello"); got != "\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58" {
		t.Errorf("%x", got)
	}
	for frame, want := range map[string]served{
		"\x81\x05Hello": {fin | opText, "Hello"},
		"\x8a\x05Hello": {fin | opPong, "Hello"},
		"\x82\x7e\x01\x00" + strings.Repeat("b", 256):                   {fin | opBin, strings.Repeat("b", 256)},
		"\x82\x7f\x00\x00\x00\x00\x00\x01\x00\x00" + string(ascii64KiB): {fin | opBin, string(ascii64KiB)},
	} {
		if got, err := readServed(strings.NewReader(frame)); err != nil || got != want {
			t.Errorf("%v, %v, want %v", got, err, want)
		}
	}
	if strings.Join(octets(string(ascii64KiB)), "") != string(ascii64KiB) {
		t.Error("octets loses some")
	}
	if m := wireMessage(opText, "abcde", 2); m != wire(opText, "ab")+wire(opCont, "cd")+wire(fin|opCont, "e") {
		t.Errorf("%x", m)
	}
	if !slices.Equal(pieces("abcde", 2), []string{"ab", "cd", "e"}) {
		t.Error("pieces")
	}
}

var ascii64KiB = bytes.Repeat([]byte("0123456789abcdef"), 4<<10)
