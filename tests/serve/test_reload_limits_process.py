"""SIGHUP to the real program, alone and with workers: another place where limits are counted, while streams last."""

from __future__ import annotations

import json
import pathlib
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from redis_server import RedisServer, redis_server
from serve_fakes import read_all
from serve_process import Process, running, until
from workers_kit import BODY, CHAT

from canal_trio.serve.counting import Counting
from canal_trio.settings import LimitStore, Settings
from canal_trio.testing.scripts import Script, WaitFor, chat_stream
from canal_trio.testing.upstreams import ScriptedUpstream

pytestmark = pytest.mark.real


class Gateway:
    """The program, before an upstream whose streams wait for `go` after their first token."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.file = folder / "canal.toml"
        self.reloads = self.refusals = 0
        self.go = trio.Event()
        self.base_url = ""
        self.process: Process

    def write(self, limits: str, more: str) -> None:
        """The file: `[limits]` with these lines, and more."""
        upstream = f'[[upstream]]\nname = "up"\nbase_url = "{self.base_url}"\n'
        self.file.write_text(f"[limits]\n{limits}\n{more}{upstream}")

    async def reload(self, limits: str, more: str) -> None:
        """With another file; until it is used."""
        self.write(limits, more)
        self.reloads += 1
        self.process.signal(signal.SIGHUP)
        await self.process.saying(rf"(?:reloaded the configuration[\s\S]*){{{self.reloads}}}")

    async def refused(self, limits: str, more: str) -> str:
        """With a file that is refused: why."""
        self.write(limits, more)
        self.refusals += 1
        self.process.signal(signal.SIGHUP)
        await self.process.saying(rf"(?:the old one stays: [\s\S]*){{{self.refusals}}}")
        return re.findall(r"the old one stays: (.*)", self.process.said)[-1]

    async def begin(self) -> trio.SocketStream | bytes:
        """A stream whose first token is here, or what it was told instead."""
        client = await self.process.ask(await self.process.address(), CHAT, BODY)
        data = b""
        with trio.fail_after(20):
            while b"word0" not in data:
                piece = await client.receive_some()
                if not piece:
                    return data
                data += piece
        return client

    async def stream(self) -> trio.SocketStream:
        """A stream that was let in."""
        client = await self.begin()
        assert not isinstance(client, bytes), client
        return client

    async def spend(self) -> None:
        """A stream to its end, once it is accounted for."""
        assert b"[DONE]" in await read_all(await self.process.ask(await self.process.address(), CHAT, BODY))
        await self.settled()

    async def metric(self, name: str) -> float:
        """A sample of the admin page."""
        page = await read_all(await self.process.ask(await self.process.admin(), "/metrics"))
        found = re.search(rf"^{name} (\S+)$", page.decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    async def settled(self) -> None:
        """Wait until nothing is in flight."""
        with trio.fail_after(20):
            while await self.metric("canal_exchanges_in_flight"):  # noqa: ASYNC110  # a page has to be asked for
                await trio.sleep(0.05)

    async def stop(self) -> None:
        """A clean end."""
        self.process.signal(signal.SIGTERM)
        assert await self.process.ended() == 0
        assert "Traceback" not in self.process.said


@asynccontextmanager
async def gateway(folder: pathlib.Path, workers: int, limits: str, more: str) -> AsyncIterator[Gateway]:
    """It runs, and accepts."""
    here = Gateway(folder)
    whole = chat_stream(2)
    async with ScriptedUpstream(Script((*whole.steps[:3], WaitFor(here.go), *whole.steps[3:]))) as upstream:
        here.base_url = upstream.base_url
        here.write(limits, more)
        async with running("--config", str(here.file), "--workers", str(workers)) as here.process:
            await here.process.address()
            yield here


def hashes(server: RedisServer, prefix: str) -> dict[str, int]:
    """What Redis has of all scopes of a prefix, added up by the kind of the field."""
    found: dict[str, int] = {}
    for key in re.findall(rb"\{%s\}:\S+" % prefix.encode(), server.command("KEYS", f"{{{prefix}}}:*")):
        if b":worker" not in key:
            words = re.findall(rb"\$\d+\r\n([^\r]*)\r\n", server.command("HGETALL", key.decode()))
            for name, value in zip(words[::2], words[1::2], strict=True):
                kind = name.decode().partition(":")[0]
                found[kind] = found.get(kind, 0) + int(float(value))
    return found


@pytest.mark.parametrize("workers", [1, 2])
async def test_streams_settle_where_they_were_let_in(tmp_path: pathlib.Path, workers: int) -> None:
    """Memory, then Redis, then Redis under another prefix, then memory again, with a stream from each of them still in
    flight: the next ones are counted in the new place, those from before end untouched and are settled in theirs."""
    limit = "[[limit]]\nstreams = 1\n"
    with redis_server(tmp_path) as server:
        async with gateway(tmp_path, workers, "", limit) as here:
            streams = [await here.stream()]
            for prefix in ("one", "two"):
                await here.reload(f'redis = "{server.url}"\nprefix = "{prefix}"\ntimeout = 5', limit)
                streams.append(await here.stream())
                refusal = await here.begin()
                assert isinstance(refusal, bytes), "the new place counts"
                assert b"rate_limit_exceeded" in refusal
                assert hashes(server, prefix)["s"] == 1
            await here.reload("", limit)
            assert isinstance(await here.begin(), bytes), "memory has its own in flight all the time"
            assert await here.metric("canal_limit_store_away") == 0
            assert hashes(server, "one")["s"] == hashes(server, "two")["s"] == 1
            here.go.set()
            for client in streams:
                assert b"[DONE]" in await until(client, b"[DONE]")
            await here.settled()
            with trio.fail_after(20):
                while server.command("CLIENT", "LIST").count(b" laddr=") > 1:  # noqa: ASYNC110  # another process
                    await trio.sleep(0.05)
            assert hashes(server, "one").get("s", 0) == hashes(server, "two").get("s", 0) == 0
            await here.stream()
            assert "is away" not in here.process.said
            await here.stop()


BUDGET = '[[limit]]\nspend_per_month = 2.5\n[[price]]\nmodel = "*"\nrequest = 1.0\n'


def spent(file: pathlib.Path) -> float:
    """What the file says was spent this month, in all."""
    return sum(row[3] for row in json.loads(file.read_text())["spent"].values()) / 10**9


@pytest.mark.parametrize("workers", [1, 2])
async def test_another_file_gives_no_budget_back(tmp_path: pathlib.Path, workers: int) -> None:
    """What was spent counts on in the new file, which has it before the reload is told; one that is damaged or
    another's refuses the reload with one line, and the budget goes on as it was."""
    first, second, third = (tmp_path / f"{name}.json" for name in "abc")
    async with gateway(tmp_path, workers, 'state = "a.json"', BUDGET) as here:
        here.go.set()
        await here.spend()
        await here.reload('state = "b.json"', BUDGET)
        assert spent(first) == spent(second) == 1
        Counting(Settings(limit_store=LimitStore(state=str(first)))).close()
        other = Counting(Settings(limit_store=LimitStore(state=str(third))))
        assert "c.json is in use by another gateway" in await here.refused('state = "c.json"', BUDGET)
        other.close()
        third.write_text("{")
        assert "c.json is not what this gateway wrote" in await here.refused('state = "c.json"', BUDGET)
        assert third.read_text() == "{"
        for _ in range(2):
            await here.spend()
        refusal = await here.begin()
        assert isinstance(refusal, bytes)
        assert b"insufficient_quota" in refusal
        await here.stop()
    assert (spent(first), spent(second)) == (1, 3)


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_stream_from_before_is_billed_in_the_new_file(tmp_path: pathlib.Path, workers: int) -> None:
    """Its cost, unknown until it ends, is in the file that there is by then, though two reloads lie in between."""
    async with gateway(tmp_path, workers, 'state = "a.json"', BUDGET) as here:
        client = await here.stream()
        await here.reload('state = "b.json"\nfail = "open"', BUDGET)
        await here.reload('state = "c.json"\noutput_tokens = 5', BUDGET)
        here.go.set()
        assert b"[DONE]" in await until(client, b"[DONE]")
        await here.settled()
        await here.stop()
    assert spent(tmp_path / "c.json") == 1


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_redis_that_is_not_there_is_away(tmp_path: pathlib.Path, workers: int) -> None:
    """As at the start: the reload is done, the log says what is done meanwhile, and a reload back is as well."""
    async with gateway(tmp_path, workers, "", "[[limit]]\nstreams = 1\n") as here:
        client = await here.stream()
        await here.reload(f'redis = "unix://{tmp_path}/none.sock"\nfail = "closed"', "[[limit]]\nstreams = 1\n")
        await here.process.saying(r"limits: Redis is away \(.*\): nothing is let in until it is back")
        refusal = await here.begin()
        assert isinstance(refusal, bytes)
        assert b"limits_unavailable" in refusal
        assert await here.metric("canal_limit_store_away") == workers
        await here.reload("", "[[limit]]\nstreams = 2\n")
        assert await here.metric("canal_limit_store_away") == 0
        await here.stream()
        here.go.set()
        assert b"[DONE]" in await until(client, b"[DONE]")
        await here.stop()
