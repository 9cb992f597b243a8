-- Every change of a campaign and of its recipients' states, each in one atomic step, by Redis's clock alone.
--
-- KEYS[1] is the campaign's hash, KEYS[2] the sorted set of campaigns that are not finished, KEYS[3] that of all
-- campaigns, KEYS[4] that of the ambiguous recipients of all campaigns as CAMPAIGN/NUMBER.
-- ARGV[1] names the operation, ARGV[2] is "confirm" if the caller waits for replicas, the rest are its arguments.
--
-- A recipient is a number and is in exactly one of the campaign's sorted sets, its state. The score is a time in
-- seconds: not before (pending), the claim's deadline (sending, data), when it happened (all others).
-- A call may be repeated when its reply was lost: the second one changes nothing and answers the same.

local campaign, active, index, ambiguous = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local id = string.match(campaign, '[^:]+$')
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

-- What becomes of a recipient that a cancelled campaign has not sent to: of a mail that was to be sent a second time
-- nobody knows whether the first one arrived.
local function never(number)
  return score('resent', number) and 'ambiguous' or 'cancelled'
end

local function move(number, from, to, at)
  -- First what needs no memory: Redis then lets the rest of the script pass even when it is full.
  redis.call('ZREM', key(from), number)
  if to == 'pending' then
    local state = get('state')
    if state == 'cancelled' then
      to, at = never(number), now
    else
      if state == 'finished' then
        redis.call('HSET', campaign, 'state', 'sending')
        redis.call('HDEL', campaign, 'finished_at')
        redis.call('ZADD', active, now, id)
      end
      -- Whoever dies now leaves a batch that the next check finds.
      redis.call('ZADD', key('batches'), 'NX', at, math.floor(number / get('batch_size')))
    end
  end
  redis.call('ZADD', key(to), at, number)
  if from == 'ambiguous' then
    redis.call('ZREM', ambiguous, id .. '/' .. number)
  end
  if to == 'ambiguous' then
    redis.call('ZADD', ambiguous, at, id .. '/' .. number)
  end
end

-- Send once more what may have been sent; it is listed for ever.
local function resend(number, at)
  redis.call('ZADD', key('resent'), now, number)
  move(number, 'ambiguous', 'pending', at)
  redis.call('HDEL', key('owners'), number)
end

-- The ambiguous recipients that the campaign's policy sends to a second time, never a third: up to `limit` of those
-- that are in doubt since `before`.
local function in_doubt_since(before, limit)
  local found = {}
  if get('ambiguous') ~= 'resend' or get('state') ~= 'sending' then
    return found
  end
  local most = limit + redis.call('ZCARD', key('resent'))
  for _, number in ipairs(redis.call('ZRANGEBYSCORE', key('ambiguous'), '-inf', before, 'LIMIT', 0, most)) do
    if #found < limit and not score('resent', number) then
      table.insert(found, number)
    end
  end
  return found
end

local function open()
  for _, state in ipairs({'pending', 'sending', 'data'}) do
    if redis.call('ZCARD', key(state)) > 0 then
      return true
    end
  end
  return #in_doubt_since('+inf', 1) > 0
end

local operations = {}

-- Write recipients `first` and on of a campaign that nobody sees yet. `token` is the creator's own.
function operations.upload(token, seconds, due, batch_size, first, ...)
  if redis.call('HSETNX', campaign, 'token', token) == 0 and get('token') ~= token then
    return 'taken'
  end
  if get('state') then
    return 'published'
  end
  for offset, row in ipairs({...}) do
    local number = first + offset - 1
    redis.call('HSET', key('recipients'), number, row)
    redis.call('ZADD', key('pending'), due, number)
    redis.call('ZADD', key('batches'), due, math.floor(number / batch_size))
  end
  for _, part in ipairs({campaign, key('recipients'), key('pending'), key('batches')}) do
    redis.call('EXPIRE', part, seconds)
  end
  return 'uploaded'
end

-- Let everybody see a campaign, if all of it is there: an upload may be cut in two by a failover.
function operations.publish(token, size, due, ...)
  if get('token') ~= token then
    return 'lost'
  end
  if get('state') then
    return 'published'
  end
  if redis.call('ZCARD', key('pending')) ~= tonumber(size) then
    return 'lost'
  end
  redis.call('HSET', campaign, 'state', 'scheduled', 'size', size, 'send_at', due, 'created_at', now, ...)
  for _, part in ipairs({campaign, key('recipients'), key('pending'), key('batches')}) do
    redis.call('PERSIST', part)
  end
  redis.call('ZADD', index, now, id)
  redis.call('ZADD', active, due, id)
  return 'published'
end

-- A campaign that is due begins.
function operations.start()
  if get('state') == 'scheduled' then
    redis.call('HSET', campaign, 'state', 'sending', 'started_at', now)
  end
end

-- Hand out the batches that are due, each to one caller only, and not again for `lease` seconds. `taker` is one call's
-- own.
function operations.take(taker, limit, lease)
  local batches = {}
  local last, taken = string.match(get('taken') or '', '^(%S+)(.*)$')
  if last == taker then
    for batch in string.gmatch(taken, '%S+') do
      table.insert(batches, batch)
    end
    return batches
  end
  if get('state') ~= 'sending' or tonumber(get('waiting_until') or 0) > now then
    return batches
  end
  batches = redis.call('ZRANGEBYSCORE', key('batches'), '-inf', now, 'LIMIT', 0, limit)
  for _, batch in ipairs(batches) do
    redis.call('ZADD', key('batches'), now + lease, batch)
  end
  if #batches > 0 then
    redis.call('HSET', campaign, 'taken', taker .. ' ' .. table.concat(batches, ' '))
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
    move(number, 'sending', never(number), now)
    return 0
  end
  move(number, 'sending', 'data', now + lease)
  return 1
