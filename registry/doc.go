// Package registry tells others where this gateway and its users are, and finds others.
//
// In etcd it keeps the gateway's endpoint and the ownership of its downstream topic, and finds
// im-logic and the other gateways. In Redis it keeps each user's whereabouts (presence), changed
// only by compare-and-set in Lua. It knows nothing of sessions or Kafka.
package registry
