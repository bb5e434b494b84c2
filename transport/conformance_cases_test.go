package transport

import (
	"fmt"
	"slices"
	"strings"
)

func conformanceCases() []conformanceCase {
	return slices.Concat(framingCases(), pingCases(), reservedBitCases(), opcodeCases(), fragmentCases(),
		utf8Cases(), closeCases(), largeCases(), miscCases())
}

// played is a case whose script is small enough to be built at once.
func played(id, what string, code int, want []served, input ...string) conformanceCase {
	sc := script{input: strings.Join(input, ""), want: want, code: code}
	return conformanceCase{id: id, what: what, make: func() script { return sc }}
}

func echoed(first byte, payloads ...string) []served {
	var list []served
	for _, p := range payloads {
		list = append(list, served{first, p})
	}
	return list
}

func pongs(payloads ...string) []served { return echoed(fin|opPong, payloads...) }
func texts(payloads ...string) []served { return echoed(fin|opText, payloads...) }

func withChop(list []conformanceCase, c chop) []conformanceCase {
	for i := range list {
		list[i].chops = append(list[i].chops, c)
	}
	return list
}

const hello = "Hello, world!"

// 1: messages in one frame, at the bounds of the three forms of length.
func framingCases() []conformanceCase {
	var list []conformanceCase
	for group, op := range []byte{opText, opBin} {
		for i, n := range []int{0, 125, 126, 127, 128, 65535, 65536, 65536} {
			fill := "*"
			if op == opBin {
				fill = "\xfe"
			}
			payload := strings.Repeat(fill, n)
			c := played(fmt.Sprintf("1.%d.%d", group+1, i+1), fmt.Sprintf("%d bytes", n), 0,
				echoed(fin|op, payload), wire(fin|op, payload))
			if i == 7 {
				c.chops = []chop{{"997 bytes", func(s string) []string { return pieces(s, 997) }}}
			}
			list = append(list, c)
		}
	}
	return withChop(list, blocksChop)
}

// 2: pings are answered with what they carry, pongs are not.
func pingCases() []conformanceCase {
	ten := func() (in string, want []string) {
		for i := range 10 {
			p := fmt.Sprintf("payload-%d", i)
			in, want = in+wire(fin|opPing, p), append(want, p)
		}
		return in, want
	}
	in, want := ten()
	long := strings.Repeat("\xfe", 125)
	return []conformanceCase{
		played("2.1", "a ping without payload", 0, pongs(""), wire(fin|opPing, "")),
		played("2.2", "a ping with text", 0, pongs(hello), wire(fin|opPing, hello)),
		played("2.3", "a ping with bytes that are no text", 0, pongs("\x00\xff\xfe\xfd\xfc\xfb\x00\xff"),
			wire(fin|opPing, "\x00\xff\xfe\xfd\xfc\xfb\x00\xff")),
		played("2.4", "a ping of 125 bytes", 0, pongs(long), wire(fin|opPing, long)),
		played("2.5", "a ping of 126 bytes", 1002, nil, wire(fin|opPing, long+"\xfe")),
		played("2.6", "a ping of 125 bytes, then another", 0, pongs(long, "x"), wire(fin|opPing, long), wire(fin|opPing, "x")),
		played("2.7", "a pong nobody asked for", 0, nil, wire(fin|opPong, "")),
		played("2.8", "the same with a payload", 0, nil, wire(fin|opPong, "unsolicited")),
		played("2.9", "the same, then a ping", 0, pongs("ping"), wire(fin|opPong, "unsolicited"), wire(fin|opPing, "ping")),
		played("2.10", "ten pings", 0, pongs(want...), in),
		played("2.11", "ten pings about a message", 0, append(append(pongs(want...), texts(hello)...), pongs(want...)...),
			in, wire(fin|opText, hello), in),
	}
}

