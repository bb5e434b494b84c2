// Package engine is the gateway as a whole: it reads the configuration, makes the parts, joins them,
// starts them in order, says when they are ready, drains and stops them. It alone knows all parts.
//
// Beside that it holds what belongs to no part: the HTTP API and the client of im-logic behind it,
// the gRPC server, the calls to other gateways, the operators' port and the log.
package engine
