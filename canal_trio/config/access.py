"""`[[model]]`, `[[route]]` and `[[key]]`: who may ask for what, and who serves it.

Names refer to each other (a model to upstreams, a key to models and routes); each reference is checked, and what does
not exist is told with the nearest name that does. A `*` in a name stands for any text; one is enough.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from canal_trio.config import values
from canal_trio.config.balance import own_balance
from canal_trio.config.build import read
from canal_trio.config.disconnect import on_disconnect_of
from canal_trio.config.locate import Path
from canal_trio.config.schema import (
    Complain,
    KeyTable,
    ModelTable,
    RouteTable,
    Table,
    TargetTable,
    decode,
)
from canal_trio.config.values import nearest, shown
from canal_trio.policy.names import Names
from canal_trio.settings import Balance, Key, Model, Route, Target

__all__ = ["Known", "keys_of", "models_of", "routes_of"]

K = TypeVar("K", bound=Table)
T = TypeVar("T")

_PATH = re.compile(r"/[A-Za-z0-9\-._~!$&'()+,=:@/]*\*?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Known:
    """The names that may be referred to; `remark` says why there are no other upstreams."""

    upstreams: frozenset[str]
    remark: str = ""


def models_of(tables: list[dict[str, Any]], known: Known, general: Balance, complain: Complain) -> tuple[Model, ...]:
    """Every `[[model]]`. `general` is what `[balance]` says for all."""

    def one(table: ModelTable, path: Path) -> Model:
        name = read(table.name, values.pattern, (*path, "name"), complain, "?")
        targets = _targets(table.upstreams, path, known, complain, wild="*" in name)
        leaving = on_disconnect_of(table.on_disconnect, path, complain)
        return Model(name, targets, own_balance(table, general, path, complain), leaving)

    return _each("model", ModelTable, tables, complain, one)


def routes_of(tables: list[dict[str, Any]], known: Known, general: Balance, complain: Complain) -> tuple[Route, ...]:
    """Every `[[route]]`. `general` is what `[balance]` says for all."""

    def one(table: RouteTable, path: Path) -> Route:
        name = read(table.name, values.name, (*path, "name"), complain, "?")
        read(table.path, _route_path, (*path, "path"), complain, None)
        targets = _targets(table.upstreams, path, known, complain, wild=None)
        leaving = on_disconnect_of(table.on_disconnect, path, complain)
        return Route(name, table.path, targets, own_balance(table, general, path, complain), leaving)

    return _each("route", RouteTable, tables, complain, one)


def keys_of(
    tables: list[dict[str, Any]], models: Iterable[str], routes: Iterable[str], complain: Complain
) -> tuple[Key, ...]:
    """Every `[[key]]`. `models` and `routes` are the names there are."""
    served, paths = frozenset(models), frozenset(routes)
    named = Names((name, True) for name in served)  # a model's `*` may be what the key names

    def one(table: KeyTable, path: Path) -> Key:
        name = read(table.name, values.name, (*path, "name"), complain, "?")
        digest = read(table.sha256, values.sha256, (*path, "sha256"), complain, "0" * 64)
        chosen = ("*",) if table.models is None else tuple(table.models)
        may = None if table.routes is None else tuple(table.routes)
        _opens("model", chosen, served or None, named, path, complain)
        _opens("route", may or (), paths, paths, path, complain)
        principal = table.principal
        if principal is not None:
            principal = read(principal, values.name, (*path, "principal"), complain, None)
        expires = None
        if table.expires is not None:
            expires = read(table.expires, _moment, (*path, "expires"), complain, None)
        leaving = on_disconnect_of(table.on_disconnect, path, complain)
        return Key(name, digest, chosen, may, principal, expires, table.revoked, leaving)

    return _each("key", KeyTable, tables, complain, one)


def _each(
    kind: str, table: type[K], tables: list[dict[str, Any]], complain: Complain, one: Callable[[K, Path], T]
) -> tuple[T, ...]:
    found: list[T] = []
    for number, raw in enumerate(tables):
        path: Path = (kind, number)
        decoded = decode(table, raw, path, complain)
        if decoded is not None:
            found.append(one(decoded, path))
    return tuple(found)


def _targets(
    raw: list[str | dict[str, Any]], path: Path, known: Known, complain: Complain, *, wild: bool | None
) -> tuple[Target, ...]:
    """Who serves it. `wild`: the model's name has a `*`; None: there is no model."""
    if not raw:
        complain((*path, "upstreams"), f"expected the name of at least one upstream{nearest('', known.upstreams)}")
    targets: list[Target] = []
    for number, member in enumerate(raw):
        where = (*path, "upstreams", number)
        table = TargetTable(name=member) if isinstance(member, str) else decode(TargetTable, member, where, complain)
        if table is None:
            continue
        place = where if isinstance(member, str) else (*where, "name")
        if table.name not in known.upstreams:
            text = f"there is no upstream named {shown(table.name)}"
            complain(place, f"{text}{known.remark or nearest(table.name, known.upstreams)}")
        elif any(table.name == other.name and table.model == other.model for other in targets):
            complain(place, f"{shown(table.name)} is listed twice")
        if table.model is not None:
            read(table.model, values.pattern, (*where, "model"), complain, "?")
            _fits(table.model, wild, (*where, "model"), complain)
        share, order = table.weight, table.tier
        if share is not None:
            share = read(share, values.weight, (*where, "weight"), complain, None)
        if order is not None:
            order = read(order, values.tier, (*where, "tier"), complain, None)
        targets.append(Target(table.name, table.model, share, order))
    return tuple(targets)


def _fits(model: str, wild: bool | None, path: Path, complain: Complain) -> None:
    if wild is None:
        complain(path, "a route looks at no model: expected none here; a [[model]] has one")
    elif "*" in model and not wild:
        complain(path, f"expected a name, got {shown(model)}: its '*' has none in the model's name to stand for")


def _opens(
    kind: str,
    names: tuple[str, ...],
    known: frozenset[str] | None,
    there: frozenset[str] | Names[bool],
    path: Path,
    complain: Complain,
) -> None:
    """Is there what the key opens? `known`: as it is written; None: anything may be. `there`: also by a `*` in it."""
    for number, name in enumerate(names):
        if known is not None and name in known:
            continue
        where = (*path, f"{kind}s", number)
        read(name, values.pattern, where, complain, None)
        if known is not None and "*" not in name and name not in there:
            complain(where, f"there is no {kind} named {shown(name)}{nearest(name, known)}")


def _route_path(text: str) -> str:
    if not _PATH.fullmatch(text) or "//" in text or re.search(r"/\.{1,2}(/|$)", text):
        raise ValueError(f"expected a path such as /v1/files or /v1/files*, got {shown(text)}")
    return text


def _moment(raw: object) -> float:
    """Unix time of a date (its beginning) or of a date and time; without an offset it is UTC."""
    if isinstance(raw, datetime.datetime):
        moment = raw
    elif isinstance(raw, datetime.date):
        moment = datetime.datetime(raw.year, raw.month, raw.day)
    else:
        expected = "expected a date such as 2030-01-31 or 2030-01-31T12:00:00Z, without quotes"
        raise ValueError(f"{expected}; got {shown(raw)}")
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
