"""Whether an upstream is well, by what its exchanges met: a book per upstream. No I/O; `now` is an argument.

An upstream that fails too often in a row, or in too large a part of a window, is *ejected*: for a while, which doubles
each time. Then it is on *trial*: a few exchanges at once, the first answer of which brings it back (on probation: until
an exchange has ended well the next failure ejects it), with a weight that rises slowly. One that says it is busy is
*set aside* for as long as it says. Active checks say *down* and *up*. How many of a model's upstreams may be avoided at
once is not decided here but where one is chosen (`policy.balance`).

Invariants: what an exchange met before an ejection does not lengthen it; each `begin` is followed by one `end`;
`calm` is True whenever nothing of all this is at work, so that the usual exchange asks for one attribute.
"""

from __future__ import annotations

import enum
import math
from typing import final

from canal_trio.settings import Health

__all__ = ["Standing", "State", "Verdict"]

_MISSED = 1.0  # seconds that a failure counts for, at least
_LEAST_WEIGHT = 0.1  # of its own, when it has just come back


class Verdict(enum.Enum):
    """What an exchange says about its upstream."""

    GOOD = enum.auto()
    BAD = enum.auto()
    NEITHER = enum.auto()  # the client left, or the gateway ended it


class State(enum.Enum):
    """How an upstream stands."""

    USABLE = "usable"
    SET_ASIDE = "set_aside"  # it asked for a pause
    EJECTED = "ejected"
    TRIAL = "trial"  # it may show that it is well again
    DOWN = "down"  # says the active check


