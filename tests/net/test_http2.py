"""An upstream that speaks HTTP/2, a real one (Hypercorn), behind the whole gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from kit import RunningGateway, ask, eventually, request, running_gateway, settings_for
from peers import Certificates, Http2Upstream, http2_upstream, token

from canal_trio.hooks import Outcome
from canal_trio.settings import Drain, Model, Target, Upstream

pytestmark = pytest.mark.real


TLS = pytest.mark.parametrize("tls", [False, True], ids=["prior-knowledge", "tls"])


@pytest.fixture
def stage(certificates: Certificates) -> Any:
    """Hypercorn, with or without TLS, and a gateway before it."""

    @asynccontextmanager
    async def set_up(*, tls: bool = False, **more: Any) -> AsyncIterator[tuple[Http2Upstream, RunningGateway]]:
        async with http2_upstream(certificates if tls else None) as upstream:
            settings = settings_for(
                Upstream("u0", upstream.url, http2=True, ca_file=certificates.ca_file if tls else None), **more
            )
            async with running_gateway(settings) as gateway:
                yield upstream, gateway

    return set_up


@TLS
async def test_a_chat_streams_through(stage: Any, tls: bool) -> None:
    """Every event arrives, the end is clean, the upstream was spoken to in HTTP/2, one connection serves them all."""
    async with stage(tls=tls) as (upstream, gateway):
        client = await gateway.connect()
        for number in range(3):
            await client.send(ask(tokens=5, gap=0.002))
            response = await client.response()
            assert response.status == 200
            assert response.complete
            assert response.framing == "chunked"
            assert response.header("via") == "2 canal"
            assert response.body == b"".join(map(token, range(5))) + b"data: [DONE]\n\n"
            assert [seen.version for seen in upstream.requests] == ["2"] * (number + 1)
        statistics = gateway.gateway.statistics().pools["u0"]
        assert (statistics.dialled, statistics.reused) == (1, 2)
        records = await gateway.records.wait(3)
        assert [record.outcome for record in records] == [Outcome.COMPLETED] * 3
        assert records[0].events == 6


@TLS
async def test_an_event_is_passed_on_before_the_next_one_exists(stage: Any, tls: bool) -> None:
    """Flushed at once: the upstream stalls after two events, and both are here."""
    async with stage(tls=tls) as (_upstream, gateway):
        client = await gateway.connect()
        await client.send(ask(tokens=2, stall=True))
        with trio.fail_after(5):
            await client.final_head()
            assert b"t1" in await client.until(b"t1") + bytes(client.buffer)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_other_methods(stage: Any, method: str) -> None:
    """With and without a body; HEAD has none."""
    async with stage() as (upstream, gateway):
        body = b"x" * 100_000 if method in ("PUT", "PATCH") else None
        response = await gateway.ask(request(method, "/v1/models?a=b", body))
        assert (response.status, response.complete) == (200, True)
        assert response.header("x-method") == method
        assert response.body == (b"" if method == "HEAD" else b"%d bytes" % len(body or b""))
        (seen,) = upstream.requests
        assert (seen.method, seen.path, len(seen.body)) == (method, "/v1/models", len(body or b""))


async def test_a_chunked_upload(stage: Any) -> None:
    """No length is known: the body arrives whole, and HTTP/2 carries no framing fields."""
    async with stage() as (upstream, gateway):
        client = await gateway.connect()
        await client.send(request("POST", "/v1/files", None, "Transfer-Encoding: chunked"))
        for _ in range(30):
            await client.send(b"2710\r\n" + b"y" * 10_000 + b"\r\n")
        await client.send(b"0\r\n\r\n")
        response = await client.response()
        assert response.body == b"300000 bytes"
        (seen,) = upstream.requests
        assert not seen.all("transfer-encoding")
        assert not seen.all("connection")
        assert seen.all("x-forwarded-for") == ["127.0.0.1"]


async def test_what_http2_forbids_is_not_sent(stage: Any) -> None:
    """Hop-by-hop fields and the wish to upgrade stay behind; the request is served as an ordinary one."""
    async with stage() as (upstream, gateway):
        fields = ("Connection: Upgrade, X-Hop", "Upgrade: websocket", "X-Hop: 1", "TE: trailers", "Keep-Alive: 5")
        response = await gateway.ask(request("GET", "/v1/models", None, *fields))
        assert response.status == 200
        (seen,) = upstream.requests
        names = {name for name, _ in seen.headers}
        assert not names & {"connection", "upgrade", "x-hop", "te", "keep-alive"}


@TLS
@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_the_upstream_sees_the_client_leave(stage: Any, tls: bool, how: str) -> None:
    """Mid-stream: its connection is closed, which is all that stops a generation here."""
    async with stage(tls=tls) as (upstream, gateway):
        client = await gateway.connect()
        await client.send(ask(tokens=100_000, gap=0.005))
        await client.until(b"t1")
        getattr(client, how)()
        with trio.fail_after(5):
            await upstream.requests[0].left.wait()
        record = await gateway.records.one()
        assert record.outcome is Outcome.CLIENT_GONE
        assert record.cancel_latency is not None
        assert gateway.gateway.statistics().pools["u0"].idle == 0


async def test_the_upstream_sees_the_client_leave_before_its_answer(stage: Any) -> None:
    """While it still thinks."""
    async with stage() as (upstream, gateway):
        client = await gateway.connect()
        await client.send(ask(tokens=1, head_gap=60))
        await eventually(lambda: upstream.requests and upstream.requests[0].complete)
        client.fin()
        with trio.fail_after(5):
            await upstream.requests[0].left.wait()
        assert (await gateway.records.one()).outcome is Outcome.CLIENT_GONE


async def test_a_client_that_does_not_read_stops_the_upstream(stage: Any) -> None:
    """Bounded: the upstream can run ahead by the kernel's buffers and the flow, not by HTTP/2's windows of 16 MiB."""
    async with stage() as (upstream, gateway):
        client = await gateway.connect(receive_buffer=4096)
        await client.send(ask(tokens=400_000))
        await client.final_head()
        before = -1
        while upstream.requests[0].tokens != before:
            before = upstream.requests[0].tokens
            await trio.sleep(0.5)
        assert before * len(token(100_000)) < 2_500_000
        assert not upstream.requests[0].answered
        await client.until(b"t1000")  # it reads again, and the stream goes on
        while upstream.requests[0].tokens == before:
            await client.fill()


async def test_an_upstream_that_offers_no_h2_is_spoken_to_in_http_1_1(certificates: Certificates) -> None:
    """ALPN decides: the hot path takes over."""

    async def serve(stream: trio.SocketStream) -> None:
        secured = trio.SSLStream(stream, certificates.server("http/1.1"), server_side=True, https_compatible=True)
        with trio.move_on_after(5):
            head = b""
            while b"\r\n\r\n" not in head:
                head += await secured.receive_some()
            heads.append(head)
            await secured.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            await secured.receive_some()
        stream.socket.close()

    heads: list[bytes] = []
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, listeners)
        url = f"https://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        upstream = Upstream("u0", url, http2=True, ca_file=certificates.ca_file)
        async with running_gateway(settings_for(upstream)) as gateway:
            response = await gateway.ask(request("GET", "/v1/models"))
            assert (response.body, response.header("via")) == (b"ok", "1.1 canal")
        assert heads[0].startswith(b"GET /v1/models HTTP/1.1\r\n")
        nursery.cancel_scope.cancel()


async def test_a_certificate_one_does_not_trust(certificates: Certificates) -> None:
    """502, as for HTTP/1.1; nothing was sent, so the client may try again."""
    async with http2_upstream(certificates) as upstream:
        async with running_gateway(settings_for(Upstream("u0", upstream.url, http2=True))) as gateway:
            response = await gateway.ask(ask(tokens=1))
        assert (response.status, response.error["code"]) == (502, "upstream_tls")
        assert response.header("x-should-retry") == "true"
        assert upstream.requests == []


@TLS
async def test_an_answer_is_drained_when_its_client_leaves(stage: Any, tls: bool) -> None:
    """Over HTTP/2 as over HTTP/1.1: once the answer has begun, it is taken to its end, and the connection serves on."""
    models = (Model("*", (Target("u0"),), on_disconnect=Drain(seconds=20)),)
    async with stage(tls=tls, models=models) as (_upstream, gateway):
        client = await gateway.connect()
        await client.send(ask(model="m", tokens=30, gap=0.01))
        await client.until(b"t1")
        client.fin()
        record = await gateway.records.one()
        assert (record.outcome, record.flags) == (Outcome.CLIENT_GONE, ("drained",))
        assert record.events < 30
        assert (await gateway.ask(ask(model="m", tokens=1))).complete
        assert gateway.gateway.statistics().pools["u0"].dialled == 1
