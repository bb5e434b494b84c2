// Package bench drives a gateway as its clients and its im-logic do, measures it and checks its
// promises while it does so.
//
// One process has one event loop (see fleet) and everything of a run belongs to that loop, so
// there is no lock; more load than one core can make comes from several processes whose reports
// are merged. Load is open-loop unless a window is asked for: a message is due at its scheduled
// time whatever came before it, and its latency counts from then, so that a stall of the server
// counts against the server.
package bench