// 3: reserved bits without an extension.
func reservedBitCases() []conformanceCase {
	return []conformanceCase{
		played("3.1", "a text with RSV3", 1002, nil, wire(fin|0x10|opText, hello)),
		played("3.2", "a text, one with RSV2, a ping", 1002, texts(hello),
			wire(fin|opText, hello), wire(fin|0x20|opText, hello), wire(fin|opPing, "")),
		played("3.3", "a text, one with RSV2 and 3, a ping", 1002, texts(hello),
			wire(fin|opText, hello), wire(fin|0x30|opText, hello), wire(fin|opPing, "")),
		played("3.4", "a text, one with RSV1, a ping", 1002, texts(hello),
			wire(fin|opText, hello), wire(fin|0x40|opText, hello), wire(fin|opPing, "")),
		played("3.5", "bytes with RSV1 and 3", 1002, nil, wire(fin|0x50|opBin, "\x00\xff")),
		played("3.6", "a ping with RSV1 and 2", 1002, nil, wire(fin|0x60|opPing, hello)),
		played("3.7", "a close with all three", 1002, nil, wire(fin|0x70|opClose, "\x03\xe8")),
	}
}

// 4: reserved opcodes, alone or behind a message; what follows is not looked at.
func opcodeCases() []conformanceCase {
	var list []conformanceCase
	for group, base := range []byte{3, 11} {
		for i := range byte(5) {
			op, payload := base+i, ""
			if i%2 == 1 || i == 4 {
				payload = "reserved opcode payload"
			}
			var want []served
			in := wire(fin|op, payload)
			if i >= 2 {
				want = texts(hello)
				in = wire(fin|opText, hello) + in + wire(fin|opPing, "")
			}
			list = append(list, played(fmt.Sprintf("4.%d.%d", group+1, i+1), fmt.Sprintf("opcode %d", op), 1002, want, in))
		}
	}
	return list
}

// 5: fragments.
func fragmentCases() []conformanceCase {
	const one, two = "fragment1", "fragment2"
	both := wire(opText, one) + wire(fin|opCont, two)
	around := wire(opText, one) + wire(fin|opPing, "ping payload") + wire(fin|opCont, two)
	aroundWant := append(pongs("ping payload"), texts(one+two)...)
	five := wire(opText, "fragment1") + wire(opCont, "fragment2") + wire(fin|opPing, "pongme 1!") +
		wire(opCont, "fragment3") + wire(opCont, "fragment4") + wire(fin|opPing, "pongme 2!") + wire(fin|opCont, "fragment5")
	fiveWant := append(pongs("pongme 1!", "pongme 2!"), texts("fragment1fragment2fragment3fragment4fragment5")...)
	frames := func(list ...string) chop { return chop{"by frames", func(string) []string { return list }} }
	list := []conformanceCase{
		played("5.1", "a ping in two fragments", 1002, nil, wire(opPing, one), wire(fin|opCont, two)),
		played("5.2", "a pong in two fragments", 1002, nil, wire(opPong, one), wire(fin|opCont, two)),
		played("5.3", "a text in two fragments", 0, texts(one+two), both),
		played("5.4", "the same by frames", 0, texts(one+two), both),
		played("5.5", "the same and a second message", 0, texts(one+two, hello), both, wire(fin|opText, hello)),
		played("5.6", "a ping between two fragments", 0, aroundWant, around),
		played("5.7", "the same by frames", 0, aroundWant, around),
		played("5.8", "the same twice", 0, append(aroundWant[:2:2], aroundWant...), around, around),
		played("5.9", "a last fragment of nothing, then a text", 1002, nil, wire(fin|opCont, one), wire(fin|opText, hello)),
		played("5.10", "the same behind a message", 1002, texts(hello), wire(fin|opText, hello), wire(fin|opCont, one), wire(fin|opText, hello)),
		played("5.11", "the same, without payload", 1002, nil, wire(fin|opCont, ""), wire(fin|opText, hello)),
		played("5.12", "a fragment of nothing, then a text", 1002, nil, wire(opCont, one), wire(fin|opText, hello)),
		played("5.13", "the same behind a message", 1002, texts(hello), wire(fin|opText, hello), wire(opCont, one), wire(fin|opText, hello)),
		played("5.14", "the same, without payload", 1002, nil, wire(opCont, ""), wire(fin|opText, hello)),
		played("5.15", "a message in two fragments, a fragment of nothing, a text", 1002, texts(one+two),
			both, wire(opCont, "fragment3"), wire(fin|opText, "fragment4")),
		played("5.16", "a fragment of nothing before a fragmented text, twice", 1002, nil,
			strings.Repeat(wire(opCont, one)+wire(opText, two)+wire(fin|opCont, "fragment3"), 2)),
		played("5.17", "the same with a last fragment", 1002, nil,
			strings.Repeat(wire(fin|opCont, one)+wire(opText, two)+wire(fin|opCont, "fragment3"), 2)),
		played("5.18", "two fragments that both begin a text", 1002, nil, wire(opText, one), wire(fin|opText, two)),
		played("5.19", "five fragments and two pings", 0, fiveWant, five),
		played("5.20", "the same by frames", 0, fiveWant, five),
	}
	for i := range list {
		switch list[i].id {
		case "5.4":
			list[i].chops = []chop{frames(wire(opText, one), wire(fin|opCont, two))}
		case "5.7":
			list[i].chops = []chop{frames(wire(opText, one), wire(fin|opPing, "ping payload"), wire(fin|opCont, two))}
		case "5.20":
			list[i].chops = []chop{{"cut at the pings", func(s string) []string { return strings.SplitAfter(s, wire(fin|opPing, "pongme 1!")) }}}
		}
	}
	return withChop(list, blocksChop)
}

