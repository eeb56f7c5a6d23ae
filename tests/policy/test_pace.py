"""When a place will be free: from how long places are held, how many there are, and who is in front."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canal_trio.policy.pace import LONGEST, SHORTEST, Pace

durations = st.floats(0, 1e6)


def test_nothing_known_yet():
    """Without any experience it is a second for each in front, shared by those who are busy."""
    pace = Pace()
    assert pace.wait(busy=1, ahead=0) == SHORTEST
    assert pace.wait(busy=10, ahead=99) == 10


@pytest.mark.parametrize(("busy", "ahead", "expected"), [(1, 0, 8), (1, 3, 32), (4, 3, 8), (100, 0, 1), (1, 100, 60)])
def test_places_of_eight_seconds(busy: int, ahead: int, expected: float):
    """Of n places held for 8 s one becomes free every 8/n s; who is behind k others waits for k + 1 of them."""
    pace = Pace()
    for _ in range(5):
        pace.ended(8.0)
    assert pace.wait(busy, ahead) == pytest.approx(expected)


def test_it_learns():
    """When exchanges become longer the answer follows, within some dozens of them."""
    pace = Pace()
    pace.ended(1.0)
    for _ in range(60):
        pace.ended(20.0)
    assert pace.wait(busy=1, ahead=0) == pytest.approx(20, rel=0.05)


@given(st.lists(durations), st.integers(0, 10**6), st.integers(0, 10**6))
def test_it_is_bounded_and_grows_with_the_queue(ended: list[float], busy: int, ahead: int):
    """Never below a second or above a minute; the mean stays among what was seen; a longer queue never waits less."""
    pace = Pace()
    for seconds in ended:
        pace.ended(seconds)
    assert SHORTEST <= pace.wait(busy, ahead) <= pace.wait(busy, ahead + 1) <= LONGEST
    if ended:
        assert pace.mean is not None
        assert min(ended) <= pace.mean * (1 + 1e-9)
        assert pace.mean <= max(ended) * (1 + 1e-9)
