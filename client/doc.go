// Package client is the Go client of im-gateway: one user's connection, kept up across gateways,
// with an outbox that loses nothing and keeps order.
//
//	c, err := client.New(client.Options{
//		URLs:   []string{"wss://gw-0.example.com/ws", "wss://gw-1.example.com/ws"},
//		Token:  func(ctx context.Context, why client.TokenReason) (string, error) { return login(ctx) },
//		Handle: func(m client.Message) { fmt.Println(m.Type, string(m.Data)) },
//	})
//	go c.Run(ctx)
//	p, err := c.Send(client.Envelope{Type: "send-message", Data: data})
//	receipt, err := p.Wait(ctx)
//
// Programs to begin with are in client/examples: chat, echo and notify. The module is on no proxy;
// another one takes it from a clone:
//
//	go mod edit -require=im-gateway@v0.0.0 -replace=im-gateway=../im-gateway
//	go mod tidy
//
// # Sending
//
// [Client.Send] puts a message into the outbox and returns at once, connected or not. The message
// stays there, under one id, until the gateway says where Kafka stored it, refuses it for good or
// the caller cancels it:
//
//	answer                                  the client
//	success                                 Wait returns the [Receipt]
//	OVERLOADED, BROKER_UNAVAILABLE,         sends it again after retry_after_ms and up to a fifth
//	RATE_LIMITED, AUTH_FAILED,              more, else after 0.5 s growing to 10 s; nothing behind
//	TOKEN_EXPIRED                           it is sent before
//	OUTCOME_UNKNOWN                         takes a late success, else sends it again after 1 s
//	INVALID_MESSAGE, MESSAGE_TOO_LARGE      Wait returns a [RefusedError]; the next one follows
//	any other code                          the same
//	none within Options.AckTimeout          connects anew
//	the connection ends                     sends everything unsettled again, in order, same ids
//
// A message that is sent again may be stored twice. Both records carry its id as client_msg_id, by
// which im-logic drops the second.
//
// # Order
//
// With a Window of 1, the default, the gateway accepts messages in the order in which Send was
// called, whatever is refused or cut in between, at the price of one message per round trip to
// Kafka. With a larger Window that order holds only while nothing is refused: what was already on
// its way behind a refused message may be stored before it. The client then stops, waits until all
// outstanding messages are answered, and sends again from the refused one on, one at a time until
// every refused one is settled.
//
// # Receiving
//
// Options.Handle gets the messages one by one, in order. A message_id among the last 1,024 is
// dropped. With Options.AckDeliveries the gateway holds a message until Handle has returned, which it is
// told within 20 ms; without it, what lay in socket buffers when a connection broke is gone. The
// gateway keeps no history: after each [Connected] ask im-logic for what was missed.
//
// # Connecting
//
// The addresses are tried in turn, with a jittered back-off from 100 ms to 10 s, which begins anew after
// 10 s or a stored message, a refusal's Retry-After respected for its address. A Token that fails is asked
// again in the same way. Every close but 45xx leads to another connection, and so does a silence of 2.5
// heartbeats. After a reconnect hint the client moves on to the next address at a random moment of the
// given time, once its outstanding messages are answered.
//
// # Tokens
//
// Options.Token is called before each connection. In a session a JWT that will soon expire is replaced: see
// [Client.Refresh]. When a token is refused, or a session is ended for it (401, 4502, 4503), Token is asked
// for another one, twice in a row at most; the same one again, and any other 45xx, end [Client.Run] with a
// [CloseError].
package client
