package codec

import (
	"sync"
	"sync/atomic"
)

// The batches in which the event loops, the shards and the broker exchange their work. Each has
// one owner at a time; handing it over gives up every right to it.

// EventKind says what an Event reports.
type EventKind uint8

// The kinds of Event. For one session a loop sends EventOpen first and EventClose last.
const (
	EventOpen    EventKind = iota + 1 // Open is set
	EventMessage                      // Upstream is set
	EventRefresh                      // Value is the new token's expiry, Unix milliseconds
	EventFlushed                      // Value is the Position handed to the kernel so far
	EventAcked                        // Value is the delivery_id up to which the client has everything
	EventClose                        // Code and Reason are set; the slot's generation has ended
)

// Event is what an event loop tells a shard about one session.
type Event struct {
	Kind     EventKind
	Code     CloseCode // EventClose: what was sent or received, else CloseAbnormal
	Session  SessionID
	Value    int64
	Open     *Open
	Upstream *Upstream
	Reason   string // EventClose: one of the fixed reason names of package transport
}

// Open is what the shard needs to know of a new session.
type Open struct {
	User        string // the authenticated user's id
	ExpiresAt   int64  // when the token expires, Unix milliseconds
	ConnectedAt int64  // Unix milliseconds
	Protocol    Protocol
	Acks        bool   // the client acknowledges deliveries
	DeviceID    string // empty: the client has not named its device
	Device      string // the kind of device; may be empty
}

// IngressBatch is what one event loop has for one shard. Its order is the order of arrival.
// It is pooled: NewIngressBatch and Release.
type IngressBatch struct {
	Loop   int
	Events []Event
}

var ingressBatches = sync.Pool{New: func() any { return new(IngressBatch) }}

// maxPooledEvents keeps a batch that grew during a storm from staying in the pool.
const maxPooledEvents = 4096

// NewIngressBatch returns an empty batch of the loop.
func NewIngressBatch(loop int) *IngressBatch {
	b, _ := ingressBatches.Get().(*IngressBatch)
	b.Loop = loop
	return b
}

// Release gives the batch back; the shard calls it when it has handled the events.
func (b *IngressBatch) Release() {
	clear(b.Events)
	if cap(b.Events) > maxPooledEvents {
		b.Events = nil
	}
	b.Events = b.Events[:0]
	ingressBatches.Put(b)
}

// CommandKind says what a Command asks for.
type CommandKind uint8

// The kinds of Command.
const (
	CommandFrame CommandKind = iota + 1 // write Payload as one data frame
	CommandPing                         // close with 4001 when silent too long, else write a WebSocket ping
	CommandClose                        // write what is pending, a close frame, then close
)

// Outcome is what became of a CommandFrame.
type Outcome uint8

// The outcomes. A buffered frame's fate follows by EventFlushed or EventClose.
const (
	OutcomeNone     Outcome = iota
	OutcomeFlushed          // its bytes were handed to the kernel
	OutcomeBuffered         // accepted; Position says where it ends in the connection's stream
	OutcomeGone             // the session had ended, nothing was written
)

// Command is what a shard asks an event loop to do with one connection.
type Command struct {
	Kind     CommandKind
	Outcome  Outcome   // set by the loop
	Code     CloseCode // CommandClose
	Content  Content   // CommandFrame
	Session  SessionID
	Payload  []byte   // CommandFrame: read-only, may be shared by many commands
	Reason   string   // CommandClose: the close frame's reason, at most 123 bytes of UTF-8
	Position uint64   // set by the loop when OutcomeBuffered: bytes of the stream up to this frame's end
	Stored   int64    // CommandFrame: when Kafka got the record that it carries, Unix ms; 0: none, or not known
	Delivery Delivery // CommandFrame: the downstream record to be ended by its outcome, if any; the shard's own
}

// EgressBatch is what one shard has for one event loop. It goes to the loop and comes back whole
// with the outcomes set; at most one per shard and loop is on its way.
type EgressBatch struct {
	Shard    int
	Loop     int
	Commands []Command
	Written  int64 // set by the loop: when it had written what the outcomes say, Unix ns
	// Arena backs the payloads that are made for one command each.
	Arena []byte
}

// Reset empties the batch for reuse and drops every reference that it holds.
func (b *EgressBatch) Reset() {
	clear(b.Commands)
	b.Commands = b.Commands[:0]
	b.Arena = b.Arena[:0]
}

