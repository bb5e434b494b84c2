// Package shards measures the shard actors alone, with up to a million simulated sessions and no
// sockets: one goroutine plays the event loops, the broker, Redis and the downstream consumer.
//
// That goroutine has a thread of its own and never sleeps while a stage lasts, so that what it costs
// is known and can be left out: the figures are what the rest of the process, which is the shards,
// took. They hold when the machine has a core for it and one for each shard.
package shards
