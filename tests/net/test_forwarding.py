"""Who we say the client is, through the whole gateway: trusted proxies, and what belongs to one hop only."""

from __future__ import annotations

import pytest
from kit import chat, request, scene

from canal_trio.testing.scripts import chat_stream, reply
from canal_trio.testing.upstreams import SeenRequest

CLAIMS = (
    "X-Forwarded-For: 203.0.113.7",
    "X-Forwarded-Proto: https",
    "X-Forwarded-Host: api.example",
    'Forwarded: for=203.0.113.7;proto=https;host="api.example"',
    "Via: 1.1 edge",
)


def seen_all(seen: SeenRequest, name: str) -> list[str]:
    """Every value of a field that reached the upstream."""
    return [value for key, value in seen.headers if key.lower() == name]


async def test_a_stranger_says_nothing_about_itself() -> None:
    """Without trusted proxies a client's claims are dropped: the upstream and the log get what the socket says."""
    async with scene(reply(b"{}")) as (upstream, gateway):
        client = await gateway.connect()
        await client.send(request("GET", "/v1/models", None, *CLAIMS))
        assert (await client.response()).status == 200
        seen = upstream.requests[0]
        assert seen_all(seen, "x-forwarded-for") == ["127.0.0.1"]
        assert seen_all(seen, "x-forwarded-proto") == ["http"]
        assert seen_all(seen, "x-forwarded-host") == ["gw.test"]
        assert seen_all(seen, "forwarded") == ['for=127.0.0.1;proto=http;host="gw.test"']
        assert seen_all(seen, "via") == ["1.1 edge, 1.1 canal"]
        assert (await gateway.records.one()).client == "127.0.0.1"


async def test_a_trusted_proxys_word_counts() -> None:
    """From a trusted proxy the chain goes on, with our own entry behind it, and the record names the real client."""
    async with scene(reply(b"{}"), trusted_proxies=("127.0.0.0/8",)) as (upstream, gateway):
        client = await gateway.connect()
        await client.send(request("GET", "/v1/models", None, *CLAIMS))
        assert (await client.response()).status == 200
        seen = upstream.requests[0]
        assert seen_all(seen, "x-forwarded-for") == ["203.0.113.7, 127.0.0.1"]
        assert seen_all(seen, "x-forwarded-proto") == ["https"]
        assert seen_all(seen, "x-forwarded-host") == ["api.example"]
        assert seen_all(seen, "forwarded") == [
            'for=203.0.113.7;proto=https;host="api.example", for=127.0.0.1;proto=http;host="gw.test"'
        ]
        assert (await gateway.records.one()).client == "203.0.113.7"


async def test_a_client_behind_a_trusted_proxy_cannot_invent_hops() -> None:
    """The right-most address that is no trusted proxy is the client, whatever is written to the left of it."""
    async with scene(reply(b"{}"), trusted_proxies=("127.0.0.0/8", "10.0.0.0/8")) as (_upstream, gateway):
        client = await gateway.connect()
        await client.send(request("GET", "/", None, "X-Forwarded-For: 192.0.2.1, 203.0.113.7, 10.1.2.3"))
        assert (await client.response()).status == 200
        assert (await gateway.records.one()).client == "203.0.113.7"


@pytest.mark.parametrize(
    "field",
    [
        "Keep-Alive: timeout=5",
        "Proxy-Connection: keep-alive",
        "TE: trailers",
        "Proxy-Authorization: Basic eDp5",
        "Connection: keep-alive, X-Private\r\nX-Private: yes",
        "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAARAAAAA",
    ],
    ids=lambda field: field.partition(":")[0],
)
async def test_what_is_of_one_hop_stays_there(field: str) -> None:
    """Hop-by-hop fields, and those that Connection names, go no further, in either direction."""
    headers = [("Keep-Alive", "timeout=5"), ("Connection", "X-Hop"), ("X-Hop", "yes"), ("X-End", "yes")]
    async with scene(reply(b"{}", headers=headers)) as (upstream, gateway):
        client = await gateway.connect()
        await client.send(request("GET", "/v1/models", None, field, "X-Public: yes"))
        response = await client.response()
        seen = upstream.requests[0]
        for line in field.split("\r\n"):
            name = line.partition(":")[0].lower()
            assert not [value for value in seen_all(seen, name) if value not in ("close", "keep-alive")], seen.headers
        assert seen.header("x-public") == "yes"
        assert response.header("x-end") == "yes"
        assert response.header("x-hop") is None
        assert response.header("keep-alive") is None


async def test_an_event_stream_asks_proxies_not_to_hold_it_back() -> None:
    """Whoever stands before us is told to flush and not to keep it; nobody is asked to compress."""
    async with scene(chat_stream(3)) as (upstream, gateway):
        client = await gateway.connect()
        await client.send(chat("Accept-Encoding: gzip, br"))
        response = await client.response()
        assert response.header("content-type") == "text/event-stream"
        assert response.header("cache-control") == "no-cache"
        assert response.header("x-accel-buffering") == "no"
        assert seen_all(upstream.requests[0], "accept-encoding") == ["identity"]
