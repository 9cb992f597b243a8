-- Every change of a campaign and of its recipients' states, each in one atomic step, by Redis's clock alone.
--
-- KEYS[1] is the campaign's hash, KEYS[2] the sorted set of campaigns that are not finished.
-- ARGV[1] names the operation, the rest are its arguments.
--
-- A recipient is a number and is in exactly one of the campaign's sorted sets, its state. The score is a time in
-- seconds: not before (pending), the claim's deadline (sending, data), when it happened (all others).
-- A call may be repeated when its reply was lost: the second one changes nothing and answers the same.

local campaign, active = KEYS[1], KEYS[2]
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000

local function key(part)
  return campaign .. ':' .. part
end

local function get(field)
  return redis.call('HGET', campaign, field)
end

local function score(state, number)
  local at = redis.call('ZSCORE', key(state), number)
  return at and tonumber(at)
end

local function owned(number, owner)
  return redis.call('HGET', key('owners'), number) == owner
end

local function move(number, from, to, at)
  if to == 'pending' then
    if get('state') == 'cancelled' then
      to, at = 'cancelled', now
    else
      -- Whoever dies now leaves a batch that the next check finds.
      redis.call('ZADD', key('batches'), 'NX', at, math.floor(number / get('batch_size')))
    end
  end
  redis.call('ZREM', key(from), number)
  redis.call('ZADD', key(to), at, number)
end

local operations = {}

-- A campaign that is due begins.
function operations.start()
  if get('state') == 'scheduled' then
    redis.call('HSET', campaign, 'state', 'sending', 'started_at', now)
  end
end

-- Hand out the batches that are due, each to one caller only, and not again for `lease` seconds.
function operations.take(limit, lease)
  if get('state') ~= 'sending' or tonumber(get('waiting_until') or 0) > now then
    return {}
  end
  local batches = redis.call('ZRANGEBYSCORE', key('batches'), '-inf', now, 'LIMIT', 0, limit)
  for _, batch in ipairs(batches) do
    redis.call('ZADD', key('batches'), now + lease, batch)
  end
  return batches
end

-- The recipients from first to last that may be sent to now: a hint, `claim` decides.
function operations.due(first, last)
  local numbers = {}
  if get('state') ~= 'sending' or tonumber(get('waiting_until') or 0) > now then
    return numbers
  end
  for number = first, last do
    local at = score('pending', number)
    if at and at <= now then
      table.insert(numbers, number)
    end
  end
  return numbers
end

-- pending -> sending. Answers the number of the attempt, 0 if the recipient is not to be had.
function operations.claim(number, owner, lease)
  if score('sending', number) and owned(number, owner) then
    return tonumber(redis.call('HGET', key('attempts'), number))
  end
  local at = score('pending', number)
  if get('state') ~= 'sending' or not at or at > now then
    return 0
  end
  move(number, 'pending', 'sending', now + lease)
  redis.call('HSET', key('owners'), number, owner)
  return redis.call('HINCRBY', key('attempts'), number, 1)
end

-- sending -> data, the last step before the mail's content leaves. Answers 0 if the claim is no longer the
-- owner's or the campaign was cancelled: then nothing may be sent.
function operations.begin_data(number, owner, lease)
  if not owned(number, owner) then
    return 0
  end
  if score('data', number) then
    return 1
  end
  if not score('sending', number) then
    return 0
  end
  if get('state') ~= 'sending' then
    move(number, 'sending', 'cancelled', now)
    return 0
  end
  move(number, 'sending', 'data', now + lease)
  return 1
end

-- The owner knows the outcome. Also after its claim expired in the data phase: a late answer is an answer.
function operations.settle(number, owner, to, delay, reply, refund)
  if not owned(number, owner) then
    return 0
  end
  for _, from in ipairs({'sending', 'data', 'ambiguous'}) do
    if from ~= to and score(from, number) then
      move(number, from, to, now + delay)
      redis.call('HSET', key('replies'), number, reply)
      if refund == '1' then
        redis.call('HINCRBY', key('attempts'), number, -1)
      end
      return 1
    end
  end
  return 1
end

-- When a worker has done what it could: the batch is due again when its first pending recipient is.
function operations.reschedule(batch, first, last)
  local next
  for number = first, last do
    local at = score('pending', number)
    if at and (not next or at < next) then
      next = at
    end
  end
  if next then
    redis.call('ZADD', key('batches'), next, batch)
  else
    redis.call('ZREM', key('batches'), batch)
  end
end

-- Claims whose worker is gone: before DATA nothing was sent, after it nobody knows.
function operations.expire(limit, most_attempts)
  local sending = redis.call('ZRANGEBYSCORE', key('sending'), '-inf', now, 'LIMIT', 0, limit)
  for _, number in ipairs(sending) do
    local attempts = tonumber(redis.call('HGET', key('attempts'), number))
    if attempts >= tonumber(most_attempts) then
      move(number, 'sending', 'failed', now)
      redis.call('HSET', key('replies'), number, 'the worker was lost in each of ' .. attempts .. ' attempts')
    else
      move(number, 'sending', 'pending', now)
    end
    redis.call('HDEL', key('owners'), number)
  end
  local data = redis.call('ZRANGEBYSCORE', key('data'), '-inf', now, 'LIMIT', 0, limit)
  for _, number in ipairs(data) do
    move(number, 'data', 'ambiguous', now)
    redis.call('HSET', key('replies'), number, 'the worker was lost after DATA')
  end
  return {#sending, #data}
end

-- The mail server is of no use now: no batch is handed out for a while.
function operations.wait(seconds, reason)
  if get('state') == 'sending' then
    redis.call('HSET', campaign, 'waiting_until', now + seconds, 'waiting_for', reason)
  end
end

-- Nothing that is not on its way leaves any more. Answers the state before, nil if there is no such campaign.
function operations.cancel(id)
  local state = get('state')
  if state == 'scheduled' or state == 'sending' then
    redis.call('HSET', campaign, 'state', 'cancelled')
    redis.call('HDEL', campaign, 'waiting_until', 'waiting_for')
    if redis.call('EXISTS', key('pending')) == 1 then
      redis.call('RENAME', key('pending'), key('cancelled'))
    end
    redis.call('DEL', key('batches'))
    redis.call('ZADD', active, now, id)
  end
  return state
end

-- Closes a campaign with nothing left to do, once. From here on nothing of it changes.
function operations.finish(id)
  local state = get('state')
  if (state ~= 'sending' and state ~= 'cancelled') or get('finished_at') then
    return 0
  end
  for _, open in ipairs({'pending', 'sending', 'data'}) do
    if redis.call('ZCARD', key(open)) > 0 then
      return 0
    end
  end
  for _, closed in ipairs({'sent', 'failed', 'ambiguous', 'cancelled'}) do
    redis.call('HSET', campaign, 'total_' .. closed, redis.call('ZCARD', key(closed)))
  end
  if state == 'sending' then
    redis.call('HSET', campaign, 'state', 'finished')
  end
  redis.call('HSET', campaign, 'finished_at', now)
  redis.call('HDEL', campaign, 'waiting_until', 'waiting_for')
  redis.call('DEL', key('owners'), key('batches'))
  redis.call('ZREM', active, id)
  return 1
end

return operations[ARGV[1]](unpack(ARGV, 2))
