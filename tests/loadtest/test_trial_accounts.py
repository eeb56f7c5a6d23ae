"""The accounts of a trial: each rule can be broken, and the faults are drawn from the seed alone."""

from __future__ import annotations

import io
import json
import socket
from functools import partial
from typing import Any

import pytest
import trio

from loadtest.behaviour import Behaviour
from loadtest.safety import target_of
from loadtest.trials import slowheads
from loadtest.trials.books import agree
from loadtest.trials.customers import Customers, Habits, Visit
from loadtest.trials.faults import KINDS, draw
from loadtest.trials.load import load
from loadtest.trials.proxy import FaultProxy
from loadtest.trials.slowheads import Attack
from loadtest.upstream import Upstream


def visit(outcome: str = "complete", ident: str = "a", **more: Any) -> Visit:
    """A client that was answered."""
    return Visit(ident, "stream", Behaviour(), outcome, **{"status": 200, "answered": True, "sent": True, **more})


def record(outcome: str = "completed", ident: str = "a") -> dict[str, Any]:
    """What the gateway wrote down."""
    return {"request_id": ident, "outcome": outcome, "failure": None, "flags": []}


def attempt(ident: str = "a", since_done: float = 0.0, *, whole: bool = True, terminal: bool = True) -> dict[str, Any]:
    """What the link let pass."""
    return {
        "ident": ident, "attempt": 1, "fault": "cut", "whole": whole, "terminal": terminal, "since_done": since_done,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("visits", "records", "attempts", "broken"),
    [
        ([visit()], [record()], [attempt()], set()),
        ([visit("hung")], [record("upstream_failed")], [], {"hung"}),
        ([visit("dishonest")], [record()], [], {"dishonest"}),
        ([visit()], [], [attempt()], {"no record"}),
        ([visit()], [record(), record()], [attempt()], {"too many records"}),
        ([visit(), visit()], [record()], [attempt()], {"too many records", "no record"}),
        ([], [record()], [], {"records of nobody"}),
        ([visit()], [record()], [attempt(whole=False)], {"finished, but its upstream did not"}),
        ([visit()], [record()], [attempt(whole=False, since_done=1.1)], set()),
        ([visit()], [record()], [attempt(whole=False, terminal=False, since_done=1.1)],
         {"finished, but its upstream did not"}),
        ([visit()], [record()], [], {"finished, but its upstream did not"}),
        ([visit()], [record("client_gone")], [attempt()], {"record does not fit"}),
        ([visit("broken")], [record("client_gone")], [], {"record does not fit"}),
        ([visit("left", answered=False)], [], [], set()),
        ([visit("left")], [], [], {"no record"}),
        ([visit("unanswered", answered=False)], [], [], {"no record"}),
        ([visit("unanswered", answered=False, sent=False)], [], [], set()),
    ],
)  # fmt: skip
def test_each_rule_can_be_broken(
    visits: list[Visit], records: list[dict[str, Any]], attempts: list[dict[str, Any]], broken: set[str]
):
    """What does not agree is found under its rule, and nothing else is."""
    faults = agree(visits, records, attempts)
    assert {rule for rule, found in faults.items() if found} == broken


def test_without_a_link_nobody_is_asked_what_passed():
    """A trial without a link judges by clients and records alone."""
    assert not any(agree([visit()], [record()]).values())


def test_faults_depend_on_nothing_but_the_seed():
    """The same attempt has the same fault; another one, or another seed, mostly another; all kinds come."""
    drawn = [draw("s", f"i{number}", 1) for number in range(500)]
    assert drawn == [draw("s", f"i{number}", 1) for number in range(500)]
    assert {fault.kind for fault in drawn} == set(KINDS)
    assert drawn != [draw("t", f"i{number}", 1) for number in range(500)]
    assert {draw("s", f"i{number}", 1, weight_of_none=1e9).kind for number in range(50)} == {"none"}


def run_customers(target_url: str, habits: Habits, enough: int = 8) -> list[Visit]:
    """A few clients, until there were so many visits."""
    customers = Customers(target_of(target_url), habits, "t")

    async def during() -> None:
        with trio.fail_after(60):
            while len(customers.visits) < enough:  # noqa: ASYNC110  # it has no event
                await trio.sleep(0.01)

    load(customers, 4, during, lambda _text: None)
    return customers.visits


