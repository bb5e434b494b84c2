// Command notify says one thing to one user, for scripts. It ends with 0 once all in-sync replicas of Kafka
// have it; when it has not come so far in time, it may be stored or not.
//
//	IM_PASSWORD=alice-demo go run ./client/examples/notify -user alice -to bob "the backup is done"
//
// With -id of one's own it can be repeated without saying it twice.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"time"

	"im-gateway/client"
	"im-gateway/client/examples/account"
)

func main() {
	user := account.Flags(flag.CommandLine)
	to := flag.String("to", "", "user to tell")
	id := flag.String("id", "", "name of the message; one that was sent before is not said again")
	within := flag.Duration("within", 30*time.Second, "how long to try")
	flag.Parse()
	ctx, cancel := context.WithTimeout(context.Background(), *within)
	defer cancel()
	receipt, err := notify(ctx, user, *to, *id, strings.Join(flag.Args(), " "))
	if err != nil {
		fmt.Fprintln(os.Stderr, "notify:", err)
		os.Exit(1)
	}
	fmt.Printf("stored in %s, partition %d, offset %d\n", receipt.Topic, receipt.Partition, receipt.Offset)
}

func notify(ctx context.Context, user *account.Account, to, id, text string) (client.Receipt, error) {
	if err := user.Check(); err != nil {
		return client.Receipt{}, err
	}
	if to == "" || text == "" {
		return client.Receipt{}, errors.New("-to or what to say is missing")
	}
	var last error // why there was no connection
	c, err := client.New(client.Options{
		URLs: []string{user.URL()}, Token: user.Token, DeviceID: "notify", // beside the user's other devices, where several may be
		OnState: func(s client.State) {
			if s.Phase == client.Reconnecting {
				last = s.Err
			}
		},
	})
	if err != nil {
		return client.Receipt{}, err
	}
	data, err := json.Marshal(map[string]string{"to": to, "content": text})
	if err != nil {
		return client.Receipt{}, err
	}
	p, err := c.Send(client.Envelope{Type: "send-message", ID: id, Data: data})
	if err != nil {
		return client.Receipt{}, err
	}
	run, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- c.Run(run) }()
	<-p.Done() // at the latest when Run ends
	stop()
	why := <-ended
	receipt, err := p.Wait(ctx)
	if errors.Is(err, client.ErrClosed) { // why Run has ended: refused for good, or not in time
		if err = why; last != nil && ctx.Err() != nil {
			err = fmt.Errorf("%w: %w", why, last)
		}
	}
	return receipt, err
}
