"""What a record stream does atomically inside Redis, as Lua scripts.

Keys of a stream, all with one hash tag: KEYS[1] the Stream of entries (fields i: record id, t: time of
append, r: encoded record), KEYS[2] a hash from record id to "entry id, bytes", KEYS[3] a sorted set of
record ids by expiry, KEYS[4] a set of the entry ids that nobody acknowledged, KEYS[5] a hash of
counters. ARGV[1] is the consumer group.

Invariants: an entry is removed from all five at once, and its pending delivery with them; only an append
makes a key, and each append renews the expiry of all five. Streams' own trimming (MAXLEN) is not used: it
would leave trimmed entries pending, uncounted, and in the other keys. Every script runs on Redis 6.2 and
later, on a cluster too.
"""

_PRELUDE = """
local stream, index, expiry, open, counters = unpack(KEYS)
local group = ARGV[1]

local function remove(record_id)
  local found = redis.call('HGET', index, record_id)
  if not found then return 0 end
  local entry_id, num_bytes = string.match(found, '^(%S+) (%d+)$')
  redis.call('HDEL', index, record_id)
  redis.call('ZREM', expiry, record_id)
  redis.call('XDEL', stream, entry_id)
  redis.call('XACK', stream, group, entry_id)
  redis.call('HINCRBY', counters, 'num_bytes', -tonumber(num_bytes))
  if redis.call('SREM', open, entry_id) == 1 then
    redis.call('HINCRBY', counters, 'num_dropped', 1)
  end
  return 1
end
"""

_DROP_EXPIRED = """
local function drop_expired(now_s)
  for _, record_id in ipairs(redis.call('ZRANGEBYSCORE', expiry, '-inf', now_s)) do
    remove(record_id)
  end
end
"""

_TRIM = f"""{_DROP_EXPIRED}
local function remove_oldest(head)
  if remove(head[2][2]) == 0 then redis.call('XDEL', stream, head[1]) end
end

local function exceeds(head, oldest_s, max_records, max_bytes)
  if oldest_s ~= '' and tonumber(head[2][4]) < tonumber(oldest_s) then return true end
  if max_records ~= '' and redis.call('XLEN', stream) > tonumber(max_records) then return true end
  if max_bytes == '' then return false end
  return tonumber(redis.call('HGET', counters, 'num_bytes') or '0') > tonumber(max_bytes)
end

local function trim(now_s, oldest_s, max_records, max_bytes)
  drop_expired(now_s)
  while true do
    local head = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
    if not head or not exceeds(head, oldest_s, max_records, max_bytes) then return end
    remove_oldest(head)
  end
end
"""

OPEN_STREAM = """
local registry, member, siblings, default = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
redis.call('ZREMRANGEBYSCORE', registry, '-inf', '(' .. ARGV[4])
if ARGV[6] ~= '' and member ~= default and not redis.call('ZSCORE', registry, member) then
  local num_open = 0
  for _, other in ipairs(redis.call('ZRANGE', registry, 0, -1)) do
    if other ~= default and string.sub(other, 1, #siblings) == siblings then num_open = num_open + 1 end
  end
  if num_open >= tonumber(ARGV[6]) then return 0 end
end
redis.call('ZADD', registry, ARGV[5], member)
return 1
"""
"""KEYS[1]: the sorted set of all streams by the time at which they expire. A stream, the prefix of its
target's streams, its target's default stream, now, the time at which it expires, max routes ('': unbounded)
-> whether it is open. A separate script, because on a cluster the set and the streams are on different
nodes."""

APPEND = f"""{_PRELUDE}{_TRIM}
local num_new = 0
for i = 7, #ARGV, 3 do
  local record_id, expires_at_s, payload = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if redis.call('HEXISTS', index, record_id) == 0 then
    local entry_id = redis.call('XADD', stream, '*', 'i', record_id, 't', ARGV[2], 'r', payload)
    redis.call('HSET', index, record_id, entry_id .. ' ' .. #payload)
    redis.call('ZADD', expiry, expires_at_s, record_id)
    redis.call('SADD', open, entry_id)
    redis.call('HINCRBY', counters, 'num_bytes', #payload)
    num_new = num_new + 1
  end
end
trim(ARGV[2], ARGV[3], ARGV[4], ARGV[5])
if ARGV[6] ~= '' then
  for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, ARGV[6]) end
end
return num_new
"""
"""group, now, oldest time of append that may stay, max records, max bytes ('': unbounded), milliseconds until
the keys expire ('': never), then record id, expiry and payload of each record -> how many were new."""

DROP_EXPIRED = f"""{_PRELUDE}{_DROP_EXPIRED}
drop_expired(ARGV[2])
"""
"""group, now."""

REMOVE = f"""{_PRELUDE}
for i = 2, #ARGV do remove(ARGV[i]) end
"""
"""group, record ids: removes them, and counts as dropped those that nobody acknowledged."""

PURGE = f"""{_PRELUDE}
local request_id, oldest_s = ARGV[4], ARGV[5]

local function is_meant(record_id, entry_id)
  if request_id ~= '' and string.sub(record_id .. '-', 1, #request_id + 1) ~= request_id .. '-' then
    return false
  end
  if oldest_s == '' then return true end
  local entry = redis.call('XRANGE', stream, entry_id, entry_id)[1]
  return entry and tonumber(entry[2][4]) < tonumber(oldest_s)
end

local scanned = redis.call('HSCAN', index, ARGV[2], 'COUNT', ARGV[3])
local num_records = 0
for i = 1, #scanned[2], 2 do
  local record_id, entry_id = scanned[2][i], string.match(scanned[2][i + 1], '^%S+')
  if is_meant(record_id, entry_id) then
    redis.call('SREM', open, entry_id)
    num_records = num_records + remove(record_id)
  end
end
return {{num_records, scanned[1]}}
"""
"""group, cursor, how many records to look at, request id ('': any), the time of append before which records
are meant ('': any) -> how many were deleted, the next cursor. They do not count as dropped."""

ACK = f"""{_PRELUDE}
for i = 2, #ARGV do
  redis.call('XACK', stream, group, ARGV[i])
  redis.call('SREM', open, ARGV[i])
end
"""
"""group, entry ids."""

CLAIM = f"""{_PRELUDE}
local consumer, min_idle_ms = ARGV[2], tonumber(ARGV[3])
local claimed = {{}}
local pending = redis.pcall('XPENDING', stream, group, '-', '+', 1000000)
if pending.err then return claimed end
for _, delivery in ipairs(pending) do
  local entry_id, owner, idle_ms = delivery[1], delivery[2], delivery[3]
  if owner == consumer or idle_ms >= min_idle_ms then
    if #redis.call('XRANGE', stream, entry_id, entry_id) == 0 then
      redis.call('XACK', stream, group, entry_id)
    else
      redis.call('XCLAIM', stream, group, consumer, 0, entry_id)
      claimed[#claimed + 1] = entry_id
    end
  end
end
return claimed
"""
"""group, consumer, min idle ms -> entry ids now held by the consumer.

XAUTOCLAIM and the reading of one's own pending entries in one step, without what 6.2 does to trimmed
entries there (nil, or an empty entry that stays pending)."""

DRAW = f"""{_PRELUDE}
local entry_ids = {{}}
for i = 2, #ARGV do
  local record_id = redis.call('ZREVRANGE', expiry, ARGV[i], ARGV[i])[1]
  local found = record_id and redis.call('HGET', index, record_id)
  if found then entry_ids[#entry_ids + 1] = string.match(found, '^%S+') end
end
return entry_ids
"""
"""group, ranks from the latest expiry down (so the unexpired come first) -> entry ids."""