// Upstream is one client message on its way to Kafka. It is built by an event loop (or the HTTP
// API), decided about by its shard, stored by the broker, and comes back to the shard with the
// result. It is pooled: NewUpstream and Release.
type Upstream struct {
	// Set by the builder, read-only afterwards. The slices point into one buffer of the record's own.
	Session     SessionID // zero: from the HTTP API, for none
	User        string    // the record's key
	Value       []byte    // the record's value, final bytes
	MessageID   []byte    // the gateway's ULID
	ClientMsgID []byte    // the client's name for it, unescaped; empty: no ack wanted
	Type        []byte    // unescaped
	TraceParent []byte    // W3C trace context
	Temp        bool      // the name came as data.tempMessageId and is echoed as that too
	Span        *Span     // begun by the builder, which TraceParent is of; nil: the message is not traced
	Received    int64     // when the gateway read it, Unix ns; set by who has it built, 0: not known

	// Owned by the shard while the record is in flight.
	Prev, Next *Upstream             // the shard's list, oldest first
	Same       *Upstream             // retries of this very message, which wait for its result
	Recent     uint32                // where it is remembered for them; 0: it is not
	Deadline   int64                 // Unix ms after which the client is told OUTCOME_UNKNOWN
	Unknown    bool                  // it has been told
	Reply      chan<- UpstreamResult // the HTTP API waits here, capacity 1; nil: nobody, or no more

	// Set by the broker.
	Result UpstreamResult

	buf []byte
}

// UpstreamResult is the broker's answer for one record.
type UpstreamResult struct {
	Code         Code // OK: stored by all in-sync replicas
	RetryAfterMS int32
	Partition    int32
	Offset       int64  // -1: stored, offset not known
	MessageID    string // set for HTTP replies only
}

// UpstreamBatch carries records from a shard to the broker and results back.
type UpstreamBatch struct {
	Shard   int
	Records []*Upstream
}

// End says how the delivery of one record to one target ended.
type End uint8

// The ends; the names of all but EndDelivered and EndForwarded are the reason header on the undelivered
// topic.
const (
	EndNone End = iota
	EndDelivered
	EndOffline
	EndMoved
	EndSlowConsumer
	EndUnacked
	EndExpired
	EndShutdown
	EndForwarded // handed on to the gateway that the user is on
	NumEnds
)

var endNames = [NumEnds]string{"none", "delivered", "offline", "moved", "slow_consumer", "unacked", "expired", "shutdown", "forwarded"}

func (e End) String() string { return endNames[e] }

// Downstream is one parsed downstream record. It is read-only once it has been dispatched, but for
// the fields of its consumer.
type Downstream struct {
	Partition int32
	Offset    int64
	Value     []byte // the Kafka record's
	// TraceParent is what those are told to whom the record is handed on; empty: nothing.
	TraceParent []byte

	Targets    []string
	Type       string // "new-message" unless the record names one
	MessageID  string // {topic}-{partition}-{offset} unless the record names one
	TraceID    string
	Data       []byte // valid JSON
	ExpireAt   int64  // Unix ms; 0: never
	Timestamp  int64  // the sender's, Unix ms; 0: none
	Stored     int64  // when Kafka got the record, Unix ms; 0: it did not come from there
	DeviceID   string // only sessions of this device; empty: all of the user's
	Forwarded  bool   // it was forwarded to this gateway, and is not forwarded again
	Kick       bool   // Type is "kick": close the targets' sessions
	KickReason string
	Frame      []byte  // the client frame, im.json.v1, encoded once for all targets: see Encode
	Content    Content // of the frame; set by Encode

	// Owner is told of the ends; nil: nobody is (a gRPC Push uses its own).
	Owner EndSink
	// Pending counts what has not ended, of one for each target and session; the Owner's own.
	Pending int

	encodedAt int64                       // of Frame, Unix ms
	others    atomic.Pointer[otherFrames] // once a session needs one of them
}

// EndSink takes the ends of deliveries, a batch at a time and in their order. The batch becomes the
// sink's.
type EndSink interface {
	// Ends is called by a shard and must not block.
	Ends([]Ended)
}

// Delivery is one record for one target: Record.Targets[Target].
type Delivery struct {
	Record *Downstream
	Target int32
}

// Ended is a Delivery and how it ended. With EndNone it says instead, before any end, that the
// delivery goes to several sessions, each of which has an end of its own.
type Ended struct {
	Delivery
	Sessions  int32 // EndNone: how many there are here
	End       End
	Elsewhere bool // EndNone: the user has sessions on other gateways besides
}

// DeliveryBatch is what a consumer has for one shard.
type DeliveryBatch struct {
	Deliveries []Delivery
	// GiveUp: the deliveries were handed over before, and have taken too long; what is still open
	// of them is to end now.
	GiveUp bool
}
