"""The handshakes with forward proxies by themselves: CONNECT, absolute-form, SOCKS5, and every refusal."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import trio
from kit import chat, request, running_gateway, settings_for
from proxies import PASSWORD, USER

from canal_trio.errors import CanalError, Failure, Kind, Phase, Retry
from canal_trio.relay.streams import TcpStream
from canal_trio.settings import Deadlines, Upstream
from canal_trio.upstream.dial import TcpDialer
from canal_trio.upstream.tunnel import open_tunnel, parse_proxy
from canal_trio.wire.targets import BaseUrl

# -- the handshakes by themselves --------------------------------------------------------------------------------------

BASE = BaseUrl("https", "upstream.test", 443, b"", b"upstream.test")


async def tunnel(url: str, base: BaseUrl, *answers: bytes, hangs_up: bool = False) -> tuple[TcpStream | Failure, bytes]:
    """Open a tunnel against a proxy that answers so, each after it has read something; what it read."""
    heard = b""

    async def play(stream: trio.SocketStream) -> None:
        nonlocal heard
        async with stream:
            for answer in answers:
                heard += await stream.receive_some(65536)
                await stream.send_all(answer)
            if not hangs_up:
                await done.wait()

    done = trio.Event()
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, play, listeners)
        inner = await trio.open_tcp_stream("127.0.0.1", listeners[0].socket.getsockname()[1])
        with trio.fail_after(5):
            result = await open_tunnel(TcpStream.adopt(inner), parse_proxy(url), base)
        done.set()
        nursery.cancel_scope.cancel()
    if isinstance(result, TcpStream):
        result.close()
    return result, heard


async def test_connect_is_written_as_it_should_be() -> None:
    """The target with its port, Host alike, Basic credentials decoded from the URL."""
    result, heard = await tunnel(f"http://{USER}:{PASSWORD}@proxy.test:1", BASE, b"HTTP/1.1 200 OK\r\n\r\n")
    assert isinstance(result, TcpStream)
    secret = base64.b64encode(b"u@ser:p:ss/word")
    assert heard == (
        b"CONNECT upstream.test:443 HTTP/1.1\r\nHost: upstream.test:443\r\n"
        b"Proxy-Authorization: Basic %b\r\n\r\n" % secret
    )


async def test_connect_to_an_ipv6_address() -> None:
    """In brackets."""
    base = BaseUrl("https", "2001:db8::1", 8443, b"", b"")
    _, heard = await tunnel("http://proxy.test:1", base, b"HTTP/1.0 200 Connection established\r\nX: y\r\n\r\n")
    assert heard.startswith(b"CONNECT [2001:db8::1]:8443 HTTP/1.1\r\n")


async def test_informational_heads_before_the_answer() -> None:
    """They are passed over, in one piece with the answer or before it."""
    result, _ = await tunnel("http://p.test:1", BASE, b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n")
    assert isinstance(result, TcpStream)


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", Kind.REFUSED, "it answered 502 Bad Gateway"),
        (b"HTTP/1.1 407 \r\n\r\n", Kind.REFUSED, "it answered 407"),
        (b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n", Kind.REFUSED, "it answered 302 Found"),
        (b"hello\r\n\r\n", Kind.MALFORMED, "its answer to CONNECT is not valid HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 20_000, Kind.MALFORMED, "its answer to CONNECT is not valid HTTP"),
        (b"HTTP/1.1 200 OK\r\n\r\nearly", Kind.MALFORMED, "it sent bytes before the upstream was asked anything"),
    ],
)
async def test_connect_is_refused(answer: bytes, kind: Kind, says: str) -> None:
    """Whatever it says but a plain 2xx."""
    result, _ = await tunnel("http://proxy.test:1", BASE, answer)
    assert isinstance(result, Failure)
    assert (result.phase, result.retry, result.kind) == (Phase.DIAL, Retry.UNSENT, kind)
    assert result.detail == f"The proxy http://proxy.test:1: {says}."


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], "it does not speak SOCKS5"),
        ([b"\5\0", b"\4\0\0\1"], "it does not speak SOCKS5"),
        ([b"\5\0", b"\5\0\0\7"], "its SOCKS5 answer has an unknown address type"),
    ],
)
async def test_what_is_no_socks(answers: list[bytes], says: str) -> None:
    """Malformed, in a sentence."""
    result, _ = await tunnel("socks5://[::1]:1080", BASE, *answers)
    assert isinstance(result, Failure)
    assert (result.kind, result.detail) == (Kind.MALFORMED, f"The proxy socks5://[::1]:1080: {says}.")


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("upstream.test", b"\3\x0dupstream.test"),
        ("192.0.2.1", b"\1\xc0\0\2\1"),
        ("2001:db8::1", b"\4" + bytes.fromhex("20010db8000000000000000000000001")),
    ],
)
async def test_the_socks_request(host: str, address: bytes) -> None:
    """Names as names, numbers as numbers; an answer with an IPv6 address of its own is understood."""
    bound = b"\5\0\0\4" + bytes(16) + b"\0\1"
    result, heard = await tunnel("socks5://p.test:1", BaseUrl("https", host, 443, b"", b""), b"\5\0", bound)
    assert isinstance(result, TcpStream)
    assert heard == b"\5\1\0" + b"\5\1\0" + address + b"\x01\xbb"


async def test_a_name_too_long_for_socks() -> None:
    """DNS: such a name cannot exist."""
    result, _ = await tunnel("socks5://p.test:1", BaseUrl("https", "a" * 256, 443, b"", b""), b"\5\0")
    assert isinstance(result, Failure)
    assert result.kind is Kind.DNS


async def test_a_proxy_that_closes_instead_of_an_answer() -> None:
    """Refused, and no socket left."""
    result, _ = await tunnel("http://p.test:1", BASE, b"HTTP/1.1 2", hangs_up=True)
    assert isinstance(result, Failure)
    assert result.kind is Kind.REFUSED


@pytest.mark.parametrize("scheme", ["http", "socks5"])
async def test_a_proxy_that_says_nothing_is_a_connect_timeout(scheme: str) -> None:
    """The handshake with the proxy counts as connecting; the socket goes."""

    async def hold(stream: trio.SocketStream) -> None:
        async with stream:
            while await stream.receive_some():
                pass
        left.set()

    left = trio.Event()
    async with proxy_that(hold) as port:
        upstream = Upstream("u", "https://upstream.test", proxy=f"{scheme}://127.0.0.1:{port}")
        dialer = TcpDialer(bounds=settings_for().bounds, deadlines=Deadlines(connect=0.2))
        failure = await dialer(upstream)
        assert isinstance(failure, Failure)
        assert (failure.kind, failure.detail) == (Kind.TIMEOUT, f"127.0.0.1:{port} did not answer within 0.2 s.")
        with trio.fail_after(5):
            await left.wait()


async def test_cancelled_in_the_proxys_handshake_it_leaves_no_socket() -> None:
    """The caller goes while the proxy thinks."""

    async def hold(stream: trio.SocketStream) -> None:
        async with stream:
            asked.set()
            while await stream.receive_some():
                pass
        left.set()

    asked, left = trio.Event(), trio.Event()
    async with proxy_that(hold) as port, trio.open_nursery() as nursery:
        upstream = Upstream("u", "https://upstream.test", proxy=f"http://127.0.0.1:{port}")
        nursery.start_soon(TcpDialer(bounds=settings_for().bounds, deadlines=Deadlines()), upstream)
        await asked.wait()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True), trio.fail_after(5):
            await left.wait()


@asynccontextmanager
async def proxy_that(play: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[int]:
    """A listener that plays `play`."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, play, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def test_a_407_of_a_forwarding_proxy_is_not_relayed() -> None:
    """However long its explanation is: it is read by nobody, and the connection is closed."""
    answer = b"HTTP/1.1 407 No\r\nProxy-Authenticate: Basic\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300_000

    async def play(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            with suppress(trio.BrokenResourceError):
                await stream.send_all(answer)
                await stream.receive_some()

    async with proxy_that(play) as port:
        upstream = Upstream("u0", "http://upstream.test", proxy=f"http://127.0.0.1:{port}")
        async with running_gateway(settings_for(upstream)) as gateway:
            with trio.fail_after(5):
                response = await gateway.ask(chat())
            assert (response.status, response.error["code"]) == (502, "upstream_unreachable")


async def test_options_for_the_whole_upstream_in_absolute_form() -> None:
    """RFC 9112 3.2.4: `OPTIONS *` has no path behind the authority."""
    heard: list[bytes] = []

    async def play(stream: trio.SocketStream) -> None:
        async with stream:
            heard.append(await stream.receive_some())
            await stream.send_all(b"HTTP/1.1 204 No Content\r\n\r\n")
            await stream.receive_some()

    async with proxy_that(play) as port:
        upstream = Upstream("u0", "http://upstream.test:81", proxy=f"http://127.0.0.1:{port}")
        async with running_gateway(settings_for(upstream)) as gateway:
            assert (await gateway.ask(request("OPTIONS", "*"))).status == 204
    assert heard[0].startswith(b"OPTIONS http://upstream.test:81 HTTP/1.1\r\nHost: upstream.test:81\r\n")


def test_what_is_no_proxy_is_a_bug() -> None:
    """The configuration was checked."""
    for text in ("https://p.test:1", "http://p.test", "socks5://:1"):
        with pytest.raises(CanalError):
            parse_proxy(text)


def test_a_proxy_never_shows_its_password() -> None:
    """Neither by its name nor by its repr."""
    proxy = parse_proxy("http://user:secret@p.test:3128")
    assert "secret" not in f"{proxy!r}{proxy.name}"
    assert "user" not in proxy.name
