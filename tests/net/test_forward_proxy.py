"""Upstreams behind forward proxies: a real one (proxy.py) for HTTP, a scripted one for SOCKS5."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from kit import chat, data_of, eventually, request, running_gateway, settings_for
from peers import Certificates, http2_upstream
from proxies import PASSWORD, USER, SocksProxy, forward_proxy, socks_proxy

from canal_trio.errors import Phase
from canal_trio.hooks import Outcome
from canal_trio.settings import Drain, Model, Target, Upstream
from canal_trio.testing.scripts import Forever, Pause, Script, Send, chat_stream, cut_after, reply, stream
from canal_trio.testing.upstreams import ScriptedUpstream

TOKEN = b'data: {"t":1}\n\n'


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
    """407 is between the proxy and us: the client gets a 502, and the log says why, without any credentials in it."""
    async with upstream_for(scheme, certificates, chat_stream(3)) as upstream:
        proxy = f"http://{credentials}127.0.0.1:{guarded_port}"
        async with running_gateway(settings_for(behind(upstream.url, proxy, certificates))) as gateway:
            response = await gateway.ask(chat())
            assert (response.status, response.error["code"]) == (502, "upstream_unreachable")
            record = await gateway.records.one()
            assert f"The proxy http://127.0.0.1:{guarded_port}: it answered 407" in str(record.failure)
            assert "wrong" not in response.body.decode() + str(record.failure)
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
        record = await gateway.records.one()
        assert record.failure is not None
        assert record.failure.detail.count("The proxy http://127.0.0.1") == 1
        assert record.failure.phase is Phase.DIAL


async def test_a_proxy_that_is_not_there(certificates: Certificates) -> None:
    """Refused, by the proxy's address, which is for the log."""
    async with ScriptedUpstream(reply({})) as upstream:
        gone = upstream.url.partition("//")[2]
    settings = settings_for(behind("https://upstream.test", f"http://{gone}", certificates))
    async with running_gateway(settings) as gateway:
        response = await gateway.ask(chat())
        assert (response.status, response.error["code"]) == (502, "upstream_unreachable")
        assert gone not in response.error["message"]
        record = await gateway.records.one()
        assert f"{gone}: Connection refused." in str(record.failure)


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
            record = await gateway.records.one()
            assert f"The proxy socks5://127.0.0.1:{proxy.port}: {says}." in str(record.failure)
            assert "wrong" not in response.body.decode()
        await eventually(lambda: proxy.open == 0, "the proxy's connection is still open")


@real
async def test_an_answer_is_drained_through_a_proxy(proxy_port: int, certificates: Certificates) -> None:
    """A client that leaves, where the model drains: the answer is taken to its end behind a proxy as well."""
    whole = chat_stream(3)
    script = Script((*whole.steps[:3], Pause(0.3), *whole.steps[3:]))
    models = (Model("*", (Target("u0"),), on_disconnect=Drain(seconds=20)),)
    async with upstream_for("http", certificates, script) as upstream:
        through = behind(upstream.base_url, f"http://127.0.0.1:{proxy_port}", certificates)
        settings = settings_for(through, models=models)
        async with running_gateway(settings) as gateway:
            client = await gateway.connect()
            await client.send(chat())
            await client.until(b"word0")
            client.fin()
            record = await gateway.records.one()
            assert (record.outcome, record.flags) == (Outcome.CLIENT_GONE, ("drained",))
