package broker

import (
	"runtime"
	"time"
	"unsafe"

	"github.com/IBM/sarama"

	"im-gateway/codec"
	"im-gateway/codec/latency"
)

// Header names of what the gateway produces; never written to.
var (
	headerTraceParent = []byte("traceparent")
	headerType        = []byte("type")
	headerGatewayID   = []byte("gateway_id")
	headerClientMsgID = []byte("client_msg_id")
	headerReason      = []byte("reason")
	headerMessageID   = []byte("message_id")
	headerTopic       = []byte("source_topic")
	headerPartition   = []byte("source_partition")
	headerOffset      = []byte("source_offset")
	headerOmitted     = []byte("value_omitted")
	headerHop         = []byte("im-hop")
	headerPresent     = []byte("present_gateway")
)

const (
	upstreamHeaders = 4
	// gatherMax bounds how many answers go to the shards together, gatherYields how often the
	// collector lets sarama bring more before it hands over what it has.
	gatherMax    = 1024
	gatherYields = 2
)

// raw is a sarama.Encoder of bytes that are final. It is used by its address, which costs no
// allocation where sarama.ByteEncoder costs one.
type raw []byte

func (r *raw) Encode() ([]byte, error) { return *r, nil }
func (r *raw) Length() int             { return len(*r) }

// bytesOf views a string as bytes that are only read.
func bytesOf(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) } // #nosec G103 -- only read

// upstreamRecord is a client message in sarama's hands. It is pooled: sarama keeps nothing of a
// message that came back as a success.
type upstreamRecord struct {
	msg     sarama.ProducerMessage
	key     raw
	value   raw
	headers [upstreamHeaders]sarama.RecordHeader

	up     *codec.Upstream
	shard  int
	size   int64
	handed time.Time
}

func (r *upstreamRecord) fill(u *codec.Upstream, shard int, topic string, gatewayID []byte, now time.Time) {
	r.up, r.shard, r.size, r.handed = u, shard, int64(u.Size()), now
	r.key, r.value = bytesOf(u.User), u.Value
	h := append(r.headers[:0],
		sarama.RecordHeader{Key: headerType, Value: u.Type},
		sarama.RecordHeader{Key: headerGatewayID, Value: gatewayID})
	if len(u.TraceParent) > 0 {
		h = append(h, sarama.RecordHeader{Key: headerTraceParent, Value: u.TraceParent})
	}
	if len(u.ClientMsgID) > 0 {
		h = append(h, sarama.RecordHeader{Key: headerClientMsgID, Value: u.ClientMsgID})
	}
	r.msg = sarama.ProducerMessage{
		Topic: topic, Key: &r.key, Value: &r.value, Headers: h, Metadata: r,
		Offset: -1, // stays when the broker knows the record from an earlier attempt
	}
}

// clear drops every reference, so that the pool keeps no record alive.
func (r *upstreamRecord) clear() {
	r.msg = sarama.ProducerMessage{}
	r.headers = [upstreamHeaders]sarama.RecordHeader{}
	r.key, r.value, r.up = nil, nil, nil
}

// innocentShare is the part of the largest record below which one is not too large itself when the broker
// says so of its batch.
const innocentShare = 16

// feed hands over what the shards queue, until it is told to stop and has emptied the queue. It is
// the only goroutine that an outage blocks.
func (p *Producer) feed(input chan<- *sarama.ProducerMessage) {
	for {
		select {
		case b := <-p.queue:
			p.handOver(b, input)
		case <-p.stopFeeds:
			for {
				select {
				case b := <-p.queue:
					p.handOver(b, input)
				default:
					return
				}
			}
		}
	}
}

func (p *Producer) handOver(b *codec.UpstreamBatch, input chan<- *sarama.ProducerMessage) {
	now := time.Now()
	for i, u := range b.Records {
		if p.abandoned() {
			p.refuse(b, b.Records[i:])
			return
		}
		r := p.records.Get().(*upstreamRecord)
		r.fill(u, b.Shard, p.opts.UpstreamTopic, p.gatewayID, now)
		input <- &r.msg
	}
	p.recycle(b)
}

