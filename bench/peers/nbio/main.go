// Command nbio is an echo server on lesismal/nbio: epoll, no goroutine per connection. Any path
// will do.
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/lesismal/nbio/logging"
	"github.com/lesismal/nbio/nbhttp"
	"github.com/lesismal/nbio/nbhttp/websocket"

	"im-gateway/bench/peers/internal/peer"
)

// keepalive is long, so that idle connections stay: the echo has no heartbeat.
const keepalive = 24 * time.Hour

func main() { peer.Main(run) }

func run(ctx context.Context) error {
	addr := flag.String("addr", "127.0.0.1:9001", "address to listen on")
	flag.Parse()
	logging.SetLevel(logging.LevelError)
	upgrader := websocket.NewUpgrader()
	upgrader.KeepaliveTime = keepalive
	upgrader.CheckOrigin = func(*http.Request) bool { return true }
	upgrader.OnMessage(func(c *websocket.Conn, kind websocket.MessageType, data []byte) {
		_ = c.WriteMessage(kind, data) // a failed write ends the connection
	})
	var bound net.Addr
	engine := nbhttp.NewEngine(nbhttp.Config{
		Network: "tcp", Addrs: []string{*addr},
		KeepaliveTime: keepalive, MaxWebsocketFramePayloadSize: 16 << 20, ReleaseWebsocketPayload: true,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = upgrader.Upgrade(w, r, nil) // Upgrade answers
		}),
		Listen: func(network, addr string) (net.Listener, error) {
			ln, err := net.Listen(network, addr)
			if err == nil {
				bound = ln.Addr()
			}
			return ln, err
		},
	})
	if err := engine.Start(); err != nil {
		return fmt.Errorf("nbio: %w", err)
	}
	defer engine.Stop()
	peer.Ready(bound.String())
	<-ctx.Done()
	return nil
}
