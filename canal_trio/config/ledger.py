"""`[ledger]`: where the rows go, and the journal in front of them."""

from __future__ import annotations

import importlib.util
import re
import socket
from typing import Any

from canal_trio.config import values
from canal_trio.config.build import Surroundings, place_of, read, secret_of, within
from canal_trio.config.locate import Path
from canal_trio.config.schema import Complain, LedgerTable, decode
from canal_trio.settings import MIB, Ledger

__all__ = ["ledger_of"]

_SUCH_A_URL = "expected a URL such as postgresql://user:password@host:5432/database (it is not shown here)"


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
    file = None if table.file is None else place_of(table.file, (*path, "file"), around, complain)
    default = f"{table.file}.journal" if table.file else "journal"
    journal = place_of(table.journal or default, (*path, "journal"), around, complain, folder=True)
    instance = table.instance or socket.gethostname() or "canal"
    read(instance, _instance, (*path, "instance"), complain, None)
    size = 256 * MIB
    if table.journal_bytes is not None:
        size = read(table.journal_bytes, _journal_bytes, (*path, "journal_bytes"), complain, size)
    return Ledger(file=file, postgres=postgres, journal=journal, journal_bytes=size, instance=instance)


def _journal_bytes(raw: Any) -> int:
    return int(within(values.size(raw), MIB, 2**40, " bytes"))


def _instance(text: str) -> None:
    if not re.fullmatch(r"[\w.:-]{1,128}", text, re.ASCII):
        raise ValueError("expected a name of up to 128 letters, digits, '.', '_', ':' and '-'")


def _postgres_url(text: str) -> None:
    if not text.startswith(("postgresql://", "postgres://")):
        raise ValueError(_SUCH_A_URL)
    if importlib.util.find_spec("psycopg") is None:
        raise ValueError("this needs psycopg: pip install 'canal-trio[postgres]'")
    from psycopg import ProgrammingError  # late: an extra, and slow to import
    from psycopg.conninfo import conninfo_to_dict

    # What it cannot read, or takes for a host's name or a port, it repeats when it connects: perhaps of the password.
    try:
        parts = conninfo_to_dict(text)
        usable = "@" not in str(parts.get("host", "")) and re.fullmatch(r"[\d,]*", str(parts.get("port", "")), re.ASCII)
    except ProgrammingError:
        usable = False
    if not usable:
        raise ValueError(f"{_SUCH_A_URL}, with what is special in a name or a password percent-encoded, as %40 for @")
