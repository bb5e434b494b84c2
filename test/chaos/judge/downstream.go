package judge

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"im-gateway/test/chaos/traffic"
)

// hopHeader marks a forwarded record.
const hopHeader = "im-hop"

// unit is a downstream record for one of its targets, however often it is stored.
type unit struct {
	name   // the target and the message id
	places []place
	at     time.Time // the oldest record's

	forwarded, undelivered, deadletter, received bool
}

// records is what the downstream topics and the sender's log hold.
type records struct {
	units map[name]*unit
	// data of each message id; records of one id with different data keep both
	data    map[string][]json.RawMessage
	targets map[string]bool // message ids that exist, for whomever
}

// downValue is a downstream record's value.
type downValue struct {
	Target    string          `json:"target_user_id"`
	Targets   []string        `json:"target_user_ids"`
	User      string          `json:"user_id"`
	MessageID string          `json:"message_id"`
	Data      json.RawMessage `json:"data"`
	Content   json.RawMessage `json:"content"`
}

func (v *downValue) users() []string {
	users := v.Targets
	for _, u := range []string{v.Target, v.User} {
		if u != "" && len(users) == 0 {
			users = []string{u}
		}
	}
	return users
}

func (v *downValue) data() json.RawMessage {
	if v.Data == nil && v.Content != nil {
		return json.RawMessage(fmt.Sprintf(`{"content":%s}`, v.Content))
	}
	return v.Data
}

// downstream compares the downstream topics and the sender's log with the ends.
func (j *judgement) downstream(ctx context.Context) error {
	names, err := topics(ctx, j.e.Brokers, j.e.DownstreamPrefix)
	if err != nil {
		return err
	}
	shared := []string{j.e.UpstreamTopic, j.e.UndeliveredTopic, j.e.DeadletterTopic}
	names = slices.DeleteFunc(names, func(n string) bool { return slices.Contains(shared, n) })

	all := records{units: make(map[name]*unit), data: make(map[string][]json.RawMessage), targets: make(map[string]bool)}
	unreadable := make(map[string]place) // by value
	if err := read(ctx, j.e.Brokers, names, func(r *kgo.Record) {
		if !j.addRecord(&all, r) {
			unreadable[string(r.Value)] = place{r.Topic, r.Partition, r.Offset}
		}
	}); err != nil {
		return err
	}
	for _, p := range j.e.Logs.Produced {
		if all.addProduced(p) {
			j.v.Counts.Gone++
		}
	}
	if err := read(ctx, j.e.Brokers, []string{j.e.UndeliveredTopic}, func(r *kgo.Record) {
		if j.end(&all, r, func(u *unit) { u.undelivered = true }) {
			j.v.Counts.Reasons[header(r, "reason")]++
		}
	}); err != nil {
		return err
	}
	if err := read(ctx, j.e.Brokers, []string{j.e.DeadletterTopic}, func(r *kgo.Record) {
		delete(unreadable, string(r.Value))
		j.end(&all, r, func(u *unit) { u.deadletter = true })
	}); err != nil {
		return err
	}
	for _, p := range unreadable {
		j.v.found(&j.v.Findings.Lost, "lost", "an unreadable record at %v is no dead letter", p)
	}
	for i := range j.e.Logs.Clients {
		j.pushes(&j.e.Logs.Clients[i], &all)
	}
	for _, u := range all.units {
		j.settle(u, &all)
	}
	return nil
}

// addRecord adds a record's units; false when it names nobody. Those of users who are in no log are
// passed over.
func (j *judgement) addRecord(all *records, r *kgo.Record) bool {
	var v downValue
	if err := json.Unmarshal(r.Value, &v); err != nil || len(v.users()) == 0 || v.data() == nil {
		return false
	}
	at := place{r.Topic, r.Partition, r.Offset}
	id := v.MessageID
	if id == "" {
		id = traffic.RecordID(r) // a forwarded one
	}
	if id == "" {
		id = fmt.Sprintf("%s-%d-%d", at.topic, at.partition, at.offset)
	}
	all.targets[id] = true
	for _, user := range v.users() {
		if j.users[user] == nil {
			continue
		}
		u := all.unit(name{user, id}, r.Timestamp)
		u.places = append(u.places, at)
		u.forwarded = u.forwarded || header(r, hopHeader) != ""
		if !slices.ContainsFunc(all.data[id], func(d json.RawMessage) bool { return bytes.Equal(d, v.data()) }) {
			all.data[id] = append(all.data[id], v.data())
		}
	}
	return true
}

func (all *records) unit(n name, at time.Time) *unit {
	u := all.units[n]
	if u == nil {
		u = &unit{name: n, at: at}
		all.units[n] = u
	}
	if at.Before(u.at) {
		u.at = at
	}
	return u
}

