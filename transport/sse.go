package transport

import (
	"bytes"
	"net/http"

	"github.com/gobwas/ws"

	"im-gateway/codec"
)

// Server-sent events, for networks that break WebSocket: GET /sse is answered on the event loop as an
// upgrade of /ws is, and what the shards send goes out as the body of an answer that never ends. The
// client sends by POST /api/messages, see Post. Nothing is read from the connection any more.

// streamHead begins the answer. Without a length or chunks the body ends with the connection, for clients
// and proxies of HTTP/1.0, too; nginx is told not to gather it.
const streamHead = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store\r\n" +
	"X-Accel-Buffering: no\r\nConnection: close\r\n"

// checkStream looks at what the upgrader would refuse of an upgrade; it returns the answer, or "".
func (h *upgradeHead) checkStream() (refusal string) {
	minor, ok := bytes.CutPrefix(h.version, []byte("HTTP/1."))
	switch {
	case !ok && bytes.HasPrefix(h.version, []byte("HTTP/")):
		return protoResponse
	case !ok || len(minor) != 1 || minor[0] < '0' || minor[0] > '9', h.hosts == 0 && minor[0] != '0':
		return badRequestResponse
	}
	return ""
}

// startStream answers GET /sse and opens the session. err is why the token was refused, where the client
// wants to be told so by a close.
func (cn *conn) startStream(head []byte, inBuffer int, w wish, who Identity, err error) {
	l := cn.l
	out := append(l.scratch[:0], streamHead...)
	if from := l.rules.corsOrigin(originOf(head)); from != "" {
		out = append(append(append(out, allowOrigin+": "...), from...), "\r\nVary: Origin\r\n"...)
	}
	out = append(out, lineEnd...)
	l.scratch = out
	if inBuffer > 0 {
		if cn.discard(inBuffer) != nil {
			cn.cut()
			return
		}
	}
	if cn.asm != nil { // what net/http had read further than the head
		cn.asm.rest = nil
		cn.freeAssembly()
	}
	cn.finishHead()
	cn.state, cn.protocol = stateOpen, codec.SSE
	if err != nil {
		cn.endOpen(codec.CloseTokenRefused, reasonAuth, codec.AppendSSEClose(out, codec.CloseTokenRefused, reasonAuth))
		return
	}
	l.s.metrics.handshake.ok.Inc()
	cn.write(out)
	if cn.state != stateOpen {
		return
	}
	if terr := setUserTimeout(cn.c.Fd(), l.rules.HeartbeatTimeout); terr != nil {
		l.s.log.Debug().Err(terr).Msg("a dead peer of an event stream may be noticed late")
	}
	cn.keep(who)
	l.startSession(cn, who, w)
	if cn.state == stateOpen && cn.unread() {
		cn.discardInput()
	}
}

const allowOrigin = "Access-Control-Allow-Origin"

// corsOrigin is the origin whose pages a browser lets read the answer to a page of an allowed one; "": it
// was no page of another origin that asked.
func (r *rules) corsOrigin(origin []byte) string {
	if len(origin) > 0 && (len(r.AllowedOrigins) == 0 || r.origins.All()) {
		return "*"
	}
	return string(origin)
}

// originOf returns the Origin header of a head that upgradeHead.read has not found malformed.
func originOf(head []byte) []byte {
	_, rest, _ := bytes.Cut(head, lineEnd)
	for len(rest) > 0 {
		var line []byte
		line, rest, _ = bytes.Cut(rest, lineEnd)
		if key, value, _ := bytes.Cut(line, colon); equalFold(key, "origin") {
			return bytes.TrimSpace(value)
		}
	}
	return nil
}

// discardInput drops what the client of a stream sends; one that sends much is closed.
func (cn *conn) discardInput() {
	b, err := cn.peek()
	if err != nil && len(b) == 0 {
		return
	}
	cn.l.counts.bytesIn += len(b)
	rate := cn.spend(0, len(b))
	if cn.discard(-1) != nil {
		cn.l.fail(cn, codec.CloseInternal, reasonInternal)
		return
	}
	if rate == farBeyond {
		cn.l.s.metrics.refuse(codec.RateLimited)
		cn.l.fail(cn, codec.ClosePolicy, reasonFlood)
	}
}

// appendClose appends what tells the peer of an open connection why it is closed.
func (cn *conn) appendClose(dst []byte, code codec.CloseCode, reason string) []byte {
	if cn.protocol == codec.SSE {
		return codec.AppendSSEClose(dst, code, reason)
	}
	return appendClose(dst, code, reason)
}

// ping appends a heartbeat; late: the peer has been silent for too long. Of a stream nothing is heard: that
// its peer is dead shows by what it does not acknowledge, see setUserTimeout.
func (cn *conn) ping(dst []byte) (_ []byte, late bool) {
	l := cn.l
	if cn.protocol == codec.SSE {
		return append(dst, codec.SSEHeartbeat...), false
	}
	if l.now-cn.lastRead > l.rules.HeartbeatTimeout.Milliseconds() {
		return dst, true
	}
	l.suspect(cn)
	return appendFrame(dst, ws.OpPing, nil), false
}

// serveStream answers a request to /sse that net/http has: a GET goes back to the event loop.
func (f *httpFront) serveStream(w http.ResponseWriter, r *http.Request) {
	const methods = "GET, HEAD, OPTIONS"
	if r.Method == http.MethodGet {
		f.handBack(w, r)
		return
	}
	h := w.Header()
	origin := []byte(r.Header.Get("Origin"))
	rules := f.s.rules.Load()
	allowed := rules.allowsOrigin(origin, []byte(r.Host))
	if from := rules.corsOrigin(origin); allowed && from != "" {
		h.Set(allowOrigin, from)
		h.Set("Vary", "Origin")
	}
	switch r.Method {
	case http.MethodOptions: // of clients that read streams by fetch
		h.Set("Allow", methods)
		if allowed {
			h.Set("Access-Control-Allow-Methods", http.MethodGet)
			h.Set("Access-Control-Allow-Headers", "Authorization, Cache-Control, Last-Event-ID")
			h.Set("Access-Control-Max-Age", "600")
		}
		w.WriteHeader(http.StatusNoContent)
	case http.MethodHead: // what a GET would be answered with, but for a session
		var u upgradeHead
		u.read(requestHead(r))
		_, err := f.s.identify(u.token)
		switch {
		case !allowed:
			refuseHTTP(w, http.StatusForbidden, string(codec.AuthFailed), "")
		case err != nil || u.inQuery && rules.RefuseQueryToken:
			h.Set("WWW-Authenticate", "Bearer")
			refuseHTTP(w, http.StatusUnauthorized, string(codec.AuthFailed), "")
		default:
			h.Set("Content-Type", "text/event-stream")
			h.Set("Cache-Control", "no-store")
			w.WriteHeader(http.StatusOK)
		}
	default:
		f.s.metrics.handshake.malformed.Inc()
		h.Set("Allow", methods)
		refuseHTTP(w, http.StatusMethodNotAllowed, "METHOD_NOT_ALLOWED",
			"only GET opens an event stream; messages go to POST /api/messages")
	}
}
