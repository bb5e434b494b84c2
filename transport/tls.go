package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"time"
)

// TLS on the event loops. crypto/tls speaks to a net.Conn that waits, so a handshake has a goroutine of
// its own, so many at once at most; it reads and writes by way of a bridge. Once the connection is
// established its loop does all: what has come from the socket is fed to crypto/tls, whose reads of
// more end in errAgain, an error that it does not keep; and what it writes goes to the socket.

// tlsRecord is the largest plaintext of one record (RFC 8446, section 5.1).
const tlsRecord = 16 << 10

// tlsPreamble is the header of a record (RFC 8446, section 5.1), and tlsHandshake its first byte where
// a handshake begins.
const (
	tlsPreamble  = 5
	tlsHandshake = 22
)

// secure is a connection's TLS, of a loop once the handshake is done.
type secure struct {
	conn   *tls.Conn
	net    *tlsNet
	in     []byte // decrypted and not consumed
	passed uint64 // flushed never says less than it did
	ahead  bool   // the handshake may have read further than its end
}

// tlsNet is the net.Conn under crypto/tls.
type tlsNet struct {
	*bridge        // during the handshake, by its goroutine
	cn      *conn  // afterwards, on the loop
	input   []byte // from the socket, gnet's
	waiting []byte // from the socket, before the loop took over
	ready   bool   // the loop has taken over
}

// errAgain tells crypto/tls that more is to come. It counts as temporary, so that it may go on.
var errAgain net.Error = again{}

type again struct{}

func (again) Error() string   { return "no more input yet" }
func (again) Timeout() bool   { return false }
func (again) Temporary() bool { return true }

// Read implements net.Conn.
func (n *tlsNet) Read(p []byte) (int, error) {
	if !n.ready {
		return n.bridge.Read(p)
	}
	from := &n.input
	if len(n.waiting) > 0 {
		from = &n.waiting
	}
	if len(*from) == 0 {
		return 0, errAgain
	}
	k := copy(p, *from)
	*from = (*from)[k:]
	return k, nil
}

// Write implements net.Conn.
func (n *tlsNet) Write(p []byte) (int, error) {
	if !n.ready {
		return n.bridge.Write(p)
	}
	l := n.cn.l
	l.sealed = append(l.sealed, p...)
	return len(p), nil
}

// Close implements net.Conn; the connection is its loop's to close.
func (n *tlsNet) Close() error { return nil }

// SetDeadline implements net.Conn: the loop ends a handshake that is late.
func (n *tlsNet) SetDeadline(time.Time) error { return nil }

// SetReadDeadline implements net.Conn.
func (n *tlsNet) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline implements net.Conn.
func (n *tlsNet) SetWriteDeadline(time.Time) error { return nil }

// tlsConfig is the public port's side of TLS.
func tlsConfig(certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12, GetCertificate: certificate, NextProtos: []string{"http/1.1"},
		DynamicRecordSizingDisabled: true, // a loop writes all that it has for a connection at once
	}
}

// startTLS begins the handshake once the client's first record has come.
func (cn *conn) startTLS() {
	l := cn.l
	b, err := cn.c.Peek(-1)
	if err != nil || len(b) == 0 {
		return
	}
	switch {
	case b[0] != tlsHandshake:
		l.s.metrics.tlsHandshakes.plain.Inc()
		cn.respond(plainResponse)
		return
	case len(b) < tlsPreamble:
		return
	case len(b) < min(tlsPreamble+int(b[3])<<8+int(b[4]), tlsRecord):
		return
	}
	// The oldest has had the most time. Its goroutine ends in a moment; many that have not are too many.
	most := l.rules.MaxTLSHandshakes
	if n := int(l.s.shaking.Load()); n >= 2*most || n >= most && !l.displaceTLS() {
		l.s.metrics.tlsHandshakes.shed.Inc()
		cn.cut()
		return
	}
	br := newBridge(cn)
	n := &tlsNet{bridge: br, cn: cn}
	t := &secure{conn: tls.Server(n, l.s.tls), net: n}
	cn.own().bridge = br
	cn.state = stateBridged
	l.shaking = append(l.shaking, shake{cn, br})
	l.s.shaking.Add(1)
	l.s.children.Go(func() {
		err := t.conn.HandshakeContext(context.Background()) // hanging up the bridge ends it
		l.s.shaking.Add(-1)
		if !l.executeFor(cn, func() { cn.secured(t, br, err) }) {
			_ = br.Close()
		}
	})
	cn.feedBridge()
}

// shake is a handshake, or one that was.
type shake struct {
	cn *conn
	br *bridge
}

func (s shake) over() bool { return s.cn.state != stateBridged || s.cn.bridge != s.br }

// displaceTLS ends the loop's oldest handshake; false: it has none.
func (l *loop) displaceTLS() bool {
	for len(l.shaking) > 0 {
		s := l.shaking[0]
		l.shaking[0] = shake{}
		l.shaking = l.shaking[1:]
		if s.over() {
			continue
		}
		l.s.metrics.handshake.displaced.Inc()
		s.br.hangUp()
		s.cn.cut()
		return true
	}
	return false
}

// tickShaking forgets the handshakes that are over, up to the first that is not: its time will end.
func (l *loop) tickShaking() {
	for len(l.shaking) > 0 && l.shaking[0].over() {
		l.shaking[0] = shake{}
		l.shaking = l.shaking[1:]
	}
	if len(l.shaking) == 0 {
		l.shaking = nil
	}
}

