"""What the tests of limits in Redis share: scopes, a worker's store, and what Redis has of a scope."""

from __future__ import annotations

import itertools
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
from redis_server import RedisServer

from canal_trio.policy.ratelimit import Rule
from canal_trio.policy.scopes import Scope
from canal_trio.quota.memory import MemoryStore
from canal_trio.quota.redis import RedisStore
from canal_trio.quota.table import Table, table_bytes
from canal_trio.settings import Limit, LimitStore

__all__ = ["NAMES", "back", "fields", "in_flight", "scope", "store"]

NAMES = itertools.count()


def scope(limit: Limit, name: str | None = None) -> Scope:
    """A scope by a name that no other test has."""
    return Scope(name or f"n{next(NAMES)}", Rule(limit), "total", "this gateway")


@asynccontextmanager
async def store(server: RedisServer, *, waits: bool = True, **options: Any) -> AsyncIterator[RedisStore]:
    """A worker's store at this server. `waits` is how long an answer may take on a busy machine."""
    chosen = LimitStore(redis=server.url, timeout=options.pop("timeout", 5.0 if waits else 0.1), **options)
    made = RedisStore(chosen, MemoryStore(Table(bytearray(table_bytes(64, 1)))))
    async with trio.open_nursery() as nursery:
        await nursery.start(made.run)
        yield made
        await made.flush()
        nursery.cancel_scope.cancel()


async def back(here: RedisStore) -> None:
    """Wait until Redis is asked again."""
    with trio.fail_after(20):
        while here.away:  # noqa: ASYNC110  # a real server's start
            await trio.sleep(0.01)


def fields(server: RedisServer, one: Scope, prefix: str = "canal") -> dict[str, float]:
    """What Redis has of a scope."""
    words = re.findall(rb"\$\d+\r\n([^\r]*)\r\n", server.command("HGETALL", f"{{{prefix}}}:{one.id}"))
    return {key.decode(): float(value) for key, value in zip(words[::2], words[1::2], strict=True)}


def in_flight(server: RedisServer, one: Scope, prefix: str = "canal") -> int:
    """Exchanges in flight in a scope, all workers together."""
    return int(sum(value for key, value in fields(server, one, prefix).items() if key.startswith("s:")))
