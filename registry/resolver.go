package registry

import (
	"context"
	"fmt"
	"strings"
	"sync"

	"github.com/rs/zerolog"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/endpoints"
	"google.golang.org/grpc/resolver"
)

// NewResolver returns the builder of the etcd scheme: etcd:///NAME resolves to the endpoints that
// are registered under NAME. When the last of them goes, the last addresses are kept: etcd may have
// lost its leases while the servers live on, and an empty list would fail every call at once.
func NewResolver(c *clientv3.Client, log zerolog.Logger) resolver.Builder {
	return &builder{client: c, log: log}
}

type builder struct {
	client *clientv3.Client
	log    zerolog.Logger
}

// Scheme implements resolver.Builder.
func (*builder) Scheme() string { return "etcd" }

// Build implements resolver.Builder.
func (b *builder) Build(target resolver.Target, cc resolver.ClientConn, _ resolver.BuildOptions) (resolver.Resolver, error) {
	name := strings.TrimPrefix(target.URL.Path, "/")
	if name == "" {
		name = target.URL.Opaque
	}
	m, err := endpoints.NewManager(b.client, name)
	if err != nil {
		return nil, fmt.Errorf("resolve %s: %w", name, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	w := &watcher{name: name, manager: m, cc: cc, log: b.log, cancel: cancel, all: map[string]string{}}
	w.wg.Go(func() { w.run(ctx) })
	return w, nil
}

// watcher feeds one gRPC connection with addresses.
type watcher struct {
	name    string
	manager endpoints.Manager
	cc      resolver.ClientConn
	log     zerolog.Logger
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	all     map[string]string // address by key; owned by run
	known   bool              // there has been an address
}

// ResolveNow implements resolver.Resolver; the watch is always current.
func (*watcher) ResolveNow(resolver.ResolveNowOptions) {}

// Close implements resolver.Resolver.
func (w *watcher) Close() {
	w.cancel()
	w.wg.Wait()
}

func (w *watcher) run(ctx context.Context) {
	retry := retryPolicy()
	for ctx.Err() == nil {
		updates, err := w.manager.NewWatchChannel(ctx)
		if err != nil {
			w.cc.ReportError(fmt.Errorf("find %s in etcd: %w", w.name, err))
		} else {
			// A new watch begins with all that is there now, and says nothing when that is nothing.
			clear(w.all)
			if there, err := w.manager.List(ctx); err == nil && len(there) == 0 {
				w.none()
			}
			for batch := range updates {
				retry.Reset()
				w.apply(batch)
			}
		}
		if !pause(ctx, retry.NextBackOff()) {
			return
		}
	}
}

// none is called when nothing is registered: calls fail at once when there never was an address,
// and go to the last ones when there was.
func (w *watcher) none() {
	if w.known {
		w.log.Warn().Str("name", w.name).Msg("no endpoint is registered in etcd any more, keeping the last addresses")
		return
	}
	w.cc.ReportError(fmt.Errorf("no instance of %s is registered in etcd", w.name))
}

func (w *watcher) apply(batch []*endpoints.Update) {
	for _, u := range batch {
		switch u.Op {
		case endpoints.Add:
			w.all[u.Key] = u.Endpoint.Addr
		case endpoints.Delete:
			delete(w.all, u.Key)
		}
	}
	if len(w.all) == 0 {
		w.none()
		return
	}
	w.known = true
	state := resolver.State{}
	seen := map[string]bool{}
	for _, addr := range w.all {
		if !seen[addr] {
			seen[addr] = true
			state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: addr}}})
		}
	}
	if err := w.cc.UpdateState(state); err != nil {
		w.log.Debug().Err(err).Str("name", w.name).Msg("addresses not taken")
	}
}
