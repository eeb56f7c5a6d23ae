"""From decoded tables to `settings`: what the values mean, and whether they fit together.

Every function complains about all that it finds and goes on with a stand-in, so that one run shows every mistake; the
result counts only if nobody complained.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from canal_trio.config import values
from canal_trio.config.locate import Path
from canal_trio.config.schema import Complain, Secret, Table, UpstreamTable
from canal_trio.config.values import nearest, shown
from canal_trio.settings import Bounds, Deadlines, Upstream
from canal_trio.wire.targets import BaseUrl, parse_base_url

__all__ = [
    "Surroundings",
    "base_url_of",
    "bounds_of",
    "deadlines_of",
    "place_of",
    "read",
    "secret_of",
    "upstream_of",
    "within",
]

T = TypeVar("T")
S = TypeVar("S")

KEY_HEADERS = ("authorization", "api-key", "x-api-key")
KEY_HEADERS_TEXT = "'authorization', 'api-key' or 'x-api-key'"
SECRET_BYTES = 64 * 1024
YEAR = 366 * 86400.0
SOCKET_BYTES = (1024, 2**30)  # what a socket option can say
# Least and most of what is not simply "at least one".
_RANGES: dict[str, tuple[float, float]] = {
    "piece_bytes": (512, 2**24),
    "capacity": (1, 4096),
    "handover_bytes": (512, 2**24),
    "client_unsent_bytes": SOCKET_BYTES,
    "upstream_receive_bytes": SOCKET_BYTES,
    "head_bytes": (1024, 2**24),
    "target_bytes": (64, 2**20),
    "held_body_bytes": (0, 2**40),
    "held_total_bytes": (0, 2**40),
    "waiters": (0, 10**7),
    "memory_bytes": (2**20, 2**50),
    "log_lines": (16, 10**7),
    "usage_event_bytes": (256, 2**20),
}


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a file refers to: the environment, and the folder that relative paths start from."""

    environ: Mapping[str, str]
    folder: str


def read(raw: S, reader: Callable[[S], T], path: Path, complain: Complain, instead: T) -> T:
    """`reader(raw)`; what it complains about is passed on, and `instead` stands in."""
    try:
        return reader(raw)
    except ValueError as exc:
        complain(path, str(exc))
        return instead


def within(number: float, least: float, most: float, unit: str) -> float:
    """`number`, if it is in these limits; ValueError with `unit` in its text if not."""
    if math.isinf(number) and not math.isinf(most):
        raise ValueError("expected a finite number, got inf")
    if not least <= number <= most:
        upper = "" if math.isinf(most) else f" and at most {most:.16g}"
        raise ValueError(f"expected at least {least:.15g}{upper}{unit}, got {number:.15g}")
    return number


def _numbers(table: Table, record: type[T], path: Path, complain: Complain, reader: Callable[..., Any]) -> T:
    """A record of numbers, each read by `reader(raw, name, default)`."""
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(record):  # type: ignore[arg-type]  # mypy cannot bind T to dataclasses
        raw = getattr(table, field.name)
        if raw is not None:
            one = partial(reader, name=field.name, default=field.default)
            chosen[field.name] = read(raw, one, (*path, field.name), complain, field.default)
    return record(**chosen)


def _bound(raw: Any, name: str, default: Any) -> Any:
    number = values.size(raw) if name.endswith("_bytes") else values.count(raw)
    most = math.inf if default == math.inf else 2**40
    least, most = _RANGES.get(name, (1, most))
    return within(number, least, most, " bytes" if name.endswith("_bytes") else "")


def _deadline(raw: Any, name: str, default: Any) -> Any:
    if name == "body_rate":
        return within(values.size(raw), 0, 2**40, " bytes per second")
    number = values.duration(raw)
    if number <= 0:
        raise ValueError(f"expected more than 0 seconds, got {number:g}")
    return within(number, 0, math.inf if default == math.inf else YEAR, " seconds")


def _interval(raw: Any) -> float | None:
    return None if raw is None else float(_deadline(raw, "", 0))


def bounds_of(table: Table, path: Path, complain: Complain) -> Bounds:
    """`[bounds]`."""
    bounds = _numbers(table, Bounds, path, complain, _bound)
    if bounds.held_body_bytes > bounds.held_total_bytes:
        text = f"expected at most held_total_bytes, {bounds.held_total_bytes}; got {bounds.held_body_bytes}"
        complain((*path, "held_body_bytes"), text)
    return bounds


def deadlines_of(table: Table, path: Path, complain: Complain) -> Deadlines:
    """`[deadlines]`."""
    return _numbers(table, Deadlines, path, complain, _deadline)


def base_url_of(text: str) -> BaseUrl:
    """A base URL; the text is not repeated if it may hold a password."""
    expected = "expected a base URL as an OpenAI SDK takes it, such as http://127.0.0.1:8000/v1"
    if "@" in text.partition("?")[0]:
        raise ValueError(f"{expected}, without user and password; the key belongs into api_key")
    parsed = parse_base_url(text)
    if isinstance(parsed, str):
        raise ValueError(f"{expected}: {shown(parsed)[1:-1].rstrip('.')}")
    return parsed


