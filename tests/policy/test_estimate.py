"""The guess at what an answer used: only where something may have been generated."""

from __future__ import annotations

from typing import Any

import pytest

from canal_trio.errors import Phase
from canal_trio.hooks import Usage
from canal_trio.policy.estimate import estimated

CUT: dict[str, Any] = {
    "request_bytes": 10,
    "events": 0,
    "streamed": False,
    "generates": True,
    "whole": False,
    "phase": Phase.FIRST_BYTE,
    "status": None,
}


@pytest.mark.parametrize(
    ("change", "usage"),
    [
        ({}, Usage(3)),
        ({"streamed": True, "events": 4, "phase": Phase.STREAM}, Usage(3, 4)),
        ({"streamed": True, "events": 4, "whole": True}, Usage(3, 4)),
        ({"whole": True}, None),
        ({"status": 502}, None),
        ({"status": 200}, Usage(3)),
        ({"generates": False}, None),
        ({"phase": Phase.DIAL}, None),
        ({"phase": Phase.UPLOAD}, None),
    ],
)
def test_the_guess(change: dict[str, Any], usage: Usage | None):
    """Four bytes of the request for each token of the prompt, an event for each one of the completion."""
    assert estimated(**(CUT | change)) == usage
