"""A simulated connection: two streams in memory with bounds, latency and faults, exact under virtual time.

Unlike `trio.testing.memory_stream_pair`, each direction holds only so many bytes, so that backpressure is real; and it
can be told to go wrong at an exact byte. What arrives is announced by a task of the run (as the poller does for real
sockets), so that a sink is never called from inside the send that fed it. With a `MockClock` everything is
deterministic. The streams are held to Trio's contract suite.

    async def test_a_cut_is_not_an_end(autojump_clock):
        cut = SimLink(faults=[Fault(FaultKind.RESET, at=3)])
        client, server = sim_stream_pair(b_to_a=cut)
        await server.send_all(b"abc")
        assert await client.receive_some() == b"abc"
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import outcome
import trio
from trio.abc import HalfCloseableStream

from canal_trio.relay.course import Sleeper, checkpoint_if_cancelled, shielded_checkpoint, sleep, sleeper, wake
from canal_trio.relay.handover import Armed, Buffer, OneSender, receive_limit, settled
from canal_trio.testing.simlink import End, Fault, FaultKind, Pipe, SimLink, current_wheel

__all__ = ["Fault", "FaultKind", "HandoverSimStream", "SimLink", "SimStream", "sim_stream_pair"]


class SimStream(HalfCloseableStream):
    """One end of a simulated connection; made by `sim_stream_pair`.

    A `trio.abc.HalfCloseableStream`. The end that can also hand over implements `canal_trio.relay.HandoverStream`.
    """

    parks = True

    def __init__(self, incoming: Pipe, outgoing: Pipe) -> None:
        self.incoming = incoming
        self.outgoing = outgoing
        self._closed = False
        self._receiver: Sleeper | None = None
        self._sender: trio.lowlevel.Task | None = None
        self._receiving = False
        self._sending = False
        self._sink: Armed | None = None
        self._watch: Callable[[], None] | None = None
        self._fault: BaseException | None = None
        self.hangup = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "hung up" if self.hangup else "open"
        return f"<{type(self).__name__} {state}, {self.incoming.unread} bytes to come>"

    @property
    def unread(self) -> int:
        """Bytes the other end has sent and this one has not received."""
        return self.incoming.unread

    @property
    def broken(self) -> bool:
        """The other end was seen to reset the connection; as the kernel tells it, without a read."""
        return self.incoming.broken

    @property
    def closed(self) -> bool:
        """`close()` or `aclose()` was called."""
        return self._closed

    def reset(self) -> None:
        """Break the connection now, both ways, for both ends."""
        self.incoming.snap()
        self.outgoing.snap()

    def close(self) -> None:
        """Close in this very step. Idempotent. As with TCP, the other end is reset if bytes of it were not received."""
        if self._closed:
            return
        self._closed = True
        self._sink = self._watch = None
        self.outgoing.finish(End.BROKEN if self.incoming.unread else End.EOF)
        self.incoming.abandon()
        gone = trio.ClosedResourceError("this stream was closed")
        self._wake_receiver(outcome.Error(gone))
        self._wake_sender(outcome.Error(gone))

    async def aclose(self) -> None:
        """`close()`, then a checkpoint."""
        self.close()
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As `trio.abc.ReceiveStream.receive_some`."""
        limit = receive_limit(max_bytes, self.incoming.link.buffer)
        self._check_receiver()
        await checkpoint_if_cancelled()
        self._check_receiver()
        data = self._receive(limit)
        if data is not None:
            await shielded_checkpoint()
            return data
        self._receiving = True
        try:
            while data is None:
                await self._sleep()
                data = self._receive(limit)
        finally:
            self._receiving = False
        return data

    async def send_all(self, data: Buffer) -> None:
        """As `trio.abc.SendStream.send_all`."""
        with OneSender(self):
            await trio.lowlevel.checkpoint_if_cancelled()
            view = memoryview(data).cast("B")
            view = view[self._send(view) :]
            if not view:
                await trio.lowlevel.cancel_shielded_checkpoint()
            while view:
                await self._wait_room()
                view = view[self._send(view) :]

    async def wait_send_all_might_not_block(self) -> None:
        """As `trio.abc.SendStream.wait_send_all_might_not_block`."""
        with OneSender(self):
            self._check_open()
            await trio.lowlevel.checkpoint()
            await self._wait_room()
            self._check_open()

    async def send_eof(self) -> None:
        """As `trio.abc.HalfCloseableStream.send_eof`."""
        with OneSender(self):
            self._check_open()
            await trio.lowlevel.checkpoint()
            self._check_open()
            self.outgoing.finish(End.EOF)

    # -- shared by both kinds ------------------------------------------------------------------------------------------

    def _receive(self, max_bytes: int) -> bytes | None:
        self._check_open()
        self._raise_fault()
        data = self.incoming.receive(max_bytes)
        if not data:
            if self.incoming.end is None:
                return None
            if self.incoming.end is End.BROKEN:
                raise trio.BrokenResourceError("the simulated connection was reset")
        return data

    def _send(self, data: Buffer) -> int:
        self._check_open()
        if self.outgoing.sealed is End.EOF:
            raise trio.ClosedResourceError("send_eof was called on this stream")
        if self.outgoing.sealed is End.BROKEN:
            raise trio.BrokenResourceError("the simulated connection broke")
        return self.outgoing.send(data)

    def on_ready(self) -> None:
        """Something has arrived: bytes, or an end."""
        if self._closed:
            return
        if self.incoming.end is not None:
            self.hangup = True
            watch, self._watch = self._watch, None
            if watch is not None:
                watch()
        sink = self._sink
        if sink is None:
            if self._receiving:
                self._wake_receiver(outcome.Value(None))
            return
        try:
            armed = settled(sink())
        except BaseException as exc:
            self._sink = None
            self._fault = exc
            self._wake_receiver(outcome.Value(None))
            return
        if self._sink is sink:
            if not armed:
                self._sink = None
                self._wake_receiver(outcome.Value(None))
            elif self.incoming.readable:
                self.incoming.nudge()  # it left something: another turn, after the others had theirs

    def on_room(self) -> None:
        """There is room again, or there never will be."""
        self._wake_sender(outcome.Value(None))

    def _wake_receiver(self, result: outcome.Outcome[None]) -> None:
        one, self._receiver = self._receiver, None
        wake(one, result)

    def _wake_sender(self, result: outcome.Outcome[None]) -> None:
        task, self._sender = self._sender, None
        if task is not None:
            trio.lowlevel.reschedule(task, result)

    async def _sleep(self) -> None:
        def abort(_raise_cancel: Any) -> trio.lowlevel.Abort:
            self._receiver = self._sink = None
            return trio.lowlevel.Abort.SUCCEEDED

        self._receiver = sleeper()
        await sleep(abort)

    async def _wait_room(self) -> None:
        def abort(_raise_cancel: Any) -> trio.lowlevel.Abort:
            self._sender = None
            return trio.lowlevel.Abort.SUCCEEDED

        while not self._closed and self.outgoing.sealed is None and self.outgoing.room < 1:
            self._sender = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(abort)

    def _check_receiver(self) -> None:
        if self._receiver is not None or self._sink is not None:
            raise trio.BusyResourceError("another task is receiving on this stream")

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")

    def _raise_fault(self) -> None:
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault


