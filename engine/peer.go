package engine

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"im-gateway/codec/gatewaypb"
)

// Defaults of PeersOptions.
const (
	defaultPeerWorkers  = 4
	defaultPeerQueue    = 4096
	defaultPeerConns    = 64
	defaultPeerDeadline = time.Second
	defaultPeerIdle     = 5 * time.Minute
)

// PeersOptions configure the calls to other gateways. Zero values mean the defaults above.
type PeersOptions struct {
	// Lookup returns the gRPC address of a gateway; an error when there is none.
	Lookup     func(ctx context.Context, gatewayID string) (addr string, err error)
	Token      string      // sent as `authorization: Bearer TOKEN` when it is not empty
	TLS        *tls.Config // nil: no TLS
	Workers    int
	Queue      int           // kicks waiting per worker; a full queue drops
	Conns      int           // connections kept per worker; the one unused longest makes room
	Deadline   time.Duration // of one kick, look-up included
	Idle       time.Duration // a connection unused for so long is closed
	Logger     zerolog.Logger
	Registerer prometheus.Registerer
}

// PeerKick asks another gateway to close a session that a newer one has replaced.
type PeerKick struct {
	GatewayID string
	User      string
	Session   string
	Reason    string
}

// Peers tells other gateways about sessions that were replaced. It is best effort: what is dropped
// here the other gateway finds out at its next refresh of the user's presence.
type Peers struct {
	o       PeersOptions // but for its Token
	token   atomic.Pointer[string]
	queues  []chan *PeerKick // never closed; one per worker, chosen by the gateway's id
	sent    prometheus.Counter
	full    prometheus.Counter
	unknown prometheus.Counter
	failed  prometheus.Counter
	stopped prometheus.Counter
	trouble zerolog.Logger // sampled
}

// NewPeers checks the options; Run starts the workers.
func NewPeers(o PeersOptions) (*Peers, error) {
	if o.Lookup == nil {
		return nil, errors.New("calls to other gateways: no look-up")
	}
	o.Workers = cmp.Or(o.Workers, defaultPeerWorkers)
	o.Queue = cmp.Or(o.Queue, defaultPeerQueue)
	o.Conns = cmp.Or(o.Conns, defaultPeerConns)
	o.Deadline = cmp.Or(o.Deadline, defaultPeerDeadline)
	o.Idle = cmp.Or(o.Idle, defaultPeerIdle)
	kicks := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_peer_kicks_total",
		Help: "Kicks for sessions on other gateways: sent; or dropped because the queue was full, " +
			"the gateway is unknown, the call failed or the gateway stopped.",
	}, []string{"outcome"})
	p := &Peers{
		o:       o,
		sent:    kicks.WithLabelValues("sent"),
		full:    kicks.WithLabelValues("queue_full"),
		unknown: kicks.WithLabelValues("unknown_gateway"),
		failed:  kicks.WithLabelValues("failed"),
		stopped: kicks.WithLabelValues("stopped"),
		trouble: o.Logger.Sample(&zerolog.BurstSampler{Burst: 5, Period: time.Second}),
	}
	p.token.Store(&o.Token)
	for range o.Workers {
		p.queues = append(p.queues, make(chan *PeerKick, o.Queue))
	}
	waiting := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "im_gateway_peer_kicks_waiting",
		Help: "Kicks waiting to be sent to other gateways.",
	}, func() float64 {
		n := 0
		for _, q := range p.queues {
			n += len(q)
		}
		return float64(n)
	})
	if err := registerGauge(o.Registerer, "peer_kicks_waiting_bound", "How many may wait, for all gateways together; more are dropped.",
		func() int { return o.Workers * o.Queue }); err != nil {
		return nil, err
	}
	for _, c := range []prometheus.Collector{kicks, waiting} {
		if err := o.Registerer.Register(c); err != nil {
			return nil, fmt.Errorf("register the metrics of calls to other gateways: %w", err)
		}
	}
	return p, nil
}

