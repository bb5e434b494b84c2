package transport

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"hash/crc32"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
)

func trust(list ...string) (t TrustedNetworks) {
	for _, s := range list {
		t = append(t, netip.MustParsePrefix(s))
	}
	return t
}

func TestForwardedOnlyFromTrustedNetworks(t *testing.T) {
	proxies := trust("10.0.0.0/8", "2001:db8:ffff::/48")
	for _, c := range []struct {
		name, peer, header string
		values             []string
		want               string
	}{
		{"no header", "10.0.0.1", ForwardedForHeader, nil, "10.0.0.1"},
		{"untrusted peer", "192.0.2.9", ForwardedForHeader, []string{"198.51.100.1"}, "192.0.2.9"},
		{"one proxy", "10.0.0.1", ForwardedForHeader, []string{"198.51.100.1"}, "198.51.100.1"},
		{"v4 in v6 peer", "::ffff:10.0.0.1", ForwardedForHeader, []string{"::ffff:198.51.100.1"}, "198.51.100.1"},
		{"what the client wrote itself", "10.0.0.1", ForwardedForHeader, []string{"1.1.1.1, 198.51.100.1"}, "198.51.100.1"},
		{"and tried to hide", "10.0.0.1", ForwardedForHeader, []string{"10.9.9.9, 198.51.100.1,10.0.0.2"}, "198.51.100.1"},
		{"over two proxies", "10.0.0.1", ForwardedForHeader, []string{"198.51.100.1, 10.0.0.2"}, "198.51.100.1"},
		{"in two lines", "10.0.0.1", ForwardedForHeader, []string{"1.1.1.1", "198.51.100.1", "10.0.0.2"}, "198.51.100.1"},
		{"only proxies", "10.0.0.1", ForwardedForHeader, []string{"10.0.0.3, 10.0.0.2"}, "10.0.0.3"},
		{"garbage beyond the client", "10.0.0.1", ForwardedForHeader, []string{"&%, 198.51.100.1"}, "198.51.100.1"},
		{"garbage at a proxy", "10.0.0.1", ForwardedForHeader, []string{"1.1.1.1, &%, 10.0.0.2"}, "10.0.0.2"},
		{"empty", "10.0.0.1", ForwardedForHeader, []string{"", " , "}, "10.0.0.1"},
		{"empty elements", "10.0.0.1", ForwardedForHeader, []string{"198.51.100.1, ,"}, "198.51.100.1"},
		{"unknown", "10.0.0.1", ForwardedForHeader, []string{"1.1.1.1, unknown"}, "10.0.0.1"},
		{"port", "10.0.0.1", ForwardedForHeader, []string{"198.51.100.1:4711"}, "198.51.100.1"},
		{"IPv6", "10.0.0.1", ForwardedForHeader, []string{"2001:db8::1"}, "2001:db8::1"},
		{"IPv6 in brackets", "10.0.0.1", ForwardedForHeader, []string{"[2001:db8::1]"}, "2001:db8::1"},
		{"IPv6 and port", "2001:db8:ffff::1", ForwardedForHeader, []string{"[2001:db8::1]:80"}, "2001:db8::1"},
		{"a zone", "10.0.0.1", ForwardedForHeader, []string{"fe80::1%eth0"}, "10.0.0.1"},
		{"IPv4 in brackets", "10.0.0.1", ForwardedForHeader, []string{"[198.51.100.1]"}, "10.0.0.1"},
		{"too long", "10.0.0.1", ForwardedForHeader, []string{strings.Repeat("0", 100)}, "10.0.0.1"},

		{"Forwarded", "10.0.0.1", ForwardedHeader, []string{"for=198.51.100.1"}, "198.51.100.1"},
		{"with parameters", "10.0.0.1", ForwardedHeader, []string{`by=10.0.0.1;For="198.51.100.1:80" ; proto=http;host="a,b;c=\""`}, "198.51.100.1"},
		{"quoted IPv6", "10.0.0.1", ForwardedHeader, []string{`for="[2001:db8:cafe::17]:4711"`}, "2001:db8:cafe::17"},
		{"over two", "10.0.0.1", ForwardedHeader, []string{`for=1.1.1.1, for=198.51.100.1;proto=https`, `for="10.0.0.2"`}, "198.51.100.1"},
		{"obfuscated", "10.0.0.1", ForwardedHeader, []string{`for=1.1.1.1, for=_hidden, for=10.0.0.2`}, "10.0.0.2"},
		{"unknown node", "10.0.0.1", ForwardedHeader, []string{`for=1.1.1.1, for=unknown`}, "10.0.0.1"},
		{"open quote of the client's", "10.0.0.1", ForwardedHeader, []string{`for=1.1.1.1;by=", for="[2001:db8::1]:80"`}, "2001:db8::1"},
		{"backslash of the client's", "10.0.0.1", ForwardedHeader, []string{`for="1.1.1.1\, for="198.51.100.1"`}, "198.51.100.1"},
		{"quoted comma", "10.0.0.1", ForwardedHeader, []string{`for=198.51.100.1;host="x, for=1.1.1.1"`}, "198.51.100.1"},
		{"escaped quote", "10.0.0.1", ForwardedHeader, []string{`for=198.51.100.1;host="x\", for=1.1.1.1"`}, "198.51.100.1"},
		{"two nodes", "10.0.0.1", ForwardedHeader, []string{`for=1.1.1.1;for=198.51.100.1`}, "10.0.0.1"},
		{"no node", "10.0.0.1", ForwardedHeader, []string{`for=1.1.1.1, by=10.0.0.1`}, "10.0.0.1"},
		{"no value", "10.0.0.1", ForwardedHeader, []string{`for=`}, "10.0.0.1"},
		{"no end", "10.0.0.1", ForwardedHeader, []string{`for="198.51.100.1`}, "10.0.0.1"},
		{"no separator", "10.0.0.1", ForwardedHeader, []string{`for="198.51.100.1"for=1.1.1.1`}, "10.0.0.1"},
		{"no pair", "10.0.0.1", ForwardedHeader, []string{`198.51.100.1`}, "10.0.0.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := &forwarding{trusted: proxies, header: c.header}
			peer := netip.MustParseAddr(c.peer)
			other := ForwardedHeader + ": for=9.9.9.9"
			if c.header == ForwardedHeader {
				other = ForwardedForHeader + ": 9.9.9.9"
			}
			head := "GET /ws HTTP/1.1\r\nHost: h\r\n" + other + "\r\n"
			r := &http.Request{RemoteAddr: netip.AddrPortFrom(peer, 5).String(), Header: http.Header{}}
			for _, v := range c.values {
				head += strings.ToLower(c.header) + ":" + v + "\r\n"
				r.Header.Add(c.header, v)
			}
			if got := f.fromHead(peer, []byte(head+"\r\n")); got.String() != c.want {
				t.Errorf("by the head: %s, want %s", got, c.want)
			}
			var in atomic.Pointer[rules]
			in.Store(&rules{forwarding: *f})
			r = r.WithContext(context.WithValue(context.Background(), forwardingKey{}, &in))
			if got := ClientIP(r); got.String() != c.want {
				t.Errorf("by the request: %s, want %s", got, c.want)
			}
		})
	}
}

