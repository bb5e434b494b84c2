package registry

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"

	"im-gateway/test/ports"
)

// The tests run on embedded servers, and with the build tag `real` on the real ones.

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	// patience bounds whatever a test waits for.
	patience = 60 * time.Second
	// leaseTTL is the shortest that the servers under test grant.
	leaseTTL = time.Second
)

// eventually polls until ok, and fails the test when that takes too long.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	late := time.After(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("not in time: %s", what)
		}
	}
}

// receive returns what comes from c, and fails the test when nothing does in time.
func receive[T any](t *testing.T, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(patience):
		t.Fatal("nothing came in time")
	}
	return v
}

// within returns a context that ends with the test or after a while.
func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// freePort returns a port that nobody listens on.
func freePort(t testing.TB) int {
	t.Helper()
	n, err := ports.Number()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// background runs f until the test ends, or the returned function is called, and waits for its end.
func background(t *testing.T, f func(context.Context)) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(ctx)
	}()
	stop = func() {
		cancel()
		select {
		case <-done:
		case <-time.After(patience):
			t.Error("it has not ended in time")
		}
	}
	t.Cleanup(stop)
	return stop
}

// connect returns a client of the etcd under test.
func connect(t *testing.T, e *etcdServer) *clientv3.Client {
	t.Helper()
	c, err := Connect(EtcdOptions{Endpoints: []string{e.endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// get returns the value of a key; empty: there is none. It tries until etcd answers.
func get(t *testing.T, c *clientv3.Client, key string) (value string, lease clientv3.LeaseID) {
	t.Helper()
	eventually(t, "an answer of etcd for "+key, func() bool {
		ctx, cancel := context.WithTimeout(within(t), time.Second)
		defer cancel()
		resp, err := c.Get(ctx, key)
		if err != nil {
			return false
		}
		value, lease = "", 0
		if len(resp.Kvs) > 0 {
			value, lease = string(resp.Kvs[0].Value), clientv3.LeaseID(resp.Kvs[0].Lease)
		}
		return true
	})
	return value, lease
}

// metric returns the value of a counter or gauge, summed over what matches the label, given as
// name=value; empty: all.
func metric(t *testing.T, r prometheus.Gatherer, name, label, value string) float64 {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			match := label == ""
			for _, l := range m.GetLabel() {
				match = match || l.GetName() == label && l.GetValue() == value
			}
			if match {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

func nop() zerolog.Logger { return zerolog.Nop() }

// outages are what may happen to etcd while leases live on it.
var outages = []struct {
	name string
	do   func(t *testing.T, e *etcdServer, c *clientv3.Client, key string)
}{
	{"lease revoked", func(t *testing.T, _ *etcdServer, c *clientv3.Client, key string) {
		_, lease := get(t, c, key)
		if _, err := c.Revoke(within(t), lease); err != nil {
			t.Fatal(err)
		}
	}},
	{"restarted", func(_ *testing.T, e *etcdServer, _ *clientv3.Client, _ string) {
		e.stop()
		e.start()
	}},
	{"restarted without its data", func(_ *testing.T, e *etcdServer, _ *clientv3.Client, _ string) {
		e.stop()
		e.wipe()
		e.start()
	}},
	{"away longer than the lease", func(t *testing.T, e *etcdServer, _ *clientv3.Client, _ string) {
		e.stop()
		ctx, cancel := context.WithTimeout(t.Context(), 3*leaseTTL)
		defer cancel()
		<-ctx.Done()
		e.start()
	}},
}

var errNever = errors.New("nothing was reported")
