package logic

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// names is a directory in which only those are known who have signed up.
type names map[string]string

func (n names) name(id string) (string, bool) {
	if name, ok := n[id]; ok {
		return name, true
	}
	return id, false
}

func (n names) resolve(name string) string {
	if _, ok := n[strings.ToLower(name)]; ok {
		return strings.ToLower(name)
	}
	return name
}

// room is a chat with a clock that stands still.
type room struct {
	*chat
	t    *testing.T
	next int
}

func newRoom(t *testing.T, limits Limits) *room {
	o := Options{
		Secret: secret, Limits: limits,
	}
	_ = o.complete() // only the limits' defaults are wanted
	return &room{chat: newChat(o.Limits, names{"alice": "Alice", "bob": "Bob"}), t: t}
}

// from handles a record and returns what it led to, as "type to users" lines.
func (r *room) from(user, kind, clientID, data string) []delivery {
	r.next++
	return r.handle(&upstream{
		MessageID: fmt.Sprintf("m-%d", r.next), UserID: user, GatewayID: "g", SessionID: "s", Type: kind,
		ClientMsgID: clientID, Data: json.RawMessage(data), Timestamp: 1_000,
	}, 2_000)
}

func lines(list []delivery) string {
	var out []string
	for _, d := range list {
		out = append(out, d.kind+" to "+strings.Join(d.users, "+"))
	}
	return strings.Join(out, "; ")
}

func decode[T any](t *testing.T, raw json.RawMessage) T {
	t.Helper()
	var v T
	if err := json.Unmarshal(raw, &v); err != nil {
		t.Fatalf("%s: %v", raw, err)
	}
	return v
}

func (r *room) sync(user string, after int64, limit int) (syncView, []string) {
	r.t.Helper()
	out := r.from(user, typeSync, "", fmt.Sprintf(`{"after":%d,"limit":%d}`, after, limit))
	if len(out) != 1 || out[0].kind != typeSync || out[0].gateway != "g" {
		r.t.Fatalf("sync led to %s", lines(out))
	}
	v := decode[syncView](r.t, out[0].data)
	var contents []string
	for _, m := range v.Messages {
		contents = append(contents, string(decode[messageView](r.t, m).Content))
	}
	return v, contents
}

func TestWhoGetsWhat(t *testing.T) {
	for _, tc := range []struct{ name, user, kind, data, want string }{
		{"direct by user", "alice", typeSend, `{"to":"bob","content":"hi"}`,
			"conversation to alice; conversation to bob; new-message to bob"},
		{"direct by name", "alice", typeSend, `{"to":"Bob","content":"hi"}`,
			"conversation to alice; conversation to bob; new-message to bob"},
		{"direct by id", "bob", typeSend, `{"conversation_id":"dm:alice:bob","content":"hi"}`,
			"conversation to bob; conversation to alice; new-message to alice"},
		{"direct by id, wrong order", "bob", typeSend, `{"conversation_id":"dm:bob:alice","content":"hi"}`,
			"conversation to bob; conversation to alice; new-message to alice"},
		{"to somebody unknown", "alice", typeSend, `{"to":"nobody","content":"hi"}`,
			"conversation to alice; conversation to nobody; new-message to nobody"},
		{"with an echo", "alice", typeSend, `{"to":"bob","content":{"any":["json"]},"echo":true}`,
			"conversation to alice; conversation to bob; new-message to alice+bob"},
		{"to oneself", "alice", typeSend, `{"to":"alice","content":"note","echo":true}`,
			"conversation to alice; new-message to alice"},
		{"other people's conversation", "carol", typeSend, `{"conversation_id":"dm:alice:bob","content":"hi"}`, "chat-error to carol"},
		{"no conversation", "alice", typeSend, `{"conversation_id":"v1","content":"hi"}`, "chat-error to alice"},
		{"no addressee", "alice", typeSend, `{"content":"hi"}`, "chat-error to alice"},
		{"half an addressee", "alice", typeSend, `{"conversation_id":"dm:alice:","content":"hi"}`, "chat-error to alice"},
		{"a control character", "alice", typeSend, `{"to":"b\nb","content":"hi"}`, "chat-error to alice"},
		{"an endless addressee", "alice", typeSend, `{"to":"` + strings.Repeat("b", 129) + `","content":"hi"}`, "chat-error to alice"},
		{"no content", "alice", typeSend, `{"to":"bob"}`, "chat-error to alice"},
		{"null content", "alice", typeSend, `{"to":"bob","content":null}`, "chat-error to alice"},
		{"data of another shape", "alice", typeSend, `["to","bob"]`, "chat-error to alice"},
		{"no data", "alice", typeSend, ``, "chat-error to alice"},
		{"group", "alice", typeCreate, `{"name":"team","members":["Bob","carol","bob","alice"]}`,
			"conversation to alice; conversation to bob; conversation to carol"},
		{"group without a name", "alice", typeCreate, `{"name":" ","members":["bob"]}`, "chat-error to alice"},
		{"group with nobody's name", "alice", typeCreate, `{"name":"x","members":[""]}`, "chat-error to alice"},
		{"group too large", "alice", typeCreate, `{"name":"x","members":["1","2","3","4"]}`, "chat-error to alice"},
		{"join what is not", "alice", typeJoin, `{"conversation_id":"group:x"}`, "chat-error to alice"},
		{"join a direct one", "carol", typeJoin, `{"conversation_id":"dm:alice:bob"}`, "chat-error to carol"},
		{"receipt for what is not", "bob", typeDelivered, `{"conversation_id":"x","message_id":"y"}`, ""},
		{"a type of somebody else's", "alice", "typing", `{}`, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRoom(t, Limits{Members: 4})
			if got := lines(r.from(tc.user, tc.kind, "c-1", tc.data)); got != tc.want {
				t.Errorf("%s, want %s", got, tc.want)
			}
		})
	}
}

