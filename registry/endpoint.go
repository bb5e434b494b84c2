package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/endpoints"
)

// Endpoint is what the gateway says of itself.
type Endpoint struct {
	GatewayID string
	GRPCAddr  string // what others dial
	HTTPAddr  string
	Version   string
	StartedAt int64 // Unix ms
}

// RegistrationOptions configure a Registration; all are required.
type RegistrationOptions struct {
	Client     *clientv3.Client
	Endpoint   Endpoint
	LeaseTTL   time.Duration // how long the endpoint outlives a crash; whole seconds
	Logger     zerolog.Logger
	Registerer prometheus.Registerer
}

// Registration keeps the gateway's endpoint in etcd, under a lease that is granted anew whenever it
// is lost. Registered and Deregister may be called from any goroutine.
type Registration struct {
	// immutable after NewRegistration
	o        RegistrationOptions
	manager  endpoints.Manager
	key      string
	endpoint endpoints.Endpoint
	state    *leaseState
	first    chan struct{} // closed by Run at the first success
	stop     context.Context
	stopNow  context.CancelFunc
	done     chan struct{} // closed when Run returns

	running    atomic.Bool
	registered atomic.Bool

	// owned by Run; leaveErr is read after done
	lease    clientv3.LeaseID
	leaveErr error
}

// NewRegistration validates; Run registers.
func NewRegistration(o RegistrationOptions) (*Registration, error) {
	if o.Endpoint.GatewayID == "" || o.Endpoint.GRPCAddr == "" {
		return nil, errors.New("registration: no gateway_id or no gRPC address")
	}
	if o.LeaseTTL < minLeaseTTL {
		return nil, fmt.Errorf("registration: lease of %s, must be at least %s", o.LeaseTTL, minLeaseTTL)
	}
	m, err := endpoints.NewManager(o.Client, endpointPrefix)
	if err != nil {
		return nil, fmt.Errorf("registration: %w", err)
	}
	// One immutable string: older clients compare metadata with ==, which panics on a map.
	metadata, err := json.Marshal(struct {
		HTTP      string `json:"http"`
		Version   string `json:"version"`
		StartedAt int64  `json:"started_at"`
	}{o.Endpoint.HTTPAddr, o.Endpoint.Version, o.Endpoint.StartedAt})
	if err != nil {
		return nil, fmt.Errorf("registration: metadata: %w", err)
	}
	r := &Registration{
		o: o, manager: m,
		key: endpointPrefix + "/" + o.Endpoint.GatewayID,
		//lint:ignore SA1019 others read the metadata; as one string it does no harm
		endpoint: endpoints.Endpoint{Addr: o.Endpoint.GRPCAddr, Metadata: string(metadata)},
		state:    newLeaseState("endpoint", o.LeaseTTL),
		first:    make(chan struct{}),
		done:     make(chan struct{}),
	}
	r.stop, r.stopNow = context.WithCancel(context.Background())
	if err := r.state.register(o.Registerer); err != nil {
		return nil, err
	}
	return r, register(o.Registerer, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "im_gateway_registry_registered",
		Help: "1 while the gateway's endpoint stands in etcd, as far as it knows.",
	}, func() float64 {
		if r.registered.Load() {
			return 1
		}
		return 0
	}))
}

// Registered is closed once the endpoint stands in etcd for the first time.
func (r *Registration) Registered() <-chan struct{} { return r.first }

// Deregister ends Run, and with it the registration: the first step of a drain. It returns when the
// endpoint is out of etcd, when that has failed (the lease then expires), or when ctx ends.
func (r *Registration) Deregister(ctx context.Context) error {
	r.stopNow()
	if !r.running.Load() {
		return nil
	}
	select {
	case <-r.done:
		return r.leaveErr
	case <-ctx.Done():
		return fmt.Errorf("take %s out of etcd: %w", r.key, context.Cause(ctx))
	}
}

// Run keeps the endpoint registered until ctx ends or Deregister is called, then takes it out, within
// 2 s. Call it once. No failure of etcd ends it.
func (r *Registration) Run(ctx context.Context) {
	r.running.Store(true)
	defer close(r.done)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.stop, cancel)()

	retry := retryPolicy()
	for ctx.Err() == nil {
		err := r.add(ctx)
		if err == nil {
			retry.Reset()
			if err = keep(ctx, r.o.Client, r.lease, r.state.confirm); err != nil {
				r.state.lost()
				r.registered.Store(false)
			}
		}
		if ctx.Err() != nil {
			break
		}
		r.o.Logger.Warn().Err(err).Str("key", r.key).Msg("not registered in etcd, trying again")
		pause(ctx, retry.NextBackOff())
	}
	r.leave(ctx)
}

// add puts the endpoint under a new lease.
func (r *Registration) add(ctx context.Context) (err error) {
	r.lease, err = grant(ctx, r.o.Client, r.o.LeaseTTL, func(ctx context.Context, lease clientv3.LeaseID) error {
		return r.manager.AddEndpoint(ctx, r.key, r.endpoint, clientv3.WithLease(lease))
	})
	if err != nil {
		return fmt.Errorf("register %s: %w", r.key, err)
	}
	r.registered.Store(true)
	r.state.confirm()
	r.o.Logger.Info().Str("key", r.key).Str("grpc_addr", r.endpoint.Addr).Msg("registered in etcd")
	select {
	case <-r.first:
	default:
		close(r.first)
	}
	return nil
}

// leave takes the endpoint out by its lease, so that a successor's entry under the same key stays.
func (r *Registration) leave(ctx context.Context) {
	if r.registered.Load() {
		if err := giveUp(ctx, r.o.Client, r.lease); err != nil {
			r.leaveErr = fmt.Errorf("take %s out of etcd: %w", r.key, err)
			r.o.Logger.Warn().Err(err).Str("key", r.key).Msg("endpoint not taken out of etcd, it expires with its lease")
			return
		}
		r.registered.Store(false)
		r.state.over()
	}
	r.o.Logger.Info().Str("key", r.key).Msg("taken out of etcd")
}
