package transport

import (
	"bytes"
	"encoding/base64"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/gobwas/ws"

	"im-gateway/codec"
)

// What is offered and selected as a WebSocket subprotocol.
const (
	protocolJSON  = "im.json.v1"
	protocolProto = "im.proto.v1"
	oursPrefix    = "im."
	bearerPrefix  = "bearer."
	wsPath        = "/ws"
	ssePath       = "/sse"
)

var (
	lineEnd = []byte("\r\n")
	space   = []byte(" ")
	colon   = []byte(":")
	anyGet  = []byte("GET ")
	wsGet   = []byte("GET " + wsPath)
	sseGet  = []byte("GET " + ssePath)
)

// upgradeHead is what the gateway itself reads of the head of a request for a session: a WebSocket's
// upgrade, or GET /sse. Its slices point into the head.
type upgradeHead struct {
	malformed bool // in a way that the upgrader lets pass
	upgrade   bool // Upgrade: websocket
	inQuery   bool // the token came in the query
	wish      wish
	version   []byte // HTTP/1.1
	hosts     int
	host      []byte
	origin    []byte
	token     []byte

	// The subprotocols offered.
	bearers   int // bearer.*: a token
	supported int // im.json.v1, im.proto.v1
	ours      int // im.*
	foreign   int
}

// wish is what a request for a session asks for, mostly in its query.
type wish struct {
	events    bool   // server-sent events, no WebSocket
	authClose bool   // auth=close: a refused token is told by a close code
	acks      bool   // ack=1: the client acknowledges deliveries
	deviceID  string // unless the token names one
	device    string
	deflate   bool // permessage-deflate is offered
}

// readHead looks at a connection's first request.
func (cn *conn) readHead() {
	l := cn.l
	b, err := cn.peek()
	if err != nil || len(b) == 0 {
		return
	}
	size, strict := headSize(b[:min(len(b), l.s.opts.HeadBytes)])
	switch {
	case !isToken(b[:1]): // no HTTP: a TLS client, perhaps
		l.s.metrics.handshake.malformed.Inc()
		cn.respond(badRequestResponse)
		return
	case size == 0 && len(b) >= l.s.opts.HeadBytes:
		l.s.metrics.handshake.tooLarge.Inc()
		cn.respond(tooLargeResponse)
		return
	case size == 0:
		return // net/http would hold a goroutine for a head that is slow to come
	case l.s.opts.Echo && !bytes.HasPrefix(b, anyGet), !l.s.opts.Echo && !gets(b, wsGet) && !gets(b, sseGet):
		cn.handOver()
		return
	case !strict:
		l.s.metrics.handshake.malformed.Inc()
		cn.respond(badRequestResponse)
		return
	}
	head := b[:size]
	var h upgradeHead
	h.read(head)
	h.wish.events = gets(head, sseGet) && !l.s.opts.Echo
	if !h.upgrade && !h.wish.events && !h.malformed && !l.s.opts.Echo {
		cn.handOver()
		return
	}
	cn.upgrade(head, &h, len(head))
}

// headSize is the length of the head that b begins with, its empty line included; 0 while it is not
// whole. strict tells that the last line ends as RFC 9112, section 2.2, wants it: net/http takes a
// bare line feed too.
func headSize(b []byte) (size int, strict bool) {
	for at := 0; ; {
		n := bytes.IndexByte(b[at:], '\n')
		if n < 0 {
			return 0, false
		}
		at += n + 1
		switch {
		case bytes.HasPrefix(b[at:], lineEnd):
			return at + 2, at >= 2 && b[at-2] == '\r'
		case bytes.HasPrefix(b[at:], lineEnd[1:]):
			return at + 1, false
		}
	}
}

// gets tells whether a request, whose head is whole, begins with a GET of this path.
func gets(head, get []byte) bool {
	rest, ok := bytes.CutPrefix(head, get)
	return ok && (rest[0] == ' ' || rest[0] == '?')
}

