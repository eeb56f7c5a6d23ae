"""The arithmetic of limits: never more than a burst and the rate, nothing lost, nothing for nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from canal_trio.policy.calendar import Calendar
from canal_trio.policy.prices import NANOS
from canal_trio.policy.ratelimit import (
    Ask,
    Moment,
    Refusal,
    Rule,
    State,
    What,
    begin,
    begin_far,
    refill,
    refusal,
    settle,
    settle_back,
    worst,
)
from canal_trio.settings import Limit

GAPS = st.one_of(st.just(0.0), st.floats(0, 0.1), st.floats(0, 200))
NONE = Ask()


@dataclass(frozen=True)
class Of:
    """Who has a rule."""

    rule: Rule


def taken(rule: Rule, state: State, ask: Ask, moment: Moment) -> bool:
    """One exchange that wants to begin."""
    return begin([(Of(rule), state)], ask, moment) is None


def admitted(rule: Rule, state: State, ask: Ask, now: float) -> bool:
    """One exchange that wants to begin at `now`."""
    return taken(rule, state, ask, Moment(now))


@settings(deadline=None)
@given(
    st.floats(0.5, 6000), st.floats(0.1, 120), st.lists(GAPS, min_size=1, max_size=200), st.booleans()
)  # fmt: skip
def test_no_window_sees_more_than_a_burst_and_the_rate(limit: float, burst: float, gaps: list[float], late: bool):
    """In whichever window of time: at most the burst and what the rate gives in it."""
    rule = Rule(Limit(requests=limit, burst=burst))
    state, now, times = State(), 1e6 if late else 0.0, []
    for gap in gaps:
        now += gap
        if admitted(rule, state, NONE, now):
            times.append(now)
    for first in range(len(times)):
        for last in range(first, len(times)):
            window = times[last] - times[first]
            most = max(1, limit * burst / 60) + window * limit / 60
            assert last - first + 1 <= most * (1 + 1e-6) + 1e-6


@settings(deadline=None)
@given(
    st.floats(1, 10_000), st.floats(1, 60), st.lists(st.tuples(GAPS, st.integers(0, 20_000)), max_size=100)
)  # fmt: skip
def test_no_window_sees_more_tokens_than_a_burst_and_the_rate(
    limit: float, burst: float, asks: list[tuple[float, int]]
):
    """What is set aside in any window is at most the burst and what the rate gives, a request being worth a burst."""
    rule = Rule(Limit(tokens=limit, burst=burst))
    state, now, begun = State(), 0.0, []
    for gap, tokens in asks:
        now += gap
        if admitted(rule, state, Ask(tokens), now):
            begun.append((now, min(tokens, rule.token_burst)))
    for first in range(len(begun)):
        total = 0.0
        for when, tokens in begun[first:]:
            total += tokens
            most = rule.token_burst + (when - begun[first][0]) * rule.token_rate
            assert total <= most * (1 + 1e-6) + 1e-6


@settings(deadline=None)
@given(st.integers(1, 1000), st.floats(1, 60), st.integers(1, 500))
def test_who_asks_all_the_time_gets_exactly_the_limit(limit: int, burst: float, seconds: int):
    """Nothing is lost: someone who asks again and again gets the burst and the whole rate, within one."""
    rule = Rule(Limit(requests=limit, burst=burst))
    state = State()
    step = 0.25 * 60 / limit
    steps = min(int(seconds / step), 1000)
    count = sum(admitted(rule, state, NONE, number * step) for number in range(steps + 1) for _ in range(1))
    # one in each step at most, so a burst is had once there was time to ask for it
    exact = min(steps + 1, rule.request_burst + steps * step * limit / 60)
    assert exact - 1 - 1e-6 <= count <= exact + 1e-6


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500), st.integers(0, 9)), max_size=20), st.randoms())
def test_the_order_of_settlements_does_not_matter(uses: list[tuple[int, int, int]], random):
    """Exchanges that end together leave the same behind, whichever is settled first."""
    rule = Rule(Limit(tokens=60_000, requests=1000, streams=100, spend_day=1))
    begun = State()
    asks = [(Ask(asked, cost), Ask(used, cost * 2)) for asked, used, cost in uses]
    for ask, _ in asks:
        assert admitted(rule, begun, ask, 0.0)
    results = []
    for order in (asks, random.sample(asks, len(asks))):
        state = replace(begun)
        for ask, used in order:
            settle(rule, state, ask, used)
        results.append(state)
    assert results[0] == results[1]
    assert (results[0].streams, results[0].reserved) == (0, 0)
    assert results[0].tokens == pytest.approx(sum(used.tokens for _, used in asks))


LEVELS = st.one_of(st.just(0.0), st.floats(0, 12), st.integers(0, 12))
LIMITS = st.builds(
    Limit,
    requests=st.sampled_from([None, 60, 600]),
    tokens=st.sampled_from([None, 60, 600]),
    burst=st.sampled_from([1.0, 10.0]),
    streams=st.sampled_from([None, 5]),
    spend_day=st.sampled_from([None, 20 / NANOS]),
    spend_month=st.sampled_from([None, 25 / NANOS]),
)
USES = st.tuples(st.integers(0, 12), st.integers(0, 9))
TODAY = Moment(1000.0, 20_000, 24_000)


@st.composite
def scopes_with_states(draw: st.DrawFn) -> list[tuple[Of, State]]:
    """Some scopes, each with what it has counted a while ago, perhaps yesterday, and at least one in flight."""
    found = []
    for limit in draw(st.lists(LIMITS, min_size=1, max_size=4)):
        at = TODAY.now - draw(st.one_of(st.just(0.0), st.floats(0.001, 10)))
        day = TODAY.day - draw(st.sampled_from([0, 0, 0, 1, 2]))
        month = TODAY.month - (draw(st.booleans()) if day != TODAY.day else 0)
        level = draw(LEVELS), draw(LEVELS)
        numbers = draw(st.integers(1, 6)), draw(st.integers(0, 15)), draw(st.integers(0, 15)), draw(st.integers(0, 15))
        streams, reserved, today, more = numbers
        found.append((Of(Rule(limit)), State(*level, at, streams, reserved, day, today, month, today + more)))
    return found


def copies(counted: list[tuple[Of, State]]) -> list[tuple[Of, State]]:
    """The same, to be counted elsewhere."""
    return [(of, replace(state)) for of, state in counted]


def alike(one: list[tuple[Of, State]], other: list[tuple[Of, State]], moment: Moment) -> None:
    """Both say the same at `moment`; levels but for rounding."""
    for (of, mine), (_, theirs) in zip(copies(one), copies(other), strict=True):
        for state in (mine, theirs):
            refill(of.rule, state, moment)
        assert mine.requests == pytest.approx(theirs.requests, abs=1e-6)
        assert mine.tokens == pytest.approx(theirs.tokens, abs=1e-6)
        assert replace(mine, requests=0, tokens=0) == replace(theirs, requests=0, tokens=0)


@settings(deadline=None)
@given(scopes_with_states(), st.integers(0, 12), st.integers(0, 5))
def test_the_short_way_in_is_the_long_one(counted: list[tuple[Of, State]], tokens: int, cost: int):
    """Whom the short way lets in nothing refuses, and everything is counted as step by step; else nothing is. It is no
    answer only near a number, for more than a burst, at the very same moment, or on another day."""
    ask, plain, far = Ask(tokens, cost), copies(counted), copies(counted)
    for of, state in plain:
        refill(of.rule, state, TODAY)
    why = worst(plain, ask, TODAY)
    if begin_far(far, ask, TODAY.now, TODAY.day):
        assert why is None
    else:
        alike(far, plain, TODAY)
        assert why is not None or any(
            old.at == TODAY.now
            or old.day != TODAY.day
            or tokens > of.rule.token_burst
            or refusal(of.rule, replace(new, requests=new.requests + 1e-6, tokens=new.tokens + 1e-6), ask, TODAY)
            for (of, old), (_, new) in zip(counted, plain, strict=True)
        )
        assert begin(far, ask, TODAY) == why
    if why is None:
        for of, state in plain:
            state.requests += 1
            state.tokens += min(tokens, of.rule.token_burst)
            state.streams += 1
            state.reserved += cost
    alike(far, plain, TODAY)
    alike(far, plain, TODAY._replace(now=TODAY.now + 1))


@settings(deadline=None)
@given(scopes_with_states(), USES, USES, st.floats(0, 3))
def test_the_short_way_out_is_the_long_one(
    counted: list[tuple[Of, State]], asked: tuple[int, int], using: tuple[int, int], gap: float
):
    """Tokens that were not needed are the same level less, whether it was brought to that moment before or not, and
    money is spent on the day when the exchange ends. Where a level would rise it is no answer: nothing is settled."""
    ask, used = Ask(*asked), Ask(*using)
    for of, state in counted:
        assume(ask.tokens <= of.rule.token_burst)  # else the short way would not have let it in
        state.reserved += ask.cost
    plain, short = copies(counted), copies(counted)
    done = settle_back(short, ask, used, (TODAY.day, TODAY.month))
    assert done == (used.tokens <= ask.tokens)
    if done:
        for of, state in plain:
            refill(of.rule, state, TODAY)
            settle(of.rule, state, ask, used)
    alike(short, plain, TODAY)
    alike(short, plain, TODAY._replace(now=TODAY.now + gap))


NEAR = st.integers(0, 12)


@settings(deadline=None)
@given(NEAR, NEAR, NEAR, NEAR, NEAR, NEAR, st.booleans())
def test_the_quick_look_lets_in_whom_nothing_refuses(
    requests: int, tokens: int, streams: int, reserved: int, spent: int, asked: int, both: bool
):
    """Whoever is far from every number, or near and within it, begins; else the one reason is that of the longest wait,
    and nothing was counted anywhere."""
    rule = Rule(Limit(requests=600, tokens=600, burst=1, streams=9, spend_day=9 / NANOS, spend_month=10 / NANOS))
    state = State(requests, tokens, 0.0, streams, reserved, spent_day=spent, spent_month=spent)
    counted = [(Of(rule), state)] + [(Of(Rule(Limit(requests=60))), State())] * both
    before = [replace(one) for _, one in counted]
    why = worst(counted, Ask(asked, 1), Moment(0.0))
    assert (why is None) == all(refusal(of.rule, one, Ask(asked, 1), Moment(0.0)) is None for of, one in counted)
    assert begin(counted, Ask(asked, 1), Moment(0.0)) == why
    if why is None:
        assert [one.streams for _, one in counted] == [one.streams + 1 for one in before]
    else:
        assert [one for _, one in counted] == before


@settings(deadline=None)
@given(st.lists(GAPS, max_size=10))
def test_looking_more_often_changes_nothing(gaps: list[float]):
    """A level drains the same in one long step and in many short ones."""
    rule = Rule(Limit(requests=60, tokens=600))
    often, once = State(40.0, 500.0), State(40.0, 500.0)
    now = 0.0
    for gap in gaps:
        now += gap
        refill(rule, often, Moment(now))
    refill(rule, once, Moment(now))
    assert often.requests == pytest.approx(once.requests, abs=1e-6)
    assert often.tokens == pytest.approx(once.tokens, abs=1e-6)


@settings(deadline=None)
@given(st.floats(0.5, 1000), st.floats(1, 60), st.lists(GAPS, min_size=1, max_size=30))
def test_who_waits_as_told_is_let_in(limit: float, burst: float, gaps: list[float]):
    """The wait of a refusal is honest: not a bit earlier, and then it works."""
    rule = Rule(Limit(requests=limit, tokens=limit * 10, burst=burst))
    state, now = State(), 0.0
    for gap in gaps:
        now += gap / 100
        moment = Moment(now)
        refill(rule, state, moment)
        why = refusal(rule, state, Ask(7), moment)
        if why is None:
            assert taken(rule, state, Ask(7), moment)
            continue
        early, then = replace(state), replace(state)
        assert not admitted(rule, early, Ask(7), now + why.wait * 0.99)
        assert admitted(rule, then, Ask(7), now + why.wait * 1.000001 + 1e-9)


def test_tokens_are_set_aside_and_settled():
    """What was not used goes back at once; what was used beyond is owed, and has to drain."""
    rule = Rule(Limit(tokens=600))
    state = State()
    assert admitted(rule, state, Ask(500), 0.0)
    assert not admitted(rule, state, Ask(101), 0.0)
    settle(rule, state, Ask(500), Ask(100))
    assert admitted(rule, state, Ask(500), 0.0)
    settle(rule, state, Ask(500), Ask(1100))  # 1,200 of 600: 600 owed
    assert refusal(rule, state, Ask(0), Moment(0.0)) == Refusal(What.TOKENS, 600.0, pytest.approx(60.0))
    assert admitted(rule, state, Ask(0), 60.1)


def test_a_request_larger_than_the_limit_waits_for_a_whole_burst():
    """Nothing is refused for ever by an estimate: it takes all there is."""
    rule = Rule(Limit(tokens=600))
    state = State()
    assert admitted(rule, state, Ask(10**9), 0.0)
    assert not admitted(rule, state, Ask(10**9), 59.9)
    settle(rule, state, Ask(10**9), Ask(10))
    assert admitted(rule, state, Ask(10**9), 59.9)


def test_streams_at_once():
    """As many as allowed, and another one when one has ended; never below none."""
    rule = Rule(Limit(streams=2))
    state = State()
    assert [admitted(rule, state, NONE, 0.0) for _ in range(3)] == [True, True, False]
    assert refusal(rule, state, NONE, Moment(0.0)) == Refusal(What.STREAMS, 2, 1.0)
    settle(rule, state, NONE, NONE)
    assert admitted(rule, state, NONE, 0.0)
    for _ in range(5):
        settle(rule, state, NONE, NONE)
    assert state.streams == 0


def test_a_budget_that_was_only_set_aside_was_said_to_be_spent_until_tomorrow():
    """What those under way may cost is not spent: who is refused for it may ask again when one of them has ended, and
    is let in if that cost less."""
    rule = Rule(Limit(spend_day=1.0, spend_month=1.0))
    state = State()
    day = Moment(0.0, 10, 1, day_left=3600.0, month_left=86_400.0)
    dear = Ask(0, NANOS)
    assert taken(rule, state, dear, day)
    assert refusal(rule, state, dear, day) == Refusal(What.SPEND_DAY, NANOS, 1.0, aside=True)
    settle(rule, state, dear, Ask(0, NANOS - 1))
    assert taken(rule, state, dear, day)
    settle(rule, state, dear, Ask(0, 1))
    refill(rule, state, day._replace(day=11))
    assert refusal(rule, state, dear, day._replace(day=11)) == Refusal(What.SPEND_MONTH, NANOS, 86_400.0)


def test_budgets_are_spent_and_begin_anew():
    """While anything is left one is let in, what is set aside counts, and a new day is a new budget; a month, too."""
    rule = Rule(Limit(spend_day=1.0, spend_month=1.5))
    state = State()
    day = Moment(0.0, 10, 1, day_left=3600.0, month_left=86_400.0)
    dear = Ask(0, NANOS)
    assert taken(rule, state, dear, day)
    assert refusal(rule, state, dear, day) == Refusal(What.SPEND_DAY, NANOS, 1.0, aside=True)
    settle(rule, state, dear, Ask(0, NANOS // 2))
    assert taken(rule, state, dear, day)
    settle(rule, state, dear, dear)
    assert refusal(rule, state, dear, day) == Refusal(What.SPEND_MONTH, 1.5 * NANOS, 86_400.0)
    tomorrow = day._replace(day=11)
    refill(rule, state, tomorrow)
    assert state.spent_day == 0
    assert refusal(rule, state, dear, tomorrow) == Refusal(What.SPEND_MONTH, 1.5 * NANOS, 86_400.0)
    refill(rule, state, day._replace(day=41, month=2))
    assert state.spent_month == 0


def test_a_clock_that_is_set_back_does_not_give_the_money_back():
    """A step over midnight and back changes nothing; a date far ahead does not stop the next days."""
    rule, state = Rule(Limit(spend_day=1.0)), State()
    refill(rule, state, Moment(0.0, 10, 5))
    state.spent_day = state.spent_month = 7
    refill(rule, state, Moment(-5.0, 9, 4))
    assert (state.day, state.spent_day, state.month, state.spent_month, state.at) == (10, 7, 5, 7, 0.0)
    refill(rule, state, Moment(0.0, 1, 1))
    assert (state.day, state.spent_day, state.month, state.spent_month) == (1, 0, 1, 0)


def test_what_is_not_limited_is_not_refused():
    """A limit with one number looks at nothing else; of two reasons the longer wait is told."""
    state = State(tokens=1e12, streams=10**6, spent_day=10**15, spent_month=10**15)
    assert refusal(Rule(Limit(requests=1)), state, Ask(10**6, 10**12), Moment(0.0)) is None
    state.requests = 5
    both = refusal(Rule(Limit(requests=1, streams=1)), state, NONE, Moment(0.0))
    assert both == Refusal(What.REQUESTS, pytest.approx(1.0), pytest.approx(300.0))
    assert math.isinf(Rule(Limit()).token_burst)


def test_days_and_months_of_the_calendar():
    """Numbers that rise, and the seconds that are left, over the end of a day, a month and a year (UTC)."""
    wall = [1_767_225_599.0]  # 2025-12-31 23:59:59
    calendar = Calendar(lambda: wall[0])
    last = calendar.moment(5.0)
    assert (last.now, last.day_left, last.month_left) == (5.0, 1.0, 1.0)
    wall[0] += 1
    first = calendar.moment(6.0)
    assert (first.day, first.month) == (last.day + 1, last.month + 1)
    assert (first.day_left, first.month_left) == (86_400.0, 31 * 86_400.0)
    assert first.month == 2026 * 12
    wall[0] += 10
    assert calendar.moment(16.0).day_left == 86_390.0


def test_today_ends_with_the_day_and_hears_of_a_clock_that_was_set():
    """It turns in the very moment when the day ends; a clock that somebody sets is noticed within a second."""
    wall = [1_767_225_598.75]  # 2025-12-31 23:59:58.75
    calendar = Calendar(lambda: wall[0])
    last, first = (20_453, 2025 * 12 + 11), (20_454, 2026 * 12)
    assert calendar.today(5.0) == last
    wall[0] += 1.125
    assert calendar.today(6.125) == last
    wall[0] += 0.125
    assert calendar.today(6.25) == first
    wall[0] -= 86_400
    assert calendar.today(7.0) == first
    assert calendar.today(7.25) == last
