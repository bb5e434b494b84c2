//go:build !chaos

package transport

import "im-gateway/codec"

// hookFrame is a hook of the fault suite, which builds the gateway with the tag chaos.
func hookFrame(*codec.ClientMessage) {}