// secured takes the connection back from the handshake; on the loop.
func (cn *conn) secured(t *secure, b *bridge, err error) {
	l := cn.l
	if cn.state != stateBridged || cn.bridge != b {
		l.s.metrics.tlsHandshakes.failed.Inc() // it was late, or the client has gone
		return
	}
	waiting, whole := b.take()
	b.hangUp()
	cn.own().bridge = nil
	if err != nil || !whole {
		l.s.metrics.tlsHandshakes.failed.Inc()
		l.s.log.Debug().Err(err).Stringer("remote", cn.remote()).Msg("TLS handshake failed")
		cn.state = stateClosing
		cn.startLinger() // an alert may be on its way
		return
	}
	if t.conn.ConnectionState().DidResume {
		l.s.metrics.tlsHandshakes.resumed.Inc()
	} else {
		l.s.metrics.tlsHandshakes.ok.Inc()
	}
	t.net.bridge, t.net.waiting, t.net.ready = nil, waiting, true
	t.ahead = true
	cn.own().tls = t
	cn.state = stateHead
	cn.read()
}

// peek returns the input that has not been consumed; it is valid until the next discard.
func (cn *conn) peek() ([]byte, error) {
	t := cn.tls
	if t == nil {
		return cn.c.Peek(-1)
	}
	if err := cn.decrypt(t); err != nil {
		if len(t.in) == 0 {
			cn.cut() // the peer has ended it, or speaks no TLS
		}
		return t.in, err
	}
	return t.in, nil
}

// decrypt adds what has come to the input.
func (cn *conn) decrypt(t *secure) error {
	b, err := cn.c.Peek(-1)
	if err != nil || len(b)+len(t.net.waiting) == 0 && !t.ahead {
		return err
	}
	t.ahead = false
	l := cn.l
	t.net.input = b
	t.in, l.opened = append(l.opened[:0], t.in...), nil
	for err == nil {
		if cap(t.in)-len(t.in) < tlsRecord {
			t.in = append(make([]byte, 0, len(t.in)+2*tlsRecord), t.in...)
		}
		var n int
		n, err = t.conn.Read(t.in[len(t.in):cap(t.in)])
		t.in = t.in[:len(t.in)+n]
	}
	t.net.input, t.net.waiting = nil, nil
	if _, derr := cn.c.Discard(-1); derr != nil {
		return derr
	}
	_ = cn.writeSealed() // a key update has an answer; gnet closes a connection that cannot be written to
	if len(t.in) == 0 {
		cn.consumed(t)
	}
	if errors.Is(err, errAgain) {
		return nil
	}
	return err
}

// consumed gives the buffer back to the loop.
func (cn *conn) consumed(t *secure) {
	if l := cn.l; cap(l.opened) < cap(t.in) && cap(t.in) <= maxKeptScratch {
		l.opened = t.in[:0]
	}
	t.in = nil
}

// discard consumes n bytes of what peek gave; -1: all.
func (cn *conn) discard(n int) error {
	t := cn.tls
	if t == nil {
		if n == 0 { // gnet takes 0 for all
			return nil
		}
		_, err := cn.c.Discard(n)
		return err
	}
	switch {
	case n < 0 || n >= len(t.in):
		cn.consumed(t)
	default:
		t.in = t.in[:copy(t.in, t.in[n:])]
	}
	return nil
}

// settle gives the loop's buffer back once a turn has ended: what is left of the input, the beginning
// of a frame or of a head, is kept in one of its size.
func (cn *conn) settle() {
	t := cn.tls
	if t == nil || len(t.in) == 0 || cap(t.in) < tlsRecord {
		return
	}
	left := append([]byte(nil), t.in...)
	cn.consumed(t)
	t.in = left
}

// unread tells whether there is input that has not been consumed.
func (cn *conn) unread() bool {
	return cn.c.InboundBuffered() > 0 || cn.tls != nil && len(cn.tls.in) > 0
}

// send passes bytes to the socket, or to gnet's buffer for it.
func (cn *conn) send(b []byte) error {
	t := cn.tls
	if t == nil {
		_, err := cn.c.Write(b)
		return err
	}
	if _, err := t.conn.Write(b); err != nil {
		cn.cut()
		return err
	}
	return cn.writeSealed()
}

// writeSealed writes what crypto/tls has written.
func (cn *conn) writeSealed() error {
	l := cn.l
	if len(l.sealed) == 0 {
		return nil
	}
	_, err := cn.c.Write(l.sealed)
	l.sealed = l.sealed[:0]
	if cap(l.sealed) > maxKeptScratch {
		l.sealed = nil
	}
	return err
}

// flushedSecurely is how many of the bytes written the kernel certainly has in whole records.
func (cn *conn) flushedSecurely(t *secure) uint64 {
	buffered := uint64(cn.c.OutboundBuffered())
	if buffered == 0 {
		t.passed = cn.written
	} else if pending := buffered + tlsRecord; pending < cn.written {
		t.passed = max(t.passed, cn.written-pending)
	}
	return t.passed
}

// endTLS tells the peer that nothing follows (RFC 8446, section 6.1).
func (cn *conn) endTLS() {
	if t := cn.tls; t != nil {
		_ = t.conn.CloseWrite() // the peer may have gone: all the same then
		_ = cn.writeSealed()
	}
}

var _ net.Conn = (*tlsNet)(nil)
