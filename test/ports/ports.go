// Package ports finds free ports for servers that tests start, stop and start again.
package ports

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
)

// given are the addresses that Free has returned.
var given sync.Map

// Number is Free's port alone.
func Number() (int, error) {
	addr, err := Free()
	if err != nil {
		return 0, err
	}
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	return strconv.Atoi(port)
}

// Free returns a loopback address that nobody listens on. It lies below the ports that systems give to
// outgoing connections, one of which could else take it while its server is down. Any goroutine may call it.
func Free() (string, error) {
	const from, to, tries = 12000, 32000, 1000
	for range tries {
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(from+rand.IntN(to-from)))
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			continue // taken
		}
		if err := ln.Close(); err != nil {
			return "", fmt.Errorf("find a free port: %w", err)
		}
		if _, twice := given.LoadOrStore(addr, true); !twice {
			return addr, nil
		}
	}
	return "", errors.New("find a free port: there is none")
}