CALM = Habits(documents=0.3, uploads=0.1, leavers=0.1, slow=0.1, tokens=(1, 5), interval=(0.0, 0.02))


def test_customers_of_an_honest_upstream_are_content(upstream: Upstream):
    """Every outcome is complete, or left on purpose."""
    visits = run_customers(f"http://{upstream.host}:{upstream.port}", CALM)
    assert {one.outcome for one in visits} <= {"complete", "left"}
    assert any(one.outcome == "complete" for one in visits)


class Liar:
    """Answers everything with the same finished stream of three tokens, whatever was asked."""

    async def __call__(self, stream: trio.SocketStream) -> None:
        """One request, one lie."""
        async with stream:
            await stream.receive_some()
            event = b'data: {"choices":[{"delta":{"content":" token0"}}]}\n\n'
            done = b"data: [DONE]\n\n"
            body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (event, done)) + b"0\r\n\r\n"
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
            await stream.send_all(head + b"Connection: close\r\n\r\n" + body)


async def test_customers_see_through_a_made_up_end():
    """A finished message that has not all in it is dishonest, and the note says what came."""
    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, Liar(), 0, host="127.0.0.1"))
        target = target_of(f"http://127.0.0.1:{listener.socket.getsockname()[1]}")
        habits = Habits(documents=0, uploads=0, leavers=0, slow=0, tokens=(5, 9))
        customers = Customers(target, habits, "t")
        async with trio.open_nursery() as clients:
            clients.start_soon(customers.run, 1)
            while not customers.visits:  # noqa: ASYNC110  # it has no event
                await trio.sleep(0.01)
            customers.stop()
        nursery.cancel_scope.cancel()
    assert {one.outcome for one in customers.visits} == {"dishonest"}
    assert "not all is in it" in customers.visits[0].note


def test_nobody_there_is_an_outcome_too():
    """Clients of a dead port have gone unanswered, and had sent nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    visits = run_customers(f"http://127.0.0.1:{port}", CALM)
    assert {(one.outcome, one.sent) for one in visits} == {("unanswered", False)}


async def test_the_link_lets_pass_what_its_fault_says(upstream: Upstream, monkeypatch: pytest.MonkeyPatch):
    """A cut after 300 bytes passes just these and says so in the book; without a fault all of it passes."""
    from loadtest.trials import proxy as link
    from loadtest.trials.faults import Fault

    plan = {"one": Fault("cut", 300), "two": Fault(), "three": Fault("cut", tail=5)}
    monkeypatch.setattr(link, "draw", lambda _seed, ident, _attempt, _calm: plan[ident])
    book = io.StringIO()
    proxy = FaultProxy((upstream.host, upstream.port), "s", book)
    got: dict[str, bytes] = {}
    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, proxy.handle, 0, host="127.0.0.1"))
        for ident in plan:
            async with await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1]) as stream:
                user = Behaviour(tokens=3, interval=0.0).encode(ident)
                body = json.dumps({"user": user, "stream": True}).encode()
                head = b"POST /v1/chat/completions HTTP/1.1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
                await stream.send_all(head % len(body) + body)
                got[ident] = b""
                while data := await stream.receive_some():
                    got[ident] += data
        nursery.cancel_scope.cancel()
    assert len(got["one"]) == 300
    assert got["two"].endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert got["three"].endswith(b"data: [DONE]\n\n\r\n")
    lines = {line["ident"]: line for line in map(json.loads, book.getvalue().splitlines())}
    assert [(lines[one]["whole"], lines[one]["terminal"], lines[one]["broke"]) for one in plan] == [
        (False, False, True), (True, True, False), (False, True, True),
    ]  # fmt: skip


def test_attackers_account_for_each_of_them(upstream: Upstream, monkeypatch: pytest.MonkeyPatch):
    """A server that never throws anybody out is told as such: all are still there."""
    monkeypatch.setattr(slowheads, "_COMING", 0.05)
    found = Attack((upstream.host, upstream.port), 20, seconds=0.3, grace=0.2).run()
    assert (found["opened"], found["thrown_out"], found["still_there"]) == (20, 0, 20)
