"""The ledger's row: one for each admitted exchange, in the journal and in every store.

A row is written twice: `open` when the exchange was admitted, and whole when it has ended. Its name is (boot, worker,
seq), which no other row of any gateway has; so both may be applied to a store any number of times. Money is in
billionths, so that sums are exact. Texts that came from a client are cut to what a row may hold, so a line is bounded.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Final

import msgspec

from canal_trio.hooks import Admitted, ExchangeRecord
from canal_trio.policy.prices import Prices, cost

__all__ = ["COLUMNS", "INTERRUPTED", "LINE_BYTES", "OPEN", "Row", "Run", "decode", "ended", "opened", "values"]

OPEN: Final = "open"  # the outcome of a row whose exchange has not ended
INTERRUPTED: Final = "interrupted"  # ... and never will, because its process is gone

_TEXT: Final = 200  # characters of each text; JSON makes six bytes of one at most
_plain: Final = re.compile(rf"[\x20-\x7e]{{0,{_TEXT}}}").fullmatch
LINE_BYTES: Final = 16 * 1024  # a line is never longer


class Run(msgspec.Struct, frozen=True):
    """One process's life, whose rows these are. `boot` is random; `worker` is 0 where there is only one."""

    instance: str
    boot: str
    worker: int


class Row(msgspec.Struct, kw_only=True, omit_defaults=True):
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


COLUMNS: Final = Row.__struct_fields__
_decoder = msgspec.json.Decoder(Row)


def _cut(text: str) -> str:
    if _plain(text):  # nearly always
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
    return Row(
        seq=seq,
        started_at=started,
        request_id=_cut(id_),
        principal=principal,
        key_name=key,
        path=path_text or "",
        model=model,
        upstream=upstream,
    )


def ended(row: Row, record: ExchangeRecord, prices: Prices) -> Row:
    """The whole row of an exchange that has ended: the open `row`, filled in. What names the exchange stays."""
    model, upstream_model = record.model, record.upstream_model
    few = _few_texts if len(model or "") + len(upstream_model or "") <= _TEXT else _texts
    model, row.upstream, row.upstream_model = few(model, record.upstream, upstream_model)
    if model is not None:
        row.model = model  # perhaps nobody had to know it before
    row.attempts, row.status = record.attempts, record.status
    row.outcome = record.outcome._value_  # .value is a Python call or two
    row.phase, row.usage_source = record.phase._value_, record.usage_source._value_
    usage = record.usage
    if usage is not None:
        prompt, completion, cached, reasoning = usage
        row.prompt_tokens, row.completion_tokens = prompt, completion
        row.cached_tokens, row.reasoning_tokens = cached, reasoning
        price = prices.find(record.upstream, upstream_model, record.model)
        if price is not None:
            row.cost = cost(price, prompt=prompt, completion=completion, cached=cached, reasoning=reasoning)
    row.request_bytes, row.response_bytes, row.events = record.request_bytes, record.response_bytes, record.events
    row.first_byte, row.duration, row.cancel_latency = record.first_byte, record.duration, record.cancel_latency
    if record.flags:
        row.flags = ",".join(record.flags)
    return row


def decode(line: bytes) -> Row | None:
    """The row of a journal's line; None if it is no whole one (the disk was full, the process died in it)."""
    try:
        return _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def values(row: Row) -> tuple[Any, ...]:
    """In the order of `COLUMNS`."""
    return msgspec.structs.astuple(row)
