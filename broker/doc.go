// Package broker is the gateway's side of Kafka: a producer that answers every record, a consumer
// that commits an offset only behind the last record that has ended, and the care of the topics.
//
// # Producer
//
//	shards --Admit--> credits
//	shards --UpstreamBatch--> queue --feed--> sarama (upstream) --collect--> results(UpstreamBatch)
//	consumer, user events ----------feed----> sarama (side)     --collect--> done
//
// There are two sarama producers. The upstream one bridges an outage: it holds what it has for
// minutes and keeps the order of each session; what it may hold is bounded by the credits that a
// shard takes before it queues a record, since sarama's own Input has no useful bound. The side one
// carries what the gateway itself writes (user events, undelivered and dead-letter records); it
// fails early and its callers try again, so that trouble with a side topic never stands in the way
// of client messages.
//
// # Consumer
//
// One goroutine per claimed partition parses records, dispatches their deliveries to the shards and
// takes the ends back through an inbox that never blocks a shard. Ends other than delivered become
// undelivered records; a record is done when all its ends are stored, and the offset behind the last
// done record is committed every second and when the session ends.
//
// # Clients
//
// Each part has a sarama client of its own with a link underneath, by which a stop can cut every
// connection and every back-off short: sarama has no contexts, and its Close can hang while Kafka
// is away.
package broker
