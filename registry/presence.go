package registry

import (
	"context"
	"crypto/sha1" // #nosec G505 -- what Redis names scripts by
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/rueidis"
)

// presenceChunk is how many operations go to Redis in one pipeline: enough to save round trips, few
// enough that Redis, which runs a pipeline's scripts in one go, is never held for long.
const presenceChunk = 500

// The scripts of one session per user, each on the one key of a user's entry, as Redis Cluster demands. ARGV: gateway_id,
// session_id, TTL in ms, connected_at, version. A version that is no number counts as none: an entry
// written by hand must not keep its user out.
//
// claim takes a version above any that was there, at least Redis' own clock in microseconds, so that
// versions also rise across a loss of the data; such numbers are exact in Lua until the year 2255. It
// returns the version with the previous gateway and session. A late claim (ARGV[6]), one that comes
// long after its session connected, takes nothing from a session that connected after it: the version
// returned is empty then.
const claimScript = `
local prev = redis.call('HMGET', KEYS[1], 'gateway_id', 'session_id', 'version', 'connected_at')
if ARGV[6] == '1' and prev[2] and prev[2] ~= ARGV[2] and (tonumber(prev[4] or '') or 0) > tonumber(ARGV[4]) then
  return {'', prev[1] or '', prev[2]}
end
local now = redis.call('TIME')
local version = math.max(tonumber(now[1]) * 1000000 + tonumber(now[2]), (tonumber(prev[3] or '') or 0) + 1)
local text = string.format('%.0f', version)
redis.call('HSET', KEYS[1], 'gateway_id', ARGV[1], 'session_id', ARGV[2], 'connected_at', ARGV[4], 'version', text)
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {text, prev[1] or '', prev[2] or ''}`

// refresh returns 1 where the entry is the caller's, and extends it; 2 where it was missing or older,
// and writes the caller's again; 0 where a newer one stands.
const refreshScript = `
local prev = redis.call('HMGET', KEYS[1], 'gateway_id', 'session_id', 'version')
local stored, mine = tonumber(prev[3] or '') or 0, tonumber(ARGV[5])
if stored > mine then return 0 end
if stored == mine then
  if prev[1] ~= ARGV[1] or prev[2] ~= ARGV[2] then return 0 end
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  return 1
end
redis.call('HSET', KEYS[1], 'gateway_id', ARGV[1], 'session_id', ARGV[2], 'connected_at', ARGV[4], 'version', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 2`

// release deletes the entry where it is the caller's, and returns how many it deleted.
const releaseScript = `
local prev = redis.call('HMGET', KEYS[1], 'gateway_id', 'session_id')
if prev[1] == ARGV[1] and prev[2] == ARGV[2] then return redis.call('DEL', KEYS[1]) end
return 0`

// Entry is one user's presence.
type Entry struct {
	User        string
	Session     string
	ConnectedAt int64 // Unix ms
	Version     int64 // what the claim returned; a claim itself ignores it
	Late        bool  // of a claim: it comes long after ConnectedAt, and must not replace a newer session
	DeviceID    string
	DeviceKind  string // without a bar
}

// Claimed is the answer to a claim.
type Claimed struct {
	Version     int64
	Evicted     []Holder // the sessions whose place it has taken, on any gateway
	Elsewhere   bool     // live sessions of the user on other gateways remain
	PrevGateway string   // of one session per user; empty: there was no entry, or it was this very session's
	PrevSession string
	Superseded  bool // of a late claim: sessions that connected later leave it no place, and were left alone
	Err         error
}

// Holder names a session.
type Holder struct{ GatewayID, Session string }

// Refreshed is the answer to a refresh.
type Refreshed struct {
	Superseded bool // newer sessions leave it no place
	Elsewhere  bool // the user has live sessions on other gateways
	Err        error
}

// Location is where a user is. The device is known only where several sessions per user are allowed,
// and to Locate.
type Location struct {
	GatewayID   string
	Session     string
	ConnectedAt int64 // Unix ms
	Version     int64
	DeviceID    string
	DeviceKind  string
	AnyDevice   bool // the entry does not say which: that of a single session has no room for it
}

// PresenceOptions configure a Presence.
type PresenceOptions struct {
	Client    rueidis.Client
	GatewayID string        // without a bar
	TTL       time.Duration // how long an entry outlives its last refresh; at least 1 s
	// MaxSessions is how many sessions a user may have, on all gateways; at most 1: a new one replaces
	// the one before. With more, it replaces those of the same device, and the oldest beyond the limit.
	MaxSessions int
	ReplaceKind bool // with more: it also replaces those of the same kind of device
	Registerer  prometheus.Registerer
}

