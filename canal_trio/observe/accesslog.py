"""The access log: one line per exchange, text for people, JSON for machines.

Everything in it that a stranger chose (path, model, request id, address) is escaped, so that a line is always one line.
Keys are not in the record at all, and neither is the query, which may hold some. Rendering happens in the writer's
thread.
"""

from __future__ import annotations

import re
from functools import lru_cache, partial
from typing import Any, final

import msgspec

from canal_trio.hooks import ExchangeRecord, UsageSource
from canal_trio.observe.lines import LineWriter
from canal_trio.observe.log import printable, timestamp

__all__ = ["AccessLog", "json_line", "text_line"]


_NAME = 200  # characters
_PLAIN = re.compile(r'[!#-<>-\[\]-~]{1,200}').fullmatch  # visible ASCII without quotes, `=` and backslash


def _duration(seconds: float) -> str:
    """Three digits that matter: `820us`, `35ms`, `1.2s`, `75s`."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f}us"
    if seconds < 0.01:
        return f"{seconds * 1e3:.1f}ms"
    if seconds < 1:
        return f"{seconds * 1e3:.0f}ms"
    return f"{seconds:.1f}s" if seconds < 60 else f"{seconds:.0f}s"


def _size(count: int) -> str:
    if count < 10_000:
        return f"{count}B"
    return f"{count / 1024:.0f}KiB" if count < 10 * 1024 * 1024 else f"{count / (1024 * 1024):.0f}MiB"


def _word(text: str) -> str:
    """One word of the line: a stranger's text with blanks, quotes, `=` or escapes is quoted."""
    if _PLAIN(text):
        return text
    if text and text.isprintable() and not any(char in text for char in ' "=\\'):
        return printable(text)
    return '"' + printable(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _names(
    principal: str | None, key: str | None, model: str | None, upstream: str | None, called: str | None
) -> str:
    """What of the line says who asked whom for what."""
    parts = []
    if principal is not None:
        parts.append(f"key={_word(principal)}")
        if key is not None and key != principal:
            parts.append(f"key_name={_word(key)}")
    if model is not None:
        parts.append(f"model={_word(model)}")
    if upstream is not None:
        parts.append(f"upstream={_word(upstream)}")
        if called is not None and called != model:
            parts.append(f"as={_word(called)}")
    return " ".join(parts)


_few_names = lru_cache(1024)(_names)


def text_line(record: ExchangeRecord) -> bytes:
    """The line for people: when, who, what, how it ended, then numbers, then names."""
    client, method, path = record.client or "-", record.method or "-", record.path or "-"
    id_, model = record.request_id, record.model
    # Nearly always no word needs quotes, and one look at all of them tells.
    if not _PLAIN(client + method + path + id_) or not id_:
        client, method, path, id_ = _word(client), _word(method), _word(path), _word(id_)
    # The same few names come again and again, but for a model that a stranger made up at length.
    few = _few_names if model is None or len(model) <= _NAME else _names
    names = few(record.principal, record.key, model, record.upstream, record.upstream_model)
    parts = [
        f"{timestamp(record.started_at + record.duration)} {client} {method} {path} {record.status or '-'} "
        f"{record.outcome._value_} phase={record.phase._value_} "  # .value is a Python call or two
        f"in={_size(record.request_bytes)} out={_size(record.response_bytes)}"
    ]
    if record.streamed:
        parts.append(f"events={record.events}")
    if record.first_byte is not None:
        parts.append(f"first={_duration(record.first_byte)}")
    parts.append(f"took={_duration(record.duration)}")
    if record.streamed and record.longest_gap:
        parts.append(f"gap={_duration(record.longest_gap)}")
    if record.cancel_latency is not None:
        parts.append(f"cancel={_duration(record.cancel_latency)}")
    if record.attempts > 1:
        parts.append(f"attempts={record.attempts}")
    if record.tried:
        parts.append(f"tried={_word(','.join(f'{one.upstream}:{one.result}' for one in record.tried))}")
    if record.certificate is not None:
        parts.append(f"cert={_word(record.certificate)}")
    if names:
        parts.append(names)
    if record.usage is not None:
        guess = "~" if record.usage_source is UsageSource.ESTIMATED else ""
        parts.append(f"tokens={guess}{record.usage.prompt}+{record.usage.completion}")
    parts.append(f"id={id_}")
    if record.flags:
        parts.append(f"flags={','.join(record.flags)}")
    if record.failure is not None:
        parts.append(f"failure={_word(str(record.failure))}")
    return (" ".join(parts) + "\n").encode(errors="backslashreplace")


def json_line(record: ExchangeRecord) -> bytes:
    """The line for machines: every field of the record, seconds and bytes as plain numbers."""
    failure, usage = record.failure, record.usage
    fields: dict[str, Any] = {
        "time": timestamp(record.started_at + record.duration),
        "kind": "exchange",
        "request_id": record.request_id,
        "client": record.client,
        "certificate": record.certificate,
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "outcome": record.outcome.value,
        "phase": record.phase.value,
        "principal": record.principal,
        "key": record.key,
        "model": record.model,
        "upstream": record.upstream,
        "upstream_model": record.upstream_model,
        "attempts": record.attempts,
        "tried": [{"upstream": one.upstream, "result": one.result} for one in record.tried],
        "streamed": record.streamed,
        "request_bytes": record.request_bytes,
        "response_bytes": record.response_bytes,
        "events": record.events,
        "first_byte": record.first_byte,
        "duration": record.duration,
        "longest_gap": record.longest_gap,
        "mean_gap": record.mean_gap,
        "cancel_latency": record.cancel_latency,
        "handed_over": record.handed_over,
        "queued": record.queued,
        "waits": record.waits,
        "failure": failure
        and {
            "side": failure.side.value,
            "phase": failure.phase.value,
            "kind": failure.kind.value,
            "detail": failure.detail,
            "remark": failure.remark,
        },
        "flags": record.flags,
        "usage": usage
        and {
            "prompt": usage.prompt,
            "completion": usage.completion,
            "cached": usage.cached,
            "reasoning": usage.reasoning,
        },
        "usage_source": record.usage_source.value,
        "cost": record.cost,
    }
    return msgspec.json.encode(_plain(fields)) + b"\n"


def _plain(value: Any) -> Any:
    """`value` without lone surrogates (no JSON text can hold them) and with times rounded to the microsecond."""
    if isinstance(value, str):
        return value[:1024].encode(errors="backslashreplace").decode()
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value


@final
class AccessLog:
    """A `hooks.Recorder` that writes one line per exchange. `style` is `text` or `json`."""

    def __init__(self, writer: LineWriter, style: str = "text") -> None:
        self._writer = writer
        self.restyle(style)

    def restyle(self, style: str) -> None:
        """The next lines are `text` or `json`."""
        self._render = json_line if style == "json" else text_line

    def finished(self, record: ExchangeRecord) -> None:
        """Queue the line of `record`; dropped and counted by the writer when the log is read too slowly."""
        self._writer.write(partial(self._render, record))
