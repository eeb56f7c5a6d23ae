"""TCP streams of our own over non-blocking sockets, and the protocol of hand-over on the spot.

`TcpStream` is a `trio.abc.HalfCloseableStream` that tries the system call first and waits only when it would block.
Beside the async methods, which always checkpoint, it has `try_` methods, which never checkpoint and never block, and
`arm(sink)`: while a sink is armed the poller calls it whenever the socket may be readable, and the owning task sleeps
in `wait_disarmed()`.

Invariants: one task receives and one sends at a time (`trio.BusyResourceError` otherwise). Readiness is
edge-triggered: `_readable` stays true until a receive proves that the kernel's buffer is empty, and a short read proves
that only if no hang-up was reported, because data and FIN may arrive as one edge. `close()` is synchronous and wakes
everybody with `trio.ClosedResourceError`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, final, runtime_checkable

import outcome
import trio
from trio.abc import HalfCloseableStream

from canal_trio.relay.poller import HANGUP, Poller

__all__ = ["Armed", "HandoverStream", "TcpStream", "handover_end"]

Buffer: TypeAlias = bytes | bytearray | memoryview
Armed: TypeAlias = Callable[[], bool]
"""Called when there may be bytes to receive; receives them itself. False: disarm me and wake my owner."""

DEFAULT_RECEIVE_BYTES = 16_384


@runtime_checkable
class HandoverStream(Protocol):
    """What a stream needs for hand-over on the spot. `TcpStream` and the test kit's `SimStream` have it."""

    hangup: bool
    """The peer was seen to hang up (FIN or reset). Bytes it sent before may still be waiting."""

    def try_receive(self, max_bytes: int) -> bytes | None:
        """Bytes that are here now, `b""` at the end of the stream, None if there is nothing yet."""

    def try_send(self, data: Buffer) -> int:
        """Pass on what the peer takes now; the number of bytes taken, perhaps 0."""

    def arm(self, sink: Armed) -> None:
        """Have `sink` called whenever there may be bytes, until it answers False."""

    def disarm(self) -> None:
        """Take the sink away, without waking anybody."""

    async def wait_disarmed(self) -> None:
        """Sleep until the sink answered False, raised (raised here) or the stream was closed (ClosedResourceError)."""

    def watch(self, callback: Callable[[], None] | None) -> None:
        """Have `callback` called, in the step that sees it, when the peer hangs up; None ends the watch."""

    def close(self) -> None:
        """Close in this very step. Idempotent."""


