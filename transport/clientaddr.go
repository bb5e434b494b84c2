package transport

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
)

// TrustedNetworks are the networks of the proxies that are believed when they name another address as
// the client's.
type TrustedNetworks []netip.Prefix

// Contains tells whether a, an IPv4 address in IPv6 form too, is in one of the networks.
func (t TrustedNetworks) Contains(a netip.Addr) bool { return contains(t, a) }

// Headers by which proxies name their clients. One of them is believed, never both: proxies add to the
// one that they know, and hand the other on as the client wrote it.
const (
	ForwardedForHeader = "X-Forwarded-For"
	ForwardedHeader    = "Forwarded" // RFC 7239
)

// forwarding finds the client behind trusted proxies.
type forwarding struct {
	trusted TrustedNetworks
	header  string // ForwardedForHeader or ForwardedHeader
}

// client is the address that the proxies vouch for, from the header's values in the order of the
// request's lines: read from the right, the first that is no trusted proxy's own. What cannot be read
// stops there; so does a proxy that hides its client.
func (f *forwarding) client(peer netip.Addr, values ...[]byte) netip.Addr {
	at := peer.Unmap()
	for i := len(values) - 1; i >= 0; i-- {
		for rest := values[i]; len(rest) > 0; {
			if !f.trusted.Contains(at) {
				return at
			}
			var element []byte
			rest, element = lastElement(rest)
			if element = bytes.TrimSpace(element); len(element) == 0 {
				continue // RFC 9110, section 5.6.1.2
			}
			node, ok := element, true
			if f.header == ForwardedHeader {
				node, ok = forParameter(element)
			}
			a, known := parseNode(node)
			if !ok || !known {
				return at
			}
			at = a
		}
	}
	return at
}

// fromHead is the client of a request whose head, as far as it is a proper one, is given.
func (f *forwarding) fromHead(peer netip.Addr, head []byte) netip.Addr {
	if !f.trusted.Contains(peer) {
		return peer.Unmap()
	}
	var values [][]byte
	_, rest, _ := bytes.Cut(head, lineEnd)
	for len(rest) > 0 {
		var line []byte
		line, rest, _ = bytes.Cut(rest, lineEnd)
		if key, value, ok := bytes.Cut(line, colon); ok && equalFold(key, f.header) {
			values = append(values, value)
		}
	}
	return f.client(peer, values...)
}

// fromRequest is the client of a request that net/http has read.
func (f *forwarding) fromRequest(r *http.Request) netip.Addr {
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	var values [][]byte
	for _, v := range r.Header[f.header] {
		values = append(values, []byte(v))
	}
	return f.client(peer.Addr(), values...)
}

// forwardingKey names the server's rules in the context of its requests.
type forwardingKey struct{}

// ClientIP is the address of the client of a request that a Server serves: the socket's, or the one that
// trusted proxies name. It is not valid where there is none.
func ClientIP(r *http.Request) netip.Addr {
	f := &forwarding{}
	if in, ok := r.Context().Value(forwardingKey{}).(*atomic.Pointer[rules]); ok {
		f = &in.Load().forwarding
	}
	return f.fromRequest(r)
}

// lastElement cuts a list at its last comma outside of quotes. It reads from the right, where the
// nearest proxy wrote: an open quote that a client sent cannot reach over what was added to it.
func lastElement(list []byte) (rest, element []byte) {
	quoted := false
	for i := len(list) - 1; i >= 0; i-- {
		switch list[i] {
		case '"':
			if !escaped(list, i) {
				quoted = !quoted
			}
		case ',':
			if !quoted {
				return list[:i], list[i+1:]
			}
		}
	}
	return nil, list
}

