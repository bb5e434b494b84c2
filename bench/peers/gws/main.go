// Command gws is an echo server on lxzan/gws: one goroutine per connection, which reads, and writes
// what it has read. Any path will do.
package main

import (
	"context"
	"flag"
	"fmt"
	"net"

	"github.com/lxzan/gws"

	"im-gateway/bench/peers/internal/peer"
)

type handler struct{ gws.BuiltinEventHandler }

func (handler) OnPing(c *gws.Conn, payload []byte) { _ = c.WritePong(payload) }

func (handler) OnMessage(c *gws.Conn, m *gws.Message) {
	_ = c.WriteMessage(m.Opcode, m.Bytes()) // a failed write ends the connection
	_ = m.Close()
}

func main() { peer.Main(run) }

func run(ctx context.Context) error {
	addr := flag.String("addr", "127.0.0.1:9001", "address to listen on")
	flag.Parse()
	ln, err := net.Listen("tcp", *addr)
	if err != nil {
		return fmt.Errorf("gws: %w", err)
	}
	srv := gws.NewServer(handler{}, &gws.ServerOption{ReadBufferSize: 1024, ReadMaxPayloadSize: 16 << 20})
	srv.OnError = func(net.Conn, error) {} // of one connection
	peer.Ready(ln.Addr().String())
	go func() { _ = srv.RunListener(ln) }() // it never returns, not even when ln is closed
	<-ctx.Done()
	return nil
}
