// Command gorilla is an echo server on gorilla/websocket with a read and a write pump per
// connection, as its chat example has them. Any path will do.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/gorilla/websocket"

	"im-gateway/bench/peers/internal/peer"
)

const (
	writeWait  = 10 * time.Second
	pongWait   = 75 * time.Second
	pingPeriod = 30 * time.Second
	queueLen   = 64
	maxMessage = 16 << 20
)

type message struct {
	kind int
	data []byte
}

var upgrader = websocket.Upgrader{
	ReadBufferSize: 1024, WriteBufferSize: 1024, WriteBufferPool: &sync.Pool{},
	CheckOrigin: func(*http.Request) bool { return true },
}

func main() { peer.Main(run) }

func run(ctx context.Context) error {
	addr := flag.String("addr", "127.0.0.1:9001", "address to listen on")
	flag.Parse()
	ln, err := net.Listen("tcp", *addr)
	if err != nil {
		return fmt.Errorf("gorilla: %w", err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(serve), ReadHeaderTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	peer.Ready(ln.Addr().String())
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("gorilla: %w", err)
	}
	return nil
}

// serve returns at once, so that the memory of the HTTP request is free while the connection lives.
func serve(w http.ResponseWriter, r *http.Request) {
	conn, err := upgrader.Upgrade(w, r, nil)
	if err != nil {
		return // Upgrade has answered
	}
	out := make(chan message, queueLen)
	go write(conn, out)
	go read(conn, out)
}

func read(conn *websocket.Conn, out chan<- message) {
	defer close(out)
	conn.SetReadLimit(maxMessage)
	_ = conn.SetReadDeadline(time.Now().Add(pongWait))
	conn.SetPongHandler(func(string) error { return conn.SetReadDeadline(time.Now().Add(pongWait)) })
	for {
		kind, data, err := conn.ReadMessage()
		if err != nil {
			return
		}
		out <- message{kind, data}
	}
}

func write(conn *websocket.Conn, out <-chan message) {
	ping := time.NewTicker(pingPeriod)
	defer ping.Stop()
	defer func() {
		_ = conn.Close()
		for range out { // the reader must not block
		}
	}()
	for {
		var err error
		select {
		case m, ok := <-out:
			if !ok {
				return
			}
			_ = conn.SetWriteDeadline(time.Now().Add(writeWait))
			err = conn.WriteMessage(m.kind, m.data)
		case <-ping.C:
			err = conn.WriteControl(websocket.PingMessage, nil, time.Now().Add(writeWait))
		}
		if err != nil {
			return
		}
	}
}
