//go:build !chaos

package shard

import "im-gateway/codec"

// Hooks of the fault suite, which builds the gateway with the tag chaos.

func hookMessage(*codec.Upstream)          {}
func hookAccepted(*shard, *codec.Upstream) {}
