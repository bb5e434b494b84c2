package main

import (
	"context"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
)

const (
	presenceTTL    = 90 * time.Second
	refreshPeriod  = 30 * time.Second
	presenceKey    = "user_session:"
	presenceChunk  = 500
	presenceExpiry = int(presenceTTL / time.Second)
)

// claimScript writes the session under a newer version than the stored one.
var claimScript = redis.NewScript(`
local v = tonumber(redis.call('HGET', KEYS[1], 'version') or '0') + 1
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
if v < now then v = now end
redis.call('HSET', KEYS[1], 'gateway_id', ARGV[1], 'session_id', ARGV[2], 'connected_at', ARGV[3], 'version', string.format('%.0f', v))
redis.call('EXPIRE', KEYS[1], ARGV[4])
return 1`)

// dropScript deletes the entry when it is the session's.
var dropScript = redis.NewScript(`
if redis.call('HGET', KEYS[1], 'session_id') == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0`)

type presence struct {
	rdb     *redis.Client
	gateway string
	log     *zap.Logger
}

func newPresence(ctx context.Context, addr, gateway string, log *zap.Logger) (*presence, error) {
	p := &presence{rdb: redis.NewClient(&redis.Options{Addr: addr, PoolSize: 32}), gateway: gateway, log: log}
	for _, s := range []*redis.Script{claimScript, dropScript} {
		if err := s.Load(ctx, p.rdb).Err(); err != nil {
			return nil, fmt.Errorf("load a script into Redis: %w", err)
		}
	}
	return p, nil
}

func (p *presence) claim(ctx context.Context, c *client) error {
	return claimScript.Run(ctx, p.rdb, []string{presenceKey + c.user}, p.gateway, c.session, c.connected.UnixMilli(), presenceExpiry).Err()
}

func (p *presence) drop(ctx context.Context, c *client) {
	if err := dropScript.Run(ctx, p.rdb, []string{presenceKey + c.user}, c.session).Err(); err != nil {
		p.log.Warn("presence not removed", zap.Error(err)) // it expires by itself
	}
}

// refresh goes round the hub's shards once in refreshPeriod until ctx ends.
func (p *presence) refresh(ctx context.Context, h *hub) {
	tick := time.NewTicker(refreshPeriod / hubShards)
	defer tick.Stop()
	var buf []*client
	for i := 0; ; i = (i + 1) % hubShards {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		buf = h.in(i, buf[:0])
		for start := 0; start < len(buf); start += presenceChunk {
			chunk := buf[start:min(start+presenceChunk, len(buf))]
			if err := p.refreshChunk(ctx, chunk); err != nil && ctx.Err() == nil {
				p.log.Warn("presence not refreshed", zap.Int("users", len(chunk)), zap.Error(err))
			}
		}
		clear(buf)
	}
}

// refreshChunk prolongs the entries in one round trip and claims those again that are gone.
func (p *presence) refreshChunk(ctx context.Context, chunk []*client) error {
	pipe := p.rdb.Pipeline()
	for _, c := range chunk {
		pipe.Expire(ctx, presenceKey+c.user, presenceTTL)
	}
	cmds, err := pipe.Exec(ctx)
	if err != nil {
		return err
	}
	for i, cmd := range cmds {
		if there, ok := cmd.(*redis.BoolCmd); ok && !there.Val() {
			if err := p.claim(ctx, chunk[i]); err != nil {
				return err
			}
		}
	}
	return nil
}
