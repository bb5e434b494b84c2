// Package servers starts the real servers that the gateway stands in front of, for tests: Apache
// Kafka, etcd and Redis, on free loopback ports, with data in a temporary directory, as child
// processes. Each can be killed, frozen and started again on the same ports and data, and ends with
// the process that started it, however that ends.
//
// A missing program is an error that says what to install: a test of the real servers that cannot
// run has failed.
package servers
