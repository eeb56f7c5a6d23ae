"""One worker as its supervisor sees it: a process, its control channel, and what it was last heard to say.

Spawned by `python -m canal_trio worker FD`, never forked with the loop in it. Invariant: when `live` returns or is
cancelled, there is no process and no socket.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, final

import trio

from canal_trio.serve.control import (
    Accepting,
    Ask,
    Channel,
    Failed,
    Family,
    Message,
    Reload,
    Reloaded,
    Report,
)
from canal_trio.serve.limits import Capacity

__all__ = ["Worker"]

REAP = 5.0  # seconds for a killed process to be gone, and for the last words of one that ended

T = TypeVar("T", Reloaded, Report)


@final
class Worker:
    """The worker `number`, through all the processes that are it one after the other."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.accepting: Accepting | None = None  # None while it does not
        self.complaint = ""  # why it could not start
        self.code: int | None = None  # how its last process ended; negative: by that signal
        self.metrics: list[Family] = []  # when it was last asked
        self._process: trio.Process | None = None
        self._channel: Channel | None = None
        self._asked = 0
        self._answers: dict[int, tuple[trio.Event, list[Any]]] = {}
        self._one_reload = trio.Lock()

    def __repr__(self) -> str:
        return f"<Worker {self.number}, {'accepting' if self.accepting else 'not accepting'}>"

    @property
    def capacity(self) -> Capacity | None:
        """What it may use, while it accepts."""
        told = self.accepting
        return None if told is None else Capacity(told.connections, told.descriptors, told.wanted)

    @property
    def fate(self) -> str:
        """How its last process ended, for people."""
        if self.code is not None and self.code < 0:
            try:
                return f"died of {signal.Signals(-self.code).name}"
            except ValueError:
                return f"died of signal {-self.code}"
        return f"ended with exit code {self.code}"

    async def live(
        self, orders: Callable[[], Sequence[Message]], accepting: Callable[[], None], inherited: Sequence[int] = ()
    ) -> None:
        """Run one process to its end; `code` says how it was. A checkpoint. Cancelled, the process is killed.

        `orders` gives what it is told first, as of when it can be told anything; others follow in the order in which
        they are given. `accepting` is called when it accepts connections. It has the descriptors `inherited`, too.
        """
        self.complaint, self.metrics = "", []
        ours, theirs = socket.socketpair()
        channel = Channel(ours)
        process: trio.Process | None = None
        try:
            try:
                process = self._process = await _spawn(theirs.fileno(), inherited)
            except OSError as exc:
                self.complaint, self.code = f"cannot start a process: {exc.strerror or exc}", 1
                return
            finally:
                theirs.close()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, channel, accepting)
                self._channel = channel
                for order in orders():  # from here on no checkpoint lies before the first one is on its way
                    await channel.send(order)
                self.code = await process.wait()
                self.accepting = None
                # What it said last is still in the channel, and behind it the end.
                nursery.cancel_scope.deadline = trio.current_time() + REAP
        finally:
            self.accepting = self._process = self._channel = None
            channel.close()
            for event, _ in self._answers.values():
                event.set()
            if process is not None and process.returncode is None:
                process.kill()
                with trio.CancelScope(shield=True, deadline=trio.current_time() + REAP):
                    await process.wait()

    async def _listen(self, channel: Channel, accepting: Callable[[], None]) -> None:
        while (message := await channel.receive()) is not None:
            match message:
                case Accepting():
                    self.accepting = message
                    accepting()
                case Failed():
                    self.complaint = message.reason
                case Reloaded():
                    self._answered(0, message)
                case Report():
                    if message.metrics:
                        self.metrics = message.metrics
                    self._answered(message.id, message)

    def _answered(self, number: int, message: Message) -> None:
        if number in self._answers:
            event, found = self._answers[number]
            found.append(message)
            event.set()

    async def say(self, message: Message, *, within: float) -> None:
        """Give an order, if there is a process to take it in time. A checkpoint."""
        await trio.lowlevel.checkpoint()
        if self._channel is not None:
            with trio.move_on_after(within):
                await self._channel.send(message)

    async def ask(self, question: Ask | Reload, kind: type[T], *, within: float) -> T | None:
        """Its answer; None if there is nobody or it takes longer than `within` seconds. A checkpoint."""
        if isinstance(question, Reload):  # answers to it carry no number: there is one at a time
            async with self._one_reload:
                return await self._ask(question, 0, kind, within)
        self._asked += 1
        return await self._ask(Ask(self._asked, question.what), self._asked, kind, within)

    async def _ask(self, question: Message, number: int, kind: type[T], within: float) -> T | None:
        event, found = self._answers[number] = (trio.Event(), [])
        try:
            with trio.move_on_after(within):
                await self.say(question, within=within)
                if self._channel is not None:
                    await event.wait()
        finally:
            del self._answers[number]
        return found[0] if found and isinstance(found[0], kind) else None

    def kill(self) -> bool:
        """End its process at once; False if there is none. Not a checkpoint."""
        if self._process is None or self._process.returncode is not None:
            return False
        self._process.kill()
        return True


async def _spawn(control: int, inherited: Sequence[int]) -> trio.Process:
    # A process group of its own: a terminal's Ctrl-C is for the supervisor alone, who passes it on as an order.
    return await trio.lowlevel.open_process(
        [*_python(), "-m", "canal_trio", "worker", str(control)],
        stdin=subprocess.DEVNULL,
        pass_fds=[control, *inherited],
        process_group=0,
    )


def _python() -> list[str]:
    """The interpreter. It must find the same package as we did: the working directory counts if it did for us."""
    here = bool(sys.path) and sys.path[0] in ("", os.getcwd())
    return [sys.executable] if here else [sys.executable, "-P"]