@final
class Standing:
    """One upstream. `in_flight` are its exchanges now; `first_token` is what `fastest` goes by, in seconds."""

    __slots__ = (
        "_bad",
        "_bad_before",
        "_check_failures",
        "_ejected",
        "_failures",
        "_good",
        "_good_before",
        "_options",
        "_recovered",
        "_seen",
        "_streak",
        "_trials",
        "_until",
        "_window",
        "aside",
        "calm",
        "down",
        "ejections",
        "first_token",
        "in_flight",
        "name",
        "retries",
    )

    def __init__(self, name: str, options: Health) -> None:
        self.name = name
        self._options = options
        self.calm = True
        self.in_flight = 0
        self.ejections = 0  # ever
        self.retries = 0  # attempts here because another upstream had failed, ever
        self.first_token = 0.0  # 0: nothing is known
        self._seen = 0.0  # when that was
        self.aside = -math.inf  # until when
        self.down = False
        self._check_failures = 0
        self._ejected = False
        self._until = 0.0  # ejected until then, on trial from then on
        self._streak = 0  # ejections in a row
        self._recovered = -math.inf
        self._trials = 0  # of those in flight, the ones begun while ejected or on trial
        self._failures = 0  # in a row
        self._window = 0.0  # when the present half of the window began
        self._good = self._bad = self._good_before = self._bad_before = 0

    def use(self, options: Health) -> None:
        """Go on with other numbers: the configuration was reloaded."""
        self._options = options

    def reconsider(self) -> None:
        """It is reached in another way by now, by another key: a pause ends, and an ejected one is on trial."""
        self._until = self.aside = -math.inf

    # -- an exchange's attempt -----------------------------------------------------------------------------------------

    def begin(self) -> bool:
        """An attempt begins here. True: it is a trial, which `answered` and `end` want to know."""
        self.in_flight += 1
        if self._ejected:
            self._trials += 1
        return self._ejected

    def answered(self, now: float) -> None:
        """A trial has got an answer: the upstream is back, on probation. (The end of a stream is minutes away.)"""
        if self._ejected:
            self._ejected = False
            self._recovered = now
            self._forget(now)
            self._failures = self._options.failures - 1

    def end(self, verdict: Verdict, now: float, *, trial: bool) -> None:
        """An attempt that was begun is over."""
        self.in_flight -= 1
        if trial:
            self._trials -= 1
        if verdict is Verdict.NEITHER:
            return
        if now - self._window >= self._options.error_window / 2:
            self._turn(now)
        if verdict is Verdict.GOOD:
            self._good += 1
            self._failures = 0
            if trial:
                self.answered(now)
        else:
            self._bad += 1
            self._failed(now, trial)

    def _turn(self, now: float) -> None:
        """The other half of the window; a silence longer than all of it leaves nothing."""
        stale = now - self._window >= self._options.error_window
        self._good_before, self._bad_before = (0, 0) if stale else (self._good, self._bad)
        self._good = self._bad = 0
        self._window = now

    def _forget(self, now: float) -> None:
        self._failures = 0
        self._good = self._bad = self._good_before = self._bad_before = 0
        self._window = now

    def _failed(self, now: float, trial: bool) -> None:
        options = self._options
        if self._ejected:
            if trial and now >= self._until:
                self._eject(now)
            return
        self._failures += 1
        bad, good = self._bad + self._bad_before, self._good + self._good_before
        many = bad + good >= options.error_count and bad >= options.error_rate * (bad + good)
        if self._failures >= options.failures or many:
            if now - self._recovered > max(options.slow_start, options.eject):
                self._streak = 0
            self._eject(now)

    def _eject(self, now: float) -> None:
        self._ejected = True
        self.calm = False
        self.ejections += 1
        self._until = now + min(self._options.eject * 2.0 ** min(self._streak, 64), self._options.eject_most)
        self._streak += 1
        self._forget(now)

    # -- what it says, and what a check says ---------------------------------------------------------------------------

    def set_aside(self, seconds: float | None, now: float) -> None:
        """It said that it is busy, and for how long (None: it did not say). Never shortens what it said before."""
        options = self._options
        seconds = options.set_aside if seconds is None else min(seconds, options.set_aside_most)
        if seconds > 0:
            self.aside = max(self.aside, now + seconds)
            self.calm = False

    def checked(self, well: bool, now: float) -> None:
        """The active check has an answer."""
        if well:
            self._check_failures = 0
            if self.down:
                self.down = self._ejected = False
                self._recovered = now
                self._forget(now)
            return
        self._check_failures += 1
        if self._check_failures >= self._options.check_failures:
            self.down = True
            self.calm = False

    def unchecked(self) -> None:
        """It is no longer checked: what a check said counts no more."""
        self._check_failures = 0
        self.down = False

    # -- how it stands -------------------------------------------------------------------------------------------------

    def state(self, now: float) -> State:
        """In one word."""
        if self.down:
            return State.DOWN
        if self._ejected:
            return State.EJECTED if now < self._until else State.TRIAL
        return State.SET_ASIDE if now < self.aside else State.USABLE

    def avoided(self, now: float) -> float:
        """Until when it is to be avoided; 0 if it is not. A trial that runs is waited for as long as an ejection."""
        until = self.aside if now < self.aside else 0.0
        if self._ejected:
            if now < self._until:
                return max(until, self._until)
            if self._trials >= self._options.trials:
                return max(until, now + self._options.eject)
        elif not until and not self.down and now - self._recovered >= self._options.slow_start:
            self.calm = True
        return until

    def rise(self, now: float) -> float:
        """What part of its weight it has: less than 1 while it has just come back."""
        if self.calm or self._ejected:
            return 1.0
        since = now - self._recovered
        if since >= self._options.slow_start:
            return 1.0
        return max(_LEAST_WEIGHT, since / self._options.slow_start)

    # -- the time to its first token -----------------------------------------------------------------------------------

    def took(self, seconds: float, now: float, memory: float) -> None:
        """A first token came after `seconds`: a slow one counts at once, a fast one as time goes on (peak EWMA)."""
        value = self.first_token
        if seconds < value:
            kept = math.exp(-max(now - self._seen, 0.0) / memory)
            seconds += (value - seconds) * kept
        self.first_token = max(seconds, 1e-6)  # 0 says that nothing is known
        self._seen = now

    def missed(self, now: float, memory: float) -> None:
        """It failed before a first token. Not fast: twice what was expected, a second at least, or it would get all."""
        self.took(max(2 * self.first_token, _MISSED), now, memory)

    def expected(self, now: float, memory: float) -> float:
        """How long the first token is expected to take. Fades in silence, so that a slow one is tried again."""
        return self.first_token * math.exp(-max(now - self._seen, 0.0) / memory)
