package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/rs/zerolog"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// resyncEvery is how often a follower reads everything anew. An etcd that lost its data counts its
// revisions from 1 again, and a watch that waits for a later one would not notice anything.
const resyncEvery = 30 * time.Second

// follower follows the entries under a name, endpoints above all. Its fields are immutable.
type follower struct {
	client *clientv3.Client
	name   string
	resync time.Duration
	log    zerolog.Logger
	value  func([]byte) (string, error) // reads an entry; nil: endpointAddr
	// changed is called with the address of each endpoint by the last part of its key, after every
	// reading and every change. The map is its own to keep.
	changed func(map[string]string)
	// failed is called when etcd does not answer.
	failed func(error)
}

// run follows until ctx ends.
func (f *follower) run(ctx context.Context) {
	retry := retryPolicy()
	trouble := false
	for ctx.Err() == nil {
		err := f.once(ctx, func() {
			retry.Reset()
			if trouble {
				trouble = false
				f.log.Info().Str("name", f.name).Msg("following the endpoints in etcd again")
			}
		})
		if err == nil || ctx.Err() != nil {
			continue
		}
		if !trouble {
			trouble = true
			f.log.Warn().Err(err).Str("name", f.name).Msg("endpoints in etcd cannot be followed, keeping what is known")
		}
		f.failed(fmt.Errorf("find %s in etcd: %w", f.name, err))
		pause(ctx, retry.NextBackOff())
	}
}

// once reads everything and follows the changes until it is time to read anew.
func (f *follower) once(ctx context.Context, answered func()) error {
	prefix := f.name + "/"
	all, revision, err := f.read(ctx, prefix)
	if err != nil {
		return err
	}
	answered()
	f.changed(maps.Clone(all))

	// A member cut off from its cluster must say so rather than be silent.
	watchCtx, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), f.resync)
	defer cancel()
	for w := range f.client.Watch(watchCtx, prefix, clientv3.WithPrefix(), clientv3.WithRev(revision+1)) {
		if err := w.Err(); err != nil {
			if watchCtx.Err() != nil {
				return nil
			}
			return fmt.Errorf("watch: %w", err)
		}
		for _, e := range w.Events {
			f.apply(all, prefix, string(e.Kv.Key), e.Kv.Value, e.Type == clientv3.EventTypeDelete)
		}
		f.changed(maps.Clone(all))
	}
	if watchCtx.Err() == nil {
		return errors.New("the watch ended")
	}
	return nil
}

func (f *follower) read(ctx context.Context, prefix string) (all map[string]string, revision int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	resp, err := f.client.Get(ctx, prefix, clientv3.WithPrefix())
	if err != nil {
		return nil, 0, err
	}
	all = make(map[string]string, len(resp.Kvs))
	for _, kv := range resp.Kvs {
		f.apply(all, prefix, string(kv.Key), kv.Value, false)
	}
	return all, resp.Header.Revision, nil
}

func (f *follower) apply(all map[string]string, prefix, key string, value []byte, deleted bool) {
	id := strings.TrimPrefix(key, prefix)
	if deleted {
		delete(all, id)
		return
	}
	read := f.value
	if read == nil {
		read = endpointAddr
	}
	addr, err := read(value)
	if err != nil {
		// Somebody else's mistake must not hide the other endpoints.
		f.log.Warn().Err(err).Str("key", key).Msg("entry in etcd left out")
		delete(all, id)
		return
	}
	all[id] = addr
}

// endpointAddr reads an entry of naming/endpoints.
func endpointAddr(value []byte) (string, error) {
	var entry struct {
		Addr string `json:"Addr"`
	}
	if err := json.Unmarshal(value, &entry); err != nil {
		return "", fmt.Errorf("read an endpoint: %w", err)
	}
	if entry.Addr == "" {
		return "", errors.New("read an endpoint: it has no address")
	}
	return entry.Addr, nil
}
