package registry

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/resolver"
)

// NewResolver returns the builder of the etcd scheme: etcd:///NAME resolves to the endpoints that
// are registered under NAME. When the last of them goes, the last addresses are kept: etcd may have
// lost its leases while the servers live on, and an empty list would fail every call at once. As long
// as no address has been known, calls fail with UNAVAILABLE.
func NewResolver(c *clientv3.Client, log zerolog.Logger) resolver.Builder {
	return &builder{client: c, log: log, resync: resyncEvery}
}

type builder struct {
	client *clientv3.Client
	log    zerolog.Logger
	resync time.Duration
}

// Scheme implements resolver.Builder.
func (*builder) Scheme() string { return "etcd" }

// Build implements resolver.Builder.
func (b *builder) Build(target resolver.Target, cc resolver.ClientConn, _ resolver.BuildOptions) (resolver.Resolver, error) {
	name := strings.Trim(target.Endpoint(), "/")
	if name == "" {
		return nil, fmt.Errorf("resolve %s: no name after etcd:///", target.URL.String())
	}
	ctx, cancel := context.WithCancel(context.Background())
	w := &watcher{name: name, cc: cc, log: b.log, cancel: cancel}
	f := &follower{client: b.client, name: name, resync: b.resync, log: b.log, changed: w.changed, failed: w.failed}
	w.wg.Go(func() { f.run(ctx) })
	return w, nil
}

// watcher feeds one gRPC connection with addresses.
type watcher struct {
	name   string
	cc     resolver.ClientConn
	log    zerolog.Logger
	cancel context.CancelFunc
	wg     sync.WaitGroup

	// owned by the follower's goroutine
	addrs []string // what gRPC was given last, sorted
	empty bool     // etcd has none, addrs are what it had
}

// ResolveNow implements resolver.Resolver; what was given is always current.
func (*watcher) ResolveNow(resolver.ResolveNowOptions) {}

// Close implements resolver.Resolver.
func (w *watcher) Close() {
	w.cancel()
	w.wg.Wait()
}

func (w *watcher) failed(err error) {
	if len(w.addrs) == 0 {
		w.cc.ReportError(err)
	}
}

func (w *watcher) changed(all map[string]string) {
	addrs := slices.Compact(slices.Sorted(maps.Values(all)))
	switch {
	case len(addrs) == 0 && len(w.addrs) == 0:
		w.cc.ReportError(errors.New("no " + w.name + " is registered in etcd"))
		return
	case len(addrs) == 0:
		if !w.empty {
			w.log.Warn().Str("name", w.name).Strs("addrs", w.addrs).
				Msg("none is registered in etcd any more, keeping the last addresses")
		}
		w.empty = true
		return
	case slices.Equal(addrs, w.addrs):
		w.empty = false
		return
	}
	w.addrs, w.empty = addrs, false
	w.log.Info().Str("name", w.name).Strs("addrs", addrs).Msg("addresses found in etcd")
	state := resolver.State{}
	for _, addr := range addrs {
		state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: addr}}})
	}
	if err := w.cc.UpdateState(state); err != nil {
		w.log.Warn().Err(err).Str("name", w.name).Msg("addresses not taken")
	}
}