func TestForwardedCostsNothingWithoutProxies(t *testing.T) {
	f := &forwarding{trusted: trust("10.0.0.0/8"), header: ForwardedForHeader}
	head := []byte("GET /ws HTTP/1.1\r\n" + upgradeLines + "\r\n")
	for _, peer := range []string{"192.0.2.1", "10.0.0.1"} {
		a := netip.MustParseAddr(peer)
		if n := testing.AllocsPerRun(100, func() { f.fromHead(a, head) }); n != 0 {
			t.Errorf("%v allocations for a request from %s without the header", n, peer)
		}
	}
}

// proxyHeader builds a header; body is all that follows the 16 bytes.
func proxyHeader(command, family byte, body ...byte) []byte {
	b := append([]byte(proxySignature), command, family)
	return append(binary.BigEndian.AppendUint16(b, uint16(len(body))), body...)
}

func addresses(s string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		panic(err)
	}
	return b
}

var (
	proxiedV4 = addresses("c6336401 0a000001 1267 01bb")
	proxiedV6 = addresses("20010db8000000000000000000000001 20010db8000000000000000000000002 1267 01bb")
)

// summed appends a checksum, which is right when xor is 0, and then more.
func summed(xor byte, more ...byte) []byte {
	body := append(append([]byte(nil), proxiedV4...), proxyCRC32C, 0, 4, 0, 0, 0, 0)
	b := proxyHeader(proxyClients, 0x11, append(body, more...)...)
	at := proxyPreamble + len(proxiedV4) + 3
	binary.BigEndian.PutUint32(b[at:], crc32.Checksum(b, castagnoli))
	b[at] ^= xor
	return b
}

