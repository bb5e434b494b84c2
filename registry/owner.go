package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/rs/zerolog"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// ErrNotOwner is returned by Check when another process has raised the topic's epoch: this one must
// not read the topic any more.
var ErrNotOwner = errors.New("another process owns this gateway's downstream topic now")

// OwnerOptions configure an Owner.
type OwnerOptions struct {
	Client    *clientv3.Client
	GatewayID string
	Random    bool   // the id was made at this start, nobody will come back under it
	Instance  string // unique per process
	LeaseTTL  time.Duration
	Logger    zerolog.Logger
}

// Owner is the right to read the gateway's downstream topic. The topic's entry in etcd carries an
// epoch that every owner raises; the owner's own key is leased and names the process.
type Owner struct {
	o        OwnerOptions
	topicKey string
	ownerKey string
	epoch    int64
	lease    clientv3.LeaseID
}

// topicEntry is the value of the topic's key.
type topicEntry struct {
	Kind  string `json:"kind"` // random or configured
	Epoch int64  `json:"epoch"`
}

// NewOwner returns an Owner that has acquired nothing.
func NewOwner(o OwnerOptions) *Owner {
	return &Owner{o: o, topicKey: topicPrefix + o.GatewayID, ownerKey: ownerPrefix + o.GatewayID}
}

// Acquire takes the ownership, in one transaction. While another process holds the key it waits: a
// predecessor that crashed loses its lease; waiting is called with the reason each time.
func (w *Owner) Acquire(ctx context.Context, waiting func(error)) error {
	retry := retryPolicy()
	for {
		err := w.try(ctx)
		if err == nil {
			w.o.Logger.Info().Str("key", w.ownerKey).Int64("epoch", w.epoch).Msg("owns the downstream topic")
			return nil
		}
		waiting(err)
		if !pause(ctx, retry.NextBackOff()) {
			return context.Cause(ctx)
		}
	}
}

func (w *Owner) try(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	entry, revision, err := w.read(ctx)
	if err != nil {
		return err
	}
	entry.Epoch++
	entry.Kind = "configured"
	if w.o.Random {
		entry.Kind = "random"
	}
	value, err := json.Marshal(entry)
	if err != nil {
		return fmt.Errorf("topic entry: %w", err)
	}
	grant, err := w.o.Client.Grant(ctx, leaseSeconds(w.o.LeaseTTL))
	if err != nil {
		return fmt.Errorf("grant the owner's lease: %w", err)
	}
	resp, err := w.o.Client.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(w.topicKey), "=", revision),
			clientv3.Compare(clientv3.CreateRevision(w.ownerKey), "=", 0)).
		Then(clientv3.OpPut(w.topicKey, string(value)),
			clientv3.OpPut(w.ownerKey, w.o.Instance, clientv3.WithLease(grant.ID))).
		Else(clientv3.OpGet(w.ownerKey)).
		Commit()
	if err == nil && resp.Succeeded {
		w.epoch, w.lease = entry.Epoch, grant.ID
		return nil
	}
	if rerr := revoke(ctx, w.o.Client, grant.ID); rerr != nil {
		w.o.Logger.Debug().Err(rerr).Msg("unused lease left to expire")
	}
	if err != nil {
		return fmt.Errorf("take %s: %w", w.ownerKey, err)
	}
	holder := "another process"
	if kvs := resp.Responses[0].GetResponseRange().Kvs; len(kvs) > 0 {
		holder = string(kvs[0].Value)
	}
	return fmt.Errorf("gateway_id %s is in use by %s: it must stop, or lose its lease of %s, or this one needs another gateway_id",
		w.o.GatewayID, holder, w.o.LeaseTTL)
}

// read returns the topic's entry and its revision, 0 when there is none.
func (w *Owner) read(ctx context.Context) (e topicEntry, revision int64, err error) {
	resp, err := w.o.Client.Get(ctx, w.topicKey)
	if err != nil {
		return e, 0, fmt.Errorf("read %s: %w", w.topicKey, err)
	}
	if len(resp.Kvs) == 0 {
		return e, 0, nil
	}
	if err := json.Unmarshal(resp.Kvs[0].Value, &e); err != nil {
		return e, 0, fmt.Errorf("read %s: %w", w.topicKey, err)
	}
	return e, resp.Kvs[0].ModRevision, nil
}

// Check returns nil while the epoch is still this process's, ErrNotOwner when it is not, and another
// error when etcd does not say.
func (w *Owner) Check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	entry, _, err := w.read(ctx)
	if err != nil {
		return err
	}
	if entry.Epoch != w.epoch {
		return fmt.Errorf("%w: epoch %d, ours was %d", ErrNotOwner, entry.Epoch, w.epoch)
	}
	return nil
}

// Run keeps the owner's key alive, after Acquire, until ctx ends. A lost lease is granted anew as
// long as the epoch is ours; when it is not, Run returns ErrNotOwner. It does not give the key up:
// Release does.
func (w *Owner) Run(ctx context.Context) error {
	retry := retryPolicy()
	lease := w.lease
	for ctx.Err() == nil {
		alive, err := w.o.Client.KeepAlive(ctx, lease)
		if err == nil {
			for range alive {
				retry.Reset()
			}
			err = errLeaseLost
		}
		if ctx.Err() != nil {
			break
		}
		w.o.Logger.Warn().Err(err).Str("key", w.ownerKey).Msg("owner's lease lost, checking the epoch")
		for {
			if lease, err = w.again(ctx); err == nil {
				w.o.Logger.Info().Str("key", w.ownerKey).Msg("owner's key is back")
				break
			}
			if errors.Is(err, ErrNotOwner) {
				return err
			}
			if !pause(ctx, retry.NextBackOff()) {
				return nil
			}
		}
	}
	return nil
}

// again puts the owner's key back under a new lease, in a transaction that holds the epoch.
func (w *Owner) again(ctx context.Context) (clientv3.LeaseID, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	entry, revision, err := w.read(ctx)
	if err != nil {
		return 0, err
	}
	if revision != 0 && entry.Epoch != w.epoch {
		return 0, fmt.Errorf("%w: epoch %d, ours was %d", ErrNotOwner, entry.Epoch, w.epoch)
	}
	kind := "configured"
	if w.o.Random {
		kind = "random"
	}
	value, err := json.Marshal(topicEntry{Kind: kind, Epoch: w.epoch})
	if err != nil {
		return 0, fmt.Errorf("topic entry: %w", err)
	}
	grant, err := w.o.Client.Grant(ctx, leaseSeconds(w.o.LeaseTTL))
	if err != nil {
		return 0, fmt.Errorf("grant the owner's lease: %w", err)
	}
	// The topic's entry is put again: an etcd that lost its data has none.
	resp, err := w.o.Client.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(w.topicKey), "=", revision)).
		Then(clientv3.OpPut(w.topicKey, string(value)),
			clientv3.OpPut(w.ownerKey, w.o.Instance, clientv3.WithLease(grant.ID))).
		Commit()
	switch {
	case err != nil:
		return 0, fmt.Errorf("put %s back: %w", w.ownerKey, err)
	case !resp.Succeeded:
		return 0, fmt.Errorf("put %s back: the topic's entry changed meanwhile", w.ownerKey)
	}
	w.lease = grant.ID
	return grant.ID, nil
}

// Release gives the owner's key up. Call it last, after Run has returned.
func (w *Owner) Release(ctx context.Context) error { return revoke(ctx, w.o.Client, w.lease) }
