"""Control calls: a small GET of our own, over whatever leads to the upstream."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio
import trio.testing
from peers import Certificates, H2Peer, http2_upstream
from proxies import forward_proxy

from canal_trio.errors import CanalError, Failure, Kind
from canal_trio.relay.idle import Reaper
from canal_trio.settings import Settings, Upstream
from canal_trio.testing.scripts import reply
from canal_trio.testing.simstream import sim_stream_pair
from canal_trio.testing.upstreams import ScriptedUpstream
from canal_trio.upstream.connect import Connector
from canal_trio.upstream.control import fetch


async def ask(
    upstream: Upstream, most: int = 1000, *, over: trio.abc.Stream | None = None
) -> tuple[int, bytes] | Failure:
    """GET /models of an upstream, on a connection of its own or `over` this one."""

    async def dial(_: Upstream) -> trio.abc.Stream | Failure:
        await trio.lowlevel.checkpoint()
        assert over is not None
        return over

    connector = Connector(Settings(), Reaper(), dial if over is not None else None)
    fields = [(b"Authorization", b"Bearer own")]
    return await fetch(connector, upstream, b"/models", fields=fields, most=most, limit=5.0)


async def test_over_tls_in_http2(certificates: Certificates) -> None:
    """ALPN decides, as for any exchange; the certificate is checked against the same trust."""
    async with http2_upstream(certificates) as peer:
        url = peer.url.replace("http://", "https://")
        for http2, version in ((True, "2"), (False, "1.1")):
            answer = await ask(Upstream("u", f"{url}/base", http2=http2, ca_file=certificates.ca_file))
            assert answer == (200, b"0 bytes")
            seen = peer.requests[-1]
            assert (seen.method, seen.path, seen.version) == ("GET", "/base/models", version)
            assert seen.all("authorization") == ["Bearer own"]
        refused = await ask(Upstream("u", url))
        assert isinstance(refused, Failure)
        assert refused.kind is Kind.TLS


@pytest.mark.real
async def test_through_a_forward_proxy() -> None:
    """A plain upstream behind a proxy is asked in absolute-form."""
    async with ScriptedUpstream(reply(b"{}")) as upstream:
        with forward_proxy() as port:
            answer = await ask(Upstream("u", upstream.url, proxy=f"http://127.0.0.1:{port}"))
        assert answer == (200, b"{}")
        assert upstream.requests[0].target == "/models"


async def test_a_base_url_that_is_none_is_a_mistake_of_the_program() -> None:
    """A configuration was checked; settings made by a program are refused before anything is dialled."""
    with pytest.raises(CanalError, match="nonsense"):
        await ask(Upstream("u", "nonsense"))


async def test_an_http2_status_that_is_no_number(autojump_clock: trio.testing.MockClock) -> None:
    """A failure with its cause, and the connection is closed."""
    near, far = sim_stream_pair()
    peer = H2Peer(far)
    peer.h2.config.validate_outbound_headers = False

    async def play() -> None:
        peer.h2.initiate_connection()
        await peer.flush()
        await peer.head(await peer.request(), status="ok")
        await peer.gone()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(play)
        answer = await ask(Upstream("u", "http://upstream.test", http2=True), over=near)
    assert isinstance(answer, Failure)
    assert (answer.kind, answer.detail) == (Kind.MALFORMED, "The status code is not one of HTTP.")
    assert near.closed


async def says(stream: trio.abc.Stream, answer: bytes) -> None:
    """An HTTP/1.1 upstream that reads a request and says this."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        data += await stream.receive_some(1000)
    await stream.send_all(answer)


async def test_an_upstream_that_resets_in_its_answer(autojump_clock: trio.testing.MockClock) -> None:
    """What came of a body that broke off is no answer."""
    near, far = sim_stream_pair()

    async def play() -> None:
        await says(far, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        await trio.sleep(1)
        far.reset()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(play)
        answer = await ask(Upstream("u", "http://upstream.test"), over=near)
    assert isinstance(answer, Failure)
    assert answer.kind is Kind.CUT
    assert near.closed


async def test_over_a_stream_of_a_programs_own(autojump_clock: trio.testing.MockClock) -> None:
    """A dialer may give any Trio stream: it is closed all the same."""
    near, far = trio.testing.memory_stream_pair()

    async def play() -> None:
        await says(far, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        assert await far.receive_some(1) == b""

    async with trio.open_nursery() as nursery:
        nursery.start_soon(play)
        assert await ask(Upstream("u", "http://upstream.test"), over=near) == (200, b"{}")


async def test_an_answer_that_is_too_long(autojump_clock: trio.testing.MockClock) -> None:
    """It is read up to the bound and no further, and the connection is closed."""
    near, far = sim_stream_pair()

    async def play() -> None:
        with suppress(trio.BrokenResourceError):  # nobody takes all of it
            await says(far, b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 100_000)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(play)
        answer = await ask(Upstream("u", "http://upstream.test"), most=1000, over=near)
    assert isinstance(answer, Failure)
    assert (answer.kind, answer.detail) == (Kind.MALFORMED, "Its answer is longer than 1000 bytes.")
    assert near.closed


async def test_an_upstream_that_is_gone_before_it_was_asked(autojump_clock: trio.testing.MockClock) -> None:
    """It was dialled, and then it broke: a failure as any other."""
    near, far = sim_stream_pair()
    far.reset()
    answer = await ask(Upstream("u", "http://upstream.test"), over=near)
    assert isinstance(answer, Failure)
    assert answer.kind is Kind.CUT
    assert near.closed