// addProduced adds what Kafka acknowledged to the sender; true when Kafka has it no more.
func (all *records) addProduced(p traffic.Produced) bool {
	u := all.unit(name{p.User, p.MessageID}, p.At)
	all.targets[p.MessageID] = true
	at := place{p.Topic, p.Partition, p.Offset}
	if slices.Contains(u.places, at) {
		return false
	}
	u.places = append(u.places, at)
	data := json.RawMessage(fmt.Sprintf(`{"seq":%d}`, p.Seq))
	if len(all.data[p.MessageID]) == 0 {
		all.data[p.MessageID] = append(all.data[p.MessageID], data)
	}
	return true
}

// end marks the units that a record on a topic of ends names: its key's, or else all of its targets'.
func (j *judgement) end(all *records, r *kgo.Record, mark func(*unit)) bool {
	id := traffic.RecordID(r)
	if u := all.units[name{string(r.Key), id}]; u != nil {
		mark(u)
		return true
	}
	var v downValue
	_ = json.Unmarshal(r.Value, &v) // an unreadable one names nobody
	if len(v.users()) > 1 && len(r.Key) > 0 {
		return false
	}
	found := false
	for _, user := range v.users() {
		if u := all.units[name{user, id}]; u != nil {
			mark(u)
			found = true
		}
	}
	return found
}

// pushes checks what one client received.
func (j *judgement) pushes(c *traffic.ClientLog, all *records) {
	f := &j.v.Findings
	for _, p := range c.Pushes {
		if p.Duplicate {
			j.v.Counts.DuplicatePushes++
			j.v.example("duplicate_pushes", "%s to %s of %s", p.MessageID, p.Session, c.User)
		}
		u := all.units[name{c.User, p.MessageID}]
		switch {
		case u != nil:
			u.received = true
		case all.targets[p.MessageID]:
			j.v.found(&f.Misdelivered, "misdelivered", "%s to %s", p.MessageID, c.User)
			continue
		default:
			j.v.found(&f.UnknownPushes, "unknown_pushes", "%q to %s: %.100s", p.MessageID, c.User, p.Data)
			continue
		}
		if !slices.ContainsFunc(all.data[p.MessageID], func(d json.RawMessage) bool { return bytes.Equal(d, p.Data) }) {
			j.v.found(&f.CorruptPushes, "corrupt_pushes", "%s to %s: %.100s instead of %.100s", p.MessageID, c.User, p.Data, all.data[p.MessageID])
		}
	}
}

// settle counts a unit's end, or what it means that it has none.
func (j *judgement) settle(u *unit, all *records) {
	n := &j.v.Counts
	n.Units++
	count := func(is bool, n *int) {
		if is {
			*n++
		}
	}
	count(u.received, &n.Received)
	count(u.undelivered, &n.Undelivered)
	count(u.deadletter, &n.Deadletter)
	count(u.forwarded, &n.Forwarded)
	count(u.received && (u.undelivered || u.deadletter), &n.ReceivedAndEnded)
	if u.received || u.undelivered || u.deadletter {
		return
	}
	if !slices.ContainsFunc(u.places, func(p place) bool { return !j.e.deleted(p.topic, p.partition, p.offset, u.at) }) {
		n.DeletedLost++
		return
	}
	clients := j.users[u.user]
	acks := !slices.ContainsFunc(clients, func(c *traffic.ClientLog) bool { return !c.Ack })
	switch {
	case acks:
		j.v.found(&j.v.Findings.Lost, "lost", "%s for %s, produced %s, stored at %v", u.id, u.user, u.at.Format(time.RFC3339Nano), u.places)
	case !slices.ContainsFunc(clients, func(c *traffic.ClientLog) bool { return brokeUnder(c, u, all) }):
		j.v.found(&j.v.Findings.LostUnexplained, "lost_unexplained", "%s for %s, produced %s, stored at %v", u.id, u.user, u.at.Format(time.RFC3339Nano), u.places)
	default:
		n.LostInSockets++
	}
}

// brokeUnder tells whether a record may have been on the way to the client when a connection broke:
// one ended after the record was produced, and did not carry records from both before and after it
// on its partition.
func brokeUnder(c *traffic.ClientLog, u *unit, all *records) bool {
	for _, d := range c.Disconnects {
		if d.At.Before(u.at.Add(-clockSlack)) || passedOver(c, d.Session, u, all) {
			continue
		}
		return true
	}
	return false
}

// passedOver tells whether the session received what lies before and what lies behind the unit.
func passedOver(c *traffic.ClientLog, session string, u *unit, all *records) bool {
	before, behind := false, false
	for _, p := range c.Pushes {
		if p.Session != session {
			continue
		}
		other := all.units[name{c.User, p.MessageID}]
		if other == nil {
			continue
		}
		for _, a := range other.places {
			for _, b := range u.places {
				if a.topic == b.topic && a.partition == b.partition {
					before = before || a.offset < b.offset
					behind = behind || a.offset > b.offset
				}
			}
		}
	}
	return before && behind
}
