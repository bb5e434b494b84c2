package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/rueidis"
)

// The scripts of the policy that allows several sessions per user. Besides the four fields, which name
// the newest live session, the hash has one field for each session, s:SESSION_ID, of
//
//	gateway_id|version|expires_ms|connected_at|device_kind|device_id
//
// The kind has no bar in it, the device id may have any byte. Sessions rank by version, equal ones by
// session id. A newest session without a field is one of a gateway with the other policy: it is given
// a field for as long as the key was to live.
//
// ARGV: those of the other policy, then MaxSessions, 1 for ReplaceKind, device_kind, device_id.

// manyPrelude reads the hash. live holds the sessions that have not expired by Redis' clock, by id;
// gone the names of the fields to remove. place puts a session among them at its version, and returns
// whom it has evicted: those below it with the same device (or kind), and the lowest beyond
// MaxSessions; nil, and nothing is done, when those that rank above it leave no place. store
// writes what has changed, and returns whether the user has sessions on other gateways.
const manyPrelude = `
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local me, ttl = ARGV[2], tonumber(ARGV[3])
local newest, live, gone, known, highest = {}, {}, {}, {}, 0
local all = redis.call('HGETALL', KEYS[1])
local function number(digits)
  local n = tonumber(digits or '') or 0
  if n < 2^53 then return n end
  return 0
end
for i = 1, #all, 2 do
  local name, value = all[i], all[i + 1]
  if string.sub(name, 1, 2) ~= 's:' then
    newest[name] = value
  else
    local id = string.sub(name, 3)
    local gateway, version, expires, connected, kind, device =
      string.match(value, '^([^|]*)|(%d+)|(%d+)|(%-?%d+)|([^|]*)|(.*)$')
    known[id] = true
    version = number(version)
    highest = math.max(highest, version)
    if gateway and number(expires) > now then
      live[id] = {id = id, gateway = gateway, version = version, expires = expires,
        connected = connected, kind = kind, device = device}
    else
      gone[name] = true
    end
  end
end
local function text(number) return string.format('%.0f', number) end
local function write(s)
  gone['s:' .. s.id] = nil
  live[s.id] = s
  redis.call('HSET', KEYS[1], 's:' .. s.id, table.concat(
    {s.gateway, text(s.version), s.expires, s.connected, s.kind, s.device}, '|'))
end
local function remove(id)
  live[id] = nil
  gone['s:' .. id] = true
end
if newest.session_id and not known[newest.session_id] and string.find(newest.gateway_id or '', '^[^|]+$') then
  local left, version = redis.call('PTTL', KEYS[1]), number(string.match(newest.version or '', '^%d+$'))
  if left < 0 then left = ttl end
  highest = math.max(highest, version)
  write({id = newest.session_id, gateway = newest.gateway_id, version = version, expires = text(now + left),
    connected = string.match(newest.connected_at or '', '^%-?%d+$') or '0', kind = '', device = ''})
end
local function above(a, b)
  if a.version ~= b.version then return a.version > b.version end
  return a.id > b.id
end
local function place(mine)
  local function conflicts(s)
    return mine.device ~= '' and s.device == mine.device or ARGV[8] == '1' and mine.kind ~= '' and s.kind == mine.kind
  end
  local room, below, evicted = tonumber(ARGV[7]) - 1, {}, {}
  for id, s in pairs(live) do
    if id ~= me then
      if s.version < mine.version then
        below[#below + 1] = s
      else
        if conflicts(s) then return nil end
        room = room - 1
      end
    end
  end
  if room < 0 then return nil end
  table.sort(below, above)
  for _, s in ipairs(below) do
    if room == 0 or conflicts(s) then
      evicted[#evicted + 1] = s
      remove(s.id)
    else
      room = room - 1
    end
  end
  write(mine)
  redis.call('PEXPIRE', KEYS[1], ttl)
  return evicted
end
local function store()
  local top, elsewhere = nil, false
  for _, s in pairs(live) do
    if not top or above(s, top) then top = s end
    elsewhere = elsewhere or s.gateway ~= ARGV[1]
  end
  if not top then
    redis.call('DEL', KEYS[1])
    return false
  end
  for name in pairs(gone) do redis.call('HDEL', KEYS[1], name) end
  if newest.session_id ~= top.id or newest.gateway_id ~= top.gateway or newest.version ~= text(top.version) then
    redis.call('HSET', KEYS[1], 'gateway_id', top.gateway, 'session_id', top.id, 'connected_at', top.connected,
      'version', text(top.version))
  end
  return elsewhere
end
local function session(version)
  return {id = me, gateway = ARGV[1], version = version, expires = text(now + ttl), connected = ARGV[4],
    kind = ARGV[9], device = ARGV[10]}
end
`

