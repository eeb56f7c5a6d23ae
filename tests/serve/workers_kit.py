"""A gateway with two workers, as real processes."""

from __future__ import annotations

import json
import os
import pathlib
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import trio
from serve_fakes import read_all
from serve_process import Process, running, until

from canal_trio.testing.scripts import Script, WaitFor, chat_stream
from canal_trio.testing.upstreams import ScriptedUpstream

CHAT = "/v1/chat/completions"
BODY = b'{"model": "m", "stream": true, "messages": []}'
MOST = 64  # clients until both workers have some: fewer with a probability of 2 to the -63


class Workers:
    """A gateway with two workers before an upstream whose streams wait for `go` after their first token."""

    def __init__(self, process: Process, upstream: ScriptedUpstream, go: trio.Event) -> None:
        self.process = process
        self.upstream = upstream
        self.go = go

    @property
    def pids(self) -> list[int]:
        """The processes of the workers of now."""
        tasks = pathlib.Path(f"/proc/{self.process.process.pid}/task")  # a child is its thread's
        return sorted(int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split())

    async def page(self, path: str) -> bytes:
        """An admin page."""
        data = await read_all(await self.process.ask(await self.process.admin(), path))
        head, _, body = data.partition(b"\r\n\r\n")
        assert head.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 503 ")), head
        return body

    async def metric(self, sample: str) -> float:
        """A sample of the merged page; 0 if it is not there."""
        for line in (await self.page("/metrics")).decode().splitlines():
            if line.startswith(f"{sample} "):
                return float(line.rpartition(" ")[2])
        return 0.0

    async def reaches(self, sample: str, value: float) -> None:
        """Wait until a sample has this value."""
        with trio.fail_after(20):
            while await self.metric(sample) != value:  # noqa: ASYNC110  # a page has to be asked for
                await trio.sleep(0.05)

    async def streams(self) -> list[dict[str, Any]]:
        """The exchanges in flight."""
        found: list[dict[str, Any]] = json.loads(await self.page("/streams"))["exchanges"]
        return found

    async def spread(self) -> list[trio.SocketStream]:
        """Open streams until both workers have one, each with its first token; the clients."""
        address = await self.process.address()
        clients: list[trio.SocketStream] = []
        while len({row["worker"] for row in await self.streams()}) < 2:
            assert len(clients) < MOST, "all streams are in one worker"
            client = await self.process.ask(address, CHAT, BODY)
            await until(client, b"word0")
            clients.append(client)
        return clients


@asynccontextmanager
async def two_workers(
    *arguments: str, config: str | None = None, folder: pathlib.Path | None = None
) -> AsyncIterator[Workers]:
    """The gateway with two workers, once it accepts."""
    go, whole = trio.Event(), chat_stream(2)
    script = Script((*whole.steps[:3], WaitFor(go), *whole.steps[3:]))
    async with ScriptedUpstream(script) as upstream:
        if config is not None:
            assert folder is not None
            file = folder / "canal.toml"
            file.write_text(config + f'[[upstream]]\nname = "up"\nbase_url = "{upstream.base_url}"\n')
            arguments = ("--config", str(file), *arguments)
        else:
            arguments = ("--upstream", upstream.base_url, *arguments)
        async with running("--workers", "2", *arguments) as process:
            workers = Workers(process, upstream, go)
            pids: list[int] = []
            try:
                await process.address()
                pids = workers.pids
                yield workers
            finally:
                with suppress(FileNotFoundError, ProcessLookupError):
                    pids += workers.pids
                if process.process.returncode is None:
                    process.process.kill()
                    await process.process.wait()
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
