package bench

import (
	"fmt"
	"strconv"
)

// entry is one message that a run sent: what it is owed and what has come.
type entry struct {
	due       int64 // scheduled time, Unix ns
	offset    int64 // as acked, -1: none
	passed    int64 // chat: in which place it was passed on, from 1
	user      uint32
	owed, got int32  // pushes
	count     uint16 // records read back
	partition int16  // as acked, -1: none
	state     entryState
	unknown   bool // OUTCOME_UNKNOWN came
}

type entryState uint8

const (
	pending entryState = iota
	settled            // acked, or every push has come
	refused            // with a code that says it is not stored
)

// ledger names the messages of a run by number and keeps an entry for each until the run's
// verification. The names are unique to the run: {run}-{number}.
type ledger struct {
	run     string
	first   int64 // number of pages[0][0]
	next    int64
	pages   [][]entry
	pending int64
}

const ledgerPage = 1 << 14

// add makes an entry and returns its number.
func (l *ledger) add(user int, due int64) int64 {
	k := l.next - l.first
	if int(k/ledgerPage) == len(l.pages) {
		l.pages = append(l.pages, make([]entry, ledgerPage))
	}
	l.pages[k/ledgerPage][k%ledgerPage] = entry{due: due, user: uint32(user), offset: -1, partition: -1}
	l.next++
	l.pending++
	return l.next - 1
}

// get returns the entry of a number, nil when the run has none of that number.
func (l *ledger) get(n int64) *entry {
	if n < l.first || n >= l.next {
		return nil
	}
	k := n - l.first
	return &l.pages[k/ledgerPage][k%ledgerPage]
}

// each calls f for every entry, in order.
func (l *ledger) each(f func(n int64, e *entry)) {
	for n := l.first; n < l.next; n++ {
		f(n, l.get(n))
	}
}

// forget drops all entries; numbers go on.
func (l *ledger) forget() {
	l.first, l.pages, l.pending = l.next, nil, 0
}

func (l *ledger) appendName(dst []byte, n int64) []byte {
	dst = append(dst, l.run...)
	dst = append(dst, '-')
	return strconv.AppendInt(dst, n, 10)
}

// number reads a name; ok is false when it is none of this run's.
func (l *ledger) number(name string) (n int64, ok bool) {
	k := len(l.run)
	if len(name) < k+2 || name[:k] != l.run || name[k] != '-' {
		return 0, false
	}
	for i := k + 1; i < len(name); i++ {
		d := name[i] - '0'
		if d > 9 || n > 1<<55 {
			return 0, false
		}
		n = n*10 + int64(d)
	}
	return n, true
}

// breaches collects broken invariants: how often each was broken, and the first few in words.
type breaches struct {
	count map[string]int64
	first map[string]string
}

func (b *breaches) add(invariant, format string, args ...any) {
	if b.count == nil {
		b.count, b.first = map[string]int64{}, map[string]string{}
	}
	if b.count[invariant]++; b.count[invariant] == 1 {
		b.first[invariant] = fmt.Sprintf(format, args...)
	}
}
