package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	clientv3 "go.etcd.io/etcd/client/v3"
)

var (
	// ErrNotOwner is returned by Check and Run when another process has taken the topic: this one must
	// not read it any more.
	ErrNotOwner = errors.New("another process owns this gateway's downstream topic now")
	// ErrOwned is what Acquire reports while a live process holds the topic.
	ErrOwned = errors.New("this gateway_id is in use")
)

// ownedPoll is the longest that Acquire waits before it looks whether the other owner has gone.
const ownedPoll = time.Second

// OwnerOptions configure an Owner; all but Random are required.
type OwnerOptions struct {
	Client    *clientv3.Client
	GatewayID string
	Random    bool          // the id was made at this start, nobody will come back under it
	Instance  string        // unique per process
	LeaseTTL  time.Duration // how long the owner's key outlives a crash; whole seconds, at least one
	Logger    zerolog.Logger
}

// Owner is the right to read the gateway's downstream topic. The topic's entry in etcd carries an
// epoch that every owner raises, and names the process that raised it; it has no lease. The owner's
// own key is leased: it says that the owner is alive, and keeps others out.
//
// Acquire first, then Run in a goroutine, Check from any, and Release after Run has returned.
type Owner struct {
	o        OwnerOptions
	topicKey string
	ownerKey string
	kind     string
	taker    bool // the topic is another gateway's
	state    *leaseState

	epoch int64            // set by Acquire
	lease clientv3.LeaseID // owned by Acquire, Run, Release in turn
}

// The kinds of gateway_id.
const (
	kindRandom     = "random"
	kindConfigured = "configured"
)

// topicEntry is the value of the topic's key.
type topicEntry struct {
	Kind     string `json:"kind"` // kindRandom or kindConfigured
	Epoch    int64  `json:"epoch"`
	Instance string `json:"instance"` // who raised the epoch: an etcd that lost its data counts anew
}

// ownership is what etcd holds for the topic.
type ownership struct {
	entry         topicEntry
	topicRevision int64  // 0: there is no entry
	holder        string // the process that holds the owner's key
	ownerRevision int64  // 0: nobody holds it
}

// NewOwner returns an Owner that has acquired nothing.
func NewOwner(o OwnerOptions) *Owner {
	w := &Owner{
		o: o, topicKey: topicPrefix + o.GatewayID, ownerKey: ownerPrefix + o.GatewayID,
		kind: kindConfigured, state: newLeaseState("owner", o.LeaseTTL),
	}
	if o.Random {
		w.kind = kindRandom
	}
	return w
}

// Register registers the metrics of the owner's lease.
func (w *Owner) Register(r prometheus.Registerer) error { return w.state.register(r) }

// Acquire takes the ownership, in one transaction that raises the epoch. While etcd does not answer,
// or another process holds the owner's key (a predecessor that crashed does so for its lease), it
// waits and calls waiting with the reason, ErrOwned in the latter case. It returns when it has the
// ownership, or with an error when ctx ends.
func (w *Owner) Acquire(ctx context.Context, waiting func(error)) error {
	retry := retryPolicy()
	for {
		err := w.take(ctx)
		if err == nil {
			w.o.Logger.Info().Str("key", w.ownerKey).Int64("epoch", w.epoch).Msg("owns the downstream topic")
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("take the downstream topic: %w", context.Cause(ctx))
		}
		waiting(err)
		d := retry.NextBackOff()
		if errors.Is(err, ErrOwned) {
			d = min(d, ownedPoll)
		}
		pause(ctx, d)
	}
}

func (w *Owner) take(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, etcdTimeout)
	defer cancel()
	now, err := w.read(ctx)
	if err != nil {
		return err
	}
	// The key may be our own: of an attempt whose answer was lost. A taker gives way.
	if now.ownerRevision != 0 && now.holder != w.o.Instance && !strings.HasPrefix(now.holder, takerMark) {
		return fmt.Errorf("%w: gateway_id %s is held by %s, which must stop or crash (its lease is then gone within %s), "+
			"or this gateway needs another gateway_id", ErrOwned, w.o.GatewayID, now.holder, w.o.LeaseTTL)
	}
	epoch := now.entry.Epoch + 1
	if err := w.put(ctx, now, epoch); err != nil {
		return err
	}
	w.epoch = epoch
	return nil
}

// read returns what stands now. A topic's entry that cannot be read is an error: to count anew over
// it would undo the fencing.
func (w *Owner) read(ctx context.Context) (now ownership, err error) {
	resp, err := w.o.Client.Txn(ctx).Then(clientv3.OpGet(w.topicKey), clientv3.OpGet(w.ownerKey)).Commit()
	if err != nil {
		return now, fmt.Errorf("read %s: %w", w.topicKey, err)
	}
	for _, kv := range resp.Responses[0].GetResponseRange().Kvs {
		if err := json.Unmarshal(kv.Value, &now.entry); err != nil {
			return now, fmt.Errorf("read %s: %w", w.topicKey, err)
		}
		now.topicRevision = kv.ModRevision
	}
	for _, kv := range resp.Responses[1].GetResponseRange().Kvs {
		now.holder, now.ownerRevision = string(kv.Value), kv.ModRevision
	}
	return now, nil
}

