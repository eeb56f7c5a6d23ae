"""From decoded tables to `settings`: `[[price]]`.

Like `build`: complains about all that it finds and goes on with a stand-in.
"""

from __future__ import annotations

import math

from canal_trio.config import values
from canal_trio.config.build import read
from canal_trio.config.locate import Path
from canal_trio.config.schema import Complain, PriceTable
from canal_trio.config.values import nearest, shown
from canal_trio.settings import Price

__all__ = ["price_of"]

MOST_PRICE = 1e6  # per million tokens: one unit for each token


def price_of(table: PriceTable, path: Path, upstreams: frozenset[str], complain: Complain) -> Price:
    """One `[[price]]`. `upstreams` are the names there are."""
    for key in ("input", "output", "cached_input", "reasoning", "request"):
        number = getattr(table, key)
        if number is not None and not (math.isfinite(number) and 0 <= number <= MOST_PRICE):
            complain((*path, key), f"expected a price from 0 to {MOST_PRICE:.0f} (per million tokens), got {number}")
    if table.upstream is not None and table.upstream not in upstreams:
        text = f"there is no upstream named {shown(table.upstream)}{nearest(table.upstream, upstreams)}"
        complain((*path, "upstream"), text)
    return Price(
        model=read(table.model, values.name, (*path, "model"), complain, "?"),
        input=table.input,
        output=table.output,
        cached_input=table.cached_input,
        reasoning=table.reasoning,
        request=table.request,
        upstream=table.upstream,
    )
