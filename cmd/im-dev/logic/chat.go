package logic

import (
	"cmp"
	"encoding/json"
	"slices"
	"strings"
	"unicode/utf8"
)

const (
	maxUserID    = 128 // bytes, as the gateways have it
	maxGroupName = 64  // characters

	// syncPage and syncBytes bound one sync answer. A single message may be larger than syncBytes.
	syncPage  = 200
	syncBytes = 256 << 10
)

// directory knows the users by name.
type directory interface {
	// name returns what to show for a user id, and whether such a user has signed up.
	name(id string) (name string, known bool)
	// resolve returns the user id that a person means by a name.
	resolve(name string) string
}

// delivery is one thing for some users.
type delivery struct {
	users []string
	// gateway is where to send it; empty: wherever each user is connected. An answer goes back to the
	// session that asked, even if Redis does not know of it yet.
	gateway string
	device  string // only this device of theirs; empty: all
	kind    string
	id      string // message_id
	trace   string
	parent  string // the traceparent of the record that led to it
	data    json.RawMessage
	now     int64 // Unix ms
}

// chat is the logic itself: records in, deliveries out, no I/O. One goroutine owns it.
type chat struct {
	store *store
	seen  *seen
	users directory
}

func newChat(limits Limits, users directory) *chat {
	return &chat{store: newStore(limits), seen: newSeen(limits.Seen), users: users}
}

// turn is the handling of one record.
type turn struct {
	*chat
	in    *upstream
	nowMS int64
	out   []delivery
}

// handle returns what a record leads to: nothing for types that are not the chat's, and for
// duplicates.
func (c *chat) handle(in *upstream, nowMS int64) []delivery {
	t := &turn{chat: c, in: in, nowMS: nowMS}
	switch in.Type {
	case typeSend:
		once(t, t.send)
	case typeCreate:
		once(t, t.create)
	case typeJoin:
		once(t, t.join)
	case typeDelivered:
		decoded(t, t.arrived)
	case typeSync:
		decoded(t, t.sync)
	}
	return t.out
}

// once calls f unless this record, or another one of the same client message, was handled before.
func once[T any](t *turn, f func(T)) {
	key := t.in.UserID + "\x00id\x00" + t.in.MessageID // the record was read twice
	if t.in.ClientMsgID != "" {
		key = t.in.UserID + "\x00client\x00" + t.in.ClientMsgID
	}
	if !t.seen.again(key) {
		decoded(t, f)
	}
}

func decoded[T any](t *turn, f func(T)) {
	var data T
	if err := json.Unmarshal(t.in.Data, &data); err != nil {
		t.refuse("INVALID_DATA", "data does not fit the type "+t.in.Type)
		return
	}
	f(data)
}

func (t *turn) send(d sendData) {
	if len(d.Content) == 0 || string(d.Content) == "null" || string(d.Content) == `""` {
		t.refuse("INVALID_DATA", "content is missing")
		return
	}
	c := t.conversation(d)
	if c == nil {
		return
	}
	m := &message{
		id: t.in.MessageID, clientID: t.in.ClientMsgID, from: t.in.UserID,
		content: d.Content, sentAt: cmp.Or(t.in.Timestamp, t.nowMS),
	}
	t.store.add(c, m, t.micros())
	targets := c.others(t.in.UserID)
	if d.Echo {
		targets = c.members
	}
	t.to(targets, typeMessage, m.id, encode(t.message(c, m)))
}

// conversation finds the one that a message is for, and begins a direct one. It refuses and returns
// nil when there is none.
func (t *turn) conversation(d sendData) *conversation {
	me := t.in.UserID
	peer, direct := d.To, d.ConversationID == ""
	if !direct {
		peer, direct = directPeer(d.ConversationID, me)
	}
	if !direct {
		return t.mine(d.ConversationID)
	}
	peer = t.users.resolve(peer)
	if !validUserID(peer) {
		t.refuse("INVALID_DATA", "conversation_id or to is missing or no user id")
		return nil
	}
	id := directID(me, peer)
	if c := t.store.byID[id]; c != nil {
		return c
	}
	c := t.store.open(id, kindDirect, "", []string{me, peer}, t.micros())
	t.announce(c, c.members)
	return c
}

// mine returns a conversation that the sender is a member of, or refuses.
func (t *turn) mine(id string) *conversation {
	c := t.store.byID[id]
	switch {
	case c == nil:
		t.refuse("CONVERSATION_UNKNOWN", "there is no such conversation")
		return nil
	case !c.has(t.in.UserID):
		t.refuse("NOT_A_MEMBER", "join the conversation first")
		return nil
	}
	return c
}

func (t *turn) create(d createData) {
	name := strings.TrimSpace(d.Name)
	if name == "" || utf8.RuneCountInString(name) > maxGroupName || !printable(name) {
		t.refuse("INVALID_DATA", "name: 1 to 64 printable characters")
		return
	}
	members := []string{t.in.UserID}
	for _, m := range d.Members {
		id := t.users.resolve(strings.TrimSpace(m))
		if !validUserID(id) {
			t.refuse("INVALID_DATA", "members: not a user id")
			return
		}
		if !slices.Contains(members, id) {
			members = append(members, id)
		}
		if len(members) > t.store.limits.Members {
			t.refuse("LIMIT_REACHED", "too many members")
			return
		}
	}
	c := t.store.open(groupPrefix+t.in.MessageID, kindGroup, name, members, t.micros())
	t.announce(c, c.members)
}

