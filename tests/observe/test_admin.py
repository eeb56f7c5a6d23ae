"""The admin listener: four paths, two methods, and clear answers to everything else."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
from test_metrics import Watched
from trio.testing import memory_stream_pair

from canal_trio.observe.admin import HEAD_BYTES, Admin
from canal_trio.observe.metrics import Metrics


@dataclass(frozen=True, slots=True)
class View:
    """As a gateway shows an exchange."""

    id: str
    phase: str
    deadline: float


class Gateway(Watched):
    """A gateway whose state a test chooses."""

    def __init__(self, *, usable: bool = True, draining: bool = False) -> None:
        self.usable = usable
        self.draining = draining

    def ready(self) -> bool:
        """As the test says, unless draining."""
        return self.usable and not self.draining

    def exchanges(self) -> list[object]:
        """One."""
        return [View("req_1", "stream", float("inf"))]


@asynccontextmanager
async def serving(gateway: Gateway) -> AsyncIterator[trio.abc.Stream]:
    """A client's stream to the admin pages of `gateway`."""
    metrics = Metrics()
    metrics.watch(gateway)
    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Admin(gateway, metrics).handle, theirs)
        yield ours
        await ours.aclose()


async def _read_all(stream: trio.abc.Stream) -> bytes:
    data = b""
    while piece := await stream.receive_some():
        data += piece
    return data


async def ask(request: bytes, gateway: Gateway | None = None) -> tuple[int, bytes, bytes]:
    """Status, head and body of the answer to `request`, whose connection is then shut down."""
    async with serving(gateway or Gateway()) as stream:
        await stream.send_all(request)
        await stream.send_eof()  # type: ignore[attr-defined]  # a StapledStream has it
        data = await _read_all(stream)
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), head, body


def _get(path: str, method: str = "GET", extra: str = "") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nhost: admin\r\n{extra}\r\n".encode()


async def test_alive() -> None:
    """/livez says 200 as long as the process can answer at all."""
    assert (await ask(_get("/livez"), Gateway(usable=False, draining=True)))[::2] == (200, b"alive\n")


@pytest.mark.parametrize(
    ("gateway", "status", "body"),
    [
        (Gateway(), 200, b"ready\n"),
        (Gateway(usable=False), 503, b"no usable upstream\n"),
        (Gateway(draining=True), 503, b"draining\n"),
    ],
)
async def test_ready(gateway: Gateway, status: int, body: bytes) -> None:
    """/readyz says 503 and why while draining or without a usable upstream."""
    assert (await ask(_get("/readyz?verbose"), gateway))[::2] == (status, body)


async def test_metrics_page() -> None:
    """/metrics answers in Prometheus's text format."""
    status, head, body = await ask(_get("/metrics"))
    assert status == 200
    assert b"content-type: text/plain; version=0.0.4" in head
    assert b"canal_cancel_latency_seconds_bucket" in body


async def test_streams_page() -> None:
    """/streams lists the exchanges in flight as JSON; no deadline is null."""
    status, _, body = await ask(_get("/streams"))
    assert status == 200
    assert json.loads(body) == {"exchanges": [{"id": "req_1", "phase": "stream", "deadline": None}]}


async def test_head_has_no_body() -> None:
    """HEAD answers as GET does, length included, without the body."""
    status, head, body = await ask(_get("/livez", "HEAD"))
    assert (status, body) == (200, b"")
    assert b"content-length: 6" in head


async def test_keep_alive_and_pipelining() -> None:
    """Two requests on one connection get two answers in order."""
    async with serving(Gateway()) as stream:
        await stream.send_all(_get("/livez") + _get("/readyz", extra="connection: close\r\n"))
        data = await _read_all(stream)
    assert data.count(b"HTTP/1.1 200") == 2
    assert data.index(b"alive") < data.index(b"ready")


@pytest.mark.parametrize(
    ("request_bytes", "status", "words"),
    [
        (_get("/"), 404, b"nothing is here; there are /livez, /readyz, /metrics, /streams\n"),
        (_get("/livez", "POST"), 405, b"POST is not allowed here; GET and HEAD are\n"),
        (_get("/livez", "PUT", "content-length: 9\r\n") + b"body", 405, b"GET and HEAD are\n"),
        (_get("/livez", extra="content-length: 9\r\n"), 413, b"a request without a body is expected here\n"),
        (_get("/livez", extra="transfer-encoding: chunked\r\n"), 413, b"without a body"),
        (b"nonsense\r\n\r\n", 400, b"bad request: "),
        (b"GET /livez HTTP/1.1\r\n\r\n", 400, b"bad request: "),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, b"bad request: "),
        (b"GET / HTTP/1.1\r\nx: " + b"a" * (HEAD_BYTES + 1), 431, b"bad request: "),
        (b"GET /livez HTTP/2.0\r\nhost: a\r\n\r\n", 505, b"HTTP/1.1 or HTTP/1.0 is expected"),
    ],
)
async def test_what_is_refused(request_bytes: bytes, status: int, words: bytes) -> None:
    """Everything that is not a GET or HEAD of the four pages gets an answer that says so, and a close."""
    got, head, body = await ask(request_bytes)
    assert got == status
    assert words in body
    assert b"Traceback" not in body
    if status == 405:
        assert b"allow: GET, HEAD" in head


async def _dribble(stream: trio.abc.Stream, data: bytes) -> None:
    for byte in data:
        await stream.send_all(bytes([byte]))
        await trio.sleep(1)


async def test_a_slow_head_is_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    """A client that dribbles its head is gone when the deadline that began with its first byte has passed."""
    async with serving(Gateway()) as stream:
        started = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):
            await _dribble(stream, _get("/livez", extra="x: " + "y" * 100 + "\r\n"))
        assert trio.current_time() - started < 13


async def test_an_idle_connection_ends(autojump_clock: trio.testing.MockClock) -> None:
    """A connection that asks nothing is closed after the first deadline, one that asked before after the idle one."""
    async with serving(Gateway()) as stream:
        assert await _read_all(stream) == b""
        assert trio.current_time() < 11
    start = trio.current_time()
    async with serving(Gateway()) as stream:
        await stream.send_all(_get("/livez"))
        await _read_all(stream)
        assert 70 < trio.current_time() - start < 80


async def test_a_client_that_leaves() -> None:
    """Leaving without a request, or in the middle of one, is no error."""
    for data in (b"", b"GET /li"):
        async with serving(Gateway()) as stream:
            await stream.send_all(data)
