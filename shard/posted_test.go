package shard

import (
	"fmt"
	"testing"
	"time"

	"im-gateway/codec"
)

// post is a message that comes by HTTP for a session; its answer comes by the channel.
func (w *world) post(id codec.SessionID, user, name string) <-chan codec.UpstreamResult {
	e := w.message(id, user, name)
	reply := make(chan codec.UpstreamResult, 2) // the second would be one too many
	e.Upstream.Reply = reply
	w.offer(e)
	return reply
}

func (w *world) answer(reply <-chan codec.UpstreamResult) codec.UpstreamResult {
	w.t.Helper()
	select {
	case r := <-reply:
		return r
	case <-time.After(patience):
		w.t.Fatal("a posted message was not answered")
		return codec.UpstreamResult{}
	}
}

// settle gives every record of the next batch this result.
func (w *world) settle(r codec.UpstreamResult) {
	w.t.Helper()
	b := w.batch()
	for _, u := range b.Records {
		u.Result = r
	}
	w.set.Results(b)
}

// TestPosted: a message that is posted for a session is one of the session's, but its answer goes to who has
// posted it; once that one is told that nothing is known, the session learns what is known later.
func TestPosted(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Settings.MaxSessionInFlight, o.MaxSessions = 1, 2 })
	w.run()
	a, b := sessionID(0, 1), sessionID(1, 1)
	w.connected(a, "alice")
	stored := codec.UpstreamResult{Partition: 2, Offset: 7}

	first := w.post(a, "alice", "c-1")
	batch := w.batch() // in flight
	if r := w.answer(w.post(a, "alice", "c-2")); r.Code != codec.Overloaded {
		t.Errorf("one more than the session may have without an answer: %+v", r)
	}
	w.connected(b, "alice") // another session may have its own, and wait for the first one's
	again := w.post(b, "alice", "c-1")
	batch.Records[0].Result = stored
	id := string(batch.Records[0].MessageID)
	w.set.Results(batch)
	for i, reply := range []<-chan codec.UpstreamResult{first, again, nil} {
		if reply == nil {
			reply = w.post(a, "alice", "c-1") // once more, now that it is stored
		}
		if r := w.answer(reply); r.Code != codec.OK || r.Partition != 2 || r.Offset != 7 || r.MessageID != id {
			t.Errorf("answer %d: %+v, the record is %s", i, r, id)
		}
	}
	w.offer(w.message(a, "alice", "c-1")) // on its connection: the ack goes there
	w.until(func() bool { return len(w.sent[a]) == 2 })

	refused := w.post(a, "alice", "c-3")
	w.settle(codec.UpstreamResult{Code: codec.MessageTooLarge})
	if r := w.answer(refused); r.Code != codec.MessageTooLarge {
		t.Errorf("%+v", r)
	}
	w.mu.Lock()
	w.refuse = codec.BrokerUnavailable
	w.mu.Unlock()
	if r := w.answer(w.post(a, "alice", "c-4")); r.Code != codec.BrokerUnavailable || r.RetryAfterMS != 25 {
		t.Errorf("%+v", r)
	}
	w.mu.Lock()
	w.refuse = codec.OK
	w.mu.Unlock()

	// The session ends, the request is answered all the same; a later one finds no session.
	last := w.post(b, "alice", "c-5")
	batch = w.batch()
	w.offer(codec.Event{Kind: codec.EventClose, Session: b, Code: codec.CloseAbnormal})
	if r := w.answer(w.post(b, "alice", "c-6")); r.Code != codec.SessionNotFound {
		t.Errorf("%+v", r)
	}
	batch.Records[0].Result = stored
	w.set.Results(batch)
	if r := w.answer(last); r.Code != codec.OK || r.Offset != 7 {
		t.Errorf("%+v", r)
	}
	if got, want := fmt.Sprint(w.frames(a)), "[connected    message-ack success  c-1]"; got != want {
		t.Errorf("the session was sent %s, want %s", got, want)
	}
	w.until(func() bool { return w.set.Stats().InFlight == 0 }) // counted at the end of the round that answers
}

func TestPostedLate(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.AckDeadline, o.Settings.MaxSessionInFlight = tickLength, 2 })
	w.run()
	id := sessionID(0, 1)
	w.connected(id, "alice")
	var batches []*codec.UpstreamBatch
	for i, result := range []codec.Code{codec.OK, codec.MessageTooLarge} {
		reply := w.post(id, "alice", fmt.Sprint("c-", i))
		b := w.batch()
		if r := w.answer(reply); r.Code != codec.OutcomeUnknown {
			t.Errorf("%+v", r)
		}
		b.Records[0].Result.Code = result
		batches = append(batches, b)
	}
	if r := w.answer(w.post(id, "alice", "c-2")); r.Code != codec.Overloaded {
		t.Errorf("what is not known counts as without an answer: %+v", r)
	}
	for _, b := range batches {
		w.set.Results(b)
	}
	w.until(func() bool { return len(w.sent[id]) == 3 })
	want := "[connected    message-ack success  c-0 message-ack error MESSAGE_TOO_LARGE c-1]"
	if got := fmt.Sprint(w.frames(id)); got != want {
		t.Errorf("the session was sent %s, want %s", got, want)
	}
}

func TestPostedBeyondTheUsersRate(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Settings.UserMessagesPerSecond, o.Settings.UserBytesPerSecond = 1, 0 })
	w.run()
	id := sessionID(0, 1)
	w.connected(id, "alice")
	codes := map[codec.Code]int{}
	for i := range 10 {
		reply := w.post(id, "alice", fmt.Sprint("c-", i))
		select {
		case b := <-w.queue:
			w.set.Results(b)
			codes[w.answer(reply).Code]++
		case r := <-reply:
			codes[r.Code]++
			if r.Code == codec.RateLimited && w.closeCode(id) == 0 && r.RetryAfterMS == 0 {
				w.until(func() bool { return w.closed[id] != 0 }) // the one that went too far
			}
		case <-time.After(patience):
			t.Fatal("no answer")
		}
	}
	if codes[codec.OK] == 0 || codes[codec.RateLimited] == 0 || codes[codec.SessionNotFound] == 0 || len(codes) != 3 {
		t.Errorf("%v", codes)
	}
	if code := w.closeCode(id); code != codec.ClosePolicy {
		t.Errorf("closed with %d", code)
	}
	if got := w.frames(id); len(got) != 1 {
		t.Errorf("the session was sent %v", got)
	}
}
