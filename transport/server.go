package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
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
	API       http.Handler   // serves every request that is no upgrade of /ws
	Sampler   *codec.Sampler // says which messages are traced; nil: none

	Settings Settings // until others are applied

	HeadBytes        int           // of an upgrade request; 8 KiB
	HandshakeTimeout time.Duration // from accept to a whole head; 10 s
	Heartbeat        time.Duration // between the shards' ping commands; 30 s

	HTTPReadTimeout  time.Duration // of a request and its body; 15 s
	HTTPWriteTimeout time.Duration // of a request's handling and its answer; 30 s
	HTTPIdleTimeout  time.Duration // between requests; 60 s

	Compression   Compression
	ProxyProtocol bool // trusted proxies begin each connection with a PROXY header, version 2

	// Certificate gives the certificate of a TLS handshake; nil: the port takes no TLS.
	Certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	// Echo serves every WebSocket connection as a plain echo, without tokens, shards or API.
	Echo bool

	Logger     zerolog.Logger
	Registerer prometheus.Registerer
}

// Compression is permessage-deflate, for clients that offer it.
type Compression struct {
	Enabled   bool
	Threshold int // bytes; messages to clients that are smaller are not compressed
	Level     int // 1 to 9
}

// Bounds that are not configured.
const (
	fdHeadroom     = 256 // descriptors kept for Kafka, Redis, etcd, gRPC, files
	tickInterval   = 100 * time.Millisecond
	egressSlack    = 64 << 10
	verifyQueue    = 1024 // slow token checks waiting
	courtesy       = 64   // connections beyond a bound that are told so at a time; more are closed at once
	retryAfterShed = "5"  // seconds
)

func (o *Options) validate() error {
	def(&o.Loops, runtime.GOMAXPROCS(0))
	def(&o.HeadBytes, 8<<10)
	def(&o.HandshakeTimeout, 10*time.Second)
	def(&o.Heartbeat, 30*time.Second)
	def(&o.HTTPReadTimeout, 15*time.Second)
	def(&o.HTTPWriteTimeout, 30*time.Second)
	def(&o.HTTPIdleTimeout, 60*time.Second)
	switch {
	case o.Addr == "":
		return errors.New("no address to listen on")
	case o.Loops < 1 || o.Loops > codec.MaxLoops:
		return fmt.Errorf("loops: %d, must be 1 to %d", o.Loops, codec.MaxLoops)
	case o.Registerer == nil:
		return errors.New("no registerer for the metrics")
	case !o.Echo && (o.Sink == nil || o.API == nil):
		return errors.New("a sink and an API are needed")
	}
	return nil
}

func def[T int | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// Server is the public port. Start, Shutdown, StopAccepting, SetPressure, Submit and Resume may be called
// from any goroutine.
type Server struct {
	gnet.BuiltinEventEngine

	// Immutable after Start.
	opts    Options // but for its Settings, which rules hold
	metrics *metrics
	log     zerolog.Logger // sampled
	denials *Denials       // nil: none
	tls     *tls.Config    // nil: none
	loops   []*loop
	addr    net.Addr
	addrErr error
	engine  gnet.Engine
	http    *httpFront
	verify  chan func() // slow token checks

	rules    atomic.Pointer[rules]
	perAddr  addressCounts
	upgrades rate

	register    sync.Mutex // of a loop at its first connection
	connections atomic.Int64
	bridged     atomic.Int64 // of them net/http has
	shaking     atomic.Int64 // of them in a TLS handshake
	lingering   atomic.Int64 // of them closed, but for the peer to read why
	draining    atomic.Bool
	pressed     atomic.Bool // memory is short
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
		opts:    opts,
		perAddr: newAddressCounts(),
		verify:  make(chan func(), verifyQueue),
		log: opts.Logger.Sample(&zerolog.BurstSampler{
			Burst: 20, Period: time.Second, NextSampler: &zerolog.BasicSampler{N: 1000},
		}),
		booted: make(chan struct{}),
		done:   make(chan struct{}),
	}
	r, err := newRules(opts.Settings, opts.Echo)
	if err != nil {
		return nil, fmt.Errorf("transport options: %w", err)
	}
	s.warn(opts.Settings.MaxConnections, r)
	s.rules.Store(r)
	s.opts.Settings = Settings{}
	if s.metrics, err = newMetrics(s, opts.Registerer); err != nil {
		return nil, err
	}
	if opts.Certificate != nil {
		s.tls = tlsConfig(opts.Certificate)
	}
	for i := range opts.Loops {
		l := newLoop(s, i)
		if c := &opts.Compression; c.Enabled {
			if l.deflater, err = newDeflater(c.Level); err != nil {
				return nil, fmt.Errorf("transport options: compression: %w", err)
			}
		}
		s.loops = append(s.loops, l)
	}
	if !opts.Echo {
		s.denials = opts.Settings.Verifier.Denials()
		s.http = newHTTPFront(s)
	}
	return s, nil
}

