// Package engine is one gateway. It reads and checks the configuration, brings the parts up in order,
// joins them by adapters, says when it is ready, and drains and stops them in order. It also serves
// what is no hot path: the HTTP API (auth calls go to im-logic, messages to the shards), the gRPC
// service, calls to other gateways, and the operators' port.
//
// Nothing else imports more than one of transport, shard, broker and registry; deps_test.go holds that.
package engine
