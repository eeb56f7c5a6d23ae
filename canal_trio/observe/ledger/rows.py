"""The ledger's row: one for each admitted exchange, in the journal and in every store.

A row is written twice: `open` when the exchange was admitted, and whole when it has ended. Its name is (boot, worker,
seq), which no other row of any gateway has; so both may be applied to a store any number of times. Money is in
billionths, so that sums are exact. Texts that came from a client are cut to what a row may hold, so a line is bounded.

A row is a tuple and its line a JSON array in the same order: neither a name nor an object is made for a value, on any
way from an exchange to the store. What is added goes to the end. (Once a line was an object; that is still read.)
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import msgspec

from canal_trio.hooks import Admitted, ExchangeRecord
from canal_trio.policy.prices import Prices, cost

__all__ = [
    "COLUMNS",
    "INTERRUPTED",
    "KNOWN",
    "LINE_BYTES",
    "OPEN",
    "Row",
    "Run",
    "decode",
    "decode_all",
    "ended",
    "opened",
]

OPEN: Final = "open"  # the outcome of a row whose exchange has not ended
INTERRUPTED: Final = "interrupted"  # ... and never will, because its process is gone

_TEXT: Final = 200  # characters of each text; JSON makes six bytes of one at most
LINE_BYTES: Final = 16 * 1024  # a line is never longer
_AT_ONCE: Final = 512  # lines decoded in one call, in which the loop waits: a fraction of a millisecond


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
KNOWN: Final = COLUMNS.index("upstream") + 1  # columns of an open row; the others have their defaults
_DEFAULTS: Final = tuple([Row._field_defaults[name] for name in COLUMNS[KNOWN:]])
_decoder: Final = msgspec.json.Decoder(Row)


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


def opened(seq: int, admitted: Admitted) -> Row:
    """The row of an exchange that is about to go upstream."""
    id_, started, path, principal, key, model, upstream = admitted
    few = _few_texts if len(path) + len(model or "") <= _TEXT else _texts
    path_text, principal, key, model, upstream = few(path, principal, key, model, upstream)
    fields = (seq, started, _cut(id_), principal, key, path_text or "", model, None, upstream, *_DEFAULTS)
    return tuple.__new__(Row, fields)  # as `Row._make`, without asking how many they are


def ended(row: Row, record: ExchangeRecord, prices: Prices) -> Row:
    """The whole row of an exchange that has ended: the open `row`, filled in. What names the exchange stays."""
    model, upstream, upstream_model, usage = record.model, record.upstream, record.upstream_model, record.usage
    prompt = completion = cached = reasoning = paid = None
    if usage is not None:
        prompt, completion, cached, reasoning = usage
        price = prices.find(upstream, upstream_model, model)
        if price is not None:
            paid = cost(price, prompt=prompt, completion=completion, cached=cached, reasoning=reasoning)
    few = _few_texts if len(model or "") + len(upstream_model or "") <= _TEXT else _texts
    model, upstream, upstream_model = few(model, upstream, upstream_model)
    seq, started, id_, principal, key, path, known, *_ = row
    if model is None:  # else perhaps nobody had to know it before
        model = known
    fields = (
        seq,
        started,
        id_,
        principal,
        key,
        path,
        model,
        upstream_model,
        upstream,
        record.attempts,
        record.status,
        record.outcome._value_,  # .value is a Python call or two
        record.phase._value_,
        record.usage_source._value_,
        prompt,
        completion,
        cached,
        reasoning,
        paid,
        record.request_bytes,
        record.response_bytes,
        record.events,
        record.first_byte,
        record.duration,
        record.cancel_latency,
        ",".join(record.flags) if record.flags else "",
    )
    return tuple.__new__(Row, fields)


def decode(line: bytes) -> Row | None:
    """The row of a journal's line; None if it is no whole one (the disk was full, the process died in it)."""
    try:
        return _older(line) if line.startswith(b"{") else _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def decode_all(lines: list[bytes]) -> list[Row] | None:
    """The rows of many lines at once; None if not each of them is one."""
    try:
        found: list[Row] = []
        for at in range(0, len(lines), _AT_ONCE):
            # No row goes over the end of a line: a string may not, and a line that goes on an array is no part of it.
            found += _decoder.decode_lines(b"\n".join(lines[at : at + _AT_ONCE]))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return found if len(found) == len(lines) else None


def _older(line: bytes) -> Row:
    """Of a line that is an object. Raises as msgspec does."""
    said = msgspec.json.decode(line, type=dict[str, object])
    return msgspec.convert([said.get(name, Row._field_defaults.get(name)) for name in COLUMNS], Row)
