package judge

import (
	"cmp"
	"context"
	"encoding/json"
	"slices"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"im-gateway/test/chaos/traffic"
)

// name is what a user calls a message.
type name struct{ user, id string }

// place is a record's in Kafka.
type place struct {
	topic     string
	partition int32
	offset    int64
}

// stored is an upstream record.
type stored struct {
	name
	place
	gateway string
	at      time.Time // the gateway's
}

// upstream compares the upstream topic with what clients sent and were told.
func (j *judgement) upstream(ctx context.Context) error {
	sums := make(map[name]uint64)
	for i := range j.e.Logs.Clients {
		c := &j.e.Logs.Clients[i]
		for _, s := range c.Sent {
			sums[name{c.User, s.ID}] = s.Sum
		}
	}
	byName := make(map[name][]stored)
	byPlace := make(map[place]name)
	perGateway := make(map[[2]string][]stored) // by user and gateway
	err := read(ctx, j.e.Brokers, []string{j.e.UpstreamTopic}, func(r *kgo.Record) {
		var v struct {
			User    string          `json:"user_id"`
			Gateway string          `json:"gateway_id"`
			ID      string          `json:"client_msg_id"`
			Data    json.RawMessage `json:"data"`
			At      int64           `json:"timestamp"`
		}
		_ = json.Unmarshal(r.Value, &v) // what cannot be read is nobody's record: its ack is false
		if j.users[v.User] == nil {
			return
		}
		s := stored{name{v.User, v.ID}, place{r.Topic, r.Partition, r.Offset}, v.Gateway, time.UnixMilli(v.At)}
		j.v.Counts.Stored++
		sum, sent := sums[s.name]
		switch {
		case !sent:
			j.v.found(&j.v.Findings.Invented, "invented", "%s of %s at %d@%d", v.ID, v.User, r.Partition, r.Offset)
		case sum != traffic.Sum(v.Data):
			j.v.found(&j.v.Findings.CorruptUpstream, "corrupt_upstream", "%s at %d@%d: %.100s", v.ID, r.Partition, r.Offset, v.Data)
		}
		if string(r.Key) != v.User {
			j.v.found(&j.v.Findings.CorruptUpstream, "corrupt_upstream", "%s at %d@%d has the key %q", v.ID, r.Partition, r.Offset, r.Key)
		}
		byName[s.name] = append(byName[s.name], s)
		byPlace[s.place] = s.name
		key := [2]string{v.User, v.Gateway}
		perGateway[key] = append(perGateway[key], s)
	})
	if err != nil {
		return err
	}
	for _, records := range byName {
		j.v.Counts.Duplicates += len(records) - 1
	}
	for _, records := range perGateway {
		j.duplicates(records)
	}
	for i := range j.e.Logs.Clients {
		c := &j.e.Logs.Clients[i]
		j.acks(c, byName, byPlace)
		if c.Ordered {
			j.order(c, byName)
		}
	}
	return nil
}

// acks checks each success of a client.
func (j *judgement) acks(c *traffic.ClientLog, byName map[name][]stored, byPlace map[place]name) {
	f := &j.v.Findings
	acked := make(map[string]bool)
	lost := make(map[string]bool)
	for _, a := range c.Acks {
		if !a.Success() {
			continue
		}
		acked[a.ID] = true
		n := name{c.User, a.ID}
		if a.Topic == j.e.UpstreamTopic && (a.Offset >= 0 && byPlace[place{a.Topic, a.Partition, a.Offset}] == n ||
			a.Offset < 0 && slices.ContainsFunc(byName[n], func(s stored) bool { return s.partition == a.Partition })) {
			continue
		}
		if j.e.deleted(a.Topic, a.Partition, a.Offset, a.At) {
			j.v.Counts.DeletedAcks++
			continue
		}
		j.v.found(&f.FalseAcks, "false_acks", "%s of %s: told %s/%d@%d, stored at %v", a.ID, c.User, a.Topic, a.Partition, a.Offset, places(byName[n]))
		if len(byName[n]) == 0 && !lost[a.ID] {
			lost[a.ID] = true
			j.v.found(&f.AckedLost, "acked_lost", "%s of %s: told %s/%d@%d", a.ID, c.User, a.Topic, a.Partition, a.Offset)
		}
	}
	sent := make(map[string]bool)
	for _, s := range c.Sent {
		sent[s.ID] = true
	}
	j.v.Counts.Sent += len(sent)
	j.v.Counts.Acked += len(acked)
	for id := range sent {
		if !acked[id] {
			j.v.Counts.Unsettled++
		}
	}
}

func places(records []stored) []place {
	var out []place
	for _, s := range records {
		out = append(out, s.place)
	}
	return out
}

// order checks that first occurrences ascend as they were sent, on one partition.
func (j *judgement) order(c *traffic.ClientLog, byName map[name][]stored) {
	var last *stored // the furthest of those sent before
	lastSeq := int64(0)
	for _, s := range c.Sent {
		if s.Seq <= lastSeq {
			continue // a resend
		}
		lastSeq = s.Seq
		records := byName[name{c.User, s.ID}]
		if len(records) == 0 {
			continue
		}
		first := &records[0] // the oldest, when all are on one partition
		one := !slices.ContainsFunc(records, func(r stored) bool { return r.partition != cmp.Or(last, first).partition })
		switch {
		case one && (last == nil || first.offset > last.offset):
			last = first
		case last == nil:
			last = first
			fallthrough
		default:
			j.v.found(&j.v.Findings.OrderInversions, "order_inversions", "%s at %d@%d after %s at %d@%d",
				s.ID, first.partition, first.offset, last.id, last.partition, last.offset)
		}
	}
}

// duplicates checks one user's records of one gateway.
func (j *judgement) duplicates(records []stored) {
	slices.SortFunc(records, func(a, b stored) int {
		return cmp.Or(cmp.Compare(a.partition, b.partition), cmp.Compare(a.offset, b.offset))
	})
	last := make(map[string]int)
	for i, s := range records {
		k, again := last[s.id]
		last[s.id] = i
		if !again || i-k > duplicateIDs || s.at.Sub(records[k].at) > duplicateWindow || j.died(s.gateway, records[k].at, s.at) {
			continue
		}
		j.v.found(&j.v.Findings.DuplicateSameGateway, "duplicate_same_gateway", "%s at %d@%d and %d@%d, both of %s, %v apart, %s",
			s.id, records[k].partition, records[k].offset, s.partition, s.offset, s.gateway, s.at.Sub(records[k].at), j.told(s.name))
	}
}

// told says what the client heard of a message.
func (j *judgement) told(n name) string {
	var out []string
	for _, c := range j.users[n.user] {
		for _, a := range c.Acks {
			if a.ID == n.id {
				out = append(out, cmp.Or(a.Code, a.Status))
			}
		}
	}
	if len(out) == 0 {
		return "never acknowledged"
	}
	return "acknowledged " + strings.Join(out, ", ")
}

// died tells whether the gateway's process may have ended between the two times.
func (j *judgement) died(gateway string, from, to time.Time) bool {
	known := false
	for _, d := range j.e.Deaths {
		if d.Gateway != gateway {
			continue
		}
		known = true
		if d.At.After(from.Add(-clockSlack)) && d.At.Before(to.Add(clockSlack)) {
			return true
		}
	}
	return !known && !slices.Contains(j.e.Gateways, gateway)
}
