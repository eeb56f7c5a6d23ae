"""The upstream cases that bytes alone decide: what is seen of each answer, however its bytes are split."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from wire_driving import CUTS, Response, by_name, bytewise, cut, load_cases, read_requests, read_response

from canal_trio.errors import Failure
from canal_trio.wire.bodies import content_length
from canal_trio.wire.headers import ForClient, for_client, is_event_stream, keep_alive, upgrade_of
from canal_trio.wire.heads import write_response_head

CASES = load_cases("http_upstream_cases.json")

# Nothing is sent: the clock and the pool decide. Run over sockets elsewhere.
UNDECIDED = {"up-hang", "up-close-fresh", "up-close-fresh-post"}
DECIDED = [case for case in CASES if case["name"] not in UNDECIDED]


def sends(case: dict[str, Any]) -> list[bytes]:
    """What the upstream sends, one read each."""
    return [step[1].encode("latin-1") for step in case["upstream"] if step[0] == "send"]


def method_of(case: dict[str, Any]) -> bytes:
    """The method that was asked with."""
    method: str = case["request"].partition(" ")[0]
    return method.encode()


def seen_of(case: dict[str, Any], reads: Any) -> Response:
    """What is seen of the answer, with EOF where the case closes."""
    return read_response(reads, method_of(case), eof=["close"] in case["upstream"])


def to_client(case: dict[str, Any], seen: Response) -> tuple[int, bytes]:
    """The status and the heads that a client would get."""
    request = read_requests([case["request"].encode("latin-1")]).whole[0][0]
    if seen.head is None or seen.failure is not None or (seen.head.status == 101 and not upgrade_of(request)):
        return 502, b""
    length = content_length(seen.head.headers)
    options = ForClient(
        request_version=request.version,
        request_method=request.method,
        request_id=b"req_1",
        pseudonym="canal",
        body=length if isinstance(length, int) and not is_event_stream(seen.head.headers) else None,
    )
    assert not isinstance(length, Failure)
    heads = [*seen.informational, seen.head]
    return seen.head.status, b"".join(write_response_head(for_client(head, options)) for head in heads)


def judge(case: dict[str, Any], seen: Response) -> None:
    """Hold `seen` against the `check` of the case."""
    check = case["check"]
    status, heads = to_client(case, seen)
    assert status in check["status"]
    lines = heads.lower().split(b"\r\n")
    names = [line.partition(b":")[0].decode("latin-1") for line in lines]
    if status == 502:
        return
    payload = seen.payload.decode("latin-1")
    assert check["body"] is None or payload == check["body"]
    assert payload.startswith(check["body_prefix"] or "")
    if check["complete"] is not None:
        assert (seen.end is not None) == check["complete"]
    if check["reused"] is not None:
        assert seen.head is not None
        reusable = seen.end is not None and not seen.rest and keep_alive(seen.head.version, seen.head.headers)
        late = case["name"] == "up-extra-late"  # comes after the end; the pool finds the connection readable
        assert reusable == check["reused"] or late
    for name in check["absent"]:
        field, _, only_for = name.partition("?")
        assert field not in names or (only_for and int(only_for) != status)
    assert set(check["present"]) <= set(names)
    for name, count in check.get("count", {}).items():
        assert names.count(name) == count
    for text in check.get("never_bytes", ()):
        assert text.lower().encode("latin-1") not in heads.lower()


def test_the_list_of_undecided_cases_is_up_to_date() -> None:
    """Every case that is left out exists, so that a renamed one cannot slip away."""
    assert {case["name"] for case in CASES} >= UNDECIDED


@pytest.mark.parametrize("case", DECIDED, ids=by_name)
def test_upstream_case(case: dict[str, Any]) -> None:
    """An upstream case is decided rightly, in the reads of the case and byte by byte."""
    seen = seen_of(case, sends(case))
    judge(case, seen)
    assert seen_of(case, bytewise(b"".join(sends(case)))) == seen


@pytest.mark.parametrize("case", DECIDED, ids=by_name)
@given(positions=CUTS)
@settings(max_examples=5, deadline=None)
def test_upstream_case_cut_at_random(case: dict[str, Any], positions: list[int]) -> None:
    """Where reads end changes nothing."""
    whole = b"".join(sends(case))
    assert seen_of(case, cut(whole, positions)) == seen_of(case, [whole])
