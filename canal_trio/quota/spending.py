"""What was spent, in a file, so that a restart does not give every budget back.

Written whole, to a new file that takes the old one's place, at most once a second and at the end: a crash costs budgets
at most a second of spending. One gateway at a time has the file; what cannot be read is not overwritten. Several
threads may write: one at a time does, and none once another may have the file.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import threading
from collections.abc import Callable
from typing import final

import msgspec
import trio

from canal_trio.errors import ConfigError
from canal_trio.policy.ratelimit import Moment
from canal_trio.quota.memory import Busy
from canal_trio.quota.table import Spent, Table

__all__ = ["Spending"]

EVERY = 1.0  # seconds
_DIGEST = re.compile("[0-9a-f]{32}")

_log = logging.getLogger("canal_trio.quota")


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """The file's content, in JSON: by scope (a digest of its name) the day, spent on it, the month, spent in it."""

    version: int
    spent: dict[str, Spent]


@final
class Spending:
    """Has `path` from now on: `restore` has `table` count what it says, `run` and `close` write it, `drop` gives it
    back unwritten. Made in any thread; raises `ConfigError` if the file cannot be used."""

    def __init__(self, path: str, table: Table, moment: Callable[[], Moment]) -> None:
        self.path = path
        self._table = table
        self._moment = moment
        self._one = threading.RLock()
        self.failed = 0  # writes that came to nothing, in a row
        try:
            self._lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise ConfigError(f"limits.state: cannot write {path}.lock: {exc.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._found = self._read()
        except BlockingIOError:
            os.close(self._lock)
            raise ConfigError(f"limits.state: {path} is in use by another gateway: give each one its own") from None
        except BaseException:
            os.close(self._lock)
            raise
        self._written: int | None = table.changes

    def restore(self, *, anew: bool = False) -> None:
        """Have the table count what the file says. `anew`: the file does not know what the table has counted before,
        and has to be written soon. Raises `Busy`."""
        self._table.restore(self._found, self._moment())
        self._found = {}
        if anew:
            self._written = None

    def _read(self) -> dict[str, Spent]:
        try:
            with open(self.path, "rb") as file:
                content = msgspec.json.decode(file.read(), type=_File)
        except FileNotFoundError:
            return {}
        except OSError as exc:
            raise ConfigError(f"limits.state: cannot read {self.path}: {exc.strerror}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            text = f"limits.state: {self.path} is not what this gateway wrote ({exc})"
            raise ConfigError(f"{text}; without the file every budget begins at nothing") from None
        if content.version != 1:
            raise ConfigError(f"limits.state: {self.path} is of version {content.version}, which is not known here")
        if not all(map(_DIGEST.fullmatch, content.spent)):
            raise ConfigError(f"limits.state: {self.path} is not what this gateway wrote (a name is no digest)")
        return content.spent

    async def run(self) -> None:
        """Write what has changed, every second, in a thread. Until cancelled; then `close` is due."""
        while True:
            await trio.sleep(EVERY)
            if self._table.changes != self._written:
                await trio.to_thread.run_sync(self.write)

    def write(self) -> None:
        """Write it now, if it is ours. Blocks; trouble is logged, once."""
        with self._one:
            if self._lock >= 0:
                self._write()

    def _write(self, last: bytes | None = None) -> None:
        changes = self._table.changes
        new = f"{self.path}.new"
        try:
            content = last or self._content()
            with open(new, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.path)
        except (OSError, Busy) as exc:
            self.failed += 1
            if self.failed == 1:
                _log.error("cannot write what was spent to %s: %s; trying on", self.path, exc)
            return
        if self.failed:
            _log.info("what was spent is written to %s again", self.path)
        self.failed = 0
        self._written = changes

    def close(self) -> None:
        """Write it for the last time, and let another have the file. Blocks; idempotent."""
        self.leave(self.unsaid())

    def unsaid(self) -> bytes | None:
        """What the file is to say, if it does not say already what the table has counted by now. Not a checkpoint."""
        return None if self._table.changes == self._written else self._content()

    def _content(self) -> bytes:
        return msgspec.json.encode(_File(1, self._table.spent(self._moment())))

    def leave(self, last: bytes | None) -> None:
        """As `close`, where it was to say `last` (None: what it says already)."""
        with self._one:
            if last is not None and self._lock >= 0:
                self._write(last)
            self.drop()

    def drop(self) -> None:
        """Let another have the file as it is. Idempotent."""
        with self._one:
            lock, self._lock = self._lock, -1
            if lock >= 0:
                os.close(lock)
