package registry

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/endpoints"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// instance is a gRPC server that counts its calls.
type instance struct {
	grpc_health_v1.UnimplementedHealthServer
	addr  string
	mu    sync.Mutex
	calls int
}

func (i *instance) Check(context.Context, *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.calls++
	return &grpc_health_v1.HealthCheckResponse{}, nil
}

func (i *instance) count() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.calls
}

func startInstance(t *testing.T) *instance {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	i := &instance{addr: ln.Addr().String()}
	s := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(s, i)
	background(t, func(context.Context) { _ = s.Serve(ln) })
	t.Cleanup(s.Stop)
	return i
}

// put registers an endpoint without a lease.
func put(t *testing.T, c *clientv3.Client, name, id, addr string) {
	t.Helper()
	m, err := endpoints.NewManager(c, name)
	if err == nil {
		err = m.AddEndpoint(within(t), name+"/"+id, endpoints.Endpoint{Addr: addr})
	}
	if err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, c *clientv3.Client, name, id string) {
	t.Helper()
	if _, err := c.Delete(within(t), name+"/"+id); err != nil {
		t.Fatal(err)
	}
}

// dial returns a client that finds name in etcd, as im-logic is found.
func dial(t *testing.T, c *clientv3.Client, name string) grpc_health_v1.HealthClient {
	t.Helper()
	conn, err := grpc.NewClient("etcd:///"+name, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithResolvers(&builder{client: c, log: nop(), resync: 200 * time.Millisecond}),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"round_robin": {}}]}`))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return grpc_health_v1.NewHealthClient(conn)
}

func call(t *testing.T, h grpc_health_v1.HealthClient) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(within(t), 5*time.Second)
	defer cancel()
	_, err := h.Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	return err
}

// reaches polls until calls get to the instance.
func reaches(t *testing.T, h grpc_health_v1.HealthClient, i *instance) {
	t.Helper()
	before := i.count()
	eventually(t, "a call at "+i.addr, func() bool {
		_ = call(t, h)
		return i.count() > before
	})
}

// stays makes some calls, all of which must succeed.
func stays(t *testing.T, h grpc_health_v1.HealthClient) {
	t.Helper()
	for n := range 20 {
		if err := call(t, h); err != nil {
			t.Fatalf("call %d: %v", n, err)
		}
	}
}

func TestResolverFollows(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	c := connect(t, e)
	a, b := startInstance(t), startInstance(t)
	put(t, c, "im-logic", "a", a.addr)
	h := dial(t, c, "im-logic")
	reaches(t, h, a)
	put(t, c, "im-logic", "b", b.addr)
	reaches(t, h, b)
	reaches(t, h, a)                    // both, in turn
	put(t, c, "im-logic", "b2", b.addr) // the same address twice
	put(t, c, "im-logic-other", "x", "127.0.0.1:1")
	stays(t, h)
	remove(t, c, "im-logic", "a")
	eventually(t, "no calls at a", func() bool {
		before := a.count()
		stays(t, h)
		return a.count() == before
	})
	// A server that comes back elsewhere under its key.
	put(t, c, "im-logic", "b", a.addr)
	reaches(t, h, a)
}

// TestResolverKeepsTheLast addresses when the list becomes empty.
func TestResolverKeepsTheLast(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	c := connect(t, e)
	a, b := startInstance(t), startInstance(t)
	put(t, c, "im-logic", "a", a.addr)
	h := dial(t, c, "im-logic")
	reaches(t, h, a)
	remove(t, c, "im-logic", "a")
	// Each resync reads an empty list, too.
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		<-ctx.Done()
		cancel()
		stays(t, h)
	}
	put(t, c, "im-logic", "b", b.addr)
	reaches(t, h, b)
}

// TestResolverWithoutEtcd goes on with what it knows, and finds new ones after etcd is back.
func TestResolverWithoutEtcd(t *testing.T) {
	t.Parallel()
	for _, dataLost := range []bool{false, true} {
		t.Run(map[bool]string{false: "data kept", true: "data lost"}[dataLost], func(t *testing.T) {
			t.Parallel()
			e := startEtcd(t)
			c := connect(t, e)
			a, b := startInstance(t), startInstance(t)
			for n := range 20 { // a revision that a new etcd takes long to reach
				put(t, c, "im-logic", "a", a.addr)
				put(t, c, "other", fmt.Sprint(n), a.addr)
			}
			h := dial(t, c, "im-logic")
			reaches(t, h, a)
			e.stop()
			stays(t, h)
			if dataLost {
				e.wipe()
			}
			e.start()
			eventually(t, "etcd answers", func() bool { return Reachable(within(t), c) == nil })
			stays(t, h)
			put(t, c, "im-logic", "b", b.addr)
			reaches(t, h, b)
		})
	}
}

// TestResolverWithNothing fails calls at once, rather than at their deadline.
func TestResolverWithNothing(t *testing.T) {
	t.Parallel()
	for _, away := range []bool{false, true} {
		t.Run(map[bool]string{false: "none registered", true: "etcd away"}[away], func(t *testing.T) {
			t.Parallel()
			e := startEtcd(t)
			c := connect(t, e)
			if away {
				e.stop()
			}
			h := dial(t, c, "im-logic")
			if err := call(t, h); status.Code(err) != codes.Unavailable {
				t.Errorf("error %v", err)
			}
			if away {
				e.start()
				eventually(t, "etcd answers", func() bool { return Reachable(within(t), c) == nil })
			}
			a := startInstance(t)
			put(t, c, "im-logic", "a", a.addr)
			reaches(t, h, a)
		})
	}
}

// TestResolverLeavesGarbageOut and uses the rest.
func TestResolverLeavesGarbageOut(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	c := connect(t, e)
	a := startInstance(t)
	for id, value := range map[string]string{"x": "{", "y": `{"Addr":""}`, "z": `{"Addr":7}`, "m": `{"Addr":"` + a.addr + `","Metadata":{"a":[1]}}`} {
		if _, err := c.Put(within(t), "im-logic/"+id, value); err != nil {
			t.Fatal(err)
		}
	}
	h := dial(t, c, "im-logic")
	stays(t, h)
	// An entry that turns into garbage no longer counts.
	if _, err := c.Put(within(t), "im-logic/m", "[]"); err != nil {
		t.Fatal(err)
	}
	b := startInstance(t)
	put(t, c, "im-logic", "b", b.addr)
	reaches(t, h, b)
	eventually(t, "no calls at a", func() bool {
		before := a.count()
		stays(t, h)
		return a.count() == before
	})
}

func TestResolverNeedsAName(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	c := connect(t, e)
	h := dial(t, c, "")
	if err := call(t, h); err == nil {
		t.Error("no error")
	}
}

func TestGateways(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	c := connect(t, e)
	put(t, c, endpointPrefix, "g1", "10.0.0.1:9080")
	put(t, c, endpointPrefix+"-owners", "g9", "x")
	g := NewGateways(c, nop())
	g.resync = 200 * time.Millisecond

	// Before it has read them it asks etcd.
	if addr, err := g.Addr(within(t), "g1"); err != nil || addr != "10.0.0.1:9080" {
		t.Errorf("address %q, error %v", addr, err)
	}
	if _, err := g.Addr(within(t), "g2"); !errors.Is(err, ErrUnknownGateway) {
		t.Errorf("error %v", err)
	}
	background(t, g.Run)
	eventually(t, "the gateways are known", func() bool { return g.addrs.Load() != nil })
	is := func(id, want string) bool {
		addr, err := g.Addr(t.Context(), id)
		if want == "" {
			return errors.Is(err, ErrUnknownGateway)
		}
		return err == nil && addr == want
	}
	put(t, c, endpointPrefix, "g2", "10.0.0.2:9080")
	eventually(t, "g2 is known", func() bool { return is("g2", "10.0.0.2:9080") })
	put(t, c, endpointPrefix, "g2", "10.0.0.3:9080")
	eventually(t, "g2 has moved", func() bool { return is("g2", "10.0.0.3:9080") })
	remove(t, c, endpointPrefix, "g1")
	eventually(t, "g1 is gone", func() bool { return is("g1", "") })
	if !is("g9", "") {
		t.Error("the key of an owner taken for a gateway")
	}

	e.stop()
	if !is("g2", "10.0.0.3:9080") {
		t.Error("forgotten while etcd is away")
	}
	e.wipe()
	e.start()
	eventually(t, "g2 is gone with etcd's data", func() bool { return is("g2", "") })
	put(t, c, endpointPrefix, "g3", "10.0.0.4:9080")
	eventually(t, "g3 is known", func() bool { return is("g3", "10.0.0.4:9080") })
}