// utf8Text is a payload and whether it is UTF-8.
type utf8Text struct {
	valid bool
	text  string
}

// 6: text is UTF-8, and refused where it cannot be any more.
func utf8Cases() []conformanceCase {
	const (
		greek   = "\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5" // κόσμε
		invalid = greek + "\xed\xa0\x80" + "edited"
		mixed   = "Hello-\xc2\xb5@\xc3\x9f\xc3\xb6\xc3\xa4\xc3\xbc\xc3\xa0\xc3\xa1-UTF-8!!"
		beyond  = greek + "\xf4\x90\x80\x80" + "edited"
		dead    = len(greek) + 2 // bytes until no code point can be meant: f4 90
	)
	list := []conformanceCase{
		played("6.1.1", "an empty text", 0, texts(""), wire(fin|opText, "")),
		played("6.1.2", "three empty fragments", 0, texts(""), wire(opText, ""), wire(opCont, ""), wire(fin|opCont, "")),
		played("6.1.3", "an empty, a full and an empty fragment", 0, texts("middle frame payload"),
			wire(opText, ""), wire(opCont, "middle frame payload"), wire(fin|opCont, "")),
		played("6.2.1", "UTF-8 in one frame", 0, texts(mixed), wire(fin|opText, mixed)),
		played("6.2.2", "in two, between two characters", 0, texts(mixed), wireMessage(opText, mixed, len("Hello-\xc2\xb5@\xc3\x9f\xc3\xb6"))),
		played("6.2.3", "in fragments of a byte", 0, texts(mixed), wireMessage(opText, mixed, 1)),
		played("6.2.4", "Greek in fragments of a byte", 0, texts(greek), wireMessage(opText, greek, 1)),
		played("6.3.1", "a surrogate in one frame", 1007, nil, wire(fin|opText, invalid)),
		played("6.3.2", "in fragments of a byte", 1007, nil, wireMessage(opText, invalid, 1)),
		// The message is not finished in these: the server must not wait for the rest.
		played("6.4.1", "a fragment beyond U+10FFFF", 1007, nil, wire(opText, greek), wire(opCont, "\xf4\x90\x80\x80")),
		played("6.4.2", "a fragment up to the byte that cannot be", 1007, nil, wire(opText, greek+"\xf4"), wire(opCont, "\x90")),
		played("6.4.3", "a frame up to behind the character beyond", 1007, nil, wireHead(fin|opText, len(beyond)), wireMasked(beyond[:dead+2])),
		played("6.4.4", "a frame up to the byte that cannot be", 1007, nil, wireHead(fin|opText, len(beyond)), wireMasked(beyond[:dead])),
	}
	for group, texts := range utf8Tables() {
		for i, x := range texts {
			list = append(list, utf8Case(fmt.Sprintf("6.%d.%d", group+5, i+1), x))
		}
	}
	return withChop(list, blocksChop)
}

