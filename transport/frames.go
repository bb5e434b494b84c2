package transport

import (
	"encoding/binary"
	"sync"
	"unicode/utf8"

	"github.com/gobwas/ws"

	"im-gateway/codec"
)

// maxControl is the largest payload of a control frame (RFC 6455, section 5.5).
const maxControl = 125

// assembly is a message that does not lie whole and unfragmented in the read buffer. What has come
// is unmasked and kept here, so gnet never buffers more than an unfinished header or control frame.
type assembly struct {
	buf        []byte
	op         ws.OpCode
	checked    int // bytes of buf known to be UTF-8
	remaining  int // of the frame being read
	pos        int // in that frame, for the mask
	mask       [4]byte
	fin        bool   // the frame being read is the message's last
	rest       []byte // input that came by way of net/http and is not consumed yet
	message    bool   // a message has begun
	compressed bool   // it is compressed
	frames     int    // of the message, so far
	began      int64  // when the message did, Unix ms
}

// partial is a connection in the middle of a message, or one that was.
type partial struct {
	cn *conn
	at int64 // when the message began, Unix ms
}

// tickPartials closes the connections that have been in the middle of a message for too long: what has
// come of it is held all the while.
func (l *loop) tickPartials() {
	if len(l.partials) == 0 {
		return
	}
	most := l.rules.HeartbeatTimeout
	if l.s.pressed.Load() {
		most = min(most, l.s.opts.HandshakeTimeout)
	}
	list := l.partials
	l.partials = nil
	kept := list[:0]
	for _, p := range list {
		a := p.cn.asm
		switch {
		case p.cn.state != stateOpen || a == nil || !a.message || a.began != p.at:
		case l.now-p.at > most.Milliseconds():
			l.fail(p.cn, codec.ClosePolicy, reasonUnfinished)
		default:
			kept = append(kept, p)
		}
	}
	clear(list[len(kept):])
	l.partials = append(kept, l.partials...)
	if len(l.partials) == 0 {
		l.partials = nil
	}
}

// maxPooledMessage keeps huge buffers out of the pool.
const maxPooledMessage = 64 << 10

var assemblies = sync.Pool{New: func() any { return new(assembly) }}

func (cn *conn) assemble() *assembly {
	if cn.asm == nil {
		cn.asm, _ = assemblies.Get().(*assembly)
	}
	return cn.asm
}

// freeAssembly gives the buffer back once nothing is in it.
func (cn *conn) freeAssembly() {
	a := cn.asm
	if a == nil || a.message || len(a.rest) > 0 {
		return
	}
	cn.asm = nil
	buf := a.buf
	if cap(buf) > maxPooledMessage {
		buf = nil
	}
	*a = assembly{buf: buf[:0]}
	assemblies.Put(a)
}

// frameHeader is one frame's header.
type frameHeader struct {
	fin        bool
	op         ws.OpCode
	compressed bool
	mask       [4]byte
	length     int
	size       int // of the header itself
}

// readFrames handles what gnet has read.
func (cn *conn) readFrames() {
	b, err := cn.peek()
	if err != nil && len(b) == 0 {
		return
	}
	if cn.asm != nil && len(cn.asm.rest) > 0 {
		cn.readAfterRest(b)
		return
	}
	n := cn.feed(b)
	cn.l.counts.bytesIn += n
	if cn.state != stateOpen {
		return
	}
	if err := cn.discard(n); err != nil {
		cn.l.fail(cn, codec.CloseInternal, reasonInternal)
		return
	}
	cn.flushReplies()
}

// readAfterRest handles input that follows an unfinished frame which net/http had read.
func (cn *conn) readAfterRest(b []byte) {
	all := append(cn.asm.rest, b...)
	cn.asm.rest = nil
	cn.l.counts.bytesIn += len(b)
	if err := cn.discard(-1); err != nil {
		cn.l.fail(cn, codec.CloseInternal, reasonInternal)
		return
	}
	cn.feedOwned(all)
}

// feedOwned handles input that is not in gnet's buffer and keeps what is unfinished.
func (cn *conn) feedOwned(b []byte) {
	n := cn.feed(b)
	if cn.state != stateOpen {
		return
	}
	if n < len(b) {
		cn.assemble().rest = append([]byte(nil), b[n:]...)
	}
	cn.flushReplies()
}

// flushReplies writes what the loop itself had to say to this connection.
func (cn *conn) flushReplies() {
	l := cn.l
	if len(l.replies) == 0 {
		return
	}
	replies := l.replies
	l.replies = l.replies[:0]
	cn.write(replies)
	if cap(l.replies) > maxKeptScratch {
		l.replies = nil
	}
}

