"""The hook: which limits an exchange has to keep, what it is expected to use, and what it has used in the end.

`Limits` is there once in a process and keeps the store; `admission` gives one configuration's hook, or None where no
limits are configured: then an exchange costs nothing. Invariant: what a store let in is settled exactly once (a slot is
released once), with the rules under which it was let in, where it was counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, final

import trio

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.hooks import Admission, Asked, ExchangeRecord, Outcome, Refused, Slot
from canal_trio.policy.expected import Estimate, estimate, guess_used
from canal_trio.policy.limit_fields import Counted, limit_fields, refusal_text
from canal_trio.policy.prices import Prices
from canal_trio.policy.ratelimit import Ask, Refusal, What
from canal_trio.policy.scopes import Scope, Scopes
from canal_trio.settings import Settings

__all__ = ["Keeper", "Limits", "Store", "Verdict"]

_GENERATES = ("/completions", "/responses", "/messages")
_REMEMBERED = 16_384  # terms
_NOT_SENT = frozenset({Phase.HEAD, Phase.ROUTE, Phase.UPLOAD, Phase.LEASE, Phase.DIAL})


class Keeper(Protocol):
    """Who has counted an exchange, and settles it."""

    def settle(self, counted: Counted, ask: Ask, used: Ask) -> None:
        """What was let in with that verdict has ended. Not a checkpoint."""


class Again(Keeper, Protocol):
    """Who lets in at once, in scopes that have counted before: the short way of a store."""

    def begin(self, counted: Counted, ask: Ask) -> bool:
        """Let it in everywhere. False: the store has to be asked, and nothing is counted. Not a checkpoint."""


class Verdict(NamedTuple):
    """What each scope has counted (with this exchange, if it was let in), why it was not, and who keeps it."""

    counted: Counted
    why: tuple[Scope, Refusal] | None
    keeper: Keeper
    again: Again | None = None  # may be asked first, the next time


class Store(Protocol):
    """What counts."""

    @property
    def away(self) -> bool:
        """It does not answer at the moment."""

    @property
    def errors(self) -> int:
        """How often it did not answer."""

    @property
    def admit_now(self) -> Callable[[tuple[Scope, ...], Ask], Verdict | None] | None:
        """`admit` where nothing is ever waited for; else None."""

    async def admit(self, scopes: tuple[Scope, ...], ask: Ask) -> Verdict | None:
        """Let it in everywhere or nowhere, or why not; None: nobody can tell. Cancelling it leaves nothing counted."""

    async def flush(self) -> None:
        """Wait, but not for long, until what was settled is known where it is counted."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """What it has to do in the background, until cancelled."""


def _nothing() -> bool:
    return False


@final
class Limits:
    """The limits of one process, counted in `store`. A hook keeps the store that there was when it was made."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.rejections: dict[tuple[str, ...], float] = {}  # (kind of scope, which number) -> how many

    def admission(self, settings: Settings, account: Callable[[], bool] = _nothing) -> Admission | None:
        """The hook for `settings`; None if they limit nothing.

        `account` has those settled that have ended and are not yet; False: there are none. Nobody is refused for them.
        """
        scopes = Scopes(settings.limits)
        return _Admission(self, settings, scopes, account) if scopes else None

    def refuse(self, scope: Scope, refusal: Refusal) -> Failure:
        """Count it, and say it."""
        labels = (scope.kind, refusal.what.value)
        self.rejections[labels] = self.rejections.get(labels, 0) + 1
        spent = refusal.what in (What.SPEND_DAY, What.SPEND_MONTH) and not refusal.aside
        kind = Kind.QUOTA if spent else Kind.LIMITED
        return Failure(Side.CLIENT, Phase.ROUTE, kind, refusal_text(scope, refusal), retry_after=refusal.wait)