func (t *turn) join(d joinData) {
	c := t.store.byID[d.ConversationID]
	switch {
	case c == nil || c.kind != kindGroup:
		t.refuse("CONVERSATION_UNKNOWN", "there is no such group")
		return
	case c.has(t.in.UserID):
		t.announce(c, []string{t.in.UserID})
		return
	case len(c.members) >= t.store.limits.Members:
		t.refuse("LIMIT_REACHED", "the group is full")
		return
	}
	t.store.enter(c, t.in.UserID)
	c.rev = t.store.change(t.micros())
	t.announce(c, c.members)
}

func (t *turn) arrived(d deliveredData) {
	c := t.store.byID[d.ConversationID]
	if c == nil || !c.has(t.in.UserID) {
		return // forgotten meanwhile, or none of the sender's business
	}
	if d.MessageID != "" {
		d.MessageIDs = append(d.MessageIDs, d.MessageID)
	}
	for _, id := range d.MessageIDs {
		m := c.find(id)
		if m == nil || m.from == t.in.UserID || slices.Contains(m.delivered, t.in.UserID) {
			continue
		}
		m.delivered = append(m.delivered, t.in.UserID)
		m.rev = t.store.change(t.micros())
		t.to([]string{m.from}, typeReceipt, m.id+"/delivered/"+t.in.UserID, encode(receiptView{
			ConversationID: c.id, MessageID: m.id, ClientMsgID: m.clientID,
			UserID: t.in.UserID, DeliveredTo: m.delivered,
		}))
	}
}

// sync answers with what changed after a cursor, oldest change first, as far as one answer holds.
func (t *turn) sync(d syncData) {
	me := t.in.UserID
	limit := syncPage
	if d.Limit > 0 {
		limit = min(d.Limit, syncPage)
	}
	type change struct {
		rev int64
		c   *conversation
		m   *message // nil: the conversation itself
	}
	var changes []change
	for id, c := range t.store.byUser[me] {
		if d.ConversationID != "" && d.ConversationID != id {
			continue
		}
		if c.rev > d.After {
			changes = append(changes, change{c.rev, c, nil})
		}
		for _, m := range c.messages {
			if m.rev > d.After {
				changes = append(changes, change{m.rev, c, m})
			}
		}
	}
	slices.SortFunc(changes, func(a, b change) int { return cmp.Compare(a.rev, b.rev) })
	answer := syncView{
		Conversations: []json.RawMessage{}, Messages: []json.RawMessage{},
		After: max(d.After, t.store.rev), ClientMsgID: t.in.ClientMsgID,
	}
	size := 0
	for i, ch := range changes {
		var view json.RawMessage
		if ch.m == nil {
			view = encode(t.view(ch.c, ""))
		} else {
			view = encode(t.message(ch.c, ch.m))
		}
		if i == limit || i > 0 && size+len(view) > syncBytes {
			answer.More, answer.After = true, changes[i-1].rev
			break
		}
		size += len(view)
		if ch.m == nil {
			answer.Conversations = append(answer.Conversations, view)
		} else {
			answer.Messages = append(answer.Messages, view)
		}
	}
	t.answer(typeSync, encode(answer))
}

func (t *turn) message(c *conversation, m *message) messageView {
	name, _ := t.users.name(m.from)
	return messageView{
		ConversationID: c.id, MessageID: m.id, ClientMsgID: m.clientID, Seq: m.seq,
		From: m.from, FromName: name, Content: m.content, SentAt: m.sentAt, DeliveredTo: m.delivered,
	}
}

func (t *turn) view(c *conversation, clientMsgID string) conversationView {
	v := conversationView{ConversationID: c.id, Kind: c.kind, Name: c.name, ClientMsgID: clientMsgID}
	for _, id := range c.members {
		name, known := t.users.name(id)
		v.Members = append(v.Members, memberView{UserID: id, Name: name, Known: known})
	}
	return v
}

// announce tells users of a conversation, each by a record of its own: keyed like the messages of
// a direct conversation it stays in front of them.
func (t *turn) announce(c *conversation, users []string) {
	id := t.in.MessageID + "/conversation"
	others := encode(t.view(c, ""))
	for _, user := range users {
		if user == t.in.UserID {
			t.answerAs(id, typeConversation, encode(t.view(c, t.in.ClientMsgID)))
			continue
		}
		t.to([]string{user}, typeConversation, id, others)
	}
}

func (t *turn) refuse(code, why string) {
	t.answer(typeError, encode(errorView{ClientMsgID: t.in.ClientMsgID, Code: code, Message: why}))
}

// answer sends to the session that the record came from, where the user has named its device.
func (t *turn) answer(kind string, data json.RawMessage) {
	t.answerAs(t.in.MessageID+"/"+kind, kind, data)
}

func (t *turn) answerAs(id, kind string, data json.RawMessage) {
	t.to([]string{t.in.UserID}, kind, id, data)
	if t.in.SessionID != "" { // else it came by HTTP, and the user may be anywhere
		t.out[len(t.out)-1].gateway, t.out[len(t.out)-1].device = t.in.GatewayID, t.in.DeviceID
	}
}

func (t *turn) to(users []string, kind, id string, data json.RawMessage) {
	t.out = append(t.out, delivery{
		users: users, kind: kind, id: id, trace: t.in.TraceID, parent: t.in.traceParent, data: data, now: t.nowMS,
	})
}

func (t *turn) micros() int64 { return t.nowMS * 1000 }

func validUserID(id string) bool {
	return id != "" && len(id) <= maxUserID && utf8.ValidString(id) &&
		strings.IndexFunc(id, func(r rune) bool { return r < ' ' || r == 0x7f }) < 0
}
