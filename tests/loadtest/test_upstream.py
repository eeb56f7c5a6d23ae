"""The load test's upstream plays what it is asked to play, and counts honestly."""

from __future__ import annotations

import json
import socket

import pytest

from loadtest import bodies
from loadtest.behaviour import Behaviour
from loadtest.peers import Gateway
from loadtest.processes import get
from loadtest.promises.kit import Client, until
from loadtest.upstream import Upstream


def test_a_stream_has_exactly_its_tokens_and_done(client: Client):
    """What was asked for comes: so many tokens, in order, usage, and the end."""
    client.ask(Behaviour(tokens=5, interval=0.001, usage=True))
    payload = client.rest()
    assert client.response.done
    assert [f" token{n}".encode() in payload for n in range(6)] == [True] * 5 + [False]
    assert b'"completion_tokens": 5' in payload
    assert payload.endswith(bodies.DONE)


def test_without_stream_it_is_one_document(client: Client):
    """A request that does not ask for a stream gets JSON with a length."""
    client.ask(Behaviour(tokens=3), streamed=False)
    document = json.loads(client.rest())
    assert document["choices"][0]["message"]["content"] == "token0 token1 token2"
    assert b"Content-Length" in client.response.head


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
@pytest.mark.parametrize("split", [0, 1, 7])
def test_canned_bodies_arrive_whole(client: Client, framing: str, split: int):
    """In every framing and splitting the payload is the body's."""
    client.ask(Behaviour(body="utf8", interval=0.0, framing=framing, split=split))
    assert client.rest() == b"".join(bodies.canned("utf8"))
    assert client.response.done


@pytest.mark.parametrize("split", [0, 1, 3])
def test_a_cut_comes_at_its_byte(direct: Gateway, split: int):
    """Exactly so many bytes leave, wherever that is, head included."""
    for offset in (0, 1, 50, 150, 200):
        client = Client(direct)
        client.ask(Behaviour(body="three", interval=0.0, cut=offset, split=split))
        client.rest()
        client.close()
        assert client.received == offset
        assert not client.response.done


def test_one_connection_serves_many_requests(client: Client):
    """Keep-alive: the next answer comes on the same socket."""
    for number in range(3):
        client.ask(Behaviour(tokens=number, interval=0.0))
        assert client.rest().count(b" token") == number


def test_an_error_in_the_band_ends_the_stream(client: Client):
    """After so many tokens the error event, then a proper end without [DONE]."""
    client.ask(Behaviour(tokens=9, interval=0.0, error_after=2))
    payload = client.rest()
    assert payload.count(b" token") == 2
    assert b'"error"' in payload
    assert bodies.DONE not in payload
    assert client.response.done


def test_a_status_is_answered_as_json(client: Client):
    """A failing upstream is no stream."""
    client.ask(Behaviour(status=503))
    assert "error" in json.loads(client.rest())
    assert client.response.status == 503


def test_an_impossible_behaviour_is_refused(upstream: Upstream, direct: Gateway):
    """A user that asks for what nobody can play gets the connection closed, and is counted."""
    with socket.create_connection((direct.host, direct.port), 10) as sock:
        body = b'{"user": "lt-1;tokens=lots"}'
        sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        assert sock.recv(100) == b""
    assert upstream.totals["bad_requests"] == 1


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize(
    ("phase", "behaviour"),
    [("head", Behaviour(head=60)), ("first", Behaviour(first=60)), ("stream", Behaviour(tokens=-1, interval=0.005))],
)
def test_a_peer_that_leaves_is_seen_in_every_phase(
    upstream: Upstream, client: Client, how: str, phase: str, behaviour: Behaviour
):
    """FIN and RST are noted once, with the phase and what was sent."""
    client.ask(behaviour)

    def there() -> bool:
        return any(entry["phase"] == phase for entry in upstream.report()["live"])

    assert until(there, 10)
    client.leave(how)
    assert until(lambda: upstream.totals["left"] == 1, 10)
    entry = upstream.left[0]
    assert (entry["user"], entry["phase"]) == (client.ident, phase)
    assert (entry["tokens"] > 0) == (phase == "stream")


def test_a_peer_that_leaves_during_its_upload_is_seen(upstream: Upstream, client: Client):
    """A request that never becomes whole is an answer that was left, not a bad request."""
    client.ask(Behaviour(), upload=5000, part=0.5)
    assert until(lambda: bool(upstream.report()["live"]), 10)
    client.leave("rst")
    assert until(lambda: upstream.totals["left"] == 1, 10)
    assert upstream.left[0]["phase"] == "upload"


def test_tokens_after_a_client_said_that_it_left_are_wasted(upstream: Upstream, client: Client):
    """Any client can announce its leaving; what is sent after that counts until the peer's close is seen."""
    client.ask(Behaviour(tokens=-1, interval=0.002))
    client.read_until(b"token1")
    get(f"http://{upstream.host}:{upstream.port}/_loadtest/left?user={client.ident}")
    client.read_until(b"token")
    client.leave("rst")
    assert until(lambda: upstream.totals["left"] == 1, 10)
    assert upstream.totals["tokens_wasted"] > 0


def test_a_slow_reader_of_requests_reads_on(client: Client):
    """The body arrives at the asked rate, and the answer after it."""
    client.ask(Behaviour(tokens=1, read_rate=1_000_000), upload=100_000)
    assert b"token0" in client.rest()


def test_a_client_that_does_not_read_stops_the_upstream(upstream: Upstream, direct: Gateway):
    """An endless burst stands still when the socket is full, and goes on afterwards."""
    client = Client(direct, receive_buffer=8192)
    client.ask(Behaviour(tokens=-1, interval=0.0, batch=8))
    seen = [-1]

    def stands() -> bool:
        before, seen[0] = seen[0], upstream.totals["bytes"]
        return before == seen[0] > 0

    assert until(stands, 10, every=0.1)
    while client.received <= seen[0]:
        assert client.read() is not None
    client.close()


def test_its_own_paths_do_not_count_as_load(upstream: Upstream):
    """Asking for the report changes no figure in it, and a path that is not there says so."""
    url = f"http://{upstream.host}:{upstream.port}/_loadtest"
    assert json.loads(get(f"{url}/report"))["totals"]["requests"] == 0
    assert upstream.control("/_loadtest/nowhere")[0] == 404
    get(f"{url}/reset")
    assert json.loads(get(f"{url}/report"))["totals"]["requests"] == 0