// Presence keeps user_session:ID entries. All methods may be called from any goroutine; each sends
// its operations in pipelined chunks, in their order, and returns one answer per entry. An error says
// that Redis has not answered for this entry: the operation may or may not have been done, and may
// be repeated.
type Presence struct {
	o                       PresenceOptions
	ttl                     string // ms
	max, replaceKind        string // arguments of the scripts
	claim, refresh, release *operation
	lookups                 [2]prometheus.Counter // absent, present
	lookupErrors            prometheus.Counter
	locates                 [2]prometheus.Counter // absent, present
	locateErrors            prometheus.Counter
	locateSeconds           prometheus.Observer
}

// operation is one of the scripts with its metrics.
type operation struct {
	name    string
	script  string
	sha1    string
	results []prometheus.Counter // by what read returns
	failed  prometheus.Counter
	seconds prometheus.Observer
}

// NewPresence validates the options.
func NewPresence(o PresenceOptions) (*Presence, error) {
	if o.TTL < time.Second {
		return nil, fmt.Errorf("presence TTL: %s, must be at least 1s", o.TTL)
	}
	if o.GatewayID == "" || strings.Contains(o.GatewayID, "|") {
		return nil, fmt.Errorf("presence: gateway_id %q is empty or has a bar in it", o.GatewayID)
	}
	seconds := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "im_gateway_presence_duration_seconds",
		Help:    "Time of one pipelined chunk of presence operations, by kind.",
		Buckets: prometheus.ExponentialBuckets(0.0002, 2.5, 11),
	}, []string{"kind"})
	ops := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_presence_operations_total",
		Help: "Presence operations by kind and result. claim: new, replaced (took the place of others), superseded. refresh: " +
			"extended, written_again (the entry was missing or older), superseded. release: deleted, not_ours. lookup and " +
			"locate: present, absent. All: error.",
	}, []string{"kind", "result"})
	operation := func(name, script string, results ...string) *operation {
		sum := sha1.Sum([]byte(script)) // #nosec G401 -- what Redis names scripts by
		op := &operation{
			name: name, script: script, sha1: hex.EncodeToString(sum[:]),
			failed: ops.WithLabelValues(name, "error"), seconds: seconds.WithLabelValues(name),
		}
		for _, r := range results {
			op.results = append(op.results, ops.WithLabelValues(name, r))
		}
		return op
	}
	claim, refresh, release := claimScript, refreshScript, releaseScript
	if o.MaxSessions > 1 {
		claim, refresh, release = claimManyScript, refreshManyScript, releaseManyScript
	}
	release = releaseBy(release)
	p := &Presence{
		o: o, ttl: strconv.FormatInt(o.TTL.Milliseconds(), 10), max: strconv.Itoa(o.MaxSessions), replaceKind: flag(o.ReplaceKind),
		claim:        operation("claim", claim, "new", "replaced", "superseded"),
		refresh:      operation("refresh", refresh, "superseded", "extended", "written_again"),
		release:      operation("release", release, "not_ours", "deleted"),
		lookups:      [2]prometheus.Counter{ops.WithLabelValues("lookup", "absent"), ops.WithLabelValues("lookup", "present")},
		lookupErrors: ops.WithLabelValues("lookup", "error"),
		locates:      [2]prometheus.Counter{ops.WithLabelValues("locate", "absent"), ops.WithLabelValues("locate", "present")},
		locateErrors: ops.WithLabelValues("locate", "error"), locateSeconds: seconds.WithLabelValues("locate"),
	}
	return p, register(o.Registerer, seconds, ops)
}

// PresenceKey is the key of a user's entry.
func PresenceKey(user string) string { return "user_session:" + user }

// Claim makes each entry this gateway's, whoever had it; with several sessions per user, adds it to
// the user's.
func (p *Presence) Claim(ctx context.Context, entries []Entry) []Claimed {
	out := make([]Claimed, len(entries))
	p.exec(ctx, p.claim, entries, func(i int, r rueidis.RedisResult) (int, error) {
		read := readClaim
		if p.o.MaxSessions > 1 {
			read = readClaimMany
		}
		c, err := read(r, Holder{p.o.GatewayID, entries[i].Session})
		c.Err = err
		out[i] = c
		if c.Superseded {
			return 2, err
		}
		if len(c.Evicted) > 0 {
			return 1, err
		}
		return 0, err
	}, func(i int, err error) { out[i].Err = err })
	return out
}

func readClaim(r rueidis.RedisResult, self Holder) (Claimed, error) {
	parts, err := r.AsStrSlice()
	if err != nil {
		return Claimed{}, err
	}
	if len(parts) != 3 {
		return Claimed{}, errors.New("unexpected answer of Redis")
	}
	if parts[0] == "" {
		return Claimed{PrevGateway: parts[1], PrevSession: parts[2], Superseded: true}, nil
	}
	version, err := strconv.ParseInt(parts[0], 10, 64)
	if err != nil {
		return Claimed{}, fmt.Errorf("version: %w", err)
	}
	prev := Holder{parts[1], parts[2]}
	if prev.GatewayID == "" || prev == self { // self: a claim whose answer was lost, repeated
		return Claimed{Version: version}, nil
	}
	return Claimed{Version: version, Evicted: []Holder{prev}, PrevGateway: prev.GatewayID, PrevSession: prev.Session}, nil
}

