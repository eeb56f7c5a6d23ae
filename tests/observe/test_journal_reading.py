"""The journal is read by another thread, or by whoever comes after: in order, once, whatever was cut."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_kit import MUCH, finish, read, read_all, start
from ledger_kit import admitted, outcomes, record

from canal_trio.observe.ledger import sqlite
from canal_trio.observe.ledger.filler import Filler
from canal_trio.observe.ledger.journal import CHUNK, Journal, JournalReader
from canal_trio.observe.ledger.rows import Row, decode, ended, lines_of, opened
from canal_trio.observe.ledger.sqlite import SqliteStore
from canal_trio.observe.ledger.store import StoreError


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """An empty one with small segments."""
    made = Journal(str(tmp_path / "j"), instance="gw", most_bytes=MUCH, segment_bytes=2000)
    yield made
    made.close()


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
    assert read(reader) == read(reader) == read(JournalReader(journal.folder))
    reader.commit()
    assert read(reader) == ([], [])
    finish(journal, start(journal))
    assert [row.seq for row in read(reader)[1]] == [2]


def test_a_row_that_ended_in_the_same_batch_is_written_once(journal: Journal) -> None:
    """A short exchange costs the store one row, not two."""
    finish(journal, start(journal))
    started, finished = read(JournalReader(journal.folder))
    assert (started, [row.seq for row in finished]) == ([], [1])


def test_many_rows_are_stored_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that one read finds is one transaction, a bounded number of rows at a time; one that runs comes last, and one
    that ends in a later piece comes once. If the store fails in the middle, all of it is read again."""
    journal = Journal(str(tmp_path / "j"), instance="gw", most_bytes=MUCH)
    numbers = [start(journal) for _ in range(2 * CHUNK + 188)]
    for number in numbers[:-1]:
        finish(journal, number)
    reader = JournalReader(journal.folder)
    chunks = list(reader.read(MUCH))
    sizes = [(len(started), len(finished)) for started, finished in chunks]
    assert sizes == [(0, CHUNK), (0, CHUNK), (1, 187)]
    assert reader.rows == 2 * CHUNK + 187
    store = SqliteStore(str(tmp_path / "l.db"))
    filler = Filler(journal, store, str(tmp_path / "j"))
    insert, inserted = sqlite._insert, []

    def fails_once(connection: Any, run: Any, rows: Any, conflict: str) -> None:
        if len(inserted) == 3:
            inserted.append(0)
            raise sqlite3.OperationalError("database or disk is full")
        inserted.append(len(rows))
        insert(connection, run, rows, conflict)

    monkeypatch.setattr(sqlite, "_insert", fails_once)
    with pytest.raises(StoreError, match="disk is full"):
        filler.step()
    assert (filler.rows, filler.applied, outcomes(str(tmp_path / "l.db"))) == (0, 0, {})
    assert filler.step() is False
    assert (filler.rows, filler.applied) == (2 * CHUNK + 187, journal.written)
    assert outcomes(str(tmp_path / "l.db")) == {"completed": 2 * CHUNK + 187, "open": 1}
    filler.finish()


def test_cut_in_the_middle_of_a_line(journal: Journal) -> None:
    """Cut at any byte, as by a kill, whole lines are rows and the rest is none; so it is before a later segment."""
    finish(journal, start(journal))
    (path,) = Path(journal.folder).glob("*.log")
    data = path.read_bytes()
    for cut in range(0, len(data), 7):
        path.write_bytes(data[:cut])
        whole = data[:cut].count(b"\n")
        started, finished = read(JournalReader(journal.folder))
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
    started, finished = read(reader)
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
    reader.commit()
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
    started, finished = read(reader)
    reader.commit()
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
    assert read(reader) == ([], [])
    reader.commit()
    assert reader.consumed == len(rubbish) + 1
    shutil.rmtree(folder)


def test_a_reader_that_meets_the_next_segment(journal: Journal) -> None:
    """A line that is written between two looks at a segment, just before the next one begins, is not skipped."""
    reader = JournalReader(journal.folder)
    seen: dict[int, str] = {}
    for _ in range(40):
        number = start(journal)
        finish(journal, number)
        seen |= read_all(reader, 1)
    assert seen == dict.fromkeys(range(1, 41), "completed")
    assert read(reader, 1) == ([], [])
    assert reader.consumed == journal.written