// claim takes a version above all, as that of the other policy. A late one takes a version as much
// below those of the sessions that connected after it as it connected before them, and so neither
// evicts them nor ranks above them. It returns the version, empty when those leave it no place, 1 for sessions on other gateways, and the gateway
// and session of each that it has evicted.
const claimManyScript = manyPrelude + `
local version = math.max(tonumber(clock[1]) * 1000000 + tonumber(clock[2]), highest + 1)
if ARGV[6] == '1' then
  local taken = {}
  for id, s in pairs(live) do
    if id ~= me then
      taken[s.version] = true
      local later = number(s.connected) - tonumber(ARGV[4])
      if later > 0 then version = math.min(version, s.version - 1000 * later) end
    end
  end
  while taken[version] do version = version - 1 end
end
local evicted = nil
if version >= 0 then evicted = place(session(version)) end
local answer = {evicted and text(version) or '', store() and '1' or '0'}
for _, s in ipairs(evicted or {}) do
  answer[#answer + 1] = s.gateway
  answer[#answer + 1] = s.id
end
return answer`

// refresh returns as that of the other policy, and 4 more where the user has sessions on other
// gateways. A repeated claim, whose answer the caller does not have yet, may have given its session a
// version above the caller's. The first part is the common case, for two thirds of the time: nothing
// has expired, the caller's field is there and the newest one's too.
const refreshManyScript = `
do
  local clock, all = redis.call('TIME'), redis.call('HGETALL', KEYS[1])
  local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
  local find, named, newest = string.find, {}, {}
  local mine, elsewhere, ordinary = 's:' .. ARGV[2], 0, true
  for i = 1, #all, 2 do
    local name = all[i]
    if find(name, 's:', 1, true) == 1 then
      local _, _, gateway, version, expires = find(all[i + 1], '^([^|]*)|(%d+)|(%d+)|')
      if not gateway or (tonumber(expires) or 0) <= now then
        ordinary = false
        break
      end
      named[name] = gateway .. '|' .. version
      if gateway ~= ARGV[1] then elsewhere = 4 end
    else
      newest[name] = all[i + 1]
    end
  end
  if ordinary and named[mine] == ARGV[1] .. '|' .. ARGV[5] and newest.session_id and newest.gateway_id and newest.version
    and named['s:' .. newest.session_id] == newest.gateway_id .. '|' .. newest.version then
    redis.call('HSET', KEYS[1], mine, ARGV[1] .. '|' .. ARGV[5] .. '|' .. string.format('%.0f', now + ARGV[3]) .. '|' ..
      ARGV[4] .. '|' .. ARGV[9] .. '|' .. ARGV[10])
    redis.call('PEXPIRE', KEYS[1], ARGV[3])
    return 1 + elsewhere
  end
end
` + manyPrelude + `
local result, mine = 0, live[me]
if mine and mine.gateway == ARGV[1] then
  mine.version = math.max(mine.version, tonumber(ARGV[5]))
  mine.expires = text(now + ttl)
  write(mine)
  redis.call('PEXPIRE', KEYS[1], ttl)
  result = 1
elseif not (mine and mine.version >= tonumber(ARGV[5])) and place(session(tonumber(ARGV[5]))) then
  result = 2
end
if store() then result = result + 4 end
return result`

// release removes the caller's session, and the key with the last one. It returns how many sessions
// it has removed.
const releaseManyScript = manyPrelude + `
local result = 0
if live[me] and live[me].gateway == ARGV[1] then
  remove(me)
  result = 1
end
store()
return result`

