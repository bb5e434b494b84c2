package main

import (
	"hash/maphash"
	"sync"
)

const hubShards = 64

// hub finds the client of a user.
type hub struct {
	seed   maphash.Seed
	shards [hubShards]hubShard
}

type hubShard struct {
	mu      sync.RWMutex
	clients map[string]*client
}

func newHub() *hub {
	h := &hub{seed: maphash.MakeSeed()}
	for i := range h.shards {
		h.shards[i].clients = map[string]*client{}
	}
	return h
}

func (h *hub) shard(user string) *hubShard {
	return &h.shards[maphash.String(h.seed, user)%hubShards]
}

// put makes c its user's client and returns the one before, if any.
func (h *hub) put(c *client) *client {
	s := h.shard(c.user)
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.clients[c.user]
	s.clients[c.user] = c
	return old
}

// remove says whether c still was its user's client.
func (h *hub) remove(c *client) bool {
	s := h.shard(c.user)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.clients[c.user] != c {
		return false
	}
	delete(s.clients, c.user)
	return true
}

func (h *hub) get(user string) *client {
	s := h.shard(user)
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.clients[user]
}

// in appends the clients of shard i to buf.
func (h *hub) in(i int, buf []*client) []*client {
	s := &h.shards[i]
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, c := range s.clients {
		buf = append(buf, c)
	}
	return buf
}
