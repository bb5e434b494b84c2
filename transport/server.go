package transport

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/panjf2000/gnet/v2"
	"github.com/panjf2000/gnet/v2/pkg/logging"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"im-gateway/codec"
)

// Sink takes what the loops have for the shards; see shard.Set. Neither method may block.
type Sink interface {
	N() int
	Offer(shard int, b *codec.IngressBatch) bool
	Return(b *codec.EgressBatch)
}

// Options configure a Server. Zero values take the defaults named.
type Options struct {
	Addr      string // host:port; port 0: any free one
	Loops     int    // event loops, 1 to codec.MaxLoops; one per core
	GatewayID string
	Nonce     uint64 // of session names
	Sink      Sink
	Verifier  *Verifier
	API       http.Handler // serves every request that is no upgrade of /ws

	MaxMessageBytes  int           // of all fragments together; 64 KiB
	HeadBytes        int           // of an upgrade request; 8 KiB
	HandshakeTimeout time.Duration // from accept to a whole head; 10 s
	HeartbeatTimeout time.Duration // silence after which a ping command closes instead; 75 s
	EgressBudget     int           // bytes; beyond it and 64 KiB the loop itself closes with 4000; 1 MiB
	MaxConnections   int           // 0: what RLIMIT_NOFILE allows, with head-room
	AllowedOrigins   []string      // of browsers; empty or *: all
	// Echo serves every WebSocket connection as a plain echo, without tokens, shards or API.
	Echo bool

	Logger     zerolog.Logger
	Registerer prometheus.Registerer
}

// Bounds that are not configured.
const (
	fdHeadroom     = 256 // descriptors kept for Kafka, Redis, etcd, gRPC, files
	tickInterval   = 100 * time.Millisecond
	egressSlack    = 64 << 10
	verifyQueue    = 1024 // slow token checks waiting
	retryAfterShed = "5"  // seconds
)

func (o *Options) validate() error {
	def(&o.Loops, runtime.NumCPU())
	def(&o.MaxMessageBytes, 64<<10)
	def(&o.HeadBytes, 8<<10)
	def(&o.HandshakeTimeout, 10*time.Second)
	def(&o.HeartbeatTimeout, 75*time.Second)
	def(&o.EgressBudget, 1<<20)
	switch {
	case o.Addr == "":
		return errors.New("no address to listen on")
	case o.Loops < 1 || o.Loops > codec.MaxLoops:
		return fmt.Errorf("loops: %d, must be 1 to %d", o.Loops, codec.MaxLoops)
	case o.Registerer == nil:
		return errors.New("no registerer for the metrics")
	case !o.Echo && (o.Sink == nil || o.Verifier == nil || o.API == nil):
		return errors.New("a sink, a verifier and an API are needed")
	}
	if o.MaxConnections == 0 {
		var limit unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			return fmt.Errorf("read the limit on open files: %w", err)
		}
		o.MaxConnections = int(min(limit.Cur, 1<<24)) - fdHeadroom
	}
	if o.MaxConnections < 1 {
		return errors.New("the limit on open files leaves no room for connections: raise ulimit -n")
	}
	return nil
}

