"""What a use of a model costs, by the price table of the settings. Pure.

Money is counted in whole billionths of the table's currency (`nanos`), so that sums are exact whatever their order. A
price is found by the upstream's name and the model's, the upstream's own name for the model before the client's, an
exact name before a pattern, a longer pattern before a shorter one. What has no price costs None, not nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

from canal_trio.hooks import Usage
from canal_trio.settings import Price

__all__ = ["NANOS", "Prices", "Tariff", "money"]

NANOS = 10**9  # in one unit of the currency
_PER_TOKEN = 1000  # nanos per token, for one unit per million tokens
_REMEMBERED = 4096  # look-ups; clients choose the names


@final
class Tariff:
    """A `Price` in the units that are calculated with: nanos per token, and per exchange."""

    __slots__ = ("cached", "completion", "price", "prompt", "reasoning", "request")

    def __init__(self, price: Price) -> None:
        self.price = price
        self.prompt, self.completion = price.input * _PER_TOKEN, price.output * _PER_TOKEN
        self.cached = self.prompt if price.cached_input is None else price.cached_input * _PER_TOKEN
        self.reasoning = self.completion if price.reasoning is None else price.reasoning * _PER_TOKEN
        self.request = price.request * NANOS

    def cost(self, prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> int:
        """The cost of one exchange in nanos, to the nearest.

        Counted as OpenAI does: `cached` tokens are among the `prompt` tokens, `reasoning` tokens among the `completion`
        tokens; more of them than there are of the whole count as all of it.
        """
        nanos = self.request
        if cached or reasoning:  # most have neither
            cached, reasoning = min(cached, prompt), min(reasoning, completion)
            nanos += cached * self.cached + reasoning * self.reasoning
            prompt, completion = prompt - cached, completion - reasoning
        return round(nanos + prompt * self.prompt + completion * self.completion)


def money(nanos: int) -> str:
    """For people: at least two decimals, as many as it takes, at most nine."""
    whole, part = divmod(abs(nanos), NANOS)
    decimals = f"{part:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nanos < 0 else ''}{whole}.{decimals}"


@final
class Prices:
    """The price table, ready to be asked. Each look-up is remembered."""

    def __init__(self, prices: Iterable[Price]) -> None:
        self._exact: dict[tuple[str | None, str], Tariff] = {}
        self._patterns: list[Tariff] = []
        for price in prices:
            if price.model.endswith("*"):
                self._patterns.append(Tariff(price))
            else:
                self._exact[price.upstream, price.model] = Tariff(price)
        self._patterns.sort(key=lambda one: (len(one.price.model), one.price.upstream is not None), reverse=True)
        self._found: dict[tuple[str | None, str | None, str | None], Tariff | None] = {}

    def find(self, upstream: str | None, model: str | None, alias: str | None = None) -> Tariff | None:
        """What `model`, as the upstream calls it, costs there, or else what its `alias`, the client's name, does."""
        key = upstream, model, alias
        if key in self._found:
            return self._found[key]
        if len(self._found) >= _REMEMBERED:
            self._found.clear()
        named = [name for name in (model, alias) if name is not None]
        tariff = self._found[key] = self._look_up(upstream, named or [""])  # without a name it may still be `*`
        return tariff

    def charge(self, usage: Usage, upstream: str | None, model: str | None, alias: str | None = None) -> int | None:
        """What `usage` costs, in nanos; None if it has no price. Found as `find` does."""
        try:
            tariff = self._found[upstream, model, alias]
        except KeyError:
            tariff = self.find(upstream, model, alias)
        if tariff is None:
            return None
        prompt, completion, cached, reasoning = usage
        return tariff.cost(prompt, completion, cached, reasoning)

    def _look_up(self, upstream: str | None, models: list[str]) -> Tariff | None:
        for model in models:
            found = self._exact.get((upstream, model)) or self._exact.get((None, model))
            if found is not None:
                return found
        for model in models:
            for tariff in self._patterns:
                price = tariff.price
                if price.upstream in (None, upstream) and model.startswith(price.model[:-1]):
                    return tariff
        return None
