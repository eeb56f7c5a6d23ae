"""What several tests of the relay floor share: sinks, readers, relays that run in a nursery."""

from __future__ import annotations

import math

import pytest
import trio

from canal_trio.relay import Direction, FlowReceiver, HandoverStream, RelayReport, relay
from canal_trio.testing.simstream import SimLink, sim_stream_pair


async def take_all(receiver: FlowReceiver, sink=None) -> list[bytes]:
    """Everything until the flow is over."""
    pieces: list[bytes] = []
    while receiver.ending is None:
        pieces += await receiver.take(sink)
    return pieces


class Catch:
    """A sink that keeps what it receives, and asks to be disarmed after `calls` of them."""

    def __init__(self, stream: HandoverStream, calls: int = 1000) -> None:
        self.stream = stream
        self.calls = calls
        self.got: list[bytes | None] = []

    def __call__(self) -> bool:
        """Called by the stream."""
        data = self.stream.try_receive(100)
        if data is not None:
            self.got.append(data)
        return len(self.got) < self.calls and data != b""


async def arrives(condition) -> None:
    """Wait, with the kernel and the poller at work, until `condition()` is true."""
    with trio.fail_after(10):
        while not condition():
            await trio.lowlevel.checkpoint()


# -- exceptions, resets, closing ---------------------------------------------------------------------------------------


class OfSink(Exception):
    """Raised by a sink on purpose."""


def held_at_most(capacity: int, piece_bytes: int, handover_bytes: int) -> int:
    """The bound of docs/relay.md: batch, channel and both hands, or a hand-over's rest instead of the batch."""
    return max((2 * capacity + 2) * piece_bytes, max(piece_bytes, handover_bytes) + (capacity + 1) * piece_bytes)

PERFECT = SimLink()
PATHS = pytest.mark.parametrize("handover", [True, False], ids=["handover", "plain"])


class Running:
    """A relay between two simulated connections, started in a nursery; `report` once it is over."""

    report: RelayReport

    def __init__(self, *, handover=True, to_a=PERFECT, to_b=PERFECT, from_a=PERFECT, from_b=PERFECT, **options):
        self.left, self.a = sim_stream_pair(a_to_b=from_a, b_to_a=to_a, handover=handover)
        self.b, self.right = sim_stream_pair(a_to_b=to_b, b_to_a=from_b, handover=handover)
        self.options = options
        self.over_at = math.inf

    async def run(self) -> None:
        """Relay until it is over."""
        self.report = await relay(self.a, self.b, **self.options)
        self.over_at = trio.current_time()


async def all_of(stream) -> bytes:
    """Everything up to a proper end."""
    got = bytearray()
    while data := await stream.receive_some():
        got += data
    return bytes(got)


# -- taps and the report -----------------------------------------------------------------------------------------------


class Tap:
    """Keeps what it is told; raises when asked to."""

    def __init__(self, *, raises: bool = False) -> None:
        self.raises = raises
        self.pieces: list[tuple[Direction, bytes]] = []
        self.reports: list[RelayReport] = []

    def piece(self, direction: Direction, data: bytes) -> None:
        """See a piece."""
        self.pieces.append((direction, data))
        if self.raises:
            raise KeyError("a bug in a tap")

    def done(self, report: RelayReport) -> None:
        """See the end."""
        self.reports.append(report)
