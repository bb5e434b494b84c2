package codec

import (
	"bytes"
	"encoding/json"
	"unicode/utf8"
)

// maxDepth bounds the nesting of JSON that is accepted.
const maxDepth = 64

// skipSpace returns the index of the first byte at or after i that is not JSON white space.
func skipSpace(b []byte, i int) int {
	for i < len(b) && (b[i] == ' ' || b[i] == '\t' || b[i] == '\n' || b[i] == '\r') {
		i++
	}
	return i
}

// scanString checks the string whose opening quote is b[i] and returns the index behind its closing
// quote, or -1. escaped tells whether it holds escapes.
func scanString(b []byte, i int) (end int, escaped bool) {
	for i = skipText(b, i+1); i < len(b); i = skipText(b, i+1) {
		switch b[i] {
		case '"':
			return i + 1, escaped
		case '\\':
			escaped = true
			i++
			if i >= len(b) {
				return -1, false
			}
			switch b[i] {
			case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
			case 'u':
				if i+4 >= len(b) || !isHex(b[i+1:i+5]) {
					return -1, false
				}
				i += 4
			default:
				return -1, false
			}
		default:
			return -1, false
		}
	}
	return -1, false
}

func isHex(b []byte) bool {
	for _, c := range b {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') && (c < 'A' || c > 'F') {
			return false
		}
	}
	return true
}

func scanDigits(b []byte, i int) int {
	for i < len(b) && b[i] >= '0' && b[i] <= '9' {
		i++
	}
	return i
}

// scanNumber returns the index behind the number that begins at b[i], or -1 (RFC 8259, section 6).
func scanNumber(b []byte, i int) int {
	if i < len(b) && b[i] == '-' {
		i++
	}
	switch end := scanDigits(b, i); {
	case end == i, b[i] == '0' && end > i+1:
		return -1
	default:
		i = end
	}
	if i < len(b) && b[i] == '.' {
		end := scanDigits(b, i+1)
		if end == i+1 {
			return -1
		}
		i = end
	}
	if i < len(b) && (b[i] == 'e' || b[i] == 'E') {
		i++
		if i < len(b) && (b[i] == '+' || b[i] == '-') {
			i++
		}
		end := scanDigits(b, i)
		if end == i {
			return -1
		}
		i = end
	}
	return i
}

func scanLiteral(b []byte, i int, literal string) int {
	if len(b)-i < len(literal) || string(b[i:i+len(literal)]) != literal {
		return -1
	}
	return i + len(literal)
}

// scanValue checks the JSON value that begins at b[i] and returns the index behind it, or -1 when
// it is not valid JSON or nested deeper than maxDepth. UTF-8 is the caller's to check.
func scanValue(b []byte, i, depth int) int {
	if i >= len(b) {
		return -1
	}
	switch b[i] {
	case '"':
		end, _ := scanString(b, i)
		return end
	case '{':
		o := newObject(b, i, depth)
		for o.next() {
		}
		return o.end()
	case '[':
		return scanArray(b, i, depth)
	case 't':
		return scanLiteral(b, i, "true")
	case 'f':
		return scanLiteral(b, i, "false")
	case 'n':
		return scanLiteral(b, i, "null")
	default:
		return scanNumber(b, i)
	}
}

func scanArray(b []byte, i, depth int) int {
	if depth >= maxDepth {
		return -1
	}
	i = skipSpace(b, i+1)
	if i < len(b) && b[i] == ']' {
		return i + 1
	}
	for {
		if i = scanValue(b, i, depth+1); i < 0 {
			return -1
		}
		i = skipSpace(b, i)
		if i >= len(b) {
			return -1
		}
		switch b[i] {
		case ',':
			i = skipSpace(b, i+1)
		case ']':
			return i + 1
		default:
			return -1
		}
	}
}

// object walks the fields of a JSON object; each value is checked whole. Usage:
//
//	o := newObject(b, i, 0)
//	for o.next() { ... o.key ... o.value ... }
//	if o.end() < 0 { not valid }
type object struct {
	b      []byte
	i      int // index behind what has been read; -1: not valid
	depth  int
	closed bool
	opened bool

	key        []byte // between the quotes; escapes are left as they are
	keyEscaped bool
	value      []byte
}

// newObject begins at the opening brace b[i].
func newObject(b []byte, i, depth int) object {
	if i >= len(b) || b[i] != '{' || depth >= maxDepth {
		return object{i: -1}
	}
	return object{b: b, i: i + 1, depth: depth}
}

func (o *object) fail() bool {
	o.i = -1
	return false
}

