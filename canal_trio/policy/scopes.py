"""Which limits an exchange has to keep: look-ups in frozen settings. Pure.

An exchange is in four scopes: the whole gateway, its principal, its model, and the two together. In each of them the
limit with the most exact names counts, and only that one; a `*` stands for those that have no limit of their own, each
counted by itself. A scope's `id` is the same on every machine and after every reload.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from canal_trio.policy.ratelimit import Rule
from canal_trio.settings import Limit

__all__ = ["Scope", "Scopes"]

_REMEMBERED = 16_384  # pairs of principal and model; clients may choose the models
_ID_CHARACTERS = 160  # a longer one is made of a digest


@dataclass(frozen=True, slots=True, eq=False)
class Scope:
    """One limit at work: what is counted together, by which rule; `kind` is bounded, `text` is for people.

    Equal to itself only, so that several together are found quickly by what they are.
    """

    id: str
    rule: Rule
    kind: str  # total, principal, model, pair
    text: str


@final
class Scopes:
    """All limits of one configuration."""

    def __init__(self, limits: Iterable[Limit]) -> None:
        self._rules: dict[tuple[str | None, str | None], Rule] = {}
        self.tokens = self.spend = self.models = False  # is there such a limit, or one that looks at the model?
        for limit in limits:
            self._rules[limit.principal, limit.model] = Rule(limit)
            self.tokens = self.tokens or limit.tokens is not None
            self.spend = self.spend or limit.spend_day is not None or limit.spend_month is not None
            self.models = self.models or limit.model is not None
        self._found: dict[tuple[str | None, str | None], tuple[Scope, ...]] = {}

    def __bool__(self) -> bool:
        return bool(self._rules)

    def of(self, principal: str | None, model: str | None) -> tuple[Scope, ...]:
        """The scopes of an exchange, the widest first. Remembered."""
        key = (principal, model)
        found = self._found.get(key)
        if found is None:
            if len(self._found) >= _REMEMBERED:
                self._found.clear()
            found = self._found[key] = tuple(self._look_up(principal, model))
        return found

    def _look_up(self, principal: str | None, model: str | None) -> Iterable[Scope]:
        rule = self._rules.get((None, None))
        if rule is not None:
            yield Scope("total", rule, "total", "this gateway")
        if principal is not None and (rule := self._first((principal, None), ("*", None))):
            yield Scope(_id("principal", principal), rule, "principal", f"'{principal}'")
        if model is not None and (rule := self._first((None, model), (None, "*"))):
            yield Scope(_id("model", model), rule, "model", f"the model '{model[:80]}'")
        if principal is not None and model is not None:
            pairs = ((principal, model), (principal, "*"), ("*", model), ("*", "*"))
            if rule := self._first(*pairs):
                text = f"'{principal}' with the model '{model[:80]}'"
                yield Scope(_id("pair", principal, model), rule, "pair", text)

    def _first(self, *keys: tuple[str | None, str | None]) -> Rule | None:
        return next((self._rules[key] for key in keys if key in self._rules), None)


def _id(kind: str, *names: str) -> str:
    """No two different scopes have the same: lengths keep the names apart."""
    text = ":".join([kind, *(f"{len(name)}:{name}" for name in names)])
    if len(text) <= _ID_CHARACTERS and text.isascii() and " " not in text:
        return text
    return f"{kind}:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"
