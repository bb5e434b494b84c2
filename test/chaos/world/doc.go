// Package world runs everything around the gateways of the fault suite, as child processes on loopback:
// a Kafka cluster, etcd, two Redis servers and a fake im-logic, with a fault proxy before each for each
// gateway; and the gateways themselves. It starts, breaks and mends them. It shares no code with the
// gateway but the generated stubs of im-logic's service.
package world