// Connections is the number of connections open, of every kind.
func (s *Server) Connections() int64 { return s.connections.Load() }

// Loops is the number of event loops.
func (s *Server) Loops() int { return len(s.loops) }

// Start listens and returns when connections are accepted. ctx bounds the start only.
func (s *Server) Start(ctx context.Context) error {
	port, free, err := reserve(ctx, s.opts.Addr)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	defer free()
	runCtx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	spare.acquire()
	s.children.Go(func() {
		defer spare.retire()
		err = s.runEngine(port) // read after done
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
		return fmt.Errorf("listen on %s: %w", s.opts.Addr, err)
	case <-ctx.Done():
		return s.giveUp(ctx)
	}
	if s.addrErr != nil {
		return s.giveUp(ctx)
	}
	s.children.Go(func() { s.tick(runCtx) })
	if s.http != nil {
		s.children.Go(s.http.serve)
		for range max(1, runtime.GOMAXPROCS(0)/2) {
			s.children.Go(func() { s.checkTokens(runCtx) })
		}
	}
	return nil
}

// reserve finds out that the address is free, and a port where it names none; free lets the port go,
// once the loops have it. The loops share their port by SO_REUSEPORT, which would also let them share
// it with another process of ours and never say so.
func reserve(ctx context.Context, address string) (port string, free func(), err error) {
	host, number, err := net.SplitHostPort(address)
	if err != nil {
		return "", nil, err
	}
	lc := net.ListenConfig{}
	if number == "0" {
		lc.Control = func(_, _ string, c syscall.RawConn) (err error) {
			if ctlErr := c.Control(func(fd uintptr) {
				err = os.NewSyscallError("setsockopt", unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
			}); ctlErr != nil {
				return ctlErr
			}
			return err
		}
	}
	ln, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return "", nil, err
	}
	free = func() { _ = ln.Close() } // it has accepted nothing
	if number != "0" {
		free()
		free = func() {}
	}
	tcp, ok := ln.Addr().(*net.TCPAddr)
	if !ok {
		return "", nil, fmt.Errorf("%s is no TCP address", ln.Addr())
	}
	scheme := "tcp://"
	if host == "" && tcp.IP.To4() != nil { // a kernel without IPv6
		host, scheme = "0.0.0.0", "tcp4://"
	}
	return scheme + net.JoinHostPort(host, strconv.Itoa(tcp.Port)), free, nil
}

// runEngine runs the event loops and returns when they have ended. Each loop accepts for itself: so
// the count of connections is checked after every accept, and never runs ahead of the loops. A loop
// that accepts for others would do so until no descriptor is left, which ends gnet.
func (s *Server) runEngine(address string) error {
	return gnet.Run(s, address,
		gnet.WithNumEventLoop(len(s.loops)),
		gnet.WithReusePort(true),
		gnet.WithReuseAddr(true),
		gnet.WithTCPNoDelay(gnet.TCPNoDelay),
		gnet.WithLogger(gnetLog{s.opts.Logger}),
		gnet.WithLogLevel(logging.ErrorLevel))
}

// giveUp ends a start that has failed half-way.
func (s *Server) giveUp(ctx context.Context) error {
	s.stopping.Store(true)
	s.cancel()
	cause := s.addrErr
	select {
	case <-s.booted:
		s.endEngine()
		s.children.Wait()
	default: // it is still binding, and ends as soon as it has
	}
	if cause == nil {
		cause = context.Cause(ctx)
	}
	return fmt.Errorf("listen on %s: %w", s.opts.Addr, cause)
}

// endEngine makes the loops end. gnet's own Stop would only poll for it every half second; s.done
// says it at once.
func (s *Server) endEngine() {
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.engine.Stop(ended); err != nil && !errors.Is(err, context.Canceled) {
		s.opts.Logger.Debug().Err(err).Msg("the event loops had ended already")
	}
}

// OnBoot implements gnet.EventHandler.
func (s *Server) OnBoot(e gnet.Engine) gnet.Action {
	if s.stopping.Load() { // the start was given up
		return gnet.Shutdown
	}
	s.engine = e
	s.addr, s.addrErr = boundAddr(e)
	close(s.booted)
	return gnet.None
}

// OnShutdown implements gnet.EventHandler: the loops take no more tasks. What would be triggered
// later might reach a descriptor that is no longer gnet's.
func (s *Server) OnShutdown(gnet.Engine) {
	for _, l := range s.loops {
		l.end()
	}
}

// boundAddr asks the kernel for the address: with port 0 gnet knows only what it was given.
func boundAddr(e gnet.Engine) (net.Addr, error) {
	fd, err := e.Dup()
	if err != nil {
		return nil, fmt.Errorf("read the address: %w", err)
	}
	defer func() { _ = unix.Close(fd) }() // a duplicate
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return nil, fmt.Errorf("read the address: %w", os.NewSyscallError("getsockname", err))
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return &net.TCPAddr{IP: net.IP(sa.Addr[:]), Port: sa.Port}, nil
	case *unix.SockaddrInet6:
		return &net.TCPAddr{IP: net.IP(sa.Addr[:]), Port: sa.Port}, nil
	}
	return nil, fmt.Errorf("read the address: %T is no TCP address", sa)
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

// SetPressure says whether memory is short: then new connections, upgrades and HTTP requests are
// answered 503 and client messages are refused with OVERLOADED. Any goroutine may call it.
func (s *Server) SetPressure(on bool) { s.pressed.Store(on) }

// Shutdown ends the loops. Connections that are being closed have their time for the peer to read
// the close code; those still open are cut: close the sessions before. ctx bounds it all.
func (s *Server) Shutdown(ctx context.Context) error {
	s.StopAccepting()
	if s.stopping.Swap(true) {
		<-s.done
		return nil
	}
	select {
	case <-s.booted:
	default: // never started
		return nil
	}
	if s.http != nil {
		// A slow upload must not take the time in which close codes are read.
		httpCtx, cancel := context.WithTimeout(ctx, lingerMS*time.Millisecond)
		s.http.stop(httpCtx)
		cancel()
	}
	s.awaitLingering(ctx)
	s.cancel()
	s.endEngine()
	select {
	case <-s.done:
	case <-ctx.Done():
		return fmt.Errorf("stop the event loops: %w", context.Cause(ctx))
	}
	s.children.Wait()
	return nil
}

// awaitLingering waits for the connections that are being closed; none takes longer than lingerMS and a
// tick. Those who connect meanwhile are turned away, and have no claim to be waited for: they may never cease.
func (s *Server) awaitLingering(ctx context.Context) {
	poll := time.NewTicker(tickInterval / 10)
	defer poll.Stop()
	enough := time.NewTimer(lingerMS*time.Millisecond + 2*tickInterval)
	defer enough.Stop()
	for s.lingering.Load() > 0 {
		select {
		case <-poll.C:
		case <-enough.C:
			return
		case <-s.done:
			return
		case <-ctx.Done():
			return
		}
	}
}

// tick makes the loops look after their lingering, slow and unfinished connections.
func (s *Server) tick(ctx context.Context) {
	t := time.NewTicker(tickInterval)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			for _, l := range s.loops {
				l.ticking.request(l)
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

// identify checks a token; a panic in the parser refuses it.
func (s *Server) identify(token []byte) (who Identity, err error) {
	defer func() {
		if p := recover(); p != nil {
			s.metrics.panics.Inc()
			s.opts.Logger.Error().Any("panic", p).Bytes("stack", debug.Stack()).
				Msg("panic in a token's check; the token is refused")
			who, err = Identity{}, ErrTokenRefused
		}
	}()
	return s.rules.Load().Verifier.Verify(token)
}

// OnOpen implements gnet.EventHandler; on the connection's loop.
func (s *Server) OnOpen(c gnet.Conn) ([]byte, gnet.Action) {
	n := int(s.connections.Add(1))
	s.metrics.accepted.Inc()
	l := s.loopOf(c)
	l.begin()
	if !spare.ready() || n > l.rules.MaxConnections+courtesy {
		s.metrics.handshake.shed.Inc() // without a descriptor to spare, or too many to be polite
		return nil, gnet.Close
	}
	if s.pressed.Load() {
		s.metrics.pressed.connections.Inc()
		return nil, l.turnAway(c, shedResponse)
	}
	if n > l.rules.MaxConnections || s.draining.Load() {
		s.metrics.handshake.shed.Inc()
		return nil, l.turnAway(c, shedResponse)
	}
	peer := addrOf(c.RemoteAddr())
	if l.rules.forwarding.trusted.Contains(peer) { // its clients are counted, once they are named
		first := s.first()
		if s.opts.ProxyProtocol {
			first = stateProxy
		}
		l.open(c, first, 0)
		return nil, gnet.None
	}
	from, ok := s.perAddr.take(l.rules, peer)
	if !ok {
		s.metrics.handshake.crowded.Inc()
		return nil, l.turnAway(c, crowdedResponse)
	}
	l.open(c, s.first(), from)
	return nil, gnet.None
}

// first is what a connection begins with.
func (s *Server) first() connState {
	if s.tls != nil {
		return stateHello
	}
	return stateHead
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
func (s *Server) Resume(loop, _ int) {
	l := s.loops[loop]
	l.resuming.request(l)
}

// gnetLog carries gnet's errors to our log.
type gnetLog struct{ log zerolog.Logger }

func (g gnetLog) Debugf(string, ...any) {}
func (g gnetLog) Infof(string, ...any)  {}
func (g gnetLog) Warnf(f string, a ...any) {
	g.log.Warn().Msgf("event loops: "+f, a...)
}
func (g gnetLog) Errorf(f string, a ...any) { g.log.Error().Msgf("event loops: "+f, a...) }
func (g gnetLog) Fatalf(f string, a ...any) { g.log.Error().Msgf("event loops: "+f, a...) }
