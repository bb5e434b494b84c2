package shard

import (
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"im-gateway/codec"
	"im-gateway/codec/latency"
)

// observed is how many durations a histogram holds, and their sum in seconds.
func observed(t *testing.T, h *latency.Histogram) (n uint64, sum float64) {
	t.Helper()
	var d dto.Metric
	if err := prometheus.Metric(h).Write(&d); err != nil {
		t.Fatal(err)
	}
	return d.GetHistogram().GetSampleCount(), d.GetHistogram().GetSampleSum()
}

// TestLatencies: what is stored is timed from its reception, what is delivered from its time in Kafka to
// the socket, once for each session; what was refused, pushed by gRPC or never written is not.
func TestLatencies(t *testing.T) {
	base := time.UnixMilli(1_760_000_000_000)
	w := newWorld(t, func(o *Options) { o.Now = func() time.Time { return base } })
	w.outcome = func(c *codec.Command) codec.Outcome {
		switch c.Session.Index() {
		case 2:
			c.Position = 100
			return codec.OutcomeBuffered
		case 3:
			return codec.OutcomeGone
		}
		return codec.OutcomeFlushed
	}
	w.written = base.Add(2 * time.Second)
	w.run()
	ids := make([]codec.SessionID, 4)
	for i := range ids {
		ids[i] = sessionID(uint32(i), 1)
		w.offer(codec.Event{Kind: codec.EventOpen, Session: ids[i], Open: &codec.Open{
			User: fmt.Sprint("u", i), ExpiresAt: base.Add(time.Hour).UnixMilli(), ConnectedAt: base.UnixMilli(), Acks: i == 1}})
		w.until(func() bool { return len(w.sent[ids[i]]) > 0 })
	}

	for i, result := range []codec.Code{codec.OK, codec.OK, codec.BrokerUnavailable, codec.OutcomeUnknown} {
		e := w.message(ids[0], "u0", fmt.Sprint("c", i))
		if i != 1 { // one whose reception is not known
			e.Upstream.Received = base.Add(-300 * time.Millisecond).UnixNano()
		}
		w.offer(e)
		b := w.batch()
		b.Records[0].Result.Code = result
		w.set.Results(b)
		w.until(func() bool { return len(w.sent[ids[0]]) == i+2 })
	}
	s := newSink()
	d := rec(s, "u0", "u1", "u2", "u3", "nobody")
	d.Stored = base.Add(-time.Second).UnixMilli()
	w.deliver(d)
	w.deliver(rec(s, "u0"))                                                     // as a gRPC Push: Kafka never had it
	for _, stored := range []int64{math.MaxInt64, 1 << 61, math.MinInt64, -1} { // nobody's clock
		d := rec(s, "u0")
		d.Stored = stored
		w.deliver(d)
	}
	w.until(func() bool { return s.total() == 8 && len(w.sent[ids[1]]) == 2 && len(w.sent[ids[2]]) == 2 })
	count := func(h *latency.Histogram, want uint64) bool {
		n, _ := observed(t, h)
		return n == want
	}
	w.until(func() bool { return count(w.set.metrics.deliverTime, 4) })
	w.offer(codec.Event{Kind: codec.EventFlushed, Session: ids[2], Value: 100})
	w.offer(codec.Event{Kind: codec.EventAcked, Session: ids[1], Value: 1})
	w.until(func() bool { return s.total() == 10 })
	if n, sum := observed(t, w.set.metrics.ackTime); n != 1 || sum != 0.3 {
		t.Errorf("%d acks took %v s, want 1 of 0.3", n, sum)
	}
	// Two were written 3 s after Kafka had the record; of the third the kernel's word came after 1 s. Two are
	// of times ahead of now.
	if n, sum := observed(t, w.set.metrics.deliverTime); n != 5 || sum != 7 {
		t.Errorf("%d deliveries took %v s, want 5 in 7", n, sum)
	}
}

// TestSessionMetrics: sessions without presence, operations under way, how long sessions lasted, and what
// came for one that had ended.
func TestSessionMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	w := newWorld(t, func(o *Options) { o.Registerer, o.ClaimTimeout = reg, 100*time.Millisecond })
	answer := w.presence
	w.presence = func(PresenceOp) *PresenceResult { return nil } // Redis is away
	w.run()
	value := func(name string) float64 {
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() != "im_gateway_shard_"+name {
				continue
			}
			var sum float64
			for _, m := range f.GetMetric() {
				sum += m.GetGauge().GetValue() + m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
			return sum
		}
		t.Fatalf("there is no %s", name)
		return 0
	}
	wait := func(want map[string]float64) {
		t.Helper()
		w.until(func() bool {
			for name, v := range want {
				if value(name) != v {
					return false
				}
			}
			return true
		})
	}
	a, b := sessionID(0, 1), sessionID(1, 1)
	w.connected(a, "a") // without presence, once the claim is late
	wait(map[string]float64{"sessions": 1, "sessions_without_presence": 1, "presence_waiting": 1, "connect_duration_seconds": 1})
	w.set.PresenceResults(0, []PresenceResult{{Kind: Claim, Session: a, Version: 1}})
	wait(map[string]float64{"sessions_without_presence": 0, "presence_waiting": 0})
	w.set.PresenceResults(0, []PresenceResult{{Kind: Claim, Session: a, Version: 2}}) // claimed once more, as after an outage
	w.connected(b, "b")
	wait(map[string]float64{"sessions": 2, "sessions_without_presence": 1, "session_duration_seconds": 0})
	w.mu.Lock()
	w.presence = answer
	w.mu.Unlock()
	e := w.message(a, "a", "c")
	w.offer(e)
	batch := w.batch()
	for _, id := range []codec.SessionID{a, b} {
		w.offer(codec.Event{Kind: codec.EventClose, Session: id, Code: codec.CloseAbnormal})
	}
	w.set.Results(batch)
	w.offer(w.message(a, "a", "d"))
	wait(map[string]float64{"sessions": 0, "sessions_without_presence": 0, "session_duration_seconds": 2,
		"connect_duration_seconds": 2, "orphans_total": 2, "recent_messages": 1})
}
