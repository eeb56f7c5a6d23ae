"""The whole gateway in a simulated network: every seed twice, and every promise held (docs/simulation.md)."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from canal_trio.testing.draws import draw_plan, plan_of
from canal_trio.testing.judge import compare, judge
from canal_trio.testing.plans import Plan
from canal_trio.testing.simworld import Seen, simulate


def both(plan: Plan) -> list[Seen]:
    """Handed over, and on the plain path; no promise was broken."""
    one, other = simulate(plan, handover=True), simulate(plan, handover=False)
    assert judge(one) + judge(other) + compare(one, other)[0] == []
    return [one, other]


def test_a_seed_has_one_course() -> None:
    """Two runs of one seed do the same, to the last byte and step: what is found can be replayed."""
    for seed in (3, 45, 79, 128, 239):
        one, other = (simulate(plan_of(seed), handover=True, digest=True) for _ in range(2))
        assert one.digest == other.digest
        assert one.steps == other.steps
    assert plan_of(3) == plan_of(3)
    assert plan_of(3) != plan_of(4)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.randoms(use_true_random=False))
def test_plans_that_hypothesis_draws(rng: random.Random) -> None:
    """The same generator, drawn from and made smaller by Hypothesis."""
    both(draw_plan(rng))