func proxyCases() map[string]struct {
	header []byte
	src    string // "": none; "bad": refused
} {
	type c = struct {
		header []byte
		src    string
	}
	with := func(body []byte, more ...byte) []byte { return append(append([]byte(nil), body...), more...) }
	return map[string]c{
		"TCP over IPv4":     {proxyHeader(proxyClients, 0x11, proxiedV4...), "198.51.100.1:4711"},
		"UDP over IPv4":     {proxyHeader(proxyClients, 0x12, proxiedV4...), "198.51.100.1:4711"},
		"TCP over IPv6":     {proxyHeader(proxyClients, 0x21, proxiedV6...), "[2001:db8::1]:4711"},
		"Unix":              {proxyHeader(proxyClients, 0x31, make([]byte, 216)...), ""},
		"unspecified":       {proxyHeader(proxyClients, 0x00), ""},
		"unspecified, more": {proxyHeader(proxyClients, 0x00, 1, 2, 3), ""},
		"local":             {proxyHeader(proxyLocal, 0x00), ""},
		"local, addresses":  {proxyHeader(proxyLocal, 0x11, proxiedV4...), ""},
		"local, more":       {proxyHeader(proxyLocal, 0x11, 9), ""},
		"addition":          {proxyHeader(proxyClients, 0x11, with(proxiedV4, 4, 0, 1, 0)...), "198.51.100.1:4711"},
		"checksum":          {summed(0), "198.51.100.1:4711"},
		"checksum, more":    {summed(0, 4, 0, 0), "198.51.100.1:4711"},
		"longest":           {proxyHeader(proxyClients, 0x11, with(with(proxiedV4, 4, 1, 0xf9), make([]byte, 505)...)...), "198.51.100.1:4711"},

		"wrong checksum":      {summed(1), "bad"},
		"two checksums":       {summed(0, proxyCRC32C, 0, 4, 0, 0, 0, 0), "bad"},
		"short checksum":      {proxyHeader(proxyClients, 0x11, with(proxiedV4, proxyCRC32C, 0, 0)...), "bad"},
		"too long":            {proxyHeader(proxyClients, 0x11, with(with(proxiedV4, 4, 1, 0xfa), make([]byte, 506)...)...), "bad"},
		"no addresses":        {proxyHeader(proxyClients, 0x11), "bad"},
		"short addresses":     {proxyHeader(proxyClients, 0x21, proxiedV4...), "bad"},
		"addition cut":        {proxyHeader(proxyClients, 0x11, with(proxiedV4, 4, 0)...), "bad"},
		"addition beyond end": {proxyHeader(proxyClients, 0x11, with(proxiedV4, 4, 0, 2, 0)...), "bad"},
		"version 1":           {[]byte("PROXY TCP4 198.51.100.1 10.0.0.1 4711 443\r\n"), "bad"},
		"version 3":           {proxyHeader(0x31, 0x11, proxiedV4...), "bad"},
		"command":             {proxyHeader(0x22, 0x11, proxiedV4...), "bad"},
		"family":              {proxyHeader(proxyClients, 0x41, proxiedV4...), "bad"},
		"transport":           {proxyHeader(proxyClients, 0x13, proxiedV4...), "bad"},
		"none":                {[]byte("GET / HTTP/1.1\r\n\r\n"), "bad"},
	}
}

