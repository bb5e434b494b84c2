//go:build chaos

package shard

import (
	"os"

	"im-gateway/codec"
)

var ackBeforeStore = os.Getenv("CHAOS_DEFECT") == "ack-before-store"

// hookMessage panics where a client asks for it.
func hookMessage(u *codec.Upstream) {
	if string(u.Type) == "chaos-panic-shard" {
		panic("asked for")
	}
}

// hookAccepted is a defect that the fault suite must find: the ack goes out before Kafka has the message.
func hookAccepted(s *shard, u *codec.Upstream) {
	if ses := s.lookup(u.Session); ackBeforeStore && ses != nil {
		u.Result = codec.UpstreamResult{Offset: -1}
		s.acknowledge(ses, u)
	}
}
