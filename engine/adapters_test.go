package engine

import (
	"fmt"
	"testing"

	"im-gateway/codec"
	"im-gateway/shard"
)

func TestPresenceSteps(t *testing.T) {
	op := func(kind shard.PresenceKind, session codec.SessionID) shard.PresenceOp {
		return shard.PresenceOp{Kind: kind, User: "u", Session: session}
	}
	for _, c := range []struct {
		name string
		ops  []shard.PresenceOp
		want string
	}{
		{"a page loaded again", []shard.PresenceOp{op(shard.Release, 1), op(shard.Claim, 2)}, "[[0] [1] [] []]"},
		{"a short session", []shard.PresenceOp{op(shard.Claim, 1), op(shard.Release, 1)}, "[[] [0] [] [1]]"},
		{"a close behind a refresh", []shard.PresenceOp{op(shard.Refresh, 1), op(shard.Release, 1), op(shard.Claim, 2)}, "[[] [2] [0] [1]]"},
	} {
		if got := fmt.Sprint(presenceSteps(c.ops)); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}
