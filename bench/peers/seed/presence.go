package main

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/redis/rueidis"
	"go.uber.org/zap"
)

const (
	presenceTTL    = 90 * time.Second
	refreshPeriod  = 30 * time.Second
	presenceKey    = "user_session:"
	presenceChunk  = 500
	presenceExpiry = "90" // s
)

// claimScript writes the session under a newer version than the stored one.
var claimScript = rueidis.NewLuaScript(`
local v = tonumber(redis.call('HGET', KEYS[1], 'version') or '0') + 1
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
if v < now then v = now end
redis.call('HSET', KEYS[1], 'gateway_id', ARGV[1], 'session_id', ARGV[2], 'connected_at', ARGV[3], 'version', string.format('%.0f', v))
redis.call('EXPIRE', KEYS[1], ARGV[4])
return 1`)

// dropScript deletes the entry when it is the session's.
var dropScript = rueidis.NewLuaScript(`
if redis.call('HGET', KEYS[1], 'session_id') == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0`)

// presence shares few Redis connections: rueidis pipelines what concurrent callers send.
type presence struct {
	rdb     rueidis.Client
	gateway string
	log     *zap.Logger
}

func newPresence(addr, gateway string, log *zap.Logger) (*presence, error) {
	rdb, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{addr}, DisableCache: true, AlwaysPipelining: true, PipelineMultiplex: 1})
	if err != nil {
		return nil, fmt.Errorf("connect to Redis: %w", err)
	}
	return &presence{rdb: rdb, gateway: gateway, log: log}, nil
}

func (p *presence) claim(ctx context.Context, c *client) error {
	return claimScript.Exec(ctx, p.rdb, []string{presenceKey + c.user}, []string{
		p.gateway, c.session, strconv.FormatInt(c.connected.UnixMilli(), 10), presenceExpiry,
	}).Error()
}

func (p *presence) drop(ctx context.Context, c *client) {
	if err := dropScript.Exec(ctx, p.rdb, []string{presenceKey + c.user}, []string{c.session}).Error(); err != nil {
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
	cmds := make(rueidis.Commands, len(chunk))
	for i, c := range chunk {
		cmds[i] = p.rdb.B().Expire().Key(presenceKey + c.user).Seconds(int64(presenceTTL / time.Second)).Build()
	}
	for i, res := range p.rdb.DoMulti(ctx, cmds...) {
		there, err := res.AsBool()
		if err == nil && !there {
			err = p.claim(ctx, chunk[i])
		}
		if err != nil {
			return err
		}
	}
	return nil
}
