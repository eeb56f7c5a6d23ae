"""SIGHUP to the real program: routes, keys, limits and certificates change as one, or nothing does."""

from __future__ import annotations

import hashlib
import pathlib
import signal

import pytest
import trio
from serve_fakes import read_all
from serve_process import Process, running
from tls_kit import Authority, until

from canal_trio.testing.scripts import Script, WaitFor, chat_stream
from canal_trio.testing.upstreams import ScriptedUpstream

SMALL, LARGE = 100, 5000  # bytes of a prompt


def written(folder: pathlib.Path, upstream: str, key: str, body_bytes: int, model: str = "m", more: str = "") -> None:
    """The file: one upstream, one model, one key, one limit, one certificate."""
    digest = hashlib.sha256(key.encode()).hexdigest()
    (folder / "canal.toml").write_text(
        f'[server.tls]\ncertificate = "gw.pem"\nkey = "gw.key"\n[bounds]\nbody_bytes = {body_bytes}\n'
        f'[[upstream]]\nname = "up"\nbase_url = "{upstream}"\n[[model]]\nname = "{model}"\nupstreams = ["up"]\n'
        f'[[key]]\nname = "client"\nsha256 = "{digest}"\n{more}'
    )


class Clients:
    """Clients that trust our authority."""

    def __init__(self, process: Process, authority: Authority) -> None:
        self.process = process
        self.authority = authority

    async def open(self) -> trio.SSLStream[trio.SocketStream]:
        """A connection."""
        raw = await self.process.connect(await self.process.address())
        stream = trio.SSLStream(raw, self.authority.client, server_hostname="127.0.0.1", https_compatible=True)
        await stream.do_handshake()
        return stream

    async def ask(self, key: str, size: int, model: str = "m") -> tuple[trio.SSLStream[trio.SocketStream], bytes]:
        """A request that has been sent, and the certificate that was shown."""
        stream = await self.open()
        body = f'{{"model": "{model}", "stream": true, "messages": ["{"x" * size}"]}}'
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        await stream.send_all((head + body).encode())
        return stream, stream.getpeercert(binary_form=True)

    async def statuses(self, *some: str) -> dict[str, int]:
        """What each kind of request, or some of them, is answered with now."""
        found = {}
        for name, key, size, model in (
            ("key a", "sk-a", SMALL, "m"), ("key b", "sk-b", SMALL, "m"), ("key c", "sk-c", SMALL, "m"),
            ("large, key a", "sk-a", LARGE, "m"), ("large, key b", "sk-b", LARGE, "m"), ("model n", "sk-b", SMALL, "n"),
        ):  # fmt: skip
            if some and name not in some:
                continue
            stream, _ = await self.ask(key, size, model)
            found[name] = int((await read_all(stream)).split(b" ", 2)[1])
        return found


BEFORE = {"key a": 200, "key b": 401, "key c": 401, "large, key a": 413, "large, key b": 413, "model n": 401}
AFTER = {"key a": 401, "key b": 200, "key c": 401, "large, key a": 401, "large, key b": 200, "model n": 404}


@pytest.mark.parametrize("workers", [1, 2])
async def test_everything_changes_or_nothing(tmp_path: pathlib.Path, workers: int) -> None:
    """Key, route, limit and certificate of the new file hold together for every request after the reload; a file with
    one fault in it, wherever it is, leaves all of them as they were; a stream from before goes on to its end."""
    authority = Authority(tmp_path)
    authority.issue("gw")
    go, whole = trio.Event(), chat_stream(3)
    waits = Script((*whole.steps[:3], WaitFor(go), *whole.steps[3:]))
    async with ScriptedUpstream(waits) as first, ScriptedUpstream(chat_stream(2)) as second:
        quick = ScriptedUpstream(chat_stream(2))
        async with quick:
            written(tmp_path, first.base_url, "sk-a", 1000)
            flags = ("--config", str(tmp_path / "canal.toml"), "--workers", str(workers))
            async with running(*flags) as process:
                clients = Clients(process, authority)
                streaming, old = await clients.ask("sk-a", SMALL)
                await until(streaming, b"word0")
                written(tmp_path, quick.base_url, "sk-a", 1000)
                process.signal(signal.SIGHUP)
                await process.saying("reloaded the configuration")
                assert await clients.statuses() == BEFORE

                authority.issue("gw")
                written(tmp_path, second.base_url, "sk-b", 100_000)
                process.signal(signal.SIGHUP)
                await process.saying(r"reloaded the configuration[\s\S]*reloaded the configuration")
                before = len(quick.requests)
                assert await clients.statuses() == AFTER
                assert (len(quick.requests), len(second.requests)) == (before, 2)
                stream, new = await clients.ask("sk-b", SMALL)
                await read_all(stream)
                assert new != old

                faults = {
                    "route": lambda: written(tmp_path, quick.base_url, "sk-c", 1, more='[[model]]\nname = "n"\n'),
                    "limit": lambda: written(tmp_path, quick.base_url, "sk-c", -1),
                    "certificate": lambda: (
                        written(tmp_path, quick.base_url, "sk-c", 1),
                        (tmp_path / "gw.key").write_text("nothing"),
                    ),
                }
                for number, spoil in enumerate(faults.values(), 1):
                    spoil()
                    process.signal(signal.SIGHUP)
                    await process.saying(rf"(?:the old one stays: [\s\S]*){{{number}}}")
                    assert await clients.statuses("key b", "key c") == {"key b": 200, "key c": 401}
                assert await clients.statuses() == AFTER
                stream, shown = await clients.ask("sk-b", SMALL)
                await read_all(stream)
                assert shown == new

                go.set()
                assert b"[DONE]" in await until(streaming, b"0\r\n\r\n")
                assert "Traceback" not in process.said
