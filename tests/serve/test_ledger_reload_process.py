"""SIGHUP to the real program, alone and with workers: another ledger, none, one that cannot be; another kind of log."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from ledger_kit import outcomes
from pgserver import PostgresServer
from serve_fakes import read_all
from serve_process import Process, running, until
from workers_kit import BODY, CHAT

from canal_trio.testing.scripts import Script, WaitFor, chat_stream
from canal_trio.testing.upstreams import ScriptedUpstream

MANY = 6  # streams, so that each of two workers has some, as good as always


class Reloaded:
    """A gateway, its file, and an upstream whose streams wait for `go` behind their first token."""

    def __init__(self, process: Process, folder: Path, upstream: ScriptedUpstream, go: trio.Event) -> None:
        self.process = process
        self.folder = folder
        self.upstream = upstream
        self.go = go
        self.clients: list[trio.SocketStream] = []

    def write(self, ledger: str, server: str = "") -> None:
        """The file. A model, so that a request is noted when its body is here."""
        (self.folder / "canal.toml").write_text(
            f'{server}{ledger}[[upstream]]\nname = "up"\nbase_url = "{self.upstream.base_url}"\n'
            '[[model]]\nname = "m"\nupstreams = ["up"]\n'
        )

    async def reload(self, ledger: str, server: str = "", *, says: str = "reloaded the configuration") -> None:
        """Write it, and have it read."""
        self.write(ledger, server)
        said = len(re.findall(says, self.process.said))
        self.process.signal(signal.SIGHUP)
        await self.process.saying(rf"(?:{says}[\s\S]*){{{said + 1}}}")

    async def streams(self, count: int = MANY) -> None:
        """Open streams, each with its first token."""
        for _ in range(count):
            client = await self.process.ask(await self.process.address(), CHAT, BODY)
            await until(client, b"word0")
            self.clients.append(client)

    async def upload(self) -> trio.SocketStream:
        """A client that has sent all of its request but the end."""
        client = await self.process.ask(await self.process.address(), CHAT, BODY + b" " * 9)
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
        await until(client, b"word0")
        self.clients.append(client)
        client = await self.process.connect(await self.process.address())
        await client.send_all(f"{head}content-length: {len(BODY)}\r\n\r\n".encode() + BODY[:-2])
        self.clients.append(client)
        return client

    async def end(self) -> None:
        """Let all streams end; the clients have them whole."""
        self.go.set()
        for client in self.clients:
            assert (await read_all(client)).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")

    async def has(self, **expected: dict[str, int]) -> None:
        """Wait until these ledgers have these rows: the files `a.db`, and so on."""
        with trio.fail_after(20):
            while (found := {name: dict(outcomes(self.file(name))) for name in expected}) != expected:  # noqa: ASYNC110
                await trio.sleep(0.05)
        assert found == expected

    def file(self, name: str) -> str:
        """Of a ledger."""
        return str(self.folder / f"{name}.db")

    def journals(self, name: str) -> list[str]:
        """Runs that are in a ledger's journal."""
        return os.listdir(self.folder / f"{name}.db.journal")

    async def metric(self, name: str) -> float | None:
        """Of the page; None if it is not there."""
        page = (await read_all(await self.process.ask(await self.process.admin(), "/metrics"))).decode()
        found = re.search(rf"^{name} (\S+)$", page, re.MULTILINE)
        return None if found is None else float(found[1])

    async def stops(self) -> None:
        """It drains, and nothing is left in any journal."""
        self.process.signal(signal.SIGTERM)
        assert await self.process.ended() == 0
        assert list(self.folder.glob("*.journal/*")) == []
        assert "Traceback" not in self.process.said


@asynccontextmanager
async def gateway(folder: Path, workers: int, ledger: str, server: str = "") -> AsyncIterator[Reloaded]:
    """It, with this in its file."""
    go, whole = trio.Event(), chat_stream(2)
    async with ScriptedUpstream(Script((*whole.steps[:3], WaitFor(go), *whole.steps[3:]))) as upstream:
        Reloaded(None, folder, upstream, go).write(ledger, server)  # type: ignore[arg-type]  # there is none yet
        async with running("--config", str(folder / "canal.toml"), "--workers", str(workers)) as process:
            await process.address()
            yield Reloaded(process, folder, upstream, go)


def ledger(name: str, more: str = "") -> str:
    """In the file."""
    return f'[ledger]\nfile = "{name}.db"\ninstance = "gw"\n{more}'


both = pytest.mark.parametrize("workers", [1, 2])


@both
async def test_another_ledger(tmp_path: Path, workers: int) -> None:
    """Streams, and a request that is still being uploaded, go on to their end and their rows in the old one; those that
    begin later have theirs in the new one; the old one is closed while the gateway goes on, and the page counts all."""
    async with gateway(tmp_path, workers, ledger("a")) as here:
        await here.streams()
        uploads = await here.upload()
        await here.has(a={"open": MANY + 1})
        await here.reload(ledger("b"))
        await here.streams()
        await uploads.send_all(BODY[-2:])
        await until(uploads, b"word0")
        await here.has(a={"open": MANY + 2}, b={"open": MANY})
        assert len(here.journals("a")) == len(here.journals("b")) == workers
        await here.end()
        await here.has(a={"completed": MANY + 2}, b={"completed": MANY})
        with trio.fail_after(20):
            while here.journals("a"):  # noqa: ASYNC110  # another process
                await trio.sleep(0.05)
        await here.process.saying(rf"(?:the ledger from before a reload has all of its rows[\s\S]*){{{workers}}}")
        assert await here.metric("canal_ledger_rows") == 2 * MANY + 2
        assert await here.metric("canal_ledger_backlog_bytes") == 0
        assert "restart" not in here.process.said
        await here.stops()


