// Command echo is a bot: it says to everyone what they have said to it.
//
//	IM_PASSWORD=bob-demo-1 go run ./client/examples/echo -user bob
//
// It says everything once, whatever breaks: with AckDeliveries the gateway holds a message until it was handled,
// and the answer's id is made of the message's, so that im-logic drops a second one.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"

	"im-gateway/client"
	"im-gateway/client/examples/account"
)

func main() {
	user := account.Flags(flag.CommandLine)
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, user); err != nil && !errors.Is(err, context.Canceled) {
		fmt.Fprintln(os.Stderr, "echo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, user *account.Account) error {
	if err := user.Check(); err != nil {
		return err
	}
	b := &bot{}
	var err error
	b.client, err = client.New(client.Options{
		URLs: []string{user.URL()}, Token: user.Token, Format: client.Protobuf, AckDeliveries: true,
		Handle: b.handle, Outbox: 10_000,
		OnState: func(s client.State) {
			if s.Err == nil {
				log.Println(s.Phase, s.URL)
			} else {
				log.Println(s.Phase, s.Err)
			}
		},
	})
	if err != nil {
		return err
	}
	return b.client.Run(ctx)
}

type bot struct{ client *client.Client }

// handle answers a message. It does not wait for the answer to be stored, which would keep the client from
// reading that it is: the outbox does the rest.
func (b *bot) handle(m client.Message) {
	var said struct {
		ConversationID string          `json:"conversation_id"`
		MessageID      string          `json:"message_id"`
		Content        json.RawMessage `json:"content"`
	}
	if m.Type != "new-message" || json.Unmarshal(m.Data, &said) != nil {
		return
	}
	data, err := json.Marshal(map[string]any{"conversation_id": said.ConversationID, "content": said.Content})
	if err == nil {
		_, err = b.client.Send(client.Envelope{Type: "send-message", ID: "echo-" + said.MessageID, Data: data})
	}
	if err != nil && !errors.Is(err, client.ErrDuplicateID) { // it is on its way already
		log.Println("not answered:", err) // ErrOutboxFull: thousands wait for Kafka
	}
}
