//go:build !race

// The race detector makes pools drop at random.

package broker

import "testing"

// All that the producer needs for a message beyond what sarama needs is taken from pools.
func TestProducerHotPathDoesNotAllocate(t *testing.T) {
	l := newLoop(t)
	l.turn(200)
	if n := testing.AllocsPerRun(200, func() { l.turn(100) }); n >= 10 { // a collection may empty the pools
		t.Errorf("%v allocations for 100 records", n)
	}
	if l.p.credits.records.Load() != 0 || l.p.credits.bytes.Load() != 0 {
		t.Error("credits leak")
	}
}
