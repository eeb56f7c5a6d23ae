"""`[ledger]`: where the rows go, and the journal in front of them."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
from typing import Any

from canal_trio.config import values
from canal_trio.config.build import Surroundings, read, secret_of, within
from canal_trio.config.locate import Path
from canal_trio.config.schema import Complain, LedgerTable, decode
from canal_trio.settings import MIB, Ledger

__all__ = ["ledger_of"]


def ledger_of(raw: dict[str, Any] | None, around: Surroundings, complain: Complain) -> Ledger | None:
    """The table, if there is one, as settings; None after a complaint that leaves nothing to go on with."""
    path: Path = ("ledger",)
    table = None if raw is None else decode(LedgerTable, raw, path, complain)
    if table is None:
        return None
    postgres = None
    if table.postgres is not None:
        postgres = secret_of(table.postgres, (*path, "postgres"), around, complain)
        if postgres is not None:
            read(postgres, _postgres_url, (*path, "postgres"), complain, None)
    if table.file is None and table.postgres is None:
        complain(path, 'expected file = "ledger.db" (SQLite) or postgres = "postgresql://…"')
    if table.file is not None and table.postgres is not None:
        complain((*path, "postgres"), "expected either file (SQLite) or postgres, got both")
    file = None if table.file is None else _place(table.file, (*path, "file"), around, complain)
    default = f"{table.file}.journal" if table.file else "journal"
    journal = _place(table.journal or default, (*path, "journal"), around, complain)
    instance = table.instance or socket.gethostname() or "canal"
    read(instance, _instance, (*path, "instance"), complain, None)
    size = 256 * MIB
    if table.journal_bytes is not None:
        size = read(table.journal_bytes, _journal_bytes, (*path, "journal_bytes"), complain, size)
    return Ledger(file=file, postgres=postgres, journal=journal, journal_bytes=size, instance=instance)


def _place(name: str, path: Path, around: Surroundings, complain: Complain) -> str:
    """A file's or folder's whole name; the folder that it is to be made in has to be there."""
    whole = os.path.abspath(os.path.join(around.folder, name))
    folder = os.path.dirname(whole)
    if not os.path.isdir(folder):
        complain(path, f"there is no folder '{folder}'")
    elif not os.access(folder, os.W_OK):
        complain(path, f"the folder '{folder}' cannot be written to")
    return whole


def _journal_bytes(raw: Any) -> int:
    return int(within(values.size(raw), MIB, 2**40, " bytes"))


def _instance(text: str) -> None:
    if not re.fullmatch(r"[\w.:-]{1,128}", text, re.ASCII):
        raise ValueError("expected a name of up to 128 letters, digits, '.', '_', ':' and '-'")


def _postgres_url(text: str) -> None:
    if not text.startswith(("postgresql://", "postgres://")):
        raise ValueError("expected a URL such as postgresql://user:password@host:5432/database (it is not shown here)")
    if importlib.util.find_spec("psycopg") is None:
        raise ValueError("this needs psycopg: pip install 'canal-trio[postgres]'")
