"""`on_disconnect` of models, routes and keys: `"cancel"`, `"drain"`, or a table with the limits of draining."""

from __future__ import annotations

from typing import Any

from canal_trio.config import values
from canal_trio.config.build import YEAR, read, within
from canal_trio.config.locate import Path
from canal_trio.config.schema import Complain, DrainTable, decode
from canal_trio.config.values import shown
from canal_trio.settings import Drain

__all__ = ["on_disconnect_of"]


def on_disconnect_of(raw: str | dict[str, Any] | None, path: Path, complain: Complain) -> Drain | None:
    """What it says; None if it is not said."""
    where = (*path, "on_disconnect")
    if raw is None:
        return None
    if isinstance(raw, str):
        if raw not in ("cancel", "drain"):
            complain(where, f"expected 'cancel', 'drain' or {{ seconds = 60 }}, got {shown(raw)}")
        return Drain() if raw == "drain" else Drain(at_once=0)
    table = decode(DrainTable, raw, where, complain)
    if table is None:
        return None
    default = Drain()
    seconds, tokens, at_once = default.seconds, default.tokens, default.at_once
    if table.seconds is not None:
        seconds = read(table.seconds, _seconds, (*where, "seconds"), complain, seconds)
    if table.tokens is not None:
        tokens = read(table.tokens, _count, (*where, "tokens"), complain, tokens)
    if table.at_once is not None:
        at_once = int(read(table.at_once, _count, (*where, "at_once"), complain, float(at_once)))
    return Drain(seconds, tokens, at_once)


def _seconds(raw: Any) -> float:
    number = values.duration(raw)
    if number <= 0:
        raise ValueError(f"expected more than 0 seconds, got {number:g}")
    return within(number, 0, YEAR, " seconds")


def _count(raw: Any) -> float:
    return within(values.count(raw), 1, 10**9, "")
