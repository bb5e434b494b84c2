package traffic

import (
	"bufio"
	"encoding/json"
	"hash/fnv"
	"os"
	"slices"
	"sync"
	"time"
)

// Sent is one write of a message; a resend is another one with the same ID.
type Sent struct {
	Seq  int64     `json:"seq"`
	ID   string    `json:"id"`
	Sum  uint64    `json:"sum"` // Sum of the data's bytes
	At   time.Time `json:"at"`
	Addr string    `json:"addr"`
}

// Ack is a message-ack as it came.
type Ack struct {
	ID         string    `json:"id"`
	Status     string    `json:"status"`
	Code       string    `json:"code,omitempty"`
	Topic      string    `json:"topic,omitempty"`
	Partition  int32     `json:"partition"`
	Offset     int64     `json:"offset"` // -1: not told
	RetryAfter int64     `json:"retry_after_ms,omitempty"`
	At         time.Time `json:"at"`
}

// Success tells whether the message was said to be stored.
func (a Ack) Success() bool { return a.Status == "success" }

// Push is a downstream record as it came.
type Push struct {
	MessageID  string          `json:"message_id"`
	Seq        int64           `json:"seq"` // data.seq, 0 when there is none
	Data       json.RawMessage `json:"data"`
	Session    string          `json:"session"`
	DeliveryID int64           `json:"delivery_id,omitempty"`
	Duplicate  bool            `json:"duplicate,omitempty"` // this client had it before
	At         time.Time       `json:"at"`
}

// Connect is a `connected` frame.
type Connect struct {
	Addr     string    `json:"addr"`
	Gateway  string    `json:"gateway"`
	Session  string    `json:"session"`
	Degraded bool      `json:"degraded,omitempty"`
	At       time.Time `json:"at"`
}

// Disconnect is the end of a connection that had seen its `connected` frame.
type Disconnect struct {
	Session string    `json:"session"`
	Code    int       `json:"code"` // -1: no close frame came
	Err     string    `json:"err"`
	Ours    bool      `json:"ours,omitempty"` // the client ended it by itself
	At      time.Time `json:"at"`
}

// Hint is a `reconnect` frame.
type Hint struct {
	Session    string    `json:"session"`
	RetryAfter int64     `json:"retry_after_ms"`
	At         time.Time `json:"at"`
}

// Failure is whatever else went wrong: a refused handshake, an `error` frame, a message without an
// answer. What is the operation: dial, frame, protocol or unanswered.
type Failure struct {
	What   string    `json:"what"`
	Status int       `json:"status,omitempty"` // HTTP, for dial
	Code   string    `json:"code,omitempty"`
	ID     string    `json:"id,omitempty"`
	Err    string    `json:"err,omitempty"`
	At     time.Time `json:"at"`
}

// ClientLog is what one client sent and saw, each list in the order of the events.
type ClientLog struct {
	User        string        `json:"user"`
	Device      string        `json:"device,omitempty"`
	Ack         bool          `json:"ack"`     // deliveries are acknowledged
	Ordered     bool          `json:"ordered"` // at most one message outstanding
	Every       time.Duration `json:"every"`   // between messages; 0: does not send
	Sent        []Sent        `json:"-"`
	Acks        []Ack         `json:"-"`
	Pushes      []Push        `json:"-"`
	Connects    []Connect     `json:"-"`
	Disconnects []Disconnect  `json:"-"`
	Hints       []Hint        `json:"-"`
	Failures    []Failure     `json:"-"`
}

// Online returns the session that was open when the log was taken.
func (c *ClientLog) Online() (Connect, bool) {
	if len(c.Connects) == 0 || len(c.Disconnects) >= len(c.Connects) {
		return Connect{}, false
	}
	return c.Connects[len(c.Connects)-1], true
}

// Produced is a downstream record that Kafka acknowledged.
type Produced struct {
	User      string    `json:"user"`
	Seq       int64     `json:"seq"`
	MessageID string    `json:"message_id"`
	Topic     string    `json:"topic"`
	Partition int32     `json:"partition"`
	Offset    int64     `json:"offset"`
	At        time.Time `json:"at"`
}

// Logs is a copy of a Log.
type Logs struct {
	Clients  []ClientLog
	Produced []Produced
}