// utf8Case sends a text in one frame, then in fragments of a byte; what is invalid comes in an
// unfinished frame as well, up to the byte that tells.
func utf8Case(id string, x utf8Text) conformanceCase {
	code := 1007
	var want []served
	if x.valid {
		code, want = 0, texts(x.text)
	}
	c := played(id, fmt.Sprintf("%x", x.text), code, want, wire(fin|opText, x.text))
	c.chops = []chop{{"fragments of a byte", func(string) []string { return []string{wireMessage(opText, x.text, 1)} }}}
	if dead := utf8Dead(x.text); dead >= 0 {
		c.chops = append(c.chops, chop{"unfinished", func(string) []string {
			return []string{wireHead(fin|opText, len(x.text)+100), wireMasked(x.text[:dead+1])}
		}})
	}
	return c
}

// utf8Tables are the groups 6.5 to 6.23, after Markus Kuhn's stress test for decoders.
func utf8Tables() [][]utf8Text {
	valid := func(list ...string) (t []utf8Text) {
		for _, s := range list {
			t = append(t, utf8Text{true, s})
		}
		return t
	}
	invalid := func(list ...string) (t []utf8Text) {
		for _, s := range list {
			t = append(t, utf8Text{false, s})
		}
		return t
	}
	// Every beginning of a text with characters of two and three bytes.
	const greek = "\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5"
	var prefixes []utf8Text
	for n := 1; n <= len(greek); n++ {
		ends := n == 2 || n == 5 || n == 7 || n == 9 || n == 11
		prefixes = append(prefixes, utf8Text{ends, greek[:n]})
	}
	var continuations string
	for c := 0x80; c <= 0xbf; c++ {
		continuations += string([]byte{byte(c)})
	}
	var lonely []string // lead bytes with a space behind each
	for _, r := range [][2]int{{0xc0, 0xdf}, {0xe0, 0xef}, {0xf0, 0xf7}, {0xf8, 0xfb}, {0xfc, 0xfd}} {
		var s string
		for c := r[0]; c <= r[1]; c++ {
			s += string([]byte{byte(c), ' '})
		}
		lonely = append(lonely, s)
	}
	lastMissing := []string{"\xc0", "\xe0\x80", "\xf0\x80\x80", "\xf8\x80\x80\x80", "\xfc\x80\x80\x80\x80",
		"\xdf", "\xef\xbf", "\xf7\xbf\xbf", "\xfb\xbf\xbf\xbf", "\xfd\xbf\xbf\xbf\xbf"}
	// The last two code points of each plane are no characters, but valid.
	nonCharacters := []string{"\xef\xbf\xbe", "\xef\xbf\xbf"}
	for plane := 1; plane <= 16; plane++ {
		lead, second := byte(0xf0+plane>>2), byte(0x80|plane&3<<4|0x0f)
		nonCharacters = append(nonCharacters,
			string([]byte{lead, second, 0xbf, 0xbe}), string([]byte{lead, second, 0xbf, 0xbf}))
	}
	return [][]utf8Text{
		valid("hello\x24world", "hello\xc2\xa2world", "hello\xe2\x82\xacworld", "hello\xf0\xa4\xad\xa2world", greek),
		prefixes,
		valid("\x00", "\xc2\x80", "\xe0\xa0\x80", "\xf0\x90\x80\x80"),                   // the first of each length
		invalid("\xf8\x88\x80\x80\x80", "\xfc\x84\x80\x80\x80\x80"),                     // of 5 and 6
		valid("\x7f", "\xdf\xbf", "\xef\xbf\xbf", "\xf4\x8f\xbf\xbf"),                   // the last of each length
		invalid("\xf7\xbf\xbf\xbf", "\xfb\xbf\xbf\xbf\xbf", "\xfd\xbf\xbf\xbf\xbf\xbf"), // of 4, 5 and 6 bits beyond
		append(valid("\xed\x9f\xbf", "\xee\x80\x80", "\xef\xbf\xbd", "\xf4\x8f\xbf\xbf"), invalid("\xf4\x90\x80\x80")...),
		invalid("\x80", "\xbf", "\x80\xbf", "\x80\xbf\x80", "\x80\xbf\x80\xbf", "\x80\xbf\x80\xbf\x80", "\x80\xbf\x80\xbf\x80\xbf", continuations),
		invalid(lonely...),
		invalid(lastMissing...),
		invalid(strings.Join(lastMissing, "")),
		invalid("\xfe", "\xff", "\xfe\xfe\xff\xff"),
		invalid("\xc0\xaf", "\xe0\x80\xaf", "\xf0\x80\x80\xaf", "\xf8\x80\x80\x80\xaf", "\xfc\x80\x80\x80\x80\xaf"),             // a slash, overlong
		invalid("\xc1\xbf", "\xe0\x9f\xbf", "\xf0\x8f\xbf\xbf", "\xf8\x87\xbf\xbf\xbf", "\xfc\x83\xbf\xbf\xbf\xbf"),             // the largest overlong
		invalid("\xc0\x80", "\xe0\x80\x80", "\xf0\x80\x80\x80", "\xf8\x80\x80\x80\x80", "\xfc\x80\x80\x80\x80\x80"),             // NUL, overlong
		invalid("\xed\xa0\x80", "\xed\xad\xbf", "\xed\xae\x80", "\xed\xaf\xbf", "\xed\xb0\x80", "\xed\xbe\x80", "\xed\xbf\xbf"), // surrogates
		invalid("\xed\xa0\x80\xed\xb0\x80", "\xed\xa0\x80\xed\xbf\xbf", "\xed\xad\xbf\xed\xb0\x80", "\xed\xad\xbf\xed\xbf\xbf",
			"\xed\xae\x80\xed\xb0\x80", "\xed\xae\x80\xed\xbf\xbf", "\xed\xaf\xbf\xed\xb0\x80", "\xed\xaf\xbf\xed\xbf\xbf"),
		valid(nonCharacters...),
		valid("\xef\xbf\xb9", "\xef\xbf\xba", "\xef\xbf\xbb", "\xef\xbf\xbc", "\xef\xbf\xbd", "\xef\xbf\xbe", "\xef\xbf\xbf"), // specials
	}
}

