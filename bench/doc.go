// Package bench is the load harness: scenarios that drive a gateway as its clients do, measure it
// and check what it promises. Load is open-loop: every message has a scheduled send time and its
// latency counts from that time, so a stall of the server counts against the server.
//
// It knows the gateway by its public surface only: WebSocket, HTTP and the envelopes.
package bench