// put writes both keys, the owner's under a new lease, unless something has changed since now.
func (w *Owner) put(ctx context.Context, now ownership, epoch int64) error {
	holder := w.o.Instance
	if w.taker {
		holder = takerMark + holder
	}
	value, err := json.Marshal(topicEntry{Kind: w.kind, Epoch: epoch, Instance: w.o.Instance})
	if err != nil {
		return fmt.Errorf("write %s: %w", w.topicKey, err)
	}
	lease, err := grant(ctx, w.o.Client, w.o.LeaseTTL, func(ctx context.Context, lease clientv3.LeaseID) error {
		resp, err := w.o.Client.Txn(ctx).
			If(clientv3.Compare(clientv3.ModRevision(w.topicKey), "=", now.topicRevision),
				clientv3.Compare(clientv3.ModRevision(w.ownerKey), "=", now.ownerRevision)).
			Then(clientv3.OpPut(w.topicKey, string(value)),
				clientv3.OpPut(w.ownerKey, holder, clientv3.WithLease(lease))).
			Commit()
		if err == nil && !resp.Succeeded {
			err = errors.New("it changed meanwhile")
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("write %s: %w", w.ownerKey, err)
	}
	w.lease = lease
	w.state.confirm()
	return nil
}

// Lapsed tells whether etcd has not confirmed the ownership for so long that somebody else may have taken
// the topic: the process was stopped, or etcd is away. Any goroutine may call it.
func (w *Owner) Lapsed() bool {
	return w.state.age() > w.o.LeaseTTL
}

// mine returns nil when what stands is this process's: the last to take the topic.
func (w *Owner) mine(now ownership) error {
	if now.topicRevision != 0 && (now.entry.Epoch != w.epoch || now.entry.Instance != w.o.Instance) {
		return fmt.Errorf("%w: epoch %d of %s, ours was %d", ErrNotOwner, now.entry.Epoch, now.entry.Instance, w.epoch)
	}
	return nil
}

// Check asks etcd whether the topic is still this process's, after Acquire. It returns nil when it is,
// ErrNotOwner when another has taken it, and another error when etcd does not say: then ask again
// before reading the topic.
func (w *Owner) Check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	now, err := w.read(ctx)
	if err != nil {
		return err
	}
	if now.topicRevision == 0 {
		return fmt.Errorf("%s is gone: etcd has lost its data and Run has not put it back yet", w.topicKey)
	}
	return w.mine(now)
}

// Run keeps the owner's key alive, after Acquire, until ctx ends. A lost lease is granted anew as
// long as the topic is this process's; when it is not, Run returns ErrNotOwner. It does not give the
// key up: Release does.
func (w *Owner) Run(ctx context.Context) error {
	for {
		err := keep(ctx, w.o.Client, w.lease, w.state.confirm)
		if err == nil {
			return nil
		}
		w.state.lost()
		w.o.Logger.Warn().Err(err).Str("key", w.ownerKey).Msg("owner's lease lost")
		retry := retryPolicy()
		for {
			err := w.again(ctx)
			if err == nil {
				w.o.Logger.Info().Str("key", w.ownerKey).Int64("epoch", w.epoch).Msg("owner's key is back")
				break
			}
			if errors.Is(err, ErrNotOwner) {
				return err
			}
			if ctx.Err() != nil {
				return nil
			}
			w.o.Logger.Warn().Err(err).Str("key", w.ownerKey).Msg("owner's key not put back, trying again")
			pause(ctx, retry.NextBackOff())
		}
	}
}

// again puts the owner's key back, and the topic's entry with it: an etcd that lost its data has none.
func (w *Owner) again(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, etcdTimeout)
	defer cancel()
	now, err := w.read(ctx)
	if err != nil {
		return err
	}
	if err := w.mine(now); err != nil {
		return err
	}
	return w.put(ctx, now, w.epoch)
}

// Release gives the owner's key up, and nobody else's. Call it last, after Run has returned; when it
// fails, the key goes with its lease.
func (w *Owner) Release(ctx context.Context) error {
	if err := revoke(ctx, w.o.Client, w.lease); err != nil {
		return fmt.Errorf("give %s up: %w", w.ownerKey, err)
	}
	w.state.over()
	w.o.Logger.Info().Str("key", w.ownerKey).Msg("gave the downstream topic up")
	return nil
}
