"""The ledger's row: one for each admitted exchange, in the journal and in every store.

A row is written twice: `open` when the exchange was admitted, and whole when it has ended. Its name is (boot, worker,
seq), which no other row of any gateway has; so both may be applied to a store any number of times. Money is in
billionths, so that sums are exact. Texts that came from a client are cut to what a row may hold, so a line is bounded.

A line is a JSON array in the order of the columns; that of an open row ends behind the columns that are known, and the
rest have their defaults. So neither a name nor an object is made for a value, on any way from an exchange to the store,
and many lines are written, and read, in one call. What is added goes to the end. (Once a line was an object, and once
it had a mark in front, `+` or `=`; these are still read.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Final, NamedTuple, TypeAlias

import msgspec

from canal_trio.hooks import Admitted, ExchangeRecord

__all__ = [
    "COLUMNS",
    "INTERRUPTED",
    "LINE_BYTES",
    "OPEN",
    "Begun",
    "Chunk",
    "Ended",
    "Row",
    "Run",
    "decode",
    "decode_all",
    "ended",
    "lines_of",
    "opened",
]

OPEN: Final = "open"  # the outcome of a row whose exchange has not ended
INTERRUPTED: Final = "interrupted"  # ... and never will, because its process is gone

_TEXT: Final = 200  # characters of each text; JSON makes six bytes of one at most
LINE_BYTES: Final = 16 * 1024  # a line is never longer


class Run(msgspec.Struct, frozen=True):
    """One process's life, whose rows these are. `boot` is random; `worker` is 0 where there is only one."""

    instance: str
    boot: str
    worker: int


class Row(NamedTuple):
    """What is kept of an exchange. Seconds, bytes, tokens; `started_at` is Unix time, `cost` is in billionths."""

    seq: int
    started_at: float
    request_id: str
    principal: str | None = None
    key_name: str | None = None
    path: str = ""
    model: str | None = None
    upstream_model: str | None = None
    upstream: str | None = None
    attempts: int = 0
    status: int | None = None
    outcome: str = OPEN
    phase: str = "route"
    usage_source: str = "none"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    cost: int | None = None
    request_bytes: int = 0
    response_bytes: int = 0
    events: int = 0
    first_byte: float | None = None
    duration: float | None = None
    cancel_latency: float | None = None
    flags: str = ""


COLUMNS: Final = Row._fields
_UNKNOWN: Final = (None, None, None, None)  # what was used
_decoder: Final = msgspec.json.Decoder(Row)

Begun: TypeAlias = tuple[int | float | str | None, ...]
"""The row of an exchange that was admitted: the columns that are known, which are the first nine."""
Ended: TypeAlias = list[object]
"""The row of one that has ended."""
Chunk: TypeAlias = tuple[Sequence[Row], Sequence[Row]]
"""Rows of exchanges that run, and whole ones."""

_encode_lines: Final = msgspec.json.Encoder().encode_lines
_models: Final = itemgetter(*map(ExchangeRecord._fields.index, ("model", "upstream_model", "upstream")))
_ending, _amounts = (  # those columns that are fields of the record: in front of what was used, and behind it
    itemgetter(*map(ExchangeRecord._fields.index, COLUMNS[COLUMNS.index(first) : COLUMNS.index(behind)]))
    for first, behind in (("attempts", "prompt_tokens"), ("cost", "flags"))
)


def _cut(text: str) -> str:
    if len(text) <= _TEXT and text.isascii() and text.isprintable():  # nearly always
        return text
    return text[:_TEXT].encode(errors="backslashreplace").decode().replace("\0", "\\0")


_few = lru_cache(1024)(_cut)


def _text(text: str | None) -> str | None:
    """For texts of which there are few: a look-up for most. What a stranger made long is not kept."""
    if text is None:
        return None
    return _few(text) if len(text) <= _TEXT else _cut(text)


def _texts(*texts: str | None) -> tuple[str | None, ...]:
    return tuple([_text(text) for text in texts])


_few_texts = lru_cache(1024)(_texts)  # the same few go together nearly always: one look-up for all of them


def opened(seq: int, admitted: Admitted) -> Begun:
    """The row of an exchange that is about to go upstream."""
    id_, started, path, principal, key, model, upstream = admitted
    few = _few_texts if len(path) + len(model or "") <= _TEXT else _texts
    return (seq, started, id_, *few(principal, key, path, model, None, upstream))


def ended(begun: Begun, record: ExchangeRecord) -> Ended:
    """The row of an exchange that has ended. What names the exchange stays as it was when it was admitted."""
    model, upstream_model, upstream = _models(record)
    few = _few_texts if len(model or "") + len(upstream_model or "") <= _TEXT else _texts
    model, upstream_model, upstream = few(model, upstream_model, upstream)
    return [
        *begun[:6],
        begun[6] if model is None else model,  # perhaps nobody had to know it before
        upstream_model,
        upstream,
        *_ending(record),
        *(record.usage or _UNKNOWN),
        *_amounts(record),
        ",".join(record.flags) if record.flags else "",
    ]


def lines_of(rows: Sequence[Begun | Ended]) -> bytes:
    """The lines of these rows, each ended by LF."""
    return _encode_lines(rows)


def decode(line: bytes) -> Row | None:
    """The row of a journal's line; None if it is no whole one (the disk was full, the process died in it)."""
    line = line.lstrip(b"+=")  # marks of earlier versions
    try:
        return _older(line) if line.startswith(b"{") else _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def decode_all(lines: bytes) -> list[Row] | None:
    """The rows of lines, each ended by LF, at once; None if not each of them is one."""
    try:
        # No row goes over the end of a line: a string may not, and a line that goes on an array is no part of it.
        found = _decoder.decode_lines(lines)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return found if len(found) == lines.count(b"\n") else None


def _older(line: bytes) -> Row:
    """Of a line that is an object. Raises as msgspec does."""
    said = msgspec.json.decode(line, type=dict[str, object])
    return msgspec.convert([said.get(name, Row._field_defaults.get(name)) for name in COLUMNS], Row)
