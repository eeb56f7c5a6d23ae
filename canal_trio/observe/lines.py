"""Lines on a descriptor, written by one background thread, so that a blocked stderr never blocks the loop.

Invariants: `write()` never blocks and never raises; at most `capacity` lines wait; a line that finds no room is
dropped and counted, as is one that the descriptor does not take, and the count is written as a line of its own as soon
as there is room again. Half a line that a full disk took is ended before the next one begins. A line is rendered in
the thread, so the loop pays for a queue's put only, and the thread gathers for a moment before it looks: woken for each
line, it would take the interpreter's lock from the loop as often (measured: 15 % of a small exchange). Where lines are
many it gathers for longer.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import select
import threading
from collections.abc import Callable, Iterator
from typing import TypeAlias, final

__all__ = ["WHY_DROPPED", "Line", "LineWriter"]

Line: TypeAlias = bytes | Callable[[], bytes]
"""A whole line with its newline, or what renders it. Rendering runs in the writer's thread."""

BATCH_BYTES = 64 * 1024  # joined into one system call at most, so that a burst costs few of them
GATHER = 0.02  # seconds
GATHER_BUSY = 0.1  # seconds, behind a batch of `MANY` lines or more
MANY = 50
WHY_DROPPED = "the log is read too slowly, or could not be written"


@final
class LineWriter:
    """Writes lines to `fd` (2: stderr) from a thread of its own. The descriptor stays open and is not ours.

    `shared`: other processes write to `fd` as well, so that no write is larger than what a pipe takes as one (unless a
    single line is). `note` renders the line that tells how many lines were dropped; it may be set to another.
    """

    def __init__(
        self,
        fd: int = 2,
        *,
        capacity: int = 4096,
        shared: bool = False,
    ) -> None:
        self._fd = fd
        self._most = select.PIPE_BUF if shared else math.inf
        self.note: Callable[[int], bytes] = _note
        self._queue: queue.SimpleQueue[Line | None] = queue.SimpleQueue()  # bounded by `write`; put costs nothing
        self._capacity = capacity
        self._refused = 0  # lines that found no room; the loop's thread counts them
        self._lost = 0  # lines that the descriptor did not take; the writing thread counts those
        self._told = 0  # drops already told of
        self._torn = False  # what was written last does not end a line
        self._closed = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="canal_trio log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines lost so far."""
        return self._refused + self._lost

    def write(self, line: Line) -> bool:
        """Queue one line; False if it was dropped. From the loop's thread only; not a checkpoint."""
        if self._closed or self._queue.qsize() >= self._capacity:
            self._refused += 1
            return False
        self._queue.put(line)
        return True

    def close(self, timeout: float = 1.0) -> bool:
        """Write what is queued and end the thread; False if that took longer than `timeout` seconds. Idempotent.

        Blocks the caller for that long at most. A thread that is stuck in a blocked write is a daemon and is left
        behind.
        """
        if not self._closed:
            self._closed = True
            self._closing.set()
            self._queue.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # -- the thread's side ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        ending = False
        pause = GATHER
        while not ending:
            item = self._queue.get()
            self._closing.wait(pause)
            batch: list[bytes] = []
            size = 0
            while True:
                if item is None:
                    ending = True
                    break
                data = self._render(item)
                batch.append(data)
                size += len(data)
                if size >= BATCH_BYTES:
                    break
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
            for data in _joined(batch, self._most):
                self._lost += self._write(data)
            dropped = self.dropped
            if dropped > self._told and not self._write(self.note(dropped - self._told)):
                self._told = dropped
            pause = 0.0 if size >= BATCH_BYTES else GATHER_BUSY if len(batch) >= MANY else GATHER

    def _render(self, line: Line) -> bytes:
        try:
            return line if isinstance(line, bytes) else line()
        except Exception as exc:  # one bad record must not end the log
            return f"a log line could not be rendered: {type(exc).__name__}\n".encode()

    def _write(self, data: bytes) -> int:
        """Write whole lines. Answers how many of them were lost, the one that was cut included."""
        view = memoryview(b"\n" + data if self._torn else data)  # half a line must not begin the next one
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:  # somebody made the shared descriptor non-blocking
                with contextlib.suppress(OSError):
                    select.select([], [self._fd], [], 1.0)
            except OSError:  # the reader has gone, the disk is full
                rest = bytes(view)
                written = len(data) - len(rest)
                if written >= 0:
                    self._torn = written > 0 and not data.startswith(b"\n", written - 1)
                return rest.count(b"\n") - (len(rest) > len(data))
        self._torn = False
        return 0


def _note(count: int) -> bytes:
    return f"{count} log lines were dropped: {WHY_DROPPED}\n".encode()


def _joined(lines: list[bytes], most: float) -> Iterator[bytes]:
    """Whole lines together, as many as fit into `most` bytes."""
    start = size = 0
    for number, line in enumerate(lines):
        if size and size + len(line) > most:
            yield b"".join(lines[start:number])
            start, size = number, 0
        size += len(line)
    if size:
        yield b"".join(lines[start:])
