// Package shard holds who is connected. A Set is N shards; each is one goroutine that owns the
// sessions of the users whose hash falls to it, and decides everything about them: presence,
// heartbeats, which message goes upstream, what becomes of each delivery. So no map needs a lock.
//
// Work comes in batches over bounded queues, one per source (event loops, returning egress batches,
// broker results, deliveries, presence results, control), and leaves in batches: commands to the
// event loops, records to the broker, presence operations, ends of deliveries. A shard does no I/O
// and never blocks on anything but its own queues being empty.
package shard
