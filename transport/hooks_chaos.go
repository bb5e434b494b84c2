//go:build chaos

package transport

import "im-gateway/codec"

// hookFrame panics where a client asks for it.
func hookFrame(m *codec.ClientMessage) {
	if string(m.Type) == "chaos-panic-loop" {
		panic("asked for")
	}
}
