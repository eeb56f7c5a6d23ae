"""The journal: a line before anything happens, a line when it is over; bounded, and readable by whoever comes after."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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
from canal_trio.observe.ledger.rows import LINE_BYTES, Row, _few, decode, ended, lines_of, opened
from canal_trio.observe.ledger.sqlite import SqliteStore

MUCH = 10**9


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """An empty one with small segments."""
    made = Journal(str(tmp_path / "j"), instance="gw", most_bytes=MUCH, segment_bytes=2000)
    yield made
    made.close()


def start(journal: Journal) -> int:
    """Admit one more; its number."""
    number = admit(journal)
    assert number is not None
    return number


def admit(journal: Journal) -> int | None:
    """Try to admit one more; its number, if it was."""
    (number,) = journal.numbers(1)
    return number if journal.admit([opened(number, admitted(number))]) else None


def finish(journal: Journal, number: int) -> None:
    """End it."""
    journal.end([ended(opened(number, admitted(number)), record(number))])


def read_all(reader: JournalReader, most: int = 10_000) -> dict[int, str]:
    """Everything there is, applied as a store would: number -> outcome."""
    kept: dict[int, str] = {}
    while True:
        started, finished = reader.read(most)
        if not started and not finished:
            return kept
        for row in started:
            kept.setdefault(row.seq, row.outcome)
        kept |= {row.seq: row.outcome for row in finished}
        reader.commit()


def test_every_row_is_read_once_and_its_segment_removed(journal: Journal) -> None:
    """Open rows and whole ones come in order, over many segments; what the store has is removed, but for the newest."""
    numbers = [start(journal) for _ in range(50)]
    for number in numbers[:20]:
        finish(journal, number)
    reader = JournalReader(journal.folder)
    segments = len(list(Path(journal.folder).glob("*.log")))
    assert segments > 4
    kept = read_all(reader, 500)
    assert kept == {n: "completed" if n in numbers[:20] else "open" for n in numbers}
    assert reader.consumed == journal.written
    assert len(list(Path(journal.folder).glob("*.log"))) == 1
    assert reader.broken == 0


def test_what_was_not_committed_is_read_again(journal: Journal) -> None:
    """A store that failed leaves everything where it was, for the same reader and for the next process."""
    finish(journal, start(journal))
    reader = JournalReader(journal.folder)
    assert reader.read(MUCH) == reader.read(MUCH) == JournalReader(journal.folder).read(MUCH)
    reader.commit()
    assert reader.read(MUCH) == ([], [])
    finish(journal, start(journal))
    assert [row.seq for row in reader.read(MUCH)[1]] == [2]


def test_a_row_that_ended_in_the_same_batch_is_written_once(journal: Journal) -> None:
    """A short exchange costs the store one row, not two."""
    finish(journal, start(journal))
    started, finished = JournalReader(journal.folder).read(MUCH)
    assert (started, [row.seq for row in finished]) == ([], [1])


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


def test_cut_in_the_middle_of_a_line(journal: Journal) -> None:
    """Cut at any byte, as by a kill, whole lines are rows and the rest is none; so it is before a later segment."""
    finish(journal, start(journal))
    (path,) = Path(journal.folder).glob("*.log")
    data = path.read_bytes()
    for cut in range(0, len(data), 7):
        path.write_bytes(data[:cut])
        whole = data[:cut].count(b"\n")
        started, finished = JournalReader(journal.folder).read(MUCH)
        assert (len(started), len(finished)) == [(0, 0), (1, 0), (0, 1)][whole]
    path.write_bytes(data[:-5])
    (Path(journal.folder) / "00000009.log").write_bytes(data.replace(b"[1,", b"[7,"))
    reader = JournalReader(journal.folder)
    assert read_all(reader) == {1: "open", 7: "completed"}
    assert reader.broken == 1
    assert reader.consumed == 2 * len(data) - 5


# Lines as earlier versions wrote them, and what they say.
OLDER = (
    b'+[5,7.5,"r5",null,null,"/v1/x","m",null,"u"]\n'
    b'+[6,8.5,"r6",null,null,"/v1/x","m",null,"u"]\n'
    b'=[6,8.5,"r6",null,null,"/v1/x","m",null,"u",1,200,"completed"]\n'
    b'+{"seq":1,"started_at":5.5,"request_id":"r1","path":"/v1/x","model":"m"}\n'
    b'+{"seq":2,"started_at":6.5,"request_id":"r2"}\n'
    b'={"seq":1,"started_at":5.5,"request_id":"r1","path":"/v1/x","model":"m","attempts":1,"status":200,'
    b'"outcome":"completed","phase":"deliver","usage_source":"upstream","prompt_tokens":3,"cost":7,"duration":0.5}\n'
)


def test_a_journal_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """What a gateway left behind when this one replaced it: lines that are objects, lines with marks, broken ones."""
    (tmp_path / "00000001.log").write_bytes(OLDER + b'={"seq":2,"started_at":6.5,"requ\n={"seq":"3"}\n+{"seq":4,"s"}\n')
    reader = JournalReader(str(tmp_path))
    started, finished = reader.read(MUCH)
    assert started == [Row(5, 7.5, "r5", None, None, "/v1/x", "m", None, "u"), Row(2, 6.5, "r2")]
    assert finished == [
        Row(6, 8.5, "r6", None, None, "/v1/x", "m", None, "u", 1, 200, "completed"),
        Row(
            *(1, 5.5, "r1"),
            path="/v1/x",
            model="m",
            attempts=1,
            status=200,
            outcome="completed",
            phase="deliver",
            usage_source="upstream",
            prompt_tokens=3,
            cost=7,
            duration=0.5,
        ),
    ]
    assert reader.broken == 3


@settings(deadline=None)
@given(st.data())
def test_many_lines_are_read_as_each_of_them_is(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Lines that are read together give the rows that they give one by one, wherever some of them were cut."""
    texts = st.text(max_size=12) | st.sampled_from(['],["', ",[1,", '"', "\\", "\n=[", "]"])
    lines = []
    for number in range(data.draw(st.integers(1, 6))):
        row = opened(number, admitted(number, path=data.draw(texts), model=data.draw(texts)))
        if data.draw(st.booleans()):
            row = ended(row, record(number, model=data.draw(texts | st.none())))
        line = data.draw(st.sampled_from([b"", b"", b"", b"+", b"="])) + lines_of([row])[:-1]
        lines.append(line[: data.draw(st.just(len(line)) | st.integers(0, len(line)))])
    folder = tmp_path_factory.mktemp("lines")
    (folder / "00000001.log").write_bytes(b"".join(line + b"\n" for line in lines))
    reader = JournalReader(str(folder))
    started, finished = reader.read(MUCH)
    shutil.rmtree(folder)
    each = [row for row in map(decode, lines) if row is not None]
    assert finished == [row for row in each if row.outcome != "open"]
    assert started == [row for row in each if row.outcome == "open"]
    assert reader.broken <= len(lines) - len(finished) - len(started)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_rubbish_in_a_segment(tmp_path_factory: pytest.TempPathFactory, rubbish: bytes) -> None:
    """Whatever is in a file, the reader reads through to its end and raises nothing."""
    folder = tmp_path_factory.mktemp("rubbish")
    (folder / "00000001.log").write_bytes(rubbish + b"\n")
    reader = JournalReader(str(folder))
    assert reader.read(MUCH) == ([], [])
    reader.commit()
    assert reader.consumed == len(rubbish) + 1
    shutil.rmtree(folder)


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


def test_a_reader_that_meets_the_next_segment(journal: Journal) -> None:
    """A line that is written between two looks at a segment, just before the next one begins, is not skipped."""
    reader = JournalReader(journal.folder)
    seen: dict[int, str] = {}
    for _ in range(40):
        number = start(journal)
        finish(journal, number)
        seen |= read_all(reader, 1)
    assert seen == dict.fromkeys(range(1, 41), "completed")
    assert reader.read(1) == ([], [])
    assert reader.consumed == journal.written


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
