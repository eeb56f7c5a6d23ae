"""May this exchange begin, and what has it used: the arithmetic of limits. Pure: `now` is an argument.

Rates are token buckets, kept as levels: what was used and has not drained yet. A level drains at the rate and holds a
burst at most, so that in any time *w* no more than burst + rate · *w* is let in. Requests take one each. Tokens and
money are set aside by an estimate and settled when the use is known: what was not used goes back, what was used beyond
is owed. An estimate larger than a whole burst takes the whole burst: nothing is refused for ever.
Money is counted per day and per month (UTC), in nanos. A budget is passed by one exchange at most, as far as estimates
hold: one is let in while anything is left, and what it is expected to cost counts from then on.

`begin_far` and `settle_back` are short ways for what is so nearly always; they come to the same.

Invariants: a refused exchange leaves no trace; the order of settlements does not matter; no level is below zero.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple, Protocol, TypeVar, final

from canal_trio.policy.prices import NANOS
from canal_trio.settings import Limit

__all__ = [
    "Ask",
    "Moment",
    "Refusal",
    "Rule",
    "Ruled",
    "State",
    "What",
    "begin",
    "begin_far",
    "refill",
    "refusal",
    "settle",
    "settle_back",
    "turn",
    "worst",
]

_MINUTE = 60.0
_SLACK = 1e-9  # of a burst: what rounding may cost nobody


class What(enum.Enum):
    """Which number of a limit was reached."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    STREAMS = "streams"
    SPEND_DAY = "spend_day"
    SPEND_MONTH = "spend_month"


@final
class Rule:
    """A `Limit` in the units that are calculated with: per second, and nanos. Infinite where there is no limit."""

    __slots__ = ("forms", "request_burst", "request_rate", "requests", "spend_day", "spend_month", "streams",
                 "token_burst", "token_rate", "tokens")  # fmt: skip

    def __init__(self, limit: Limit) -> None:
        self.requests, self.tokens = limit.requests, limit.tokens  # per minute
        self.request_rate = math.inf if limit.requests is None else limit.requests / _MINUTE
        self.token_rate = math.inf if limit.tokens is None else limit.tokens / _MINUTE
        self.request_burst = max(1.0, self.request_rate * limit.burst)
        self.token_burst = max(1.0, self.token_rate * limit.burst)
        self.streams: float = math.inf if limit.streams is None else limit.streams
        self.spend_day: float = math.inf if limit.spend_day is None else round(limit.spend_day * NANOS)
        self.spend_month: float = math.inf if limit.spend_month is None else round(limit.spend_month * NANOS)
        self.forms: tuple[bytes, bytes, bytes] | None = None  # of `limit_fields`, once they were made


class Ruled(Protocol):
    """What has a rule."""

    @property
    def rule(self) -> Rule:
        """It."""


S = TypeVar("S", bound=Ruled)


@dataclass(slots=True)
class State:
    """What one limit has counted. `at` is when the levels were as they are."""

    requests: float = 0.0
    tokens: float = 0.0
    at: float = 0.0
    streams: int = 0  # exchanges in flight
    reserved: int = 0  # nanos set aside for those
    day: int = 0
    spent_day: int = 0
    month: int = 0
    spent_month: int = 0


class Moment(NamedTuple):
    """Now: seconds on a clock that only rises, and the calendar in UTC, as numbers that rise with it."""

    now: float
    day: int = 0
    month: int = 0
    day_left: float = 0.0  # seconds
    month_left: float = 0.0


