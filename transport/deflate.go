package transport

import (
	"bytes"
	"errors"
	"io"
	"strconv"

	"github.com/gobwas/httphead"
	"github.com/gobwas/ws"
	"github.com/klauspost/compress/flate"

	"im-gateway/codec"
)

// permessage-deflate (RFC 7692). Neither side keeps a context between messages, so a connection costs no
// memory: each loop has one compressor and one decompressor for all of its connections, and a message
// for many of them is compressed once.

const (
	extensionDeflate = "permessage-deflate"
	deflateAnswer    = "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover; client_no_context_takeover\r\n"
)

// acceptsDeflate tells whether a list of offers holds one that can be accepted (RFC 7692, section 7.1).
// A smaller window of ours cannot be promised.
func acceptsDeflate(offers []byte) bool {
	list, ok := httphead.ParseOptions(offers, nil)
	if !ok {
		return false
	}
	for _, offer := range list {
		if string(offer.Name) == extensionDeflate && acceptable(&offer.Parameters) {
			return true
		}
	}
	return false
}

func acceptable(params *httphead.Parameters) bool {
	ok := true
	params.ForEach(func(key, value []byte) bool {
		switch string(key) {
		case "server_no_context_takeover", "client_no_context_takeover":
			ok = len(value) == 0
		case "client_max_window_bits":
			ok = len(value) == 0 || windowBits(value) > 0
		case "server_max_window_bits":
			ok = windowBits(value) == 15
		default:
			ok = false
		}
		return ok
	})
	return ok
}

// windowBits reads 8 to 15, without leading zeros; 0: neither.
func windowBits(value []byte) int {
	n, err := strconv.Atoi(string(value))
	if err != nil || n < 8 || n > 15 || value[0] == '0' || value[0] == '+' {
		return 0
	}
	return n
}

// deflater is a loop's compressor and decompressor.
type deflater struct {
	writer *flate.Writer
	out    bytes.Buffer
	reader io.ReadCloser
	in     bytes.Reader
	source []byte // a compressed message and what ends it
	plain  []byte // a message decompressed

	// The messages of the current batch that are compressed already, by where they lie.
	packed map[*byte]packed
	bytes  []byte // those messages, one after the other
}

// packed is a compressed message in deflater.bytes. from == to: compression does not make it smaller.
type packed struct {
	length   int // before
	from, to int
}

// messageTail ends a message for the decompressor: the empty block that the sender has left out
// (RFC 7692, section 7.2.2), and a last block.
const messageTail = "\x00\x00\xff\xff\x01\x00\x00\xff\xff"

func newDeflater(level int) (*deflater, error) {
	d := &deflater{packed: map[*byte]packed{}}
	var err error
	if d.writer, err = flate.NewWriter(&d.out, level); err != nil {
		return nil, err
	}
	d.reader = flate.NewReader(&d.in)
	return d, nil
}

// Why a compressed message is not taken.
var (
	errInflated = errors.New("larger than a message may be")
	errDeflate  = errors.New("no valid DEFLATE data")
)

// inflate decompresses a message of limit bytes at most. What it returns is the deflater's until the
// next call.
func (d *deflater) inflate(payload []byte, limit int) ([]byte, error) {
	d.source = append(append(d.source[:0], payload...), messageTail...)
	d.in.Reset(d.source)
	if err := d.reader.(flate.Resetter).Reset(&d.in, nil); err != nil {
		return nil, errDeflate
	}
	b := d.plain[:0]
	for {
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
		n, err := d.reader.Read(b[len(b):min(cap(b), limit+1)])
		b = b[:len(b)+n]
		switch {
		case len(b) > limit:
			return nil, errInflated
		case errors.Is(err, io.EOF):
			d.plain = keep(b)
			d.source = keep(d.source)
			return b, nil
		case err != nil:
			return nil, errDeflate
		}
	}
}

// keep returns a buffer for use again, unless it is huge.
func keep(b []byte) []byte {
	if cap(b) > maxKeptScratch {
		return nil
	}
	return b[:0]
}

// deflate compresses a message; nil: it would not be smaller. What it returns is valid until the
// next batch.
func (d *deflater) deflate(payload []byte) []byte {
	at := &payload[0]
	if p, ok := d.packed[at]; ok && p.length == len(payload) {
		return d.bytes[p.from:p.to]
	}
	d.out.Reset()
	d.writer.Reset(&d.out)
	_, err := d.writer.Write(payload)
	if err == nil {
		err = d.writer.Flush()
	}
	b := bytes.TrimSuffix(d.out.Bytes(), []byte(messageTail[:4]))
	p := packed{length: len(payload), from: len(d.bytes), to: len(d.bytes)}
	if err == nil && len(b) < len(payload) {
		d.bytes = append(d.bytes, b...)
		p.to = len(d.bytes)
	}
	d.packed[at] = p
	return d.bytes[p.from:p.to]
}

// begin forgets the messages of the batch before: their memory may be another's by now.
func (d *deflater) begin() {
	if len(d.packed) > 0 {
		clear(d.packed)
		d.bytes = keep(d.bytes)
	}
}

// rsv1 marks a compressed message (RFC 7692, section 6).
const rsv1 = 0x40

// appendMessage appends a message in one frame, compressed where that has been agreed and pays, or an event
// as it is.
func (cn *conn) appendMessage(dst []byte, op ws.OpCode, payload []byte) []byte {
	if cn.protocol == codec.SSE {
		return append(dst, payload...)
	}
	l := cn.l
	if cn.deflate && len(payload) > 0 && len(payload) >= l.s.opts.Compression.Threshold {
		if b := l.deflater.deflate(payload); len(b) > 0 {
			l.s.metrics.deflated.Add(float64(len(payload) - len(b)))
			at := len(dst)
			dst = appendFrame(dst, op, b)
			dst[at] |= rsv1
			return dst
		}
	}
	return appendFrame(dst, op, payload)
}
