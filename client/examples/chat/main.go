// Command chat talks to other users from a terminal: each line of the input is a user and what to say.
//
//	make run                                                                     # in another terminal
//	IM_PASSWORD=alice-demo go run ./client/examples/chat -user alice
//	bob hi there
//
// It shows a client's whole life: what was missed is asked for after each connect, what arrives is
// acknowledged and reported to its sender, and what is typed while no gateway is there is sent later.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"

	"im-gateway/client"
	"im-gateway/client/examples/account"
)

func main() {
	user := account.Flags(flag.CommandLine)
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, user, os.Stdin, os.Stdout); err != nil && !errors.Is(err, context.Canceled) {
		fmt.Fprintln(os.Stderr, "chat:", err)
		os.Exit(1)
	}
}

// chat is the program's state. Handle and OnState are called on two goroutines of the client's.
type chat struct {
	client *client.Client
	out    io.Writer

	mu    sync.Mutex
	shown map[string]bool // ids of messages; sync tells of those again that came by themselves
	after int64           // where the next sync begins
}

func run(ctx context.Context, user *account.Account, in io.Reader, out io.Writer) error {
	if err := user.Check(); err != nil {
		return err
	}
	c := &chat{out: out, shown: map[string]bool{}}
	var err error
	c.client, err = client.New(client.Options{
		URLs: []string{user.URL()}, Token: user.Token, AckDeliveries: true,
		Handle: c.handle, OnState: c.state,
	})
	if err != nil {
		return err
	}
	go c.read(ctx, in)
	return c.client.Run(ctx)
}

// state asks for what was missed, after each connect: the gateway keeps no history.
func (c *chat) state(s client.State) {
	switch s.Phase {
	case client.Connected:
		c.print("* connected to %s\n", s.Gateway)
		c.sync()
	case client.Reconnecting:
		c.print("* %v; again in %s\n", s.Err, s.After)
	}
}

func (c *chat) sync() {
	c.mu.Lock()
	after := c.after
	c.mu.Unlock()
	c.send("sync", map[string]any{"after": after})
}

// message is what somebody has said.
type message struct {
	ConversationID string          `json:"conversation_id"`
	MessageID      string          `json:"message_id"`
	From           string          `json:"from"`
	FromName       string          `json:"from_name"`
	Content        json.RawMessage `json:"content"`
}

func (c *chat) handle(m client.Message) {
	switch m.Type {
	case "new-message":
		var msg message
		if c.decode(m, &msg) {
			c.show(msg)
		}
	case "message-delivered":
		var d struct {
			ClientMsgID string `json:"client_msg_id"`
			UserID      string `json:"user_id"`
		}
		if c.decode(m, &d) {
			c.print("* %s has it\n", d.UserID)
		}
	case "sync":
		var d struct {
			Messages []message
			After    int64
			More     bool
		}
		if !c.decode(m, &d) {
			return
		}
		for _, msg := range d.Messages {
			c.show(msg)
		}
		c.mu.Lock()
		c.after = d.After
		c.mu.Unlock()
		if d.More {
			c.sync()
		}
	case "chat-error":
		var d struct{ Code, Message string }
		if c.decode(m, &d) {
			c.print("* %s: %s\n", d.Code, d.Message)
		}
	}
}

func (c *chat) decode(m client.Message, v any) bool {
	if err := json.Unmarshal(m.Data, v); err != nil {
		c.print("* a %s that cannot be read: %v\n", m.Type, err)
		return false
	}
	return true
}

// show prints a message once and reports that it has arrived. im-logic takes no notice of the report of
// one's own.
func (c *chat) show(m message) {
	c.mu.Lock()
	known := c.shown[m.MessageID]
	c.shown[m.MessageID] = true
	c.mu.Unlock()
	if known {
		return
	}
	var text string
	if json.Unmarshal(m.Content, &text) != nil {
		text = string(m.Content)
	}
	c.print("%s: %s\n", m.FromName, text)
	c.send("delivered", map[string]any{"conversation_id": m.ConversationID, "message_id": m.MessageID})
}

// read sends what is typed.
func (c *chat) read(ctx context.Context, in io.Reader) {
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		to, text, ok := strings.Cut(strings.TrimSpace(lines.Text()), " ")
		if !ok {
			c.print("* type a user's name, a blank, and what to say\n")
			continue
		}
		p := c.send("send-message", map[string]any{"to": to, "content": text})
		if p == nil {
			continue
		}
		go func() {
			if _, err := p.Wait(ctx); err != nil && ctx.Err() == nil {
				c.print("* not sent: %v\n", err)
			}
		}()
	}
}

// send queues a message; nil: there is no room for it.
func (c *chat) send(kind string, data any) *client.Pending {
	b, err := json.Marshal(data)
	if err == nil {
		var p *client.Pending
		if p, err = c.client.Send(client.Envelope{Type: kind, Data: b}); err == nil {
			return p
		}
	}
	if !errors.Is(err, client.ErrClosed) {
		c.print("* %v\n", err)
	}
	return nil
}

func (c *chat) print(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fmt.Fprintf(c.out, format, args...)
}
