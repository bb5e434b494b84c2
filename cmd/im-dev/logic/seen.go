package logic

import "container/list"

// seen remembers the last keys that it was asked about. One goroutine owns it.
type seen struct {
	max   int
	order *list.List // of string, the latest first
	keys  map[string]*list.Element
}

func newSeen(limit int) *seen {
	return &seen{max: limit, order: list.New(), keys: make(map[string]*list.Element)}
}

// again reports whether it was asked about this key before, and remembers it.
func (s *seen) again(key string) bool {
	if e := s.keys[key]; e != nil {
		s.order.MoveToFront(e)
		return true
	}
	s.keys[key] = s.order.PushFront(key)
	if s.order.Len() > s.max {
		last := s.order.Back()
		delete(s.keys, last.Value.(string))
		s.order.Remove(last)
	}
	return false
}
