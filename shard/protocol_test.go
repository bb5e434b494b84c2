package shard

import (
	"fmt"
	"strings"
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

// TestFanOutToAllProtocols: each session is sent what its protocol says, and all sessions of one protocol
// the very same slice.
func TestFanOutToAllProtocols(t *testing.T) {
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
	streamA, streamB, streamAcks := sessionID(4, 1), sessionID(5, 1), sessionID(6, 1)
	w.openAs(streamA, "alice", codec.SSE, false)
	w.openAs(streamB, "bob", codec.SSE, false)
	w.openAs(streamAcks, "bob", codec.SSE, true)
	w.deliver(record)
	w.until(func() bool {
		for _, id := range []codec.SessionID{jsonA, protoA, protoB, protoAcks, streamA, streamB, streamAcks} {
			if len(w.sent[id]) != 2 {
				return false
			}
		}
		return true
	})
	w.mu.Lock()
	if payloads[protoA] == nil || payloads[protoA] != payloads[protoB] || payloads[jsonA] == payloads[protoA] ||
		payloads[streamA] == nil || payloads[streamA] != payloads[streamB] || payloads[jsonA] == payloads[streamA] {
		t.Error("sessions of one protocol do not share their frame")
	}
	w.mu.Unlock()
	for id, want := range map[codec.SessionID]string{
		streamA:    "id: m\ndata: " + `{"type":"new-message","message_id":"m","data":"x","timestamp":1}` + "\n\n",
		streamAcks: "id: m\ndata: " + `{"type":"new-message","message_id":"m","data":"x","timestamp":1,"delivery_id":1}` + "\n\n",
	} {
		if got := w.raw(id); !strings.HasPrefix(got[0], `data: {"type":"connected",`) || got[1] != want {
			t.Errorf("SSE: %q, want %q", got, want)
		}
	}
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
	w.until(func() bool { return len(w.sent[protoA]) == 4 && len(w.sent[streamA]) == 3 })
	if got := w.raw(streamA)[2]; !strings.HasPrefix(got, `data: {"type":"reconnect",`) || !strings.HasSuffix(got, "}\n\n") {
		t.Errorf("SSE: %q", got)
	}
	for i, want := range map[int]string{2: "message-ack", 3: "reconnect"} {
		var f clientpb.ServerFrame
		if err := proto.Unmarshal([]byte(w.raw(protoA)[i]), &f); err != nil || f.Type != want {
			t.Errorf("%v, %v, want %s", &f, err, want)
		}
	}
}
