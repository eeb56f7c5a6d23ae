"""The journal: what was admitted and how it ended, on this machine's disk before anything else happens.

One folder for each run of a process, held by a lock that the kernel takes back when the process dies, however it dies.
In it segments of lines, appended to by write(2): rows that are open, rows that are whole (rows.py). A line that was
written survives the process (not the machine's power). Reading is done by others, from the files.

Invariants: what waits for the store is bounded in bytes, the endings of all open rows included, and beyond that nothing
is admitted; an ending is never refused: where the disk is full it waits in memory, and nothing is admitted meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from typing import Final, final

import msgspec

from canal_trio.errors import CanalError
from canal_trio.observe.ledger.rows import LINE_BYTES, OPEN, Begun, Chunk, Ended, Row, Run, decode, decode_all, lines_of

__all__ = ["Journal", "JournalError", "JournalReader", "claim", "left_behind"]

SEGMENT_BYTES: Final = 1024 * 1024
ENDING_BYTES: Final = 1024  # set aside for the ending of each open row; a usual one has half of it
_MANIFEST: Final = "run.json"
_AT_ONCE: Final = 64 * 1024  # bytes of one write(2), but at least a line
_PIECE_BYTES: Final = 64 * 1024  # decoded in one call, in which the loop waits: a fraction of a millisecond
CHUNK: Final = 1024  # whole rows that are stored together, in one statement: see sqlite.py
_VOID: Final = b"~\n"  # ends what a write left half done: that is no row then, even where it lacks nothing but its end
_encode: Final = msgspec.json.Encoder().encode


class JournalError(CanalError):
    """The journal's folder cannot be used. The text says which, and why."""


