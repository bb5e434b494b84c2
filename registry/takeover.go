package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// takerMark begins the value of an owner's key that is held in a dead gateway's stead: the gateway takes
// its topic back when it returns.
const takerMark = "taker:"

// ErrNoOrphan is returned by TakeOver when the topic has an owner again, or is gone.
var ErrNoOrphan = errors.New("the topic has an owner")

// Orphan is a downstream topic that nobody owns.
type Orphan struct {
	GatewayID string
	Random    bool  // nobody will come back under the id
	Revision  int64 // of the topic's entry in etcd: it rises with each owner
}

// Orphans lists the topics in etcd whose owner's key is not there.
func Orphans(ctx context.Context, c *clientv3.Client) ([]Orphan, error) {
	ctx, cancel := context.WithTimeout(ctx, etcdTimeout)
	defer cancel()
	resp, err := c.Txn(ctx).Then(
		clientv3.OpGet(topicPrefix, clientv3.WithPrefix()),
		clientv3.OpGet(ownerPrefix, clientv3.WithPrefix(), clientv3.WithKeysOnly()),
	).Commit()
	if err != nil {
		return nil, fmt.Errorf("list the downstream topics: %w", err)
	}
	owned := map[string]bool{}
	for _, kv := range resp.Responses[1].GetResponseRange().Kvs {
		owned[strings.TrimPrefix(string(kv.Key), ownerPrefix)] = true
	}
	var orphans []Orphan
	for _, kv := range resp.Responses[0].GetResponseRange().Kvs {
		id := strings.TrimPrefix(string(kv.Key), topicPrefix)
		var entry topicEntry
		if owned[id] || json.Unmarshal(kv.Value, &entry) != nil { // one that cannot be read is left alone
			continue
		}
		orphans = append(orphans, Orphan{GatewayID: id, Random: entry.Kind == kindRandom, Revision: kv.ModRevision})
	}
	return orphans, nil
}

// TakeOver takes the ownership of an orphan, in one transaction that raises the epoch and that only one
// of several gateways wins. ErrNoOrphan: it is not one any more. After it, Run, Check and Release are as
// after Acquire.
func (w *Owner) TakeOver(ctx context.Context, o Orphan) error {
	ctx, cancel := context.WithTimeout(ctx, etcdTimeout)
	defer cancel()
	now, err := w.read(ctx)
	if err != nil {
		return err
	}
	if now.ownerRevision != 0 || now.topicRevision != o.Revision {
		return ErrNoOrphan
	}
	w.kind, w.taker = now.entry.Kind, true
	epoch := now.entry.Epoch + 1
	if err := w.put(ctx, now, epoch); err != nil {
		return err
	}
	w.epoch = epoch
	w.o.Logger.Info().Str("key", w.ownerKey).Int64("epoch", epoch).Msg("took a dead gateway's downstream topic over")
	return nil
}

// Remove deletes the topic's entry with the owner's key, after its topic is gone; ErrNotOwner when another
// process has taken it meanwhile. Release is not needed after it.
func (w *Owner) Remove(ctx context.Context) error {
	opCtx, cancel := context.WithTimeout(ctx, etcdTimeout)
	defer cancel()
	now, err := w.read(opCtx)
	if err != nil {
		return err
	}
	if err := w.mine(now); err != nil {
		return err
	}
	resp, err := w.o.Client.Txn(opCtx).
		If(clientv3.Compare(clientv3.ModRevision(w.topicKey), "=", now.topicRevision)).
		Then(clientv3.OpDelete(w.topicKey)).
		Commit()
	if err != nil {
		return fmt.Errorf("delete %s: %w", w.topicKey, err)
	}
	if !resp.Succeeded {
		return fmt.Errorf("delete %s: %w", w.topicKey, ErrNotOwner)
	}
	return w.Release(ctx)
}
