"""The journal: a line before anything happens, a line when it is over; bounded, whatever the disk takes."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from journal_kit import MUCH, admit, finish, read_all, start
from ledger_kit import admitted, open_row, record

from canal_trio.observe.ledger.filler import BATCH_BYTES, Filler
from canal_trio.observe.ledger.journal import (
    _AT_ONCE,
    ENDING_BYTES,
    Journal,
    JournalError,
    JournalReader,
    claim,
    left_behind,
)
from canal_trio.observe.ledger.rows import LINE_BYTES, _few, ended, lines_of, opened
from canal_trio.observe.ledger.sqlite import SqliteStore


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """An empty one with small segments."""
    made = Journal(str(tmp_path / "j"), instance="gw", most_bytes=MUCH, segment_bytes=2000)
    yield made
    made.close()


def test_few_rows_wait_for_more(journal: Journal, tmp_path: Path) -> None:
    """Only a full batch is followed by another one at once: what is less gathers for one transaction."""
    filler = Filler(journal, SqliteStore(str(tmp_path / "rows.db")), str(tmp_path))
    finish(journal, start(journal))
    assert filler.step() is False
    assert filler.rows == 1
    while journal.written < filler.applied + BATCH_BYTES + LINE_BYTES:
        finish(journal, start(journal))
    assert filler.step() is True
    assert filler.step() is False
    assert filler.applied == journal.written


def test_full_means_no(tmp_path: Path) -> None:
    """Nothing is admitted beyond the bound, with room for the endings of what is open; later it is again."""
    journal = Journal(str(tmp_path), instance="gw", most_bytes=10_000)
    taken = []
    while (number := admit(journal)) is not None:
        taken.append(number)
    assert 3 <= len(taken) <= 10_000 // ENDING_BYTES
    for number in taken:
        finish(journal, number)
    assert journal.backlog <= 10_000, "the endings had their place"
    reader = JournalReader(journal.folder)
    read_all(reader)
    journal.applied = reader.consumed
    assert journal.backlog == 0
    start(journal)
    journal.close()


class FullDisk:
    """An `os.write` that takes only so many bytes in all, then says that the disk is full."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._write = os.write

    def __call__(self, fd: int, data: bytes) -> int:
        """As the system call."""
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = self._write(fd, data[: self.room])
        self.room -= count
        return count


