"""The simulations share the kit of the gateway's tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "gateway"))


@pytest.fixture(params=[True, False], ids=["hand-over", "plain"])
def handover(request: pytest.FixtureRequest) -> bool:
    """Once with streams that hand over on the spot, once with plain Trio streams: nothing may differ."""
    return bool(request.param)
