package broker

import (
	"sync/atomic"

	"im-gateway/codec"
)

// What a refused client is told to wait.
const (
	retryOverloadedMS  = 500
	retryUnavailableMS = 5000
)

// The states of the gate before the producer.
const (
	gateClosed int32 = iota // not connected yet, or closing
	gateOpen
	gateOutage // Kafka answers nothing
)

// credits bound what is in flight. They are taken by the shards before a record is queued, and given
// back when it is answered. All methods may be called from any goroutine.
type credits struct {
	maxRecords, maxBytes int64

	gate    atomic.Int32
	records atomic.Int64
	bytes   atomic.Int64
}

// take admits one record, or says why not and gives a hint when to try again.
func (c *credits) take(size int, m *producerMetrics) (codec.Code, int32) {
	if c.gate.Load() != gateOpen {
		m.refusedUnavailable.Inc()
		return codec.BrokerUnavailable, retryUnavailableMS
	}
	if c.records.Add(1) > c.maxRecords {
		c.records.Add(-1)
		m.refusedRecords.Inc()
		return codec.Overloaded, retryOverloadedMS
	}
	if c.bytes.Add(int64(size)) > c.maxBytes {
		c.give(1, int64(size))
		m.refusedBytes.Inc()
		return codec.Overloaded, retryOverloadedMS
	}
	return codec.OK, 0
}

func (c *credits) give(records, bytes int64) {
	c.bytes.Add(-bytes)
	c.records.Add(-records)
}
