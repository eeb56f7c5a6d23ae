"""The arithmetic of `policy.ratelimit` once more, in Lua: each decision is one script, which Redis runs as one.

A scope is a hash: `r` and `t` (the levels), `a` (microseconds when they were so), `d`, `sd`, `m`, `sm` (day, spent on
it, month, spent in it), and for each worker with exchanges in flight `s:WORKER` (how many) and `c:WORKER` (the money
set aside for them). A worker lives as long as it is in the set of workers with a time to come; who finds a dead one in
a scope takes its fields away and counts what it had set aside as spent. Time is the server's.

Each worker numbers its sessions (`e`) and what it has settled (`q`): what an older connection still delivers, and what
is said to a Redis that was emptied, is ignored (`stale`), and nothing is settled twice. Numbers that must be exact
travel as text: Lua's own would be rounded.
A test holds these scripts to the arithmetic in Python, step by step.
"""

from __future__ import annotations

from typing import Final

__all__ = ["ADMIT", "ALL", "BEAT", "BEGIN", "COUNT", "SETTLE", "SPEND"]

# KEYS: the workers, this worker, scopes… ARGV: now in microseconds or "" for the server's clock, worker, session, …
_COMMON: Final = """
local WORKERS, ME = KEYS[1], KEYS[2]
local me, session = ARGV[2], ARGV[3]
local now
if ARGV[1] ~= '' then now = tonumber(ARGV[1])
else local t = redis.call('TIME'); now = tonumber(t[1]) * 1000000 + tonumber(t[2]) end
local KEEP, FORGET = 40 * 86400, 86400000000
local floor, max, min = math.floor, math.max, math.min

local function exact(number) return string.format('%.17g', number) end

local function current() return redis.call('HGET', ME, 'e') == session end

local day = floor(now / 86400000000)
local month
do  -- the month of a day since 1970 (proleptic Gregorian; years begin in March)
  local z = day + 719468
  local era = floor(z / 146097)
  local doe = z - era * 146097
  local yoe = floor((doe - floor(doe / 1460) + floor(doe / 36524) - floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + floor(yoe / 4) - floor(yoe / 100))
  local mp = floor((5 * doy + 2) / 153)
  local number = mp < 10 and mp + 3 or mp - 9
  month = (yoe + era * 400 + (number <= 2 and 1 or 0)) * 12 + number - 1
end

local lives = {}
local function alive(worker)
  if worker == me then return true end
  if lives[worker] == nil then
    local until_ = redis.call('ZSCORE', WORKERS, worker)
    lives[worker] = until_ and tonumber(until_) > now or false
  end
  return lives[worker]
end

local function load(key, request_rate, token_rate)
  local got, s = redis.call('HGETALL', key), {streams = 0, reserved = 0, my_streams = 0, my_reserved = 0, gone = {}}
  local raw = {}
  local costs = 0
  for i = 1, #got, 2 do
    local name, value = got[i], got[i + 1]
    local kind, worker = string.sub(name, 1, 2), string.sub(name, 3)
    if kind == 's:' or kind == 'c:' then
      if alive(worker) then
        local number = tonumber(value)
        if kind == 's:' then s.streams = s.streams + number else s.reserved = s.reserved + number end
        if worker == me then
          if kind == 's:' then s.my_streams = number else s.my_reserved = number end
        end
      else
        s.gone[#s.gone + 1] = name
        if kind == 'c:' then costs = costs + tonumber(value) end
      end
    else raw[name] = tonumber(value) end
  end
  s.r, s.t, s.a = raw.r or 0, raw.t or 0, raw.a or 0
  s.kept = now - s.a < 3600000000  -- it was told to be kept not long ago
  s.d, s.sd, s.m, s.sm = raw.d or 0, (raw.sd or 0) + costs, raw.m or 0, (raw.sm or 0) + costs
  if now > s.a then
    local passed = (now - s.a) / 1000000
    s.a = now
    if s.r > 0 then s.r = request_rate < 0 and 0 or max(0, s.r - passed * request_rate) end
    if s.t > 0 then s.t = token_rate < 0 and 0 or max(0, s.t - passed * token_rate) end
  end
  if day > s.d or day < s.d - 1 then s.d, s.sd = day, 0 end
  if month > s.m or month < s.m - 1 then s.m, s.sm = month, 0 end
  return s
end

local function save(key, s, streams, reserved)  -- with this much more in flight of this worker's
  local new = {'r', exact(s.r), 't', exact(s.t), 'a', exact(s.a)}
  local function put(name, number) new[#new + 1] = name; new[#new + 1] = exact(number) end
  if s.sd > 0 or s.sm > 0 then put('d', s.d); put('sd', s.sd); put('m', s.m); put('sm', s.sm) end
  local function mine(name, before, more)
    if more == 0 then return end
    if before + more > 0 then put(name .. me, before + more) else s.gone[#s.gone + 1] = name .. me end
  end
  mine('s:', s.my_streams, streams)
  mine('c:', s.my_reserved, reserved)
  redis.call('HSET', key, unpack(new))
  if #s.gone > 0 then redis.call('HDEL', key, unpack(s.gone)) end
  if not s.kept then redis.call('EXPIRE', key, KEEP) end
end

local function once(number)  -- is this settlement a new one?
  local last = tonumber(redis.call('HGET', ME, 'q') or '0')
  if number <= last then return false end
  redis.call('HSET', ME, 'q', exact(number))
  return true
end
"""

