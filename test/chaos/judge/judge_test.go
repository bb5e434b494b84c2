package judge

import (
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"im-gateway/test/chaos/traffic"
)

func TestHealthyHistoryHasNoViolations(t *testing.T) {
	t.Parallel()
	v := newWorld(t).judge()
	if got := v.Violations(); len(got) != 0 {
		t.Fatalf("violations of a healthy history: %v", got)
	}
	want := Counts{
		Sent: 2 * messages, Acked: 2 * messages, Stored: 2 * messages,
		Units: 2*messages + 1, Received: 2 * messages, Undelivered: 1,
		Reconnects: 1, Refused: map[string]int{}, Closes: map[string]int{"4002": 1}, Reasons: map[string]int{"offline": 1},
		LongestGap: time.Second, GapUser: "alice",
	}
	if !reflect.DeepEqual(v.Counts, want) {
		t.Errorf("counts\n%+v, want\n%+v", v.Counts, want)
	}
}

func TestDefects(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		defect func(w *world)
		want   Findings
		counts func(c Counts) bool // nil: not looked at
	}{
		{"an ack without a record", func(w *world) {
			w.sent(alice, 6)
			w.ack(alice, "alice-6", 5)
		}, Findings{FalseAcks: 1, AckedLost: 1}, nil},
		{"the same ack twice without a record", func(w *world) {
			w.sent(alice, 6)
			w.ack(alice, "alice-6", 5)
			w.ack(alice, "alice-6", 5)
		}, Findings{FalseAcks: 2, AckedLost: 1}, nil},
		{"an ack with another offset", func(w *world) { w.client(alice).Acks[2].Offset = 0 }, Findings{FalseAcks: 1}, nil},
		{"an ack with another partition", func(w *world) { w.client(alice).Acks[2].Partition = 1 }, Findings{FalseAcks: 1}, nil},
		{"an ack with another partition and no offset", func(w *world) {
			w.client(alice).Acks[2].Partition, w.client(alice).Acks[2].Offset = 1, -1
		}, Findings{FalseAcks: 1}, nil},
		{"an ack with another topic", func(w *world) { w.client(alice).Acks[2].Topic = "elsewhere" }, Findings{FalseAcks: 1}, nil},
		{"an ack with another topic and no offset", func(w *world) {
			w.client(alice).Acks[2].Topic, w.client(alice).Acks[2].Offset = "elsewhere", -1
		}, Findings{FalseAcks: 1}, nil},
		{"an ack without an offset", func(w *world) { w.client(alice).Acks[2].Offset = -1 }, Findings{}, nil},
		{"an acked record under another user's name", func(w *world) {
			w.rewrite(upTopic, 0, 2, "user_id", "bob")
		}, Findings{FalseAcks: 1, AckedLost: 1, Invented: 1, CorruptUpstream: 1}, nil},
		{"an acked record that cannot be read", func(w *world) {
			w.records[upTopic][0][2].Value = []byte("{")
		}, Findings{FalseAcks: 1, AckedLost: 1}, nil},
		{"changed data upstream", func(w *world) {
			w.rewrite(upTopic, 0, 2, "data", map[string]int{"seq": 9})
		}, Findings{CorruptUpstream: 1}, nil},
		{"another key upstream", func(w *world) { w.records[upTopic][0][2].Key = []byte("bob") }, Findings{CorruptUpstream: 1}, nil},
		{"an upstream record nobody sent", func(w *world) { w.store(alice, 99, "gw-1", at(9)) }, Findings{Invented: 1}, nil},
		{"an upstream record of a stranger", func(w *world) {
			w.put(upTopic, 0, "zoe", map[string]any{"user_id": "zoe", "client_msg_id": "zoe-1"}, at(9))
		}, Findings{}, nil},
		{"a refusal and an unsettled message", func(w *world) {
			w.sent(alice, 6)
			w.client(alice).Acks = append(w.client(alice).Acks, traffic.Ack{ID: "alice-6", Status: "error", Code: "OVERLOADED", Offset: -1, At: at(7)})
		}, Findings{}, func(c Counts) bool { return c.Refused["OVERLOADED"] == 1 && c.Unsettled == 1 }},
		{"a long gap", func(w *world) {
			w.client(bob).Acks[4].At = at(60)
		}, Findings{}, func(c Counts) bool { return c.LongestGap == 56*time.Second && c.GapUser == "bob" }},

		{"a duplicate on one gateway", func(w *world) { w.store(alice, 5, "gw-1", at(6)) },
			Findings{DuplicateSameGateway: 1}, func(c Counts) bool { return c.Duplicates == 1 }},
		{"a duplicate on two gateways", func(w *world) { w.store(alice, 5, "gw-2", at(6)) },
			Findings{}, func(c Counts) bool { return c.Duplicates == 1 }},
		{"a duplicate on one gateway after its memory", func(w *world) { w.store(alice, 5, "gw-1", at(5+61)) }, Findings{}, nil},
		{"a duplicate on one gateway after as many ids as it remembers", func(w *world) {
			for n := messages + 1; n <= messages+duplicateIDs; n++ {
				w.message(alice, n, "gw-1")
			}
			w.store(alice, messages, "gw-1", at(40))
		}, Findings{}, func(c Counts) bool { return c.Duplicates == 1 }},
		{"a duplicate on one gateway that died between", func(w *world) {
			w.e.Deaths = []Death{{"gw-1", at(8)}}
			w.store(alice, 5, "gw-1", at(10))
		}, Findings{}, nil},
		{"a duplicate on one gateway that died earlier", func(w *world) {
			w.e.Deaths = []Death{{"gw-1", at(1)}}
			w.store(alice, 5, "gw-1", at(10))
		}, Findings{DuplicateSameGateway: 1}, nil},
		{"a duplicate on one gateway that died later for good", func(w *world) {
			w.e.Gateways, w.etcd = []string{"gw-2"}, []string{"gw-2"}
			w.client(alice).Connects[0].Gateway, w.presence["alice"] = "gw-2", [2]string{"gw-2", "sa"}
			w.e.Deaths = []Death{{"gw-1", at(30)}}
			w.store(alice, 5, "gw-1", at(10))
		}, Findings{DuplicateSameGateway: 1}, nil},
		{"a duplicate on one gateway that died sometime", func(w *world) {
			w.e.Gateways, w.etcd = []string{"gw-2"}, []string{"gw-2"}
			w.client(alice).Connects[0].Gateway, w.presence["alice"] = "gw-2", [2]string{"gw-2", "sa"}
			w.store(alice, 5, "gw-1", at(10))
		}, Findings{}, nil},

		{"inverted order", func(w *world) {
			r := w.records[upTopic][0]
			r[1], r[2] = r[2], r[1]
			a := w.client(alice).Acks
			a[1].Offset, a[2].Offset = 2, 1
		}, Findings{OrderInversions: 1}, nil},
		{"inverted order of a client with many outstanding", func(w *world) {
			w.client(alice).Ordered = false
			r := w.records[upTopic][0]
			r[1], r[2] = r[2], r[1]
			a := w.client(alice).Acks
			a[1].Offset, a[2].Offset = 2, 1
		}, Findings{}, nil},
		{"order over two partitions", func(w *world) {
			r := &w.records[upTopic][0]
			moved := (*r)[4]
			moved.Partition = 1
			*r = (*r)[:4]
			w.records[upTopic][1] = append(w.records[upTopic][1], moved)
			w.client(alice).Acks[4].Partition, w.client(alice).Acks[4].Offset = 1, 5
		}, Findings{OrderInversions: 1}, nil},
		{"a late duplicate is no inversion", func(w *world) { w.store(alice, 2, "gw-2", at(9)) }, Findings{}, nil},

		{"no answer", func(w *world) { w.failure(alice, "unanswered") }, Findings{Unanswered: 1}, nil},
		{"a frame that should not be", func(w *world) { w.failure(alice, "protocol") }, Findings{Protocol: 1}, nil},

		{"a lost record of one who acknowledges", func(w *world) { w.produce(alice, 6, "gw-1") }, Findings{Lost: 1}, nil},
		{"a lost record that only the sender knows", func(w *world) {
			w.produce(alice, 6, "gw-1")
			r := &w.records[downPrefix+"gw-1"][0]
			*r = (*r)[:len(*r)-1]
		}, Findings{Lost: 1}, func(c Counts) bool { return c.Gone == 1 }},
		{"a lost record that only Kafka knows", func(w *world) {
			w.produce(alice, 6, "gw-1")
			w.e.Logs.Produced = w.e.Logs.Produced[:len(w.e.Logs.Produced)-1]
		}, Findings{Lost: 1}, nil},
		{"a lost record for one of several", func(w *world) {
			w.put(downPrefix+"gw-1", 0, "", map[string]any{"target_user_ids": []string{"alice", "bob", "zoe"}, "message_id": "all", "data": 1}, at(1))
			w.client(bob).Pushes = append(w.client(bob).Pushes, traffic.Push{MessageID: "all", Data: json.RawMessage("1"), Session: "sb1"})
		}, Findings{Lost: 1}, nil},
		{"a record for several, undelivered for another", func(w *world) {
			w.put(downPrefix+"gw-1", 0, "", map[string]any{"target_user_ids": []string{"alice", "bob"}, "message_id": "all", "data": 1}, at(1))
			w.client(bob).Pushes = append(w.client(bob).Pushes, traffic.Push{MessageID: "all", Data: json.RawMessage("1"), Session: "sb1"})
			w.undelivered(w.records[downPrefix+"gw-1"][0][len(w.records[downPrefix+"gw-1"][0])-1], "bob", "offline")
		}, Findings{Lost: 1}, nil},
		{"a record for several, undelivered for a stranger", func(w *world) {
			w.put(downPrefix+"gw-1", 0, "", map[string]any{"target_user_ids": []string{"alice", "zoe"}, "message_id": "all", "data": 1}, at(1))
			w.undelivered(w.records[downPrefix+"gw-1"][0][len(w.records[downPrefix+"gw-1"][0])-1], "zoe", "offline")
		}, Findings{Lost: 1}, nil},
		{"a record without a message id", func(w *world) {
			n := w.put(downPrefix+"gw-1", 0, "", map[string]any{"user_id": "alice", "content": "hi"}, at(1))
			w.client(alice).Pushes = append(w.client(alice).Pushes, traffic.Push{
				MessageID: fmt.Sprintf("down-gw-1-0-%d", n), Data: json.RawMessage(`{"content":"hi"}`), Session: "sa"})
		}, Findings{}, nil},
		{"undelivered instead", func(w *world) { w.undelivered(w.produce(alice, 6, "gw-1"), "alice", "unacked") },
			Findings{}, func(c Counts) bool { return c.Reasons["unacked"] == 1 && c.Undelivered == 2 }},
		{"received and undelivered", func(w *world) { w.undelivered(w.records[downPrefix+"gw-1"][0][0], "alice", "unacked") },
			Findings{}, func(c Counts) bool { return c.ReceivedAndEnded == 1 }},
		{"dead letter instead", func(w *world) {
			r := w.produce(alice, 6, "gw-1")
			w.put(deadTopic, 0, "alice", r.Value, at(6), "reason", "unreadable")
		}, Findings{}, func(c Counts) bool { return c.Deadletter == 1 }},
		{"an unreadable record", func(w *world) { w.put(downPrefix+"gw-1", 0, "", []byte("{"), at(6)) }, Findings{Lost: 1}, nil},
		{"an unreadable record as dead letter", func(w *world) {
			w.put(downPrefix+"gw-1", 0, "", []byte("{"), at(6))
			w.put(deadTopic, 0, "", []byte("{"), at(6))
		}, Findings{}, nil},
		{"forwarded and received", func(w *world) {
			r := w.produce(bob, 6, "gw-1")
			w.put(downPrefix+"gw-2", 0, "bob", r.Value, at(6), hopHeader, "1")
			w.push(bob, 6, "sb2")
		}, Findings{}, func(c Counts) bool { return c.Forwarded == 1 && c.Units == 2*messages+2 }},
		{"forwarded and lost", func(w *world) {
			r := w.produce(alice, 6, "gw-2")
			w.put(downPrefix+"gw-1", 0, "alice", r.Value, at(6), hopHeader, "1")
		}, Findings{Lost: 1}, func(c Counts) bool { return c.Forwarded == 1 }},

		{"lost in a socket", func(w *world) { // bob's first session ended at 3
			w.dropPush(bob, 3)
		}, Findings{}, func(c Counts) bool { return c.LostInSockets == 1 }},
		{"lost amid a session that broke later", func(w *world) {
			w.dropPush(bob, 2)
		}, Findings{LostUnexplained: 1}, nil},
		{"lost in a session that did not break", func(w *world) { w.dropPush(bob, 5) }, Findings{LostUnexplained: 1}, nil},
		{"lost for one offline", func(w *world) { w.produce(carol, 5, "gw-1") }, Findings{LostUnexplained: 1}, nil},

		{"a record for another user", func(w *world) {
			w.client(bob).Pushes = append(w.client(bob).Pushes, w.client(alice).Pushes[0])
		}, Findings{Misdelivered: 1}, nil},
		{"a record for a stranger", func(w *world) {
			w.put(downPrefix+"gw-1", 0, "zoe", map[string]any{"target_user_id": "zoe", "message_id": "z", "data": 1}, at(1))
			w.client(bob).Pushes = append(w.client(bob).Pushes, traffic.Push{MessageID: "z", Data: json.RawMessage("1"), Session: "sb1"})
		}, Findings{Misdelivered: 1}, nil},
		{"a push without a record", func(w *world) { w.push(alice, 77, "sa") }, Findings{UnknownPushes: 1}, nil},
		{"a push twice", func(w *world) { w.push(alice, 5, "sa").Duplicate = true },
			Findings{}, func(c Counts) bool { return c.DuplicatePushes == 1 }},
		{"a push with other data", func(w *world) { w.client(alice).Pushes[1].Data = json.RawMessage(`{"seq": 2}`) },
			Findings{CorruptPushes: 1}, nil},

		{"presence at another gateway", func(w *world) { w.presence["alice"] = [2]string{"gw-2", "sa"} }, Findings{PresenceWrong: 1}, nil},
		{"presence of an older session", func(w *world) { w.presence["bob"] = [2]string{"gw-2", "sb1"} }, Findings{PresenceWrong: 1}, nil},
		{"no presence", func(w *world) { delete(w.presence, "alice") }, Findings{PresenceWrong: 1}, nil},
		{"presence of one offline", func(w *world) { w.presence["carol"] = [2]string{"gw-1", "sc"} }, Findings{PresenceWrong: 1}, nil},
		{"presence of one of two devices", func(w *world) {
			w.e.Logs.Clients = append(w.e.Logs.Clients, traffic.ClientLog{User: "alice", Device: "tab", Ack: true,
				Connects: []traffic.Connect{{Gateway: "gw-2", Session: "sa2", At: at(5)}}})
			w.presence["alice"] = [2]string{"gw-2", "sa2"}
		}, Findings{}, nil},
		{"a dead gateway registered", func(w *world) { w.etcd = append(w.etcd, "gw-3") }, Findings{RegistrationWrong: 1}, nil},
		{"a living gateway not registered", func(w *world) { w.etcd = w.etcd[:1] }, Findings{RegistrationWrong: 1}, nil},

		{"a deleted upstream topic", func(w *world) {
			w.sent(alice, 6)
			w.ack(alice, "alice-6", 700)
			w.e.Deleted = []OffsetRange{{Topic: upTopic, From: 0, To: 1000, Before: at(20)}}
		}, Findings{}, func(c Counts) bool { return c.DeletedAcks == 1 }},
		{"an ack after the deletion", func(w *world) {
			w.sent(alice, 6)
			w.ack(alice, "alice-6", 700)
			w.e.Deleted = []OffsetRange{{Topic: upTopic, From: 0, To: 1000, Before: at(6)}}
		}, Findings{FalseAcks: 1, AckedLost: 1}, nil},
		{"a deleted downstream topic", func(w *world) {
			w.e.Logs.Produced = append(w.e.Logs.Produced, traffic.Produced{User: "alice", Seq: 6, MessageID: "d-alice-6", Topic: "down-gone", Offset: 3, At: at(6)})
			w.e.Deleted = []OffsetRange{{Topic: "down-gone", From: 0, To: 4, Before: at(20)}}
		}, Findings{}, func(c Counts) bool { return c.DeletedLost == 1 && c.Gone == 1 }},
		{"an ack beyond the deleted range", func(w *world) {
			w.sent(alice, 6)
			w.ack(alice, "alice-6", 700)
			w.e.Deleted = []OffsetRange{{Topic: upTopic, From: 0, To: 700, Before: at(20)}}
		}, Findings{FalseAcks: 1, AckedLost: 1}, nil},
		{"forwarded from a deleted topic and lost", func(w *world) {
			r := w.produce(alice, 6, "gw-2")
			w.put(downPrefix+"gw-1", 0, "alice", r.Value, at(6), hopHeader, "1")
			w.e.Deleted = []OffsetRange{{Topic: downPrefix + "gw-2", From: 0, To: 100, Before: at(20)}}
		}, Findings{Lost: 1}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			tc.defect(w)
			v := w.judge()
			if v.Findings != tc.want {
				t.Errorf("findings %v, want %+v", v.Violations(), tc.want)
			}
			if (tc.want == Findings{}) != (len(v.Violations()) == 0) {
				t.Errorf("violations %v", v.Violations())
			}
			if tc.counts != nil && !tc.counts(v.Counts) {
				t.Errorf("counts %+v", v.Counts)
			}
		})
	}
}

