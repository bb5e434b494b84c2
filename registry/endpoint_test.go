package registry

import (
	"context"
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func newRegistration(t *testing.T, c *clientv3.Client, id, addr string) (*Registration, *prometheus.Registry) {
	t.Helper()
	metrics := prometheus.NewRegistry()
	r, err := NewRegistration(RegistrationOptions{
		Client: c, LeaseTTL: leaseTTL, Logger: nop(), Registerer: metrics,
		Endpoint: Endpoint{GatewayID: id, GRPCAddr: addr, HTTPAddr: "10.0.0.1:8080", Version: "v1", StartedAt: 1760000000000},
	})
	if err != nil {
		t.Fatal(err)
	}
	return r, metrics
}

func registered(t *testing.T, r *Registration) {
	t.Helper()
	select {
	case <-r.Registered():
	case <-time.After(patience):
		t.Fatal("not registered in time")
	}
}

func TestNewRegistrationRefuses(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	c := connect(t, e)
	good := RegistrationOptions{
		Client: c, LeaseTTL: leaseTTL, Registerer: prometheus.NewRegistry(), Endpoint: Endpoint{GatewayID: "g", GRPCAddr: "a:1"},
	}
	for name, spoil := range map[string]func(*RegistrationOptions){
		"no client":     func(o *RegistrationOptions) { o.Client = nil },
		"no gateway_id": func(o *RegistrationOptions) { o.Endpoint.GatewayID = "" },
		"no address":    func(o *RegistrationOptions) { o.Endpoint.GRPCAddr = "" },
		"short lease":   func(o *RegistrationOptions) { o.LeaseTTL = time.Millisecond },
		"no registerer": func(o *RegistrationOptions) { o.Registerer = nil },
	} {
		o := good
		spoil(&o)
		if _, err := NewRegistration(o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestRegistrationEntry reads the entry as others do.
func TestRegistrationEntry(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	c := connect(t, e)
	r, metrics := newRegistration(t, c, "g1", "10.0.0.1:9080")
	background(t, r.Run)
	registered(t, r)

	value, lease := get(t, c, "im-gateway/g1")
	if lease == 0 {
		t.Error("the entry has no lease")
	}
	var entry struct {
		Addr     string
		Metadata string // one string, no object
	}
	if err := json.Unmarshal([]byte(value), &entry); err != nil {
		t.Fatalf("%s: %v", value, err)
	}
	want := `{"http":"10.0.0.1:8080","version":"v1","started_at":1760000000000}`
	if entry.Addr != "10.0.0.1:9080" || entry.Metadata != want {
		t.Errorf("entry %s", value)
	}
	if metric(t, metrics, "im_gateway_registry_registered", "", "") != 1 {
		t.Error("the gauge does not say registered")
	}
	if metric(t, metrics, "im_gateway_registry_lease_held", "lease", "endpoint") != 1 {
		t.Error("the lease is not said to be held")
	}

	if err := r.Deregister(within(t)); err != nil {
		t.Error(err)
	}
	if value, _ := get(t, c, "im-gateway/g1"); value != "" {
		t.Errorf("still there: %s", value)
	}
	if metric(t, metrics, "im_gateway_registry_registered", "", "") != 0 {
		t.Error("the gauge says registered")
	}
	if metric(t, metrics, "im_gateway_registry_lease_held", "lease", "endpoint") != 0 {
		t.Error("the lease is still said to be held")
	}
	if n := metric(t, metrics, "im_gateway_registry_lease_losses_total", "", ""); n != 0 {
		t.Errorf("%v lease losses counted", n)
	}
	if err := r.Deregister(within(t)); err != nil {
		t.Error("a second time:", err)
	}
}

func TestRegistrationLeavesWithItsContext(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	c := connect(t, e)
	r, _ := newRegistration(t, c, "g1", "10.0.0.1:9080")
	stop := background(t, r.Run)
	registered(t, r)
	stop()
	if value, _ := get(t, c, "im-gateway/g1"); value != "" {
		t.Errorf("still there: %s", value)
	}
}

func TestDeregisterBeforeRun(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	c := connect(t, e)
	r, _ := newRegistration(t, c, "g1", "10.0.0.1:9080")
	if err := r.Deregister(within(t)); err != nil {
		t.Error(err)
	}
	r.Run(within(t)) // returns at once
	if value, _ := get(t, c, "im-gateway/g1"); value != "" {
		t.Errorf("registered after all: %s", value)
	}
}

// TestRegistrationComesBack takes the lease away in each way.
func TestRegistrationComesBack(t *testing.T) {
	t.Parallel()
	for _, tc := range outages {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			e := startEtcd(t)
			c := connect(t, e)
			r, metrics := newRegistration(t, c, "g1", "10.0.0.1:9080")
			background(t, r.Run)
			registered(t, r)
			_, before := get(t, c, "im-gateway/g1")
			tc.do(t, e, c, "im-gateway/g1")

			// The entry must outlive the lease that it had, or be there under a new one.
			late := time.Now().Add(2 * leaseTTL)
			var lease clientv3.LeaseID
			eventually(t, "the endpoint is back", func() bool {
				var value string
				value, lease = get(t, c, "im-gateway/g1")
				return value != "" && (lease != before || time.Now().After(late))
			})
			if lease != before {
				eventually(t, "the loss is counted", func() bool {
					return metric(t, metrics, "im_gateway_registry_lease_losses_total", "lease", "endpoint") >= 1
				})
			}
			eventually(t, "the gauge says registered", func() bool {
				return metric(t, metrics, "im_gateway_registry_registered", "", "") == 1
			})
			if err := r.Deregister(within(t)); err != nil {
				t.Error(err)
			}
			if value, _ := get(t, c, "im-gateway/g1"); value != "" {
				t.Errorf("still there: %s", value)
			}
		})
	}
}

// TestRegistrationWaitsForEtcd starts before etcd does.
func TestRegistrationWaitsForEtcd(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	e.stop()
	c := connect(t, e)
	r, _ := newRegistration(t, c, "g1", "10.0.0.1:9080")
	background(t, r.Run)
	e.start()
	registered(t, r)
}

// TestDeregisterWithoutEtcd must not hold a drain up.
func TestDeregisterWithoutEtcd(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	c := connect(t, e)
	r, _ := newRegistration(t, c, "g1", "10.0.0.1:9080")
	background(t, r.Run)
	registered(t, r)
	e.stop()
	began := time.Now()
	if err := r.Deregister(within(t)); err == nil {
		t.Error("no error")
	}
	if took := time.Since(began); took > revokeTimeout+20*time.Second {
		t.Errorf("it took %s", took)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errNever)
	if err := r.Deregister(ctx); err == nil {
		t.Error("no error with a context that has ended")
	}
}

// TestDeregisterKeepsASuccessorsEntry: whoever has taken the id over must stay registered.
func TestDeregisterKeepsASuccessorsEntry(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	c := connect(t, e)
	old, _ := newRegistration(t, c, "g1", "10.0.0.1:9080")
	background(t, old.Run)
	registered(t, old)
	next, _ := newRegistration(t, c, "g1", "10.0.0.2:9080")
	background(t, next.Run)
	registered(t, next)
	if err := old.Deregister(within(t)); err != nil {
		t.Fatal(err)
	}
	if addr, err := GatewayAddr(within(t), c, "g1"); err != nil || addr != "10.0.0.2:9080" {
		t.Errorf("address %q, error %v", addr, err)
	}
}

// TestEtcdLogin runs everything as a user with rights on the gateway's keys only.
func TestEtcdLogin(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	admin := connect(t, e)
	ctx := within(t)
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(admin.RoleAdd(ctx, "root"))
	must(admin.UserAdd(ctx, "root", "rootpw"))
	must(admin.UserGrantRole(ctx, "root", "root"))
	must(admin.RoleAdd(ctx, "gateway"))
	must(admin.RoleGrantPermission(ctx, "gateway", "im-gateway", clientv3.GetPrefixRangeEnd("im-gateway"),
		clientv3.PermissionType(clientv3.PermReadWrite)))
	must(admin.UserAdd(ctx, "im", "secret"))
	must(admin.UserGrantRole(ctx, "im", "gateway"))
	must(admin.AuthEnable(ctx))

	if _, err := Connect(EtcdOptions{Endpoints: []string{e.endpoint()}, Username: "im", Password: "wrong"}); err == nil {
		t.Error("let in with a wrong password")
	}
	if err := Reachable(ctx, admin); err == nil {
		t.Error("read without a login")
	}
	c, err := Connect(EtcdOptions{Endpoints: []string{e.endpoint()}, Username: "im", Password: "secret", DialTimeout: patience})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	must(nil, Reachable(ctx, c))
	w := NewOwner(ownerOptions(c, "g1", "p1"))
	must(nil, w.Acquire(ctx, func(err error) { t.Error(err) }))
	r, metrics := newRegistration(t, c, "g1", "10.0.0.1:9080")
	background(t, r.Run)
	registered(t, r)

	// A restart makes the login's token invalid.
	e.stop()
	e.start()
	eventually(t, "etcd lets the client in again", func() bool { return Reachable(within(t), c) == nil })
	addr := ""
	late := time.Now().Add(3 * leaseTTL)
	eventually(t, "the endpoint stays", func() bool {
		a, err := GatewayAddr(within(t), c, "g1")
		if err != nil && !errors.Is(err, ErrUnknownGateway) {
			return false
		}
		addr = a
		return addr != "" && time.Now().After(late)
	})
	if metric(t, metrics, "im_gateway_registry_registered", "", "") != 1 {
		t.Error("the gauge does not say registered")
	}
	must(nil, r.Deregister(within(t)))
	must(nil, w.Release(within(t)))
}
