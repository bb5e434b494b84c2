//go:build chaos

package world

import (
	"io"
	"net"
	"testing"
	"time"

	"im-gateway/test/ports"
)

// TestBlockedLink: a connection whose peer does not read makes a fault fail, not hang.
func TestBlockedLink(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer func() { _ = ln.Close() }()
	l := &Link{name: "blocked"}
	listen, err := ports.Free()
	must(t, err)
	must(t, newProxies().add(l, listen, ln.Addr().String()))
	client := dialWire(t, l.Addr()) // reads nothing
	server, err := ln.Accept()
	must(t, err)
	full := make([]byte, 1<<20)
	for err == nil { // until all buffers on the way are full
		_ = server.SetWriteDeadline(time.Now().Add(silence))
		_, err = server.Write(full)
	}
	if !isTimeout(err) {
		t.Fatalf("write: %v", err)
	}
	if err := l.Latency(time.Millisecond); err == nil {
		t.Error("the fault was set")
	}
	// Once it reads, all goes on.
	read := make(chan struct{})
	go func() {
		defer close(read)
		_, _ = io.Copy(io.Discard, client)
	}()
	must(t, server.SetWriteDeadline(time.Time{}))
	must(t, l.Restore(t.Context()))
	must(t, server.Close())
	<-read
	l.Down()
}
