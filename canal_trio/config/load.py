"""Layers: flags beat the environment beats the file beats the defaults. The result is one `Settings`.

`load` reads everything, checks everything and reports everything that is wrong at once: a `ConfigError` whose lines
each name the place (file:line, flag or variable), the key, the fault and what was expected.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, final

from canal_trio.config import values
from canal_trio.config.access import Known, keys_of, models_of, routes_of
from canal_trio.config.balance import balance_of, health_of, retries_of
from canal_trio.config.build import Surroundings, base_url_of, bounds_of, deadlines_of, read, upstream_of
from canal_trio.config.ledger import ledger_of
from canal_trio.config.locate import Path, locate, path_text
from canal_trio.config.quotas import limit_store_of, limits_of, prices_of
from canal_trio.config.schema import (
    BalanceTable,
    BoundsTable,
    DeadlinesTable,
    FileTables,
    HealthTable,
    RetriesTable,
    ServerTable,
    UpstreamTable,
    decode,
)
from canal_trio.config.tls import server_tls_of
from canal_trio.config.values import shown
from canal_trio.errors import ConfigError
from canal_trio.settings import Key, Ledger, Settings, Upstream, address_text

__all__ = ["VARIABLES", "Flags", "load", "load_keys", "load_ledger", "read_file", "strange_variables"]

FILE_BYTES = 4 * 1024 * 1024
MOST_COMPLAINTS = 20
VARIABLES = ("CANAL_CONFIG", "CANAL_LISTEN", "CANAL_UPSTREAM", "CANAL_WORKERS", "CANAL_ADMIN", "CANAL_LOG")
DEFAULTS = Settings()
TLS: Path = ("server", "tls")

T = TypeVar("T")
Address: TypeAlias = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Flags:
    """What the command line said, as texts; None or empty where it said nothing."""

    config: str | None = None
    listen: tuple[str, ...] = ()
    upstream: tuple[str, ...] = ()
    workers: str | None = None
    admin: str | None = None
    log: str | None = None


def load(flags: Flags | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings that flags, environment and file give. Reads files; raises `ConfigError`, with every fault found."""
    layers = _Layers(flags or Flags(), environ)
    settings = layers.settings()
    layers.refuse()
    return settings


def load_keys(flags: Flags, environ: Mapping[str, str] = os.environ) -> tuple[Key, ...]:
    """The clients' keys in the file, whatever else is in it. Raises `ConfigError`, with every fault in them."""
    layers = _Layers(flags, environ)
    tables = decode(FileTables, layers.raw, (), layers.complain) or FileTables()
    keys = layers.keys(tables)
    layers.refuse()
    return keys


def load_ledger(flags: Flags, environ: Mapping[str, str] = os.environ) -> Ledger | None:
    """`[ledger]`, whatever else is in the file: who reads a ledger has none of the upstreams' secrets. Raises
    `ConfigError`, with every fault in it."""
    layers = _Layers(flags, environ)
    tables = decode(FileTables, layers.raw, (), layers.complain) or FileTables()
    ledger = ledger_of(tables.ledger, layers.around, layers.complain)
    layers.refuse()
    return ledger


def strange_variables(environ: Mapping[str, str]) -> list[str]:
    """A remark on each variable that looks like a misspelt one of ours. Remarks only: the name may belong to others."""
    remarks = []
    for variable in sorted(environ):
        if variable.startswith("CANAL_") and variable not in VARIABLES:
            close = difflib.get_close_matches(variable, VARIABLES, 1, 0.88)
            if close:
                remarks.append(f"the environment variable {shown(variable)} is not read; did you mean '{close[0]}'?")
    return remarks