// refuse answers records that were never handed over.
func (p *Producer) refuse(b *codec.UpstreamBatch, left []*codec.Upstream) {
	var bytes int64
	for i, u := range left {
		u.Result = codec.UpstreamResult{Code: codec.BrokerUnavailable, RetryAfterMS: retryUnavailableMS, Offset: -1}
		bytes += int64(u.Size())
		b.Records[i] = u
	}
	clear(b.Records[len(left):])
	b.Records = b.Records[:len(left)]
	p.metrics.unavailable.Add(float64(len(left)))
	p.credits.give(int64(len(left)), bytes)
	p.results(b)
}

func (p *Producer) recycle(b *codec.UpstreamBatch) {
	clear(b.Records)
	b.Records = b.Records[:0]
	p.batches.Put(b)
}

// collect takes sarama's answers and gives them to the shards, in batches. It ends when sarama has
// closed both channels.
func (p *Producer) collect(successes <-chan *sarama.ProducerMessage, errs <-chan *sarama.ProducerError) {
	g := newGathering(p)
	for successes != nil || errs != nil {
		select {
		case m, ok := <-successes:
			if !ok {
				successes = nil
				continue
			}
			g.now = time.Now()
			g.add(m, nil)
		case e, ok := <-errs:
			if !ok {
				errs = nil
				continue
			}
			g.now = time.Now()
			g.add(e.Msg, e.Err)
		}
		for yields := 0; g.records < gatherMax && yields <= gatherYields; {
			select {
			case m, ok := <-successes:
				if !ok {
					successes = nil
					continue
				}
				g.add(m, nil)
			case e, ok := <-errs:
				if !ok {
					errs = nil
					continue
				}
				g.add(e.Msg, e.Err)
			default:
				yields++
				if yields <= gatherYields {
					runtime.Gosched()
				}
			}
		}
		g.flush()
	}
}

// gathering is the collector's: answers on their way to the shards.
type gathering struct {
	p              *Producer
	byShard        []*codec.UpstreamBatch
	now            time.Time
	records, bytes int64
	stored         int
	duplicates     int // stored by an earlier attempt
	took           latency.Local
}

func newGathering(p *Producer) *gathering {
	return &gathering{p: p, byShard: make([]*codec.UpstreamBatch, p.shards), took: p.metrics.ackSeconds.Local()}
}

func (g *gathering) add(m *sarama.ProducerMessage, err error) {
	p, r := g.p, m.Metadata.(*upstreamRecord)
	u := r.up
	u.Result = codec.UpstreamResult{Code: classify(err), Partition: m.Partition, Offset: m.Offset}
	switch u.Result.Code {
	case codec.OK:
		if m.Offset >= 0 {
			g.stored++
		} else {
			g.duplicates++
		}
	case codec.MessageTooLarge:
		p.metrics.tooLarge.Inc()
		if r.size < int64(p.opts.MaxRecordBytes/innocentShare) { // refused with the batch that it was in
			u.Result.Code, u.Result.RetryAfterMS = codec.Overloaded, retryUnavailableMS
		}
	case codec.BrokerUnavailable:
		p.metrics.unavailable.Inc()
		u.Result.RetryAfterMS = retryUnavailableMS
	default:
		p.metrics.unknown.Inc()
	}
	if err != nil {
		u.Result.Offset = -1
		p.noteError(err)
	}
	b := g.byShard[r.shard]
	if b == nil {
		b = p.batches.Get().(*codec.UpstreamBatch)
		b.Shard = r.shard
		g.byShard[r.shard] = b
	}
	b.Records = append(b.Records, u)
	g.took.Observe(int64(g.now.Sub(r.handed)))
	g.records++
	g.bytes += r.size
	if err == nil { // of a message that came back as an error sarama still reads a field
		r.clear()
		p.records.Put(r)
	}
}

func (g *gathering) flush() {
	p := g.p
	g.took.Flush()
	p.credits.give(g.records, g.bytes)
	if g.stored+g.duplicates > 0 {
		p.metrics.stored.Add(float64(g.stored))
		p.metrics.duplicate.Add(float64(g.duplicates))
		p.progress.Add(1)
		p.credits.gate.CompareAndSwap(gateOutage, gateOpen)
	}
	g.records, g.bytes, g.stored, g.duplicates = 0, 0, 0, 0
	for i, b := range g.byShard {
		if b != nil {
			g.byShard[i] = nil
			p.results(b)
		}
	}
}
