// Package codec holds the envelopes: what clients, im-logic and Kafka read and write, and the
// batches in which the parts of the gateway exchange them. It does no I/O and starts no goroutine.
package codec
