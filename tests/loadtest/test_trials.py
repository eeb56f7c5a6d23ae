"""A slice of each trial against the real program: that it passes, and that it can fail."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loadtest.trials.attack import attack
from loadtest.trials.chaos import chaos
from loadtest.trials.commands import passed, shown
from loadtest.trials.customers import Habits
from loadtest.trials.gateway import QUICK, State, compared
from loadtest.trials.kill import kill
from loadtest.trials.reload import reload

pytestmark = pytest.mark.slow


def silent(_text: str) -> None:
    """Say nothing."""


def broken(result: dict[str, Any]) -> list[str]:
    """What did not hold."""
    verdicts = [verdict for verdict in result["verdicts"] if verdict.kept is False]
    return [f"{one.promise}: {one.what}: {one.measured} ({one.note})" for one in verdicts]


def test_chaos():
    """Every account agrees after a few seconds of it, nothing leaks, and every kind of break has happened."""
    result = chaos(0.1, 40, "slice", silent, deadlines=QUICK)
    assert broken(result) == []
    assert set(result["broke"]) >= {"cut", "reset", "stall", "half_close"}
    assert {"complete", "answered", "broken", "left"} <= set(result["outcomes"])
    assert shown(result).endswith("chaos: PASS")


def test_reload():
    """Configurations change under clients, a bad one changes nothing, and not one answer is lost."""
    habits = Habits(leavers=0, slow=0, tokens=(5, 20), interval=(0.02, 0.1))
    result = reload(4, 40, 1, "slice", silent, QUICK, habits, bad_every=2)
    assert broken(result) == []
    assert result["reloads"] == 4
    assert result["refused"] == 2
    assert set(result["outcomes"]) == {"complete"}


def test_kill():
    """A worker dies: nobody hangs, nobody is lied to, nothing is left. (The upstream and a client: the whole trial.)"""
    result = kill(1, 8, 2, ("worker",), "slice", silent, QUICK)
    assert broken(result) == []
    assert set(result["outcomes"]) == {"worker"}


def test_attack():
    """Slow heads are thrown out with a 408 by their deadline; the streams' errors are none. (How fast: not here.)"""
    result = attack(40, 5, 1.5, 1, 0.5, silent)
    assert [text for text in broken(result) if "event p99" not in text] == []
    [round_] = result["rounds"]
    assert round_["attackers"]["answers"].keys() == {"408"}
    assert round_["attackers"]["opened"] > 40


def test_what_is_left_behind_is_named():
    """Descriptors and tasks beyond the first look, and whatever still is served, are leaks; fewer of them are not."""
    before, after = State(10, 1000, 5, {}), State(12, 1100, 4, {"canal_pool_used": 1.0})
    found = compared(before, after)
    assert found["leaked"] == ["canal_pool_used 1", "2 descriptors"]
    assert found["grown"] == pytest.approx(0.1)
    json.dumps(found)
    assert compared(before, State(9, 900, 5, {}))["leaked"] == []


def test_a_broken_promise_fails_the_command():
    """One verdict that is not kept, and the whole says FAIL."""
    from loadtest.promises.kit import Verdict

    verdicts = [Verdict("a", "b", "1", "0", kept) for kept in (False, None, True)]
    result = {"kind": "x", "verdicts": verdicts}
    assert not passed(result)
    assert shown(result).endswith("x: FAIL")
    assert passed({"kind": "x", "verdicts": verdicts[1:]})
