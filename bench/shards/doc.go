// Package shards measures the shard actors alone, with up to a million simulated sessions and no
// sockets: one goroutine plays the event loops, the broker, Redis and the downstream consumer.
//
// That goroutine has a thread of its own and never sleeps while there is load, so that what it costs is
// known and can be left out. The figures hold when the machine has a core for it and one for each
// shard.
package shards
