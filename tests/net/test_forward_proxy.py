"""Upstreams behind forward proxies: a real one (proxy.py) for HTTP, a scripted one for SOCKS5, and every refusal."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
from kit import chat, data_of, eventually, request, running_gateway, settings_for
from peers import Certificates, SocksProxy, forward_proxy, http2_upstream, socks_proxy

from canal_trio.errors import CanalError, Failure, Kind, Phase, Retry
from canal_trio.hooks import Outcome
from canal_trio.relay.streams import TcpStream
from canal_trio.settings import Deadlines, Upstream
from canal_trio.testing.scripts import Forever, Script, Send, chat_stream, cut_after, reply, stream
from canal_trio.testing.upstreams import ScriptedUpstream
from canal_trio.upstream.dial import TcpDialer
from canal_trio.upstream.tunnel import open_tunnel, parse_proxy
from canal_trio.wire.targets import BaseUrl

USER, PASSWORD = "u%40ser", "p%3Ass%2Fword"  # u@ser, p:ss/word: percent-encoded, as a URL needs them
TOKEN = b'data: {"t":1}\n\n'


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """One authority for these tests."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def proxy_port() -> Iterator[int]:
    """proxy.py without credentials."""
    with forward_proxy() as port:
        yield port


@pytest.fixture(scope="module")
def guarded_port() -> Iterator[int]:
    """proxy.py that wants credentials."""
    with forward_proxy("--basic-auth", "u@ser:p:ss/word") as port:
        yield port


def behind(url: str, proxy: str, certificates: Certificates, **more: Any) -> Upstream:
    """An upstream at `url` that is reached through `proxy`."""
    return Upstream("u0", url, proxy=proxy, ca_file=certificates.ca_file, **more)


@asynccontextmanager
async def upstream_for(scheme: str, certificates: Certificates, script: Any) -> AsyncIterator[ScriptedUpstream]:
    """A scripted upstream that speaks `scheme`."""
    context = certificates.server("http/1.1") if scheme == "https" else None
    async with ScriptedUpstream(script, ssl_context=context) as upstream:
        yield upstream


SCHEMES = pytest.mark.parametrize("scheme", ["http", "https"])
real = pytest.mark.real


# -- HTTP --------------------------------------------------------------------------------------------------------------


@real
@SCHEMES
async def test_a_chat_streams_through_an_http_proxy(scheme: str, proxy_port: int, certificates: Certificates) -> None:
    """`http` in absolute-form, `https` inside CONNECT; the connection is used again."""
    async with upstream_for(scheme, certificates, chat_stream(5)) as upstream:
        settings = settings_for(behind(upstream.url, f"http://127.0.0.1:{proxy_port}", certificates))
        async with running_gateway(settings) as gateway:
            client = await gateway.connect()
            for _ in range(2):
                await client.send(chat())
                response = await client.response()
                assert (response.status, response.complete) == (200, True)
                assert data_of(response.body)[-1] == "[DONE]"
            assert [seen.target for seen in upstream.requests] == ["/v1/chat/completions"] * 2
            assert upstream.requests[0].header("proxy-authorization") is None
            host = upstream.url.partition("//")[2].partition("/")[0]
            assert upstream.requests[0].header("host") == host
            assert gateway.gateway.statistics().pools["u0"].dialled == 1
    assert upstream.complaints == []


@real
@SCHEMES
async def test_with_credentials(scheme: str, guarded_port: int, certificates: Certificates) -> None:
    """They reach the proxy, and nobody behind it."""
    async with upstream_for(scheme, certificates, chat_stream(3)) as upstream:
        proxy = f"http://{USER}:{PASSWORD}@127.0.0.1:{guarded_port}"
        async with running_gateway(settings_for(behind(upstream.url, proxy, certificates))) as gateway:
            response = await gateway.ask(chat())
            assert (response.status, response.complete) == (200, True)
            assert upstream.requests[0].header("proxy-authorization") is None


@real
@SCHEMES
@pytest.mark.parametrize("credentials", ["", "u%40ser:wrong@"], ids=["none", "wrong"])
async def test_wrong_credentials(scheme: str, guarded_port: int, certificates: Certificates, credentials: str) -> None:
    """407 is between the proxy and us: the client gets a 502 that says so, without any credentials in it."""
    async with upstream_for(scheme, certificates, chat_stream(3)) as upstream:
        proxy = f"http://{credentials}127.0.0.1:{guarded_port}"
        async with running_gateway(settings_for(behind(upstream.url, proxy, certificates))) as gateway:
            response = await gateway.ask(chat())
            assert (response.status, response.error["code"]) == (502, "upstream_unreachable")
            assert f"The proxy http://127.0.0.1:{guarded_port}: it answered 407" in response.error["message"]
            assert "wrong" not in response.body.decode()
            assert response.header("proxy-authenticate") is None
            assert response.header("x-should-retry") == "true"
        assert upstream.requests == []


