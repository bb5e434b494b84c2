package transport

import (
	"errors"
	"net"
	"net/netip"

	"github.com/panjf2000/gnet/v2"
	"golang.org/x/sys/unix"

	"im-gateway/codec"
)

// connState is where a connection stands.
type connState uint8

const (
	stateProxy     connState = iota // waiting for the PROXY header
	stateHello                      // waiting for the TLS client's hello
	stateHead                       // reading the head of the first request
	stateVerifying                  // the token is being checked off the loop
	stateBridged                    // net/http has it
	stateOpen                       // frames, or events
	stateClosing                    // a close or a last response has been written; draining input
	stateClosed                     // gnet has let go of it; never written to again
)

// Bounds of a lingering close: long enough that the peer reads the close frame, which unread input
// would turn into a reset (RFC 6455, section 7.1.1). The bytes are what a peer may have under way in
// socket buffers, and the rest of a message that was refused by its header.
const (
	lingerMS    = 2000
	lingerBytes = 4 << 20
)

// conn is one connection; all of it belongs to its loop. Idle users cost one each: keep it small.
type conn struct {
	c        gnet.Conn
	l        *loop
	user     string
	id       codec.SessionID // 0: no session
	lastRead int64           // Unix ms
	token    uint64          // hash of the token's jti; see Denials
	expires  uint32          // of the token, Unix s
	issued   uint32          // of the token, Unix s
	written  uint64          // bytes that the connection was asked to write
	asm      *assembly       // of a message that came in pieces; nil while there is none
	*aside                   // what few connections have; noAside for the others
	from     network         // counted for the limits by address
	paid     int64           // when what it has sent is paid for, Unix ns; see spend
	head     int32           // first command of the current egress batch; -1: none
	last     int32           // its last
	state    connState
	protocol codec.Protocol
	suspect  bool // silent for so long that it is watched until it speaks or its time is over
	backlog  bool // in the loop's backlog list
	deflate  bool // compression has been agreed

	unfinished bool // of its first head
}

// keep notes what the session's token says.
func (cn *conn) keep(who Identity) {
	cn.token, cn.expires, cn.issued = who.tokenHash, seconds(who.ExpiresAt/1000), seconds(who.IssuedAt)
}

// aside is what only some connections have, and only for a while.
type aside struct {
	bridge *bridge // while net/http, or a TLS handshake, has it
	tls    *secure // once it is established

	client     netip.AddrPort // as the PROXY header says
	checking   bool           // a refreshed token is being checked
	turnedAway bool           // it is told that there is no room
	linger     *linger        // while closing
}

// noAside stands for what a connection does not have; it is never written to.
var noAside = new(aside)

// own returns the connection's own aside, to be written to.
func (cn *conn) own() *aside {
	if cn.aside == noAside {
		cn.aside = new(aside)
	}
	return cn.aside
}

type linger struct {
	until   int64
	dropped int
	half    bool // our side is shut down
}

// drop lets go of what only a live connection needs.
func (cn *conn) drop() {
	cn.asm, cn.aside = nil, noAside
}

// read handles the input that gnet has for the connection.
func (cn *conn) read() {
	switch cn.state {
	case stateProxy:
		cn.readProxy()
	case stateHello:
		cn.startTLS()
	case stateHead:
		cn.readHead()
	case stateVerifying: // what follows the head stays in gnet's buffer
		if cn.c.InboundBuffered() > cn.l.s.opts.HeadBytes+cn.l.rules.MaxMessageBytes {
			cn.respond(tooLargeResponse)
		}
	case stateBridged:
		cn.feedBridge()
	case stateOpen:
		if cn.protocol == codec.SSE {
			cn.discardInput()
			return
		}
		cn.readFrames()
	case stateClosing:
		cn.drain()
	case stateClosed:
	}
}

