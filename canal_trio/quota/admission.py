"""The hook: which limits an exchange has to keep, what it is expected to use, and what it has used in the end.

`Limits` is there once in a process and keeps the store; `admission` gives one configuration's hook, or None where no
limits are configured: then an exchange costs nothing. Invariant: what a store let in is settled exactly once, with the
rules under which it was let in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, final

import trio

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.hooks import Admission, Asked, ExchangeRecord, Outcome, Refused, Slot
from canal_trio.policy.expected import Estimate, estimate, guess_used
from canal_trio.policy.limit_fields import limit_fields, refusal_text
from canal_trio.policy.prices import Prices, cost
from canal_trio.policy.ratelimit import Ask, Refusal, State, What
from canal_trio.policy.scopes import Scope, Scopes
from canal_trio.settings import Price, Settings

__all__ = ["Limits", "Store", "Verdict"]

Verdict = tuple[Sequence[tuple[Scope, State]], tuple[Scope, Refusal] | None]

_GENERATES = ("/completions", "/responses", "/messages")
_NOT_SENT = frozenset({Phase.HEAD, Phase.ROUTE, Phase.UPLOAD, Phase.LEASE, Phase.DIAL})


class Store(Protocol):
    """What counts."""

    @property
    def away(self) -> bool:
        """It does not answer at the moment."""

    @property
    def errors(self) -> int:
        """How often it did not answer."""

    async def admit(self, scopes: Sequence[Scope], ask: Ask) -> Verdict | None:
        """Let it in everywhere or nowhere, or why not; None: nobody can tell. Cancelling it leaves nothing counted."""

    def settle(self, scopes: Sequence[Scope], ask: Ask, used: Ask) -> None:
        """What was let in has ended. Not a checkpoint."""

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

    def state(self) -> Mapping[tuple[str, ...], float]:
        """For metrics: is the store away, and how often it did not answer."""
        return {("away",): float(self.store.away), ("errors",): self.store.errors}

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

    async def admit(self, asked: Asked) -> Slot | Refused:
        """`hooks.Admission`."""
        scopes = self._scopes.of(asked.principal, asked.model)
        expected, price = _NOTHING, None
        ask = _ONE
        if self._counts:
            generates = asked.path.endswith(_GENERATES)
            expected = estimate(asked.body, generates=generates, output_tokens=self._output_tokens)
            price = self._prices.find(asked.upstream, asked.upstream_model, asked.model)
            ask = Ask(expected.tokens, _cost(price, expected))
        verdict = await self._limits.store.admit(scopes, ask) if scopes else _NO_LIMIT
        if verdict is None:
            if self._fail_open:
                return _Slot(self, (), asked, expected, ask, ())
            return Refused(Failure(Side.GATEWAY, Phase.ROUTE, Kind.UNCOUNTED, retry_after=1.0))
        counted, why = verdict
        fields = limit_fields(counted)
        if why is not None:
            return Refused(self._limits.refuse(*why), fields)
        return _Slot(self, scopes, asked, expected, ask, fields)

    def settle(
        self, scopes: Sequence[Scope], asked: Asked, expected: Estimate, ask: Ask, record: ExchangeRecord
    ) -> None:
        """The exchange of a slot has ended."""
        used = ask
        if self._counts:
            tokens = used_by(record, expected)
            price = self._prices.find(record.upstream, asked.upstream_model, asked.model)
            usage = record.usage
            cached, reasoning = (usage.cached, usage.reasoning) if usage is not None else (0, 0)
            used = Ask(tokens.tokens, _cost(price, tokens, cached, reasoning))
        self._limits.store.settle(scopes, ask, used)


_NOTHING = Estimate()
_ONE = Ask()
_NO_LIMIT: Verdict = ((), None)


def _cost(price: Price | None, used: Estimate, cached: int = 0, reasoning: int = 0) -> int:
    if price is None or not used.tokens:  # nothing was generated, so nothing was paid for
        return 0
    return cost(price, prompt=used.prompt, completion=used.completion, cached=cached, reasoning=reasoning)


@final
class _Slot:
    """`hooks.Slot`: settled once, whatever happens."""

    __slots__ = ("_admission", "_ask", "_asked", "_expected", "_scopes", "fields")

    def __init__(
        self,
        admission: _Admission,
        scopes: Sequence[Scope],
        asked: Asked,
        expected: Estimate,
        ask: Ask,
        fields: tuple[tuple[bytes, bytes], ...],
    ) -> None:
        self._admission = admission
        self._scopes = scopes
        self._asked = asked
        self._expected = expected
        self._ask = ask
        self.fields = fields

    def release(self, record: ExchangeRecord) -> None:
        """The exchange has ended."""
        scopes, self._scopes = self._scopes, ()
        if scopes:
            self._admission.settle(scopes, self._asked, self._expected, self._ask, record)


def used_by(record: ExchangeRecord, expected: Estimate) -> Estimate:
    """Prompt and answer of an exchange: what the upstream said, else a guess."""
    if record.usage is not None:
        return Estimate(record.usage.prompt, record.usage.completion)
    refused = record.status is not None and record.status >= 400
    sent = record.attempts > 0 and not (record.outcome is not Outcome.COMPLETED and record.phase in _NOT_SENT)
    return guess_used(
        expected, delivered_bytes=record.response_bytes, events=record.events, answered=sent and not refused
    )