func TestIdsWithColons(t *testing.T) {
	for _, tc := range []struct{ id, user, peer string }{
		{"dm:alice:bob", "alice", "bob"},
		{"dm:alice:bob", "bob", "alice"},
		{"dm:a:b:c", "a:b", "c"},
		{"dm:a:b:c", "a", "b:c"},
		{"dm:a:b:c", "c", "a:b"},
		{"dm:alice:bob", "carol", ""},
		{"dm:alice:bob", "ob", ""},
		{"dm::", "", ""},
		{"group:1", "alice", ""},
	} {
		if peer, ok := directPeer(tc.id, tc.user); peer != tc.peer && ok || ok != (tc.peer != "") {
			t.Errorf("%s seen by %q: %q, %v, want %q", tc.id, tc.user, peer, ok, tc.peer)
		}
	}
}

func TestJoinedMembersGetMessages(t *testing.T) {
	r := newRoom(t, Limits{})
	group := decode[conversationView](t, r.from("alice", typeCreate, "c-1", `{"name":"team","members":["bob"]}`)[0].data)
	if group.ClientMsgID != "c-1" || group.Kind != kindGroup || len(group.Members) != 2 || !group.Members[0].Known {
		t.Errorf("group %+v", group)
	}
	send := `{"conversation_id":"` + group.ConversationID + `","content":"hi"}`
	if got := lines(r.from("carol", typeSend, "c-1", send)); got != "chat-error to carol" {
		t.Error("not a member:", got)
	}
	join := `{"conversation_id":"` + group.ConversationID + `"}`
	if got, want := lines(r.from("carol", typeJoin, "c-2", join)),
		"conversation to alice; conversation to bob; conversation to carol"; got != want {
		t.Error("joined:", got)
	}
	if got := lines(r.from("carol", typeJoin, "c-3", join)); got != "conversation to carol" {
		t.Error("joined again:", got)
	}
	if got := lines(r.from("carol", typeSend, "c-4", send)); got != "new-message to alice+bob" {
		t.Error("sent:", got)
	}
}

