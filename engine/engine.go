package engine

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/rueidis"
	"github.com/rs/zerolog"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"im-gateway/broker"
	"im-gateway/codec"
	"im-gateway/engine/tracing"
	"im-gateway/registry"
	"im-gateway/shard"
	"im-gateway/transport"
)

// Engine is one gateway. New, then Run, once.
type Engine struct {
	cfg      Config // that it started with
	log      zerolog.Logger
	nonce    uint64
	random   bool // the gateway_id was made up at this start
	denials  *transport.Denials
	verifier atomic.Pointer[transport.Verifier] // keys', for requests of the HTTP API
	metrics  *prometheus.Registry
	ready    *Readiness
	started  time.Time
	operator *Operator
	acting   *actingToken

	dependencies *dependencies

	abort     context.CancelFunc
	hard      context.Context // ends at Abort, and when Run returns
	draining  atomic.Bool
	askOnce   sync.Once
	asked     chan struct{} // closed when an operator has asked for a drain
	lapse     lapse
	publicUp  chan struct{} // closed when the public port listens
	httpAddr  net.Addr
	adminAddr net.Addr

	// What a reload changes.
	inForce  atomic.Pointer[Config] // never written to
	mu       sync.Mutex             // of what follows, once the gateway has started
	keys     *tokenKeys
	keyTasks map[keySetID]*task
	stopping bool // nothing is changed any more

	// Owned by the start, then by reloads.
	loaded      *Loaded       // what cfg was made of
	reloadAsked chan struct{} // capacity 1
	reloads     *reloads
	keysOnce    sync.Once
	keysKnown   chan struct{} // closed when every key set had come

	// The parts, in the order of their start.
	etcd         *clientv3.Client
	owner        *registry.Owner
	gateways     *registry.Gateways
	redis        rueidis.Client
	sampler      *codec.Sampler  // nil: nothing is traced
	tracer       *tracing.Tracer // nil as well
	shards       *shard.Set
	presence     *presenceBridge
	peers        *Peers
	producer     *broker.Producer
	begin        chan struct{} // closed when the consumer may dispatch
	consumer     *broker.Consumer
	logic        *grpc.ClientConn
	api          *API
	server       *transport.Server
	memory       *pressure // nil: without a memory limit
	grpc         *GRPCServer
	registration *registry.Registration

	// failed takes the first error that ends the process.
	failed chan error
	tasks  []*task
}

// lapse is what checkAfterPause has found.
type lapse struct {
	mu     sync.Mutex
	asked  time.Time // when etcd was asked last
	fenced error     // another process owns the topic
}

// The conditions of readiness, in the order in which they are met.
const (
	needEtcd     = "etcd"
	needKafka    = "kafka"
	needRedis    = "redis"
	needKeys     = "jwks"
	needClients  = "kafka clients"
	needListener = "listener"
	needRegistry = "registration"
)

// ErrFenced is in the error of a gateway that lost its downstream topic to another process.
var ErrFenced = errors.New("this gateway's downstream topic belongs to another process now")

// New checks what can be checked without the network.
func New(loaded *Loaded, logger zerolog.Logger) (*Engine, error) {
	cfg := loaded.Config
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	e := &Engine{
		cfg: cfg, loaded: loaded, metrics: prometheus.NewRegistry(), started: time.Now(),
		ready:    NewReadiness(needEtcd, needKafka, needRedis, needKeys, needClients, needListener, needRegistry),
		begin:    make(chan struct{}),
		publicUp: make(chan struct{}),
		asked:    make(chan struct{}),
		failed:   make(chan error, 1),

		keyTasks: map[keySetID]*task{}, keysKnown: make(chan struct{}), reloadAsked: make(chan struct{}, 1),
	}
	if e.cfg.GatewayID == "" {
		host, err := os.Hostname()
		if err != nil {
			return nil, fmt.Errorf("gateway_id: no host name to make one of: %w", err)
		}
		e.cfg.GatewayID, e.random = NewGatewayID(host), true
	}
	if e.cfg.Shard.Count == 0 {
		e.cfg.Shard.Count = halfTheCores()
	}
	if e.cfg.HTTP.Loops == 0 {
		e.cfg.HTTP.Loops = halfTheCores()
	}
	cfg = e.cfg
	e.inForce.Store(&cfg)
	e.log = logger.With().Str("gateway_id", e.cfg.GatewayID).Logger()
	var seed [8]byte
	_, _ = rand.Read(seed[:]) // never fails, says crypto/rand
	e.nonce = binary.BigEndian.Uint64(seed[:])
	var err error
	if cfg.Auth.DenyList {
		e.denials = transport.NewDenials()
	}
	if e.keys, err = newTokenKeys(cfg.Auth, loaded.files, e.denials, nil, e.log); err != nil {
		return nil, err
	}
	e.verifier.Store(e.keys.verifier)
	if e.reloads, err = newReloads(e.metrics, e.started); err != nil {
		return nil, err
	}
	if e.dependencies, err = newDependencies([]string{needEtcd, needKafka, needRedis, dependencyLogic}, e.log, e.metrics); err != nil {
		return nil, err
	}
	e.hard, e.abort = context.WithCancel(context.Background())
	return e, nil
}