// read scans the head's lines. The upgrader checks what RFC 6455 says of a handshake; here is what it
// takes more lightly than RFC 9112 does, and servers before or behind us may read otherwise.
func (h *upgradeHead) read(head []byte) {
	line, rest, _ := bytes.Cut(head, lineEnd)
	if _, target, ok := bytes.Cut(line, space); ok {
		target, h.version, _ = bytes.Cut(target, space)
		_, query, _ := bytes.Cut(target, []byte("?"))
		h.readQuery(query)
	}
	h.malformed = h.malformed || hasControl(line)
	var fromHeader, fromProtocol []byte
	var keys, versions, origins int
	for len(rest) > 0 {
		line, rest, _ = bytes.Cut(rest, lineEnd)
		if len(line) == 0 {
			break
		}
		key, value, ok := bytes.Cut(line, colon)
		if !ok || !isToken(key) || hasControl(value) {
			h.malformed = true
			if !ok {
				continue
			}
		}
		value = bytes.TrimSpace(value)
		switch {
		case equalFold(key, "host"):
			h.host = value
			h.hosts++
		case equalFold(key, "upgrade"):
			h.upgrade = h.upgrade || equalFold(value, "websocket")
		case equalFold(key, "sec-websocket-key"):
			keys++
			h.malformed = h.malformed || !isKey(value)
		case equalFold(key, "sec-websocket-version"):
			versions++
		case equalFold(key, "content-length"):
			h.malformed = h.malformed || string(value) != "0" // a body would be read as frames
		case equalFold(key, "transfer-encoding"):
			h.malformed = true
		case equalFold(key, "origin"):
			h.origin = value
			origins++
		case equalFold(key, "authorization"):
			fromHeader = bearerToken(value)
		case equalFold(key, "sec-websocket-extensions"):
			h.wish.deflate = h.wish.deflate || acceptsDeflate(value)
		case equalFold(key, "sec-websocket-protocol"):
			if t := h.readProtocols(value); t != nil {
				fromProtocol = t
			}
		}
	}
	h.malformed = h.malformed || h.hosts > 1 || keys > 1 || versions > 1 || origins > 1
	switch {
	case fromHeader != nil:
		h.token, h.inQuery = fromHeader, false
	case fromProtocol != nil:
		h.token, h.inQuery = fromProtocol, false
	}
}

// selectable tells whether an offer of subprotocols, if there is one, leaves us something to select:
// a browser fails a handshake in which none of its offers is.
func (h *upgradeHead) selectable() bool {
	return h.supported > 0 || h.foreign > 0 || h.ours+h.bearers == 0
}

func equalFold(b []byte, s string) bool { return len(b) == len(s) && strings.EqualFold(string(b), s) }

// hasControl tells of control characters but the tab; a bare CR or LF is one.
func hasControl(b []byte) bool {
	for _, c := range b {
		if c < 0x20 && c != '\t' || c == 0x7f {
			return true
		}
	}
	return false
}

// isToken tells whether b may name a header (RFC 9110, section 5.6.2).
func isToken(b []byte) bool {
	for _, c := range b {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case strings.IndexByte("!#$%&'*+-.^_`|~", c) < 0:
			return false
		}
	}
	return len(b) > 0
}

// isKey tells whether b is a Sec-WebSocket-Key: 16 bytes in base 64 (RFC 6455, section 4.1).
func isKey(b []byte) bool {
	var raw [18]byte
	if base64.StdEncoding.DecodedLen(len(b)) > len(raw) {
		return false
	}
	n, err := base64.StdEncoding.Decode(raw[:], b)
	return err == nil && n == 16
}

