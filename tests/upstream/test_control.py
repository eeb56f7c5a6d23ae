"""Control calls: a small GET of our own, over whatever leads to the upstream."""

from __future__ import annotations

import pytest
from peers import Certificates, http2_upstream
from proxies import forward_proxy

from canal_trio.errors import Failure, Kind
from canal_trio.relay.idle import Reaper
from canal_trio.settings import Settings, Upstream
from canal_trio.testing.scripts import reply
from canal_trio.testing.upstreams import ScriptedUpstream
from canal_trio.upstream.connect import Connector
from canal_trio.upstream.control import fetch


async def ask(upstream: Upstream, most: int = 1000) -> tuple[int, bytes] | Failure:
    """GET /models of an upstream."""
    connector = Connector(Settings(), Reaper())
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
