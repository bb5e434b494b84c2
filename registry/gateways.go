package registry

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// ErrUnknownGateway is returned when no gateway of that id is registered.
var ErrUnknownGateway = errors.New("no gateway of this id is registered")

// Gateways knows the gRPC addresses of all gateways, and whose topics are read, and goes on knowing them
// while etcd is away.
type Gateways struct {
	client *clientv3.Client
	log    zerolog.Logger
	resync time.Duration
	addrs  atomic.Pointer[map[string]string] // by gateway_id; nil: not read yet
	owners atomic.Pointer[map[string]string] // instances, by gateway_id; nil: not read yet
}

// NewGateways returns a Gateways that asks etcd each time until Run has read them.
func NewGateways(c *clientv3.Client, log zerolog.Logger) *Gateways {
	return &Gateways{client: c, log: log, resync: resyncEvery}
}

// Run follows the registrations until ctx ends. No failure of etcd ends it.
func (g *Gateways) Run(ctx context.Context) {
	endpoints := &follower{
		client: g.client, name: endpointPrefix, resync: g.resync, log: g.log,
		changed: func(all map[string]string) { g.addrs.Store(&all) },
		failed:  func(error) {},
	}
	owners := &follower{
		client: g.client, name: strings.TrimSuffix(ownerPrefix, "/"), resync: g.resync, log: g.log,
		value:   func(b []byte) (string, error) { return string(b), nil },
		changed: func(all map[string]string) { g.owners.Store(&all) },
		failed:  func(error) {},
	}
	var both sync.WaitGroup
	both.Go(func() { endpoints.run(ctx) })
	both.Go(func() { owners.run(ctx) })
	both.Wait()
}

// Owned tells whether somebody reads a gateway's topic, as far as is known: the gateway, or one that has
// taken it over. It may be called from any goroutine and does not block.
func (g *Gateways) Owned(gatewayID string) bool {
	owners := g.owners.Load()
	if owners == nil {
		return true
	}
	_, ok := (*owners)[gatewayID]
	return ok
}

// Known is how many gateways are registered, as far as is known.
func (g *Gateways) Known() int {
	if all := g.addrs.Load(); all != nil {
		return len(*all)
	}
	return 0
}

// Addr returns the gRPC address of a gateway, or ErrUnknownGateway. It may be called from any
// goroutine; it blocks only while nothing has been read yet.
func (g *Gateways) Addr(ctx context.Context, gatewayID string) (string, error) {
	all := g.addrs.Load()
	if all == nil {
		return GatewayAddr(ctx, g.client, gatewayID)
	}
	addr, ok := (*all)[gatewayID]
	if !ok {
		return "", fmt.Errorf("gateway %s: %w", gatewayID, ErrUnknownGateway)
	}
	return addr, nil
}

// GatewayAddr asks etcd for the gRPC address of one gateway.
func GatewayAddr(ctx context.Context, c *clientv3.Client, gatewayID string) (string, error) {
	resp, err := c.Get(ctx, endpointPrefix+"/"+gatewayID)
	if err != nil {
		return "", fmt.Errorf("look gateway %s up: %w", gatewayID, err)
	}
	if len(resp.Kvs) == 0 {
		return "", fmt.Errorf("gateway %s: %w", gatewayID, ErrUnknownGateway)
	}
	addr, err := endpointAddr(resp.Kvs[0].Value)
	if err != nil {
		return "", fmt.Errorf("gateway %s: %w", gatewayID, err)
	}
	return addr, nil
}
