package shard

import "im-gateway/codec"

// Egress takes commands to the event loops. Neither method may block.
type Egress interface {
	// Submit hands a batch to its loop, which returns it by Set.Return.
	Submit(b *codec.EgressBatch)
	// Resume tells a loop that the shard's queue, found full by Set.Offer, has room again.
	Resume(loop, shard int)
}

// Publisher takes records for the upstream topic.
type Publisher interface {
	// Admit reserves room for one record of so many bytes, or refuses with a code and, where it
	// can be said, when to try again. It never blocks.
	Admit(bytes int) (code codec.Code, retryAfterMS int32)
	// Queue takes the admitted records of a shard, in order. The shard sends only when there is room.
	Queue(shard int) chan<- *codec.UpstreamBatch
}

// Events takes user.online and user.offline. It never blocks.
type Events interface {
	UserEvent(online bool, user string, session codec.SessionID, reason string, atMS int64)
}

// Presence carries presence operations to Redis; results come by Set.PresenceResults.
type Presence interface {
	// Submit never blocks; false: there is no room, the shard offers the operations again later.
	// The slice becomes the callee's when true is returned.
	Submit(shard int, ops []PresenceOp) bool
}

// PresenceKind says what a PresenceOp does.
type PresenceKind uint8

// The kinds of PresenceOp.
const (
	Claim PresenceKind = iota + 1
	Refresh
	Release
)

// PresenceOp is one presence operation for one session.
type PresenceOp struct {
	Kind        PresenceKind
	User        string
	Session     codec.SessionID
	Version     int64 // what the claim was given; 0: never claimed
	ConnectedAt int64 // Unix ms
	DeviceID    string
	Device      string // the kind of device
}

// Evicted is a session that a claim has taken the place of.
type Evicted struct{ Gateway, Session string }

// PresenceResult is what became of a PresenceOp.
type PresenceResult struct {
	Kind       PresenceKind
	Session    codec.SessionID
	Version    int64
	Evicted    []Evicted // Claim
	Elsewhere  bool      // the user has sessions on other gateways too
	Superseded bool      // a newer session has taken this one's place
	Err        error
}