// 7: closing.
func closeCases() []conformanceCase {
	big := strings.Repeat("BAsd7&jh23", 26_215) // 256 KiB
	reason := strings.Repeat("*", 123)
	list := []conformanceCase{
		played("7.1.1", "a message, then a close", 1000, texts(hello), wire(fin|opText, hello), wireClose(1000, "")),
		played("7.1.2", "two closes", 1000, nil, wireClose(1000, ""), wireClose(1000, "")),
		played("7.1.3", "a ping after the close", 1000, nil, wireClose(1000, ""), wire(fin|opPing, "")),
		played("7.1.4", "a message after the close", 1000, nil, wireClose(1000, ""), wire(fin|opText, hello)),
		played("7.1.5", "a close within a message, then its end", 1000, nil,
			wire(opText, "fragment1"), wireClose(1000, ""), wire(fin|opCont, "fragment2")),
		played("7.1.6", "256 KiB, a message, a close, a ping", 1000, texts(big, hello),
			wire(fin|opText, big), wire(fin|opText, hello), wireClose(1000, ""), wire(fin|opPing, "")),
		played("7.3.1", "no payload", noStatus, nil, wireClose(0, "")),
		played("7.3.2", "a payload of one byte", 1002, nil, wire(fin|opClose, "a")),
		played("7.3.3", "only a code", 1000, nil, wireClose(1000, "")),
		played("7.3.4", "a code and a reason", 1000, nil, wireClose(1000, hello)),
		played("7.3.5", "the longest reason", 1000, nil, wireClose(1000, reason)),
		played("7.3.6", "a reason one byte longer", 1002, nil, wireClose(1000, reason+"*")),
		played("7.5.1", "a reason that is no UTF-8", 1007, nil,
			wireClose(1000, "\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited")),
	}
	for i, code := range []int{1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999} {
		list = append(list, played(fmt.Sprintf("7.7.%d", i+1), fmt.Sprint(code), code, nil, wireClose(code, "")))
	}
	for i, code := range []int{0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999} {
		payload := string([]byte{byte(code >> 8), byte(code)})
		list = append(list, played(fmt.Sprintf("7.9.%d", i+1), fmt.Sprint(code), 1002, nil, wire(fin|opClose, payload)))
	}
	return append(list, // the suite leaves open what becomes of these two
		played("7.13.1", "5000", 1002, nil, wireClose(5000, "")),
		played("7.13.2", "65535", 1002, nil, wireClose(65535, "")),
		// What the registry of codes has had since the suite was written, and the one for TLS alone.
		played("7.7.14", "1012", 1012, nil, wireClose(1012, "")),
		played("7.7.15", "1013", 1013, nil, wireClose(1013, "")),
		played("7.7.16", "1014", 1014, nil, wireClose(1014, "")),
		played("7.9.10", "1015", 1002, nil, wireClose(1015, "")),
	)
}