@pytest.mark.parametrize("room", [0, 1, 100, 3000])
def test_a_full_disk(journal: Journal, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """A line that was cut is none; endings wait in memory and nothing is admitted; with room again nothing is lost."""
    numbers = [start(journal) for _ in range(5)]
    disk = FullDisk(room)
    monkeypatch.setattr(os, "write", disk)
    for number in numbers:
        finish(journal, number)
    while (number := admit(journal)) is not None:
        numbers.append(number)
    assert admit(journal) is None
    disk.room = MUCH
    assert journal.retry()
    after = start(journal)
    kept = read_all(JournalReader(journal.folder))
    assert kept == {number: "completed" if number <= 5 else "open" for number in [*numbers, after]}
    assert journal.backlog == journal.written


def test_endings_together_on_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three endings are one write; cut at any byte, each is read once, after the disk took the rest of them."""
    disk = FullDisk(MUCH)
    monkeypatch.setattr(os, "write", disk)

    def ending(room: int, again: int) -> tuple[int, dict[int, str], int]:
        """What the three have, what is read in the end, and the lines that are none."""
        made = Journal(str(tmp_path / f"{room}.{again}"), instance="gw", most_bytes=MUCH)
        numbers = [start(made) for _ in range(3)]
        before, disk.room = made.written, room
        made.end([ended(opened(number, admitted(number)), record(number)) for number in numbers])
        disk.room = again
        made.retry()
        disk.room = MUCH
        assert made.retry()
        assert made.backlog == made.written
        reader = JournalReader(made.folder)
        kept = read_all(reader)
        made.close()
        return made.written - before, kept, reader.broken

    size, _, _ = ending(MUCH, 0)
    for room in range(size):
        for again in (0, 1):
            taken, kept, broken = ending(room, again)
            assert kept == dict.fromkeys((1, 2, 3), "completed")
            assert size <= taken <= size * 4 // 3 + 2 * len("~\n")
            assert broken <= 1 + again


def test_beginnings_together_on_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three that are admitted in one write, cut at any byte, the first ones are taken; of the others no row is read,
    not even of one that lacked its line's end only."""
    disk = FullDisk(MUCH)
    monkeypatch.setattr(os, "write", disk)
    rows = [opened(number, admitted(number)) for number in (1, 2, 3)]
    whole = [len(lines_of(rows[:count])) for count in range(4)]
    for room in range(whole[3] + 1):
        made = Journal(str(tmp_path / str(room)), instance="gw", most_bytes=MUCH)
        disk.room = room
        taken = made.admit(rows)
        assert taken == made.open == sum(room >= size for size in whole) - 1
        disk.room = MUCH
        assert made.admit([opened(9, admitted(9))]) == 1
        reader = JournalReader(made.folder)
        assert read_all(reader) == dict.fromkeys([*range(1, taken + 1), 9], "open")
        assert reader.broken == (room not in whole)
        made.close()


def test_of_those_admitted_together_as_many_as_there_is_room_for(tmp_path: Path) -> None:
    """The bound holds for each of them, with its ending; the first ones are taken, and the file has no other."""
    journal = Journal(str(tmp_path), instance="gw", most_bytes=5_000)
    rows = [opened(number, admitted(number)) for number in range(1, 9)]
    size = len(lines_of(rows[:1]))
    assert journal.admit(rows) == 5_000 // (size + ENDING_BYTES) == 4
    assert journal.admit(rows[4:]) == 0
    assert read_all(JournalReader(journal.folder)) == dict.fromkeys((1, 2, 3, 4), "open")
    journal.close()


def test_many_late_endings_take_several_writes(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many endings wait for the disk, one write has a bounded number of bytes, in whole lines."""
    numbers = [start(journal) for _ in range(800)]
    disk = FullDisk(0)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", disk)
        for number in numbers:
            finish(journal, number)
        disk.room = MUCH
        writes: list[bytes] = []
        patched.setattr(os, "write", lambda fd, data: writes.append(data) or disk(fd, data))
        late = len(journal._late)
        assert journal.retry()
    assert sum(map(len, writes)) == late > 2 * _AT_ONCE
    assert all(_AT_ONCE - ENDING_BYTES < len(data) <= _AT_ONCE for data in writes[:-1])
    assert all(data.endswith(b"\n") for data in writes)
    assert read_all(JournalReader(journal.folder)) == dict.fromkeys(numbers, "completed")


def test_a_segment_that_cannot_be_made(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a new segment nothing is admitted, an ending waits, and both go on where one can be made."""
    number = start(journal)
    while journal._size < 2000:
        finish(journal, number)
        journal.open += 1
    with monkeypatch.context() as patched:
        patched.setattr(journal, "_segment", lambda: (_ for _ in ()).throw(OSError(errno.EMFILE, "no")))
        assert admit(journal) is None
        finish(journal, number)
        assert journal.backlog > journal.written
    assert journal.retry()
    assert journal.backlog == journal.written


def test_the_dead_are_told_from_the_living(tmp_path: Path) -> None:
    """The journal of a process that is gone can be claimed, by one; not a living one's, nor another instance's."""
    folder = str(tmp_path)
    alive = Journal(folder, instance="gw", most_bytes=MUCH)
    dead = Journal(folder, instance="gw", worker=3, most_bytes=MUCH)
    strange = Journal(folder, instance="other", most_bytes=MUCH)
    dead.close()
    strange.close()
    strange.close()
    (tmp_path / "a-file").touch()
    (tmp_path / "no-run").mkdir()
    (tmp_path / "bad-run").mkdir()
    (tmp_path / "bad-run" / "run.json").write_text("{")
    found = left_behind(folder, "gw")
    assert sorted(found) == sorted([alive.folder, dead.folder])
    assert left_behind(folder, "gw", but=alive.folder) == [dead.folder]
    with claim(alive.folder) as run:
        assert run is None
    with claim(dead.folder) as run, claim(dead.folder) as again:
        assert run == dead.run
        assert again is None
        shutil.rmtree(dead.folder)
    with claim(dead.folder) as run:
        assert run is None
    assert left_behind(str(tmp_path / "nowhere"), "gw") == []
    alive.close()


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    """Where no journal can be kept, the error names the place."""
    (tmp_path / "file").touch()
    with pytest.raises(JournalError, match=r"cannot be kept in .*file"):
        Journal(str(tmp_path / "file"), instance="gw", most_bytes=MUCH)


def test_rows_are_small(journal: Journal) -> None:
    """The bytes that are set aside for an ending are more than a usual one has."""
    journal.end([ended(opened(1, admitted(1)), record(1))])
    assert journal.written < ENDING_BYTES


def test_a_long_text_of_a_strangers_stays_in_memory() -> None:
    """Paths and models are a client's words: of the long ones none is kept beside its row, and that has it cut."""
    opened(1, admitted(1))
    kept = _few.cache_info().currsize
    assert kept
    for number in range(3):
        assert len(open_row(1, path="/" + f"{number}" * 10_000).path) < 300
    assert _few.cache_info().currsize == kept
