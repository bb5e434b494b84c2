package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func ownerOptions(c *clientv3.Client, id, instance string) OwnerOptions {
	return OwnerOptions{Client: c, GatewayID: id, Instance: instance, LeaseTTL: leaseTTL, Logger: nop()}
}

// acquire takes the topic, which nobody may hold.
func acquire(t *testing.T, c *clientv3.Client, id, instance string) *Owner {
	t.Helper()
	w := NewOwner(ownerOptions(c, id, instance))
	if err := w.Acquire(within(t), func(err error) { t.Errorf("waits: %v", err) }); err != nil {
		t.Fatal(err)
	}
	return w
}

// runOwner runs w and returns where its error goes.
func runOwner(t *testing.T, w *Owner) (ended <-chan error, stop func()) {
	t.Helper()
	errs := make(chan error, 1)
	return errs, background(t, func(ctx context.Context) { errs <- w.Run(ctx) })
}

func entryOf(t *testing.T, c *clientv3.Client, id string) (entry topicEntry) {
	t.Helper()
	value, lease := get(t, c, "im-gateway-topics/"+id)
	if lease != 0 {
		t.Error("the topic's entry has a lease")
	}
	if err := json.Unmarshal([]byte(value), &entry); err != nil {
		t.Fatalf("%q: %v", value, err)
	}
	return entry
}

func TestOwnerKeys(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	c := connect(t, e)
	for i, random := range []bool{false, true, false} {
		o := ownerOptions(c, "g1", fmt.Sprint("p", i))
		o.Random = random
		w := NewOwner(o)
		if err := w.Acquire(within(t), func(err error) { t.Errorf("waits: %v", err) }); err != nil {
			t.Fatal(err)
		}
		kind := map[bool]string{false: "configured", true: "random"}[random]
		if got, want := entryOf(t, c, "g1"), (topicEntry{kind, int64(i + 1), o.Instance}); got != want {
			t.Errorf("entry %+v, want %+v", got, want)
		}
		holder, lease := get(t, c, "im-gateway-owners/g1")
		if holder != o.Instance || lease == 0 {
			t.Errorf("owner %q, lease %x", holder, lease)
		}
		if err := w.Check(within(t)); err != nil {
			t.Error(err)
		}
		_, stop := runOwner(t, w)
		stop()
		if holder, _ := get(t, c, "im-gateway-owners/g1"); holder != o.Instance {
			t.Error("the key is gone before Release")
		}
		if err := w.Release(within(t)); err != nil {
			t.Error(err)
		}
		if holder, _ := get(t, c, "im-gateway-owners/g1"); holder != "" {
			t.Errorf("still owned by %q", holder)
		}
	}
}