@real
async def test_an_upstream_the_proxy_cannot_reach(proxy_port: int, certificates: Certificates) -> None:
    """CONNECT is refused, or the connection closed: 502, nothing was sent."""
    async with ScriptedUpstream(reply({})) as upstream:
        gone = upstream.url.replace("http://", "https://")
    settings = settings_for(behind(gone, f"http://127.0.0.1:{proxy_port}", certificates))
    async with running_gateway(settings) as gateway:
        response = await gateway.ask(chat())
        assert (response.status, response.error["code"]) == (502, "upstream_unreachable")
        assert response.error["message"].count("The proxy http://127.0.0.1") == 1
        record = await gateway.records.one()
        assert record.failure is not None
        assert record.failure.phase is Phase.DIAL


async def test_a_proxy_that_is_not_there(certificates: Certificates) -> None:
    """Refused, by the proxy's address."""
    async with ScriptedUpstream(reply({})) as upstream:
        gone = upstream.url.partition("//")[2]
    settings = settings_for(behind("https://upstream.test", f"http://{gone}", certificates))
    async with running_gateway(settings) as gateway:
        response = await gateway.ask(chat())
        assert (response.status, response.error["code"]) == (502, "upstream_unreachable")
        assert f"{gone}: Connection refused." in response.error["message"]


@real
async def test_a_certificate_behind_the_proxy_that_one_does_not_trust(
    proxy_port: int, certificates: Certificates
) -> None:
    """TLS is between the upstream and us: the proxy cannot vouch for it."""
    async with upstream_for("https", certificates, reply({})) as upstream:
        unknown = Upstream("u0", upstream.url, proxy=f"http://127.0.0.1:{proxy_port}")
        async with running_gateway(settings_for(unknown)) as gateway:
            response = await gateway.ask(chat())
            assert (response.status, response.error["code"]) == (502, "upstream_tls")


@real
@SCHEMES
async def test_the_upstream_behind_the_proxy_sees_the_client_leave(
    scheme: str, proxy_port: int, certificates: Certificates
) -> None:
    """Our socket to the proxy is closed at once, and the proxy closes its own."""
    endless = Script((stream([TOKEN]).steps[0], Forever((Send(b"8\r\ndata: x\n\r\n"),))))
    async with upstream_for(scheme, certificates, endless) as upstream:
        settings = settings_for(behind(upstream.url, f"http://127.0.0.1:{proxy_port}", certificates))
        async with running_gateway(settings) as gateway:
            client = await gateway.connect()
            await client.send(chat())
            await client.final_head()
            client.reset()
            record = await gateway.records.one()
            assert record.outcome is Outcome.CLIENT_GONE
            await upstream.until(lambda: upstream.connections[-1].left is not None)


@real
@SCHEMES
async def test_a_cut_behind_the_proxy_stays_a_cut(scheme: str, proxy_port: int, certificates: Certificates) -> None:
    """Never a well-formed end."""
    async with upstream_for(scheme, certificates, cut_after(chat_stream(5), tokens=3)) as upstream:
        settings = settings_for(behind(upstream.url, f"http://127.0.0.1:{proxy_port}", certificates))
        async with running_gateway(settings) as gateway:
            response = await gateway.ask(chat())
            assert response.status == 200
            assert not response.complete
            assert "[DONE]" not in data_of(response.body)


@real
async def test_what_http_1_1_can_do_it_can_do_behind_a_proxy(proxy_port: int, certificates: Certificates) -> None:
    """103 heads and trailers pass, as on the hot path: it is the hot path."""
    answer = (
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
        b"Trailer: X-Sum\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 7\r\n\r\n"
    )
    async with upstream_for("https", certificates, Script((Send(answer),))) as upstream:
        settings = settings_for(behind(upstream.url, f"http://127.0.0.1:{proxy_port}", certificates))
        async with running_gateway(settings) as gateway:
            client = await gateway.connect()
            await client.send(chat())
            response = await client.response()
            assert [head.status for head in response.informational] == [103]
            assert response.trailers == [("x-sum", "7")]


