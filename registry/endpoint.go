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

// RegistrationOptions configure a Registration.
type RegistrationOptions struct {
	Client     *clientv3.Client
	Endpoint   Endpoint
	LeaseTTL   time.Duration
	Logger     zerolog.Logger
	Registerer prometheus.Registerer
}

// Registration keeps the gateway's endpoint in etcd, under a lease that is granted anew whenever it
// is lost.
type Registration struct {
	o          RegistrationOptions
	manager    endpoints.Manager
	key        string
	endpoint   endpoints.Endpoint
	registered atomic.Bool
	first      chan struct{} // closed at the first success
	losses     prometheus.Counter
}

// NewRegistration validates; Run registers.
func NewRegistration(o RegistrationOptions) (*Registration, error) {
	m, err := endpoints.NewManager(o.Client, endpointPrefix)
	if err != nil {
		return nil, fmt.Errorf("endpoint manager: %w", err)
	}
	// One immutable string: older clients compare metadata with ==, which panics on a map.
	metadata, err := json.Marshal(map[string]any{
		"http": o.Endpoint.HTTPAddr, "version": o.Endpoint.Version, "started_at": o.Endpoint.StartedAt,
	})
	if err != nil {
		return nil, fmt.Errorf("endpoint metadata: %w", err)
	}
	r := &Registration{
		o: o, manager: m,
		key:      endpointPrefix + "/" + o.Endpoint.GatewayID,
		endpoint: endpoints.Endpoint{Addr: o.Endpoint.GRPCAddr, Metadata: string(metadata)},
		first:    make(chan struct{}),
		losses: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "im_gateway_registry_lease_losses_total",
			Help: "How often the lease of the gateway's endpoint in etcd was lost.",
		}),
	}
	gauge := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "im_gateway_registry_registered",
		Help: "1 while the gateway's endpoint stands in etcd.",
	}, func() float64 {
		if r.registered.Load() {
			return 1
		}
		return 0
	})
	for _, c := range []prometheus.Collector{r.losses, gauge} {
		if err := o.Registerer.Register(c); err != nil {
			return nil, fmt.Errorf("register the registration's metrics: %w", err)
		}
	}
	return r, nil
}

// Registered is closed once the endpoint stands in etcd for the first time.
func (r *Registration) Registered() <-chan struct{} { return r.first }

// Run keeps the endpoint registered until ctx ends, then takes it out, within 2 s.
func (r *Registration) Run(ctx context.Context) {
	retry := retryPolicy()
	for ctx.Err() == nil {
		id, err := holdLease(ctx, r.o.Client, r.o.LeaseTTL, func(ctx context.Context, id clientv3.LeaseID) error {
			if err := r.manager.AddEndpoint(ctx, r.key, r.endpoint, clientv3.WithLease(id)); err != nil {
				return fmt.Errorf("register %s: %w", r.key, err)
			}
			if !r.registered.Swap(true) {
				r.o.Logger.Info().Str("key", r.key).Str("grpc_addr", r.endpoint.Addr).Msg("registered in etcd")
			}
			select {
			case <-r.first:
			default:
				close(r.first)
			}
			retry.Reset()
			return nil
		})
		if ctx.Err() != nil {
			r.leave(id)
			return
		}
		if r.registered.Swap(false) || errors.Is(err, errLeaseLost) {
			r.losses.Inc()
		}
		r.o.Logger.Warn().Err(err).Str("key", r.key).Msg("not registered in etcd, trying again")
		if !pause(ctx, retry.NextBackOff()) {
			return
		}
	}
}

func (r *Registration) leave(id clientv3.LeaseID) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if err := revoke(ctx, r.o.Client, id); err != nil {
		r.o.Logger.Warn().Err(err).Str("key", r.key).Msg("endpoint not taken out of etcd, it expires with its lease")
		return
	}
	r.registered.Store(false)
	r.o.Logger.Info().Str("key", r.key).Msg("taken out of etcd")
}

// ErrUnknownGateway is returned when no gateway of that id is registered.
var ErrUnknownGateway = errors.New("no gateway of this id is registered")

// GatewayAddr returns the gRPC address of a gateway.
func GatewayAddr(ctx context.Context, c *clientv3.Client, gatewayID string) (string, error) {
	resp, err := c.Get(ctx, endpointPrefix+"/"+gatewayID)
	if err != nil {
		return "", fmt.Errorf("look gateway %s up: %w", gatewayID, err)
	}
	if len(resp.Kvs) == 0 {
		return "", fmt.Errorf("gateway %s: %w", gatewayID, ErrUnknownGateway)
	}
	var entry struct {
		Addr string `json:"Addr"`
	}
	if err := json.Unmarshal(resp.Kvs[0].Value, &entry); err != nil {
		return "", fmt.Errorf("read the entry of gateway %s: %w", gatewayID, err)
	}
	return entry.Addr, nil
}