func TestProxyV2(t *testing.T) {
	for name, c := range proxyCases() {
		t.Run(name, func(t *testing.T) {
			in := append(append([]byte(nil), c.header...), "GET /"...)
			src, n, err := parseProxyV2(in)
			switch {
			case c.src == "bad":
				if !errors.Is(err, errProxyHeader) {
					t.Errorf("error %v, want a refusal", err)
				}
			case err != nil || n != len(c.header):
				t.Errorf("length %d, error %v; want %d and none", n, err, len(c.header))
			case c.src == "" && src.IsValid(), c.src != "" && src.String() != c.src:
				t.Errorf("source %s, want %q", src, c.src)
			}
			checkEachSplit(t, in)
		})
	}
}

// checkEachSplit parses every beginning of b: it is incomplete until the verdict on the whole, which
// stays.
func checkEachSplit(t *testing.T, b []byte) {
	wholeSrc, wholeN, wholeErr := parseProxyV2(b)
	for end := range b {
		src, n, err := parseProxyV2(b[:end:end])
		switch {
		case errors.Is(err, errProxyIncomplete):
			if wholeErr == nil && end >= wholeN {
				t.Fatalf("the header of %d bytes is not seen in %d", wholeN, end)
			}
		case err != nil:
			if !errors.Is(wholeErr, errProxyHeader) {
				t.Fatalf("refused by %d bytes: %v; not by the whole: %v", end, err, wholeErr)
			}
		case n != wholeN || src != wholeSrc || n > end:
			t.Fatalf("%s, %d by %d bytes; %s, %d by the whole", src, n, end, wholeSrc, wholeN)
		}
	}
}

func FuzzProxyV2(f *testing.F) {
	for _, c := range proxyCases() {
		f.Add(c.header)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		b = b[:min(len(b), 2*proxyBytes)]
		src, n, err := parseProxyV2(b)
		switch {
		case errors.Is(err, errProxyIncomplete):
			if len(b) >= proxyBytes {
				t.Errorf("%d bytes are not enough", len(b))
			}
		case err != nil:
			if !errors.Is(err, errProxyHeader) {
				t.Errorf("error %v", err)
			}
		case n < proxyPreamble || n > proxyBytes || n > len(b):
			t.Errorf("length %d of %d", n, len(b))
		}
		if err != nil && (src.IsValid() || n != 0) && !errors.Is(err, errProxyIncomplete) {
			t.Errorf("%s, %d beside error %v", src, n, err)
		}
		checkEachSplit(t, b)
	})
}

func FuzzForwarded(f *testing.F) {
	for _, s := range []string{
		"198.51.100.1, 10.0.0.2", `for="[2001:db8::1]:80";by=_x, for=10.0.0.2`, `for="a\",b"`, `"`, `;=,`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, value string) {
		peer := netip.MustParseAddr("10.0.0.1")
		for _, header := range []string{ForwardedForHeader, ForwardedHeader} {
			fw := &forwarding{trusted: trust("10.0.0.0/8"), header: header}
			// What a client writes cannot change what the proxy says behind it.
			if got := fw.client(peer, []byte(value), []byte(map[string]string{
				ForwardedForHeader: "198.51.100.7", ForwardedHeader: `for="198.51.100.7:1";host="h"`}[header])); got.String() != "198.51.100.7" {
				t.Errorf("%s: %q made the client %s", header, value, got)
			}
			joined := value + map[string]string{
				ForwardedForHeader: ", 198.51.100.7", ForwardedHeader: `, for="198.51.100.7:1";host="h"`}[header]
			if got := fw.client(peer, []byte(joined)); got.String() != "198.51.100.7" {
				t.Errorf("%s: %q made the client %s", header, joined, got)
			}
			if !fw.client(peer, []byte(value)).IsValid() {
				t.Errorf("%s: %q left no address", header, value)
			}
		}
	})
}
