"""The byte-level request cases, over real sockets, in front of an upstream that forgives nothing.

Every case runs whole; those without timed steps also byte by byte and cut at random. All runs go on at once, so that
their waits overlap; each test then judges the runs of one case. A run ends when the gateway closes the connection,
which an idle one does after `keep_alive` seconds: whether the gateway closed by its own will is told by its answer.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
from kit import Client, Ended, Response, eventually, running_gateway, settings_for
from strict import Recorded, strict_upstream

from canal_trio.settings import Bounds, Deadlines, Key, Settings

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent.parent / "cases/http_cases.json").read_text())
AT_ONCE = 24
HANGS = 120.0  # seconds for one run: 24 at once, some of them byte by byte, on a machine that is busy with other things
SECRET = "sk-test"  # the gateway's key, where keys are on

# Cases whose expectation is believed wrong, with what says otherwise.
DISPUTED: dict[str, str] = {}


@dataclass
class Run:
    """What one run of a case showed."""

    way: str
    responses: list[Response]
    informational: int
    ended_by: str | None
    left_over: bytes
    requests: list[Recorded]
    received: str
    garbage: list[str]
    records: int


def settings_of(case: dict[str, Any], url: str) -> Settings:
    """What the case presumes of the configuration."""
    needs = case.get("needs", "")
    deadlines = Deadlines(keep_alive=0.6, request_head=HANGS, body_idle=HANGS)
    if "short timeouts" in needs:
        deadlines = Deadlines(keep_alive=0.8, request_head=1.0, body_idle=1.0)
    settings = settings_for(url, deadlines=deadlines)
    if "API keys on" in needs:
        settings = replace(settings, keys=(Key("team", hashlib.sha256(SECRET.encode()).hexdigest()),))
    if "body limit" in needs:
        settings = replace(settings, bounds=Bounds(body_bytes=1 << 30))
    return settings


def pieces_of(raw: bytes, way: str) -> list[bytes]:
    """The bytes as they are sent: whole, one by one, or cut at random (the same cuts every time)."""
    if way == "whole":
        return [raw]
    if way == "bytes":
        # The long ones byte by byte only around their ends; in between every cut says the same.
        if len(raw) <= 2048:
            return [raw[at : at + 1] for at in range(len(raw))]
        middle = raw[700:-700]
        singles = [raw[at : at + 1] for at in range(700)]
        tail = raw[-700:]
        return [
            *singles,
            *(middle[at : at + 97] for at in range(0, len(middle), 97)),
            *(tail[at : at + 1] for at in range(700)),
        ]
    chance = random.Random(raw)
    cuts = sorted({0, len(raw), *(chance.randrange(len(raw) + 1) for _ in range(chance.randrange(1, 9)))})
    return [raw[start:end] for start, end in itertools.pairwise(cuts)]


async def drive(client: Client, case: dict[str, Any], way: str) -> None:
    """Send what the case says."""
    if "steps" not in case:
        for piece in pieces_of(case["raw"].encode("latin-1"), way):
            await client.send(piece)
            await trio.lowlevel.checkpoint()
        return
    for step in case["steps"]:
        match step:
            case ["send", text]:
                await client.send(text.encode("latin-1"))
            case ["wait", seconds]:
                await trio.sleep(seconds)
            case ["shut_wr"]:
                client.shutdown()
            case ["read_head"]:
                await eventually(lambda: b"\r\n\r\n" in client.seen)


async def one(case: dict[str, Any], way: str) -> Run:
    """Run a case one way."""
    async with strict_upstream() as upstream, running_gateway(settings_of(case, upstream.url)) as gateway:
        client = await gateway.connect()
        responses: list[Response] = []

        async def read() -> None:
            try:
                while True:
                    # A method of our own knows no HEAD: no case sends one.
                    responses.append(await client.response())
            except Ended:
                pass

        with trio.fail_after(HANGS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await drive(client, case, way)
        informational = sum(len(response.informational) for response in responses)
        left_over = bytes(client.buffer)
        ended_by = client.ended_by
        await gateway.settle()
        records = len(gateway.records.all)
    return Run(
        way,
        responses,
        informational,
        ended_by,
        left_over,
        upstream.requests,
        upstream.received,
        upstream.garbage,
        records,
    )


@pytest.fixture(scope="module")
def runs() -> dict[str, list[Run | BaseException]]:
    """Every run of every case."""
    found: dict[str, list[Run | BaseException]] = {case["name"]: [] for case in CASES}

    async def main() -> None:
        limit = trio.CapacityLimiter(AT_ONCE)

        async def run(case: dict[str, Any], way: str) -> None:
            async with limit:
                try:
                    found[case["name"]].append(await one(case, way))
                except Exception as exc:
                    found[case["name"]].append(exc)

        async with trio.open_nursery() as nursery:
            for case in CASES:
                for way in ("whole",) if "steps" in case else ("whole", "bytes", "cut"):
                    nursery.start_soon(run, case, way)

    trio.run(main)
    return found


def within(value: int, allowed: int | list[int]) -> bool:
    """An exact count, or a range from least to most."""
    return allowed[0] <= value <= allowed[1] if isinstance(allowed, list) else value == allowed


def judge_first(request: Recorded, want: dict[str, Any]) -> None:
    """The first forwarded request, as the upstream saw it."""
    for name, value in (("method", request.method), ("target", request.target), ("version", request.version)):
        assert name not in want or want[name] == value, (name, value)
    if "body" in want:
        assert request.body == want["body"].encode("latin-1")
    if "target_in" in want:
        assert request.target in want["target_in"]
    for name, value in want.get("equals", {}).items():
        assert request.all(name) == [value], (name, request.headers)
    for name in want.get("absent", []):
        assert not request.all(name), (name, request.headers)
    for name in want.get("has", []):
        assert request.all(name), (name, request.headers)
    for name in want.get("single", []):
        assert len(request.all(name)) == 1, (name, request.headers)
    for name, value in want.get("contains", {}).items():
        assert value in ", ".join(request.all(name)), (name, request.headers)
    for name, value in want.get("endswith", {}).items():
        assert ", ".join(request.all(name)).endswith(value), (name, request.headers)
    if "has_host" in want:
        assert request.all("host") == [want["has_host"]]


def judge(case: dict[str, Any], run: Run) -> None:
    """Everything the case's `check` says."""
    check = case["check"]
    keys_on = "API keys on" in case.get("needs", "")
    complete = [request for request in run.requests if request.complete]
    assert run.garbage == []
    statuses = [response.status for response in run.responses]
    if not run.responses:
        assert check["silent_ok"], "closed without an answer"
    else:
        assert statuses[0] in ([401] if keys_on else check["status"]), statuses
    for response in run.responses:
        assert response.complete, response
        if response.status != 200:
            assert response.status < 400 or response.error
            assert response.header("x-request-id")
    assert run.left_over == b"", "bytes after the last response"
    assert within(len(complete), 0 if keys_on else check["forwarded"]), [request.target for request in complete]
    for text in check["never"]:
        assert text not in run.received
    if check["close"]:
        assert run.ended_by is not None
        assert not run.responses or run.responses[-1].header("connection") == "close", run.responses[-1].headers
    if check["responses"] is not None:
        assert within(len(run.responses), check["responses"]), statuses
    if check.get("no_1xx"):
        assert run.informational == 0
    if check["first"] is not None and complete:
        judge_first(complete[0], check["first"])
    if "identity" in case.get("needs", ""):
        assert not [name for name, _ in complete[0].headers if name.startswith("x-canal")]
    assert run.records >= len(run.responses), "a request without a record"


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in CASES])
def test_request_case(case: dict[str, Any], runs: dict[str, list[Run | BaseException]]) -> None:
    """Answer, forwarding and closing are as the case says, however its bytes were cut."""
    for run in runs[case["name"]]:
        if isinstance(run, BaseException):
            raise run
        if case["name"] in DISPUTED:
            continue
        try:
            judge(case, run)
        except AssertionError as exc:
            raise AssertionError(f"{run.way}: {exc}; expected: {case['expect']} ({case['source']})") from exc


def test_every_case_was_run_every_way(runs: dict[str, list[Run | BaseException]]) -> None:
    """161 cases: each whole, and each without timed steps in three ways."""
    assert len(CASES) == 161
    assert sum(map(len, runs.values())) == sum(1 if "steps" in case else 3 for case in CASES)
