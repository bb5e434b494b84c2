package codec

// FrameType is the type of a frame to a client, as far as it is counted by it.
type FrameType uint8

// The types of frames.
const (
	FrameOther      FrameType = iota // a downstream record of a type of its own
	FrameNewMessage                  // a downstream record of the usual type
	FrameAck
	FrameConnected
	FrameError
	FramePong
	FrameTokenRefreshed
	FrameReconnect
	NumFrameTypes
)

var frameTypes = [NumFrameTypes]string{"other", TypeNewMessage, "message-ack", "connected", "error", "pong", "token-refreshed", "reconnect"}

func (t FrameType) String() string { return frameTypes[t] }

// Content is what a frame to a client is counted as.
type Content struct {
	Type FrameType
	Code uint8 // FrameAck: the Number of the code that it carries
}

// AckOf is the Content of an ack.
func AckOf(c Code) Content { return Content{FrameAck, c.Number()} }
