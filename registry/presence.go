package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/rueidis"
)

// presenceChunk is how many operations go to Redis in one pipeline: enough to save round trips, few
// enough that Redis, which runs a pipeline's scripts in one go, is never held for long.
const presenceChunk = 500

// The scripts. KEYS[1] is the user's entry; the first arguments are gateway, session and TTL in ms.
//
// claim takes a version above any that was there, at least Redis' own clock in microseconds, so that
// versions also rise across a loss of the data, and returns it with the previous gateway and session.
const claimScript = `
local prev = redis.call('HMGET', KEYS[1], 'gateway_id', 'session_id', 'version')
local t = redis.call('TIME')
local version = t[1] * 1000000 + t[2]
if prev[3] and tonumber(prev[3]) >= version then version = tonumber(prev[3]) + 1 end
local text = string.format('%.0f', version)
redis.call('HSET', KEYS[1], 'gateway_id', ARGV[1], 'session_id', ARGV[2], 'connected_at', ARGV[4], 'version', text)
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {text, prev[1] or '', prev[2] or ''}`

// refresh writes the entry again where it is missing or older, extends it where it is the caller's, and
// returns 1; 0 where a newer one stands.
const refreshScript = `
local prev = redis.call('HMGET', KEYS[1], 'session_id', 'version')
if prev[2] then
  local stored, mine = tonumber(prev[2]), tonumber(ARGV[5])
  if stored > mine or (stored == mine and prev[1] ~= ARGV[2]) then return 0 end
  if stored == mine then
    redis.call('PEXPIRE', KEYS[1], ARGV[3])
    return 1
  end
end
redis.call('HSET', KEYS[1], 'gateway_id', ARGV[1], 'session_id', ARGV[2], 'connected_at', ARGV[4], 'version', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1`

// release deletes the entry where it is the caller's.
const releaseScript = `
local prev = redis.call('HMGET', KEYS[1], 'gateway_id', 'session_id')
if prev[1] == ARGV[1] and prev[2] == ARGV[2] then return redis.call('DEL', KEYS[1]) end
return 0`

// RedisOptions say how Redis is reached.
type RedisOptions struct {
	Addrs              []string // one server, the Sentinels, or nodes of a Cluster
	Username, Password string
	SentinelMaster     string      // set: Addrs are Sentinels
	Cluster            bool        // Addrs are nodes of a Cluster
	TLS                *tls.Config // nil: none
}

// DialRedis returns a client, connected. The caller closes it.
func DialRedis(o RedisOptions) (rueidis.Client, error) {
	opt := rueidis.ClientOption{
		InitAddress:       o.Addrs,
		Username:          o.Username,
		Password:          o.Password,
		TLSConfig:         o.TLS,
		DisableCache:      true,
		ForceSingleClient: !o.Cluster && o.SentinelMaster == "",
		Dialer:            net.Dialer{Timeout: 3 * time.Second, KeepAlive: 15 * time.Second},
		ConnWriteTimeout:  5 * time.Second,
		// One pipelined connection keeps the order of a user's operations.
		PipelineMultiplex: -1,
		// What failed is tried again by the shard, with its newest state.
		DisableRetry: true,
	}
	if o.SentinelMaster != "" {
		opt.Sentinel = rueidis.SentinelOption{MasterSet: o.SentinelMaster, TLSConfig: o.TLS}
	}
	c, err := rueidis.NewClient(opt)
	if err != nil {
		return nil, fmt.Errorf("connect to Redis at %v: %w", o.Addrs, err)
	}
	return c, nil
}

// Entry is one user's presence.
type Entry struct {
	User        string
	Session     string
	ConnectedAt int64 // Unix ms
	Version     int64
}

// Claimed is the answer to a claim.
type Claimed struct {
	Version     int64
	PrevGateway string // empty: there was no entry
	PrevSession string
	Err         error
}

// Refreshed is the answer to a refresh.
type Refreshed struct {
	Superseded bool // a newer entry stands
	Err        error
}

// PresenceOptions configure a Presence.
type PresenceOptions struct {
	Client     rueidis.Client
	GatewayID  string
	TTL        time.Duration
	Registerer prometheus.Registerer
}

// Presence keeps user_session:ID entries. All methods may be called from any goroutine; each sends
// its operations in pipelined chunks and returns one answer per entry, in their order.
type Presence struct {
	o                       PresenceOptions
	ttl                     string
	claim, refresh, release *rueidis.Lua
	seconds                 *prometheus.HistogramVec
	ops                     *prometheus.CounterVec
}