// write sends bytes. It never blocks: what the kernel does not take is buffered and watched.
func (cn *conn) write(b []byte) {
	if cn.state == stateClosed || len(b) == 0 {
		return
	}
	cn.written += uint64(len(b))
	cn.l.counts.bytesOut += len(b)
	if err := cn.send(b); err != nil || cn.state == stateClosed {
		return // gnet has closed it and told us
	}
	left := cn.c.OutboundBuffered()
	if left == 0 {
		return
	}
	if !cn.backlog {
		cn.backlog = true
		cn.l.backlog = append(cn.l.backlog, waiting{cn: cn})
	}
	if cn.state == stateOpen && left > cn.l.rules.EgressBudget+egressSlack {
		cn.l.fail(cn, codec.CloseSlowConsumer, reasonSlow)
	}
}

// remote is the client's address: the socket's, or what a PROXY header has said.
func (cn *conn) remote() net.Addr {
	if cn.client.IsValid() {
		return net.TCPAddrFromAddrPort(cn.client)
	}
	return cn.c.RemoteAddr()
}

// readProxy reads the header that a trusted proxy sends before all else.
func (cn *conn) readProxy() {
	l := cn.l
	b, err := cn.c.Peek(-1)
	if err != nil || len(b) == 0 {
		return
	}
	client, n, err := parseProxyV2(b)
	switch {
	case errors.Is(err, errProxyIncomplete):
		return
	case err != nil:
		l.s.metrics.handshake.malformed.Inc()
		l.s.log.Debug().Err(err).Stringer("remote", cn.c.RemoteAddr()).Msg("connection of a trusted proxy refused")
		cn.cut()
		return
	}
	if _, err := cn.c.Discard(n); err != nil {
		cn.cut()
		return
	}
	cn.state = l.s.first()
	if client.IsValid() {
		cn.own().client = client
		if !cn.count(client.Addr()) {
			l.s.metrics.handshake.crowded.Inc()
			if cn.state == stateHello { // there is nothing that a TLS client could read
				cn.cut()
				return
			}
			cn.respond(crowdedResponse)
			return
		}
	}
	if cn.unread() {
		cn.read()
	}
}

// count counts the connection for its client's address; false: there are too many.
func (cn *conn) count(a netip.Addr) (ok bool) {
	cn.from, ok = cn.l.s.perAddr.take(cn.l.rules, a)
	return ok
}

// flushed is how many of the bytes written the kernel has taken.
func (cn *conn) flushed() uint64 {
	if t := cn.tls; t != nil {
		return cn.flushedSecurely(t)
	}
	return cn.written - uint64(cn.c.OutboundBuffered())
}

// waiting is a connection whose peer reads more slowly than it is written to.
type waiting struct {
	cn       *conn
	reported uint64 // what its shard knows to be flushed
}

// reportFlushed tells the shard how far a backlogged connection's stream has got. The connection is
// not closed: then gnet may have dropped what it had not written.
func (l *loop) reportFlushed(cn *conn) uint64 {
	flushed := cn.flushed()
	if cn.id != 0 {
		l.emit(codec.Event{Kind: codec.EventFlushed, Session: cn.id, Value: int64(flushed)})
	}
	return flushed
}

// tickBacklog reports the progress of the connections whose peer reads slowly.
func (l *loop) tickBacklog() {
	kept := l.backlog[:0]
	for _, w := range l.backlog {
		cn := w.cn
		if cn.state == stateClosed {
			continue
		}
		left := cn.c.OutboundBuffered()
		if cn.flushed() != w.reported {
			w.reported = l.reportFlushed(cn)
		}
		if cn.bridge != nil && left <= bridgeOutput {
			cn.bridge.release()
		}
		if left == 0 {
			cn.backlog = false
			continue
		}
		kept = append(kept, w)
	}
	clear(l.backlog[len(kept):])
	l.backlog = kept
}

// suspect watches a connection whose time will be over before the next ping.
func (l *loop) suspect(cn *conn) {
	if !cn.suspect && l.now-cn.lastRead+l.s.opts.Heartbeat.Milliseconds() > l.rules.HeartbeatTimeout.Milliseconds() {
		cn.suspect = true
		l.suspects = append(l.suspects, cn)
	}
}