@real
@pytest.mark.parametrize("tls", [False, True], ids=["prior-knowledge", "tls"])
async def test_http2_behind_an_http_proxy(tls: bool, proxy_port: int, certificates: Certificates) -> None:
    """Always through CONNECT: a proxy that forwards speaks HTTP/1.1."""
    async with http2_upstream(certificates if tls else None) as upstream:
        settings = settings_for(behind(upstream.url, f"http://127.0.0.1:{proxy_port}", certificates, http2=True))
        async with running_gateway(settings) as gateway:
            client = await gateway.connect()
            body = b'{"tokens": 100000, "gap": 0.005}'
            await client.send(request("POST", "/v1/chat/completions", body, "Content-Type: application/json"))
            await client.until(b"t2")
            assert upstream.requests[0].version == "2"
            client.fin()
            with trio.fail_after(5):
                await upstream.requests[0].left.wait()


# -- SOCKS5 ------------------------------------------------------------------------------------------------------------


@SCHEMES
@pytest.mark.parametrize("credentials", ["", f"{USER}:{PASSWORD}@"], ids=["open", "password"])
@pytest.mark.parametrize("bytewise", [False, True], ids=["whole", "bytewise"])
async def test_a_chat_streams_through_a_socks_proxy(
    scheme: str, credentials: str, bytewise: bool, certificates: Certificates
) -> None:
    """With and without a password, in whatever pieces it answers; names are the proxy's to resolve."""
    proxy = SocksProxy(bytewise=bytewise)
    if credentials:
        proxy.user, proxy.password = b"u@ser", b"p:ss/word"
    async with upstream_for(scheme, certificates, chat_stream(5)) as upstream, socks_proxy(proxy):
        url = upstream.url.replace("127.0.0.1", "localhost")
        settings = settings_for(behind(url, f"socks5://{credentials}127.0.0.1:{proxy.port}", certificates))
        async with running_gateway(settings) as gateway:
            client = await gateway.connect()
            for _ in range(2):
                await client.send(chat())
                response = await client.response()
                assert (response.status, response.complete) == (200, True)
                assert data_of(response.body)[-1] == "[DONE]"
            assert [host for host, _ in proxy.targets] == ["localhost"]
            client.fin()
        await eventually(lambda: proxy.open == 0, "the proxy's connection is still open")


async def test_http2_behind_a_socks_proxy(certificates: Certificates) -> None:
    """ALPN inside TLS inside SOCKS5, and the upstream sees the client leave."""
    proxy = SocksProxy()
    async with http2_upstream(certificates) as upstream, socks_proxy(proxy):
        settings = settings_for(behind(upstream.url, f"socks5://127.0.0.1:{proxy.port}", certificates, http2=True))
        async with running_gateway(settings) as gateway:
            client = await gateway.connect()
            body = b'{"tokens": 100000, "gap": 0.005}'
            await client.send(request("POST", "/v1/chat/completions", body, "Content-Type: application/json"))
            await client.until(b"t2")
            client.fin()
            with trio.fail_after(5):
                await upstream.requests[0].left.wait()


@pytest.mark.parametrize(
    ("proxy", "credentials", "says"),
    [
        (SocksProxy(user=b"a", password=b"b"), "", "it wants a user and a password"),
        (SocksProxy(), "a:b@", "it wants other credentials"),
        (SocksProxy(user=b"a", password=b"b"), "a:wrong@", "it does not accept the user and password"),
        (SocksProxy(user=b"a"), f"{'a' * 256}:b@", "the user or the password is longer than SOCKS5 can say"),
        (SocksProxy(reply=5), "", "it could not connect: connection refused"),
        (SocksProxy(reply=99), "", "it could not connect: code 99"),
        (SocksProxy(drop_after=0), "", "it closed the connection during the SOCKS5 handshake"),
        (SocksProxy(drop_after=1, reply=5), "", "it closed the connection during the SOCKS5 handshake"),
    ],
)
async def test_a_socks_proxy_refuses(
    proxy: SocksProxy, credentials: str, says: str, certificates: Certificates
) -> None:
    """502 with the reason; the socket is closed; no password in any text."""
    async with socks_proxy(proxy):
        url = f"socks5://{credentials}127.0.0.1:{proxy.port}"
        async with running_gateway(settings_for(behind("http://upstream.test", url, certificates))) as gateway:
            response = await gateway.ask(chat())
            assert (response.status, response.error["code"]) == (502, "upstream_unreachable")
            assert f"The proxy socks5://127.0.0.1:{proxy.port}: {says}." in response.error["message"]
            assert "wrong" not in response.body.decode()
        await eventually(lambda: proxy.open == 0, "the proxy's connection is still open")


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