// NewPresence validates the options.
func NewPresence(o PresenceOptions) (*Presence, error) {
	if o.TTL < time.Second {
		return nil, fmt.Errorf("presence TTL: %s, must be at least 1s", o.TTL)
	}
	p := &Presence{
		o: o, ttl: strconv.FormatInt(o.TTL.Milliseconds(), 10),
		claim:   rueidis.NewLuaScript(claimScript),
		refresh: rueidis.NewLuaScript(refreshScript),
		release: rueidis.NewLuaScript(releaseScript),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "im_gateway_presence_seconds", Help: "Time of one pipelined chunk of presence operations.",
			Buckets: prometheus.ExponentialBuckets(0.0002, 2.5, 11),
		}, []string{"kind"}),
		ops: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "im_gateway_presence_operations_total", Help: "Presence operations by kind and result.",
		}, []string{"kind", "result"}),
	}
	for _, c := range []prometheus.Collector{p.seconds, p.ops} {
		if err := o.Registerer.Register(c); err != nil {
			return nil, fmt.Errorf("register the presence metrics: %w", err)
		}
	}
	return p, nil
}

// RedisReachable asks Redis once.
func RedisReachable(ctx context.Context, c rueidis.Client) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	if err := c.Do(ctx, c.B().Ping().Build()).Error(); err != nil {
		return fmt.Errorf("ping Redis: %w", err)
	}
	return nil
}

// PresenceKey is the key of a user's entry.
func PresenceKey(user string) string { return "user_session:" + user }

// exec runs one script for all entries and calls f with each answer.
func (p *Presence) exec(ctx context.Context, kind string, script *rueidis.Lua, entries []Entry,
	f func(i int, r rueidis.RedisResult) error) {
	calls := make([]rueidis.LuaExec, 0, min(len(entries), presenceChunk))
	for from := 0; from < len(entries); from += presenceChunk {
		chunk := entries[from:min(from+presenceChunk, len(entries))]
		calls = calls[:0]
		for _, e := range chunk {
			calls = append(calls, rueidis.LuaExec{
				Keys: []string{PresenceKey(e.User)},
				Args: []string{p.o.GatewayID, e.Session, p.ttl,
					strconv.FormatInt(e.ConnectedAt, 10), strconv.FormatInt(e.Version, 10)},
			})
		}
		began := time.Now()
		failed := 0
		for i, r := range script.ExecMulti(ctx, p.o.Client, calls...) {
			if err := f(from+i, r); err != nil {
				failed++
			}
		}
		p.seconds.WithLabelValues(kind).Observe(time.Since(began).Seconds())
		p.ops.WithLabelValues(kind, "ok").Add(float64(len(chunk) - failed))
		p.ops.WithLabelValues(kind, "error").Add(float64(failed))
	}
}

// Claim makes each entry the caller's.
func (p *Presence) Claim(ctx context.Context, entries []Entry) []Claimed {
	out := make([]Claimed, len(entries))
	p.exec(ctx, "claim", p.claim, entries, func(i int, r rueidis.RedisResult) error {
		out[i] = readClaim(r)
		return out[i].Err
	})
	return out
}

func readClaim(r rueidis.RedisResult) (c Claimed) {
	parts, err := r.AsStrSlice()
	switch {
	case err != nil:
		c.Err = fmt.Errorf("claim presence: %w", err)
	case len(parts) != 3:
		c.Err = errors.New("claim presence: unexpected answer of Redis")
	default:
		if c.Version, err = strconv.ParseInt(parts[0], 10, 64); err != nil {
			c.Err = fmt.Errorf("claim presence: version: %w", err)
		}
		c.PrevGateway, c.PrevSession = parts[1], parts[2]
	}
	return c
}

// Refresh extends each entry, which carries the version that its claim was given.
func (p *Presence) Refresh(ctx context.Context, entries []Entry) []Refreshed {
	out := make([]Refreshed, len(entries))
	p.exec(ctx, "refresh", p.refresh, entries, func(i int, r rueidis.RedisResult) error {
		mine, err := r.AsInt64()
		if err != nil {
			out[i].Err = fmt.Errorf("refresh presence: %w", err)
		} else {
			out[i].Superseded = mine == 0
		}
		return err
	})
	return out
}

// Release deletes each entry that is still the caller's.
func (p *Presence) Release(ctx context.Context, entries []Entry) []error {
	out := make([]error, len(entries))
	p.exec(ctx, "release", p.release, entries, func(i int, r rueidis.RedisResult) error {
		if err := r.Error(); err != nil {
			out[i] = fmt.Errorf("release presence: %w", err)
		}
		return out[i]
	})
	return out
}
