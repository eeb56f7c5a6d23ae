"""The load generator: what it counts, whom it makes wait, and that every exchange is counted once."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace

import pytest

from loadtest import run as runs
from loadtest.behaviour import Behaviour
from loadtest.engine import Engine
from loadtest.safety import Target, target_of
from loadtest.scenario import Part, Scenario, load, names
from loadtest.upstream import Upstream


@pytest.fixture
def target(upstream: Upstream) -> Target:
    """The upstream itself."""
    return target_of(f"http://{upstream.host}:{upstream.port}")


def silent(_text: str) -> None:
    """Say nothing."""


def drive(target: Target, *parts: Part, streams: int = 4, until: int = 8) -> Engine:
    """A closed loop until so many exchanges are over; its connections are closed."""
    engine = Engine(target, parts)
    engine.closed(streams)
    for _ in range(200):
        engine.run(0.05)
        tally = engine.tally
        if tally.finished + sum(tally.errors.values()) + len(tally.left) >= until:
            break
    engine.close()
    return engine


def test_every_token_is_counted_and_done_is_none(target: Target):
    """Events are tokens; the terminal event is not one."""
    tally = drive(target, Part(upstream=Behaviour(tokens=5, interval=0.0))).tally
    assert tally.finished >= 8
    assert tally.errors == {}
    assert tally.events >= 5 * tally.finished
    assert len(tally.whole) == tally.finished
    assert len(tally.event) > 0


def test_a_kept_connection_is_used_again(target: Target, upstream: Upstream):
    """A closed loop of four needs four connections, however many exchanges it makes."""
    engine = Engine(target, (Part(streamed=False, upstream=Behaviour(tokens=1)),))
    engine.closed(4)
    while engine.tally.finished < 40:
        engine.run(0.02)
    assert len(upstream.connections) == 4
    engine.close()


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (Behaviour(status=500), "status 500"),
        (Behaviour(tokens=9, interval=0.0, cut=700), "cut"),
        (Behaviour(tokens=9, interval=0.0, error_after=2), "ended without [DONE]"),
        (Behaviour(tokens=0, body="empty", interval=0.0), "no events"),
    ],
)
def test_each_kind_of_failure_has_its_name(target: Target, behaviour: Behaviour, error: str):
    """A failed exchange is counted under what happened to it."""
    tally = drive(target, Part(upstream=behaviour, keep_alive=False)).tally
    assert set(tally.errors) == {error}


def test_a_target_that_refuses_is_an_error_not_a_crash():
    """Nobody listens: the dials are counted."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    tally = drive(target_of(f"http://127.0.0.1:{port}"), Part(), streams=1, until=2).tally
    assert tally.errors["connect failed"] >= 1


def test_garbage_is_an_error_not_a_crash():
    """A target that speaks something else is named malformed."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def speak() -> None:
            peer, _address = server.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(b"220 mail.example.org ESMTP\r\n\r\n")

        thread = threading.Thread(target=speak)
        thread.start()
        engine = Engine(target_of(f"http://127.0.0.1:{server.getsockname()[1]}"), (Part(),))
        engine.closed(1)
        while not engine.tally.errors:
            engine.run(0.05)
        assert engine.tally.errors["malformed response"] == 1
        engine.close()
        thread.join(10)


def test_an_open_loop_counts_the_waiting_of_arrivals_it_could_not_start(target: Target):
    """No coordinated omission: with one place and slow answers, later arrivals are late, and their latency says so."""
    engine = Engine(target, (Part(streamed=False, upstream=Behaviour(tokens=1, head=0.05)),))
    engine.open(100, "even", most_in_flight=1)
    while engine.tally.finished < 6:
        engine.run(0.05)
    # One exchange takes 50 ms, so the sixth of arrivals 10 ms apart has waited for five others: at least 200 ms.
    assert engine.tally.held > 0
    assert engine.tally.whole.worst > 190_000
    engine.close()


def test_clients_that_leave_are_seen_by_the_upstream(target: Target, upstream: Upstream):
    """Each leaver has left in a known moment, under the name by which the upstream saw it go."""
    part = Part(leave="together", upstream=Behaviour(tokens=-1, interval=0.01))
    engine = Engine(target, (part,))
    engine.closed(6)
    while engine.tally.events < 30:
        engine.run(0.05)
    engine.leave_together()
    for _ in range(200):
        engine.run(0.05)
        if upstream.totals["left"] >= 6:
            break
    left, report = dict(engine.tally.left), upstream.report()
    engine.close()
    assert len(left) == 6
    assert runs.joined(left, report)["cancel"]["seen_by_upstream"] == 6


def test_a_slow_reader_takes_its_time(target: Target):
    """It reads its rate and not what the upstream makes."""
    part = Part(read="slow", read_rate=10_000, upstream=Behaviour(tokens=-1, interval=0.0, batch=8))
    engine = Engine(target, (part,))
    engine.closed(1)
    while not engine.tally.bytes:
        engine.run(0.05)
    assert engine.tally.bytes <= 10_000
    engine.close()


def test_an_upload_is_sent_whole(target: Target, upstream: Upstream):
    """The body has the announced length, and the answer comes after it."""
    tally = drive(target, Part(streamed=False, upload=300_000, upstream=Behaviour(tokens=1)), streams=1, until=2).tally
    assert tally.errors == {}
    assert upstream.totals["body_bytes"] >= 600_000


def test_a_ramp_ends_where_streams_stall(target: Target):
    """It adds streams step by step, and says how many went without a stall and why it ended."""
    scenario = Scenario(
        name="tiny", mode="ramp", streams=2, step=2, step_seconds=0.2, seconds=0.1,
        parts=(Part(upstream=Behaviour(tokens=1000, interval=0.05)),),
    )  # fmt: skip
    result = runs.run(scenario, target, silent)
    assert result["steps"][0]["streams"] == 2
    assert "most streams without a stall" in runs.shown(result)


@pytest.mark.parametrize("name", ["steady", "faulty", "mixed"])
def test_the_scenarios_run(target: Target, name: str):
    """A short run of what we ship gives figures and a text."""
    assert name in names()
    scenario = replace(load(name), seconds=0.4, warm_up=0.2, streams=5, rate=60)
    result = runs.run(scenario, target, silent)
    assert result["events"] > 0
    assert name in runs.shown(result)
