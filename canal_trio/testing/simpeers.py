"""The peers of a simulated gateway: clients and upstreams that do what a plan says and keep what they saw.

A peer's own faults happen at an exact byte of what it says or reads. Peers read strictly; what they find unfit is a
complaint of the network. Nothing here waits for real time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import final

import trio

from canal_trio.testing.plans import Ask, Client, Reply, Said, reply_bytes, request_bytes
from canal_trio.testing.simlink import Fault, FaultKind
from canal_trio.testing.simnet import GatewayEnd, SimNetwork
from canal_trio.testing.simstream import HandoverSimStream
from canal_trio.testing.strictwire import Message, StrictReader, Unfit

__all__ = ["Attempt", "ClientPeer", "UpstreamPeer"]

_READ = 65_536
_PATIENCE = 3_000.0  # virtual seconds: longer than any deadline of a plan
_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


class _Over(Exception):
    """A fault of the plan has ended the peer's part."""


@dataclass(slots=True)
class _Tongue:
    """Says bytes on a stream, up to the byte where the plan has something go wrong."""

    stream: HandoverSimStream
    fault: Fault | None = None
    said: int = 0

    async def say(self, data: bytes) -> None:
        """Send. Raises `_Over` when a fault left nothing more to say."""
        fault = self.fault
        if fault is not None and self.said + len(data) >= fault.at:
            keep = max(0, fault.at - self.said)
            await self._send(data[:keep])
            self.fault = None
            await _go_wrong(self.stream, fault)
            data = data[keep:]
        await self._send(data)

    async def _send(self, data: bytes) -> None:
        if data:
            self.said += len(data)
            await self.stream.send_all(data)


async def _go_wrong(stream: HandoverSimStream, fault: Fault) -> None:
    match fault.kind:
        case FaultKind.RESET:
            stream.reset()
        case FaultKind.TRUNCATE:
            stream.close()
        case FaultKind.STALL:
            await trio.sleep_forever()
        case FaultKind.DELAY:
            await trio.sleep(fault.seconds)
            return
        case FaultKind.HALF_CLOSE:
            await stream.send_eof()
    raise _Over


# -- upstreams ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Attempt:
    """One request as an upstream saw it. `finished`: it said all of its answer."""

    upstream: str
    tag: str
    number: int  # among the attempts of its tag
    reused: bool
    request: Message
    said: Said
    begun: float
    end: GatewayEnd
    raw: int = 0  # bytes of the answer that were sent
    finished: bool = False