func (h *upgradeHead) readQuery(query []byte) {
	for len(query) > 0 {
		var pair []byte
		pair, query, _ = bytes.Cut(query, []byte("&"))
		key, value, _ := bytes.Cut(pair, []byte("="))
		switch string(key) {
		case "token":
			h.token, h.inQuery = value, true // a JWT needs no percent encoding
		case "auth":
			h.wish.authClose = string(value) == "close"
		case "ack":
			h.wish.acks = string(value) == "1"
		case "device_id":
			name, err := url.QueryUnescape(string(value))
			h.wish.deviceID = name
			h.malformed = h.malformed || err != nil || name != "" && !codec.ValidName(name)
		case "device":
			h.wish.device = string(value)
			h.malformed = h.malformed || len(value) > 0 && !codec.ValidKind(value)
		}
	}
}

func (h *upgradeHead) readProtocols(list []byte) (token []byte) {
	for len(list) > 0 {
		var p []byte
		p, list, _ = bytes.Cut(list, []byte(","))
		p = bytes.TrimSpace(p)
		switch {
		case len(p) == 0:
		case bytes.HasPrefix(p, []byte(bearerPrefix)):
			h.bearers++
			token = p[len(bearerPrefix):]
		case supported(p):
			h.supported++
			h.ours++
		case bytes.HasPrefix(p, []byte(oursPrefix)):
			h.ours++
		default:
			h.foreign++
		}
	}
	return token
}

// bearerToken returns the token of an Authorization header, or nil.
func bearerToken(value []byte) []byte {
	scheme, token, ok := bytes.Cut(value, []byte(" "))
	if !ok || !equalFold(scheme, "bearer") {
		return nil
	}
	return bytes.TrimSpace(token)
}

// upgrade decides about a request for a session; inBuffer is how many bytes of it lie in gnet's buffer.
func (cn *conn) upgrade(head []byte, h *upgradeHead, inBuffer int) {
	l := cn.l
	if l.s.opts.Echo {
		cn.finishUpgrade(head, inBuffer, h.wish, Identity{}, nil)
		return
	}
	switch {
	case l.s.pressed.Load():
		l.s.metrics.pressed.connections.Inc()
		cn.respond(shedResponse)
		return
	case l.s.draining.Load():
		l.s.metrics.handshake.shed.Inc()
		cn.respond(shedResponse)
		return
	case !l.s.upgrades.allow(l.rules.upgradeCost, l.now):
		l.s.metrics.handshake.rate.Inc()
		cn.respond(shedResponse)
		return
	case h.malformed:
		l.s.metrics.handshake.malformed.Inc()
		cn.respond(badRequestResponse)
		return
	case !l.rules.allowsOrigin(h.origin, h.host):
		l.s.metrics.handshake.origin.Inc()
		cn.respond(originResponse)
		return
	case !cn.countForwarded(head):
		l.s.metrics.handshake.crowded.Inc()
		cn.respond(crowdedResponse)
		return
	case h.inQuery && l.rules.RefuseQueryToken:
		l.s.metrics.handshake.refused.Inc()
		cn.respond(queryResponse)
		return
	case h.wish.events:
		if refusal := h.checkStream(); refusal != "" {
			l.s.metrics.handshake.malformed.Inc()
			cn.respond(refusal)
			return
		}
	case !h.selectable():
		l.s.metrics.handshake.malformed.Inc()
		cn.respond(protocolResponse)
		return
	}
	if !l.rules.Verifier.Slow() {
		who, err := l.s.identify(h.token)
		cn.finishUpgrade(head, inBuffer, h.wish, who, err)
		return
	}
	head = bytes.Clone(head)
	token := bytes.Clone(h.token)
	wish := h.wish
	check := func() {
		who, err := l.s.identify(token)
		l.executeFor(cn, func() {
			if cn.state == stateVerifying {
				who, err := l.recheck(who, err)
				cn.finishUpgrade(head, inBuffer, wish, who, err)
			}
		})
	}
	select {
	case l.s.verify <- check:
		cn.state = stateVerifying
	default:
		l.s.metrics.handshake.shed.Inc()
		cn.respond(shedResponse)
	}
}

