// Package judge counts what a fault did to messages: it reads all of the topics, Redis and etcd, and
// the logs of the clients, and compares them. It imports nothing of the gateway and asks it nothing.
//
// Names of users must be new for each run that shares its topics with others: what the topics hold
// for users who are not in the logs is passed over.
package judge
