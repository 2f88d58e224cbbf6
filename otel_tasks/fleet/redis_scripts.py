"""The steps that Redis executes atomically: Lua scripts, which read only the server's clock.

Commands call a script by its hash. A server that does not know it, as after a restart, gets its source.
"""

from __future__ import annotations

import hashlib
from typing import Final

_NOW = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local function text(number) return string.format('%.0f', number) end
"""

_OWNED = """
local function is_owned(claim, owner) return claim and string.sub(claim, 1, #owner) == owner end
"""


# The source of each script, by its hash.
SOURCES: Final[dict[str, str]] = {}


class Script:
    """A script, and its commands.

    Args:
        source: Its source.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        # The name that Redis gives to a script; it protects nothing.
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
        SOURCES[self.sha] = source

    def __call__(self, *keys: str, args: tuple[str | bytes | int, ...] = ()) -> tuple[str | bytes | int, ...]:
        """Return the command that executes it."""
        return ("EVALSHA", self.sha, len(keys), *keys, *args)


# log; seconds kept. Trims old entries, which gives a full server some memory back.
TRIM: Final = Script(
    _NOW
    + """
redis.call('XTRIM', KEYS[1], 'MINID', '~', text(now - ARGV[1] * 1000))
"""
)

# log; payload, seconds kept. Returns the id. A log without new entries expires after twice that time.
PUBLISH: Final = Script(
    _NOW
    + """
local kept = ARGV[2] * 1000
local id = redis.call('XADD', KEYS[1], 'MINID', '~', text(now - kept), '*', 'e', ARGV[1])
redis.call('PEXPIRE', KEYS[1], text(kept * 2))
return id
"""
)

# log; the position before the first entry, how many. Returns the time, the id and the length of each entry in
# one text, and their contents in another: redis-py's parser in Python takes 20 us for an entry of a stream.
CATCH_UP: Final = Script(
    """
local heads, contents, size = {}, {}, 0
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', ARGV[2])) do
    local fields, content = entry[2], ''
    for i = 1, #fields, 2 do
        if fields[i] == 'e' then content = fields[i + 1] end
    end
    heads[#heads + 1] = entry[1] .. ' ' .. #content
    contents[#contents + 1] = content
    size = size + #content
    if size > 4000000 then break end
end
return {redis.call('TIME'), table.concat(heads, ' '), table.concat(contents)}
"""
)

# nodes, seen; node, description, seconds to live, seconds kept. Removes the nodes that have expired.
ANNOUNCE: Final = Script(
    _NOW
    + """
local gone = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', text(now), 'LIMIT', 0, 100)
if #gone > 0 then
    redis.call('HDEL', KEYS[1], unpack(gone))
    redis.call('ZREM', KEYS[2], unpack(gone))
end
redis.call('ZADD', KEYS[2], text(now + ARGV[3] * 1000), ARGV[1])
redis.call('HSET', KEYS[1], ARGV[1], text(now) .. ' ' .. ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('EXPIRE', KEYS[2], ARGV[4])
"""
)

# nodes, seen. Returns the time, the live nodes, and all nodes with the times of their announcements.
ROSTER: Final = Script(
    _NOW
    + """
local live = redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. text(now), '+inf')
return {text(now), live, redis.call('HGETALL', KEYS[1])}
"""
)

# An inbox for each entry of a stream; entries to keep, seconds to live, and for each entry how many payloads,
# and these. They are fields of one entry, because reading ten entries takes three times as long.
SEND: Final = Script(
    """
local at = 3
for _, inbox in ipairs(KEYS) do
    local fields = {}
    for n = 1, ARGV[at] do
        fields[2 * n - 1] = 'e'
        fields[2 * n] = ARGV[at + n]
    end
    redis.call('XADD', inbox, 'MAXLEN', '~', ARGV[1], '*', unpack(fields))
    redis.call('EXPIRE', inbox, ARGV[2])
    at = at + 1 + ARGV[at]
end
"""
)

# For each claim its key, and that of its mark; milliseconds, and for each claim its owner and delivery.
# Returns one letter for each: taken, held, or done.
CLAIM: Final = Script(
    """
local answers = {}
for n = 1, #KEYS / 2 do
    if redis.call('EXISTS', KEYS[2 * n]) == 1 then
        answers[n] = 'd'
    elseif redis.call('SET', KEYS[2 * n - 1], ARGV[n + 1], 'NX', 'PX', ARGV[1]) then
        answers[n] = 't'
    else
        answers[n] = 'h'
    end
end
return table.concat(answers)
"""
)

# For each claim its key, and that of its mark; owner, milliseconds. The mark first: a server that is full
# refuses it, and the claim stays.
FINISH: Final = Script(
    _OWNED
    + """
for i = 1, #KEYS, 2 do
    redis.call('SET', KEYS[i + 1], '', 'PX', ARGV[2])
    if is_owned(redis.call('GET', KEYS[i]), ARGV[1]) then redis.call('DEL', KEYS[i]) end
end
"""
)

# claim; owner.
RELEASE: Final = Script(
    _OWNED
    + """
if is_owned(redis.call('GET', KEYS[1]), ARGV[1]) then redis.call('DEL', KEYS[1]) end
"""
)

# lease, then claim and done of each claim; owner, milliseconds, whether to renew the lease, the deliveries.
# Returns the numbers of the claims that others hold. On a server that is full, PEXPIRE works, and SET fails
# if it is the first write of a script: a valid lease can be renewed, and a new one is refused.
RENEW: Final = Script(
    _OWNED
    + """
local lost = {}
if ARGV[3] == '1' then
    if redis.call('EXISTS', KEYS[1]) == 1 then
        redis.call('PEXPIRE', KEYS[1], ARGV[2])
    else
        redis.call('SET', KEYS[1], '', 'PX', ARGV[2])
    end
end
for i = 2, #KEYS, 2 do
    local claim = redis.call('GET', KEYS[i])
    if is_owned(claim, ARGV[1]) then
        redis.call('PEXPIRE', KEYS[i], ARGV[2])
    elseif claim then
        lost[#lost + 1] = i / 2
    elseif redis.call('EXISTS', KEYS[i + 1]) == 0 then
        redis.call('SET', KEYS[i], ARGV[1] .. ARGV[3 + i / 2], 'PX', ARGV[2])
    end
end
return lost
"""
)
