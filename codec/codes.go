package codec

// Code is what a refusal is called on the wire. The empty Code means success.
type Code string

// The codes that clients see; docs/protocol.md says what a client should do about each.
const (
	OK                Code = ""
	InvalidMessage    Code = "INVALID_MESSAGE"
	MessageTooLarge   Code = "MESSAGE_TOO_LARGE"
	RateLimited       Code = "RATE_LIMITED"
	Overloaded        Code = "OVERLOADED"
	BrokerUnavailable Code = "BROKER_UNAVAILABLE"
	OutcomeUnknown    Code = "OUTCOME_UNKNOWN"
	AuthFailed        Code = "AUTH_FAILED"
	TokenExpired      Code = "TOKEN_EXPIRED"
	SessionNotFound   Code = "SESSION_NOT_FOUND" // over HTTP only
)

// Codes are all of them, success first.
var Codes = [...]Code{OK, InvalidMessage, MessageTooLarge, RateLimited, Overloaded, BrokerUnavailable, OutcomeUnknown,
	AuthFailed, TokenExpired}

// Number is the code's place in Codes.
func (c Code) Number() uint8 {
	for i := range Codes {
		if c == Codes[i] {
			return uint8(i)
		}
	}
	return 0
}

// Result names the code as the result of a message: "success" where it is none.
func (c Code) Result() string {
	if c == OK {
		return "success"
	}
	return string(c)
}

// CloseCode is a WebSocket close code (RFC 6455, section 7.4).
type CloseCode uint16

// Close codes of the RFC that the gateway sends.
const (
	CloseNormal      CloseCode = 1000
	CloseProtocol    CloseCode = 1002
	CloseUnsupported CloseCode = 1003
	CloseNoStatus    CloseCode = 1005 // never on the wire: the peer's close frame carried no code
	CloseAbnormal    CloseCode = 1006 // never on the wire: the connection ended without a close frame
	CloseInvalidData CloseCode = 1007
	ClosePolicy      CloseCode = 1008
	CloseTooBig      CloseCode = 1009
	CloseInternal    CloseCode = 1011
)

// The gateway's own close codes: after 40xx a client reconnects, after 45xx it does not, or only
// with a new token.
const (
	CloseSlowConsumer    CloseCode = 4000
	CloseHeartbeatMissed CloseCode = 4001
	CloseDraining        CloseCode = 4002
	CloseReplaced        CloseCode = 4500
	CloseKicked          CloseCode = 4501
	CloseTokenExpired    CloseCode = 4502
	CloseTokenRefused    CloseCode = 4503
)
