"""The whole gateway in a simulated network: every seed twice, and every promise held (docs/simulation.md)."""

from __future__ import annotations

import random
from itertools import count

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from canal_trio.testing.draws import RARER, draw_plan, plan_of
from canal_trio.testing.hunt import Verdict, check, shown, smaller
from canal_trio.testing.mutants import MUTANTS
from canal_trio.testing.simulate import BATCH, main
from canal_trio.testing.simworld import simulate

EXCHANGES = 2_000
AN_HOUR_OF_VIRTUAL_TIME = 3_600


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", [0, 10_000, RARER, RARER + 10_000])
def test_seeds(first: int) -> None:
    """Two thousand exchanges in all keep every promise, and enough happens to them for that to mean something."""
    total = Verdict([])
    for seed in count(first):
        verdict = check(plan_of(seed))
        assert verdict.complaints == [], f"python -m canal_trio.testing.simulate --seed {seed} --trace"
        total.add(verdict)
        if total.exchanges >= EXCHANGES / 4:
            break
    assert total.compared > 0.1 * total.exchanges
    assert total.virtual > AN_HOUR_OF_VIRTUAL_TIME
    assert {"completed", "client_gone", "upstream_failed"} <= set(total.outcomes), total.outcomes


@pytest.mark.parametrize("seed", [400_486, 400_950])
def test_an_upstream_is_asked_a_pass_after_the_client_left(seed: int) -> None:
    """It leaves between the lease and the first pass of the task that asks: that one does not even try."""
    assert check(plan_of(seed)).complaints == []


def test_a_seed_has_one_course() -> None:
    """Two runs of one seed do the same, to the last byte and step: what is found can be replayed."""
    for seed in (3, 45, 79, 128, 239):
        one, other = (simulate(plan_of(seed), handover=True, digest=True) for _ in range(2))
        assert one.digest == other.digest
        assert one.steps == other.steps
    assert plan_of(3) == plan_of(3)
    assert plan_of(3) != plan_of(4)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.randoms(use_true_random=False))
def test_plans_that_hypothesis_draws(rng: random.Random) -> None:
    """The same generator, drawn from and made smaller by Hypothesis."""
    assert check(draw_plan(rng)).complaints == []


def test_too_many_steps_are_a_violation() -> None:
    """A busy loop, which virtual time does not see, is ended by its steps."""
    complaints = check(plan_of(0), steps=50).complaints
    assert any("more than 50 steps" in complaint for complaint in complaints)


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_seed_is_replayed_with_its_trace() -> None:
    """`--seed S --trace` shows both paths byte by byte and exits with 0 if all is well."""
    result = CliRunner().invoke(main, ["--seed", "1", "--trace"])
    assert result.exit_code == 0, result.output
    assert "plan: Plan(" in result.output
    assert "plain path: virtual seconds, step, who, what" in result.output
    assert "asks 0.0" in result.output
    assert "record: completed" in result.output


def test_a_violation_is_said_with_what_replays_it() -> None:
    """A broken promise: exit code 1, what broke, and the command; `--smaller` gives a plan that still breaks it."""
    result = CliRunner().invoke(main, ["--seed", "0", "--mutant", "two_records", "--smaller"])
    assert result.exit_code == 1
    assert "seed 0 breaks a promise:" in result.output
    assert "records of" in result.output
    assert "replay: python -m canal_trio.testing.simulate --seed 0 --trace" in result.output
    assert "a smaller plan:" in result.output


def test_a_smaller_plan_is_smaller() -> None:
    """What has nothing to do with the violation goes, and the plan still breaks the same promise."""
    plan = plan_of(0)
    with MUTANTS["two_records"].planted():
        less = smaller(plan, lambda candidate: bool(check(candidate).complaints))
        assert check(less).complaints
    assert less.asks <= 1  # the client that comes when all is over has one, too
    assert len(shown(less)) < len(shown(plan)) / 2


def test_seeds_in_processes() -> None:
    """`--seeds A..B` shares them out, the one between two batches too, and sums up."""
    result = CliRunner().invoke(main, ["--seeds", f"0..{BATCH}", "--processes", "2"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{BATCH + 1} seeds, ")
    assert "every promise held" in result.output


def test_which_seeds_must_be_said() -> None:
    """Without any there is nothing to do; a range that is none is named."""
    assert "Say which seeds" in CliRunner().invoke(main, []).output
    assert "'9-12' is no range of seeds" in CliRunner().invoke(main, ["--seeds", "9-12"]).output
