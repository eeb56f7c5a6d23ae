"""The request cases that bytes alone decide: the verdict of each, however its bytes are split."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from wire_driving import CUTS, STATUS, Requests, by_name, bytewise, cut, load_cases, read_requests

from canal_trio.errors import Failure
from canal_trio.messages import RequestHead
from canal_trio.wire.headers import ForUpstream, for_upstream
from canal_trio.wire.heads import write_request_head
from canal_trio.wire.targets import origin_form, upstream_target

CASES = load_cases("http_cases.json")

# Only a clock or a setting decides these; they are run over sockets elsewhere.
UNDECIDED = {"slow-header-drip", "slow-first-byte", "slow-body-stall", "slow-body-drip", "limit-body-10g"}
DECIDED = [case for case in CASES if case["name"] not in UNDECIDED]


def raw(case: dict[str, Any]) -> bytes:
    """The bytes that the client sends."""
    text: str = case["raw"]
    return text.encode("latin-1")


def upstream_head(head: RequestHead, body: bytes) -> RequestHead:
    """The head as an upstream would see it."""
    form = origin_form(head)
    assert not isinstance(form, Failure)
    target = upstream_target(b"", form[0])
    assert isinstance(target, bytes)
    options = ForUpstream(
        target=target,
        authority=b"up.test:8000",
        client="127.0.0.1",
        client_trusted=False,
        scheme="http",
        request_id=b"req_1",
        pseudonym="canal",
        body=len(body),
    )
    return for_upstream(head, options)


def judge(case: dict[str, Any], seen: Requests) -> None:
    """Hold `seen` against the `check` of the case."""
    check = case["check"]
    answers: list[int | None] = []
    forwarded: list[tuple[RequestHead, bytes]] = []
    for head, body, _ in seen.whole:
        own = head.method == b"OPTIONS" and head.headers.get(b"max-forwards") == b"0"
        answers.append(204 if own else 200)
        if not own:
            forwarded.append((upstream_head(head, body), body))
    if seen.failure is not None:
        answers.append(STATUS[seen.failure.kind])
    elif seen.fault is not None:
        answers.append(400)
    if answers:
        assert answers[0] in check["status"]
    else:
        assert check["silent_ok"]
    count = check["forwarded"]
    low, high = count if isinstance(count, list) else (count, count)
    assert low <= len(forwarded) <= high
    if check["responses"] is not None:
        most = check["responses"][1] if isinstance(check["responses"], list) else check["responses"]
        assert len(answers) <= most
    if check["close"]:
        assert seen.ended or seen.cut
    on_the_wire = b"".join(write_request_head(head) + body for head, body in forwarded)
    for text in check["never"]:
        assert text.encode("latin-1") not in on_the_wire
    if forwarded and check["first"]:
        judge_first(check["first"], *forwarded[0])


def judge_first(expected: dict[str, Any], head: RequestHead, body: bytes) -> None:
    """Hold the first request that an upstream sees against what it has to be."""
    fields = {name.decode(): value.decode("latin-1") for _, name, value in head.headers.lowered()}
    target = head.target.decode("latin-1")
    assert body.decode("latin-1") == expected.get("body", body.decode("latin-1"))
    assert target == expected.get("target", target)
    assert target in expected.get("target_in", [target])
    assert head.method.decode("latin-1") == expected.get("method", head.method.decode("latin-1"))
    assert write_request_head(head).split(b"\r\n")[0].endswith(expected.get("version", "HTTP/1.1").encode())
    assert not set(expected.get("absent", ())) & set(fields)
    assert set(expected.get("has", ())) <= set(fields)
    for name, value in expected.get("equals", {}).items():
        assert fields[name] == value
    for name, value in expected.get("contains", {}).items():
        assert value in fields[name]
    for name, value in expected.get("endswith", {}).items():
        assert fields[name].endswith(value)


def test_the_list_of_undecided_cases_is_up_to_date() -> None:
    """Every case that is left out exists, so that a renamed one cannot slip away."""
    assert {case["name"] for case in CASES} >= UNDECIDED


@pytest.mark.parametrize("case", DECIDED, ids=by_name)
def test_request_case(case: dict[str, Any]) -> None:
    """A request case is decided rightly, and alike whether it is read whole or byte by byte."""
    data = raw(case)
    seen = read_requests([data])
    judge(case, seen)
    assert read_requests(bytewise(data)) == seen


@pytest.mark.parametrize("case", [case for case in DECIDED if len(case["raw"]) <= 400], ids=by_name)
def test_request_case_at_every_cut(case: dict[str, Any]) -> None:
    """Where a read ends changes nothing, wherever it is."""
    data = raw(case)
    seen = read_requests([data])
    for position in range(1, len(data)):
        assert read_requests([data[:position], data[position:]]) == seen


@pytest.mark.parametrize("case", DECIDED, ids=by_name)
@given(positions=CUTS)
@settings(max_examples=5, deadline=None)
def test_request_case_cut_at_random(case: dict[str, Any], positions: list[int]) -> None:
    """Several cuts change nothing either."""
    data = raw(case)
    assert read_requests(cut(data, positions)) == read_requests([data])