// Kick queues a kick. It never blocks and may be called from any goroutine; false: it was dropped,
// because the queue is full. Kicks for one gateway are sent in their order.
func (p *Peers) Kick(k PeerKick) bool {
	select {
	case p.queues[xxhash.Sum64String(k.GatewayID)%uint64(len(p.queues))] <- &k:
		return true
	default:
		p.full.Inc()
		return false
	}
}

// useToken changes the token that is sent.
func (p *Peers) useToken(token string) { p.token.Store(&token) }

// Run sends the queued kicks until ctx ends; what waits then is dropped.
func (p *Peers) Run(ctx context.Context) {
	var workers sync.WaitGroup
	for _, q := range p.queues {
		workers.Go(func() {
			w := &peerWorker{p: p, conns: map[string]*peerConn{}}
			w.run(ctx, q)
		})
	}
	workers.Wait()
}

// peerWorker sends the kicks of some gateways. Everything is its own goroutine's.
type peerWorker struct {
	p     *Peers
	conns map[string]*peerConn // by address
}

type peerConn struct {
	conn *grpc.ClientConn
	used time.Time
}

func (w *peerWorker) run(ctx context.Context, queue <-chan *PeerKick) {
	sweep := time.NewTicker(max(w.p.o.Idle/2, time.Millisecond))
	defer sweep.Stop()
	defer w.closeUnused(time.Time{})
	for ctx.Err() == nil {
		select {
		case k := <-queue:
			w.send(ctx, *k)
		case now := <-sweep.C:
			w.closeUnused(now.Add(-w.p.o.Idle))
		case <-ctx.Done():
		}
	}
	for {
		select {
		case <-queue:
			w.p.stopped.Inc()
		default:
			return
		}
	}
}

func (w *peerWorker) send(ctx context.Context, k PeerKick) {
	ctx, cancel := context.WithTimeout(ctx, w.p.o.Deadline)
	defer cancel()
	addr, err := w.p.o.Lookup(ctx, k.GatewayID)
	if err != nil {
		w.p.unknown.Inc()
		w.p.trouble.Warn().Str("peer", k.GatewayID).Err(err).Msg("other gateway not found, session not kicked there")
		return
	}
	conn, err := w.conn(addr)
	if err != nil {
		w.fail(k, addr, err)
		return
	}
	if token := *w.p.token.Load(); token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	_, err = gatewaypb.NewGatewayServiceClient(conn).Kick(ctx, &gatewaypb.KickRequest{
		UserId: k.User, SessionId: k.Session, Reason: k.Reason, Replaced: true,
	})
	if err != nil {
		// A connection that cannot be made backs off by itself: the next kicks fail at once.
		w.fail(k, addr, err)
		return
	}
	w.p.sent.Inc()
}

func (w *peerWorker) fail(k PeerKick, addr string, err error) {
	w.p.failed.Inc()
	w.p.trouble.Warn().Str("peer", k.GatewayID).Str("addr", addr).Err(err).Msg("session not kicked on other gateway")
}

// conn returns the connection to addr, making one, and room for it, when there is none.
func (w *peerWorker) conn(addr string) (*grpc.ClientConn, error) {
	now := time.Now()
	if c := w.conns[addr]; c != nil {
		c.used = now
		return c.conn, nil
	}
	if len(w.conns) >= w.p.o.Conns {
		oldest := now
		for _, c := range w.conns {
			if c.used.Before(oldest) {
				oldest = c.used
			}
		}
		w.closeUnused(oldest)
	}
	conn, err := grpc.NewClient("passthrough:///"+addr,
		grpc.WithTransportCredentials(transportCredentials(w.p.o.TLS)),
		grpc.WithConnectParams(connectParams(10*time.Second)),
		grpc.WithDisableServiceConfig(),
	)
	if err != nil {
		return nil, fmt.Errorf("client of the gateway at %s: %w", addr, err)
	}
	w.conns[addr] = &peerConn{conn: conn, used: now}
	return conn, nil
}

// closeUnused closes the connections that were not used after the given time; zero: all.
func (w *peerWorker) closeUnused(since time.Time) {
	for addr, c := range w.conns {
		if since.IsZero() || !c.used.After(since) {
			_ = c.conn.Close() // nothing is under way on it
			delete(w.conns, addr)
		}
	}
}
