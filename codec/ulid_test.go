package codec

import (
	"math/rand/v2"
	"testing"

	"github.com/oklog/ulid/v2"
)

func TestULID(t *testing.T) {
	s := ulidSource{random: rand.NewChaCha8([32]byte{1})}
	var last ulid.ULID
	for i, now := range []int64{1, 1, 1, 2, 1760000000000, 1760000000000, 1759999999999, 1, 1760000000001, 1<<48 - 1} {
		text := s.append([]byte("before"), now)
		id, err := ulid.ParseStrict(string(text[len("before"):]))
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if id.Compare(last) <= 0 {
			t.Errorf("%s follows %s", id, last)
		}
		if want := max(uint64(now), last.Time()); id.Time() != want {
			t.Errorf("id %d has the time %d, want %d", i, id.Time(), want)
		}
		if id.String() != string(text[len("before"):]) {
			t.Errorf("%s is written %s", id, text)
		}
		last = id
	}
}

// Within a millisecond the low bits carry into the high ones.
func TestULIDCarries(t *testing.T) {
	s := ulidSource{random: rand.NewChaCha8([32]byte{1}), lastMS: 5, high: 0x7ffe, low: 1<<64 - 1}
	last := ""
	for range 1000 {
		id := string(s.append(nil, 5))
		if id <= last || len(id) != MessageIDLen {
			t.Fatalf("%s follows %s", id, last)
		}
		last = id
	}
	if id, err := ulid.ParseStrict(last); err != nil || id.Time() != 5 || s.high != 0x7fff {
		t.Errorf("%s at %d, %v", last, id.Time(), err)
	}
}

// Two Builders of one process, or of two, never make the same id.
func TestULIDsOfBuildersDiffer(t *testing.T) {
	a, b := NewBuilder("g", 1, nil), NewBuilder("g", 1, nil)
	seen := map[string]bool{}
	for range 1000 {
		for _, s := range []*Builder{a, b} {
			id := string(s.ulids.append(nil, 7))
			if seen[id] {
				t.Fatalf("%s twice", id)
			}
			seen[id] = true
		}
	}
}