// 9: large messages, in frames and in writes of many sizes, and many messages.
func largeCases() []conformanceCase {
	var list []conformanceCase
	const ki, mi = 1 << 10, 1 << 20
	for kind, op := range []byte{opText, opBin} {
		fill := "BAsd7&jh"
		if op == opBin {
			fill = "\x00\xfe\x23\xfa\xf0\x80\xff\xc0"
		}
		large := func(id, what string, size, frame int) conformanceCase {
			return conformanceCase{id: id, what: what, make: func() script {
				payload := strings.Repeat(fill, size/len(fill))
				return script{input: wireMessage(op, payload, frame), want: echoed(fin|op, payload)}
			}}
		}
		for i, size := range []int{64 * ki, 256 * ki, mi, 4 * mi, 8 * mi, 16 * mi} {
			list = append(list, large(fmt.Sprintf("9.%d.%d", kind+1, i+1), fmt.Sprintf("%d KiB", size/ki), size, 0))
		}
		for i, frame := range []int{64, 256, ki, 4 * ki, 16 * ki, 64 * ki, 256 * ki, mi, 4 * mi} {
			list = append(list, large(fmt.Sprintf("9.%d.%d", kind+3, i+1), fmt.Sprintf("4 MiB in frames of %d", frame), 4*mi, frame))
		}
		for i, size := range []int{64, 128, 256, 512, ki, 2 * ki} {
			c := large(fmt.Sprintf("9.%d.%d", kind+5, i+1), fmt.Sprintf("1 MiB in writes of %d", size), mi, 0)
			c.chops = []chop{{"in writes", func(s string) []string { return pieces(s, size) }}}
			list = append(list, c)
		}
		for i, size := range []int{0, 16, 64, 256, ki, 4 * ki} {
			list = append(list, conformanceCase{id: fmt.Sprintf("9.%d.%d", kind+7, i+1),
				what: fmt.Sprintf("1000 messages of %d bytes", size), make: func() script {
					payload := strings.Repeat(fill, size/len(fill))
					return script{input: strings.Repeat(wire(fin|op, payload), 1000), want: slices.Repeat(echoed(fin|op, payload), 1000)}
				}})
		}
	}
	return withChop(list, blocksChop)
}

// 10: a large message in frames of an odd size.
func miscCases() []conformanceCase {
	payload := strings.Repeat("*", 64<<10)
	return []conformanceCase{played("10.1.1", "64 KiB in frames of 1300", 0, texts(payload), wireMessage(opText, payload, 1300))}
}
