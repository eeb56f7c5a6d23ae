"""The hook: which limits an exchange has to keep, what it is expected to use, and what it has used in the end.

`Limits` is there once in a process and keeps the store; `admission` gives one configuration's hook, or None where no
limits are configured: then an exchange costs nothing. Invariant: what a store let in is settled exactly once, with the
rules under which it was let in.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    def waits(self) -> bool:
        """`admit` may have to wait for an answer; False: it awaits nothing."""

    async def admit(self, scopes: Sequence[Scope], ask: Ask) -> Verdict | None:
        """Let it in everywhere or nowhere, or why not; None: nobody can tell. Cancelling it leaves nothing counted."""

    async def flush(self) -> None:
        """Wait, but not for long, until what was settled is known where it is counted."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """What it has to do in the background, until cancelled."""


@final
class Limits:
    """The limits of one process, counted in `store`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.rejections: dict[tuple[str, ...], float] = {}  # (kind of scope, which number) -> how many

    def admission(self, settings: Settings) -> Admission | None:
        """The hook for `settings`; None if they limit nothing."""
        scopes = Scopes(settings.limits)
        return _Admission(self, settings, scopes) if scopes else None

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

    def __init__(self, limits: Limits, settings: Settings, scopes: Scopes) -> None:
        self._limits = limits
        self._scopes = scopes
        self._prices = Prices(settings.prices)
        self._output_tokens = settings.limit_store.output_tokens
        self._fail_open = settings.limit_store.fail == "open"
        self._counts = scopes.tokens or scopes.spend
        self.wants_usage = self._counts
        self.wants_body = self._counts or scopes.models
        self.waits = limits.store.waits

    async def admit(self, asked: Asked) -> Slot | Refused:
        """`hooks.Admission`."""
        scopes = self._scopes.of(asked.principal, asked.model)
        expected, price, ask = _NOTHING, None, _ONE
        if self._counts:
            generates = asked.path.endswith(_GENERATES)
            expected = estimate(asked.body, generates=generates, output_tokens=self._output_tokens)
            price = self._prices.find(asked.upstream, asked.upstream_model, asked.model)
            prompt, completion = expected
            ask = _ask(price, prompt, completion)
        if not scopes:
            return _Slot(self, None, scopes, asked, price, expected, ask, b"")
        verdict = await self._limits.store.admit(scopes, ask)
        if verdict is None:
            if self._fail_open:
                return _Slot(self, None, scopes, asked, price, expected, ask, b"")
            return Refused(Failure(Side.GATEWAY, Phase.ROUTE, Kind.UNCOUNTED, retry_after=1.0))
        fields = limit_fields(verdict.counted)
        if verdict.why is not None:
            return Refused(self._limits.refuse(*verdict.why), fields)
        return _Slot(self, verdict.keeper, scopes, asked, price, expected, ask, fields)

    def used(self, asked: Asked, price: Price | None, expected: Estimate, record: ExchangeRecord) -> Ask:
        """What the exchange of a slot has used. `price` is that of the upstream that was to be asked first."""
        if not self._counts:
            return _ONE
        usage = record.usage
        prompt, completion, cached, reasoning = (*used_by(record, expected), 0, 0) if usage is None else usage
        if record.upstream != asked.upstream or record.upstream_model != asked.upstream_model:
            price = self._prices.find(record.upstream, record.upstream_model or asked.upstream_model, asked.model)
        return _ask(price, prompt, completion, cached, reasoning)


_NOTHING = Estimate()
_ONE = Ask()


def _ask(price: Price | None, prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> Ask:
    tokens = prompt + completion
    if price is None or not tokens:  # nothing was generated, so nothing was paid for
        nanos = 0
    else:
        nanos = cost(price, prompt=prompt, completion=completion, cached=cached, reasoning=reasoning)
    return tuple.__new__(Ask, (tokens, nanos))  # as `Ask`, in half the time


@final
class _Slot:
    """`hooks.Slot`: settled once, whatever happens."""

    __slots__ = ("_admission", "_ask", "_asked", "_expected", "_keeper", "_price", "_scopes", "fields")

    def __init__(
        self,
        admission: _Admission,
        keeper: Keeper | None,
        scopes: Sequence[Scope],
        asked: Asked,
        price: Price | None,
        expected: Estimate,
        ask: Ask,
        fields: bytes,
    ) -> None:
        self._admission = admission
        self._keeper = keeper  # None: nobody counts it
        self._scopes = scopes
        self._asked = asked
        self._price = price
        self._expected = expected
        self._ask = ask
        self.fields = fields

    def release(self, record: ExchangeRecord) -> None:
        """The exchange has ended."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            used = self._admission.used(self._asked, self._price, self._expected, record)
            keeper.settle(self._scopes, self._ask, used)


def used_by(record: ExchangeRecord, expected: Estimate) -> Estimate:
    """Prompt and answer of an exchange of which the upstream has said nothing: a guess."""
    refused = record.status is not None and record.status >= 400
    sent = record.attempts > 0 and not (record.outcome is not Outcome.COMPLETED and record.phase in _NOT_SENT)
    return guess_used(
        expected, delivered_bytes=record.response_bytes, events=record.events, answered=sent and not refused
    )
