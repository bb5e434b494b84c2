package broker

import (
	"github.com/IBM/sarama"

	"im-gateway/codec"
)

const (
	sideQueue   = 1024
	eventsQueue = 8192
	sideHeaders = 6
)

// sideRecord is something that the gateway itself writes. Its owner makes it, hands it over by
// Producer.side and gets it back by done.
type sideRecord struct {
	topic   string
	key     raw // nil: none
	value   raw // nil: none
	headers []sarama.RecordHeader
	// done is called once, by the collector, when the record is stored (nil) or an attempt has
	// failed. It must not block.
	done func(*sideRecord, error)

	// The owner's own.
	record   *codec.Downstream // undelivered: the record, and how its delivery ended
	end      codec.End
	target   int32  // of the record's, that was forwarded
	gateway  string // to which it was forwarded
	offset   int64  // dead letter
	tooLarge int    // attempts refused for their size
}

// message is the record for one attempt: sarama still reads a field of one that failed.
func (r *sideRecord) message() *sarama.ProducerMessage {
	m := &sarama.ProducerMessage{Topic: r.topic, Headers: r.headers, Metadata: r}
	if r.key != nil {
		m.Key = &r.key
	}
	if r.value != nil {
		m.Value = &r.value
	}
	return m
}

// userEvent is what UserEvent was told.
type userEvent struct {
	online  bool
	user    string
	session codec.SessionID
	reason  string
	atMS    int64
}

// UserEvent queues a user.online or user.offline event; it never blocks. When the queue is full the
// event is dropped and counted. An event that Kafka does not take is not tried again. Any goroutine
// may call it; events of one user keep their order.
func (p *Producer) UserEvent(online bool, user string, session codec.SessionID, reason string, atMS int64) {
	select {
	case p.events <- userEvent{online, user, session, reason, atMS}:
	default:
		p.metrics.eventsDropped.Inc()
	}
}

func (p *Producer) eventRecord(e userEvent) *sideRecord {
	name := e.session.Name(p.opts.Nonce)
	return &sideRecord{
		topic: p.opts.UserEventsTopic,
		key:   []byte(e.user),
		value: codec.AppendUserEvent(nil, e.online, e.user, p.opts.GatewayID, name, e.reason, e.atMS),
		done:  p.eventDone,
	}
}

func (p *Producer) eventDone(_ *sideRecord, err error) {
	if err != nil {
		p.metrics.eventsLost.Inc()
		return
	}
	p.metrics.events.Inc()
}

// feedSide hands over the gateway's own records until it is told to stop and has emptied the queues.
func (p *Producer) feedSide(input chan<- *sarama.ProducerMessage) {
	for {
		select {
		case r := <-p.side:
			input <- r.message()
		case e := <-p.events:
			input <- p.eventRecord(e).message()
		case <-p.stopFeeds:
			for {
				select {
				case r := <-p.side:
					input <- r.message()
				case e := <-p.events:
					input <- p.eventRecord(e).message()
				default:
					return
				}
			}
		}
	}
}

// collectSide takes the answers to them. It ends when sarama has closed both channels.
func (p *Producer) collectSide(successes <-chan *sarama.ProducerMessage, errs <-chan *sarama.ProducerError) {
	var quiet quiet
	for successes != nil || errs != nil {
		select {
		case m, ok := <-successes:
			if !ok {
				successes = nil
				continue
			}
			r := m.Metadata.(*sideRecord)
			r.done(r, nil)
		case e, ok := <-errs:
			if !ok {
				errs = nil
				continue
			}
			r := e.Msg.Metadata.(*sideRecord)
			if n, ok := quiet.allow(); ok {
				p.log.Warn().Err(e.Err).Str("topic", r.topic).Int("suppressed", n).Msg("kafka: record not stored")
			}
			r.done(r, e.Err)
		}
	}
}
