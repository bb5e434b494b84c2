package logic

import (
	"container/list"
	"encoding/json"
	"slices"
	"strings"
)

const (
	kindDirect = "dm"
	kindGroup  = "group"

	directPrefix = "dm:"
	groupPrefix  = "group:"

	// messageOverhead is what a message costs in memory beside its content, in bytes, roughly.
	messageOverhead = 400
)

// message is what is kept of a message.
type message struct {
	id, clientID string
	from         string
	content      json.RawMessage
	seq          int64
	rev          int64 // when it last changed
	sentAt       int64 // Unix ms
	delivered    []string
}

func (m *message) size() int { return len(m.content) + messageOverhead }

// conversation is what is kept of a conversation.
type conversation struct {
	id, kind, name string
	members        []string
	messages       []*message // by seq
	seq            int64      // the last one given
	rev            int64      // when the conversation itself, not its messages, last changed
	place          *list.Element
}

func (c *conversation) has(user string) bool { return slices.Contains(c.members, user) }

// others returns the members but one.
func (c *conversation) others(user string) []string {
	list := make([]string, 0, len(c.members))
	for _, m := range c.members {
		if m != user {
			list = append(list, m)
		}
	}
	return list
}

// find returns a kept message. Those that are asked for are mostly the latest.
func (c *conversation) find(id string) *message {
	for _, m := range slices.Backward(c.messages) {
		if m.id == id {
			return m
		}
	}
	return nil
}

// store holds conversations and their recent messages within Limits. One goroutine owns it.
type store struct {
	limits Limits
	byID   map[string]*conversation
	byUser map[string]map[string]*conversation
	order  *list.List // of *conversation, the liveliest first
	bytes  int        // of all messages kept
	rev    int64      // the last one given
}

func newStore(limits Limits) *store {
	return &store{
		limits: limits,
		byID:   make(map[string]*conversation),
		byUser: make(map[string]map[string]*conversation),
		order:  list.New(),
	}
}

// change returns a number greater than any before, also than those of an earlier process, for
// cursors outlive it: it is at least the time in microseconds, which JavaScript's numbers hold
// until the year 2255.
func (s *store) change(nowMicros int64) int64 {
	s.rev = max(s.rev+1, nowMicros)
	return s.rev
}

// open adds a conversation.
func (s *store) open(id, kind, name string, members []string, nowMicros int64) *conversation {
	c := &conversation{id: id, kind: kind, name: name, rev: s.change(nowMicros)}
	c.place = s.order.PushFront(c)
	s.byID[id] = c
	for _, m := range members {
		s.enter(c, m)
	}
	for len(s.byID) > s.limits.Conversations {
		s.forget(s.order.Back().Value.(*conversation))
	}
	return c
}

func (s *store) enter(c *conversation, user string) {
	if c.has(user) { // alice may write to herself
		return
	}
	c.members = append(c.members, user)
	if s.byUser[user] == nil {
		s.byUser[user] = make(map[string]*conversation)
	}
	s.byUser[user][c.id] = c
}

func (s *store) forget(c *conversation) {
	for _, m := range c.messages {
		s.bytes -= m.size()
	}
	s.order.Remove(c.place)
	delete(s.byID, c.id)
	for _, user := range c.members {
		delete(s.byUser[user], c.id)
		if len(s.byUser[user]) == 0 {
			delete(s.byUser, user)
		}
	}
}

// add appends a message, whose seq and rev it sets, and forgets what is beyond the limits.
func (s *store) add(c *conversation, m *message, nowMicros int64) {
	c.seq++
	m.seq, m.rev = c.seq, s.change(nowMicros)
	c.messages = append(c.messages, m)
	s.bytes += m.size()
	s.order.MoveToFront(c.place)
	if len(c.messages) > s.limits.Messages {
		s.dropOldest(c)
	}
	for e := s.order.Back(); e != nil && s.bytes > s.limits.HistoryBytes; {
		quiet := e.Value.(*conversation)
		if len(quiet.messages) == 0 || quiet == c && len(c.messages) == 1 {
			e = e.Prev()
			continue
		}
		s.dropOldest(quiet)
	}
}

func (s *store) dropOldest(c *conversation) {
	s.bytes -= c.messages[0].size()
	c.messages[0] = nil
	c.messages = c.messages[1:]
}

// directID is the id of the conversation of two users.
func directID(a, b string) string { return directPrefix + min(a, b) + ":" + max(a, b) }

// directPeer returns with whom a user talks in a direct conversation. Ids may hold colons, so it
// takes one of the two to tell where the other begins.
func directPeer(id, user string) (peer string, ok bool) {
	pair, found := strings.CutPrefix(id, directPrefix)
	if !found {
		return "", false
	}
	if peer, ok = strings.CutPrefix(pair, user+":"); ok && peer != "" {
		return peer, true
	}
	peer, ok = strings.CutSuffix(pair, ":"+user)
	return peer, ok && peer != ""
}
