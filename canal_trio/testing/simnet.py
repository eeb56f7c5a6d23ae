"""A simulated network around a gateway: its ends of all connections, watched to the scheduler's step.

Each end that the gateway holds notes when bytes moved on it, in which step the other side's leaving was noticed and in
which it was closed, for whom it was used, and how many bytes are in the gateway between two of them. Invariant: it
only looks; the streams behave as those of `simstream`, with the hand-over protocol or without it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, final

import trio

from canal_trio.relay.handover import Buffer
from canal_trio.testing.plans import Plan
from canal_trio.testing.simlink import Pipe, SimLink, current_wheel
from canal_trio.testing.simstream import HandoverSimStream, SimStream

__all__ = ["WHO", "GatewayEnd", "HandoverEnd", "Moment", "SimNetwork", "Steps", "Trace", "Use", "WrappedEnd"]

WHO: ContextVar[int] = ContextVar("canal_trio.testing.simnet")
"""The client for whom the present task of the gateway works."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A step of the scheduler, and its time."""

    time: float
    step: int


@final
class Steps(trio.abc.Instrument):
    """Counts the steps of all tasks; `spent` is called once when there were more than `budget`."""

    def __init__(self, budget: int, spent: Callable[[], None]) -> None:
        self.count = 0
        self._budget = budget
        self._spent = spent

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """One more."""
        self.count += 1
        if self.count == self._budget:
            self._spent()


class SimNetwork:
    """What all ends share: the clock, the trace, the complaints. `traced` gets a line for everything that moves."""

    def __init__(self, steps: Steps, plan: Plan, *, handover: bool, traced: Callable[[str], None] | None) -> None:
        self.steps = steps
        self.plan = plan  # grows by the clients that come when all is over
        self.handover = handover
        self.traced = traced
        self.start = trio.current_time()
        self.ends: list[GatewayEnd] = []
        self.moved: dict[int, float] = {}  # per client: when bytes last moved for it
        self.turn: dict[int, int] = {}  # per client: how many of its exchanges are over
        self.uploaded: dict[int, int] = {}  # per client: bytes that went upstream for its present exchange
        self.complaints: list[str] = []
        self.first_sent: Callable[[int, int], None] | None = None  # of an exchange: (client, which of its exchanges)

    @property
    def now(self) -> Moment:
        """The present step."""
        return Moment(trio.current_time(), self.steps.count)

    def note(self, who: str, what: str) -> None:
        """A line for the trace."""
        if self.traced is not None:
            self.traced(f"{trio.current_time() - self.start:12.6f} {self.steps.count:7d}  {who:<12} {what}")

    def pair(self, name: str, to_gateway: SimLink, from_gateway: SimLink) -> tuple[GatewayEnd, HandoverSimStream]:
        """The gateway's end and the other one. Not a checkpoint."""
        wheel = current_wheel()
        there, back = Pipe(from_gateway, wheel), Pipe(to_gateway, wheel)
        kind = GatewayEnd if self.plan.bare and not self.handover and name.startswith("c") else HandoverEnd
        ours, theirs = kind(back, there), HandoverSimStream(there, back)
        ours.join(self, name)
        there.writer = back.reader = ours
        there.reader = back.writer = theirs
        there.start()
        back.start()
        self.ends.append(ours)
        return ours, theirs

    def for_gateway(self, end: GatewayEnd) -> trio.abc.Stream:
        """What the gateway is given: on the plain path nothing that can hand over, though its transport may."""
        if self.handover or not isinstance(end, HandoverEnd):
            return end
        return WrappedEnd(end)


@dataclass(slots=True)
class Use:
    """An upstream connection worked for exchange `number` of a client, whose first byte was sent at `asked`."""

    client: int
    number: int
    asked: Moment


