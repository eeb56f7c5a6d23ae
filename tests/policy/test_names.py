"""Names and patterns: the dictionary finds what going through all of them one by one would choose."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canal_trio.policy.names import Names

TEXTS = st.text("ab", max_size=4)
PATTERNS = st.lists(st.one_of(TEXTS, st.tuples(TEXTS, TEXTS).map("*".join)), max_size=8)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gpt-4o", ("gpt-4o", None)),
        ("gpt-4o-mini", ("gpt-4o*", "-mini")),
        ("gpt-4", ("gpt-*", "4")),
        ("a-mini", ("*-mini", "a")),
        ("gpt-4o-", ("gpt-4o*", "-")),
        ("", ("*", "")),
        ("x", ("*", "x")),
    ],
)
def test_the_nearest_pattern_wins(name: str, found: tuple[str, str | None]):
    """Exact names first, then whoever spells out most, then the longer beginning."""
    patterns = ["gpt-4o", "gpt-*", "gpt-4o*", "*-mini", "*"]
    assert Names((pattern, pattern) for pattern in patterns).find(name) == found


def test_a_star_does_not_overlap():
    """Beginning and end of a pattern are two texts: `ab*ba` is no pattern for `aba`."""
    names = Names([("ab*ba", 1)])
    assert "aba" not in names
    assert names.find("abba") == (1, "")


@given(PATTERNS, TEXTS)
def test_as_one_by_one(patterns: list[str], name: str):
    """The pattern that is found fits, none that fits spells out more, and the star is what is left."""
    fitting = [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]
    found = Names((pattern, pattern) for pattern in patterns).find(name)
    if not fitting:
        assert found is None
        return
    assert found is not None
    pattern, star = found
    assert pattern in fitting
    if star is None:
        assert pattern == name
    else:
        assert name not in patterns
        assert pattern.replace("*", star) == name
        assert len(pattern) == max(map(len, fitting))