// Refresh extends each entry, which carries the version that its claim was given, and writes those
// again that are missing or older.
func (p *Presence) Refresh(ctx context.Context, entries []Entry) []Refreshed {
	out := make([]Refreshed, len(entries))
	p.exec(ctx, p.refresh, entries, func(i int, r rueidis.RedisResult) (int, error) {
		n, err := r.AsInt64()
		out[i].Elsewhere = n&elsewhereBit != 0
		n &^= elsewhereBit
		out[i].Superseded = err == nil && n == 0
		return int(n), err
	}, func(i int, err error) { out[i].Err = err })
	return out
}

// Release deletes each entry that is still this gateway's and of that session.
func (p *Presence) Release(ctx context.Context, entries []Entry) []error {
	out := make([]error, len(entries))
	p.exec(ctx, p.release, entries, func(_ int, r rueidis.RedisResult) (int, error) {
		n, err := r.AsInt64()
		return int(n), err
	}, func(i int, err error) { out[i] = err })
	return out
}

// exec runs an operation for all entries. read takes the answer of entry i and returns which of the
// operation's results it is; failed is told its error.
func (p *Presence) exec(ctx context.Context, op *operation, entries []Entry,
	read func(i int, r rueidis.RedisResult) (int, error), failed func(i int, err error)) {
	for from := 0; from < len(entries); from += presenceChunk {
		chunk := entries[from:min(from+presenceChunk, len(entries))]
		began := time.Now()
		answers := p.send(ctx, op, chunk)
		op.seconds.Observe(time.Since(began).Seconds())
		for i, r := range answers {
			result, err := read(from+i, r)
			if err != nil {
				op.failed.Inc()
				failed(from+i, fmt.Errorf("%s presence: %w", op.name, err))
				continue
			}
			op.results[result].Inc()
		}
	}
}

// send runs the script by its hash, and where a server does not have it (a restart, SCRIPT FLUSH, a
// failover) by its text, which that server then keeps. Only the servers that own the keys are asked.
func (p *Presence) send(ctx context.Context, op *operation, chunk []Entry) []rueidis.RedisResult {
	c := p.o.Client
	cmds := make(rueidis.Commands, 0, len(chunk))
	for i := range chunk {
		e := &chunk[i]
		cmds = append(cmds, c.B().Evalsha().Sha1(op.sha1).Numkeys(1).Key(PresenceKey(e.User)).Arg(p.args(e)...).Build())
	}
	answers := c.DoMulti(ctx, cmds...)
	var unknown []int
	for i := range answers {
		if e, ok := rueidis.IsRedisErr(answers[i].Error()); ok && e.IsNoScript() {
			unknown = append(unknown, i)
		}
	}
	if len(unknown) == 0 {
		return answers
	}
	cmds = make(rueidis.Commands, 0, len(unknown))
	for _, i := range unknown {
		e := &chunk[i]
		cmds = append(cmds, c.B().Eval().Script(op.script).Numkeys(1).Key(PresenceKey(e.User)).Arg(p.args(e)...).Build())
	}
	for k, answer := range c.DoMulti(ctx, cmds...) {
		answers[unknown[k]] = answer
	}
	return answers
}

func (p *Presence) args(e *Entry) []string {
	args := []string{
		p.o.GatewayID, e.Session, p.ttl, strconv.FormatInt(e.ConnectedAt, 10), strconv.FormatInt(e.Version, 10), flag(e.Late),
	}
	if p.o.MaxSessions > 1 {
		args = append(args, p.max, p.replaceKind, e.DeviceKind, e.DeviceID)
	}
	return args
}

// flag is a truth value as an argument of a script.
func flag(b bool) string {
	if b {
		return "1"
	}
	return "0"
}

// Lookup returns where a user's newest session is; false: nowhere.
func (p *Presence) Lookup(ctx context.Context, user string) (Location, bool, error) {
	c := p.o.Client
	fields, err := c.Do(ctx, c.B().Hmget().Key(PresenceKey(user)).
		Field("gateway_id", "session_id", "connected_at", "version").Build()).AsStrSlice()
	if err == nil && len(fields) != 4 {
		err = errors.New("unexpected answer of Redis")
	}
	if err != nil {
		p.lookupErrors.Inc()
		return Location{}, false, fmt.Errorf("look presence up: %w", err)
	}
	if fields[0] == "" {
		p.lookups[0].Inc()
		return Location{}, false, nil
	}
	p.lookups[1].Inc()
	at := Location{GatewayID: fields[0], Session: fields[1]}
	// Zero when somebody else wrote something else: where the user is, is known all the same.
	at.ConnectedAt, _ = strconv.ParseInt(fields[2], 10, 64)
	at.Version, _ = strconv.ParseInt(fields[3], 10, 64)
	return at, true, nil
}
