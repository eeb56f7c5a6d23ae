"""When an upstream is ejected, on trial, back, set aside or down: by events and given times alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canal_trio.policy.health import Standing, State, Verdict
from canal_trio.settings import Health

OPTIONS = Health(failures=3, error_rate=0.5, error_count=10, error_window=20.0, eject=10.0, eject_most=35.0)
GOOD, BAD, NEITHER = Verdict.GOOD, Verdict.BAD, Verdict.NEITHER


def standing(**changes: float) -> Standing:
    """One with these options, or with others."""
    fields = {name: getattr(OPTIONS, name) for name in OPTIONS.__slots__} | changes
    return Standing("u", Health(**fields))  # type: ignore[arg-type]


def ended(here: Standing, now: float, *verdicts: Verdict) -> None:
    """Exchanges that begin and end in a moment."""
    for verdict in verdicts:
        here.end(verdict, now, trial=here.begin())


def test_failures_in_a_row_eject() -> None:
    """The third failure in a row ejects; one that ends well in between begins the row anew."""
    here = standing()
    ended(here, 0.0, BAD, BAD, GOOD, BAD, BAD)
    assert here.state(0.0) is State.USABLE
    assert here.calm
    ended(here, 0.0, BAD)
    assert here.state(0.0) is State.EJECTED
    assert not here.calm
    assert (here.ejections, here.avoided(0.0)) == (1, 10.0)


def test_what_the_client_did_is_not_counted() -> None:
    """Neither good nor bad: it does not end a row, and makes none."""
    here = standing()
    ended(here, 0.0, BAD, BAD, NEITHER, NEITHER, NEITHER)
    assert here.state(0.0) is State.USABLE
    ended(here, 0.0, BAD)
    assert here.state(0.0) is State.EJECTED


def test_an_error_rate_ejects() -> None:
    """Half of at least ten within the window, though never three in a row."""
    here = standing()
    ended(here, 0.0, *[GOOD, BAD] * 4, GOOD)
    assert here.state(0.0) is State.USABLE
    ended(here, 1.0, BAD)
    assert here.state(1.0) is State.EJECTED


@pytest.mark.parametrize(("later", "state"), [(9.0, State.EJECTED), (19.0, State.EJECTED), (31.0, State.USABLE)])
def test_old_errors_are_forgotten(later: float, state: State) -> None:
    """What is older than the window counts no more; what is younger than half of it always does."""
    here = standing()
    ended(here, 0.0, *[GOOD, BAD] * 4, GOOD)
    ended(here, 10.0, GOOD)
    ended(here, later, BAD, BAD, GOOD, BAD, BAD)
    assert here.state(later) is state


def test_a_long_silence_leaves_nothing_of_the_window() -> None:
    """After more than a window without an end there are no errors to count."""
    here = standing()
    ended(here, 0.0, *[GOOD, BAD] * 4, GOOD)
    ended(here, 100.0, BAD)
    assert here.state(100.0) is State.USABLE


def test_a_trial_brings_it_back() -> None:
    """After its time one exchange at a time may try; its answer brings the upstream back, on probation."""
    here = standing(slow_start=20.0)
    ended(here, 0.0, BAD, BAD, BAD)
    assert here.state(9.9) is State.EJECTED
    assert here.state(10.0) is State.TRIAL
    assert here.avoided(10.0) == 0.0
    trial = here.begin()
    assert trial
    assert here.avoided(10.0) > 10.0, "a second one has to wait"
    here.answered(11.0)
    assert here.state(11.0) is State.USABLE
    assert here.avoided(11.0) == 0.0
    assert here.rise(11.0) == 0.1
    assert here.rise(21.0) == 0.5
    assert here.rise(31.0) == 1.0
    here.end(GOOD, 12.0, trial=trial)
    assert here.in_flight == 0
    assert here.avoided(31.0) == 0.0
    assert here.calm


def test_stream_that_is_cut_after_its_head_counted_as_recovery() -> None:
    """On probation one failure is enough: an upstream that answers and then breaks off never gets a row of three."""
    here = standing()
    ended(here, 0.0, BAD, BAD, BAD)
    trial = here.begin()
    here.answered(10.0)
    here.end(BAD, 11.0, trial=trial)
    assert here.state(11.0) is State.EJECTED
    assert here.ejections == 2


def test_a_good_end_is_the_end_of_probation() -> None:
    """Then it takes a row of three again."""
    here = standing()
    ended(here, 0.0, BAD, BAD, BAD)
    ended(here, 10.0, GOOD)
    ended(here, 11.0, GOOD, BAD, BAD)
    assert here.state(11.0) is State.USABLE


def test_each_ejection_in_a_row_takes_twice_as_long() -> None:
    """10, 20, and no more than 35 seconds; a long time of health begins anew."""
    here = standing(slow_start=5.0)
    ended(here, 0.0, BAD, BAD, BAD)
    ended(here, 10.0, BAD)
    assert here.avoided(10.0) == 30.0
    ended(here, 30.0, BAD)
    assert here.avoided(30.0) == 65.0
    ended(here, 65.0, BAD)
    assert here.avoided(65.0) == 100.0
    ended(here, 100.0, GOOD)
    ended(here, 200.0, BAD, BAD, BAD)
    assert here.avoided(200.0) == 210.0


def test_what_began_before_does_not_lengthen_it() -> None:
    """A hundred streams that break with their upstream are one ejection."""
    here = standing()
    trials = [here.begin() for _ in range(100)]
    for trial in trials:
        here.end(BAD, 1.0, trial=trial)
    assert here.ejections == 1
    assert here.avoided(1.0) == 11.0
    assert here.in_flight == 0


def test_one_that_was_asked_all_the_same_may_bring_it_back() -> None:
    """Where no other upstream was left it is asked while it is ejected: success counts, failure changes nothing."""
    here = standing()
    ended(here, 0.0, BAD, BAD, BAD)
    ended(here, 5.0, BAD)
    assert (here.ejections, here.avoided(5.0)) == (1, 10.0)
    ended(here, 6.0, GOOD)
    assert here.state(6.0) is State.USABLE


def test_an_old_stream_that_ends_well_is_no_trial() -> None:
    """What began before the ejection says nothing about now."""
    here = standing()
    old = here.begin()
    ended(here, 0.0, BAD, BAD, BAD)
    here.end(GOOD, 1.0, trial=old)
    assert here.state(1.0) is State.EJECTED


def test_a_trial_that_the_client_left_frees_its_place() -> None:
    """Nothing is known then, and the next one may try."""
    here = standing()
    ended(here, 0.0, BAD, BAD, BAD)
    here.end(NEITHER, 12.0, trial=here.begin())
    assert here.state(12.0) is State.TRIAL
    assert here.avoided(12.0) == 0.0


def test_busy_is_set_aside_as_long_as_it_says() -> None:
    """As long as it says, up to the bound; a short word does not take back a long one."""
    here = standing(set_aside_most=60.0, set_aside=1.0)
    here.set_aside(7.0, 0.0)
    assert here.state(6.9) is State.SET_ASIDE
    here.set_aside(1.0, 1.0)
    assert here.avoided(1.0) == 7.0
    assert here.state(7.0) is State.USABLE
    here.set_aside(3600.0, 10.0)
    assert here.avoided(10.0) == 70.0
    here.set_aside(None, 80.0)
    assert here.avoided(80.0) == 81.0
    assert here.avoided(81.0) == 0.0
    assert here.calm


def test_busy_for_no_time_is_not_set_aside() -> None:
    """`retry-after: 0` says: at once."""
    here = standing()
    here.set_aside(0.0, 5.0)
    assert here.calm
    assert here.state(5.0) is State.USABLE


def test_set_aside_while_ejected() -> None:
    """The later end counts."""
    here = standing()
    ended(here, 0.0, BAD, BAD, BAD)
    here.set_aside(20.0, 0.0)
    assert here.avoided(5.0) == 20.0
    assert here.state(5.0) is State.EJECTED
    assert here.avoided(12.0) == 20.0
    here.begin()
    assert here.avoided(21.0) == 31.0


def test_checks_say_down_and_up() -> None:
    """Two failed checks in a row are down, one good check is up; it starts slowly, and an ejection is over with it."""
    here = standing(slow_start=20.0)
    ended(here, 0.0, BAD, BAD, BAD)
    here.checked(False, 0.0)
    here.checked(True, 0.0)
    here.checked(False, 1.0)
    assert not here.down
    here.checked(False, 2.0)
    assert here.state(2.0) is State.DOWN
    assert here.avoided(100.0) == 0.0
    assert not here.calm
    here.checked(True, 100.0)
    assert here.state(100.0) is State.USABLE
    assert here.rise(100.0) == 0.1


def test_a_check_that_is_no_longer_made_counts_no_more() -> None:
    """Taken out of the configuration, its word is forgotten."""
    here = standing()
    here.checked(False, 0.0)
    here.checked(False, 0.0)
    here.unchecked()
    assert here.state(0.0) is State.USABLE
    assert here.avoided(100.0) == 0.0
    assert here.calm


def test_other_numbers_after_a_reload() -> None:
    """The book goes on, the new numbers count from now on."""
    here = standing()
    ended(here, 0.0, BAD)
    here.use(Health(failures=2))
    ended(here, 0.0, BAD)
    assert here.state(0.0) is State.EJECTED


def test_a_slow_first_token_counts_at_once() -> None:
    """Peak EWMA: up at once, down as time goes on."""
    here = standing()
    assert here.expected(0.0, 10.0) == 0.0
    here.took(0.2, 0.0, 10.0)
    here.took(2.0, 1.0, 10.0)
    assert here.first_token == 2.0
    here.took(0.2, 1.0, 10.0)
    assert here.first_token == pytest.approx(2.0)
    here.took(0.2, 11.0, 10.0)
    assert here.first_token == pytest.approx(0.2 + 1.8 / 2.718281828)
    assert here.expected(21.0, 10.0) == pytest.approx(here.first_token / 2.718281828)


def test_a_failure_is_no_fast_answer() -> None:
    """Before a first token it counts for a second at least, and for twice what was known."""
    here = standing()
    here.missed(0.0, 10.0)
    assert here.first_token == 1.0
    here.took(3.0, 0.0, 10.0)
    here.missed(0.0, 10.0)
    assert here.first_token == 6.0


events = st.lists(st.tuples(st.sampled_from([GOOD, BAD, NEITHER, "begin", "answered"]), st.floats(0, 15)), max_size=60)


@given(events)
def test_the_book_is_balanced_after_any_life(life: list[tuple[Verdict | str, float]]) -> None:
    """Whatever happens in whatever order: nothing is in flight at the end, and in peace it is calm and usable."""
    here, now, open_ones = standing(slow_start=15.0), 0.0, []
    for event, passed in life:
        now += passed
        if event == "begin":
            open_ones.append(here.begin())
        elif event == "answered":
            here.answered(now)
        elif open_ones:
            assert isinstance(event, Verdict)
            here.end(event, now, trial=open_ones.pop())
        assert here.in_flight == len(open_ones)
        assert here.calm is False or here.state(now) is State.USABLE
    for trial in open_ones:
        here.end(NEITHER, now, trial=trial)
    assert here.in_flight == 0
    now += 1000
    if here.state(now) is State.TRIAL:
        ended(here, now, GOOD)
    assert here.state(now) is State.USABLE
    here.avoided(now + 20)
    assert here.calm