// ack adds a success of alice's or bob's with an offset that the test chose.
func (w *world) ack(i int, id string, offset int64) {
	c := w.client(i)
	c.Acks = append(c.Acks, traffic.Ack{ID: id, Status: "success", Topic: upTopic, Partition: int32(i % 2), Offset: offset, At: at(6)})
}

func (w *world) failure(i int, what string) {
	c := w.client(i)
	c.Failures = append(c.Failures, traffic.Failure{What: what, ID: "x", At: at(6)})
}

// dropPush forgets that client i received the n-th record.
func (w *world) dropPush(i, n int) {
	c := w.client(i)
	c.Pushes = append(c.Pushes[:n-1], c.Pushes[n:]...)
}

// rewrite changes one field of a record's value.
func (w *world) rewrite(topic string, partition int, offset int, field string, value any) {
	r := w.records[topic][partition][offset]
	var v map[string]any
	if err := json.Unmarshal(r.Value, &v); err != nil {
		w.t.Fatal(err)
	}
	v[field] = value
	b, err := json.Marshal(v)
	if err != nil {
		w.t.Fatal(err)
	}
	r.Value = b
}

func TestPresenceIsPolledUntilItIsRight(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.e.PresenceTTL = testTimeout
	right := w.presence["alice"]
	w.presence["alice"] = [2]string{"gw-2", "old"}
	w.onRedis = func(set func(user string, p [2]string)) {
		time.AfterFunc(2*pollEvery, func() { set("alice", right) })
	}
	if v := w.judge(); len(v.Violations()) != 0 {
		t.Errorf("violations %v", v.Violations())
	}
}

func TestUnreadableEvidenceIsAnError(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if _, err := Judge(ctx, Evidence{UpstreamTopic: upTopic, Brokers: []string{"127.0.0.1:1"}, Redis: "127.0.0.1:1"}); err == nil {
		t.Error("no error without servers")
	}
}

func TestEachFindingIsAViolation(t *testing.T) {
	t.Parallel()
	var f Findings
	v := reflect.ValueOf(&f).Elem()
	for i := range v.NumField() {
		v.Field(i).SetInt(1)
		name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("json"), ",")
		got := (&Verdict{Findings: f}).Violations()
		if len(got) != 1 || !strings.HasPrefix(got[0], name+": 1") {
			t.Errorf("%s: violations %v", name, got)
		}
		v.Field(i).SetInt(0)
	}
}
