"""A real inference server behind the gateway: llama.cpp's own, with a tiny random model. Its metrics are the witness
that it stops generating when a client leaves."""

from __future__ import annotations

import json
import re
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import httpcore
import pytest
import trio
from openai_drivers import FLAVOURS, stream_chat
from sdk_programs import Program, gateway_for

pytestmark = [
    pytest.mark.real,
    # As in test_openai_python.py.
    pytest.mark.filterwarnings("ignore:Async generator '(openai|httpx2|httpcore2):ResourceWarning"),
]

PATIENCE = 60.0  # seconds for what takes a tenth of one on a machine that has nothing else to do
LONG = 8000  # tokens, at 1,000 to 1,600 a second; nearly the whole context of a slot


@dataclass(frozen=True)
class Llama:
    """The running server, and the gateway in front of it."""

    url: str
    base_url: str

    async def metric(self, name: str) -> int:
        """A counter of its own, read directly."""
        async with httpcore.AsyncConnectionPool() as pool:
            response = await pool.request("GET", f"{self.url}/metrics")
        match = re.search(rf"(?m)^llamacpp:{name} (\d+)", response.content.decode())
        assert match, response.content
        return int(match[1])

    async def until(self, name: str, condition: Callable[[int], bool]) -> None:
        """Wait until a counter fulfils a condition. How soon it does is judged in tokens: a machine may be slow."""
        value = None
        with trio.move_on_after(PATIENCE):
            while not condition(value := await self.metric(name)):  # noqa: ASYNC110 - another process's counter
                await trio.sleep(0.02)
            return
        raise AssertionError(f"{name} is {value} after {PATIENCE} s")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    """llama.cpp's server with a model that was written just now, and a gateway in front of it."""
    model = tmp_path_factory.mktemp("llama") / "tiny.gguf"
    with Program([sys.executable, Path(__file__).parent / "tiny_model.py", model]) as program:
        url = program.wait_for(r"serving on <(http://\S+)>", 60)[1]  # the server's log may be on the same line
        with gateway_for(f"{url}/v1") as gateway:
            yield Llama(url, gateway.base_url)


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_a_whole_stream(flavour: str, llama: Llama) -> None:
    """The SDK gets every token that the server says it has generated."""
    before = await llama.metric("tokens_predicted_total")
    outcome = await stream_chat(flavour, llama.base_url, max_tokens=300, stream_options={"include_usage": True})
    assert outcome.error is None
    assert outcome.finish == "length"
    assert outcome.usage.completion_tokens == 300
    assert len(outcome.texts) == 300
    await llama.until("requests_processing", lambda count: count == 0)
    assert await llama.metric("tokens_predicted_total") - before == 300


async def post(llama: Llama) -> trio.SocketStream:
    """A request for a long text, sent by hand through the gateway."""
    host, _, port = llama.base_url.removeprefix("http://").removesuffix("/v1").partition(":")
    messages = [{"role": "user", "content": "hi"}]
    body = json.dumps({"model": "m", "stream": True, "max_tokens": LONG, "messages": messages}).encode()
    client = await trio.open_tcp_stream(host, int(port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    await client.send_all(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return client


async def leave_by_fin(client: trio.SocketStream) -> None:
    """Half-close, and keep the socket: only the FIN says that nobody listens any more."""
    await client.send_eof()


async def leave_by_reset(client: trio.SocketStream) -> None:
    """RST."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await client.aclose()


# Only streaming: without it this server generates to the end for a client that is gone, with or without a gateway.
@pytest.mark.parametrize("leave", [leave_by_fin, leave_by_reset])
async def test_the_server_stops_when_the_client_leaves(
    leave: Callable[[trio.SocketStream], Awaitable[None]], llama: Llama
) -> None:
    """After the client left, the server has nothing in progress, and what it generated stands still far below what was
    asked for."""
    before = await llama.metric("tokens_predicted_total")
    async with await post(llama) as client:
        received = b""
        while received.count(b"data: ") < 20:
            received += await client.receive_some()
        assert await llama.metric("requests_processing") == 1
        await leave(client)
        await llama.until("requests_processing", lambda count: count == 0)
        predicted, decoded = await llama.metric("tokens_predicted_total"), await llama.metric("n_decode_total")
        await trio.sleep(0.2)
        assert await llama.metric("tokens_predicted_total") == predicted
        assert await llama.metric("n_decode_total") == decoded
        assert 0 < predicted - before < LONG * 3 // 4


async def test_waiting_requests_leave_too(llama: Llama) -> None:
    """Of six requests for two slots all clients leave: nothing is in progress and nothing waits, long before even the
    first two would have had their texts, and the server then answers the next one."""
    before = await llama.metric("tokens_predicted_total")
    async with AsyncExitStack() as clients:
        for _ in range(6):
            await clients.enter_async_context(await post(llama))
        await llama.until("requests_deferred", lambda count: count == 4)
    await llama.until("requests_deferred", lambda count: count == 0)
    await llama.until("requests_processing", lambda count: count == 0)
    assert await llama.metric("tokens_predicted_total") - before < 2 * LONG * 3 // 4
    outcome = await stream_chat("trio", llama.base_url, max_tokens=5)
    assert len(outcome.texts) == 5


async def test_its_own_errors_pass(llama: Llama) -> None:
    """An error of the server's own is relayed as it is, also where it closes its connection afterwards."""
    outcome = await stream_chat("trio", llama.base_url, messages="no list")
    assert getattr(outcome.error, "status_code", None) in (400, 500)
    assert (await stream_chat("trio", llama.base_url, max_tokens=3)).finish == "length"
