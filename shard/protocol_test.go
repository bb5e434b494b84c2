package shard

import (
	"fmt"
	"testing"
	"time"
	"unsafe"

	"google.golang.org/protobuf/proto"

	"im-gateway/codec"
	"im-gateway/codec/clientpb"
)

func (w *world) openAs(id codec.SessionID, user string, p codec.Protocol, acks bool) {
	w.t.Helper()
	w.offer(codec.Event{Kind: codec.EventOpen, Session: id, Open: &codec.Open{
		User: user, Protocol: p, Acks: acks, ExpiresAt: time.Now().Add(time.Hour).UnixMilli(), ConnectedAt: time.Now().UnixMilli()}})
	w.until(func() bool { return len(w.sent[id]) > 0 })
}

// TestFanOutToBothProtocols: each session is sent what its protocol says, and all sessions of one protocol
// the very same slice.
func TestFanOutToBothProtocols(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.MaxSessions = 4 })
	payloads := map[codec.SessionID]*byte{} // of records that were not copied
	record := rec(nil)
	w.outcome = func(c *codec.Command) codec.Outcome {
		if c.Delivery.Record == record {
			payloads[c.Session] = unsafe.SliceData(c.Payload)
		}
		return codec.OutcomeFlushed
	}
	w.run()
	s := newSink()
	record.Owner, record.Targets = s, []string{"alice", "bob"}
	jsonA, protoA, protoB, protoAcks := sessionID(0, 1), sessionID(1, 1), sessionID(2, 1), sessionID(3, 1)
	w.openAs(jsonA, "alice", codec.JSON, false)
	w.openAs(protoA, "alice", codec.Proto, false)
	w.openAs(protoB, "bob", codec.Proto, false)
	w.openAs(protoAcks, "bob", codec.Proto, true)
	w.deliver(record)
	w.until(func() bool {
		return len(w.sent[jsonA]) == 2 && len(w.sent[protoA]) == 2 && len(w.sent[protoB]) == 2 && len(w.sent[protoAcks]) == 2
	})
	w.mu.Lock()
	if payloads[protoA] == nil || payloads[protoA] != payloads[protoB] || payloads[jsonA] == payloads[protoA] {
		t.Error("sessions of one protocol do not share their frame")
	}
	w.mu.Unlock()
	if got := w.raw(jsonA)[1]; got != `{"type":"new-message","message_id":"m","data":"x","timestamp":1}` {
		t.Errorf("JSON: %s", got)
	}
	for id, want := range map[codec.SessionID]string{
		protoA:    `connected; new-message m "x" 0`,
		protoB:    `connected; new-message m "x" 0`,
		protoAcks: `connected; new-message m "x" 1`,
	} {
		text := ""
		for i, payload := range w.raw(id) {
			var f clientpb.ServerFrame
			if err := proto.Unmarshal([]byte(payload), &f); err != nil {
				t.Fatal(err)
			}
			if text += f.Type; i == 0 {
				text += "; "
				continue
			}
			text += fmt.Sprintf(" %s %s %d", f.MessageId, f.Data, f.DeliveryId)
		}
		if text != want {
			t.Errorf("got %s, want %s", text, want)
		}
	}
	// Answers, refusals and the drain's hint speak the session's protocol too.
	w.offer(w.message(protoA, "alice", "n"))
	b := w.batch()
	b.Records[0].Result = codec.UpstreamResult{Code: codec.MessageTooLarge}
	w.set.Results(b)
	w.until(func() bool { return len(w.sent[protoA]) == 3 })
	if err := w.set.Drain(t.Context(), time.Millisecond, "draining"); err != nil {
		t.Fatal(err)
	}
	w.until(func() bool { return len(w.sent[protoA]) == 4 })
	for i, want := range map[int]string{2: "message-ack", 3: "reconnect"} {
		var f clientpb.ServerFrame
		if err := proto.Unmarshal([]byte(w.raw(protoA)[i]), &f); err != nil || f.Type != want {
			t.Errorf("%v, %v, want %s", &f, err, want)
		}
	}
}
