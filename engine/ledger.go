package engine

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// Ledger is what became of everything that the gateway has taken in since its start: In is the sum of
// Ends and Open. It is put together from the metrics of the same names.
type Ledger struct {
	// Downstream counts deliveries: one per record, target and session, one per record that could not be
	// parsed. Abandoned ones were open when the topic's partition was lost: whoever reads it next reads
	// their records again.
	Downstream Account `json:"downstream"`
	// Upstream counts client messages that were accepted.
	Upstream Account `json:"upstream"`
}

// Account is one side of a ledger.
type Account struct {
	In       int64            `json:"in"`
	Ends     map[string]int64 `json:"ends"`
	Open     int64            `json:"open"`
	Balanced bool             `json:"balanced"`
}

func (a *Account) balance() {
	sum := a.Open
	for _, n := range a.Ends {
		sum += n
	}
	a.Balanced = sum == a.In
}

// ledgerReads is how often the counters are read until they agree: they go on while they are read.
const ledgerReads = 5

// ReadLedger reads the ledger. Any goroutine may call it.
func ReadLedger(from prometheus.Gatherer) (l Ledger, err error) {
	for range ledgerReads {
		if l, err = readLedger(from); err != nil || l.Downstream.Balanced && l.Upstream.Balanced {
			break
		}
	}
	return l, err
}

func readLedger(from prometheus.Gatherer) (Ledger, error) {
	families, err := from.Gather()
	if err != nil {
		return Ledger{}, fmt.Errorf("read the metrics: %w", err)
	}
	l := Ledger{Downstream: Account{Ends: map[string]int64{}}, Upstream: Account{Ends: map[string]int64{}}}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			n := int64(m.GetCounter().GetValue() + m.GetGauge().GetValue())
			switch f.GetName() {
			case "im_gateway_consumer_targets_total":
				l.Downstream.In += n
			case "im_gateway_consumer_ends_total":
				l.Downstream.Ends[label(m)] += n
			case "im_gateway_consumer_dead_letters_total":
				l.Downstream.Ends["dead_letter"] += n
			case "im_gateway_consumer_abandoned_total":
				l.Downstream.Ends["abandoned"] += n
			case "im_gateway_consumer_open_deliveries":
				l.Downstream.Open += n
			case "im_gateway_shard_accepted_total":
				l.Upstream.In += n
			case "im_gateway_shard_stored_total":
				l.Upstream.Ends["stored"] += n
			case "im_gateway_shard_failed_total":
				l.Upstream.Ends[label(m)] += n
			case "im_gateway_shard_in_flight":
				l.Upstream.Open += n
			}
		}
	}
	l.Downstream.balance()
	l.Upstream.balance()
	return l, nil
}

func label(m *dto.Metric) string {
	for _, l := range m.GetLabel() {
		return l.GetValue()
	}
	return ""
}
