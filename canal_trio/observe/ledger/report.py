"""`canal-trio usage`: sums of the ledger as a table for people, as CSV and as JSON. Pure."""

from __future__ import annotations

import csv
import datetime
import io
import re
from collections.abc import Sequence
from typing import Final

import msgspec

from canal_trio.observe.ledger.store import Sums
from canal_trio.policy.prices import money

__all__ = ["FORMATS", "moment", "rendered"]

FORMATS: Final = ("table", "csv", "json")
_UNITS: Final = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_FORMULA: Final = re.compile(r"\s*[=+\-@＝＋－＠]")  # the wide ones, too
_NUMBERS: Final = tuple(name for name in Sums.__dataclass_fields__ if name not in ("group", "cost"))


def moment(text: str, now: float) -> float:
    """Unix time of `text`: `30m`, `24h`, `7d`, `2w` before `now`, or a date, perhaps with a time (UTC unless it says).

    Raises ValueError for anything else.
    """
    if match := re.fullmatch(r"(\d{1,6})([mhdw])", text.strip()):
        return now - int(match[1]) * _UNITS[match[2]]
    try:
        parsed = datetime.datetime.fromisoformat(text.strip())
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=datetime.UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(f"expected 24h, 7d or a date such as 2026-11-25, got {text!r}") from None


def rendered(sums: Sequence[Sums], by: str, style: str) -> str:
    """The sums in one of `FORMATS`, with a line of totals in the table."""
    if style == "json":
        return msgspec.json.format(msgspec.json.encode([_plain(one, by) for one in sums]), indent=2).decode()
    rows = [list(_plain(one, by).values()) for one in sums]
    head = [by, *_NUMBERS, "cost"]
    if style == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([head, *map(_safe, rows)])
        return out.getvalue().removesuffix("\n")
    total = ["total", *(sum(getattr(one, name) for one in sums) for name in _NUMBERS)]
    table: list[list[str | int]] = [[*head], *rows, [*total, money(sum(one.cost for one in sums))]]
    cells = [[_printable(str(cell)) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join(map("  ".join, lines))


def _plain(one: Sums, by: str) -> dict[str, str | int]:
    """Money as an exact decimal text: a float would round it."""
    return {by: one.group, **{name: getattr(one, name) for name in _NUMBERS}, "cost": money(one.cost)}


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def _safe(row: list[str | int]) -> list[str | int]:
    """A client's text must not become a spreadsheet's formula, nor with blanks in front of it, nor a row of its own."""
    cells = [cell.replace("\r", "\n") if isinstance(cell, str) else cell for cell in row]  # csv does not quote a CR
    return [f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) and cell != "-" else cell for cell in cells]
