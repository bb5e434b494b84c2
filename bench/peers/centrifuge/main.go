// Command centrifuge is a centrifuge node with JSON clients, each subscribed by the server to one
// channel of its own: for the memory per idle connection, and an echo by RPC.
//
// Any path will do. The protocol is one JSON object per text frame, several objects in one frame
// separated by newlines. The client sends first
//
//	{"id":1,"connect":{}}
//
// and is answered, within 10 s of connecting at most,
//
//	{"id":1,"connect":{"client":"UUID","version":"","subs":{"user.1":{}},"ping":25,"pong":true}}
//
// Where ping is there, the server sends {} every that many seconds and the client must send {} back
// within 10 s, or it is closed with 3012; -ping 0 turns that off. An echo is
//
//	{"id":2,"rpc":{"method":"echo","data":{"any":"JSON"}}}  ->  {"id":2,"rpc":{"data":{"any":"JSON"}}}
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/centrifugal/centrifuge"

	"im-gateway/bench/peers/internal/peer"
)

func main() { peer.Main(run) }

func run(ctx context.Context) error {
	addr := flag.String("addr", "127.0.0.1:9001", "address to listen on")
	ping := flag.Duration("ping", 25*time.Second, "ping interval; 0: no pings")
	flag.Parse()
	node, err := newNode()
	if err != nil {
		return fmt.Errorf("centrifuge: %w", err)
	}
	pingPong := centrifuge.PingPongConfig{PingInterval: *ping}
	if *ping <= 0 {
		pingPong = centrifuge.PingPongConfig{PingInterval: -1, PongTimeout: -1}
	}
	ln, err := net.Listen("tcp", *addr)
	if err != nil {
		return fmt.Errorf("centrifuge: %w", err)
	}
	srv := &http.Server{
		Handler: centrifuge.NewWebsocketHandler(node, centrifuge.WebsocketConfig{
			CheckOrigin:    func(*http.Request) bool { return true },
			ReadBufferSize: 1024, UseWriteBufferPool: true, MessageSizeLimit: 1 << 20,
			ProcessCommandsOffReadLoop: true, PingPongConfig: pingPong,
		}),
		ReadHeaderTimeout: 10 * time.Second,
	}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	peer.Ready(ln.Addr().String())
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("centrifuge: %w", err)
	}
	stopCtx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return node.Shutdown(stopCtx)
}

func newNode() (*centrifuge.Node, error) {
	node, err := centrifuge.New(centrifuge.Config{})
	if err != nil {
		return nil, err
	}
	var users atomic.Int64
	node.OnConnecting(func(context.Context, centrifuge.ConnectEvent) (centrifuge.ConnectReply, error) {
		id := strconv.FormatInt(users.Add(1), 10)
		return centrifuge.ConnectReply{
			Credentials:   &centrifuge.Credentials{UserID: id},
			Subscriptions: map[string]centrifuge.SubscribeOptions{"user." + id: {}},
		}, nil
	})
	node.OnConnect(func(c *centrifuge.Client) {
		c.OnRPC(func(e centrifuge.RPCEvent, reply centrifuge.RPCCallback) {
			reply(centrifuge.RPCReply{Data: e.Data}, nil)
		})
	})
	return node, node.Run()
}
