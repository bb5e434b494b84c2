package codec

// SessionID names one session inside this process, and the connection that carries it: the shard
// that owns the session, the event loop that owns the connection, the slot that the loop gave it
// (slots are numbered per shard and loop, from 0) and the generation of that slot. A late message
// for a session that has ended carries an old generation and is recognised by it. The zero value
// names no session: generations start at 1.
type SessionID uint64

// The widths of a SessionID's parts, in bits.
const (
	shardBits      = 8
	loopBits       = 8
	indexBits      = 24
	generationBits = 24
)

// Limits that follow from the layout of a SessionID.
const (
	MaxShards     = 1 << shardBits
	MaxLoops      = 1 << loopBits
	MaxIndex      = 1<<indexBits - 1
	MaxGeneration = 1<<generationBits - 1
)

// MakeSessionID composes an id; every part must lie within its limit.
func MakeSessionID(shard, loop int, index, generation uint32) SessionID {
	return SessionID(uint64(shard)<<(loopBits+indexBits+generationBits) |
		uint64(loop)<<(indexBits+generationBits) |
		uint64(index)<<generationBits | uint64(generation))
}

// Shard is the shard that owns the session.
func (id SessionID) Shard() int { return int(id >> (loopBits + indexBits + generationBits)) }

// Loop is the event loop that owns the connection.
func (id SessionID) Loop() int { return int(id>>(indexBits+generationBits)) & (MaxLoops - 1) }

// Index is the slot in the table that the shard and the loop share.
func (id SessionID) Index() uint32 { return uint32(id>>generationBits) & MaxIndex }

// Generation tells apart the sessions that used one slot after another.
func (id SessionID) Generation() uint32 { return uint32(id) & MaxGeneration }

const (
	nameAlphabet = "0123456789abcdefghjkmnpqrstvwxyz" // Crockford's base 32, lower case
	nameHalf     = 13                                 // digits of 5 bits for 64 bits
	nameLen      = 2 * nameHalf
)

// AppendName appends the session's public name, 26 characters that no other session of any
// gateway has: the process's random nonce, then the id. Nothing needs to be stored to form it.
func (id SessionID) AppendName(dst []byte, nonce uint64) []byte {
	dst = appendBase32(dst, nonce)
	return appendBase32(dst, uint64(id))
}

// Name is AppendName as a string.
func (id SessionID) Name(nonce uint64) string {
	return string(id.AppendName(make([]byte, 0, nameLen), nonce))
}

// ParseSessionName reverses Name; ok is false when name was not formed with this nonce.
func ParseSessionName(name string, nonce uint64) (id SessionID, ok bool) {
	if len(name) != nameLen {
		return 0, false
	}
	n, ok1 := parseBase32(name[:nameHalf])
	v, ok2 := parseBase32(name[nameHalf:])
	if !ok1 || !ok2 || n != nonce {
		return 0, false
	}
	return SessionID(v), true
}

func appendBase32(dst []byte, v uint64) []byte {
	var text [nameHalf]byte
	for i := range text {
		text[i] = nameAlphabet[v>>(60-5*i)&31]
	}
	return append(dst, text[:]...)
}

func parseBase32(s string) (v uint64, ok bool) {
	for i := range len(s) {
		d := indexByte(nameAlphabet, s[i])
		if d < 0 || (i == 0 && d > 15) {
			return 0, false
		}
		v = v<<5 | uint64(d)
	}
	return v, true
}

func indexByte(s string, c byte) int {
	for i := range len(s) {
		if s[i] == c {
			return i
		}
	}
	return -1
}