@both
async def test_a_ledger_that_is_turned_on_and_off(tmp_path: Path, workers: int) -> None:
    """What begins while it is on has its row, though it is off when that ends; what begins while it is off has none."""
    async with gateway(tmp_path, workers, "") as here:
        await here.streams()
        assert await here.metric("canal_ledger_rows") is None
        await here.reload(ledger("a"))
        await here.streams()
        await here.reload("")
        await here.streams()
        await here.has(a={"open": MANY})
        await here.end()
        await here.has(a={"completed": MANY})
        assert await here.metric("canal_ledger_rows") == MANY
        await here.stops()


@both
async def test_ledgers_that_are_replaced_while_their_streams_last(tmp_path: Path, workers: int) -> None:
    """One after the other, and the first one again; the gateway is told to stop then, and all streams end in time: in
    each there are its own rows, and none is interrupted."""
    async with gateway(tmp_path, workers, ledger("a")) as here:
        await here.streams()
        await here.reload(ledger("b"))
        await here.streams()
        await here.reload(ledger("a"))
        await here.streams()
        await here.has(a={"open": 2 * MANY}, b={"open": MANY})
        here.process.signal(signal.SIGTERM)
        await here.process.saying("draining")
        await here.end()
        assert await here.process.ended() == 0
        await here.has(a={"completed": 2 * MANY}, b={"completed": MANY})
        assert (here.journals("a"), here.journals("b")) == ([], [])
        assert "Traceback" not in here.process.said


@both
async def test_a_ledger_that_cannot_be_opened_is_refused(tmp_path: Path, workers: int) -> None:
    """It says why in one line; nothing else of that file is used; streams and the ledger are as before; and then a good
    file is taken."""
    (tmp_path / "j").symlink_to("nowhere/j")
    async with gateway(tmp_path, workers, ledger("a")) as here:
        await here.streams()
        bad = ledger("b", 'journal = "j"\n') + "[bounds]\nbody_bytes = 1\n"
        await here.reload(bad, says="the old one stays: the ledger's journal cannot be kept in .*/j: ")
        assert len(re.findall("cannot be kept", here.process.said)) == 1
        assert "reloaded" not in here.process.said
        assert await here.metric('canal_reloads_total{result="refused"}'.replace("{", r"\{")) == 1
        await here.streams()
        await here.has(a={"open": 2 * MANY})
        await here.reload(ledger("b"))
        await here.streams()
        await here.end()
        await here.has(a={"completed": 2 * MANY}, b={"completed": MANY})
        await here.stops()


async def test_postgresql_instead(tmp_path: Path) -> None:
    """From a file to PostgreSQL, with a journal in the same folder: to each its own."""
    journal = f'journal = "{tmp_path}/a.db.journal"\n'
    server = PostgresServer()
    try:
        server.start()
        async with gateway(tmp_path, 1, ledger("a")) as here:
            await here.streams()
            await here.reload(f'[ledger]\npostgres = "{server.url}"\ninstance = "gw"\n{journal}')
            await here.streams()
            assert len(here.journals("a")) == 2
            await here.end()
            await here.has(a={"completed": MANY})
            await here.stops()
        assert outcomes(server.url) == {"completed": MANY}
    finally:
        server.close()


@both
async def test_another_kind_of_log(tmp_path: Path, workers: int) -> None:
    """From the reload on the access log, the messages of the process that serves and those of its parent are JSON; and
    back again; with nothing else changed."""
    async with gateway(tmp_path, workers, "") as here:
        here.go.set()
        await here.streams(1)
        await here.process.saying(r" POST /v1/chat/completions 200 completed ")
        before = len(here.process.said)
        await here.reload("", '[server]\nlog = "json"\n')
        await here.streams()
        with trio.fail_after(20):
            while here.process.said.count('"kind":"exchange"') < MANY:  # noqa: ASYNC110  # it comes in pieces
                await trio.sleep(0.02)
        lines = [json.loads(line) for line in here.process.said[before:].splitlines()]
        assert Counter(line["kind"] for line in lines) == {"exchange": MANY, "log": 1}
        assert [line["message"] for line in lines if line["kind"] == "log"] == ["reloaded the configuration"]
        await here.reload("", says=r"info: reloaded the configuration")
        await here.streams(1)
        await here.process.saying(r"(?: POST /v1/chat/completions 200 completed [\s\S]*){2}")
        await here.reload("", '[server]\nlog = "json"\n', says=r'"message":"reloaded the configuration"')
        before = len(here.process.said)
        await here.stops()
        last = [json.loads(line)["message"] for line in here.process.said[before:].splitlines()]
        stopped = [f"worker {number + 1}: stopped" if workers > 1 else "stopped" for number in range(workers)]
        assert {*stopped, "stopped"} <= {message.partition(": every")[0] for message in last}