@final
class UpstreamPeer:
    """One accepted connection of an upstream. `attempts` are those of all connections, by tag."""

    def __init__(
        self,
        network: SimNetwork,
        attempts: dict[str, list[Attempt]],
        name: str,
        end: GatewayEnd,
        stream: HandoverSimStream,
    ) -> None:
        self._network = network
        self._attempts = attempts
        self._name = name
        self._end = end
        self._stream = stream
        self._reader = StrictReader()
        self._served = 0
        self.current: Attempt | None = None
        self.said_before = 0  # bytes, to the attempts before it

    async def run(self) -> None:
        """Serve until the gateway leaves, or the plan ends it."""
        try:
            while await self._serve():
                pass
        except _GONE:
            pass
        except _Over:
            if not self._stream.closed:
                await self._listen()
        except Unfit as exc:
            self._network.complaints.append(f"{self._end.name} got what no gateway may send: {exc}")
        finally:
            self._stream.close()

    async def _listen(self) -> None:
        """Its own part is over: read until the other side's is, too."""
        with suppress(*_GONE):
            while await self._stream.receive_some(_READ):
                pass

    async def _more(self, most: int = _READ) -> bool:
        data = await self._stream.receive_some(most)
        if data:
            self._reader.feed(data)
        return bool(data)

    async def _serve(self) -> bool:
        """Read a request and answer it. False: nothing follows."""
        reader = self._reader
        patience = self._quits_after()
        while len(reader.messages) <= self._served:
            with trio.move_on_after(patience) as idle:
                if not await self._more():
                    return False
            if idle.cancelled_caught:
                return False
        request = reader.messages[self._served]
        self._served += 1
        attempt = self._attempt(request)
        ask = self._network.plan.ask(attempt.tag)
        reply = ask.reply(attempt.number)
        if reply.into is not None:
            await self._read_into(request, reply.into)
        if not reply.early:
            while not request.complete:
                if not await self._more():
                    return False
        if ask.upgrade and reply.status == 101:
            await self._tunnel(attempt, reply)
            return False
        await self._play(attempt, reply)
        if reply.close or reply.framing == "close":
            await self._stream.send_eof()
            await self._listen()
            return False
        while not request.complete:
            if not await self._more():
                return False
        return True

    def _quits_after(self) -> float:
        if not self._served:
            return math.inf
        before = self._network.plan.ask(self._tag(self._reader.messages[self._served - 1]))
        quits = [reply.quits for reply in before.replies if reply.quits is not None]
        return quits[0] if quits else math.inf

    def _tag(self, request: Message) -> str:
        return (request.get(b"x-request-id") or b"").decode()

    def _attempt(self, request: Message) -> Attempt:
        tag = self._tag(request)
        before = self._attempts.setdefault(tag, [])
        ask, number = self._network.plan.ask(tag), len(before)
        said = reply_bytes(ask, number)
        attempt = Attempt(self._name, tag, number, self._served > 1, request, said, trio.current_time(), self._end)
        before.append(attempt)
        if self.current is not None:
            self.said_before += self.current.raw
        self.current = attempt
        self._network.note(self._end.name, f"attempt {number} of {tag}")
        return attempt

    async def _read_into(self, request: Message, fault: Fault) -> None:
        """Read exactly so many bytes of the body, then the fault happens."""
        while not request.complete and len(request.body) < fault.at:
            if not await self._more(fault.at - len(request.body)):
                return
        await _go_wrong(self._stream, fault)

    async def _play(self, attempt: Attempt, reply: Reply) -> None:
        tongue = _Tongue(self._stream, reply.out)
        await trio.sleep(reply.wait)
        for index, data in enumerate(attempt.said.sends):
            if index and reply.gap:
                await trio.sleep(reply.pause(index))
            try:
                await tongue.say(data)
            finally:
                attempt.raw = tongue.said
        attempt.finished = attempt.raw >= attempt.said.whole
        if not attempt.finished:
            raise _Over

    async def _tunnel(self, attempt: Attempt, reply: Reply) -> None:
        over = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen_to, attempt.request)
            with suppress(_Over, *_GONE):
                await self._play(attempt, reply)
                await self._stream.send_eof()
                over = False
            if over:
                nursery.cancel_scope.cancel()
        if over:
            raise _Over

    async def _listen_to(self, request: Message) -> None:
        with suppress(*_GONE):
            while data := await self._stream.receive_some(_READ):
                request.body += data
            request.framing = "tunnel"  # its end was seen


# -- clients -----------------------------------------------------------------------------------------------------------


@dataclass
class Told:
    """What a client has of one answer, and when its head was there."""

    message: Message
    complete: bool = False