// Log collects what clients and the sender see. All methods may be called from any goroutine.
type Log struct {
	mu       sync.Mutex
	clients  []*Recorder
	produced []Produced
}

// Recorder is one client's part of a Log.
type Recorder struct {
	mu   sync.Mutex
	log  ClientLog
	seen map[string]bool // message ids of the pushes
}

// Client adds a client, whose lists are empty.
func (l *Log) Client(c ClientLog) *Recorder {
	r := &Recorder{log: c, seen: make(map[string]bool)}
	l.mu.Lock()
	l.clients = append(l.clients, r)
	l.mu.Unlock()
	return r
}

func (l *Log) addProduced(p Produced) {
	l.mu.Lock()
	l.produced = append(l.produced, p)
	l.mu.Unlock()
}

// Snapshot copies what is there.
func (l *Log) Snapshot() Logs {
	l.mu.Lock()
	clients := slices.Clone(l.clients)
	out := Logs{Produced: slices.Clone(l.produced)}
	l.mu.Unlock()
	for _, r := range clients {
		out.Clients = append(out.Clients, r.snapshot())
	}
	return out
}

func (r *Recorder) snapshot() ClientLog {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.log
	c.Sent = slices.Clone(c.Sent)
	c.Acks = slices.Clone(c.Acks)
	c.Pushes = slices.Clone(c.Pushes)
	c.Connects = slices.Clone(c.Connects)
	c.Disconnects = slices.Clone(c.Disconnects)
	c.Hints = slices.Clone(c.Hints)
	c.Failures = slices.Clone(c.Failures)
	return c
}

func (r *Recorder) sent(s Sent) { r.add(func(c *ClientLog) { c.Sent = append(c.Sent, s) }) }
func (r *Recorder) ack(a Ack)   { r.add(func(c *ClientLog) { c.Acks = append(c.Acks, a) }) }
func (r *Recorder) connect(n Connect) {
	r.add(func(c *ClientLog) { c.Connects = append(c.Connects, n) })
}
func (r *Recorder) disconnect(d Disconnect) {
	r.add(func(c *ClientLog) { c.Disconnects = append(c.Disconnects, d) })
}
func (r *Recorder) hint(h Hint)    { r.add(func(c *ClientLog) { c.Hints = append(c.Hints, h) }) }
func (r *Recorder) fail(f Failure) { r.add(func(c *ClientLog) { c.Failures = append(c.Failures, f) }) }

func (r *Recorder) push(p Push) {
	r.add(func(c *ClientLog) {
		p.Duplicate = r.seen[p.MessageID]
		r.seen[p.MessageID] = true
		c.Pushes = append(c.Pushes, p)
	})
}

func (r *Recorder) add(f func(*ClientLog)) {
	r.mu.Lock()
	f(&r.log)
	r.mu.Unlock()
}

func (r *Recorder) received(messageID string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.seen[messageID]
}

// Sum hashes a message's data for comparison with what Kafka has.
func Sum(data []byte) uint64 {
	h := fnv.New64a()
	h.Write(data)
	return h.Sum64()
}

// line is one event in the file that WriteFile leaves.
type line struct {
	User   string `json:"user,omitempty"`
	Device string `json:"device,omitempty"`
	Kind   string `json:"kind"`
	Event  any    `json:"event"`
}

// WriteFile writes every event as one JSON line, client by client.
func (l Logs) WriteFile(path string) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	w := bufio.NewWriter(f)
	enc := json.NewEncoder(w)
	for i := range l.Clients {
		c := &l.Clients[i]
		put := func(kind string, e any) {
			if err == nil {
				err = enc.Encode(line{c.User, c.Device, kind, e})
			}
		}
		put("client", c)
		each(c.Connects, "connected", put)
		each(c.Sent, "sent", put)
		each(c.Acks, "ack", put)
		each(c.Pushes, "push", put)
		each(c.Hints, "reconnect", put)
		each(c.Disconnects, "disconnected", put)
		each(c.Failures, "failure", put)
	}
	each(l.Produced, "produced", func(kind string, e any) {
		if err == nil {
			err = enc.Encode(line{Kind: kind, Event: e})
		}
	})
	if err != nil {
		return err
	}
	return w.Flush()
}

func each[T any](events []T, kind string, put func(string, any)) {
	for _, e := range events {
		put(kind, e)
	}
}
