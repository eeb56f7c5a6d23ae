"""What is fuzzed, and how it is judged. Pure: bytes in, an AssertionError where an oracle objects.

Each target takes one input, what a stranger sends; where it comes in pieces the first byte says how it is cut. Oracles:
where reads end changes nothing; h11 for heads and chunks (we may refuse more than it does, never accept what it refuses
or read it differently); the standard library's JSON; parsers written anew here for event streams, forms and HTTP/2
frames; the strict parser of the gateway's tests for what would go on to an upstream; and for configurations, that
nothing but settings or complaints with a place come out.
"""

from __future__ import annotations

import os
import re
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fuzz_bodies import forms, json_requests, usages
from fuzz_http import chunks, request_heads, responses, same_at_every_cut

from canal_trio.config.load import Flags, load
from canal_trio.config.locate import locate
from canal_trio.errors import ConfigError
from canal_trio.upstream.frames import FrameFault, FrameFilter
from canal_trio.upstream.tunnel import parse_proxy
from canal_trio.wire.sse import Event, EventParser, EventScanner
from canal_trio.wire.targets import BaseUrl, parse_base_url

__all__ = ["TARGETS", "Target"]

Target = Callable[[bytes], None]

# -- event streams -----------------------------------------------------------------------------------------------------


def plain_events(raw: bytes) -> tuple[list[Event], list[bytes]]:
    """Events and whole lines, read as the WHATWG text says, and nothing clever."""
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    lines = re.split(rb"\r\n|\n|\r", raw)[:-1]
    events: list[Event] = []
    data, name, last_id, retry = [], "", "", None
    for line in lines:
        if not line:
            if data:
                events.append(Event(name or "message", "\n".join(data), last_id, retry))
            data, name = [], ""
            continue
        key, _, rest = line.partition(b":")
        value = rest.removeprefix(b" ").decode("utf-8", "replace")
        if key == b"data":
            data.append(value)
        elif key == b"event":
            name = value
        elif key == b"id" and "\0" not in value:
            last_id = value
        elif key == b"retry" and re.fullmatch(r"[0-9]{1,15}", value):
            retry = int(value)
    return events, lines


def event_streams(data: bytes) -> None:
    """An event stream, parsed and scanned."""

    def read(reads: list[bytes]) -> Any:
        parser, scanner = EventParser(), EventScanner()
        events = []
        for read in reads:
            events += parser.feed(read)
            scanner.feed(read)
        return events, scanner.events, scanner.at_boundary, scanner.terminal, scanner.error

    raw, (events, count, boundary, terminal, _) = same_at_every_cut(data, read)
    right, lines = plain_events(raw)
    assert events == right, raw
    assert count == len(right), raw
    if boundary:  # what the gateway adds there is an event of its own
        parser = EventParser()
        *before, added = parser.feed(raw + b"data: added\n\n")
        assert (before, added.event, added.data) == (right, "message", "added"), raw
    said = [line.partition(b":") for line in lines if len(line) <= 96]  # what is longer is not looked into
    values = [(name, value.removeprefix(b" ")) for name, _, value in said]
    last = {b"response.completed", b"response.failed", b"response.incomplete"}
    done = any(name == b"data" and value.rstrip(b" \t") == b"[DONE]" for name, value in values)
    plainly = done or any(name == b"event" and value in last for name, value in values)
    assert terminal >= plainly, raw
    assert plainly or not terminal or any(b'"%b"' % name in raw for name in last), raw  # the `type` in an event's data


# -- frames of HTTP/2 --------------------------------------------------------------------------------------------------


def frames(data: bytes) -> None:
    """What an HTTP/2 upstream sends, while streams 1 to 9 are ours."""

    def read(reads: list[bytes]) -> Any:
        passing, passed = FrameFilter(), b""
        passing.stream_id = 5
        try:
            for read in reads:
                passed += passing.feed(read)
        except FrameFault:
            return None
        return passed, passing.going_away

    raw, seen = same_at_every_cut(data, read)
    kept, gone, at = b"", False, 0
    while len(raw) - at >= 9:
        size = int.from_bytes(raw[at : at + 3], "big")
        if size > 16_384:
            assert seen is None
            return
        frame = raw[at : at + 9 + size]
        at += 9 + size
        is_goaway = frame[3] == 7
        if is_goaway and at > len(raw):
            at -= 9 + size  # held until it is whole
            break
        payload = frame[9:]
        if is_goaway and size >= 8 and payload[4:8] == bytes(4) and int.from_bytes(payload[:4], "big") % 2**31 >= 5:
            gone = True
        else:
            kept += frame
    assert seen == (kept, gone), raw


# -- configurations ----------------------------------------------------------------------------------------------------

SECRET = "sk-never-shown"
ENVIRONMENT = {"KEY": SECRET, "PROXY": f"http://user:{SECRET}@proxy.test:3128", "EMPTY": ""}
_folder = tempfile.TemporaryDirectory(prefix="canal-fuzz-", ignore_cleanup_errors=True)
_file = os.path.join(_folder.name, "canal.toml")
_NAMES_A_FILE = re.compile(rb"file|certificate|key\s*=|\\u", re.IGNORECASE)


def configurations(data: bytes) -> None:
    """A configuration file. (One that might name a device of this machine is left alone.)"""
    if (b"/dev" in data or b"/proc" in data or b"\\" in data) and _NAMES_A_FILE.search(data):
        return
    Path(_file).write_bytes(data)
    lines = data.count(b"\n") + 1
    settings, complaint = None, ""
    try:
        settings = load(Flags(config=_file), ENVIRONMENT)
    except ConfigError as exc:
        complaint = str(exc)
    if settings is None:
        assert SECRET not in complaint
        for line in complaint.split("\n"):
            place = re.match(re.escape(_file) + r":([0-9]+)?:? ", line)
            assert place or re.fullmatch("… and [0-9]+ more", line), line
            assert not place or not place[1] or 1 <= int(place[1]) <= lines, (line, lines)
            assert line.isprintable(), line
    else:
        assert settings == load(Flags(config=_file), ENVIRONMENT)
        for upstream in settings.upstreams:
            assert isinstance(parse_base_url(upstream.base_url), BaseUrl)
            assert upstream.proxy is None or parse_proxy(upstream.proxy)
        assert settings.upstreams
        assert SECRET not in repr(settings)
    try:
        text = data.decode().removeprefix("\ufeff").replace("\r\n", "\n")
        document = tomllib.loads(text)
    except (ValueError, RecursionError):
        return
    found = locate(text)
    for path in paths_of(document):
        assert 1 <= found[path] <= lines, path


def paths_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every path in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        yield (*path, key)
        yield from paths_of(below, (*path, key))


TARGETS: dict[str, Target] = {
    "request_heads": request_heads,
    "responses": responses,
    "chunks": chunks,
    "event_streams": event_streams,
    "json_requests": json_requests,
    "forms": forms,
    "usages": usages,
    "frames": frames,
    "configurations": configurations,
}
