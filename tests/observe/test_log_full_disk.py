"""The log's writer on a disk that has no room, and then has some again."""

from __future__ import annotations

import errno
import json
import os
import threading

import pytest

from canal_trio.observe.lines import LineWriter
from canal_trio.observe.log import logging_to


class FullDisk:
    """An `os.write` that takes only so many bytes in all, then says that the disk is full."""

    def __init__(self) -> None:
        self.room = 0
        self.refused = threading.Semaphore(0)
        self._write = os.write

    def __call__(self, fd: int, data: bytes) -> int:
        """As the system call."""
        if self.room <= 0:
            self.refused.release()
            raise OSError(errno.ENOSPC, "No space left on device")
        count = self._write(fd, data[: self.room])
        self.room -= count
        return count


@pytest.mark.parametrize(
    ("room", "first", "lost"),
    [
        (0, b"", 2),
        (2, b"on\n", 2),
        (4, b"one\n", 1),
        (6, b"one\ntw\n", 1),
        (7, b"one\ntwo\n", 1),  # only the end of the line did not get through
    ],
)
def test_a_full_disk_glued_two_lines_together_and_what_it_cost_was_never_told(
    monkeypatch: pytest.MonkeyPatch, room: int, first: bytes, lost: int
) -> None:
    """Once a full disk has room again, each line begins anew, and how many were lost is told once."""
    read, write = os.pipe()
    disk = FullDisk()
    monkeypatch.setattr(os, "write", disk)
    disk.room = room
    writer = LineWriter(write)
    with logging_to(writer, "json"):
        writer.write(b"one\ntwo\n")
        for _ in ("the lines", "how many were lost"):
            assert disk.refused.acquire(timeout=10)
        assert writer.dropped == lost
        disk.room = 1 << 20
        writer.write(b"three\n")
        assert writer.close(10)
    os.close(write)
    with open(read, "rb") as file:
        said = file.read()
    assert said.startswith(first + b"three\n")
    (note,) = said[len(first + b"three\n") :].splitlines()
    told = json.loads(note)
    assert (told["kind"], told["level"]) == ("log", "warning")
    assert told["message"].startswith(f"{lost} log lines were dropped")
    assert writer.dropped == lost
