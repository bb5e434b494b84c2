// Package peers holds the tests of the peers with which the gateway is compared: see README.md.
package peers
