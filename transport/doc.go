// Package transport is the public port: one listener for HTTP, WebSocket and event streams, gnet event
// loops that own the connections, authentication, and frames in and out.
//
// A connection begins on its loop. A complete upgrade of /ws, or GET /sse, is answered there; any other
// request hands the connection to net/http through an in-memory conn, and an upgrade that follows on it is
// handed back. On an open connection the loop parses frames in place over the read buffer, answers
// what concerns only the connection itself (ping, malformed input, token refresh), and passes the
// rest to the user's shard in batches. It writes what the shards command, all frames of a batch for
// one connection in one write, and reports what the kernel took.
//
// Each loop accepts connections for itself, on a socket of its own that shares the port, so that the
// bound on connections is checked after every accept.
//
// A loop never blocks, takes no lock on the way of a message, and keeps nothing for an idle connection
// but a small struct. What a connection needs beside it (a message that comes in pieces, net/http's
// view of it, a close that waits for the peer) is there only as long as it is needed.
package transport