func TestEachClientMessageCountsOnce(t *testing.T) {
	r := newRoom(t, Limits{Seen: 2})
	send := func(user, id string) int {
		n := 0
		for _, d := range r.from(user, typeSend, id, `{"to":"bob","content":"hi"}`) {
			if d.kind == typeMessage {
				n++
			}
		}
		return n
	}
	for i, tc := range []struct {
		user, id string
		want     int
	}{
		{"alice", "c-1", 1},
		{"alice", "c-1", 0},
		{"carol", "c-1", 1}, // another user's c-1
		{"alice", "c-1", 0}, // still among the last two
		{"alice", "c-2", 1},
		{"carol", "c-1", 1}, // forgotten: memory is bounded
		{"alice", "", 1},
		{"alice", "", 1}, // without a name each record is its own
	} {
		if got := send(tc.user, tc.id); got != tc.want {
			t.Errorf("step %d: %d messages, want %d", i, got, tc.want)
		}
	}
	if len(r.seen.keys) != 2 || r.seen.order.Len() != 2 {
		t.Errorf("%d, %d keys remembered", len(r.seen.keys), r.seen.order.Len())
	}

	in := &upstream{MessageID: "same", UserID: "alice", Type: typeSend, Data: json.RawMessage(`{"to":"bob","content":"x"}`)}
	if len(r.handle(in, 1)) == 0 || len(r.handle(in, 1)) != 0 {
		t.Error("a record without a client's name was read twice and counted twice")
	}
}

func TestReceiptsReachTheSenderOnce(t *testing.T) {
	r := newRoom(t, Limits{})
	id := r.from("alice", typeSend, "c-1", `{"to":"bob","content":"hi"}`)[2].id
	receipt := `{"conversation_id":"dm:alice:bob","message_ids":["` + id + `","unknown"]}`
	if got := lines(r.from("alice", typeDelivered, "", receipt)); got != "" {
		t.Error("the sender's own receipt:", got)
	}
	if got := lines(r.from("carol", typeDelivered, "", receipt)); got != "" {
		t.Error("a stranger's receipt:", got)
	}
	out := r.from("bob", typeDelivered, "", receipt)
	if lines(out) != "message-delivered to alice" {
		t.Fatal(lines(out))
	}
	v := decode[receiptView](t, out[0].data)
	if v.MessageID != id || v.ClientMsgID != "c-1" || v.UserID != "bob" || !slices.Equal(v.DeliveredTo, []string{"bob"}) {
		t.Errorf("receipt %+v", v)
	}
	if got := lines(r.from("bob", typeDelivered, "", receipt)); got != "" {
		t.Error("the receipt again:", got)
	}
}

func TestSyncTellsWhatChanged(t *testing.T) {
	r := newRoom(t, Limits{})
	if v, got := r.sync("bob", 0, 0); len(v.Conversations)+len(got) != 0 || v.More {
		t.Errorf("nothing happened, but %+v", v)
	}
	first := r.from("alice", typeSend, "c-1", `{"to":"bob","content":"1"}`)[2].id
	r.from("alice", typeSend, "c-2", `{"to":"carol","content":"none of bob's business"}`)
	v, got := r.sync("bob", 0, 0)
	if len(v.Conversations) != 1 || !slices.Equal(got, []string{`"1"`}) {
		t.Fatalf("sync %+v %s", v, got)
	}
	cursor := v.After
	if v, got = r.sync("bob", cursor, 0); len(v.Conversations)+len(got) != 0 || v.After < cursor {
		t.Errorf("nothing happened since, but %+v", v)
	}
	// A receipt changes an old message: its sender learns of it by sync, too.
	mine, _ := r.sync("alice", 0, 0)
	r.from("bob", typeDelivered, "", `{"conversation_id":"dm:alice:bob","message_id":"`+first+`"}`)
	v, _ = r.sync("alice", mine.After, 0)
	if len(v.Messages) != 1 || !slices.Equal(decode[messageView](t, v.Messages[0]).DeliveredTo, []string{"bob"}) {
		t.Errorf("sync after a receipt %+v", v)
	}
}

func TestSyncComesInPages(t *testing.T) {
	r := newRoom(t, Limits{})
	var want []string
	for i := range 25 {
		want = append(want, fmt.Sprintf(`"%d"`, i))
		r.from([]string{"alice", "bob"}[i%2], typeSend, fmt.Sprint("c-", i), fmt.Sprintf(`{"conversation_id":"dm:alice:bob","content":"%d"}`, i))
	}
	var all []string
	var after int64
	for page := 0; ; page++ {
		v, got := r.sync("bob", after, 10)
		all, after = append(all, got...), v.After
		if !v.More {
			break
		}
		if page > 3 {
			t.Fatal("endless")
		}
	}
	if !slices.Equal(all, want) {
		t.Errorf("pages hold %s", all)
	}
}

