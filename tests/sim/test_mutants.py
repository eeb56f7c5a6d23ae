"""The simulation can fail: each planted bug is found within 2,000 seeds."""

from __future__ import annotations

import pytest

from canal_trio.testing.draws import plan_of
from canal_trio.testing.hunt import check, kill
from canal_trio.testing.mutants import MUTANTS


@pytest.mark.timeout(900)  # a hunt whose beginning is no longer near takes its time
@pytest.mark.parametrize("name", MUTANTS)
def test_is_killed(name: str) -> None:
    """A promise is broken by this bug, and not without it."""
    mutant = MUTANTS[name]
    found = kill(mutant)
    assert found is not None, f"{name} lives: {mutant.what}"
    assert check(plan_of(found[0])).complaints == [], "the seed breaks a promise without the bug, too"
