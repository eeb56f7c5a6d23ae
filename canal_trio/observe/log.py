"""The program's own messages: the `canal_trio` logger, as text for people or JSON for machines, through a `LineWriter`.

One message is one line. An exception is described in that line (type, text, where); the traceback is shown only when
`CANAL_TRACEBACK` is set, because no traceback reaches a user who did not ask for one.
"""

from __future__ import annotations

import functools
import logging
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import msgspec

from canal_trio.observe.lines import WHY_DROPPED, LineWriter

__all__ = ["TRACEBACK_VARIABLE", "describe", "leaves", "logging_to", "printable", "restyle", "timestamp"]

TRACEBACK_VARIABLE = "CANAL_TRACEBACK"
LOGGER = "canal_trio"


def timestamp(unix_time: float) -> str:
    """`unix_time` as RFC 3339 in UTC, with milliseconds."""
    whole, milliseconds = divmod(int(unix_time * 1000), 1000)
    return f"{_second(whole)}.{milliseconds:03d}Z"


@functools.lru_cache(maxsize=8)  # lines come many a second
def _second(whole: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))


def printable(text: str, limit: int = 256) -> str:
    """`text` from a stranger, fit for one line of a terminal: controls and line ends escaped, cut at `limit`."""
    if len(text) > limit:
        text = f"{text[: limit - 1]}…"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def describe(exc: BaseException) -> str:
    """`exc` in one line: type, text and the place it was raised. A group is described by its first leaf."""
    found = list(leaves(exc))
    first = found[0]
    place = ""
    if frames := traceback.extract_tb(first.__traceback__):
        name = "/".join(frames[-1].filename.split("/")[-2:])
        place = f" ({name}:{frames[-1].lineno} in {frames[-1].name})"
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return printable(f"{type(first).__name__}: {first}{place}{more}", 1000)


def leaves(exc: BaseException) -> Iterator[BaseException]:
    """The exceptions in a group, however deep; an exception that is no group is its own leaf."""
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from leaves(inner)
    else:
        yield exc


@final
class _Handler(logging.Handler):
    """Renders a record into one line (or more, when tracebacks were asked for) and queues it."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer
        self._json = False
        self._tracebacks = bool(os.environ.get(TRACEBACK_VARIABLE))

    def restyle(self, style: str) -> None:
        """From now on it is `text` or `json`, what the writer says of lines that it lost included."""
        self._json = style == "json"
        self._writer.note = self._lost

    def _lost(self, count: int) -> bytes:
        text = f"{count} log lines were dropped: {WHY_DROPPED}"
        return _line(self._json, time.time(), "warning", LOGGER, text)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue `record`. Never blocks."""
        message = record.getMessage()
        trace = ""
        if record.exc_info and record.exc_info[1] is not None:
            message = f"{message}: {describe(record.exc_info[1])}"
            if self._tracebacks:
                trace = "".join(traceback.format_exception(record.exc_info[1]))
        level = record.levelname.lower()
        self._writer.write(_line(self._json, record.created, level, record.name, message, trace))


def _line(as_json: bool, unix_time: float, level: str, logger: str, message: str, trace: str = "") -> bytes:
    when = timestamp(unix_time)
    if not as_json:
        return f"{when} {level}: {message}\n{trace}".encode(errors="backslashreplace")
    fields = {"time": when, "kind": "log", "level": level, "logger": logger, "message": message}
    if trace:
        fields["traceback"] = trace
    text = {key: value.encode(errors="backslashreplace").decode() for key, value in fields.items()}
    return msgspec.json.encode(text) + b"\n"


@contextmanager
def logging_to(writer: LineWriter, style: str) -> Iterator[logging.Logger]:
    """Send the `canal_trio` logger to `writer` while the block runs; `style` is `text` or `json`."""
    logger = logging.getLogger(LOGGER)
    handler = _Handler(writer)
    handler.restyle(style)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield logger
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def restyle(style: str) -> None:
    """From now on what `logging_to` sends in this process is `text` or `json`. Not a checkpoint."""
    for handler in logging.getLogger(LOGGER).handlers:
        if isinstance(handler, _Handler):
            handler.restyle(style)
