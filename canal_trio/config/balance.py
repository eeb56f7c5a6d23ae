"""`[balance]`, `[health]`, `[retries]`, and what `[[model]]`, `[[route]]` and `[[upstream]]` say about balance."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Protocol, TypeVar

from canal_trio.config import values
from canal_trio.config.build import YEAR, read, within
from canal_trio.config.locate import Path
from canal_trio.config.schema import BalanceTable, Complain, Number, Table
from canal_trio.config.values import nearest, shown
from canal_trio.policy.balance import STRATEGIES
from canal_trio.settings import Balance, Health, Retries

__all__ = ["Chooses", "balance_of", "health_of", "own_balance", "retries_of"]

_HASH_BY = "'principal', 'prompt' or 'header:NAME'"
_PARTS = frozenset({"error_rate", "most_ejected", "share"})
_COUNTS = frozenset({"failures", "error_count", "trials", "check_failures", "attempts"})
_RATES = frozenset({"floor", "burst"})
_ABOVE_ZERO = frozenset({"error_window", "eject", "eject_most", "check_interval", "check_timeout", "memory"})

T = TypeVar("T", Health, Retries)


class Chooses(Protocol):
    """A table with keys of its own for what `[balance]` says for all."""

    strategy: str | None
    hash_by: str | None
    hold_first_event: bool | None


def _strategy(text: str) -> str:
    if text not in STRATEGIES:
        raise ValueError(f"there is no strategy {shown(text)}{nearest(text, STRATEGIES)}")
    return text


def _hash_by(text: str) -> str:
    kind, colon, name = text.partition(":")
    if colon and kind == "header" and name:
        return f"header:{values.token(name).lower()}"
    if text not in ("principal", "prompt"):
        raise ValueError(f"expected {_HASH_BY}, got {shown(text)}")
    return text


def _number(raw: Number, name: str) -> float:
    if name in _PARTS:
        return within(values.plain(raw), 0, 1, "")
    if name in _COUNTS:
        return within(values.count(raw), 1, 10**6, "")
    if name in _RATES:
        return within(values.plain(raw), 0, 10**6, "")
    seconds = values.duration(raw)
    if name in _ABOVE_ZERO and seconds <= 0:
        raise ValueError(f"expected more than 0 seconds, got {seconds:g}")
    return within(seconds, 0, YEAR, " seconds")


def _numbers(table: Table, record: type[T], path: Path, complain: Complain) -> T:
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        raw = getattr(table, field.name)
        if raw is not None:
            number = partial(_number, name=field.name)
            chosen[field.name] = read(raw, number, (*path, field.name), complain, field.default)
    return record(**chosen)


def balance_of(table: BalanceTable, path: Path, complain: Complain) -> Balance:
    """`[balance]`."""
    balance = own_balance(table, Balance(), path, complain) or Balance()
    if table.memory is None:
        return balance
    memory = read(table.memory, partial(_number, name="memory"), (*path, "memory"), complain, balance.memory)
    return dataclasses.replace(balance, memory=memory)


def own_balance(table: Chooses, general: Balance, path: Path, complain: Complain) -> Balance | None:
    """What a model or a route says itself, the rest from `[balance]`; None if it says nothing."""
    chosen: dict[str, Any] = {}
    if table.strategy is not None:
        chosen["strategy"] = read(table.strategy, _strategy, (*path, "strategy"), complain, general.strategy)
    if table.hash_by is not None:
        chosen["hash_by"] = read(table.hash_by, _hash_by, (*path, "hash_by"), complain, general.hash_by)
    if table.hold_first_event is not None:
        chosen["hold_first_event"] = table.hold_first_event
    return dataclasses.replace(general, **chosen) if chosen else None


def health_of(table: Table, path: Path, complain: Complain) -> Health:
    """`[health]`."""
    return _numbers(table, Health, path, complain)


def retries_of(table: Table, path: Path, complain: Complain) -> Retries:
    """`[retries]`."""
    return _numbers(table, Retries, path, complain)
