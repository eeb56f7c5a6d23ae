"""TLS that can hand over on the spot: an `ssl.SSLObject` between two memory BIOs, over a stream that can.

Bytes are decrypted and encrypted in the step in which the transport gives or takes them, so a piece goes through in the
poller's step just as over plain TCP.

Invariants:

* *Taken means in the transport.* Plaintext is only reported as taken once all of its ciphertext has been. What was
  encrypted and could not leave stays here (at most one `RECORDS` of plaintext and its overhead), the caller is told
  that nothing of it was taken, and when it offers those bytes again, as the protocol demands, they are not encrypted
  twice (`_owed`). So a caller's bound and its deadline for a peer that takes nothing hold as over TCP.
* *An end is a message.* Only a close_notify ends the stream; a transport that just ends is a broken one (RFC 8446 6.1).
* *Nothing is forgotten in between.* What was read and not decrypted, or decrypted and not asked for, is looked at
  before the transport is waited for; at most one read of `RECORDS` lies there. `_here` remembers whether there is any.
* `close()` says nothing to the peer, so that what was cut looks cut; `aclose()` and `send_eof()` send close_notify.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, final

import trio
from trio.abc import HalfCloseableStream

from canal_trio.relay.course import checkpoint_if_cancelled, parks, shielded_checkpoint
from canal_trio.relay.handover import Armed, Buffer, HandoverStream, OneSender, receive_limit, settled

if TYPE_CHECKING:
    import socket

__all__ = ["TlsStream"]

RECORDS = 32_768  # bytes of plaintext encrypted in one go, and of ciphertext read in one go: two full records
_JOIN = 16_384  # pieces are joined up to a full record: an own record for each would cost a cipher run and 22 bytes
_NEWS_PER_TURN = 2  # reads of the transport in one turn of a sink, so that one busy stream cannot starve the others


class _Transport(HandoverStream, Protocol):
    """What lies below: a hand-over stream with its async half."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """As `trio.abc.ReceiveStream.receive_some`."""

    async def send_eof(self) -> None:
        """As `trio.abc.HalfCloseableStream.send_eof`."""


@final
class TlsStream(HalfCloseableStream):
    """TLS over `transport`, which is this stream's own from now on. Not usable before `do_handshake()` has returned.

    `context` decides about versions, certificates, trust and ALPN; `server_side` who speaks first; `server_hostname` is
    what a client asks for (SNI) and checks. Raises ValueError for what `ssl.SSLContext.wrap_bio` refuses.
    """

    def __init__(
        self,
        transport: _Transport,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
    ) -> None:
        self.transport_stream = transport
        self.parks = parks(transport)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname
        )
        self._pending = memoryview(b"")  # ciphertext that the transport did not take yet
        self._owed = 0  # plaintext bytes of it, which were offered and not reported as taken
        self._sink: Armed | None = None
        self._here = False  # there may be something to decrypt, or to tell of the end
        self._dry = False  # the last look found nothing
        self._news = 0  # reads of the transport in this turn
        self._sending = False
        self._receiving = False
        self._eof_sent = False
        self._cut = False  # the transport has ended
        self._ended = False  # the peer's close_notify was seen
        self._closed = False

    def __repr__(self) -> str:
        return f"<TlsStream {self._tls.version() or 'before the handshake'} over {self.transport_stream!r}>"

    @property
    def hangup(self) -> bool:
        """The transport was seen to hang up."""
        return self.transport_stream.hangup

    @property
    def socket(self) -> socket.socket | None:
        """The transport's socket, for options and addresses only; None where there is none."""
        return getattr(self.transport_stream, "socket", None)

    def selected_alpn_protocol(self) -> str | None:
        """What ALPN chose, after the handshake; None if nothing."""
        return self._tls.selected_alpn_protocol()

    def peer_certificate(self) -> dict[str, Any] | None:
        """The peer's, once it was verified, as `ssl.SSLObject.getpeercert` tells it; None if it showed none."""
        return self._tls.getpeercert() or None

    async def do_handshake(self) -> None:
        """Shake hands. A checkpoint; afterwards, also if it is cancelled or fails, the stream is the caller's to close.

        Raises `trio.BrokenResourceError` (its `__cause__` the `ssl.SSLError`, if there is one) when the peer cannot be
        agreed with or goes away. It has no deadline of its own.
        """
        await trio.lowlevel.checkpoint()
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                if self._cut:
                    raise trio.BrokenResourceError("the connection ended in the TLS handshake") from None
                self._feed(await self.transport_stream.receive_some(RECORDS))
            except ssl.SSLError as exc:  # CertificateError is one
                self._try_flush()  # the alert: so that the peer learns why
                raise trio.BrokenResourceError(f"the TLS handshake failed: {exc.reason or exc}") from exc
            else:
                await self._flush()
                return

    # -- never a checkpoint, never blocks ------------------------------------------------------------------------------

    def try_receive(self, max_bytes: int) -> bytes | None:
        """Plaintext that is here now, `b""` at the peer's close_notify, None if there is nothing yet.

        Raises `trio.BrokenResourceError` on a reset, on an end without close_notify and on what is no TLS, and
        `trio.ClosedResourceError` after `close()`.
        """
        self._dry = False
        while True:
            if self._here or self._ended or self._closed:
                data = self._decrypt(max_bytes)
                if data is not None:
                    return data
            if self._news >= _NEWS_PER_TURN and self._sink is not None:
                self._dry = True
                return None
            ciphertext = self.transport_stream.try_receive(RECORDS)
            if ciphertext is None:
                self._dry = True
                return None
            self._news += 1
            self._feed(ciphertext)

    def try_send(self, data: Buffer) -> int:
        """Pass on what the transport takes now; the number of bytes taken, perhaps 0.

        What was not taken is to be offered again before anything else: it may have been encrypted already. Raises as
        `try_receive`, and `trio.BusyResourceError` while a task is sending.
        """
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        return self._offer(data)

    def try_send_batch(self, pieces: Sequence[Buffer]) -> list[memoryview]:
        """As `try_send` with several pieces in a row; answers what was not taken."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        if not self._owed and 0 < sum(map(len, pieces)) <= _JOIN:  # as it mostly is: all in one record, or nothing
            if self._offer(b"".join(pieces)):
                return []
            return [memoryview(piece).cast("B") for piece in pieces if len(piece)]
        rest = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
        while rest:
            group = _up_to(rest, max(_JOIN, self._owed))
            joined = group[0] if len(group) == 1 else b"".join(group)
            taken = self._offer(joined)
            short = taken < len(joined)
            while taken:
                step = min(taken, len(rest[0]))
                taken -= step
                if step == len(rest[0]):
                    del rest[0]
                else:
                    rest[0] = rest[0][step:]
            if short:
                break
        return rest

    def arm(self, sink: Armed) -> None:
        """Have `sink` called whenever there may be plaintext; see `HandoverStream`. Raises as `TcpStream.arm`."""
        self._check_open()
        self._check_receiver()
        self.transport_stream.arm(self._turn)
        self._sink = sink

    def disarm(self) -> None:
        """Take the sink away, without waking anybody. Idempotent."""
        self._sink = None
        self.transport_stream.disarm()

    def watch(self, callback: Callable[[], None] | None) -> None:
        """As `TcpStream.watch`: the transport's hang-up. A close_notify without one is only seen by reading."""
        self.transport_stream.watch(callback)

    def close(self) -> None:
        """Close the transport in this very step, without close_notify. Idempotent."""
        self._closed = True
        self._sink = None
        self.transport_stream.close()

    def reset(self) -> None:
        """`close()` so that the peer sees a reset of the transport. Idempotent."""
        self.transport_stream.reset()
        self.close()

    # -- always a checkpoint -------------------------------------------------------------------------------------------

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As `trio.abc.ReceiveStream.receive_some`, 16 KiB at most unless told. Cancelling it loses nothing.

        Raises `trio.BrokenResourceError` also for an end without close_notify.
        """
        limit = receive_limit(max_bytes, _JOIN)
        self._check_receiver()
        self._receiving = True
        try:
            await checkpoint_if_cancelled()
            self._check_open()
            data = self._decrypt(limit)
            if data is not None:
                await shielded_checkpoint()
            while data is None:
                self._feed(await self.transport_stream.receive_some(RECORDS))
                data = self._decrypt(limit)
            return data
        finally:
            self._receiving = False

    async def wait_disarmed(self) -> None:
        """Sleep while the armed sink is served, first with what is here already. As `TcpStream.wait_disarmed`."""
        try:
            sink, self._sink = self._sink, None  # who is cancelled already is not served while the news travels
            await trio.lowlevel.checkpoint_if_cancelled()
            self._sink = sink
            if sink is not None and not self._turn():
                self.disarm()
            await self.transport_stream.wait_disarmed()
        finally:
            self.disarm()

    async def send_all(self, data: Buffer) -> None:
        """As `trio.abc.SendStream.send_all`. Cancelled, an unknown part was sent: only closing is sensible then."""
        await self.send_batch((data,))

    async def send_batch(self, pieces: Sequence[Buffer]) -> None:
        """Send `pieces` one after the other, small ones in one record. Otherwise as `send_all`."""
        with OneSender(self):
            await trio.lowlevel.checkpoint_if_cancelled()
            self._check_sendable()
            waited = False
            for piece in pieces:
                view = memoryview(piece).cast("B")
                while view := view[self._offer(view) :]:
                    await self.transport_stream.wait_send_all_might_not_block()
                    waited = True
            if not waited:
                await trio.lowlevel.cancel_shielded_checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        """As `trio.abc.SendStream.wait_send_all_might_not_block`."""
        with OneSender(self):
            self._check_sendable()
            await self.transport_stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """close_notify, then the transport's own end; what the peer still says can be received. Idempotent."""
        with OneSender(self):
            self._check_open()
            await trio.lowlevel.checkpoint()
            if self._eof_sent:
                return
            self._say_goodbye()
            await self._flush()
            await self.transport_stream.send_eof()

    async def aclose(self) -> None:
        """close_notify, if it can leave at once and nothing unsent is before it, then `close()` and a checkpoint."""
        if not self._closed and not self._eof_sent and not self._pending:
            try:
                self._say_goodbye()
                self._try_flush()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # nobody is left to be polite to
        self.close()
        await trio.lowlevel.checkpoint()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _turn(self) -> bool:
        """The transport's sink: ours gets its turns until nothing is left, or it has enough."""
        self._news = 0
        while (sink := self._sink) is not None:
            self._dry = False
            answer = sink()
            if answer is not True and not settled(answer):
                return False
            if self._dry or not self._here:
                return True  # whether the transport has more, the transport knows
        return False

    def _decrypt(self, max_bytes: int) -> bytes | None:
        self._check_open()
        if self._ended:
            return b""
        if not self._here:
            return None  # cheaper than the exception that says so
        try:
            data = self._tls.read(max_bytes)
        except ssl.SSLWantReadError:
            if self._cut:
                raise trio.BrokenResourceError("the connection ended without close_notify") from None
            data = None
        except ssl.SSLZeroReturnError:
            data = b""
        except ssl.SSLError as exc:
            self._here = self._holds()
            raise trio.BrokenResourceError(f"what arrived is no proper TLS: {exc.reason or exc}") from exc
        if data:
            # Of a record that was begun OpenSSL keeps the rest, which is so only where all that was asked for came.
            self._here = bool(len(data) == max_bytes or self._incoming.pending or self._cut)
        else:
            self._here = self._holds()
            self._ended = data is not None
            if not self._sending:  # else the sending task does it
                self._try_flush()  # the answer to a KeyUpdate (RFC 8446 4.6.3)
        return data

    def _holds(self) -> bool:
        """Is there anything here that might give plaintext, or the end?"""
        return bool(self._incoming.pending or self._cut or self._tls.pending())

    def _feed(self, ciphertext: bytes | bytearray) -> None:
        self._here = True
        if ciphertext:
            self._incoming.write(ciphertext)
        else:
            self._cut = True  # not write_eof: with OpenSSL 3, Python's contexts would take that for a proper end

    def _offer(self, data: Buffer) -> int:
        """`try_send`, without asking who sends."""
        if self._closed or self._eof_sent:
            self._check_sendable()
        size = len(data)
        if (self._pending or self._outgoing.pending) and not self._try_flush():
            return 0
        taken = min(self._owed, size)  # what was encrypted when it was offered before has left by now
        self._owed -= taken
        view = memoryview(data).cast("B") if taken or size > RECORDS else data
        while taken < size:
            part = view[taken : taken + RECORDS] if view is not data else data
            try:
                self._tls.write(part)
            except ssl.SSLError as exc:
                raise trio.BrokenResourceError(f"TLS cannot send: {exc.reason or exc}") from exc
            ciphertext = self._outgoing.read()
            sent = self.transport_stream.try_send(ciphertext)
            if sent < len(ciphertext):
                self._pending = memoryview(ciphertext)[sent:]
                self._owed = len(part)
                return taken
            taken += len(part)
        return size

    def _try_flush(self) -> bool:
        """Pass on ciphertext. True: all of it has left."""
        if self._pending:
            sent = self.transport_stream.try_send(self._pending)
            self._pending = self._pending[sent:]
            if self._pending:
                return False
        if not self._outgoing.pending:
            return True
        ciphertext = self._outgoing.read()
        sent = self.transport_stream.try_send(ciphertext)
        if sent == len(ciphertext):
            return True
        self._pending = memoryview(ciphertext)[sent:]
        return False

    async def _flush(self) -> None:
        while not self._try_flush():
            await self.transport_stream.wait_send_all_might_not_block()

    def _say_goodbye(self) -> None:
        self._eof_sent = True
        with contextlib.suppress(ssl.SSLError, ValueError):  # there is no session to end
            # It wants to read the peer's own close_notify, which is not waited for.
            self._tls.unwrap()

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")

    def _check_sendable(self) -> None:
        self._check_open()
        if self._eof_sent:
            raise trio.ClosedResourceError("send_eof was called on this stream")

    def _check_receiver(self) -> None:
        if self._receiving or self._sink is not None:
            raise trio.BusyResourceError("another task is receiving on this stream")


def _up_to(pieces: list[memoryview], size: int) -> list[memoryview]:
    """The first piece, and those behind it that fit into `size` bytes together."""
    total, count = len(pieces[0]), 1
    while count < len(pieces) and total + len(pieces[count]) <= size:
        total += len(pieces[count])
        count += 1
    return pieces[:count]