def read_file(name: str) -> tuple[dict[str, Any], str]:
    """The document in the file `name`, and its text."""
    try:
        with open(name, "rb") as file:
            data = file.read(FILE_BYTES + 1)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        reason = getattr(exc, "strerror", None) or str(exc)
        raise ConfigError(f"{name}: cannot read the configuration: {reason}") from None
    if len(data) > FILE_BYTES:
        raise ConfigError(f"{name}: larger than {FILE_BYTES} bytes: expected a configuration in TOML")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")  # some editors begin with a BOM
    except UnicodeDecodeError as exc:
        line = data[: exc.start].count(b"\n") + 1
        raise ConfigError(f"{name}:{line}: not UTF-8: expected a configuration in TOML") from None
    try:
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as exc:
        message = str(exc)
        found = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
        line = int(found[1]) if found and found[1] else text.rstrip().count("\n") + 1
        column = f" (column {found[2]})" if found and found[2] else ""
        message = message[: found.start()] if found else message
        raise ConfigError(f"{name}:{line}: not valid TOML: {message}{column}") from None
    except RecursionError:
        raise ConfigError(f"{name}:1: nested too deeply: expected a configuration in TOML") from None


@final
class _Layers:
    """The layers of one `load`, and the complaints about them as (line, text); line 0 is not the file."""

    def __init__(self, flags: Flags, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.complaints: list[tuple[int, str]] = []
        # name -> where it was said, and what; an empty variable counts as unset
        self.said: dict[str, tuple[str, str]] = {}
        for name in ("config", "listen", "upstream", "workers", "admin", "log"):
            flag: str | tuple[str, ...] | None = getattr(flags, name)
            variable = environ.get(f"CANAL_{name.upper()}", "").strip()
            if flag is not None and flag != ():
                self.said[name] = (f"--{name}", flag if isinstance(flag, str) else " ".join(flag))
                if not self.said[name][1].strip():
                    self.complain_said(name, "expected a value, got nothing")
                    del self.said[name]
            elif variable:
                self.said[name] = (f"CANAL_{name.upper()}", variable)
        self.file = self.said.get("config", ("", ""))[1]
        self.raw, self._text = read_file(self.file) if self.file else ({}, "")
        self._lines: dict[Path, int] | None = None
        self.around = Surroundings(environ, os.path.dirname(self.file))

    @property
    def lines(self) -> dict[Path, int]:
        """The line of each path in the file. Found when the first complaint is made: most files give no cause."""
        if self._lines is None:
            self._lines = locate(self._text)
        return self._lines

    def complain(self, path: Path, text: str) -> None:
        """About the file."""
        line, known = 1, path
        while known:
            if known in self.lines:
                line = self.lines[known]
                break
            known = known[:-1]
        self.complaints.append((line, f"{self.file}:{line}: {path_text(path)}: {text}"))

    def complain_said(self, name: str, text: str) -> None:
        """About a flag or a variable."""
        self.complaints.append((0, f"{self.said[name][0]}: {text}"))

    def settings(self) -> Settings:
        """Everything put together, with stand-ins for what was complained about."""
        tables = decode(FileTables, self.raw, (), self.complain) or FileTables()
        server = decode(ServerTable, tables.server, ("server",), self.complain) or ServerTable()
        bounds = decode(BoundsTable, tables.bounds, ("bounds",), self.complain) or BoundsTable()
        deadlines = decode(DeadlinesTable, tables.deadlines, ("deadlines",), self.complain) or DeadlinesTable()
        upstreams = self._upstreams(tables.upstream)
        known = self._known(tables.upstream, upstreams)
        general = decode(BalanceTable, tables.balance, ("balance",), self.complain) or BalanceTable()
        health = decode(HealthTable, tables.health, ("health",), self.complain) or HealthTable()
        retries = decode(RetriesTable, tables.retries, ("retries",), self.complain) or RetriesTable()
        balance = balance_of(general, ("balance",), self.complain)
        models = models_of(tables.model, known, balance, self.complain)
        routes = routes_of(tables.route, known, balance, self.complain)
        keys = self.keys(tables)
        for kind, key in (("model", "name"), ("route", "name"), ("route", "path")):
            self._no_twins(kind, key, getattr(tables, kind))
        prices = prices_of(tables.price, known.upstreams | frozenset(_names(tables.upstream)), self.complain)
        store = limit_store_of(tables.limits, self.around, self.complain)
        kept = (store.state or tables.limits.get("redis")) is not None
        limits = limits_of(tables.limit, keys, models, self.complain, priced=bool(tables.price), kept=kept)
        if not keys and "key" not in self.raw and not server.allow_anonymous:
            self._refuse_open_relay(upstreams)
        listen = self._listen(server)
        return Settings(
            listen=listen,
            admin=self._admin(server, listen),
            workers=self._workers(server),
            log=self._log(server),
            tls=None if server.tls is None else server_tls_of(server.tls, TLS, self.around, self.complain),
            count_tokens=server.count_tokens,
            ledger=ledger_of(tables.ledger, self.around, self.complain),
            trusted_proxies=tuple(
                read(text, values.network, ("server", "trusted_proxies", number), self.complain, "")
                for number, text in enumerate(server.trusted_proxies)
            ),
            pseudonym=self._read_server(server.pseudonym, "pseudonym", values.token, DEFAULTS.pseudonym),
            allow_anonymous=server.allow_anonymous,
            upstreams=upstreams,
            models=models,
            routes=routes,
            keys=keys,
            prices=prices,
            limits=limits,
            limit_store=store,
            bounds=bounds_of(bounds, ("bounds",), self.complain),
            deadlines=deadlines_of(deadlines, ("deadlines",), self.complain),
            balance=balance,
            health=health_of(health, ("health",), self.complain),
            retries=retries_of(retries, ("retries",), self.complain),
        )

    def keys(self, tables: FileTables) -> tuple[Key, ...]:
        """`[[key]]`."""
        found = keys_of(tables.key, _names(tables.model), _names(tables.route), self.complain)
        self._no_twins("key", "name", tables.key)
        self._no_twins("key", "sha256", tables.key)
        return found

    def refuse(self) -> None:
        """Raise what was complained about, if anything was."""
        if self.complaints:
            lines = [text for _, text in sorted(self.complaints, key=lambda complaint: complaint[0])]
            if len(lines) > MOST_COMPLAINTS:
                lines[MOST_COMPLAINTS:] = [f"… and {len(lines) - MOST_COMPLAINTS} more"]
            raise ConfigError("\n".join(lines))

    # -- [[upstream]] --------------------------------------------------------------------------------------------------

    def _upstreams(self, tables: list[dict[str, Any]]) -> tuple[Upstream, ...]:
        upstreams: list[Upstream] = []
        for number, raw in enumerate(tables):
            path: Path = ("upstream", number)
            table = decode(UpstreamTable, raw, path, self.complain)
            if table is not None:
                upstreams.append(upstream_of(table, path, self.around, self.complain))
        self._no_twins("upstream", "name", tables)
        if "upstream" in self.said:
            return self._said_upstreams()
        if not upstreams and not self.raw.get("upstream"):
            hint = "give --upstream URL, set CANAL_UPSTREAM, or write an [[upstream]] in a configuration file"
            place = f"{self.file}:1: " if self.file else ""
            self.complaints.append((1, f"{place}upstream: there is none to relay to; {hint}"))
        return tuple(upstreams)

    def _said_upstreams(self) -> tuple[Upstream, ...]:
        """The ones that flags or environment give instead; each is named by its host and port."""
        upstreams: dict[str, Upstream] = {}
        for url in values.listed(self.said["upstream"][1]):
            parsed = self._read_said("upstream", url, base_url_of)
            if parsed is None:
                continue
            name = parsed.authority.decode("ascii")
            if name in upstreams and upstreams[name].base_url == url:
                self.complain_said("upstream", f"{shown(name)} is given twice")
            elif name in upstreams:
                hint = "two upstreams of one host need names of their own, in a configuration file"
                self.complain_said("upstream", f"{shown(name)} would be the name of both; {hint}")
            upstreams[name] = Upstream(name, url)
        if not values.listed(self.said["upstream"][1]):
            self.complain_said("upstream", f"expected a list of URLs, got {shown(self.said['upstream'][1])}")
        return tuple(upstreams.values())

    def _known(self, tables: list[dict[str, Any]], used: tuple[Upstream, ...]) -> Known:
        """What models and routes may refer to."""
        names = frozenset(upstream.name for upstream in used)
        if "upstream" in self.said:
            return Known(names, f": {self.said['upstream'][0]} replaces those of the file")
        return Known(names | frozenset(_names(tables)))  # a faulty upstream is there all the same

    def _no_twins(self, kind: str, key: str, tables: list[dict[str, Any]]) -> None:
        first: dict[str, int] = {}
        for number, raw in enumerate(tables):
            value = raw.get(key)
            if not isinstance(value, str):
                continue
            value = value.strip().lower() if key == "sha256" else value
            if value in first:
                line = self.lines.get((kind, first[value], key), 1)
                what = "this hash" if key == "sha256" else shown(value)
                self.complain((kind, number, key), f"{what} is in use already, in line {line}")
            first.setdefault(value, number)

    def _refuse_open_relay(self, upstreams: Iterable[Upstream]) -> None:
        for number, upstream in enumerate(upstreams):
            if upstream.api_key is not None:
                text = (
                    "without any [[key]] everybody could spend this one: expected a [[key]] for each client "
                    "('canal-trio keys new NAME' makes one), or allow_anonymous = true in [server]"
                )
                self.complain(("upstream", number, "api_key"), text)

    # -- [server] ------------------------------------------------------------------------------------------------------

    def _read_server(self, raw: str | None, key: str, reader: Callable[[str], T], default: T) -> T:
        return default if raw is None else read(raw, reader, ("server", key), self.complain, default)

    def _read_said(self, name: str, text: str, reader: Callable[[str], T]) -> T | None:
        try:
            return reader(text)
        except ValueError as exc:
            self.complain_said(name, str(exc))
            return None

    def _listen(self, server: ServerTable) -> tuple[Address, ...]:
        found: list[Address] = []
        raw = [server.listen] if isinstance(server.listen, str) else server.listen
        for number, text in enumerate(raw or []):
            path: Path = ("server", "listen") if isinstance(server.listen, str) else ("server", "listen", number)
            address = read(text, values.address, path, self.complain, None)
            if address is not None and address in found and address[1]:
                self.complain(path, f"{shown(text)} is listed twice")
            if address is not None:
                found.append(address)
        if raw == []:
            self.complain(("server", "listen"), "expected at least one HOST:PORT, got an empty list")
        if "listen" in self.said:
            texts = values.listed(self.said["listen"][1])
            said = [self._read_said("listen", text, values.address) for text in texts]
            found = [address for address in said if address is not None]
            if not texts:
                self.complain_said("listen", f"expected HOST:PORT, got {shown(self.said['listen'][1])}")
            if len(set(found)) < len([address for address in found if address[1]]):
                self.complain_said("listen", "an address is given twice")
        return tuple(found) or DEFAULTS.listen

    def _admin(self, server: ServerTable, listen: tuple[Address, ...]) -> Address | None:
        admin = self._read_server(server.admin, "admin", _address_or_off, DEFAULTS.admin)
        if "admin" in self.said:
            admin = self._read_said("admin", self.said["admin"][1], _address_or_off)
        if admin is not None and admin[1] and admin in listen:
            text = f"expected an address of its own, got {shown(address_text(admin))}, which is the gateway's"
            if "admin" in self.said:
                self.complain_said("admin", text)
            else:
                self.complain(("server", "admin"), text)
        return admin

    def _log(self, server: ServerTable) -> str:
        log = self._read_server(server.log, "log", _log_style, DEFAULTS.log)
        if "log" in self.said:
            log = self._read_said("log", self.said["log"][1], _log_style) or log
        return log

    def _workers(self, server: ServerTable) -> int:
        workers = DEFAULTS.workers
        if server.workers is not None:
            workers = read(server.workers, values.workers, ("server", "workers"), self.complain, workers)
        if "workers" in self.said:
            workers = self._read_said("workers", self.said["workers"][1], values.workers) or workers
        return workers


def _names(tables: list[dict[str, Any]]) -> list[str]:
    return [raw["name"] for raw in tables if isinstance(raw.get("name"), str)]


def _address_or_off(text: str) -> Address | None:
    if text.strip() == "off":
        return None
    try:
        return values.address(text)
    except ValueError as exc:
        raise ValueError(str(exc).replace("expected ", "expected 'off' or ", 1)) from None


def _log_style(text: str) -> str:
    if text not in ("text", "json"):
        raise ValueError(f"expected 'text' or 'json', got {shown(text)}")
    return text