end

-- The owner knows the outcome. Also after its claim expired in the data phase, and after the campaign was finished: a
-- late answer is an answer.
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
-- Then what the policy sends again, once it was in doubt for `patience` seconds.
function operations.expire(limit, most_attempts, patience)
  local sending = redis.call('ZRANGEBYSCORE', key('sending'), '-inf', now, 'LIMIT', 0, limit)
  for _, number in ipairs(sending) do
    local attempts = tonumber(redis.call('HGET', key('attempts'), number))
    if attempts >= tonumber(most_attempts) then
      move(number, 'sending', 'failed', now)
      redis.call('HSET', key('replies'), number, 'the worker or Redis was lost in each of ' .. attempts .. ' attempts')
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
  local doubtful = in_doubt_since(now - patience, tonumber(limit))
  for _, number in ipairs(doubtful) do
    resend(number, now)
  end
  return {#sending, #data, #doubtful}
end

-- Somebody decided about ambiguous recipients: `to` is sent or pending. Answers those that are as decided now, nil
-- if the campaign was cancelled and sends nothing again.
function operations.resolve(to, reply, ...)
  if to == 'pending' and get('state') == 'cancelled' then
    return nil
  end
  local resolved = {}
  for _, number in ipairs({...}) do
    if score('ambiguous', number) then
      if to == 'pending' then
        resend(number, now)
        redis.call('HDEL', key('attempts'), number)
      else
        move(number, 'ambiguous', to, now)
        redis.call('HDEL', key('owners'), number)
      end
      redis.call('HSET', key('replies'), number, reply)
      table.insert(resolved, number)
    elseif score(to == 'pending' and 'resent' or to, number) then
      table.insert(resolved, number)
    end
  end
  return resolved
end

-- The number of recipients in each of these states. Here, because Redis refuses MULTI when it is full.
function operations.counts(...)
  local counts = {}
  for _, state in ipairs({...}) do
    table.insert(counts, redis.call('ZCARD', key(state)))
  end
  return counts
end

-- Whether any recipient may still change without anybody's decision.
function operations.open()
  return open() and 1 or 0
end

-- The mail server is of no use now: no batch is handed out for a while.
function operations.wait(seconds, reason)
  if get('state') == 'sending' then
    redis.call('HSET', campaign, 'waiting_until', now + seconds, 'waiting_for', reason)
  end
end

-- Nothing that is not on its way leaves any more. Answers the state before, nil if there is no such campaign.
function operations.cancel()
  local state = get('state')
  if state == 'scheduled' or state == 'sending' then
    redis.call('HSET', campaign, 'state', 'cancelled')
    redis.call('HDEL', campaign, 'waiting_until', 'waiting_for')
    for _, number in ipairs(redis.call('ZRANGE', key('resent'), 0, -1)) do
      if score('pending', number) then
        move(number, 'pending', 'ambiguous', now)
      end
    end
    if redis.call('EXISTS', key('pending')) == 1 then
      redis.call('RENAME', key('pending'), key('cancelled'))
    end
    redis.call('DEL', key('batches'))
    redis.call('ZADD', active, now, id)
  end
  return state
end

-- Closes a campaign with nothing left to do, once. Only a late answer or a decision changes it from here on.
function operations.finish()
  local state = get('state')
  if (state ~= 'sending' and state ~= 'cancelled') or get('finished_at') or open() then
    return 0
  end
  if state == 'sending' then
    redis.call('HSET', campaign, 'state', 'finished')
  end
  redis.call('HSET', campaign, 'finished_at', now)
  redis.call('HDEL', campaign, 'waiting_until', 'waiting_for', 'taken')
  local late = {}
  for _, number in ipairs(redis.call('ZRANGE', key('ambiguous'), 0, -1)) do
    late[number] = redis.call('HGET', key('owners'), number) or nil
  end
  redis.call('DEL', key('owners'), key('batches'))
  for number, owner in pairs(late) do
    redis.call('HSET', key('owners'), number, owner)
  end
  redis.call('ZREM', active, id)
  return 1
end

-- Forgets a campaign if each of its recipients is settled, whether or not `finish` was called yet; `...` are the
-- states. Answers "deleted", or what keeps it: "open" or "ambiguous"; in how many seconds the last claim expires; and
-- how many recipients there are, or were, in each state: none, if a call is repeated.
function operations.delete(...)
  if not get('state') then
    return {'deleted', 0, unpack(operations.counts(...))}
  end
  operations.finish()
  local counts = operations.counts(...)
  if not get('finished_at') then
    local last = now
    for _, state in ipairs({'sending', 'data'}) do
      local claim = redis.call('ZRANGE', key(state), -1, -1, 'WITHSCORES')
      last = math.max(last, tonumber(claim[2] or 0))
    end
    return {'open', math.ceil(last - now), unpack(counts)}
  end
  if redis.call('EXISTS', key('ambiguous')) == 1 then
    return {'ambiguous', 0, unpack(counts)}
  end
  redis.call('ZREM', index, id)
  for _, part in ipairs({'recipients', 'attempts', 'owners', 'replies', 'batches', 'resent', ...}) do
    redis.call('UNLINK', key(part))
  end
  redis.call('UNLINK', campaign)
  return {'deleted', 0, unpack(counts)}
end

local answer = operations[ARGV[1]](unpack(ARGV, 3))
if ARGV[2] == 'confirm' and redis.call('EXISTS', campaign) == 1 then
  -- From Redis 7.2 on WAIT waits for this connection's own writes alone, and a repeated call has none.
  redis.call('HSET', campaign, 'confirmed', now)
end
return answer
