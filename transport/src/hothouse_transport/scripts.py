"""The Lua scripts: each is one atomic step inside Redis, by Redis' own clock.

In each, the first write is one that Redis does not refuse when its memory is full; once a script has written, its other
commands are not refused either. So taking, renewing, acknowledging and giving back work with a full memory, which
makes room.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha1


@dataclass(frozen=True)
class Script:
    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", sha1(self.text.encode(), usedforsecurity=False).hexdigest())


# Take messages: from each queue in turn, or from the first that has one, and note each as taken.
# KEYS  unacked_index, unacked, queue...
# ARGV  how many; how many bytes until no more are taken; 1: in turn; 1: the connection tracks keys and wants to hear of
#       new messages; for each queue its name in JSON, or nothing if its messages are not acknowledged
# Returns {number of the queue from 1, tag, message, ...}; with a negative number, an error instead of the message: that
# key is no queue, and keeps no other from being taken.
# The entry in `unacked` is that of kombu's own transport, so either can give back what the other took; its route is the
# default exchange and the queue's name. A tag that is missing, no plain ASCII, or in use (a message that went to two
# queues has the same in both) is replaced by one that is not.
FETCH = Script(
    r"""
-- Errors now, when nothing is taken yet, if one of these is of a wrong type.
redis.call('ZSCORE', KEYS[1], '')
redis.call('HGET', KEYS[2], '')
local taken, left, bytes, found, broken = {}, tonumber(ARGV[1]), tonumber(ARGV[2]), true, {}
local now
while found and left > 0 and bytes > 0 do
  found = false
  for i = 3, #KEYS do
    if left == 0 or bytes <= 0 then break end
    local message = not broken[i] and redis.pcall('RPOP', KEYS[i])
    if type(message) == 'table' then
      if not string.find(message.err, 'WRONGTYPE', 1, true) then return message end
      broken[i] = true
      taken[#taken + 1] = 2 - i
      taken[#taken + 1] = ''
      taken[#taken + 1] = message.err
    elseif message then
      found, left, bytes = true, left - 1, bytes - #message
      local place = string.find(message, '"delivery_tag"', 1, true)
      local tag = place and string.match(message, '^: *"([\33\35-\91\94-\126]+)"', place + 14) or ''
      local queue = ARGV[i + 2]
      if queue ~= '' then
        if not now then
          local time = redis.call('TIME')
          now = time[1] .. '.' .. string.format('%06d', time[2])
        end
        local entry = '[' .. message .. ', "", ' .. queue .. ']'
        if tag == '' or redis.call('HSETNX', KEYS[2], tag, entry) == 0 then
          tag = tag .. ':' .. now .. ':' .. left
          redis.call('HSET', KEYS[2], tag, entry)
        end
        redis.call('ZADD', KEYS[1], now, tag)
      end
      taken[#taken + 1] = i - 2
      taken[#taken + 1] = tag
      taken[#taken + 1] = message
      if ARGV[3] ~= '1' then break end
    end
  end
end
if ARGV[4] == '1' and left > 0 and tonumber(ARGV[1]) > 0 then
  -- The connection reads the keys of its queues, so Redis tells it of the next change to one of them.
  redis.call('EXISTS', unpack(KEYS, 3))
end
return taken
"""
)

# Acknowledge. KEYS unacked_index, unacked, deliveries; ARGV tag, 1 if the message was delivered before.
ACK = Script(
    """
redis.call('HDEL', KEYS[2], ARGV[1])
if ARGV[2] == '1' then redis.call('HDEL', KEYS[3], ARGV[1]) end
return redis.call('ZREM', KEYS[1], ARGV[1])
"""
)

# Hold messages as if they had been taken just now, except those that were acknowledged or given back in the meantime.
# KEYS unacked_index; ARGV tag...
RENEW = Script(
    """
redis.call('ZREM', KEYS[1], '') -- removes nothing, as no tag is empty, and is not refused
local time = redis.call('TIME')
local now = time[1] .. '.' .. string.format('%06d', time[2])
local rows = {}
for i = 1, #ARGV do
  rows[2 * i - 1], rows[2 * i] = now, ARGV[i]
end
return redis.call('ZADD', KEYS[1], 'XX', unpack(rows))
"""
)

# What was taken or renewed longer ago than the visibility timeout. KEYS unacked_index, unacked, deliveries;
# ARGV the timeout in seconds, how many at most, how many bytes until no more are looked at.
# Returns {tag, score, deliveries that failed so far, entry, ...}.
OVERDUE = Script(
    """
local time = redis.call('TIME')
local overdue, bytes = {}, tonumber(ARGV[3])
local rows = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', time[1] - ARGV[1], 'WITHSCORES', 'LIMIT', 0, ARGV[2])
for i = 1, #rows, 2 do
  if bytes <= 0 then break end
  local entry = redis.call('HGET', KEYS[2], rows[i])
  if entry then
    overdue[#overdue + 1] = rows[i]
    overdue[#overdue + 1] = rows[i + 1]
    overdue[#overdue + 1] = redis.call('HGET', KEYS[3], rows[i]) or '0'
    overdue[#overdue + 1] = entry
    bytes = bytes - #entry
  else
    redis.call('ZREM', KEYS[1], rows[i])
  end
end
return overdue
"""
)

# Move a taken message to lists, unless it was acknowledged, moved or (if a score is given) taken anew in the meantime.
# KEYS  unacked_index, unacked, deliveries, list..., and with a name a hash
# ARGV  tag, score or nothing, RPUSH (next to be taken) or LPUSH, message,
#       + to count a failed delivery, - to forget the count, or nothing; seconds to remember a count;
#       a name, to count in the hash that there is one more of it, or nothing
MOVE = Script(
    """
local lists = ARGV[7] == '' and #KEYS or #KEYS - 1
-- Errors now, when nothing has changed yet, if one of these is of a wrong type.
for i = 4, lists do redis.call('LLEN', KEYS[i]) end
if ARGV[7] ~= '' then redis.call('HGET', KEYS[#KEYS], ARGV[7]) end
local score = redis.call('ZSCORE', KEYS[1], ARGV[1])
if ARGV[2] ~= '' and score ~= ARGV[2] then return 0 end
if redis.call('HDEL', KEYS[2], ARGV[1]) == 0 then return 0 end
redis.call('ZREM', KEYS[1], ARGV[1])
for i = 4, lists do redis.call(ARGV[3], KEYS[i], ARGV[4]) end
if ARGV[7] ~= '' then redis.call('HINCRBY', KEYS[#KEYS], ARGV[7], 1) end
if ARGV[5] == '+' then
  redis.call('HINCRBY', KEYS[3], ARGV[1], 1)
  redis.call('EXPIRE', KEYS[3], ARGV[6])
elseif ARGV[5] == '-' then
  redis.call('HDEL', KEYS[3], ARGV[1])
end
return 1
"""
)
