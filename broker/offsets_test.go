package broker

import (
	"math/rand/v2"
	"testing"
)

// The window against a model that keeps every offset: at each step the offset to commit has
// everything before it done, and nothing that is done directly behind it.
func TestWindowAgainstAModel(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		maxRecords, maxBytes := 1+r.IntN(600), 1+r.IntN(20_000)
		w := newWindow(maxRecords, maxBytes)
		type entry struct {
			offset int64
			size   int
			done   bool
		}
		var model []entry // from the oldest not done
		next := r.Int64N(1000)
		for range 3000 {
			if r.IntN(2) == 0 && !w.full() {
				next += 1 + max(0, r.Int64N(4)-2) // mostly without gaps
				size := r.IntN(100)
				w.add(nil, next, size, next+1)
				model = append(model, entry{offset: next, size: size})
			} else if len(model) > 0 {
				i := r.IntN(len(model))
				offset := model[i].offset
				if r.IntN(20) == 0 {
					offset = next + r.Int64N(100) - 50 // often unknown, or done
				}
				known := false
				for j := range model {
					if model[j].offset == offset {
						known = !model[j].done
						model[j].done = true
					}
				}
				if got := w.done(offset); got != known {
					t.Fatalf("seed %d: done(%d) = %v", seed, offset, got)
				}
			}
			for len(model) > 0 && model[0].done {
				model = model[1:]
			}
			bytes, open := 0, 0
			for _, e := range model {
				bytes += e.size
				if !e.done {
					open++
				}
			}
			if w.count != len(model) || w.bytes != bytes || w.open != open {
				t.Fatalf("seed %d: %d records, %d bytes, %d open; want %d, %d, %d", seed, w.count, w.bytes, w.open, len(model), bytes, open)
			}
			if full := len(model) >= maxRecords || bytes >= maxBytes; w.full() != full {
				t.Fatalf("seed %d: full %v", seed, w.full())
			}
			low, ok := w.low()
			switch {
			case len(model) > 0:
				if !ok || low != model[0].offset || w.oldestMS() != model[0].offset+1 {
					t.Fatalf("seed %d: low %d, want %d", seed, low, model[0].offset)
				}
			case ok && low != next+1:
				t.Fatalf("seed %d: low %d, want %d", seed, low, next+1)
			}
			if len(w.ring) > maxRecords {
				t.Fatalf("seed %d: a ring of %d for %d records", seed, len(w.ring), maxRecords)
			}
		}
	}
}

func TestWindowHotPathDoesNotAllocate(t *testing.T) {
	w := newWindow(1000, 1<<20)
	var offset int64
	if n := testing.AllocsPerRun(10_000, func() {
		w.add(nil, offset, 10, 1)
		w.done(offset)
		offset++
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkWindow(b *testing.B) {
	w := newWindow(10_000, 1<<30)
	b.ReportAllocs()
	var next, ended int64
	for b.Loop() {
		w.add(nil, next, 10, 1)
		next++
		if next-ended >= 5000 {
			w.done(ended)
			ended++
		}
	}
}
