"""The tables of the configuration file, as msgspec structs. Their field names are the keys; unknown keys are errors.

A struct says of which kind each value is (a string, a list of strings, …); what the value means is read in `build`.
`decode` reports everything that is wrong with a table, each with its place, where msgspec alone would stop at the first
and tell no line. `[bounds]` and `[deadlines]` take their keys from `settings`: a new bound is a new key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from typing import Any, Protocol, TypeVar, cast

import msgspec

from canal_trio import settings
from canal_trio.config.locate import Path, path_text
from canal_trio.config.values import nearest

__all__ = [
    "BalanceTable",
    "BoundsTable",
    "Complain",
    "DeadlinesTable",
    "DrainTable",
    "FileTables",
    "HealthTable",
    "KeyTable",
    "LedgerTable",
    "LimitStoreTable",
    "LimitTable",
    "ModelTable",
    "NamedCertificateTable",
    "Number",
    "PriceTable",
    "RetriesTable",
    "RouteTable",
    "Secret",
    "ServerTable",
    "TLSTable",
    "Table",
    "TargetTable",
    "UpstreamTable",
    "decode",
]

Number = int | float | str
"""A duration or a size: a number, or a number with a unit."""
Secret = str | dict[str, Any]
"""The secret itself, `{ env = "NAME" }` or `{ file = "PATH" }`."""


class Complain(Protocol):
    """Takes complaints."""

    def __call__(self, path: Path, text: str, /) -> None:
        """The value at `path` is wrong in the way that `text` says."""


class Table(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What all tables have in common; msgspec hands such options down by inheritance."""


class FileTables(Table):
    """The whole file, its tables not looked into yet."""

    server: dict[str, Any] = {}
    bounds: dict[str, Any] = {}
    deadlines: dict[str, Any] = {}
    balance: dict[str, Any] = {}
    health: dict[str, Any] = {}
    retries: dict[str, Any] = {}
    ledger: dict[str, Any] | None = None
    upstream: list[dict[str, Any]] = []
    model: list[dict[str, Any]] = []
    route: list[dict[str, Any]] = []
    key: list[dict[str, Any]] = []
    price: list[dict[str, Any]] = []
    limit: list[dict[str, Any]] = []
    limits: dict[str, Any] = {}


class ServerTable(Table):
    """`[server]`."""

    listen: str | list[str] | None = None
    admin: str | None = None
    workers: int | str | None = None
    log: str | None = None
    trusted_proxies: list[str] = []
    pseudonym: str | None = None
    allow_anonymous: bool = False
    count_tokens: bool = False
    tls: dict[str, Any] | None = None


class TLSTable(Table):
    """`[server.tls]`."""

    certificate: str
    key: str
    client_ca: str | None = None
    client_auth: str | None = None
    sni: list[dict[str, Any]] = []


class NamedCertificateTable(Table):
    """`[[server.tls.sni]]`."""

    names: list[str]
    certificate: str
    key: str


class LedgerTable(Table):
    """`[ledger]`."""

    file: str | None = None
    postgres: Secret | None = None
    journal: str | None = None
    journal_bytes: Number | None = None
    instance: str | None = None


class UpstreamTable(Table):
    """`[[upstream]]`."""

    name: str
    base_url: str
    api_key: Secret | None = None
    key_header: str = "authorization"
    list_models: bool = False
    http2: bool = False
    proxy: Secret | None = None
    ca_file: str | None = None
    retry_sent: bool = False
    on_client_eof: str = "abort"
    connections: int | float | None = None
    early_head_after: Number | None = None
    heartbeat: Number | None = None
    weight: int | float | None = None
    tier: int | None = None
    check: str | None = None


class TargetTable(Table):
    """A member of `upstreams` that is more than a name."""

    name: str
    model: str | None = None
    weight: int | float | None = None
    tier: int | None = None


class BalanceTable(Table):
    """`[balance]`."""

    strategy: str | None = None
    hash_by: str | None = None
    hold_first_event: bool | None = None
    memory: Number | None = None


class ModelTable(Table):
    """`[[model]]`."""

    name: str
    upstreams: list[str | dict[str, Any]]
    strategy: str | None = None
    hash_by: str | None = None
    hold_first_event: bool | None = None
    on_disconnect: str | dict[str, Any] | None = None


