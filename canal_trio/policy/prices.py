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

__all__ = ["NANOS", "Prices", "cost", "money"]

NANOS = 10**9  # in one unit of the currency
_PER_TOKEN = 1000  # nanos per token, for one unit per million tokens
_REMEMBERED = 4096  # look-ups; clients choose the names


def cost(price: Price, *, prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> int:
    """The cost of one exchange in nanos, to the nearest.

    Counted as OpenAI does: `cached` tokens are among the `prompt` tokens, `reasoning` tokens among the `completion`
    tokens; more of them than there are of the whole count as all of it.
    """
    if not cached and not reasoning:  # most have neither
        return round((prompt * price.input + completion * price.output) * _PER_TOKEN + price.request * NANOS)
    cached, reasoning = min(cached, prompt), min(reasoning, completion)
    cached_input = price.input if price.cached_input is None else price.cached_input
    thinking = price.output if price.reasoning is None else price.reasoning
    tokens = (
        (prompt - cached) * price.input
        + cached * cached_input
        + (completion - reasoning) * price.output
        + reasoning * thinking
    )
    return round(tokens * _PER_TOKEN + price.request * NANOS)


def money(nanos: int) -> str:
    """For people: at least two decimals, as many as it takes, at most nine."""
    whole, part = divmod(abs(nanos), NANOS)
    decimals = f"{part:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nanos < 0 else ''}{whole}.{decimals}"


@final
class Prices:
    """The price table, ready to be asked. Each look-up is remembered."""

    def __init__(self, prices: Iterable[Price]) -> None:
        self._exact: dict[tuple[str | None, str], Price] = {}
        self._patterns: list[Price] = []
        for price in prices:
            if price.model.endswith("*"):
                self._patterns.append(price)
            else:
                self._exact[price.upstream, price.model] = price
        self._patterns.sort(key=lambda price: (len(price.model), price.upstream is not None), reverse=True)
        self._found: dict[tuple[str | None, tuple[str | None, ...]], Price | None] = {}

    def __bool__(self) -> bool:
        return bool(self._exact or self._patterns)

    def find(self, upstream: str | None, *models: str | None) -> Price | None:
        """The price of the first of `models` that has one: the upstream's own name first, then the client's."""
        key = (upstream, models)
        if key in self._found:
            return self._found[key]
        if len(self._found) >= _REMEMBERED:
            self._found.clear()
        named = [model for model in models if model is not None]
        price = self._found[key] = self._look_up(upstream, named or [""])  # without a name it may still be `*`
        return price

    def charge(self, usage: Usage, upstream: str | None, *models: str | None) -> int | None:
        """What `usage` costs, in nanos; None if it has no price. Found as `find` does."""
        price = self.find(upstream, *models)
        if price is None:
            return None
        prompt, completion, cached, reasoning = usage
        return cost(price, prompt=prompt, completion=completion, cached=cached, reasoning=reasoning)

    def _look_up(self, upstream: str | None, models: list[str]) -> Price | None:
        for model in models:
            found = self._exact.get((upstream, model)) or self._exact.get((None, model))
            if found is not None:
                return found
        for model in models:
            for price in self._patterns:
                if price.upstream in (None, upstream) and model.startswith(price.model[:-1]):
                    return price
        return None