class Ask(NamedTuple):
    """What an exchange is expected to use: tokens and nanos."""

    tokens: int = 0
    cost: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not: `limit` was reached, and after `wait` seconds there is room. Where an exchange has to end first (of
    `STREAMS`, and of money that is only set aside: `aside`) nobody knows how many."""

    what: What
    limit: float  # per minute, at once, or nanos
    wait: float
    aside: bool = False


def refill(rule: Rule, state: State, moment: Moment) -> None:
    """Bring `state` to `moment`: levels drain, a new day or month begins at nothing."""
    passed = moment.now - state.at
    if passed > 0:
        state.at = moment.now
        if state.requests > 0:
            left = state.requests - passed * rule.request_rate
            state.requests = left if left > 0 else 0.0
        if state.tokens > 0:
            left = state.tokens - passed * rule.token_rate
            state.tokens = left if left > 0 else 0.0
    if moment.day != state.day:
        turn(state, moment.day, moment.month)


def turn(state: State, day: int, month: int) -> None:
    """Another day, and so perhaps month. A clock that was set back a little does not give the money back; one that was
    far ahead does not keep it."""
    if state.day - 1 <= day <= state.day:
        return
    state.day, state.spent_day = day, 0
    if not state.month - 1 <= month <= state.month:
        state.month, state.spent_month = month, 0


def refusal(rule: Rule, state: State, ask: Ask, moment: Moment) -> Refusal | None:
    """Why `ask` cannot begin now, None if it can. Of several reasons the one to wait longest for."""
    found: list[Refusal] = []
    over = state.requests + 1 - rule.request_burst
    if over > rule.request_burst * _SLACK:
        found.append(Refusal(What.REQUESTS, rule.request_rate * _MINUTE, over / rule.request_rate))
    if rule.token_burst < math.inf:
        over = state.tokens + min(ask.tokens, rule.token_burst) - rule.token_burst
        if over > rule.token_burst * _SLACK:
            found.append(Refusal(What.TOKENS, rule.token_rate * _MINUTE, over / rule.token_rate))
    if state.streams >= rule.streams:
        found.append(Refusal(What.STREAMS, rule.streams, 1.0))
    for what, budget, spent, left in (
        (What.SPEND_DAY, rule.spend_day, state.spent_day, moment.day_left),
        (What.SPEND_MONTH, rule.spend_month, state.spent_month, moment.month_left),
    ):
        if spent >= budget:
            found.append(Refusal(what, budget, left))
        elif spent + state.reserved >= budget:
            found.append(Refusal(what, budget, 1.0, aside=True))
    return max(found, key=lambda one: one.wait) if found else None


def worst(counted: Sequence[tuple[S, State]], ask: Ask, moment: Moment) -> tuple[S, Refusal] | None:
    """Of several, each at `moment`: who refuses `ask`, and why. Of several reasons the one to wait longest for."""
    found: tuple[S, Refusal] | None = None
    for ruled, state in counted:
        why = refusal(ruled.rule, state, ask, moment)
        if why is not None and (found is None or why.wait > found[1].wait):
            found = ruled, why
    return found


def begin(counted: Sequence[tuple[S, State]], ask: Ask, moment: Moment) -> tuple[S, Refusal] | None:
    """Let `ask` in everywhere, or nowhere, and why not. All are brought to `moment`. `settle` is due when it ends."""
    if begin_far(counted, ask, moment.now, moment.day):
        return None
    for ruled, state in counted:
        refill(ruled.rule, state, moment)
    why = worst(counted, ask, moment)
    if why is None:
        for ruled, state in counted:
            state.requests += 1
            state.tokens += min(ask.tokens, ruled.rule.token_burst)
            state.streams += 1
            state.reserved += ask.cost
    return why


def begin_far(counted: Sequence[tuple[Ruled, State]], ask: Ask, now: float, day: int) -> bool:
    """The short way of `begin`, where all are far from every number, as nearly always, and it is no other day. False:
    that is not so, and nothing is counted."""
    tokens, cost = ask
    for ruled, state in counted:
        rule = ruled.rule
        passed = now - state.at
        requests = state.requests - passed * rule.request_rate + 1.0
        if requests < 1.0:
            requests = 1.0
        level = state.tokens - passed * rule.token_rate
        level = level + tokens if level > 0 else tokens
        reserved = state.reserved
        if (
            passed <= 0  # what never drains times nothing is no number
            or requests > rule.request_burst
            or level > rule.token_burst
            or state.streams >= rule.streams
            or state.day != day
            or state.spent_day + reserved >= rule.spend_day
            or state.spent_month + reserved >= rule.spend_month
        ):
            _take_back(counted, state, ask)
            return False
        state.at = now
        state.requests = requests
        state.tokens = level
        state.streams += 1
        state.reserved = reserved + cost
    return True


def _take_back(counted: Sequence[tuple[Ruled, State]], until: State, ask: Ask) -> None:
    """Those before `until` have counted it, just now."""
    for _, state in takewhile(lambda one: one[1] is not until, counted):
        state.requests -= 1.0
        state.tokens -= ask.tokens
        state.streams -= 1
        state.reserved -= ask.cost


def settle(rule: Rule, state: State, ask: Ask, used: Ask) -> None:
    """An exchange that asked for `ask` has ended, and has used `used`. `state` was brought to now."""
    left = state.tokens + used.tokens - min(ask.tokens, rule.token_burst)
    state.tokens = left if left > 0 else 0.0
    if state.streams > 0:
        state.streams -= 1
    state.spent_day += used.cost  # before it is not reserved any more: another thread may look, and finds no less
    state.spent_month += used.cost
    state.reserved = max(0, state.reserved - ask.cost)


def settle_back(counted: Sequence[tuple[Ruled, State]], ask: Ask, used: Ask, today: tuple[int, int]) -> bool:
    """The short way of `settle` for those that `begin_far` has counted, where no level rises. False: one would, and
    nothing is settled. `today` is the day and the month.

    What drains before a level sinks, or after it, is the same: so nothing has to be brought to now but the calendar.
    """
    asked, reserved = ask
    tokens, cost = used
    spare = asked - tokens
    if spare < 0:
        return False
    for _, state in counted:
        if state.day != today[0]:
            turn(state, *today)
        left = state.tokens - spare
        state.tokens = left if left > 0 else 0.0
        state.streams -= 1
        state.spent_day += cost  # in the order of `settle`
        state.spent_month += cost
        state.reserved -= reserved
    return True