// countForwarded counts a connection of a trusted proxy for the client that the head names; false: there
// are too many.
func (cn *conn) countForwarded(head []byte) bool {
	f := &cn.l.rules.forwarding
	if cn.from != 0 || len(f.trusted) == 0 {
		return true
	}
	peer := addrOf(cn.remote())
	if client := f.fromHead(peer, head); client != peer {
		return cn.count(client)
	}
	return true
}

// finishUpgrade answers the request once the token's fate is known, and goes on with the frames that
// follow an upgrade.
func (cn *conn) finishUpgrade(head []byte, inBuffer int, w wish, who Identity, err error) {
	l := cn.l
	if err != nil {
		l.s.metrics.handshake.refused.Inc()
		l.s.log.Debug().Err(err).Stringer("remote", cn.c.RemoteAddr()).Msg("upgrade refused")
		if !w.authClose {
			cn.respond(unauthorized(err))
			return
		}
	}
	if w.events {
		cn.startStream(head, inBuffer, w, who, err)
		return
	}
	l.hs.reset(head)
	up := &upgrader
	if w.deflate && l.deflater != nil {
		up = &deflatingUpgrader
	}
	agreed, upErr := up.Upgrade(&l.hs)
	if inBuffer > 0 {
		if derr := cn.discard(inBuffer); derr != nil {
			upErr = derr
		}
	}
	if upErr != nil {
		l.s.metrics.handshake.malformed.Inc()
		cn.respond(refusedUpgrade(upErr))
		return
	}
	var rest []byte
	if cn.asm != nil { // net/http had read further than the head
		rest, cn.asm.rest = cn.asm.rest, nil
		cn.freeAssembly()
	}
	cn.finishHead()
	cn.state = stateOpen
	cn.deflate = w.deflate && l.deflater != nil
	if agreed.Protocol == protocolProto {
		cn.protocol = codec.Proto
	}
	if err != nil {
		cn.endOpen(codec.CloseTokenRefused, reasonAuth,
			appendClose(l.hs.out, codec.CloseTokenRefused, reasonAuth))
		return
	}
	l.s.metrics.handshake.ok.Inc()
	cn.write(l.hs.out)
	if cn.state != stateOpen {
		return
	}
	if !l.s.opts.Echo {
		cn.keep(who)
		l.startSession(cn, who, w)
	}
	if len(rest) > 0 {
		l.counts.bytesIn += len(rest)
		cn.feedOwned(rest)
	}
	if cn.state == stateOpen && cn.unread() {
		cn.readFrames()
	}
}

// upgrader checks the handshake (RFC 6455, section 4.2) and writes the answer: of the subprotocols it
// selects the first that we speak, in the client's order. It holds no state of a connection.
var upgrader = ws.Upgrader{Protocol: supported}

// deflatingUpgrader accepts permessage-deflate as well.
var deflatingUpgrader = ws.Upgrader{Protocol: supported, Header: ws.HandshakeHeaderString(deflateAnswer)}

func supported(protocol []byte) bool {
	return string(protocol) == protocolJSON || string(protocol) == protocolProto
}

// handshakeIO feeds the upgrader exactly the head and takes its answer. One per loop.
type handshakeIO struct {
	in  []byte
	out []byte
}

func (h *handshakeIO) reset(head []byte) { h.in, h.out = head, h.out[:0] }

// Read implements io.Reader.
func (h *handshakeIO) Read(p []byte) (int, error) {
	if len(h.in) == 0 {
		return 0, io.EOF
	}
	n := copy(p, h.in)
	h.in = h.in[n:]
	return n, nil
}

// Write implements io.Writer.
func (h *handshakeIO) Write(p []byte) (int, error) {
	h.out = append(h.out, p...)
	return len(p), nil
}

// allowsOrigin tells whether a page of this origin may connect to this host: one of the list, or one that
// the host itself serves. Clients that are no browsers send no origin.
func (r *rules) allowsOrigin(origin, host []byte) bool {
	if len(origin) == 0 || len(r.AllowedOrigins) == 0 || r.origins.All() {
		return true
	}
	if _, from, ok := bytes.Cut(origin, []byte("://")); ok && len(host) > 0 && bytes.EqualFold(from, host) {
		return true
	}
	return r.origins.Has(string(origin))
}