// next reads one field.
func (o *object) next() bool {
	if o.i < 0 || o.closed {
		return false
	}
	i := skipSpace(o.b, o.i)
	if i >= len(o.b) {
		return o.fail()
	}
	switch {
	case o.b[i] == '}':
		o.i, o.closed = i+1, true
		return false
	case !o.opened:
		o.opened = true
	case o.b[i] == ',':
		i = skipSpace(o.b, i+1)
	default:
		return o.fail()
	}
	if i >= len(o.b) || o.b[i] != '"' {
		return o.fail()
	}
	end, escaped := scanString(o.b, i)
	if end < 0 {
		return o.fail()
	}
	o.key, o.keyEscaped = o.b[i+1:end-1], escaped
	i = skipSpace(o.b, end)
	if i >= len(o.b) || o.b[i] != ':' {
		return o.fail()
	}
	i = skipSpace(o.b, i+1)
	end = scanValue(o.b, i, o.depth+1)
	if end < 0 {
		return o.fail()
	}
	o.value, o.i = o.b[i:end], end
	return true
}

// end is the index behind the closing brace, or -1 when the object is not valid or not finished.
func (o *object) end() int {
	if !o.closed {
		return -1
	}
	return o.i
}

// is tells whether the field's key is name. A key written with escapes is compared unescaped.
func (o *object) is(name string) bool {
	if !o.keyEscaped {
		return string(o.key) == name
	}
	s, ok := unquote(o.b[:0:0], o.key)
	return ok && string(s) == name
}

// topObject begins the object that is the whole of b, white space around it apart.
func topObject(b []byte) object { return newObject(b, skipSpace(b, 0), 0) }

// endsHere tells whether nothing but white space follows the object that began the document.
func (o *object) endsHere() bool {
	return o.end() >= 0 && skipSpace(o.b, o.end()) == len(o.b)
}

// stringValue returns the text of a JSON string: a span of it when it holds no escapes, else a copy.
// ok is false when value is not a string.
func stringValue(value []byte) (s []byte, ok bool) {
	if len(value) < 2 || value[0] != '"' {
		return nil, false
	}
	inner := value[1 : len(value)-1]
	if bytes.IndexByte(inner, '\\') >= 0 {
		return unquote(nil, inner)
	}
	return inner, true
}

// unquote appends the text of a string's inner bytes, escapes resolved.
func unquote(dst, inner []byte) ([]byte, bool) {
	quoted := make([]byte, 0, len(inner)+2)
	quoted = append(append(append(quoted, '"'), inner...), '"')
	var s string
	if err := json.Unmarshal(quoted, &s); err != nil {
		return nil, false
	}
	return append(dst, s...), true
}

// maxQuotedDigits bounds a number that is written as a string, so that every one of them fits.
const maxQuotedDigits = 18

// intValue reads a JSON number as milliseconds or a counter; fractions are cut off, and anything that
// does not fit is refused. A string of digits counts too: some clients write 64-bit numbers so.
func intValue(value []byte) (n int64, ok bool) {
	s, quoted := stringValue(value)
	if quoted {
		value = s
	}
	neg := len(value) > 0 && value[0] == '-'
	if neg {
		value = value[1:]
	}
	if len(value) == 0 || quoted && len(value) > maxQuotedDigits {
		return 0, false
	}
	for i, c := range value {
		if c < '0' || c > '9' {
			if quoted {
				return 0, false
			}
			return slowInt(value, neg, i)
		}
		if n > (1<<63-1-9)/10 {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	if neg {
		n = -n
	}
	return n, true
}

// slowInt reads numbers with a fraction or an exponent.
func slowInt(value []byte, neg bool, digits int) (int64, bool) {
	if digits == 0 {
		return 0, false
	}
	var f float64
	if err := json.Unmarshal(value, &f); err != nil || f >= 1<<63 {
		return 0, false
	}
	if neg {
		f = -f
	}
	return int64(f), true
}

// AppendQuoted appends s as a JSON string. Bytes that are not UTF-8 become U+FFFD; U+2028 and
// U+2029 are escaped, for pages that evaluate JSON as JavaScript.
func AppendQuoted[T string | []byte](dst []byte, s T) []byte {
	switch s := any(s).(type) {
	case string:
		return appendQuoted(dst, view(s))
	case []byte:
		return appendQuoted(dst, s)
	}
	return dst // there is no third type
}

func appendQuoted(dst, s []byte) []byte {
	dst = append(dst, '"')
	start := 0
	for i := skipASCII(s, 0); i < len(s); i = skipASCII(s, i) {
		c := s[i]
		if c >= utf8.RuneSelf {
			r, size := utf8.DecodeRune(s[i:])
			switch {
			case r == utf8.RuneError && size == 1:
				dst = append(append(dst, s[start:i]...), `\ufffd`...)
			case r == 0x2028 || r == 0x2029:
				dst = append(append(dst, s[start:i]...), `\u202`...)
				dst = append(dst, hexDigits[r&15])
			default:
				i += size
				continue
			}
			i += size
			start = i
			continue
		}
		dst = append(dst, s[start:i]...)
		switch c {
		case '"', '\\':
			dst = append(dst, '\\', c)
		case '\n':
			dst = append(dst, '\\', 'n')
		case '\r':
			dst = append(dst, '\\', 'r')
		case '\t':
			dst = append(dst, '\\', 't')
		default:
			dst = append(dst, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		}
		i++
		start = i
	}
	return append(append(dst, s[start:]...), '"')
}