// escaped tells whether an odd number of backslashes stands before b[i].
func escaped(b []byte, i int) bool {
	n := len(b[:i]) - len(bytes.TrimRight(b[:i], `\`))
	return n%2 == 1
}

// forParameter is the node that an element of Forwarded names (RFC 7239, section 4).
func forParameter(element []byte) (node []byte, ok bool) {
	for {
		name, rest, found := bytes.Cut(element, []byte("="))
		name = bytes.TrimSpace(name)
		if !found || !isToken(name) {
			return nil, false
		}
		var value []byte
		if len(rest) > 0 && rest[0] == '"' {
			end := 1
			for end < len(rest) && (rest[end] != '"' || escaped(rest, end)) {
				end++
			}
			if end >= len(rest) {
				return nil, false
			}
			value, rest = rest[1:end], rest[end+1:]
		} else {
			end := bytes.IndexByte(rest, ';')
			if end < 0 {
				end = len(rest)
			}
			value, rest = bytes.TrimSpace(rest[:end]), rest[end:]
			if !isNode(value) {
				return nil, false
			}
		}
		if equalFold(name, "for") {
			if node != nil {
				return nil, false
			}
			node = value
		}
		rest = bytes.TrimSpace(rest)
		if len(rest) == 0 {
			return node, node != nil
		}
		if rest[0] != ';' {
			return nil, false
		}
		element = rest[1:]
	}
}

// isNode tells whether a value may stand without quotes. A port may: some proxies write it so.
func isNode(value []byte) bool {
	for _, c := range value {
		if c != ':' && !isToken([]byte{c}) {
			return false
		}
	}
	return len(value) > 0
}

// parseNode reads an address, with or without a port, an IPv6 address in brackets or, as in
// X-Forwarded-For, bare. An obfuscated or unknown node is none.
func parseNode(node []byte) (netip.Addr, bool) {
	const longest = len("[0000:0000:0000:0000:0000:ffff:255.255.255.255]:65535")
	if len(node) == 0 || len(node) > longest {
		return netip.Addr{}, false
	}
	s := string(node)
	a, err := netip.ParseAddr(s)
	if inner, ok := strings.CutPrefix(s, "["); err != nil && ok && strings.HasSuffix(inner, "]") {
		a, err = netip.ParseAddr(inner[:len(inner)-1])
		if err == nil && !a.Is6() {
			return netip.Addr{}, false
		}
	}
	if err != nil {
		var ap netip.AddrPort
		if ap, err = netip.ParseAddrPort(s); err == nil {
			a = ap.Addr()
		}
	}
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, false
	}
	return a.Unmap(), true
}

// The PROXY protocol, version 2: https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt
const (
	// proxyBytes bounds a header: what the specification has senders keep to, as it comes in one segment.
	proxyBytes     = 536
	proxyPreamble  = 16
	proxySignature = "\r\n\r\n\x00\r\nQUIT\n"

	proxyLocal   = 0x20 // version 2, the proxy's own connection
	proxyClients = 0x21 // version 2, a client's
	proxyCRC32C  = 0x03 // type of the TLV with the checksum
)

var (
	errProxyIncomplete = errors.New("PROXY header: more is to come")
	errProxyHeader     = errors.New("PROXY header")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// parseProxyV2 reads the header that b begins with; n is its length. src is not valid where the header
// names no address of the internet: then the socket's counts. The error is errProxyIncomplete when
// b may be the beginning of a header, else one that wraps errProxyHeader.
func parseProxyV2(b []byte) (src netip.AddrPort, n int, err error) {
	bad := func(what string) (netip.AddrPort, int, error) {
		return netip.AddrPort{}, 0, fmt.Errorf("%w: %s", errProxyHeader, what)
	}
	sig := min(len(b), len(proxySignature))
	switch {
	case string(b[:sig]) != proxySignature[:sig]:
		return bad("no signature of version 2")
	case len(b) > 12 && b[12] != proxyLocal && b[12] != proxyClients:
		return bad("unknown version or command")
	case len(b) > 13 && (b[13]>>4 > 3 || b[13]&0xf > 2):
		return bad("unknown family or transport")
	case len(b) < proxyPreamble:
		return src, 0, errProxyIncomplete
	}
	n = proxyPreamble + int(binary.BigEndian.Uint16(b[14:]))
	if n > proxyBytes {
		return bad("too long")
	}
	if b[12] == proxyLocal { // its addresses and all else are to be skipped
		if len(b) < n {
			return src, 0, errProxyIncomplete
		}
		return src, n, nil
	}
	family := b[13] >> 4
	addresses := [...]int{0, 4 + 4 + 2 + 2, 16 + 16 + 2 + 2, 108 + 108}[family] // UNSPEC, INET, INET6, UNIX
	switch {
	case n < proxyPreamble+addresses:
		return bad("too short for its addresses")
	case len(b) < n:
		return src, 0, errProxyIncomplete
	}
	at := b[proxyPreamble:n]
	switch family {
	case 1:
		src = netip.AddrPortFrom(netip.AddrFrom4([4]byte(at)), binary.BigEndian.Uint16(at[8:]))
	case 2:
		src = netip.AddrPortFrom(netip.AddrFrom16([16]byte(at)).Unmap(), binary.BigEndian.Uint16(at[32:]))
	}
	if what := checkTLVs(b[:n], proxyPreamble+addresses); what != "" && family != 0 {
		return bad(what) // what follows an unknown family need be no TLVs
	}
	return src, n, nil
}

// checkTLVs says what is wrong with the additions to a header, which begin at at: their lengths, and the
// checksum where there is one.
func checkTLVs(header []byte, at int) string {
	summed := false
	for at < len(header) {
		if len(header) < at+3 {
			return "an addition is cut off"
		}
		value := at + 3
		end := value + int(binary.BigEndian.Uint16(header[at+1:]))
		if end > len(header) {
			return "an addition is cut off"
		}
		if header[at] == proxyCRC32C {
			if end-value != 4 || summed {
				return "not one checksum of 4 bytes"
			}
			summed = true
			sum := crc32.Update(0, castagnoli, header[:value])
			sum = crc32.Update(sum, castagnoli, make([]byte, 4)) // the field itself counts as 0
			if crc32.Update(sum, castagnoli, header[end:]) != binary.BigEndian.Uint32(header[value:]) {
				return "the checksum is wrong"
			}
		}
		at = end
	}
	return ""
}