// feed handles the frames in b, unmasking them in place, and returns how many bytes are done with. It
// stops early where the connection leaves stateOpen.
func (cn *conn) feed(b []byte) (n int) {
	for cn.state == stateOpen {
		if a := cn.asm; a != nil && a.remaining > 0 {
			took := cn.takePayload(a, b[n:])
			n += took
			if took == 0 {
				return n
			}
			continue
		}
		h, ok := cn.header(b[n:])
		if !ok {
			return n
		}
		rest := b[n+h.size:]
		switch {
		case h.op.IsControl():
			if len(rest) < h.length {
				return n
			}
			payload := rest[:h.length]
			ws.Cipher(payload, h.mask, 0)
			n += h.size + h.length
			cn.control(h.op, payload)
		case h.fin && len(rest) >= h.length && (cn.asm == nil || !cn.asm.message):
			payload := rest[:h.length]
			ws.Cipher(payload, h.mask, 0)
			n += h.size + h.length
			cn.whole(h.op, payload, h.compressed, false)
		default:
			n += h.size
			cn.begin(h)
		}
	}
	return n
}

// header reads and checks a frame's header (RFC 6455, sections 5.2 to 5.5). ok is false when it is
// not whole yet, or when the connection has been failed.
func (cn *conn) header(b []byte) (h frameHeader, ok bool) {
	if len(b) < 2 {
		return h, false
	}
	h.fin, h.op, h.compressed = b[0]&0x80 != 0, ws.OpCode(b[0]&0x0f), b[0]&0x70 == rsv1
	short := int(b[1] & 0x7f)
	continued := cn.asm != nil && cn.asm.message
	switch {
	case b[0]&0x70 != 0 && !(h.compressed && cn.deflate && h.op.IsData() && !continued), b[1]&0x80 == 0,
		h.op > ws.OpBinary && h.op < ws.OpClose, h.op > ws.OpPong,
		h.op.IsControl() && (!h.fin || short > maxControl),
		h.op == ws.OpContinuation && !continued,
		h.op.IsData() && h.op != ws.OpContinuation && continued:
		cn.l.fail(cn, codec.CloseProtocol, reasonProtocol)
		return h, false
	case h.op.IsData() && h.op != ws.OpContinuation && h.op != cn.op() && !cn.l.s.opts.Echo:
		cn.l.fail(cn, codec.CloseUnsupported, cn.wrongOp())
		return h, false
	}
	h.size = 2
	switch short {
	case 126:
		if len(b) < 4 {
			return h, false
		}
		h.length = int(binary.BigEndian.Uint16(b[2:]))
		h.size = 4
		if h.length < 126 {
			cn.l.fail(cn, codec.CloseProtocol, reasonProtocol)
			return h, false
		}
	case 127:
		if len(b) < 10 {
			return h, false
		}
		v := binary.BigEndian.Uint64(b[2:])
		if v>>63 != 0 || v < 1<<16 {
			cn.l.fail(cn, codec.CloseProtocol, reasonProtocol)
			return h, false
		}
		h.length = int(v)
		h.size = 10
	default:
		h.length = short
	}
	if h.op.IsData() {
		before := 0
		if continued {
			before = len(cn.asm.buf)
		}
		if h.length > cn.l.rules.MaxMessageBytes-before {
			cn.l.s.metrics.refuse(codec.MessageTooLarge)
			cn.l.fail(cn, codec.CloseTooBig, reasonTooBig)
			return h, false
		}
	}
	if len(b) < h.size+4 {
		return h, false
	}
	copy(h.mask[:], b[h.size:])
	h.size += 4
	return h, true
}

// begin starts on a data frame that is assembled.
func (cn *conn) begin(h frameHeader) {
	a := cn.assemble()
	if !a.message {
		a.message, a.op, a.compressed, a.checked, a.frames, a.buf = true, h.op, h.compressed, 0, 0, a.buf[:0]
		a.began = cn.l.now
		cn.l.partials = append(cn.l.partials, partial{cn, a.began})
	}
	if a.frames++; a.frames > cn.l.rules.MaxFragments || !h.fin && cn.spend(fragmentCost, 0) == farBeyond {
		cn.l.s.metrics.refuse(codec.RateLimited)
		cn.l.fail(cn, codec.ClosePolicy, reasonFragments)
		return
	}
	a.fin, a.remaining, a.pos, a.mask = h.fin, h.length, 0, h.mask
	if h.length == 0 {
		cn.frameDone(a)
	}
}

// takePayload moves what has come of the current frame into the assembly.
func (cn *conn) takePayload(a *assembly, b []byte) int {
	n := min(a.remaining, len(b))
	if n == 0 {
		return 0
	}
	ws.Cipher(b[:n], a.mask, a.pos)
	a.buf = append(a.buf, b[:n]...)
	a.remaining -= n
	a.pos += n
	if a.op == ws.OpText && !a.compressed && !a.checkText(false) {
		cn.l.fail(cn, codec.CloseInvalidData, reasonUTF8)
		return n
	}
	if a.remaining == 0 {
		cn.frameDone(a)
	}
	return n
}

