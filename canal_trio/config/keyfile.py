"""Clients' keys in a configuration file: made, listed and revoked without touching anything else in it.

A key is shown once, when it is made; the file holds its SHA-256 only. Edits are splices of lines: comments, order and
spacing stay. Invariant: a file is replaced as a whole, and only by one that says what the old one said and the edit,
and whose keys a gateway would take.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import secrets
import tempfile
import tomllib
from collections.abc import Sequence
from typing import Any

from canal_trio.config.load import Flags, load_keys, read_file
from canal_trio.config.locate import locate
from canal_trio.config.values import nearest, shown
from canal_trio.errors import ConfigError
from canal_trio.settings import Key

__all__ = ["append_key", "key_rows", "key_table", "make_key", "revoke_key"]

PREFIX = "sk-canal-"
DAY = 86400.0


def make_key() -> tuple[str, str]:
    """A new key, of 256 random bits, and its SHA-256."""
    key = PREFIX + secrets.token_urlsafe(32)
    return key, hashlib.sha256(key.encode()).hexdigest()


def key_table(
    name: str,
    digest: str,
    *,
    principal: str | None = None,
    models: Sequence[str] = ("*",),
    routes: Sequence[str] = (),
    expires: datetime.date | None = None,
) -> str:
    """The `[[key]]` to keep."""
    lines = ["[[key]]", f"name = {_quoted(name)}"]
    if principal is not None:
        lines.append(f"principal = {_quoted(principal)}")
    lines += [f'sha256 = "{digest}"', f"models = {_list(models)}"]
    if routes:
        lines.append(f"routes = {_list(routes)}")
    if expires is not None:
        lines.append(f"expires = {expires.isoformat()}")
    return "\n".join(lines) + "\n"


def append_key(file: str, table: str, name: str) -> None:
    """Put a `[[key]]` at the end of `file`. `ConfigError` if there is one of that name, or the file is not valid."""
    if any(key.name == name for key in load_keys(Flags(config=file))):
        raise ConfigError(f"{file}: there is a key named {shown(name)} already: one name for each key")
    raw, text = read_file(file)
    edited = text + ("" if text.endswith("\n") or not text else "\n") + "\n" + table
    expected = {**raw, "key": [*raw.get("key", []), *tomllib.loads(table)["key"]]}
    _replace(file, edited, expected)


def revoke_key(file: str, name: str) -> bool:
    """Mark the key `name` as revoked in `file`. False if it was already. `ConfigError` if there is none."""
    keys = load_keys(Flags(config=file))
    numbers = [number for number, key in enumerate(keys) if key.name == name]
    if not numbers:
        raise ConfigError(f"{file}: there is no key named {shown(name)}{nearest(name, (key.name for key in keys))}")
    number = numbers[0]
    if keys[number].revoked:
        return False
    raw, text = read_file(file)
    places = locate(text)
    lines = text.splitlines(keepends=True)
    if "revoked" in raw["key"][number]:
        at = places["key", number, "revoked"] - 1
        lines[at] = lines[at].replace("false", "true", 1)
    else:
        at = places["key", number, "name"] - 1
        lines[at] = lines[at].rstrip("\n") + "\nrevoked = true\n"
    expected = {**raw, "key": [*raw["key"]]}
    expected["key"][number] = {**raw["key"][number], "revoked": True}
    _replace(file, "".join(lines), expected)
    return True


def _replace(file: str, text: str, expected: dict[str, Any]) -> None:
    """Write `text` over `file`, in one step, if it says what is expected of it."""
    says: object = None
    with contextlib.suppress(tomllib.TOMLDecodeError):
        says = tomllib.loads(text)
    if says != expected:
        raise ConfigError(f"{file}: its [[key]] tables are written in a way that cannot be edited here: do it by hand")
    target = os.path.realpath(file)
    status = os.stat(target)
    descriptor, temporary = tempfile.mkstemp(prefix=".canal-", dir=os.path.dirname(target))
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as out:
            os.fchmod(out.fileno(), status.st_mode & 0o7777)
            if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                with contextlib.suppress(PermissionError):
                    os.fchown(out.fileno(), status.st_uid, status.st_gid)
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        try:
            load_keys(Flags(config=temporary))
        except ConfigError as exc:
            raise ConfigError(f"{str(exc).replace(temporary, file)}; nothing was written") from None
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def key_rows(keys: Sequence[Key], now: float) -> list[tuple[str, ...]]:
    """A table of `keys` for people, its headings first. `now` is Unix time."""
    rows: list[tuple[str, ...]] = [("NAME", "PRINCIPAL", "STATE", "EXPIRES", "SHA-256", "MODELS", "ROUTES")]
    for key in keys:
        until = "never"
        if key.expires is not None:
            until = datetime.datetime.fromtimestamp(key.expires, datetime.UTC).strftime("%Y-%m-%d %H:%M")
        routes = key.routes if key.routes is not None else (("*",) if "*" in key.models else ())
        opened = (",".join(names) or "-" for names in (key.models, routes))
        rows.append((key.name, key.principal or key.name, _state(key, now), until, key.sha256[:8], *opened))
    return rows


def _state(key: Key, now: float) -> str:
    if key.revoked:
        return "revoked"
    if key.expires is None or key.expires - now > 14 * DAY:
        return "live"
    return "expired" if key.expires <= now else f"{max(1, int((key.expires - now) / DAY))} days left"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # of printable text it is TOML, too


def _list(names: Sequence[str]) -> str:
    return "[" + ", ".join(map(_quoted, names)) + "]"
