package codec

import "math/rand/v2"

const (
	// MessageIDLen is the length of a message_id that a gateway makes: a ULID.
	MessageIDLen = 26
	ulidAlphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ" // Crockford's base 32
)

// ulidSource makes ULIDs that rise: within one millisecond each is a random step above the one
// before, and a clock that goes back keeps the last time. It belongs to one goroutine.
type ulidSource struct {
	random *rand.ChaCha8
	lastMS int64
	high   uint16 // of the 80 random bits
	low    uint64
}

// append appends the text of the next ULID of the time now, Unix ms.
func (s *ulidSource) append(dst []byte, now int64) []byte {
	r := s.random.Uint64()
	if now > s.lastMS {
		s.lastMS = now
		s.high, s.low = uint16(r)>>1, s.random.Uint64() // the top bit is room for steps
	} else {
		low := s.low
		s.low += r>>32 + 1
		if s.low < low {
			s.high++ // 2^79 ids within one millisecond do not come
		}
	}
	ms := uint64(s.lastMS)
	// 48 bits of time and 80 random ones, 5 to a digit, the first digit of 3.
	var text [MessageIDLen]byte
	for i := range 10 {
		text[i] = ulidAlphabet[ms>>(45-5*i)&31]
	}
	top := uint64(s.high)<<24 | s.low>>40 // 40 bits: 8 digits
	rest := s.low & (1<<40 - 1)           // 40 bits: 8 digits
	for i := range 8 {
		text[10+i] = ulidAlphabet[top>>(35-5*i)&31]
		text[18+i] = ulidAlphabet[rest>>(35-5*i)&31]
	}
	return append(dst, text[:]...)
}