func TestSyncFitsIntoARecord(t *testing.T) {
	r := newRoom(t, Limits{})
	large := strings.Repeat("x", 100<<10)
	for i := range 5 {
		r.from("alice", typeSend, fmt.Sprint(i), `{"to":"bob","content":"`+large+`"}`)
	}
	r.from("alice", typeSend, "huge", `{"to":"bob","content":"`+strings.Repeat("y", 700<<10)+`"}`)
	var after int64
	n := 0
	for {
		out := r.from("bob", typeSync, "", fmt.Sprintf(`{"after":%d}`, after))
		if size := len(out[0].data); size > 720<<10 {
			t.Fatalf("an answer of %d bytes", size)
		}
		v := decode[syncView](t, out[0].data)
		n, after = n+len(v.Messages), v.After
		if !v.More {
			break
		}
	}
	if n != 6 {
		t.Errorf("%d messages, want 6", n)
	}
}

func TestMemoryIsBounded(t *testing.T) {
	limits := Limits{Conversations: 3, Messages: 4, HistoryBytes: 10 * (messageOverhead + 100), Seen: 10, Members: 5}
	r := newRoom(t, limits)
	content := strings.Repeat("x", 98)
	for i := range 200 {
		r.from("alice", typeSend, fmt.Sprint(i), fmt.Sprintf(`{"to":"u%d","content":"%s"}`, i/5%7, content))
		bytes, kept := 0, 0
		for _, c := range r.store.byID {
			kept += len(c.messages)
			for _, m := range c.messages {
				bytes += m.size()
			}
			if len(c.messages) > limits.Messages {
				t.Fatalf("%d messages in one conversation", len(c.messages))
			}
		}
		if bytes != r.store.bytes || bytes > limits.HistoryBytes {
			t.Fatalf("step %d: %d bytes in %d messages, counted %d, limit %d", i, bytes, kept, r.store.bytes, limits.HistoryBytes)
		}
		if n := len(r.store.byID); n > limits.Conversations || n != r.store.order.Len() || n != len(r.store.byUser["alice"]) {
			t.Fatalf("step %d: %d conversations, %d in order, %d of alice", i, n, r.store.order.Len(), len(r.store.byUser["alice"]))
		}
	}
	if len(r.store.byUser) != 4 { // alice and three peers
		t.Errorf("%d users are kept", len(r.store.byUser))
	}
	// One message beyond the limit all by itself is kept: it is the latest.
	r.from("alice", typeSend, "huge", `{"to":"u1","content":"`+strings.Repeat("z", 2*limits.HistoryBytes)+`"}`)
	if _, got := r.sync("u1", 0, 0); len(got) != 1 {
		t.Errorf("u1 gets %d messages", len(got))
	}
}

// The content must arrive byte for byte, as far as JSON goes.
func TestContentIsLeftAlone(t *testing.T) {
	for _, content := range []string{`"<a href='x'>&\u2028</a>"`, `"ü€😀"`, `{"b":1,"a":[1.0,1e3,"\/"]}`, `0`, `false`} {
		r := newRoom(t, Limits{})
		out := r.from("alice", typeSend, "c", `{"to":"bob","content":`+content+`}`)
		if got := string(decode[messageView](t, out[2].data).Content); got != content {
			t.Errorf("%s became %s", content, got)
		}
	}
}

func FuzzHandle(f *testing.F) {
	for _, kind := range []string{typeSend, typeCreate, typeJoin, typeDelivered, typeSync} {
		f.Add(kind, `{"conversation_id":"dm:alice:bob","to":"bob","content":"x","name":"n","members":["bob"],"after":-1,"limit":-5}`)
		f.Add(kind, `{"conversation_id":"dm::","message_ids":["",""],"after":9223372036854775807}`)
		f.Add(kind, `[[[`)
	}
	f.Fuzz(func(t *testing.T, kind, data string) {
		r := newRoom(t, Limits{Conversations: 2, Messages: 2})
		for _, d := range slices.Concat(r.from("alice", kind, "c", data), r.from("bob", kind, "", data)) {
			if len(d.users) == 0 && d.kind != typeMessage {
				t.Errorf("%s for nobody", d.kind)
			}
			if !json.Valid(d.data) {
				t.Errorf("%s with data %q", d.kind, d.data)
			}
		}
	})
}