# … tokens, cost, and for each scope: request rate, request burst, token rate, token burst, streams, per day, per month
# (-1 for none). Answers 1 or 0, the time, and what each scope has counted.
ADMIT: Final = (
    _COMMON
    + """
if not current() then return {'stale'} end
local tokens, cost = tonumber(ARGV[4]), tonumber(ARGV[5])
local states, ok = {}, 1
for i = 3, #KEYS do
  local at = 6 + (i - 3) * 7
  local l = {}
  for j = 0, 6 do l[j] = tonumber(ARGV[at + j]) end
  local s = load(KEYS[i], l[0], l[2])
  s.take = min(tokens, l[3])
  if l[0] >= 0 and s.r + 1 - l[1] > l[1] * 1e-9 then ok = 0 end
  if l[2] >= 0 and s.t + s.take - l[3] > l[3] * 1e-9 then ok = 0 end
  if l[4] >= 0 and s.streams >= l[4] then ok = 0 end
  if l[5] >= 0 and s.sd + s.reserved >= l[5] then ok = 0 end
  if l[6] >= 0 and s.sm + s.reserved >= l[6] then ok = 0 end
  s.limits_requests, s.limits_tokens = l[0] >= 0, l[2] >= 0
  states[i] = s
end
local answer = {ok, exact(now)}
for i = 3, #KEYS do
  local s = states[i]
  if ok == 1 then
    if s.limits_requests then s.r = s.r + 1 end
    if s.limits_tokens then s.t = s.t + s.take end
    save(KEYS[i], s, 1, cost)
    s.streams, s.reserved = s.streams + 1, s.reserved + cost
  end
  for _, name in ipairs({'r', 't', 'streams', 'reserved', 'sd', 'sm'}) do answer[#answer + 1] = exact(s[name]) end
end
return answer
"""
)

# … number, asked tokens, asked cost, used tokens, used cost, and for each scope: request rate, token rate, token burst.
SETTLE: Final = (
    _COMMON
    + """
if not current() then return {'stale'} end
if not once(tonumber(ARGV[4])) then return 0 end
local asked, cost, used, spent = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
for i = 3, #KEYS do
  local at = 9 + (i - 3) * 3
  local token_rate, token_burst = tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  local s = load(KEYS[i], tonumber(ARGV[at]), token_rate)
  if token_rate >= 0 then s.t = max(0, s.t + used - min(asked, token_burst)) end
  s.sd, s.sm = s.sd + spent, s.sm + spent
  save(KEYS[i], s, -1, -cost)
end
return 1
"""
)

# … number, cost, and for each scope: request rate, token rate. It was spent while nobody could be told.
SPEND: Final = (
    _COMMON
    + """
if not current() then return {'stale'} end
if not once(tonumber(ARGV[4])) then return 0 end
local spent = tonumber(ARGV[5])
for i = 3, #KEYS do
  local at = 6 + (i - 3) * 2
  local s = load(KEYS[i], tonumber(ARGV[at]), tonumber(ARGV[at + 1]))
  s.sd, s.sm = s.sd + spent, s.sm + spent
  save(KEYS[i], s, 0, 0)
end
return 1
"""
)

# … in flight, money set aside: what this worker has in a scope, whatever was thought.
COUNT: Final = (
    _COMMON
    + """
if not current() then return {'stale'} end
local streams, reserved = tonumber(ARGV[4]), tonumber(ARGV[5])
if streams > 0 then redis.call('HSET', KEYS[3], 's:' .. me, ARGV[4]) else redis.call('HDEL', KEYS[3], 's:' .. me) end
if reserved > 0 then redis.call('HSET', KEYS[3], 'c:' .. me, ARGV[5]) else redis.call('HDEL', KEYS[3], 'c:' .. me) end
redis.call('EXPIRE', KEYS[3], KEEP)
return 1
"""
)

# … microseconds to live. A new session begins: what an older one still says is ignored from here on.
BEGIN: Final = (
    _COMMON
    + """
redis.call('HSET', ME, 'e', session)
redis.call('EXPIRE', ME, KEEP)
redis.call('ZADD', WORKERS, now + tonumber(ARGV[4]), me)
return 1
"""
)

# … microseconds to live.
BEAT: Final = (
    _COMMON
    + """
if not current() then return {'stale'} end
redis.call('EXPIRE', ME, KEEP)
redis.call('ZADD', WORKERS, now + tonumber(ARGV[4]), me)
redis.call('ZREMRANGEBYSCORE', WORKERS, '-inf', now - FORGET)
return 1
"""
)

ALL: Final = (ADMIT, SETTLE, SPEND, COUNT, BEGIN, BEAT)
