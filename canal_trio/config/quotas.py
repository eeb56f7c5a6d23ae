"""`[[price]]`, `[[limit]]` and `[limits]`: what things cost, how much there may be, and where it is counted.

Like `build`: complains about all that it finds and goes on with a stand-in. What would limit nothing, or could not be
kept (a budget without prices, or one that a restart would forget), is refused, not ignored.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from canal_trio.config import values
from canal_trio.config.build import Surroundings, place_of, read, secret_of
from canal_trio.config.locate import Path
from canal_trio.config.schema import Complain, LimitStoreTable, LimitTable, PriceTable, decode
from canal_trio.config.values import nearest, shown
from canal_trio.policy.names import Names
from canal_trio.settings import Key, Limit, LimitStore, Model, Price

__all__ = ["limit_store_of", "limits_of", "prices_of"]

MOST_PRICE = 1e6  # per million tokens: one unit for each token
_DEFAULTS = LimitStore()
# key -> least, most
_RANGES = {
    "requests_per_minute": (1e-6, 1e9),
    "tokens_per_minute": (1.0, 1e12),
    "streams": (1.0, 1e9),
    "spend_per_day": (1e-9, 1e9),
    "spend_per_month": (1e-9, 1e9),
}
_BURST = (1e-3, 3600.0)
_TIMEOUT = (1e-3, 10.0)


def prices_of(tables: list[dict[str, Any]], upstreams: frozenset[str], complain: Complain) -> tuple[Price, ...]:
    """Every `[[price]]`. `upstreams` are the names there are."""
    prices: dict[tuple[str, str | None], Price] = {}
    for number, raw in enumerate(tables):
        path: Path = ("price", number)
        table = decode(PriceTable, raw, path, complain)
        if table is None:
            continue
        price = _price(table, path, upstreams, complain)
        if (price.model, price.upstream) in prices:
            complain((*path, "model"), f"there is a price for {shown(price.model)} already")
        prices[price.model, price.upstream] = price
    return tuple(prices.values())


def _price(table: PriceTable, path: Path, upstreams: frozenset[str], complain: Complain) -> Price:
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


def limits_of(
    tables: list[dict[str, Any]],
    keys: Iterable[Key],
    models: Iterable[Model],
    complain: Complain,
    *,
    priced: bool,
    kept: bool,
) -> tuple[Limit, ...]:
    """Every `[[limit]]`. `priced`: there is a price; `kept`: what was spent outlives a restart."""
    principals = frozenset(key.principal or key.name for key in keys)
    names = Names((model.name, model.name) for model in models)
    known = frozenset(model.name for model in models)
    limits: dict[tuple[str | None, str | None], Limit] = {}
    for number, raw in enumerate(tables):
        path: Path = ("limit", number)
        table = decode(LimitTable, raw, path, complain)
        if table is None:
            continue
        if table.principal not in (None, "*", *principals):
            why = nearest(table.principal or "", principals) or ("" if principals else ": there is no [[key]]")
            complain((*path, "principal"), f"there is no principal named {shown(table.principal)}{why}")
        if table.model not in (None, "*") and "*" in (table.model or ""):
            complain((*path, "model"), f"expected one model's name, or '*' for each; got {shown(table.model)}")
        elif table.model not in (None, "*") and known and names.find(table.model or "") is None:
            text = f"there is no model named {shown(table.model)}{nearest(table.model or '', known)}"
            complain((*path, "model"), text)
        limit = _limit(table, path, complain)
        if limit.spend_day is not None or limit.spend_month is not None:
            spend = (*path, "spend_per_day" if limit.spend_day is not None else "spend_per_month")
            if not priced:
                complain(spend, "without any [[price]] nothing would ever be spent")
            if not kept:
                text = 'a restart would forget what was spent: expected state = "FILE" or redis = "URL" in [limits]'
                complain(spend, text)
        if (table.principal, table.model) in limits:
            complain(path, "there is a limit for the same principal and model already: put the numbers together")
        limits[table.principal, table.model] = limit
    return tuple(limits.values())


def _limit(table: LimitTable, path: Path, complain: Complain) -> Limit:
    numbers = {key: getattr(table, key) for key in _RANGES}
    if all(number is None for number in numbers.values()):
        complain(path, f"limits nothing: expected one of {', '.join(_RANGES)}")
    for key, number in numbers.items():
        least, most = _RANGES[key]
        if number is not None and not least <= number <= most:
            complain((*path, key), f"expected {least:.15g} to {most:.15g}, got {number}")
    burst = 60.0 if table.burst is None else _span(table.burst, _BURST, (*path, "burst"), complain, 60.0)
    return Limit(
        principal=table.principal,
        model=table.model,
        requests=table.requests_per_minute,
        tokens=table.tokens_per_minute,
        streams=table.streams,
        spend_day=table.spend_per_day,
        spend_month=table.spend_per_month,
        burst=burst,
    )


def limit_store_of(raw: dict[str, Any], around: Surroundings, complain: Complain) -> LimitStore:
    """`[limits]`."""

    def at(key: str) -> Path:
        return ("limits", key)

    table = decode(LimitStoreTable, raw, ("limits",), complain) or LimitStoreTable()
    redis = None if table.redis is None else secret_of(table.redis, at("redis"), around, complain)
    if redis is not None:
        redis = read(redis, _redis_url, at("redis"), complain, None)
        if importlib.util.find_spec("coredis") is None:
            complain(at("redis"), "needs what `pip install 'canal-trio[redis]'` installs")
    if table.fail not in (None, "open", "closed", "local"):
        complain(at("fail"), f"expected 'open', 'closed' or 'local', got {shown(table.fail)}")
    output_tokens = _DEFAULTS.output_tokens if table.output_tokens is None else table.output_tokens
    if not 0 <= output_tokens <= 10**9:
        complain(at("output_tokens"), f"expected 0 to 1000000000, got {output_tokens}")
    timeout = _DEFAULTS.timeout
    if table.timeout is not None:
        timeout = _span(table.timeout, _TIMEOUT, at("timeout"), complain, timeout)
    return LimitStore(
        state=None if table.state is None else place_of(table.state, at("state"), around, complain),
        redis=redis,
        fail=table.fail or _DEFAULTS.fail,
        timeout=timeout,
        prefix=_DEFAULTS.prefix
        if table.prefix is None
        else read(table.prefix, values.token, at("prefix"), complain, _DEFAULTS.prefix),
        output_tokens=output_tokens,
    )


def _span(raw: float | str, bounds: tuple[float, float], path: Path, complain: Complain, instead: float) -> float:
    least, most = bounds

    def within(value: float | str) -> float:
        seconds = values.duration(value)
        if not least <= seconds <= most:
            raise ValueError(f"expected {least:g} to {most:g} seconds, got {seconds:g}")
        return seconds

    return read(raw, within, path, complain, instead)


def _redis_url(text: str) -> str:
    """A URL of Redis or Valkey; it may hold a password and is not repeated."""
    expected = "expected redis://HOST:PORT/DB, rediss://HOST:PORT/DB or unix:///PATH"
    try:
        parts = urlsplit(text)
        complete = bool(parts.path)
        if parts.scheme != "unix":
            complete = bool(parts.hostname) and parts.port != 0 and re.fullmatch(r"(/\d*)?", parts.path) is not None
    except ValueError:
        raise ValueError(f"{expected}, and this is no such URL") from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError(f"{expected}; got the scheme {shown(parts.scheme)}")
    if not complete:
        text = "what is special in a password is percent-encoded, as %2F for /"
        raise ValueError(f"{expected}, and this is no such URL; {text}")
    return text