class GatewayEnd(SimStream):
    """An end of a simulated connection that the gateway holds."""

    def join(self, network: SimNetwork, name: str) -> None:
        """Become a part of `network`. Called once, before anything else."""
        self.network = network
        self.name = name
        self.client = int(name[1:]) if name.startswith("c") else -1
        self.noticed: list[Moment] = []  # the other side's leaving was seen, so and so often
        self.broke: list[Moment] = []  # …and it was more than an end of what the other side says
        self.closed_at: Moment | None = None
        self.received = 0
        self.heard = -math.inf  # when that was, the last time
        self.sent = 0
        self.uses: list[Use] = []
        self.measure: Callable[[], None] | None = None  # called when something was received
        self.raises: int | None = None  # a bug: sending raises beyond this byte

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def _moved(self) -> None:
        client = self.client if self.client >= 0 else self.uses[-1].client if self.uses else -1
        self.network.moved[client] = trio.current_time()

    def _notice(self, how: str) -> None:
        self.noticed.append(self.network.now)
        if self.incoming.broken or how == "a broken pipe":
            self.broke.append(self.network.now)
        self.network.note(self.name, f"sees {how}")
        self._moved()

    def close(self) -> None:
        """As the stream, noting when."""
        if self.closed_at is None:
            self.closed_at = self.network.now
            self.network.note(self.name, "closed by the gateway")
        super().close()

    def reset(self) -> None:
        """As the stream."""
        self.network.note(self.name, "reset by the gateway")
        super().reset()

    def on_ready(self) -> None:
        """As the stream; where the gateway watches for a hang-up it notices it here."""
        if self._watch is not None and self.incoming.end is not None and not self._closed:
            self._notice("a hang-up")
        super().on_ready()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As the stream; an end that it returns or raises is noticed in the step in which it does."""
        try:
            data = await super().receive_some(max_bytes)
        except trio.BrokenResourceError:
            self._notice("a reset")
            raise
        if not data:
            self._notice("the end")
        return data

    async def send_all(self, data: Buffer) -> None:
        """As the stream."""
        try:
            await super().send_all(data)
        except trio.BrokenResourceError:
            self._notice("a broken pipe")
            raise

    def _receive(self, max_bytes: int) -> bytes | None:
        data = super()._receive(max_bytes)
        if data:
            self.received += len(data)
            self.heard = trio.current_time()
            self._moved()
            if self.network.traced is not None:
                self.network.note(self.name, f"-> {_shown(data)}")
            if self.measure is not None:
                self.measure()
        return data

    def _send(self, data: Buffer) -> int:
        if self.client < 0:
            client = WHO.get()
            number = self.network.turn.get(client, 0)
            if not (self.uses and (self.uses[-1].client, self.uses[-1].number) == (client, number)):
                self.uses.append(Use(client, number, self.network.now))
                if self.network.first_sent is not None:
                    self.network.first_sent(client, number)
        if self.raises is not None:
            if self.sent >= self.raises:
                raise ZeroDivisionError("a planted bug in a stream")
            data = memoryview(data)[: self.raises - self.sent + 1]
        sent = super()._send(data)
        if sent:
            self.sent += sent
            self._moved()
            if self.client < 0:
                uploaded = self.network.uploaded
                uploaded[self.uses[-1].client] = uploaded.get(self.uses[-1].client, 0) + sent
            if self.network.traced is not None:
                self.network.note(self.name, f"<- {_shown(bytes(memoryview(data)[:sent]))}")
        return sent

    async def send_eof(self) -> None:
        """As the stream."""
        await super().send_eof()
        self.network.note(self.name, "<- the end")


class HandoverEnd(GatewayEnd, HandoverSimStream):
    """The same with the hand-over protocol."""

    def try_send(self, data: Buffer) -> int:
        """As the stream."""
        try:
            return super().try_send(data)
        except trio.BrokenResourceError:
            self._notice("a broken pipe")
            raise


class WrappedEnd(trio.abc.HalfCloseableStream):
    """A Trio stream without the hand-over protocol over an end that has it, as a TLS stream is over its socket."""

    def __init__(self, inner: GatewayEnd) -> None:
        self.transport_stream = inner

    async def send_all(self, data: Buffer) -> None:
        """As the stream below."""
        await self.transport_stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """As the stream below."""
        await self.transport_stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As the stream below."""
        return await self.transport_stream.receive_some(max_bytes)

    async def send_eof(self) -> None:
        """As the stream below."""
        await self.transport_stream.send_eof()

    async def aclose(self) -> None:
        """As the stream below."""
        await self.transport_stream.aclose()


@dataclass
class Trace:
    """What happened, as lines, or as no more than a digest of them."""

    keep: bool = False
    lines: list[str] = field(default_factory=list)
    _digest: Any = field(default_factory=hashlib.sha256)

    def __call__(self, line: str) -> None:
        """One more."""
        self._digest.update(line.encode())
        if self.keep:
            self.lines.append(line)

    @property
    def digest(self) -> str:
        """Of all lines: two runs of one seed have the same."""
        return str(self._digest.hexdigest())


def _shown(data: bytes) -> str:
    return f"{len(data):6d} bytes {data[:48]!r}{' …' if len(data) > 48 else ''}"
