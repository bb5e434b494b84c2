package client_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"

	"github.com/coder/websocket"

	"im-gateway/client"
)

func Example() {
	gateway := httptest.NewServer(http.HandlerFunc(standIn))
	defer gateway.Close()

	c, err := client.New(client.Options{
		URLs:  []string{"ws" + strings.TrimPrefix(gateway.URL, "http") + "/ws"},
		Token: func(context.Context, client.TokenReason) (string, error) { return "a token of im-logic's", nil },
		Handle: func(m client.Message) {
			fmt.Println("received", m.Type, string(m.Data))
		},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()

	p, err := c.Send(client.Envelope{
		Type: "send-message",
		Data: json.RawMessage(`{"conversation_id":"v1","content":"hi"}`),
	})
	if err != nil { // ErrOutboxFull: tell the user to wait
		fmt.Println(err)
		return
	}
	receipt, err := p.Wait(ctx)
	if refused, ok := errors.AsType[*client.RefusedError](err); ok {
		fmt.Println("mend the message:", refused.Code)
	} else if err == nil {
		fmt.Println("stored in", receipt.Topic, receipt.Partition, receipt.Offset)
	}

	cancel()
	fmt.Println(<-ended)
	// Output:
	// stored in im-upstream-topic 3 42
	// context canceled
}

// standIn accepts one message as the gateway would.
func standIn(w http.ResponseWriter, r *http.Request) {
	ws, err := websocket.Accept(w, r, &websocket.AcceptOptions{Subprotocols: []string{"im.json.v1"}})
	if err != nil {
		return
	}
	defer ws.CloseNow()
	send := func(format string, args ...any) {
		_ = ws.Write(r.Context(), websocket.MessageText, fmt.Appendf(nil, format, args...))
	}
	send(`{"type":"connected","data":{"gateway_id":"gw-0","session_id":"s1","heartbeat_ms":30000}}`)
	for {
		_, b, err := ws.Read(r.Context())
		if err != nil {
			return
		}
		var e struct {
			ID string `json:"message_id"`
		}
		if err := json.Unmarshal(b, &e); err != nil {
			return
		}
		send(`{"type":"message-ack","data":{"client_msg_id":%q,"status":"success","topic":"im-upstream-topic","partition":3,"offset":42}}`, e.ID)
	}
}
