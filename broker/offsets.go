package broker

import (
	"sort"

	"im-gateway/codec"
)

const windowInitial = 256

// window tracks the records of one partition between the oldest that has not ended and the newest
// read: a ring in offset order, which may have gaps (compaction, transaction markers). It belongs to
// the claim's goroutine.
type window struct {
	maxRecords, maxBytes int

	ring  []windowEntry
	head  int // index of the oldest
	count int
	bytes int
	open  int   // entries not done
	next  int64 // one behind the newest offset added; 0: none yet
}

type windowEntry struct {
	record *codec.Downstream // nil: it could not be parsed
	offset int64
	readMS int64
	size   int32
	done   bool
}

func newWindow(maxRecords, maxBytes int) *window {
	return &window{
		maxRecords: maxRecords, maxBytes: maxBytes,
		ring: make([]windowEntry, min(windowInitial, maxRecords)),
	}
}

// full reports whether nothing more may be read. Done records count until those before them are:
// a restart would read them all again, and they share fetched memory.
func (w *window) full() bool { return w.count >= w.maxRecords || w.bytes >= w.maxBytes }

func (w *window) at(i int) *windowEntry {
	i += w.head
	if i >= len(w.ring) {
		i -= len(w.ring)
	}
	return &w.ring[i]
}

// add notes a record that was read; offsets ascend. The window must not be full.
func (w *window) add(record *codec.Downstream, offset int64, size int, nowMS int64) {
	if w.count == len(w.ring) {
		ring := make([]windowEntry, min(2*len(w.ring), w.maxRecords))
		for i := range w.count {
			ring[i] = *w.at(i)
		}
		w.ring, w.head = ring, 0
	}
	w.count++
	*w.at(w.count - 1) = windowEntry{record: record, offset: offset, size: int32(size), readMS: nowMS}
	w.bytes += size
	w.open++
	w.next = offset + 1
}

// done notes that a record has ended. It reports false when the record is not in the window or had
// ended before.
func (w *window) done(offset int64) bool {
	i := sort.Search(w.count, func(i int) bool { return w.at(i).offset >= offset })
	if i == w.count || w.at(i).offset != offset || w.at(i).done {
		return false
	}
	w.at(i).done, w.at(i).record = true, nil
	w.open--
	for w.count > 0 && w.at(0).done {
		w.bytes -= int(w.at(0).size)
		w.head++
		if w.head == len(w.ring) {
			w.head = 0
		}
		w.count--
	}
	return true
}

// overdue returns the oldest records that have not ended and were read before the given time, at most n.
func (w *window) overdue(beforeMS int64, n int) (list []*codec.Downstream) {
	for i := 0; i < w.count && len(list) < n; i++ {
		e := w.at(i)
		if e.readMS > beforeMS {
			break
		}
		if !e.done && e.record != nil {
			list = append(list, e.record)
		}
	}
	return list
}

// low is the offset to commit: everything before it has ended. ok is false before the first record.
func (w *window) low() (offset int64, ok bool) {
	if w.count > 0 {
		return w.at(0).offset, true
	}
	return w.next, w.next > 0
}

// oldestMS is when the oldest record that has not ended was read; 0: there is none.
func (w *window) oldestMS() int64 {
	if w.count == 0 {
		return 0
	}
	return w.at(0).readMS
}