class RouteTable(Table):
    """`[[route]]`."""

    name: str
    path: str
    upstreams: list[str | dict[str, Any]]
    strategy: str | None = None
    hash_by: str | None = None
    hold_first_event: bool | None = None
    on_disconnect: str | dict[str, Any] | None = None


class KeyTable(Table):
    """`[[key]]`."""

    name: str
    sha256: str
    models: list[str] | None = None
    routes: list[str] | None = None
    principal: str | None = None
    expires: Any = None  # a date, or a date and time: TOML has four kinds of them
    revoked: bool = False
    on_disconnect: str | dict[str, Any] | None = None


class DrainTable(Table):
    """`on_disconnect = { … }`."""

    seconds: Number | None = None
    tokens: int | None = None
    at_once: int | None = None


class PriceTable(Table):
    """`[[price]]`."""

    model: str
    input: float = 0.0
    output: float = 0.0
    cached_input: float | None = None
    reasoning: float | None = None
    request: float = 0.0
    upstream: str | None = None


class LimitTable(Table):
    """`[[limit]]`."""

    principal: str | None = None
    model: str | None = None
    requests_per_minute: int | float | None = None
    tokens_per_minute: int | float | None = None
    streams: int | None = None
    spend_per_day: int | float | None = None
    spend_per_month: int | float | None = None
    burst: Number | None = None


class LimitStoreTable(Table):
    """`[limits]`."""

    state: str | None = None
    redis: Secret | None = None
    fail: str | None = None
    timeout: Number | None = None
    prefix: str | None = None
    output_tokens: int | None = None


def _numbers(name: str, record: type[Any]) -> type[Table]:
    fields = [(field.name, Number | None, None) for field in dataclasses.fields(record)]
    return cast("type[Table]", msgspec.defstruct(name, fields, bases=(Table,)))


BoundsTable = _numbers("BoundsTable", settings.Bounds)
DeadlinesTable = _numbers("DeadlinesTable", settings.Deadlines)
HealthTable = _numbers("HealthTable", settings.Health)
RetriesTable = _numbers("RetriesTable", settings.Retries)

T = TypeVar("T", bound=Table)

_AT = re.compile(r" - at `\$(.*)`$")
_STEP = re.compile(r"\[(\d+)\]")
_ONE_TABLE = "expected a list, got a table"  # single brackets where double ones belong
_KINDS = {
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
    "datetime": "a date and time",
    "date": "a date",
    "time": "a time",
}


def decode(kind: type[T], raw: dict[str, Any], path: Path, complain: Complain) -> T | None:
    """`raw` as a `kind`, after every complaint about it was made: without its faulty keys, None if it needs one."""
    with contextlib.suppress(msgspec.ValidationError):  # nearly always: nothing is wrong with it
        return msgspec.convert(raw, kind)
    fields = _fields(kind)
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in fields:
            complain((*path, key), f"unknown key{nearest(key, fields)}")
            continue
        try:
            values[key] = msgspec.convert(value, fields[key].type)
        except msgspec.ValidationError as exc:
            place, text = _located(str(exc), (*path, key))
            brackets = f": write [[{path_text(place)}]]" if text.endswith(_ONE_TABLE) else ""
            complain(place, text + brackets)
    required = [name for name, field in fields.items() if field.required]
    for name in required:
        if name not in raw:
            complain(path, f"the key '{name}' is missing")
    return kind(**values) if values.keys() >= set(required) else None


@functools.lru_cache
def _fields(kind: type[Table]) -> dict[str, msgspec.structs.FieldInfo]:
    return {field.name: field for field in msgspec.structs.fields(kind)}


def _located(text: str, path: Path) -> tuple[Path, str]:
    """msgspec's complaint in TOML's words, and the place inside the value that it is about."""
    if found := _AT.search(text):
        path = (*path, *(int(step) for step in _STEP.findall(found[1])))
        text = text[: found.start()]
    return path, re.sub(r"`([^`]*)`", lambda match: _words(match[1]), text[:1].lower() + text[1:])


def _words(kinds: str) -> str:
    names = [kind for kind in kinds.split(" | ") if kind != "null"]
    if "float" in names and "int" in names:
        names.remove("int")
    words = [_KINDS.get(name, name) for name in names]
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
