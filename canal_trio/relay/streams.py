"""TCP streams of our own over non-blocking sockets.

`TcpStream` is a `trio.abc.HalfCloseableStream` that tries the system call first and waits only when it would block.
Beside the async methods, which always checkpoint, it has `try_` methods, which never checkpoint and never block, and
`arm(sink)`: while a sink is armed the poller calls it whenever the socket may be readable, and the owning task sleeps
in `wait_disarmed()`.

Invariants: one task receives and one sends at a time (`trio.BusyResourceError` otherwise). Readiness is
edge-triggered: `_readable` stays true until a receive proves that the kernel's buffer is empty, and a short read proves
that only if no hang-up was reported, because data and FIN may arrive as one edge. The kernel tells of a reset once and
reports a clean end from then on, so a stream that broke is remembered as broken, whichever side heard of it: a reset is
never mistaken for an end. `close()` is synchronous and wakes everybody with `trio.ClosedResourceError`.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Self, final

import outcome
import trio
from trio.abc import HalfCloseableStream

from canal_trio.relay.course import Sleeper, checkpoint_if_cancelled, shielded_checkpoint, sleep, sleeper, wake
from canal_trio.relay.handover import Armed, Buffer, HandoverStream, OneSender, handover_end, receive_limit, settled
from canal_trio.relay.poller import HANGUP, ROUNDS, Poller

__all__ = ["Armed", "HandoverStream", "TcpStream", "handover_end"]

DEFAULT_RECEIVE_BYTES = 16_384
JOINED = 4096  # bytes: up to here a copy costs less than the call that gathers
GATHER = 1024  # IOV_MAX: the most buffers of one sendmsg
# What send and shutdown say of a stream whose incoming half may have ended properly: no verdict on what was received.
_HARMLESS = frozenset({errno.EPIPE, errno.ENOTCONN})
_AT_ONCE = struct.pack("ii", 1, 0)  # socket(7): linger for no time, so close with a reset


@final
class TcpStream(HalfCloseableStream):
    """A connected stream socket. Takes the socket over: makes it non-blocking and closes it in the end.

    Must be made inside `trio.run`, and stays watched until it is closed. It sets no options: for a stream of small
    pieces TCP_NODELAY is wanted, for early backpressure TCP_NOTSENT_LOWAT (`adopt` brings both). `socket` is the
    standard library's object, for options and addresses only.
    """

    parks = True

    __slots__ = (
        "__weakref__",
        "_broken",
        "_closed",
        "_eof_sent",
        "_fault",
        "_fd",
        "_poller",
        "_readable",
        "_receiver",
        "_receiving",
        "_sending",
        "_sink",
        "_steps",
        "_watch",
        "hangup",
        "socket",
    )

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.hangup = False
        self._fd = sock.fileno()
        self._readable = True
        self._closed = False
        self._broken: str | None = None
        self._receiver: Sleeper | None = None
        self._receiving = False
        self._sending = False
        self._eof_sent = False
        self._sink: Armed | None = None
        self._watch: Callable[[], None] | None = None
        self._fault: BaseException | None = None
        self._poller = Poller.current()
        self._steps = self._poller.steps
        self._poller.register(self._fd, self)

    @classmethod
    def adopt(cls, stream: trio.SocketStream) -> Self:
        """The same connection, with the options Trio gave it; `stream` is empty afterwards. Not a checkpoint.

        For what `trio.serve_tcp` and `trio.open_tcp_stream` give. No task may be using `stream`.
        """
        inner = stream.socket
        return cls(socket.socket(inner.family, inner.type, inner.proto, fileno=inner.detach()))

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
            data = self.socket.recv(max_bytes)
        except (BlockingIOError, InterruptedError):
            self._readable = False
            return None
        except OSError as exc:
            raise self._translate(exc) from exc
        if len(data) < max_bytes:
            if not data:
                if self._broken is not None:
                    raise trio.BrokenResourceError(self._broken)
            elif not self.hangup:
                self._readable = False
        return data

    def try_send(self, data: Buffer) -> int:
        """Pass to the kernel what it takes now; the number of bytes taken, 0 when its buffer is full.

        Raises as `try_receive`, and `trio.BusyResourceError` while a task is sending: its rest comes first.
        """
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        try:
            return self.socket.send(data)
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
        self._check_receiver()
        self._sink = sink

    def disarm(self) -> None:
        """Take the sink away, without waking anybody: a sleeper goes on sleeping. Idempotent."""
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

    def reset(self) -> None:
        """`close()` so that the peer sees a reset at once, and what was not sent is dropped. Idempotent."""
        if not self._closed:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            self.close()

    # -- always a checkpoint -------------------------------------------------------------------------------------------

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As `trio.abc.ReceiveStream.receive_some`; 16 KiB at most unless told. Cancelling it loses nothing."""
        limit = receive_limit(max_bytes, DEFAULT_RECEIVE_BYTES)
        self._check_receiver()
        self._receiving = True
        try:
            await checkpoint_if_cancelled()
            self._raise_fault()
            data = self.try_receive(limit)
            if data is not None:
                await shielded_checkpoint()
                return data
            while data is None:
                await self._sleep()
                data = self.try_receive(limit)
            return data
        finally:
            self._receiving = False

    async def wait_disarmed(self) -> None:
        """Sleep while the armed sink is served, first with what is waiting already.

        Returns when the sink has answered False; what it raised is raised here. Cancelling disarms it in the very step
        of the `cancel()`. Raises `trio.ClosedResourceError` when the stream is closed meanwhile.
        """
        try:
            sink, self._sink = self._sink, None  # who is cancelled already is not served while the news travels
            await trio.lowlevel.checkpoint_if_cancelled()
            self._sink = sink
            for _ in range(ROUNDS):
                self._raise_fault()
                self._check_open()
                sink = self._sink
                if sink is None or not self._readable:
                    break
                if not settled(sink()) and self._sink is sink:
                    self._sink = None
            if self._sink is None:
                self._check_open()
                await trio.lowlevel.cancel_shielded_checkpoint()
                return
            if self._readable:
                self._poller.rearm(self._fd)
            await self._sleep()
        except trio.ClosedResourceError:
            self._raise_fault()  # what the sink raised after it had closed the stream
            raise
        finally:
            self._sink = None

    async def send_all(self, data: Buffer) -> None:
        """As `trio.abc.SendStream.send_all`. Cancelled, an unknown part was sent: only closing is sensible then."""
        await self.send_batch((data,))

    async def send_batch(self, pieces: Sequence[Buffer]) -> None:
        """Send `pieces` one after the other, gathered (sendmsg), not joined. Otherwise as `send_all`."""
        with OneSender(self):
            self._check_sendable()
            await trio.lowlevel.checkpoint_if_cancelled()
            rest = self._gather(pieces)
            if not rest:
                await trio.lowlevel.cancel_shielded_checkpoint()
            while rest:
                await self._wait_writable()
                rest = self._gather(rest)

    def try_send_batch(self, pieces: Sequence[Buffer]) -> list[memoryview]:
        """Pass as much of `pieces` to the kernel as it takes now; answers what it did not take.

        Not a checkpoint; raises as `try_send`.
        """
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        return self._gather(pieces)

    def _gather(self, pieces: Sequence[Buffer]) -> list[memoryview]:
        total = sum(map(len, pieces))
        if not total:
            return []
        try:
            sent = self.socket.send(b"".join(pieces)) if total <= JOINED else self.socket.sendmsg(pieces[:GATHER])
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as exc:
            raise self._translate(exc) from exc
        if sent == total:
            return []
        rest: list[memoryview] = []
        for piece in pieces:
            if sent < len(piece):
                rest.append(memoryview(piece)[sent:])
            sent = max(0, sent - len(piece))
        return rest

    async def wait_send_all_might_not_block(self) -> None:
        """As `trio.abc.SendStream.wait_send_all_might_not_block`."""
        with OneSender(self):
            self._check_open()
            await self._wait_writable()

    async def _wait_writable(self) -> None:
        # Rare (the kernel's buffer is full), so Trio's own one-shot epoll serves.
        await trio.lowlevel.wait_writable(self.socket)

    async def send_eof(self) -> None:
        """As `trio.abc.HalfCloseableStream.send_eof`. Idempotent."""
        with OneSender(self):
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
            answer = sink()
        except BaseException as exc:  # SystemExit too: raised in the poller, it would be an internal error of Trio's
            self._sink = None
            self._fail(exc)
            return False
        if answer is True or answer is False:
            return self._answered(sink, answer)
        self._steps.append((self, sink, answer))
        return False

    def take_step(self, sink: Armed, step: Callable[[], bool]) -> bool:
        """The poller's call: the rest of what `sink` began in this round."""
        if self._sink is not sink:
            return False  # closed or disarmed by another one's step
        try:
            armed = step()
        except BaseException as exc:
            self._sink = None
            self._fail(exc)
            return False
        return self._answered(sink, armed)

    def _answered(self, sink: Armed, armed: bool) -> bool:
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
            except BaseException as exc:
                self._fail(exc)

    def _fail(self, exc: BaseException) -> None:
        if self._receiver is None:
            self._fault = exc  # nobody sleeps just now: raised where the stream is used next
        else:
            self._wake(outcome.Error(exc))

    def _raise_fault(self) -> None:
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault

    def _wake(self, result: outcome.Outcome[None]) -> None:
        one, self._receiver = self._receiver, None
        wake(one, result)

    def _sleep(self) -> Awaitable[None]:
        """To be awaited at once: until something is readable, the sink is done, or the stream is closed."""
        self._receiver = sleeper()
        return sleep(self._on_cancel)

    def _on_cancel(self, _raise_cancel: Any) -> trio.lowlevel.Abort:
        """In the step of the `cancel()`: from here on no sink is called for a task that is gone."""
        self._receiver = self._sink = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _check_receiver(self) -> None:
        # A sink that was taken away may have left its owner asleep: it still owns the receiving side.
        if self._receiving or self._sink is not None or self._receiver is not None:
            raise trio.BusyResourceError("another task is receiving on this stream")

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
        text = f"the connection broke: {exc.strerror or exc}"
        if exc.errno not in _HARMLESS:
            self._broken = text
        return trio.BrokenResourceError(text)