@final
class TcpStream(HalfCloseableStream):
    """A connected stream socket. Takes the socket over: makes it non-blocking and closes it in the end.

    Must be made inside `trio.run`. `socket` is the standard library's object, for options and addresses only.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.hangup = False
        self._recv = sock.recv
        self._send = sock.send
        self._fd = sock.fileno()
        self._readable = True
        self._closed = False
        self._receiver: trio.lowlevel.Task | None = None
        self._receiving = False
        self._sending = False
        self._eof_sent = False
        self._sink: Armed | None = None
        self._watch: Callable[[], None] | None = None
        self._fault: BaseException | None = None
        self._poller = Poller.current()
        self._poller.register(self._fd, self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "hung up" if self.hangup else "open"
        return f"<TcpStream fd {self._fd}, {state}{', armed' if self._sink else ''}>"

    # -- never a checkpoint, never blocks ------------------------------------------------------------------------------

    def try_receive(self, max_bytes: int) -> bytes | None:
        """Bytes that are here now, `b""` at the end of the stream, None if there is nothing yet.

        Raises `trio.BrokenResourceError` on a reset and `trio.ClosedResourceError` after `close()`.
        """
        if not self._readable and not self._closed:
            return None
        try:
            data = self._recv(max_bytes)
        except (BlockingIOError, InterruptedError):
            self._readable = False
            return None
        except OSError as exc:
            raise self._translate(exc) from exc
        if len(data) < max_bytes and not self.hangup and data:
            self._readable = False
        return data

    def try_send(self, data: Buffer) -> int:
        """Pass to the kernel what it takes now; the number of bytes taken, 0 when its buffer is full.

        Raises as `try_receive`.
        """
        try:
            return self._send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as exc:
            raise self._translate(exc) from exc

    def arm(self, sink: Armed) -> None:
        """Have `sink` called by the poller whenever there may be bytes, until it answers False or raises.

        Follow it with `wait_disarmed()`, which also serves what is waiting already. Raises `trio.BusyResourceError` if
        another task receives or another sink is armed, `trio.ClosedResourceError` after `close()`.
        """
        self._check_open()
        if self._receiving or self._sink is not None:
            raise trio.BusyResourceError("another task is receiving on this stream")
        self._sink = sink

    def disarm(self) -> None:
        """Take the sink away; the owner, if it sleeps, goes on sleeping. Idempotent."""
        self._sink = None

    def watch(self, callback: Callable[[], None] | None) -> None:
        """Have `callback` called, in the poller's step, when the peer hangs up (FIN or reset); None ends the watch.

        Not called for a hang-up that was seen before: look at `hangup` first. It must not raise.
        """
        self._watch = callback

    def close(self) -> None:
        """Close in this very step and wake every sleeper with `trio.ClosedResourceError`. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._sink = self._watch = None
        self._poller.unregister(self._fd)
        trio.lowlevel.notify_closing(self.socket)
        self.socket.close()
        self._wake(outcome.Error(trio.ClosedResourceError("this stream was closed")))

    # -- always a checkpoint -------------------------------------------------------------------------------------------

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As `trio.abc.ReceiveStream.receive_some`; 16 KiB at most unless told. Cancelling it loses nothing."""
        limit = DEFAULT_RECEIVE_BYTES if max_bytes is None else max_bytes
        if not isinstance(limit, int):
            raise TypeError("max_bytes is an integer or None")
        if limit < 1:
            raise ValueError("max_bytes is at least 1")
        with _Claim(self, "_receiving"):
            await trio.lowlevel.checkpoint_if_cancelled()
            self._raise_fault()
            data = self.try_receive(limit)
            if data is not None:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return data
            while data is None:
                await self._sleep()
                data = self.try_receive(limit)
            return data

    async def wait_disarmed(self) -> None:
        """Sleep while the armed sink is served, first with what is waiting already.

        Returns when the sink has answered False; what it raised is raised here. Cancelling disarms it in the very step
        of the `cancel()`. Raises `trio.ClosedResourceError` when the stream is closed meanwhile.
        """
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            while self._readable and self._sink is not None:
                if not self._sink():
                    self._sink = None
                await trio.lowlevel.checkpoint()
            self._check_open()
            self._raise_fault()
            if self._sink is not None:
                await self._sleep()
        finally:
            self._sink = None

    async def send_all(self, data: Buffer) -> None:
        """As `trio.abc.SendStream.send_all`. Cancelled, an unknown part was sent: only closing is sensible then."""
        await self.send_batch((data,))

    async def send_batch(self, pieces: Sequence[Buffer]) -> None:
        """Send `pieces` one after the other, gathered (sendmsg), not joined. Otherwise as `send_all`."""
        with _Claim(self, "_sending"):
            self._check_sendable()
            await trio.lowlevel.checkpoint_if_cancelled()
            rest = self.try_send_batch(pieces)
            if not rest:
                await trio.lowlevel.cancel_shielded_checkpoint()
            while rest:
                await self._wait_writable()
                rest = self.try_send_batch(rest)

    def try_send_batch(self, pieces: Sequence[Buffer]) -> list[memoryview]:
        """Pass as much of `pieces` to the kernel as it takes now; what it did not take. Not a checkpoint."""
        try:
            sent = self.socket.sendmsg(pieces) if pieces else 0
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as exc:
            raise self._translate(exc) from exc
        rest: list[memoryview] = []
        for piece in pieces:
            if sent < len(piece):
                rest.append(memoryview(piece)[sent:])
            sent = max(0, sent - len(piece))
        return rest

    async def wait_send_all_might_not_block(self) -> None:
        """As `trio.abc.SendStream.wait_send_all_might_not_block`."""
        with _Claim(self, "_sending"):
            self._check_open()
            await self._wait_writable()

    async def _wait_writable(self) -> None:
        # Rare (the kernel's buffer is full), so Trio's own one-shot epoll serves.
        await trio.lowlevel.wait_writable(self.socket)

    async def send_eof(self) -> None:
        """As `trio.abc.HalfCloseableStream.send_eof`. Idempotent."""
        with _Claim(self, "_sending"):
            self._check_open()
            await trio.lowlevel.checkpoint()
            self._check_open()
            if not self._eof_sent:
                self._eof_sent = True
                try:
                    self.socket.shutdown(socket.SHUT_WR)
                except OSError as exc:
                    raise self._translate(exc) from exc

    async def aclose(self) -> None:
        """`close()`, then a checkpoint."""
        self.close()
        await trio.lowlevel.checkpoint()

    # -- the poller's side ---------------------------------------------------------------------------------------------

    def on_ready(self, mask: int) -> bool:
        """The poller's call: `mask` became true. True asks for another turn."""
        self._readable = True
        if mask & HANGUP:
            self.hangup = True
            self._call_watch()
        sink = self._sink
        if sink is None:
            if self._receiving:  # a sleeper in `wait_disarmed` whose sink was taken away is not concerned
                self._wake(outcome.Value(None))
            return False
        try:
            armed = sink()
        except Exception as exc:
            self._sink = None
            self._fail(exc)
            return False
        if self._sink is not sink:
            return False  # closed or disarmed by what the sink called
        if armed:
            return self._readable
        self._sink = None
        self._wake(outcome.Value(None))
        return False

    def _call_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            try:
                watch()
            except Exception as exc:
                self._fail(exc)

    def _fail(self, exc: Exception) -> None:
        if self._receiver is None:
            self._fault = exc  # nobody sleeps just now: raised where the stream is used next
        else:
            self._wake(outcome.Error(exc))

    def _raise_fault(self) -> None:
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault

    def _wake(self, result: outcome.Outcome[None]) -> None:
        task, self._receiver = self._receiver, None
        if task is not None:
            trio.lowlevel.reschedule(task, result)

    async def _sleep(self) -> None:
        """Until something is readable, the sink is done, or the stream is closed."""

        def abort(_raise_cancel: Any) -> trio.lowlevel.Abort:
            self._receiver = self._sink = None
            return trio.lowlevel.Abort.SUCCEEDED

        self._receiver = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")

    def _check_sendable(self) -> None:
        self._check_open()
        if self._eof_sent:
            raise trio.ClosedResourceError("send_eof was called on this stream")

    def _translate(self, exc: OSError) -> trio.ClosedResourceError | trio.BrokenResourceError:
        if self._closed:
            return trio.ClosedResourceError("this stream was closed")
        return trio.BrokenResourceError(f"the connection broke: {exc.strerror or exc}")


class _Claim:
    """One task at a time: a second one gets BusyResourceError instead of interleaved bytes."""

    __slots__ = ("_flag", "_stream")

    def __init__(self, stream: TcpStream, flag: str) -> None:
        self._stream = stream
        self._flag = flag

    def __enter__(self) -> None:
        if getattr(self._stream, self._flag) or (self._flag == "_receiving" and self._stream._sink is not None):
            raise trio.BusyResourceError(f"another task is {self._flag[1:]} on this stream")
        setattr(self._stream, self._flag, True)

    def __exit__(self, *_: object) -> None:
        setattr(self._stream, self._flag, False)


def handover_end(stream: object) -> HandoverStream | None:
    """The stream itself if it can hand over, else the nearest transport below it (TLS) that can, else None.

    That is where a hang-up is seen without reading, and what closes in one step.
    """
    while stream is not None and not isinstance(stream, HandoverStream):
        stream = getattr(stream, "transport_stream", None)
    return stream
