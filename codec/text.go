package codec

import (
	"encoding/binary"
	"math/bits"
	"unsafe"
)

// view is the bytes of s, to be read only.
func view(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) } // #nosec G103 -- only read

const (
	everyByte = 0x0101010101010101
	highBits  = 0x8080808080808080
)

// marks sets the top bit of each byte of w that is below 0x20, a quote or a backslash. Bytes above
// the lowest such one may be marked wrongly.
func marks(w uint64) uint64 {
	quote := w ^ everyByte*'"'
	slash := w ^ everyByte*'\\'
	return ((w-everyByte*0x20)&^w | (quote-everyByte)&^quote | (slash-everyByte)&^slash) & highBits
}

// skipText returns the index of the first byte at or after i that is a control character, a quote
// or a backslash; len(b) when there is none.
func skipText(b []byte, i int) int {
	for ; i+8 <= len(b); i += 8 {
		if m := marks(binary.LittleEndian.Uint64(b[i:])); m != 0 {
			return i + bits.TrailingZeros64(m)>>3
		}
	}
	for ; i < len(b); i++ {
		if c := b[i]; c < 0x20 || c == '"' || c == '\\' {
			return i
		}
	}
	return i
}

// skipASCII is skipText that stops at bytes above ASCII as well.
func skipASCII(b []byte, i int) int {
	for ; i+8 <= len(b); i += 8 {
		w := binary.LittleEndian.Uint64(b[i:])
		if m := marks(w) | w&highBits; m != 0 {
			return i + bits.TrailingZeros64(m)>>3
		}
	}
	for ; i < len(b); i++ {
		if c := b[i]; c < 0x20 || c >= 0x80 || c == '"' || c == '\\' {
			return i
		}
	}
	return i
}

const hexDigits = "0123456789abcdef"

// appendHex64 appends v as 16 hex digits.
func appendHex64(dst []byte, v uint64) []byte {
	var text [16]byte
	for i := range text {
		text[i] = hexDigits[v>>(60-4*i)&15]
	}
	return append(dst, text[:]...)
}
