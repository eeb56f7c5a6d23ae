"""Heads that are made of the ones before them: the same bytes as if they were made anew."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from canal_trio.gateway.answers import ClientHeads
from canal_trio.gateway.balancing import Balancing
from canal_trio.gateway.catalogue import Catalogue
from canal_trio.gateway.core import Generation
from canal_trio.gateway.exchange import Exchange
from canal_trio.gateway.requests import UpstreamRequest, UpstreamRequests
from canal_trio.messages import Headers, RequestHead, ResponseHead
from canal_trio.policy.listing import Listing
from canal_trio.policy.routing import Router
from canal_trio.relay.idle import Reaper
from canal_trio.settings import Settings, Upstream
from canal_trio.upstream.connect import Connector
from canal_trio.wire.headers import ForClient

UPSTREAMS = (Upstream("a", "http://a.test/v1"), Upstream("b", "http://b.test", api_key="sk-b"))


def generation(settings: Settings) -> Generation:
    """One that nothing is asked of but its settings."""
    router = Router(settings)
    catalogue = Catalogue(settings, Connector(settings, Reaper()))
    return Generation(settings, router, {}, Balancing(settings, {}), Listing(settings, router), catalogue)


GENERATIONS = [generation(settings) for settings in (Settings(), Settings(pseudonym="other"))]
HEADS = [
    RequestHead(b"POST", b"/v1/chat/completions", Headers([(b"Host", b"gw"), (b"Content-Length", b"5"), *more]))
    for more in ([], [(b"X-A", b"1")], [(b"X-Request-Id", b"mine")], [(b"X-A", b"X-Request-Id: req_1")])
]
ANSWERS = [
    ResponseHead(200, Headers([(b"Content-Type", b"text/event-stream"), *more]), b"OK")
    for more in ([], [(b"X-Request-Id", b"req_1")], [(b"Date", b"today")], [(b"X-Note", b"X-Request-Id: req_1")])
]
WAYS = st.builds(
    ForClient,
    request_version=st.sampled_from([b"1.1", b"1.0"]),
    request_method=st.sampled_from([b"POST", b"HEAD"]),
    request_id=st.sampled_from([b"req_1", b"req_2"]),
    pseudonym=st.just("canal"),
    body=st.sampled_from([None, 5]),
    close=st.booleans(),
    event_stream=st.booleans(),
    date=st.sampled_from([b"now", b"later"]),
)


@given(st.lists(st.tuples(st.sampled_from(ANSWERS), WAYS), max_size=6))
def test_a_head_for_a_client_does_not_depend_on_the_one_before(sequence: list[tuple[ResponseHead, ForClient]]) -> None:
    """Whatever was written before on this connection, a head is the one that a new connection would get."""
    heads = ClientHeads()
    for head, options in sequence:
        assert heads.block(head, options) == ClientHeads().block(head, options)


def test_every_option_but_the_id_counts() -> None:
    """Of what a head is made of, only the id may differ from what is remembered: it is the first, and left out."""
    assert ForClient._fields[0] == "request_id"


async def test_a_head_for_an_upstream_does_not_depend_on_the_one_before() -> None:
    """The same for requests: head, upstream, configuration and id all count, and head and bytes agree."""
    requests = UpstreamRequests(peer="192.0.2.1", scheme="http")
    for number in range(400):
        head = HEADS[number * 7 % 11 % len(HEADS)]
        upstream, generation = UPSTREAMS[number // 3 % 2], GENERATIONS[number // 5 % 2]
        exchange = Exchange(head, client="192.0.2.1", started=0.0)
        fresh = UpstreamRequests(peer="192.0.2.1", scheme="http")
        made, anew = (one.make(exchange, upstream, generation, trusted=False) for one in (requests, fresh))
        assert isinstance(made, UpstreamRequest)
        assert (made.head, made.block, made.chunked) == (anew.head, anew.block, anew.chunked)
        assert b"X-Request-Id: %b\r\n" % exchange.id.encode() in made.block
        assert made.head.headers.get_all(b"x-request-id") == [exchange.id.encode()]
