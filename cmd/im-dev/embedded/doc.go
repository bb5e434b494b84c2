// Package embedded starts the three servers that the gateway needs inside this process, on
// loopback: Kafka (kfake), etcd (its own embed package) and Redis (miniredis). They speak the real
// protocols over real sockets, so what talks to them does not know the difference; they are for
// trying the system and for its tests, never for production: one broker, no replication, no fsync.
package embedded
