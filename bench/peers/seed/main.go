// Command seed is a gateway on a conventional stack, written with care: gin, gorilla/websocket with a
// read and a write pump per connection, kafka-go, rueidis, viper and zap. It speaks the part of the
// gateway's protocol that the load generator uses.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/goccy/go-json"
	"github.com/gorilla/websocket"
	"github.com/oklog/ulid/v2"
	"go.uber.org/zap"

	"im-gateway/bench/peers/internal/peer"
)

// stats are counted since the start.
type stats struct {
	acked, refused, pushed, offline, unreadable, acksDropped, pushesDropped atomic.Int64
}

type server struct {
	cfg      config
	log      *zap.Logger
	auth     *authenticator
	hub      *hub
	presence *presence
	upstream *upstream
	upgrader websocket.Upgrader
	stats    stats
	ready    atomic.Bool
}

func main() { peer.Main(run) }

func run(ctx context.Context) error {
	cfg, err := loadConfig(os.Args[1:])
	if err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return fmt.Errorf("seed: %w", err)
	}
	log, err := zap.NewProduction()
	if err != nil {
		return fmt.Errorf("seed: %w", err)
	}
	if err := serve(ctx, cfg, log); err != nil {
		return fmt.Errorf("seed: %w", err)
	}
	return nil
}

func serve(ctx context.Context, cfg config, log *zap.Logger) error {
	s := &server{cfg: cfg, log: log, auth: newAuthenticator(cfg.Secret), hub: newHub(), upgrader: websocket.Upgrader{
		ReadBufferSize: 1024, WriteBufferSize: 1024, WriteBufferPool: &sync.Pool{}, HandshakeTimeout: 5 * time.Second,
		Subprotocols: []string{subprotocol}, CheckOrigin: func(*http.Request) bool { return true },
	}}
	startCtx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := createTopics(startCtx, cfg); err != nil {
		return err
	}
	var err error
	if s.presence, err = newPresence(cfg.Redis, cfg.GatewayID, log); err != nil {
		return err
	}
	s.upstream = newUpstream(cfg, &s.stats, log)
	down := newDownstream(cfg, s.hub, &s.stats, log)
	ln, err := net.Listen("tcp", cfg.Addr)
	if err != nil {
		return err
	}
	public := &http.Server{Handler: s.routes(), ReadHeaderTimeout: 10 * time.Second}
	if err := s.serveAdmin(ctx, cfg.Admin); err != nil {
		return err
	}
	loopCtx, stopLoops := context.WithCancel(ctx)
	defer stopLoops()
	failed := make(chan error, 2)
	var loops sync.WaitGroup
	loops.Go(func() { s.presence.refresh(loopCtx, s.hub) })
	loops.Go(func() {
		if err := down.run(loopCtx); err != nil {
			failed <- err
		}
	})
	go func() {
		if err := public.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			failed <- err
		}
	}()
	s.ready.Store(true)
	peer.Ready(ln.Addr().String())
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	s.ready.Store(false)
	stopLoops()
	loops.Wait()
	_ = public.Close()
	for i := range hubShards {
		for _, c := range s.hub.in(i, nil) {
			c.closeWith(websocket.CloseGoingAway, "stopping")
		}
	}
	s.presence.rdb.Close()
	return errors.Join(err, s.upstream.w.Close(), down.r.Close())
}

func (s *server) routes() http.Handler {
	gin.SetMode(gin.ReleaseMode)
	r := gin.New()
	r.Use(gin.Recovery())
	r.GET("/ws", s.ws)
	r.GET("/healthz", func(c *gin.Context) { c.Status(http.StatusOK) })
	return r
}

// ws returns as soon as the pumps run, so that the memory of the HTTP request is free while the
// connection lives.
func (s *server) ws(g *gin.Context) {
	user, err := s.auth.user(g.Request)
	if err != nil {
		g.AbortWithStatusJSON(http.StatusUnauthorized, gin.H{"success": false, "code": "AUTH_FAILED", "message": "token refused"})
		return
	}
	conn, err := s.upgrader.Upgrade(g.Writer, g.Request, nil)
	if err != nil {
		return // Upgrade has answered
	}
	c := &client{
		srv: s, conn: conn, user: user, session: ulid.Make().String(), connected: time.Now(),
		out: make(chan *outbound, s.cfg.SendQueue), done: make(chan struct{}),
	}
	if err := s.join(c); err != nil {
		s.log.Warn("presence not claimed", zap.Error(err))
	}
	go c.write()
	go c.read()
}

// join claims presence and queues the first frame.
func (s *server) join(c *client) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	err := s.presence.claim(ctx, c)
	hello := struct {
		Type string `json:"type"`
		Data struct {
			GatewayID       string `json:"gateway_id"`
			SessionID       string `json:"session_id"`
			HeartbeatMS     int64  `json:"heartbeat_ms"`
			MaxMessageBytes int    `json:"max_message_bytes"`
			Presence        string `json:"presence,omitempty"`
		} `json:"data"`
	}{Type: "connected"}
	hello.Data.GatewayID, hello.Data.SessionID = s.cfg.GatewayID, c.session
	hello.Data.HeartbeatMS, hello.Data.MaxMessageBytes = heartbeat.Milliseconds(), maxMessage
	if err != nil {
		hello.Data.Presence = "degraded"
	}
	b, jsonErr := json.Marshal(&hello)
	if jsonErr != nil {
		return errors.Join(err, jsonErr)
	}
	c.send(&outbound{data: b}, &s.stats.acksDropped)
	if old := s.hub.put(c); old != nil {
		old.closeWith(closeReason, "replaced by a newer session")
	}
	return err
}

// leave ends a connection whose reader has ended.
func (s *server) leave(c *client) {
	c.close()
	if !s.hub.remove(c) {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	s.presence.drop(ctx, c)
}

func (s *server) serveAdmin(ctx context.Context, addr string) error {
	if addr == "" {
		return nil
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !s.ready.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("/stats", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(map[string]int64{
			"acked": s.stats.acked.Load(), "refused": s.stats.refused.Load(), "acks_dropped": s.stats.acksDropped.Load(),
			"pushed": s.stats.pushed.Load(), "pushes_dropped": s.stats.pushesDropped.Load(),
			"offline": s.stats.offline.Load(), "unreadable": s.stats.unreadable.Load(),
		})
	})
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	context.AfterFunc(ctx, func() { _ = srv.Close() })
	go func() { _ = srv.Serve(ln) }() // ends by Close
	return nil
}