class HandoverSimStream(SimStream):
    """A SimStream with the hand-over protocol."""

    def try_receive(self, max_bytes: int) -> bytes | None:
        """See `canal_trio.relay.HandoverStream`; so for what follows."""
        return self._receive(max_bytes)

    def try_send(self, data: Buffer) -> int:
        """Pass on what the other end takes now."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        return self._send(data)

    def try_send_batch(self, pieces: Sequence[Buffer]) -> list[memoryview]:
        """The same for several pieces."""
        for index, piece in enumerate(pieces):
            sent = self.try_send(piece)
            if sent < len(piece):
                return [memoryview(piece)[sent:], *(memoryview(later) for later in pieces[index + 1 :])]
        return []

    def arm(self, sink: Armed) -> None:
        """Have `sink` called when something arrives."""
        self._check_open()
        self._check_receiver()
        self._sink = sink

    def disarm(self) -> None:
        """Take the sink away."""
        self._sink = None

    async def wait_disarmed(self) -> None:
        """Sleep until the sink is gone."""
        try:
            sink, self._sink = self._sink, None  # who is cancelled already is not served while the news travels
            await trio.lowlevel.checkpoint_if_cancelled()
            self._sink = sink
            self._check_open()
            self._raise_fault()
            if self._sink is None:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return
            self.incoming.nudge()  # what is here already counts as news
            await self._sleep()
            self._raise_fault()
        except trio.ClosedResourceError:
            self._raise_fault()  # what the sink raised after it had closed the stream
            raise
        finally:
            self._sink = None

    def watch(self, callback: Callable[[], None] | None) -> None:
        """Have `callback` called when the other end hangs up."""
        self._watch = callback


PERFECT = SimLink()


def sim_stream_pair(
    *, a_to_b: SimLink = PERFECT, b_to_a: SimLink = PERFECT, handover: bool = True
) -> tuple[SimStream, SimStream]:
    """Two connected streams, `a` and `b`. Not a checkpoint; must be called inside `trio.run`.

    `a_to_b` and `b_to_a` say how each direction behaves. With `handover` the streams implement
    `canal_trio.relay.HandoverStream` as well, without it they are plain Trio streams.
    """
    wheel = current_wheel()
    there, back = Pipe(a_to_b, wheel), Pipe(b_to_a, wheel)
    kind = HandoverSimStream if handover else SimStream
    a, b = kind(back, there), kind(there, back)
    there.writer = back.reader = a
    there.reader = back.writer = b
    there.start()
    back.start()
    return a, b
