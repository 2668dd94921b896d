"""A real redis-server, started for the purpose, driven by redis-py."""

from __future__ import annotations

from bench.peers.protocol import System

_PEER = "bench.peers.redis.peer"

SYSTEMS = (
    System("redis-tcp", "Redis (TCP)", f"{_PEER}:RedisPeer"),
    System("redis-unix", "Redis (Unix socket)", f"{_PEER}:RedisPeer"),
    System("redis-plain", "Redis (Unix socket, without hiredis)", f"{_PEER}:RedisPeer"),
    System("redis-pipelined", "Redis (Unix socket, pipelined)", f"{_PEER}:PipelinedPeer"),
    System("redis-async", "Redis (Unix socket, asyncio client)", f"{_PEER}:AsyncRedisPeer"),
    System("redis-aof", "Redis (Unix socket, AOF)", f"{_PEER}:RedisPeer"),
)
