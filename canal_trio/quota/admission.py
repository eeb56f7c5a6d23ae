"""The hook: which limits an exchange has to keep, what it is expected to use, and what it has used in the end.

`Limits` is there once in a process and keeps the store; `admission` gives one configuration's hook, or None where no
limits are configured: then an exchange costs nothing. Invariant: what a store let in is settled exactly once, with the
rules under which it was let in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, final

import trio

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.hooks import Admission, Asked, ExchangeRecord, Outcome, Refused, Slot
from canal_trio.policy.expected import Estimate, estimate, guess_used
from canal_trio.policy.limit_fields import limit_fields, refusal_text
from canal_trio.policy.prices import Prices, cost
from canal_trio.policy.ratelimit import Ask, Refusal, State, What
from canal_trio.policy.scopes import Scope, Scopes
from canal_trio.settings import Price, Settings

__all__ = ["Keeper", "Limits", "Store", "Verdict"]

_GENERATES = ("/completions", "/responses", "/messages")
_NOT_SENT = frozenset({Phase.HEAD, Phase.ROUTE, Phase.UPLOAD, Phase.LEASE, Phase.DIAL})


class Keeper(Protocol):
    """Who has counted an exchange, and settles it."""

    def settle(self, scopes: Sequence[Scope], ask: Ask, used: Ask) -> None:
        """What was let in has ended. Not a checkpoint."""


class Verdict(NamedTuple):
    """What each scope has counted (with this exchange, if it was let in), why it was not, and who keeps it."""

    counted: Sequence[tuple[Scope, State]]
    why: tuple[Scope, Refusal] | None
    keeper: Keeper


class Store(Protocol):
    """What counts."""

    @property
    def away(self) -> bool:
        """It does not answer at the moment."""

    @property
    def errors(self) -> int:
        """How often it did not answer."""

    @property
    def admit_now(self) -> Callable[[Sequence[Scope], Ask], Verdict | None] | None:
        """`admit` where nothing is ever waited for; else None."""

    async def admit(self, scopes: Sequence[Scope], ask: Ask) -> Verdict | None:
        """Let it in everywhere or nowhere, or why not; None: nobody can tell. Cancelling it leaves nothing counted."""

    async def flush(self) -> None:
        """Wait, but not for long, until what was settled is known where it is counted."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """What it has to do in the background, until cancelled."""


def _nothing() -> bool:
    return False


@final
class Limits:
    """The limits of one process, counted in `store`."""

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
        spent = refusal.what in (What.SPEND_DAY, What.SPEND_MONTH)
        kind = Kind.QUOTA if spent else Kind.LIMITED
        return Failure(Side.CLIENT, Phase.ROUTE, kind, refusal_text(scope, refusal), retry_after=refusal.wait)


@final
class _Admission:
    """One configuration."""

    def __init__(self, limits: Limits, settings: Settings, scopes: Scopes, account: Callable[[], bool]) -> None:
        self._limits = limits
        self._account = account
        self._scopes = scopes
        self._prices = Prices(settings.prices)
        self._output_tokens = settings.limit_store.output_tokens
        self._fail_open = settings.limit_store.fail == "open"
        self._counts = scopes.tokens or scopes.spend
        self.wants_usage = self._counts
        self.wants_body = self._counts or scopes.models
        self._count_now = limits.store.admit_now
        self.admit_now = None if self._count_now is None else self._admit_now

    async def admit(self, asked: Asked) -> Slot | Refused:
        """`hooks.Admission`."""
        slot, count = self._slot(asked), self._limits.store.admit
        if not slot.scopes:
            return slot
        verdict = await count(slot.scopes, slot.ask)
        if self._ask_again(verdict):
            verdict = await count(slot.scopes, slot.ask)
        return self._judged(slot, verdict)

    def _admit_now(self, asked: Asked) -> Slot | Refused:
        slot, count = self._slot(asked), self._count_now
        assert count is not None
        if not slot.scopes:
            return slot
        verdict = count(slot.scopes, slot.ask)
        if self._ask_again(verdict):
            verdict = count(slot.scopes, slot.ask)
        return self._judged(slot, verdict)

    def _ask_again(self, verdict: Verdict | None) -> bool:
        """It says no, and others that have ended are settled only now."""
        return verdict is not None and verdict.why is not None and self._account()

    def _slot(self, asked: Asked) -> _Slot:
        """What it asks for, of whom; not counted yet."""
        expected, price, ask = _NOTHING, None, _ONE
        if self._counts:
            generates = asked.path.endswith(_GENERATES)
            expected = estimate(asked.body, asked.wanted, generates=generates, output_tokens=self._output_tokens)
            price = self._prices.find(asked.upstream, asked.upstream_model, asked.model)
            prompt, completion = expected
            ask = _ask(price, prompt, completion)
        return _Slot(self, self._scopes.of(asked.principal, asked.model), asked, price, expected, ask)

    def _judged(self, slot: _Slot, verdict: Verdict | None) -> Slot | Refused:
        if verdict is None:
            if self._fail_open:
                return slot
            return Refused(Failure(Side.GATEWAY, Phase.ROUTE, Kind.UNCOUNTED, retry_after=1.0))
        counted, why, keeper = verdict
        fields = limit_fields(counted)
        if why is not None:
            return Refused(self._limits.refuse(*why), fields)
        slot.keeper, slot.fields = keeper, fields
        return slot

    def used(self, slot: _Slot, record: ExchangeRecord) -> Ask:
        """What the exchange of a slot has used."""
        if not self._counts:
            return _ONE
        usage = record.usage
        if usage is not None:
            return tuple.__new__(Ask, (usage.prompt + usage.completion, record.cost or 0))
        prompt, completion = used_by(record, slot.expected)
        asked, price = slot.asked, slot.price
        if record.upstream != asked.upstream or record.upstream_model != asked.upstream_model:
            price = self._prices.find(record.upstream, record.upstream_model or asked.upstream_model, asked.model)
        return _ask(price, prompt, completion)


_NOTHING = Estimate()
_ONE = Ask()


def _ask(price: Price | None, prompt: int, completion: int) -> Ask:
    tokens = prompt + completion
    # Where nothing was generated nothing was paid for.
    nanos = 0 if price is None or not tokens else cost(price, prompt=prompt, completion=completion)
    return tuple.__new__(Ask, (tokens, nanos))  # as `Ask`, in half the time


@final
class _Slot:
    """`hooks.Slot`: settled once, whatever happens. `price` is that of the upstream that is to be asked first."""

    __slots__ = ("_admission", "ask", "asked", "expected", "fields", "keeper", "price", "scopes")

    def __init__(
        self,
        admission: _Admission,
        scopes: Sequence[Scope],
        asked: Asked,
        price: Price | None,
        expected: Estimate,
        ask: Ask,
    ) -> None:
        self._admission = admission
        self.scopes = scopes
        self.asked = asked
        self.price = price
        self.expected = expected
        self.ask = ask
        self.keeper: Keeper | None = None  # nobody counts it
        self.fields = b""

    def release(self, record: ExchangeRecord) -> None:
        """The exchange has ended."""
        keeper, self.keeper = self.keeper, None
        if keeper is not None:
            keeper.settle(self.scopes, self.ask, self._admission.used(self, record))


def used_by(record: ExchangeRecord, expected: Estimate) -> Estimate:
    """Prompt and answer of an exchange of which the upstream has said nothing: a guess."""
    refused = record.status is not None and record.status >= 400
    sent = record.attempts > 0 and not (record.outcome is not Outcome.COMPLETED and record.phase in _NOT_SENT)
    return guess_used(
        expected, delivered_bytes=record.response_bytes, events=record.events, answered=sent and not refused
    )
