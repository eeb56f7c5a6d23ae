"""What is over is freed at once: nothing of an exchange waits for the garbage collector.

The collector hardly ever looks (its thresholds are raised, for it took a fifth of the time with 500 streams), so a
circle of references per connection is memory that grows for hours.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator

import pytest
from kit import chat, eventually, request, scene

from canal_trio.settings import Deadlines
from canal_trio.testing.scripts import Script, Stall, chat_stream, cut_after, reply

ROUNDS = 5


@pytest.fixture
def uncollected() -> Iterator[Counter[str]]:
    """Filled by the test's end with what only the collector would have freed, of ours, by its type."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    yield found
    gc.enable()


def look(found: Counter[str]) -> None:
    """Collect by hand, and count what there was."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        for thing in gc.garbage:
            module = type(thing).__module__
            if module.startswith("canal_trio.") and not module.startswith("canal_trio.testing"):
                found[type(thing).__qualname__] += 1
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


# What the upstream does, what is asked, and what is read before the client leaves (None: all there is).
WAYS = {
    "a stream": (chat_stream(3), chat(), b"0\r\n\r\n"),
    "a document": (reply(b'{"a": 1}'), request("GET", "/v1/models"), b'{"a": 1}'),
    "a cut stream": (cut_after(chat_stream(3), 2), chat(), None),
    "no answer": (Script((Stall(),)), chat(), b'"error"'),
    "a client that leaves": (cut_after(chat_stream(3), 2, Stall()), chat(), b"word0"),
    "a refused head": (reply(b"x"), b"GET / HTTP/1.1\r\n\r\n", None),
    "an upload": (reply(b"{}"), request("POST", "/v1/files", b"x" * 300_000), b"{}"),
}


@pytest.mark.parametrize("way", WAYS)
async def test_memory_grows_with_every_connection(way: str, uncollected: Counter[str]) -> None:
    """However an exchange ends, its objects and those of both its connections are freed without a collection."""
    script, asked, mark = WAYS[way]
    async with scene(script, deadlines=Deadlines(first_byte=0.1, upstream_keep_alive=0.1)) as (_, gateway):
        for number in range(1, ROUNDS + 1):
            client = await gateway.connect()
            await client.send(asked)
            await (client.rest() if mark is None else client.until(mark))
            client.fin()
            await gateway.records.wait(number)
        statistics = gateway.gateway.statistics
        await eventually(lambda: statistics().connections == 0)
        await eventually(lambda: all(pool.idle == 0 for pool in statistics().pools.values()))
        look(uncollected)
    assert uncollected == {}