@final
class _Admission:
    """One configuration."""

    def __init__(self, limits: Limits, settings: Settings, scopes: Scopes, account: Callable[[], bool]) -> None:
        self._limits = limits
        self._count = limits.store.admit  # of now: who began before a reload is counted where the others were
        self._account = account
        self._scopes = scopes
        self._prices = Prices(settings.prices)
        self._output_tokens = settings.limit_store.output_tokens
        self._fail_open = settings.limit_store.fail == "open"
        self._counts = scopes.tokens or scopes.spend
        self._terms: dict[tuple[str | None, ...], _Terms] = {}
        self.wants_usage = self._counts
        self.wants_body = self._counts or scopes.models
        self._count_now = limits.store.admit_now
        self.admit_now = None if self._count_now is None else self._admit_now

    async def admit(self, asked: Asked) -> Slot | Refused:
        """`hooks.Admission`."""
        terms, expected, ask = self._weigh(asked)
        scopes, count = terms.scopes, self._count
        if not scopes:
            return _Slot(terms, expected, ask)
        verdict = await count(scopes, ask)
        if self._ask_again(verdict):
            verdict = await count(scopes, ask)
        return self._judged(terms, expected, ask, verdict)

    def _admit_now(self, asked: Asked) -> Slot | Refused:
        terms, expected, ask = self._weigh(asked)
        counted, again = terms.counted, terms.again
        if again is not None and again.begin(counted, ask):  # as nearly always; as `_Slot`, in half the time
            return tuple.__new__(_Slot, (terms, expected, ask, again, counted, limit_fields(counted)))
        scopes, count = terms.scopes, self._count_now
        if not scopes:
            return _Slot(terms, expected, ask)
        assert count is not None
        verdict = count(scopes, ask)
        if self._ask_again(verdict):
            verdict = count(scopes, ask)
        if verdict is not None:
            terms.counted, terms.again = verdict.counted, verdict.again
        return self._judged(terms, expected, ask, verdict)

    def _ask_again(self, verdict: Verdict | None) -> bool:
        """It says no, and others that have ended are settled only now."""
        return verdict is not None and verdict.why is not None and self._account()

    def _weigh(self, asked: Asked) -> tuple[_Terms, Estimate, Ask]:
        """What it asks for, of whom."""
        terms = self._terms.get(asked[1:5]) or self._look_up(asked)
        if not self._counts:
            return terms, _NOTHING, _ONE
        unsaid = self._output_tokens if asked.path.endswith(_GENERATES) else 0
        prompt, completion = expected = estimate(asked.body, asked.wanted, unsaid)
        tokens, tariff = prompt + completion, terms.tariff
        nanos = tariff.cost(prompt, completion) if tokens and tariff is not None else 0
        return terms, expected, tuple.__new__(Ask, (tokens, nanos))  # as `Ask`, in half the time

    def _look_up(self, asked: Asked) -> _Terms:
        """The terms of such exchanges. Remembered: look-ups in what is configured, by names that clients may choose."""
        if len(self._terms) >= _REMEMBERED:
            self._terms.clear()
        terms = _Terms(self._scopes, self._prices, asked, counts=self._counts)
        self._terms[asked[1:5]] = terms
        return terms

    def _judged(self, terms: _Terms, expected: Estimate, ask: Ask, verdict: Verdict | None) -> Slot | Refused:
        if verdict is None:
            if self._fail_open:
                return _Slot(terms, expected, ask)
            return Refused(Failure(Side.GATEWAY, Phase.ROUTE, Kind.UNCOUNTED, retry_after=1.0))
        if verdict.why is not None:
            return Refused(self._limits.refuse(*verdict.why), limit_fields(verdict.counted))
        return _Slot(terms, expected, ask, verdict.keeper, verdict.counted, limit_fields(verdict.counted))


_NOTHING: Estimate = 0, 0
_ONE = Ask()


@final
class _Terms:
    """What is the same for all exchanges that ask like `asked`: of this principal, for this model, and at first at this
    upstream, which calls it so. `tariff` is what it costs there; `again` may be asked for what was `counted`."""

    __slots__ = ("_alias", "_prices", "_upstream", "_upstream_model", "again", "counted", "counts", "scopes", "tariff")

    def __init__(self, scopes: Scopes, prices: Prices, asked: Asked, *, counts: bool) -> None:
        self._prices = prices
        self._alias, self._upstream, self._upstream_model = asked.model, asked.upstream, asked.upstream_model
        self.counts = counts  # tokens, or money
        self.scopes = scopes.of(asked.principal, asked.model)
        self.tariff = prices.find(asked.upstream, asked.upstream_model, asked.model)
        self.counted: Counted = ()
        self.again: Again | None = None

    def guess(self, record: ExchangeRecord, expected: Estimate) -> Ask:
        """What an exchange has used of which the upstream has said nothing, or of which it does not count."""
        if not self.counts:
            return _ONE
        upstream, model, tariff = record.upstream, record.upstream_model, self.tariff
        if upstream != self._upstream or model != self._upstream_model:
            tariff = self._prices.find(upstream, model or self._upstream_model, self._alias)
        prompt, completion = used_by(record, expected)
        tokens = prompt + completion  # where there are none nothing was paid for
        return Ask(tokens, tariff.cost(prompt, completion) if tokens and tariff is not None else 0)


@final
class _Slot(NamedTuple):
    """`hooks.Slot`. Nothing of the request is kept alive by it."""

    terms: _Terms
    expected: Estimate
    ask: Ask
    keeper: Keeper | None = None  # nobody counts it
    counted: Counted = ()
    fields: bytes = b""

    def release(self, record: ExchangeRecord) -> None:
        """The exchange has ended."""
        terms, expected, ask, keeper, counted, _ = self
        if keeper is None:
            return
        usage = record.usage
        if usage is None or not terms.counts:
            used = terms.guess(record, expected)
        else:
            used = tuple.__new__(Ask, (usage.prompt + usage.completion, record.cost or 0))
        keeper.settle(counted, ask, used)


def used_by(record: ExchangeRecord, expected: Estimate) -> Estimate:
    """Prompt and answer of an exchange of which the upstream has said nothing: a guess."""
    refused = record.status is not None and record.status >= 400
    sent = record.attempts > 0 and not (record.outcome is not Outcome.COMPLETED and record.phase in _NOT_SENT)
    return guess_used(
        expected, delivered_bytes=record.response_bytes, events=record.events, answered=sent and not refused
    )