// frameDone delivers the message when its last frame is whole.
func (cn *conn) frameDone(a *assembly) {
	if !a.fin {
		return
	}
	a.message = false
	valid := a.op == ws.OpText && !a.compressed && a.checkText(true)
	cn.whole(a.op, a.buf, a.compressed, valid)
	cn.freeAssembly()
}

// whole handles a whole message, decompressed first where it is compressed. valid tells that the text is
// known to be UTF-8.
func (cn *conn) whole(op ws.OpCode, payload []byte, compressed, valid bool) {
	l := cn.l
	if compressed {
		plain, err := l.deflater.inflate(payload, l.rules.MaxMessageBytes)
		switch err {
		case nil:
			payload = plain
		case errInflated:
			l.s.metrics.refuse(codec.MessageTooLarge)
			l.fail(cn, codec.CloseTooBig, reasonTooBig)
			return
		default:
			l.fail(cn, codec.CloseInvalidData, reasonDeflate)
			return
		}
	}
	if op == ws.OpText && !valid && !utf8.Valid(payload) {
		l.fail(cn, codec.CloseInvalidData, reasonUTF8)
		return
	}
	cn.message(op, payload)
}

// checkText checks what has not been checked; a rune may be cut off at the end unless final.
func (a *assembly) checkText(final bool) bool {
	b := a.buf[a.checked:]
	if utf8.Valid(b) {
		a.checked = len(a.buf)
		return true
	}
	for len(b) > 0 {
		r, size := utf8.DecodeRune(b)
		if r == utf8.RuneError && size == 1 {
			return !final && !utf8.FullRune(b)
		}
		b = b[size:]
		a.checked += size
	}
	return true
}

// control handles a control frame.
func (cn *conn) control(op ws.OpCode, payload []byte) {
	if op != ws.OpClose && cn.overRate(len(payload)) {
		return
	}
	switch op {
	case ws.OpPing:
		cn.l.replies = appendFrame(cn.l.replies, ws.OpPong, payload)
		if len(cn.l.replies) > maxKeptScratch {
			cn.flushReplies()
		}
	case ws.OpClose:
		cn.peerCloses(payload)
	}
}

// peerCloses answers a close frame with the same code (RFC 6455, section 5.5.1).
func (cn *conn) peerCloses(payload []byte) {
	code := codec.CloseNoStatus
	if len(payload) >= 2 {
		code = codec.CloseCode(binary.BigEndian.Uint16(payload))
	}
	switch {
	case len(payload) == 1, len(payload) >= 2 && !validCloseCode(code):
		cn.l.fail(cn, codec.CloseProtocol, reasonProtocol)
		return
	case len(payload) > 2 && !utf8.Valid(payload[2:]):
		cn.l.fail(cn, codec.CloseInvalidData, reasonUTF8)
		return
	}
	replies := cn.l.replies
	cn.l.replies = cn.l.replies[:0]
	cn.endOpen(code, reasonPeer, appendFrame(replies, ws.OpClose, payload[:min(2, len(payload))]))
}

// validCloseCode tells which codes may be sent by an endpoint (RFC 6455, section 7.4, and the
// registry that it set up).
func validCloseCode(c codec.CloseCode) bool {
	return c >= 1000 && c <= 1003 || c >= 1007 && c <= 1014 || c >= 3000 && c <= 4999
}

// appendHeader appends the header of an unmasked, unfragmented frame.
func appendHeader(dst []byte, op ws.OpCode, length int) []byte {
	dst = append(dst, 0x80|byte(op))
	switch {
	case length < 126:
		return append(dst, byte(length))
	case length < 1<<16:
		return append(dst, 126, byte(length>>8), byte(length))
	default:
		return binary.BigEndian.AppendUint64(append(dst, 127), uint64(length))
	}
}

func appendFrame(dst []byte, op ws.OpCode, payload []byte) []byte {
	return append(appendHeader(dst, op, len(payload)), payload...)
}

// appendClose appends a close frame; the reason is cut to what a control frame holds.
func appendClose(dst []byte, code codec.CloseCode, reason string) []byte {
	for len(reason) > maxControl-2 {
		_, size := utf8.DecodeLastRuneInString(reason)
		reason = reason[:len(reason)-size]
	}
	dst = appendHeader(dst, ws.OpClose, 2+len(reason))
	dst = binary.BigEndian.AppendUint16(dst, uint16(code))
	return append(dst, reason...)
}