def upstream_of(table: UpstreamTable, path: Path, around: Surroundings, complain: Complain) -> Upstream:
    """One `[[upstream]]`."""

    def at(key: str) -> Path:
        return (*path, key)

    name = read(table.name, values.name, at("name"), complain, "?")
    read(table.base_url, base_url_of, at("base_url"), complain, None)
    if table.on_client_eof not in ("abort", "finish"):
        complain(at("on_client_eof"), f"expected 'abort' or 'finish', got {shown(table.on_client_eof)}")
    if table.key_header not in KEY_HEADERS:
        complain(at("key_header"), f"expected {KEY_HEADERS_TEXT}, got {shown(table.key_header)}")
    api_key = None if table.api_key is None else secret_of(table.api_key, at("api_key"), around, complain)
    proxy = None if table.proxy is None else secret_of(table.proxy, at("proxy"), around, complain)
    if proxy is not None:
        proxy = read(proxy, values.proxy_url, at("proxy"), complain, None)
    ca_file = None if table.ca_file is None else os.path.join(around.folder, table.ca_file)
    if ca_file is not None:
        read(ca_file, _check_certificates, at("ca_file"), complain, None)
    connections = table.connections
    if connections is not None:
        connections = read(connections, _connections, at("connections"), complain, None)
    early = read(table.early_head_after, _interval, at("early_head_after"), complain, None)
    heartbeat = read(table.heartbeat, _interval, at("heartbeat"), complain, None)
    return Upstream(
        name,
        table.base_url,
        api_key=api_key,
        key_header=table.key_header,
        list_models=table.list_models,
        http2=table.http2,
        proxy=proxy,
        ca_file=ca_file,
        retry_sent=table.retry_sent,
        on_client_eof=table.on_client_eof,
        connections=connections,
        early_head_after=early,
        heartbeat=heartbeat,
        weight=1.0 if table.weight is None else read(table.weight, values.weight, at("weight"), complain, 1.0),
        tier=0 if table.tier is None else read(table.tier, values.tier, at("tier"), complain, 0),
        check=None if table.check is None else read(table.check, values.check_path, at("check"), complain, None),
    )


def _connections(raw: float) -> float:
    return within(values.count(raw), 1, math.inf, "")


def _check_certificates(path: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        raise ValueError(f"expected a file with PEM certificates; {shown(path)} has none") from None
    except OSError as exc:
        raise ValueError(f"cannot read {shown(path)}: {exc.strerror or exc}") from None


def place_of(name: str, path: Path, around: Surroundings, complain: Complain, *, folder: bool = False) -> str:
    """The whole name of a file (or `folder`) that we write to; what it is to be made in has to be there."""
    whole = os.path.abspath(os.path.join(around.folder, name))
    parent = os.path.dirname(whole)
    if not os.path.isdir(parent):
        complain(path, f"there is no folder '{parent}'")
    elif not os.access(parent, os.W_OK):
        complain(path, f"the folder '{parent}' cannot be written to")
    elif os.path.exists(whole) and os.path.isdir(whole) is not folder:
        complain(path, f"expected a {'folder' if folder else 'file'}, and '{whole}' is none")
    elif not os.access(whole, os.W_OK) and os.path.exists(whole):
        complain(path, f"'{whole}' cannot be written to")
    return whole


def secret_of(raw: Secret, path: Path, around: Surroundings, complain: Complain) -> str | None:
    """The secret that `raw` is or points at; None after a complaint, which never repeats it."""
    if isinstance(raw, str):
        if borrowed := re.fullmatch(r"\$\{?(\w+)\}?|os\.environ/(\w+)|env:(\w+)", raw, re.ASCII):
            variable = next(filter(None, borrowed.groups()))
            complain(path, f'to take it from the environment, write {{ env = "{variable}" }}')
            return None
        return _checked_secret(raw, "the value", path, complain)
    kinds = {"env": _from_environment, "file": _from_file}
    unknown = [key for key in raw if key not in kinds]
    for key in unknown:
        complain((*path, key), f"unknown key{nearest(key, kinds)}")
    if unknown or len(raw) != 1:
        if not unknown:
            complain(path, 'expected { env = "NAME" }, { file = "PATH" } or the value itself')
        return None
    ((kind, where),) = raw.items()
    if not isinstance(where, str) or not where:
        complain((*path, kind), f"expected a string, got {shown(where)}")
        return None
    try:
        found, source = kinds[kind](where, around)
    except ValueError as exc:
        complain((*path, kind), str(exc))
        return None
    return _checked_secret(found, source, (*path, kind), complain)


def _from_environment(variable: str, around: Surroundings) -> tuple[str, str]:
    found = around.environ.get(variable)
    if found is None:
        raise ValueError(f"the environment variable {shown(variable)} is not set")
    return found, f"the environment variable {shown(variable)}"


def _from_file(name: str, around: Surroundings) -> tuple[str, str]:
    path = os.path.join(around.folder, name)
    try:
        with open(path, "rb") as file:
            data = file.read(SECRET_BYTES + 1)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        raise ValueError(f"cannot read the file {shown(path)}: {getattr(exc, 'strerror', None) or exc}") from None
    if len(data) > SECRET_BYTES:
        raise ValueError(f"the file {shown(path)} is larger than {SECRET_BYTES} bytes: no secret is")
    return data.decode("latin-1").strip(), f"the file {shown(path)}"


def _checked_secret(secret: str, source: str, path: Path, complain: Complain) -> str | None:
    if not secret:
        complain(path, f"{source} is empty")
        return None
    if not all("!" <= char <= "~" for char in secret):
        complain(path, f"{source} holds blanks or characters that no header can carry (it is not shown here)")
        return None
    return secret