// elsewhereBit is what a refresh's answer has more where the user has sessions on other gateways.
const elsewhereBit = 4

// sessionField is how the name of a session's field begins.
const sessionField = "s:"

func readClaimMany(r rueidis.RedisResult, _ Holder) (Claimed, error) {
	parts, err := r.AsStrSlice()
	if err != nil {
		return Claimed{}, err
	}
	if len(parts) < 2 || len(parts)%2 != 0 {
		return Claimed{}, errors.New("unexpected answer of Redis")
	}
	c := Claimed{Superseded: parts[0] == "", Elsewhere: parts[1] == "1"}
	if !c.Superseded {
		if c.Version, err = strconv.ParseInt(parts[0], 10, 64); err != nil {
			return Claimed{}, fmt.Errorf("version: %w", err)
		}
	}
	for pair := range slices.Chunk(parts[2:], 2) {
		c.Evicted = append(c.Evicted, Holder{pair[0], pair[1]})
	}
	return c, nil
}

// Located is the answer for one user of Locate.
type Located struct {
	Sessions []Location // newest first; empty: the user is nowhere
	Err      error
}

// Locate returns where each user is, under either policy. Sessions that expired more than a TTL ago
// by this host's clock are left out: the clock may be off by that much, and those that expired since
// are removed with the next operation of the user's other sessions, or with the key.
func (p *Presence) Locate(ctx context.Context, users []string) []Located {
	c := p.o.Client
	out := make([]Located, 0, len(users))
	for chunk := range slices.Chunk(users, presenceChunk) {
		cmds := make(rueidis.Commands, 0, len(chunk))
		for _, user := range chunk {
			cmds = append(cmds, c.B().Hgetall().Key(PresenceKey(user)).Build())
		}
		began := time.Now()
		answers := c.DoMulti(ctx, cmds...)
		p.locateSeconds.Observe(time.Since(began).Seconds())
		expired := time.Now().Add(-p.o.TTL).UnixMilli()
		for _, r := range answers {
			hash, err := r.AsStrMap()
			switch {
			case err != nil:
				p.locateErrors.Inc()
				out = append(out, Located{Err: fmt.Errorf("locate: %w", err)})
				continue
			case len(hash) == 0:
				p.locates[0].Inc()
				out = append(out, Located{})
				continue
			}
			sessions := readSessions(hash, expired)
			p.locates[min(len(sessions), 1)].Inc()
			out = append(out, Located{Sessions: sessions})
		}
	}
	return out
}

// readSessions returns the sessions of a hash of either shape without those that expired before the
// time in Unix ms.
func readSessions(hash map[string]string, expired int64) []Location {
	var sessions []Location
	for name, value := range hash {
		id, ok := strings.CutPrefix(name, sessionField)
		if !ok {
			continue
		}
		if at, expires, ok := readSession(id, value); ok && expires >= expired {
			sessions = append(sessions, at)
		}
	}
	id := hash["session_id"]
	if _, ok := hash[sessionField+id]; !ok && hash["gateway_id"] != "" {
		at := Location{GatewayID: hash["gateway_id"], Session: id, AnyDevice: true}
		at.ConnectedAt, _ = strconv.ParseInt(hash["connected_at"], 10, 64) // as in Lookup
		at.Version, _ = strconv.ParseInt(hash["version"], 10, 64)
		sessions = append(sessions, at)
	}
	slices.SortFunc(sessions, func(a, b Location) int {
		return cmp.Or(cmp.Compare(b.Version, a.Version), strings.Compare(b.Session, a.Session))
	})
	return sessions
}

func readSession(id, value string) (at Location, expires int64, ok bool) {
	parts := strings.SplitN(value, "|", 6)
	if len(parts) != 6 {
		return Location{}, 0, false
	}
	var numbers [3]int64
	for i := range numbers {
		n, err := strconv.ParseInt(parts[1+i], 10, 64)
		if err != nil {
			return Location{}, 0, false
		}
		numbers[i] = n
	}
	return Location{
		GatewayID: parts[0], Session: id, DeviceKind: parts[4], DeviceID: parts[5], Version: numbers[0], ConnectedAt: numbers[2],
	}, numbers[1], true
}