@final
class Journal:
    """Written by one process. `most_bytes` may wait for the store. Its methods are not checkpoints."""

    def __init__(
        self, folder: str, *, instance: str, worker: int = 0, most_bytes: int, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        """Makes the folder of this run and locks it. Raises `JournalError`."""
        self.run = Run(instance, secrets.token_hex(8), worker)
        self.folder = os.path.join(folder, f"{self.run.boot}.{worker}")
        self._most = most_bytes
        self._segment_bytes = segment_bytes
        self.written = 0  # bytes, in all segments of this run
        self.applied = 0  # of these, what the store has; the filler's to set
        self.open = 0  # rows that have not ended
        self._seq = 0
        self._late = bytearray()  # lines of endings that the disk did not take
        self._torn = False  # the last write was cut in the middle of a line
        self._fd = self._lock = -1
        try:
            self._begin(1)
        except JournalError:
            self.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _begin(self, number: int) -> None:
        """Make the folder, lock it, and begin the segment `number`."""
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            self._lock = os.open(os.path.join(self.folder, _MANIFEST), os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(self._lock, _encode(self.run))
            self._number = number
            self._size = 0
            self._fd = self._segment()
        except OSError as exc:
            where = os.path.dirname(self.folder)
            raise JournalError(f"the ledger's journal cannot be kept in {where}: {exc.strerror or exc}") from None

    def _segment(self) -> int:
        name = os.path.join(self.folder, _name(self._number))
        return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)

    @property
    def backlog(self) -> int:
        """Bytes that the store does not have."""
        return self.written - self.applied + len(self._late)

    def numbers(self, count: int) -> range:
        """The numbers of the next `count` rows."""
        first = self._seq + 1
        self._seq += count
        return range(first, first + count)

    def admit(self, rows: Sequence[Begun]) -> int:
        """Write open rows, at most a round's: how many were taken, the first ones. Where the journal is full, or the
        disk is, these are not all: nothing may be done for the others."""
        if self._late and not self.retry():
            return 0
        count, data = len(rows), lines_of(rows)
        while count and self.written - self.applied + len(data) + (self.open + count) * ENDING_BYTES > self._most:
            count -= 1
            data = lines_of(rows[:count])
        count -= data.count(b"\n", self._write(data)) if data else 0
        self.open += count
        return count

    def end(self, rows: Sequence[Ended]) -> None:
        """Write whole rows, now or as soon as the disk takes them."""
        self.open -= len(rows)
        self._late += lines_of(rows)
        self.retry()

    def retry(self) -> bool:
        """Write what the disk has not taken. True: nothing is left of it."""
        late = self._late
        while late:
            data = bytes(late[: _lines_end(late, 0, _AT_ONCE)])
            taken = self._write(data)
            del late[:taken]
            if taken < len(data):
                return False
        return True

    def _write(self, data: bytes) -> int:
        """One write(2) of lines: how many bytes of them were taken, as whole lines."""
        try:
            if self._size >= self._segment_bytes:
                self._rotate()
            void = _VOID if self._torn else b""
            count = os.write(self._fd, void + data)
        except OSError:
            return 0
        self._size += count
        self.written += count
        count -= len(void)
        if count == len(data):
            self._torn = False
            return count
        taken = data.rfind(b"\n", 0, max(count, 0)) + 1
        self._torn = count != taken
        return taken

    def _rotate(self) -> None:
        self._number += 1
        try:
            fd = self._segment()
        except OSError:
            self._number -= 1
            raise
        os.close(self._fd)
        self._fd, self._size, self._torn = fd, 0, False  # half a line at a segment's end is none

    def renew(self, number: int) -> int:
        """Somebody has removed its files: begin anew with the segment `number`. How many bytes that the store does not
        have are lost. Raises `JournalError`; then nobody is admitted until it has been tried again."""
        self.close()
        self._begin(number)
        lost = self.written - self.applied
        self.written = self.applied
        self._torn = False
        return lost

    def close(self) -> None:
        """Let go of the files. Idempotent."""
        for fd in (self._fd, self._lock):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock = -1


def _lines_end(data: bytes | bytearray, at: int, most: int) -> int:
    """Where the whole lines from `at` on end, of at most that many bytes, but at least one. There is one."""
    return data.rfind(b"\n", at, at + most) + 1 or data.index(b"\n", at) + 1


def _name(number: int) -> str:
    return f"{number:08d}.log"


@final
class JournalReader:
    """Reads the rows of one run from its files, in order, in another thread than the writer's if need be.

    `read` gives what is there, `commit` says that the store has it, and removes the segments that are done with.
    `followed`: it is this process's own, so that no segment is missing, unless somebody has removed it. It asks
    the system for as little as it can: each time the interpreter's lock is let go, and got back from a busy loop.
    """

    def __init__(self, folder: str, *, followed: bool = False) -> None:
        self.folder = folder
        self.followed = followed
        self.broken = 0  # lines that were none, committed
        self.consumed = 0  # bytes, committed
        self.number = min(_segments(folder), default=1)  # of the segment that is read
        self._offset = 0
        self.full = False  # the last read has found as much as it may take
        self.rows = 0  # whole ones that it has found
        self._next = (self.number, 0, 0, 0)

    def read(self, most: int) -> Iterator[Chunk]:
        """The next rows, from up to `most` bytes (but at least a line), in chunks. Raises OSError.

        Of a row that has ended meanwhile, which are most of them, only the whole one is given. In chunks, because rows
        are in the processor's caches then when they are stored.
        """
        begun: dict[int, Row] = {}  # by their number
        finished: list[Row] = []
        number, offset, taken, broken, self.rows = self.number, self._offset, 0, 0, 0
        while taken < most:
            later, room = self._later(number), max(most - taken, 2 * LINE_BYTES)
            # Read behind that look: if there is a later one, nothing is written here any more.
            data = self._data(number, offset, room, there=self.followed and later is None)
            end = data.rfind(b"\n") + 1
            for lines in _pieces(data, end):
                rows, none = _decoded(lines)
                broken += none
                begun.update({row.seq: row for row in rows if row.outcome == OPEN})
                for row in rows:
                    if row.outcome != OPEN:
                        begun.pop(row.seq, None)
                        finished.append(row)
                while len(finished) >= CHUNK:
                    self.rows += CHUNK
                    yield (), finished[:CHUNK]
                    del finished[:CHUNK]
            offset += end
            taken += end
            if end == 0:
                if later is None:
                    break
                broken += bool(data)  # half a line at the end is none
                taken += len(data)
                number, offset = later, 0
            elif later is None and len(data) < room:
                break
        self.full = taken >= most
        self._next = (number, offset, taken, broken)
        if begun or finished:
            self.rows += len(finished)
            yield tuple(begun.values()), finished

    def commit(self) -> None:
        """All that was read last is in the store. Raises OSError."""
        number, offset, taken, broken = self._next
        if number != self.number:
            for done in _segments(self.folder):
                if done < number:
                    os.unlink(os.path.join(self.folder, _name(done)))
        self.number, self._offset = number, offset
        self.consumed += taken
        self.broken += broken
        self._next = (number, offset, 0, 0)

    def _later(self, number: int) -> int | None:
        """The segment behind that one, if it was begun."""
        if self.followed:
            return number + 1 if os.path.exists(os.path.join(self.folder, _name(number + 1))) else None
        return min((other for other in _segments(self.folder) if other > number), default=None)

    def _data(self, number: int, offset: int, most: int, *, there: bool) -> bytes:
        try:
            fd = os.open(os.path.join(self.folder, _name(number)), os.O_RDONLY)
        except FileNotFoundError:
            if there:
                raise
            return b""
        try:
            return os.pread(fd, most, offset)
        finally:
            os.close(fd)


def _pieces(data: bytes, end: int) -> Iterator[bytes]:
    """The whole lines of `data`, up to `end`, some at a time."""
    at = 0
    while at < end:
        piece = _lines_end(data, at, _PIECE_BYTES)
        yield data[at:piece]
        at = piece


def _decoded(lines: bytes) -> tuple[list[Row], int]:
    """The rows of `lines`, and how many of these are none."""
    rows = decode_all(lines)
    if rows is not None:
        return rows, 0
    each = [line for line in lines.split(b"\n") if line]  # one is broken, or of an older kind
    rows = [row for row in map(decode, each) if row is not None]
    return rows, len(each) - len(rows)


def _segments(folder: str) -> list[int]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(name[:-4]) for name in names if name.endswith(".log") and name[:-4].isdigit())


# -- runs that are over ------------------------------------------------------------------------------------------------


def left_behind(folder: str, instance: str, but: str = "") -> list[str]:
    """The folders of runs of this `instance` in the journal's `folder`, `but` one. Some may be alive: see `claim`."""
    found = []
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    for name in names:
        path = os.path.join(folder, name)
        run = _manifest(path) if path != but else None
        if run is not None and run.instance == instance:
            found.append(path)
    return found


def _manifest(path: str) -> Run | None:
    try:
        with open(os.path.join(path, _MANIFEST), "rb") as file:
            return msgspec.json.decode(file.read(4096), type=Run)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


@contextlib.contextmanager
def claim(path: str) -> Iterator[Run | None]:
    """The run in this folder, for the block, if its process is gone and nobody else has claimed it; else None."""
    manifest = os.path.join(path, _MANIFEST)
    try:
        fd = os.open(manifest, os.O_RDWR)
    except FileNotFoundError:
        yield None
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        # Whoever had the lock before may have finished with it, and removed the folder.
        yield _manifest(path)
    finally:
        os.close(fd)
