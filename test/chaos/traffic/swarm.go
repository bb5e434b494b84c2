package traffic

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
	"golang.org/x/sync/errgroup"
)

// settleTime is how long nothing may arrive for users who do not acknowledge deliveries before what
// is missing for them counts as lost in a socket.
const settleTime = 5 * time.Second

// ErrNotQuiet is returned by WaitQuiet when something was still outstanding after the timeout.
var ErrNotQuiet = errors.New("traffic: not quiet")

// SwarmOptions describe many clients and the sender who writes to their users.
type SwarmOptions struct {
	Clients []ClientOptions
	Sender  SenderOptions
	// Undelivered and Deadletter are topics that WaitQuiet reads as ends of records.
	Undelivered, Deadletter string
}

// Swarm is the traffic of one row of the suite. Log may be used at any time.
type Swarm struct {
	Log     *Log
	Clients []*Client
	Sender  *Sender

	o         SwarmOptions
	transport *http.Transport
	ctx       context.Context // of the goroutines; ends in Close
	cancel    context.CancelFunc
	wg        sync.WaitGroup
}

// Start connects every client and, when the sender has users, begins to send. Close it.
func Start(ctx context.Context, o SwarmOptions) (*Swarm, error) {
	s := &Swarm{Log: &Log{}, o: o, transport: &http.Transport{DisableKeepAlives: true}}
	if len(o.Sender.Users) > 0 {
		var err error
		if s.Sender, err = NewSender(o.Sender, s.Log); err != nil {
			return nil, err
		}
	}
	s.ctx, s.cancel = context.WithCancel(ctx)
	hc := &http.Client{Transport: s.transport}
	for _, co := range o.Clients {
		c := NewClient(co, s.Log, hc)
		s.Clients = append(s.Clients, c)
		s.wg.Go(func() { c.Run(s.ctx) })
	}
	if s.Sender != nil {
		s.Sender.Start(s.ctx)
	}
	return s, nil
}

// WaitOnline waits until every client has a session.
func (s *Swarm) WaitOnline(ctx context.Context) error {
	return poll(ctx, func() error {
		n := 0
		for _, c := range s.Clients {
			if !c.Online() {
				n++
			}
		}
		if n > 0 {
			return fmt.Errorf("%d of %d clients are offline", n, len(s.Clients))
		}
		return nil
	})
}

// StopSending ends new messages and records; the clients stay connected.
func (s *Swarm) StopSending() {
	for _, c := range s.Clients {
		c.StopSending()
	}
	if s.Sender != nil {
		s.Sender.StopSending()
	}
}

// WaitQuiet waits, after StopSending, until every message is settled and every record was received
// or is on one of the topics of ends. What is missing for users who do not acknowledge is given up
// once nothing came for 5 s. Otherwise the error is ErrNotQuiet and tells what is missing.
func (s *Swarm) WaitQuiet(ctx context.Context, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err := poll(ctx, s.unsettled)
	if err == nil && s.Sender != nil {
		err = s.waitEnds(ctx)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNotQuiet, err)
	}
	return nil
}

func (s *Swarm) unsettled() error {
	messages, ended := 0, 0
	for _, c := range s.Clients {
		n := c.Outstanding()
		messages += n
		if n > 0 && c.Ended() {
			ended++
		}
	}
	busy := 0
	if s.Sender != nil {
		busy = s.Sender.Busy()
	}
	if messages+busy > 0 {
		return fmt.Errorf("%d messages unsettled (%d clients of them ended), %d records not stored", messages, ended, busy)
	}
	return nil
}

// waitEnds waits until each record has an end.
func (s *Swarm) waitEnds(ctx context.Context) error {
	ends, err := s.watchEnds(ctx)
	if err != nil {
		return err
	}
	defer ends.close()
	logs := s.Log.Snapshot()
	byUser := make(map[string][]*Client, len(s.Clients))
	for _, c := range s.Clients {
		byUser[c.o.User] = append(byUser[c.o.User], c)
	}
	missing := logs.Produced
	changed := time.Now()
	return poll(ctx, func() error {
		before := len(missing)
		acking := 0
		left := missing[:0]
		for _, p := range missing {
			if received(byUser[p.User], p.MessageID) || ends.has(p.MessageID) {
				continue
			}
			left = append(left, p)
			if acknowledges(byUser[p.User]) {
				acking++
			}
		}
		missing = left
		if len(missing) != before {
			changed = time.Now()
		}
		if len(missing) == 0 || acking == 0 && time.Since(changed) >= settleTime {
			return nil
		}
		return fmt.Errorf("%d records without an end, %d of them of users who acknowledge, the first %s at %s/%d@%d",
			len(missing), acking, missing[0].MessageID, missing[0].Topic, missing[0].Partition, missing[0].Offset)
	})
}

func received(clients []*Client, id string) bool {
	for _, c := range clients {
		if c.rec.received(id) {
			return true
		}
	}
	return false
}

func acknowledges(clients []*Client) bool {
	for _, c := range clients {
		if !c.o.Ack {
			return false
		}
	}
	return true
}

// ends is the set of message ids on the topics of ends, filled as they are read.
type ends struct {
	client *kgo.Client
	group  errgroup.Group
	mu     sync.Mutex
	ids    map[string]bool
}

func (s *Swarm) watchEnds(ctx context.Context) (*ends, error) {
	k, err := kgo.NewClient(kgo.SeedBrokers(s.o.Sender.Brokers...),
		kgo.ConsumeTopics(s.o.Undelivered, s.o.Deadletter),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	if err != nil {
		return nil, err
	}
	e := &ends{client: k, ids: make(map[string]bool)}
	e.group.Go(func() error {
		for {
			f := k.PollFetches(ctx)
			if f.IsClientClosed() || ctx.Err() != nil {
				return nil
			}
			e.mu.Lock()
			f.EachRecord(func(r *kgo.Record) { e.ids[RecordID(r)] = true })
			e.mu.Unlock()
		}
	})
	return e, nil
}

func (e *ends) has(id string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.ids[id]
}

func (e *ends) close() {
	e.client.Close()
	_ = e.group.Wait() // it returns nil only
}

// RecordID is the message id of a downstream record or of one on a topic of ends: the header's, or
// the value's, or empty.
func RecordID(r *kgo.Record) string {
	for _, h := range r.Headers {
		if h.Key == "message_id" {
			return string(h.Value)
		}
	}
	var v struct {
		MessageID string `json:"message_id"`
	}
	_ = json.Unmarshal(r.Value, &v) // an unreadable record has no id
	return v.MessageID
}

// Close disconnects every client and ends the sender.
func (s *Swarm) Close() {
	s.StopSending()
	s.cancel()
	s.wg.Wait()
	if s.Sender != nil {
		s.Sender.Close()
	}
	s.transport.CloseIdleConnections()
}

// poll calls f until it returns nil; when ctx ends first, it returns f's last error.
func poll(ctx context.Context, f func() error) error {
	for {
		err := f()
		if err == nil || ctx.Err() != nil {
			return err
		}
		sleep(ctx, 100*time.Millisecond)
	}
}