// TestAcquireWaitsForTheOther: the same gateway_id twice, the first alive, then gone.
func TestAcquireWaitsForTheOther(t *testing.T) {
	t.Parallel()
	for _, crash := range []bool{false, true} {
		t.Run(map[bool]string{false: "stopped", true: "crashed"}[crash], func(t *testing.T) {
			t.Parallel()
			e := startEtcd(t)
			c := connect(t, e)
			first := acquire(t, c, "g1", "p1")
			_, stop := runOwner(t, first)

			second := NewOwner(ownerOptions(c, "g1", "p2"))
			reasons := make(chan error, 1)
			done := make(chan error, 1)
			background(t, func(ctx context.Context) {
				done <- second.Acquire(ctx, func(err error) {
					select {
					case reasons <- err:
					default:
					}
				})
			})
			if err := receive(t, reasons); !errors.Is(err, ErrOwned) {
				t.Fatalf("reason %v", err)
			}
			// Beyond the lease it still waits, for the other keeps it alive.
			alive := time.After(2 * leaseTTL)
			for waiting := true; waiting; {
				select {
				case err := <-done:
					t.Fatalf("acquired beside a living owner: %v", err)
				case <-reasons:
				case <-alive:
					waiting = false
				}
			}
			stop()
			if !crash {
				if err := first.Release(within(t)); err != nil {
					t.Fatal(err)
				}
			}
			if err := receive(t, done); err != nil {
				t.Fatal(err)
			}
			if err := first.Check(within(t)); !errors.Is(err, ErrNotOwner) {
				t.Errorf("the first: %v", err)
			}
			if err := second.Check(within(t)); err != nil {
				t.Error(err)
			}
			if err := second.Release(within(t)); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAcquireEndsWithItsContext(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	c := connect(t, e)
	acquire(t, c, "g1", "p1")
	ctx, cancel := context.WithCancel(t.Context())
	err := NewOwner(ownerOptions(c, "g1", "p2")).Acquire(ctx, func(error) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

// TestAcquireByMany: one wins, the others stay out.
func TestAcquireByMany(t *testing.T) {
	t.Parallel()
	const many = 8
	e := startEtcd(t)
	c := connect(t, e)
	won := make(chan string, many)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for i := range many {
		background(t, func(context.Context) {
			w := NewOwner(ownerOptions(c, "g1", fmt.Sprint("p", i)))
			if w.Acquire(ctx, func(error) {}) == nil {
				won <- w.o.Instance
				_ = w.Run(ctx)
			}
		})
	}
	winner := receive(t, won)
	select {
	case other := <-won:
		t.Fatalf("%s beside %s", other, winner)
	case <-time.After(2 * leaseTTL):
	}
	if got := entryOf(t, c, "g1"); got.Instance != winner || got.Epoch != 1 {
		t.Errorf("entry %+v, winner %s", got, winner)
	}
}

// TestAcquireAfterALostAnswer: the key that stands is this process's own.
func TestAcquireAfterALostAnswer(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	c := connect(t, e)
	if _, err := c.Put(within(t), "im-gateway-owners/g1", "p1"); err != nil {
		t.Fatal(err)
	}
	w := acquire(t, c, "g1", "p1")
	if _, lease := get(t, c, "im-gateway-owners/g1"); lease != w.lease || lease == 0 {
		t.Errorf("lease %x, want %x", lease, w.lease)
	}
}

// TestAcquireOverGarbage: an entry that cannot be read is not counted anew.
func TestAcquireOverGarbage(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	c := connect(t, e)
	if _, err := c.Put(within(t), "im-gateway-topics/g1", "{not json"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	reason := errNever
	if err := NewOwner(ownerOptions(c, "g1", "p1")).Acquire(ctx, func(err error) { reason = err; cancel() }); err == nil {
		t.Error("acquired")
	}
	if errors.Is(reason, ErrOwned) || errors.Is(reason, errNever) {
		t.Errorf("reason %v", reason)
	}
	if holder, _ := get(t, c, "im-gateway-owners/g1"); holder != "" {
		t.Errorf("owned by %s", holder)
	}
}

// TestOwnerComesBack takes the lease away in each way.
func TestOwnerComesBack(t *testing.T) {
	t.Parallel()
	for _, tc := range outages {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			e := startEtcd(t)
			c := connect(t, e)
			w := acquire(t, c, "g1", "p1")
			metrics := prometheus.NewRegistry()
			if err := w.Register(metrics); err != nil {
				t.Fatal(err)
			}
			ended, stop := runOwner(t, w)
			_, before := get(t, c, "im-gateway-owners/g1")
			tc.do(t, e, c, "im-gateway-owners/g1")

			late := time.Now().Add(2 * leaseTTL)
			eventually(t, "the owner's key is back", func() bool {
				holder, lease := get(t, c, "im-gateway-owners/g1")
				if lease != before && lease != 0 && metric(t, metrics, "im_gateway_registry_lease_losses_total", "lease", "owner") == 0 {
					t.Error("the loss is not counted")
				}
				return holder == "p1" && (lease != before || time.Now().After(late))
			})
			eventually(t, "the lease is held", func() bool {
				return metric(t, metrics, "im_gateway_registry_lease_held", "lease", "owner") == 1
			})
			if ttl := metric(t, metrics, "im_gateway_registry_lease_ttl_seconds", "lease", "owner"); ttl != leaseTTL.Seconds() {
				t.Errorf("a TTL of %v s", ttl)
			}
			if got, want := entryOf(t, c, "g1"), (topicEntry{"configured", 1, "p1"}); got != want {
				t.Errorf("entry %+v, want %+v", got, want)
			}
			if err := w.Check(within(t)); err != nil {
				t.Error(err)
			}
			stop()
			if err := receive(t, ended); err != nil {
				t.Error(err)
			}
			if err := w.Release(within(t)); err != nil {
				t.Error(err)
			}
			if metric(t, metrics, "im_gateway_registry_lease_held", "lease", "owner") != 0 {
				t.Error("the lease is still said to be held")
			}
			if holder, _ := get(t, c, "im-gateway-owners/g1"); holder != "" {
				t.Errorf("still owned by %q", holder)
			}
		})
	}
}

// TestCheckWithoutEtcd says neither yes nor no.
func TestCheckWithoutEtcd(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	c := connect(t, e)
	w := acquire(t, c, "g1", "p1")
	e.stop()
	began := time.Now()
	if err := w.Check(within(t)); err == nil || errors.Is(err, ErrNotOwner) {
		t.Errorf("etcd away: %v", err)
	}
	if took := time.Since(began); took > readTimeout+20*time.Second {
		t.Errorf("it took %s", took)
	}
	e.wipe()
	e.start()
	eventually(t, "etcd answers", func() bool { return Reachable(within(t), c) == nil })
	if err := w.Check(within(t)); err == nil || errors.Is(err, ErrNotOwner) {
		t.Errorf("etcd empty: %v", err)
	}
}

// TestOwnerIsFenced: another process has taken the topic while the lease was lost.
func TestOwnerIsFenced(t *testing.T) {
	t.Parallel()
	for _, dataLost := range []bool{false, true} {
		t.Run(map[bool]string{false: "epoch raised", true: "epoch counted anew"}[dataLost], func(t *testing.T) {
			t.Parallel()
			e := startEtcd(t)
			c := connect(t, e)
			first := acquire(t, c, "g1", "p1")
			if dataLost {
				e.stop()
				e.wipe()
				e.start()
				eventually(t, "etcd answers", func() bool { return Reachable(within(t), c) == nil })
			} else if err := revoke(within(t), c, first.lease); err != nil {
				t.Fatal(err)
			}
			second := acquire(t, c, "g1", "p2")
			if dataLost && second.epoch != first.epoch {
				t.Fatal("the case is not what it says")
			}
			ended, _ := runOwner(t, first)
			if err := receive(t, ended); !errors.Is(err, ErrNotOwner) {
				t.Errorf("Run: %v", err)
			}
			if err := first.Check(within(t)); !errors.Is(err, ErrNotOwner) {
				t.Errorf("Check: %v", err)
			}
			if err := first.Release(within(t)); err != nil {
				t.Error(err)
			}
			if holder, _ := get(t, c, "im-gateway-owners/g1"); holder != "p2" {
				t.Errorf("owned by %q", holder)
			}
			if err := second.Check(within(t)); err != nil {
				t.Error(err)
			}
		})
	}
}