// tickSuspects closes the connections that have been silent for too long.
func (l *loop) tickSuspects() {
	if len(l.suspects) == 0 {
		return
	}
	list := l.suspects
	l.suspects = nil
	kept := list[:0]
	for _, cn := range list {
		silent := l.now - cn.lastRead
		switch {
		case cn.state == stateOpen && silent > l.rules.HeartbeatTimeout.Milliseconds():
			l.fail(cn, codec.CloseHeartbeatMissed, reasonSilent)
		case cn.state == stateOpen && silent > l.s.opts.Heartbeat.Milliseconds():
			kept = append(kept, cn)
			continue
		}
		cn.suspect = false
	}
	clear(list[len(kept):])
	l.suspects = append(kept, l.suspects...)
}

// fail closes a connection for a reason of the gateway's: a close frame, or event, where they are spoken,
// then a lingering close.
func (l *loop) fail(cn *conn, code codec.CloseCode, reason string) {
	switch cn.state {
	case stateClosed, stateClosing:
		return
	case stateBridged:
		cn.bridge.hangUp()
		cn.cut() // an answer may be half written
	case stateOpen:
		// What the loop had to say stands before the close.
		replies := l.replies
		l.replies = l.replies[:0]
		cn.endOpen(code, reason, cn.appendClose(replies, code, reason))
	default:
		cn.respond(internalResponse)
	}
}

// endOpen ends an open connection: its session, then the last bytes, then a lingering close.
func (cn *conn) endOpen(code codec.CloseCode, reason string, last []byte) {
	cn.l.endSession(cn, code, reason)
	cn.asm = nil
	cn.state = stateClosing
	cn.write(last)
	cn.startLinger()
}

// respond writes a last HTTP response and closes.
func (cn *conn) respond(response string) {
	if cn.state == stateClosed || cn.state == stateClosing {
		return
	}
	if b := cn.bridge; b != nil {
		b.hangUp()
		cn.own().bridge = nil
		if !b.http { // a TLS handshake: the peer could not read it
			cn.cut()
			return
		}
	}
	cn.finishHead()
	cn.state = stateClosing
	cn.write([]byte(response))
	cn.startLinger()
}

// startLinger half-closes once all is written, and waits for the peer to do the same.
func (cn *conn) startLinger() {
	if cn.state == stateClosed {
		return
	}
	cn.own().linger = &linger{until: cn.l.now + lingerMS}
	cn.l.s.lingering.Add(1)
	cn.l.lingering = append(cn.l.lingering, cn)
	cn.endTLS()
	cn.halfClose()
	cn.drain()
}

func (cn *conn) halfClose() {
	if cn.linger == nil || cn.linger.half || cn.c.OutboundBuffered() > 0 {
		return
	}
	cn.linger.half = true
	if err := unix.Shutdown(cn.c.Fd(), unix.SHUT_WR); err != nil {
		cn.cut() // the peer has gone
	}
}

// drain drops input, up to a bound.
func (cn *conn) drain() {
	if cn.state == stateClosed || cn.linger == nil {
		return
	}
	n, err := cn.c.Discard(-1)
	if err != nil {
		n = 0
	}
	if cn.linger.dropped += n; cn.linger.dropped > lingerBytes {
		cn.cut()
	}
}

// cut closes the socket at once.
func (cn *conn) cut() {
	if cn.state == stateClosed {
		return
	}
	if el := cn.l.el.Load(); el != nil {
		_ = (*el).Close(cn.c) // it tells us by OnClose; what it says of the descriptor helps nobody
	}
}

func (l *loop) tickLingering() {
	if len(l.lingering) == 0 {
		return
	}
	// cut changes nothing in the list, which is swapped for safety all the same.
	list := l.lingering
	l.lingering = nil
	kept := list[:0]
	for _, cn := range list {
		if cn.state == stateClosed {
			continue
		}
		cn.halfClose()
		if cn.state != stateClosed && l.now >= cn.linger.until {
			cn.cut()
		}
		if cn.state != stateClosed {
			kept = append(kept, cn)
		}
	}
	clear(list[len(kept):])
	l.lingering = append(kept, l.lingering...)
}