@final
class ClientPeer:
    """One client. `ended_by`: how the gateway ended the connection, None while it has not."""

    def __init__(self, plan: Client, network: SimNetwork, number: int, stream: HandoverSimStream) -> None:
        self.plan = plan
        self.number = number
        self.stream = stream
        self.reader = StrictReader(responses=True)
        self.sent = 0  # requests that have begun to leave
        self.received = 0
        self.ended_by: str | None = None
        self.ended_at = 0.0
        self.left = False  # of its own will, or by a fault of the plan
        self.over = False
        self._network = network
        self._answers = trio.lowlevel.ParkingLot()
        self._continue = trio.Event()
        self._upgraded = trio.Event()
        self._scope = trio.CancelScope()

    @property
    def _cut_off(self) -> bool:
        """Nothing can reach it any more, not even an end."""
        return any(fault.kind is FaultKind.STALL for fault in self.plan.to_client.faults)

    @property
    def answers(self) -> list[Message]:
        """The answers that have begun, in order."""
        return self.reader.messages

    async def run(self) -> None:
        """Say everything, read everything."""
        plan = self.plan
        try:
            with trio.move_on_after(_PATIENCE) as patience, self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._speak)
                    if plan.leave is not None and plan.leave.after is not None:
                        nursery.start_soon(self._leave_later, plan.leave.after)
                    await self._hear()
                    nursery.cancel_scope.cancel()
            if patience.cancelled_caught and not self._cut_off:
                self._network.complaints.append(f"c{self.number} waited {_PATIENCE:g} s for an answer or an end")
        except* Unfit as group:
            self._network.complaints.append(f"c{self.number} got what no gateway may send: {group.exceptions[0]}")
        finally:
            self.over = True
            self._network.note(f"client {self.number}", f"is done; the gateway ended by {self.ended_by}")
            self.stream.close()

    async def _speak(self) -> None:
        tongue = _Tongue(self.stream, self.plan.out)
        try:
            for index, ask in enumerate(self.plan.asks):
                if index and not self.plan.pipelined:
                    while sum(answer.complete for answer in self.answers) < index:
                        await self._answers.park()
                await trio.sleep(ask.pause)
                self.sent += 1
                self.reader.asked.append(ask.method.encode())
                await self._request(ask, tongue)
        except (*_GONE, trio.BusyResourceError):  # busy: its end is being said by `_leave`
            pass
        except _Over:
            self.left = True

    async def _request(self, ask: Ask, tongue: _Tongue) -> None:
        head, payload = request_bytes(ask)
        chunks: Callable[[bytes], bytes] = _chunk if ask.chunked else bytes
        last = b"0\r\n\r\n" if ask.chunked else b""
        self._network.note(f"client {self.number}", f"asks {ask.tag}")
        if ask.upgrade:
            await tongue.say(head)
            await self._upgraded.wait()
            await self._slices(payload, tongue, bytes)
            await self.stream.send_eof()
        elif ask.expect:
            await tongue.say(head)
            with trio.move_on_after(1.0):
                await self._continue.wait()
            await self._slices(payload, tongue, chunks)
            await tongue.say(last)
        elif not self.plan.send:
            await tongue.say(head + (chunks(payload) if payload else b"") + last)
        else:
            await self._slices(head, tongue, bytes)
            await self._slices(payload, tongue, chunks)
            await tongue.say(last)

    async def _slices(self, data: bytes, tongue: _Tongue, framed: Callable[[bytes], bytes]) -> None:
        size = self.plan.send or len(data) or 1
        for at in range(0, len(data), size):
            if at and self.plan.spacing:
                await trio.sleep(self.plan.spacing)
            await tongue.say(framed(data[at : at + size]))

    async def _leave_later(self, after: float) -> None:
        await trio.sleep(after)
        await self._leave()

    async def _leave(self) -> None:
        leave = self.plan.leave
        assert leave is not None
        self._network.note(f"client {self.number}", f"leaves: {leave.how}")
        self.left = True
        with suppress(*_GONE, trio.BusyResourceError):
            if leave.how == "eof":
                await self.stream.send_eof()
            elif leave.how == "stall":
                self._scope.cancel()
                with trio.move_on_after(1_000.0, shield=True):
                    await trio.sleep_forever()
            else:
                if leave.how == "reset":
                    self.stream.reset()
                self.stream.close()
                self._scope.cancel()

    async def _hear(self) -> None:
        plan, leave = self.plan, self.plan.leave
        until = leave.at if leave is not None and leave.at is not None else math.inf
        while True:
            if self.received >= until:
                until = math.inf
                await self._leave()
            if plan.pause and self.received:
                await trio.sleep(plan.pause)
            try:
                data = await self.stream.receive_some(int(min(plan.read, until - self.received)))
            except trio.ClosedResourceError:
                return
            except trio.BrokenResourceError:
                self._ended("reset")
                return
            if not data:
                self._ended("fin")
                return
            self.received += len(data)
            self._continue.set()
            self.reader.feed(data)
            self._answers.unpark_all()
            if self.answers and self.answers[-1].framing == "tunnel":
                self._upgraded.set()
            if self._has_all() and not plan.waits and not (leave is not None and leave.how == "stall"):
                return

    def _has_all(self) -> bool:
        return len(self.answers) == len(self.plan.asks) and self.answers[-1].complete

    def _ended(self, how: str) -> None:
        self.ended_by = how
        self.ended_at = trio.current_time()
        if how == "fin":
            self.reader.eof()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