// The fixed answers.
var (
	shedResponse = response("503 Service Unavailable", "Retry-After: "+retryAfterShed+"\r\n",
		string(codec.Overloaded), "the gateway takes no more connections at the moment")
	crowdedResponse = response("429 Too Many Requests", "Retry-After: "+retryAfterShed+"\r\n",
		string(codec.RateLimited), "too many connections from this address")
	timeoutResponse  = response("408 Request Timeout", "", "TIMEOUT", "the request's head did not come in time")
	tooLargeResponse = response("431 Request Header Fields Too Large", "", string(codec.MessageTooLarge), "the request's head is too large")
	originResponse   = response("403 Forbidden", "", string(codec.AuthFailed), "pages of this origin may not connect")
	protocolResponse = response("400 Bad Request", "", string(codec.InvalidMessage),
		"offer the subprotocol "+protocolJSON+" or "+protocolProto+", or none; bearer.<token> goes beside it")
	methodResponse  = response("405 Method Not Allowed", "Allow: GET\r\n", "METHOD_NOT_ALLOWED", "only GET opens a WebSocket")
	versionResponse = response("426 Upgrade Required", "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
		"UPGRADE_REQUIRED", "this is a WebSocket, version 13")
	protoResponse      = response("505 HTTP Version Not Supported", "", string(codec.InvalidMessage), "HTTP/1.1 is spoken here")
	plainResponse      = response("400 Bad Request", "", string(codec.InvalidMessage), "this port takes TLS only: use https or wss")
	badRequestResponse = response("400 Bad Request", "", string(codec.InvalidMessage), "the request is malformed")
	internalResponse   = response("500 Internal Server Error", "", "INTERNAL", "internal error")
	expiredResponse    = response("401 Unauthorized", "WWW-Authenticate: Bearer error=\"invalid_token\"\r\n",
		string(codec.TokenExpired), ErrTokenExpired.Error())
	refusedResponse = response("401 Unauthorized", "WWW-Authenticate: Bearer error=\"invalid_token\"\r\n",
		string(codec.AuthFailed), ErrTokenRefused.Error())
	queryResponse = response("401 Unauthorized", "WWW-Authenticate: Bearer\r\n",
		string(codec.AuthFailed), "a token is not taken from the query: Authorization: Bearer, or the subprotocol bearer.<token>")
	missingResponse = response("401 Unauthorized", "WWW-Authenticate: Bearer\r\n",
		string(codec.AuthFailed), ErrTokenMissing.Error())
)

func unauthorized(err error) string {
	switch {
	case errors.Is(err, ErrTokenExpired):
		return expiredResponse
	case errors.Is(err, ErrTokenMissing):
		return missingResponse
	default:
		return refusedResponse
	}
}

// refusedUpgrade is the answer to a handshake that the upgrader has refused.
func refusedUpgrade(err error) string {
	var rejected *ws.ConnectionRejectedError
	if errors.As(err, &rejected) {
		switch rejected.StatusCode() {
		case http.StatusMethodNotAllowed:
			return methodResponse
		case http.StatusUpgradeRequired:
			return versionResponse
		case http.StatusHTTPVersionNotSupported:
			return protoResponse
		}
	}
	return badRequestResponse
}

func response(status, headers, code, message string) string {
	body := failure(code, message)
	return "HTTP/1.1 " + status + "\r\nContent-Type: application/json\r\n" + headers +
		"Connection: close\r\nContent-Length: " + strconv.Itoa(len(body)) + "\r\n\r\n" + string(body)
}

// failure is the body of every refusal.
func failure(code, message string) []byte {
	body := codec.AppendQuoted([]byte(`{"success":false,"code":"`+code+`","message":`), message)
	return append(body, '}')
}
