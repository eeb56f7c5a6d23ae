"""The retry budget and the pause between attempts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from canal_trio.policy.retries import RetryBudget, pause
from canal_trio.settings import Retries

OPTIONS = Retries(share=0.2, floor=1.0, burst=5.0)
life = st.lists(st.tuples(st.booleans(), st.floats(0, 3), st.integers(0, 4)), max_size=80)


@given(life, st.integers(0, 79))
def test_never_more_than_the_budget(events: list[tuple[bool, float, int]], begin: int) -> None:
    """In every stretch: at most a fifth of its exchanges, the floor for its seconds, and the burst."""
    budget, now = RetryBudget(OPTIONS, 0.0), 0.0
    since, exchanges, retries = 0.0, 0, 0
    for number, (is_exchange, passed, tries) in enumerate(events):
        now += passed
        if number == begin:
            since, exchanges, retries = now, 0, 0
        if is_exchange:
            budget.exchange()
            exchanges += 1
        retries += sum(budget.take(now) for _ in range(tries))
        # What was taken at the stretch's very beginning may be paid by the time before it: that is the burst.
        assert retries <= OPTIONS.share * exchanges + OPTIONS.floor * (now - since) + OPTIONS.burst + 1e-6


def test_a_fifth_of_the_load_in_the_long_run() -> None:
    """When everything fails, a thousand exchanges a second make two hundred retries, and the floor."""
    budget = RetryBudget(OPTIONS, 0.0)
    taken = 0
    for number in range(10_000):
        budget.exchange()
        taken += budget.take(number / 1000)
    assert 2000 <= taken <= 2000 + 10 + 5
    assert budget.refused == 10_000 - taken


def test_a_small_gateway_may_retry_too() -> None:
    """The floor: one exchange every few seconds has its retry, though a fifth of it is none."""
    budget = RetryBudget(OPTIONS, 0.0)
    taken = 0
    for number in range(100):
        budget.exchange()
        taken += budget.take(number * 2.0)
    assert taken == 100


def test_nothing_is_saved_up_without_end() -> None:
    """A long calm leaves the burst, not more."""
    budget = RetryBudget(OPTIONS, 0.0)
    for _ in range(1000):
        budget.exchange()
    assert sum(budget.take(1e6) for _ in range(100)) == 5


def test_no_budget_means_no_retries() -> None:
    """Zero is a number, too."""
    budget = RetryBudget(Retries(share=0.0, floor=0.0, burst=0.0), 0.0)
    budget.exchange()
    assert not budget.take(100.0)


def test_a_clock_that_stands_still_gives_nothing() -> None:
    """Retries in the same moment are all paid from the bucket."""
    budget = RetryBudget(OPTIONS, 7.0)
    assert sum(budget.take(7.0) for _ in range(20)) == 5


@given(st.integers(1, 2000), st.floats(0, 1, exclude_max=True))
def test_a_pause_is_bounded_and_jittered(retry: int, chance: float) -> None:
    """A random part of what doubles each time, up to the most."""
    options = Retries(backoff=0.1, backoff_most=2.0)
    waited = pause(retry, options, chance)
    assert waited == chance * min(0.1 * 2.0 ** min(retry - 1, 10), 2.0)