// GatewayID is the id in use.
func (e *Engine) GatewayID() string { return e.cfg.GatewayID }

// config is the configuration in force, to be read only.
func (e *Engine) config() *Config { return e.inForce.Load() }

// Ready is closed when the gateway is ready for clients.
func (e *Engine) Ready() <-chan struct{} { return e.ready.Done() }

// HTTPAddr is the public port's address; call it after Ready.
func (e *Engine) HTTPAddr() net.Addr { return e.httpAddr }

// Abort ends Run at once: what is under way is given up. Any goroutine may call it.
func (e *Engine) Abort() { e.abort() }

// Run starts the gateway and serves until ctx ends, then drains and stops; nil means that it was
// stopped as asked. An error is a start that cannot succeed or a failure that leaves the process
// without use, such as being fenced off its topic.
func (e *Engine) Run(ctx context.Context) error {
	defer e.abort()
	startCtx, cancel := context.WithCancel(ctx)
	stopCancel := context.AfterFunc(e.hard, cancel)
	defer stopCancel()
	defer cancel()
	go func() {
		select {
		case <-e.asked:
			cancel()
		case <-startCtx.Done():
		}
	}()
	err := e.start(startCtx)
	switch {
	case err == nil:
		e.log.Info().Stringer("http_addr", e.httpAddr).Str("version", Version()).
			Dur("took_ms", time.Since(e.started)).Msg("ready")
		if err := trimStart(); err != nil {
			e.log.Debug().Err(err).Msg("the memory that starting took is kept")
		}
		select {
		case <-ctx.Done():
		case <-e.asked:
		case <-e.hard.Done():
		case err = <-e.failed:
			e.log.Error().Err(err).Msg("cannot go on, stopping")
		}
	case startCtx.Err() != nil:
		err = nil // stopped while starting
	default:
		// A task that failed says more than the step that noticed.
		select {
		case failure := <-e.failed:
			err = failure
		default:
		}
		e.log.Error().Err(err).Msg("start failed, stopping")
	}
	e.stop(err)
	return err
}

// task is one goroutine of the engine's, with a context of its own so that the stop has an order.
type task struct {
	name   string
	cancel context.CancelFunc
	done   chan struct{}
}

// goTask runs f until its context ends. An error before that ends the process.
func (e *Engine) goTask(name string, f func(context.Context) error) *task {
	ctx, cancel := context.WithCancel(e.hard)
	t := &task{name: name, cancel: cancel, done: make(chan struct{})}
	e.tasks = append(e.tasks, t)
	go func() {
		defer close(t.done)
		if err := f(ctx); err != nil && ctx.Err() == nil {
			e.fail(fmt.Errorf("%s: %w", name, err))
		}
	}()
	return t
}

func (e *Engine) fail(err error) {
	select {
	case e.failed <- err:
	default: // the first one counts
	}
}

// end cancels a task and waits for it; nil is a task that was never started.
func (t *task) end(ctx context.Context) {
	if t == nil {
		return
	}
	t.cancel()
	select {
	case <-t.done:
	case <-ctx.Done():
	}
}

// fatalError is an error that waiting cannot mend.
type fatalError struct{ error }

func (f fatalError) Unwrap() error { return f.error }

// await tries f until it succeeds, with back-off, and says each time what is missing.
func (e *Engine) await(ctx context.Context, need string, f func(context.Context) error) error {
	policy := backoff.NewExponentialBackOff()
	policy.InitialInterval = 200 * time.Millisecond
	policy.MaxInterval = 5 * time.Second
	_, err := backoff.Retry(ctx, func() (struct{}, error) {
		err := f(ctx)
		var fatal fatalError
		if errors.As(err, &fatal) {
			err = backoff.Permanent(err)
		}
		return struct{}{}, err
	}, backoff.WithBackOff(policy), backoff.WithMaxElapsedTime(0),
		backoff.WithNotify(func(err error, next time.Duration) {
			e.ready.Waiting(need, err.Error())
			e.dependencies.saw(need, err)
			e.log.Warn().Err(err).Dur("retry_ms", next).Msg("waiting for " + need)
		}))
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	return nil
}

// halfTheCores is how many event loops, and how many shards, there are unless configured. A loop
// and a shard keep a core busy together with what sarama does for them; more of them only makes
// batches smaller and wake-ups more frequent. A container's quota of CPU counts, not the machine's cores.
func halfTheCores() int { return min(max(1, runtime.GOMAXPROCS(0)/2), codec.MaxShards) }