func def[T int | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// Server is the public port. Start, Shutdown, StopAccepting, Submit and Resume may be called from any
// goroutine.
type Server struct {
	gnet.BuiltinEventEngine

	// Immutable after Start.
	opts    Options
	metrics *metrics
	log     zerolog.Logger // sampled
	origin  originCheck
	loops   []*loop
	addr    net.Addr
	engine  gnet.Engine
	http    *httpFront
	verify  chan func() // slow token checks; nil when the verifier is fast

	register    sync.Mutex // of a loop at its first connection
	connections atomic.Int64
	draining    atomic.Bool
	stopping    atomic.Bool

	booted   chan struct{}
	done     chan struct{} // closed when the engine has ended
	err      error         // why; read after done
	children sync.WaitGroup
	cancel   context.CancelFunc
}

// ErrEngineEnded is in the error of a server whose event loops ended though nobody asked for it.
var ErrEngineEnded = errors.New("the event loops ended unasked")

// New validates the options; Start listens.
func New(opts Options) (*Server, error) {
	if err := opts.validate(); err != nil {
		return nil, fmt.Errorf("transport options: %w", err)
	}
	s := &Server{
		opts:   opts,
		origin: newOriginCheck(opts.AllowedOrigins),
		log: opts.Logger.Sample(&zerolog.BurstSampler{
			Burst: 20, Period: time.Second, NextSampler: &zerolog.BasicSampler{N: 1000},
		}),
		booted: make(chan struct{}),
		done:   make(chan struct{}),
	}
	var err error
	if s.metrics, err = newMetrics(s, opts.Registerer); err != nil {
		return nil, err
	}
	for i := range opts.Loops {
		s.loops = append(s.loops, newLoop(s, i))
	}
	if !opts.Echo {
		s.http = newHTTPFront(s)
		if opts.Verifier.Slow() {
			s.verify = make(chan func(), verifyQueue)
		}
	}
	return s, nil
}

// Loops is the number of event loops.
func (s *Server) Loops() int { return len(s.loops) }

// Start listens and returns when connections are accepted. ctx bounds the start only.
func (s *Server) Start(ctx context.Context) error {
	// gnet reports a port in use only in its own words, and picks no name for port 0.
	probe, err := net.Listen("tcp", s.opts.Addr)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	s.addr = probe.Addr()
	if err := probe.Close(); err != nil {
		return fmt.Errorf("listen on %s: %w", s.addr, err)
	}
	runCtx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	s.children.Go(func() {
		err := gnet.Run(s, "tcp://"+s.addr.String(),
			gnet.WithNumEventLoop(len(s.loops)),
			gnet.WithLoadBalancing(gnet.RoundRobin),
			gnet.WithTCPNoDelay(gnet.TCPNoDelay),
			gnet.WithReuseAddr(true),
			gnet.WithLogger(gnetLog{s.opts.Logger}),
			gnet.WithLogLevel(logging.ErrorLevel))
		if !s.stopping.Load() {
			s.err = ErrEngineEnded
			if err != nil {
				s.err = fmt.Errorf("%w: %w", ErrEngineEnded, err)
			}
		}
		close(s.done)
	})
	select {
	case <-s.booted:
	case <-s.done:
		cancel()
		s.children.Wait()
		return fmt.Errorf("listen on %s: %w", s.addr, s.err)
	case <-ctx.Done():
		cancel()
		return fmt.Errorf("listen on %s: %w", s.addr, context.Cause(ctx))
	}
	s.children.Go(func() { s.tick(runCtx) })
	if s.http != nil {
		s.children.Go(s.http.serve)
	}
	if s.verify != nil {
		for range max(1, runtime.NumCPU()/2) {
			s.children.Go(func() { s.checkTokens(runCtx) })
		}
	}
	return nil
}

// OnBoot implements gnet.EventHandler.
func (s *Server) OnBoot(e gnet.Engine) gnet.Action {
	s.engine = e
	close(s.booted)
	return gnet.None
}

// Addr is the address listened on, once Start has returned.
func (s *Server) Addr() net.Addr { return s.addr }

// Done is closed when the event loops have ended; unasked, when Shutdown was not called: then Err
// says why, and the process is of no more use.
func (s *Server) Done() <-chan struct{} { return s.done }

// Err is why the event loops ended unasked, or nil; call it after Done.
func (s *Server) Err() error {
	select {
	case <-s.done:
		return s.err
	default:
		return nil
	}
}

// StopAccepting answers every new connection and upgrade with 503 from now on.
func (s *Server) StopAccepting() { s.draining.Store(true) }

// Shutdown ends the loops; connections that are still open are cut. Close the sessions before.
func (s *Server) Shutdown(ctx context.Context) error {
	s.StopAccepting()
	if s.stopping.Swap(true) {
		<-s.done
		return nil
	}
	if s.http != nil {
		s.http.stop(ctx)
	}
	err := s.engine.Stop(ctx)
	if s.cancel != nil {
		s.cancel()
	}
	if err != nil {
		return fmt.Errorf("stop the event loops: %w", err)
	}
	s.children.Wait()
	return nil
}

// tick makes the loops look after their lingering, slow and unfinished connections.
func (s *Server) tick(ctx context.Context) {
	t := time.NewTicker(tickInterval)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			for _, l := range s.loops {
				l.requestTick()
			}
		case <-ctx.Done():
			return
		}
	}
}

func (s *Server) checkTokens(ctx context.Context) {
	for {
		select {
		case check := <-s.verify:
			check()
		case <-ctx.Done():
			return
		}
	}
}

// OnOpen implements gnet.EventHandler; on the connection's loop.
func (s *Server) OnOpen(c gnet.Conn) ([]byte, gnet.Action) {
	if n := s.connections.Add(1); n > int64(s.opts.MaxConnections) || s.draining.Load() {
		s.metrics.handshake.shed.Inc()
		c.SetContext(&conn{c: c, state: stateClosed})
		return []byte(shedResponse), gnet.Close
	}
	s.loopOf(c).open(c)
	return nil, gnet.None
}

// OnTraffic implements gnet.EventHandler; on the connection's loop.
func (s *Server) OnTraffic(c gnet.Conn) gnet.Action {
	if cn, ok := c.Context().(*conn); ok && cn.l != nil {
		cn.l.traffic(cn)
	}
	return gnet.None
}

// OnClose implements gnet.EventHandler; on the connection's loop.
func (s *Server) OnClose(c gnet.Conn, _ error) gnet.Action {
	s.connections.Add(-1)
	if cn, ok := c.Context().(*conn); ok && cn.l != nil {
		cn.l.closed(cn)
	}
	return gnet.None
}

// loopOf finds the loop that owns c. gnet names its loops only through their connections.
func (s *Server) loopOf(c gnet.Conn) *loop {
	el := c.EventLoop()
	for _, l := range s.loops {
		if p := l.el.Load(); p != nil && *p == el {
			return l
		}
	}
	s.register.Lock()
	defer s.register.Unlock()
	for _, l := range s.loops {
		if l.el.CompareAndSwap(nil, &el) {
			return l
		}
	}
	panic("transport: more event loops than were asked for")
}

// Submit implements the shards' egress: the batch runs on its loop and goes back to the sink.
func (s *Server) Submit(b *codec.EgressBatch) { s.loops[b.Loop].submit(b) }

// Resume implements the shards' egress: the loop offers again what the shard had no room for.
func (s *Server) Resume(loop, _ int) { s.loops[loop].requestFlush() }

// gnetLog carries gnet's errors to our log.
type gnetLog struct{ log zerolog.Logger }

func (g gnetLog) Debugf(string, ...any) {}
func (g gnetLog) Infof(string, ...any)  {}
func (g gnetLog) Warnf(f string, a ...any) {
	g.log.Warn().Msgf("event loops: "+f, a...)
}
func (g gnetLog) Errorf(f string, a ...any) { g.log.Error().Msgf("event loops: "+f, a...) }
func (g gnetLog) Fatalf(f string, a ...any) { g.log.Error().Msgf("event loops: "+f, a...) }

// Connections is the number of connections open, of every kind.
func (s *Server) Connections() int64 { return s.connections.Load() }
