"""Clients that account for every request they send: exactly one outcome each, and whether a finish can be believed.

One Trio task per client, in a closed loop. Invariants: every request that is begun leaves one `Visit` with one outcome,
whatever happens to its connection; no wait for a byte lasts longer than `SILENCE`, beyond which the outcome is `hung`;
a message counts as complete only if its framing says so, and as honest only if everything is in it that the upstream
says for such a request, in its order.
"""

from __future__ import annotations

import json
import random
import re
import socket
import struct
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, final

import trio

from loadtest import bodies
from loadtest.behaviour import Behaviour
from loadtest.safety import Target
from loadtest.wire import Malformed, Response

__all__ = ["Customers", "Habits", "Visit"]

SILENCE = 40.0  # seconds without a byte: more than all of the gateway's deadlines in these trials together
_TOKEN = re.compile(rb" token(\d+)x*\"")
_DONE = b"data: [DONE]\n\n"
_ERROR = b'data: {"error"'


@dataclass(slots=True)
class Visit:
    """One request and what became of it.

    `outcome`: complete (200, all of it), answered (a whole answer with another status), error (an in-band error, then a
    visible break), broken (a visible break), unanswered (no response's head), left (on purpose), hung, dishonest.
    """

    ident: str
    kind: str
    behaviour: Behaviour
    outcome: str = ""
    status: int = 0
    tokens: int = 0
    answered: bool = False  # a byte of a response came
    sent: bool = False  # all of the request was handed to the kernel
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Habits:
    """What customers do: shares of the whole, and the ranges they draw from."""

    documents: float = 0.15  # answers in one piece
    uploads: float = 0.05  # large bodies
    leavers: float = 0.10
    slow: float = 0.03  # readers that take their time
    tokens: tuple[int, int] = (5, 60)
    interval: tuple[float, float] = (0.02, 0.1)
    kept: float = 0.7  # share of exchanges after which the connection is used again
    pause: float = 0.05  # seconds after a failure, so that what is down is not asked as fast as we can


@final
class Customers:
    """So many clients at a time. `visits` are the ones that are over; `stop` lets those that run come to their end."""

    def __init__(self, target: Target, habits: Habits, seed: str, key: str = "sk-test") -> None:
        self.target = target
        self.habits = habits
        self.key = key
        self.visits: list[Visit] = []
        self.outcomes: Counter[str] = Counter()
        self.inside = self.most = 0
        self.begun = 0
        self._seed = seed
        self._stopped = False

    def stop(self) -> None:
        """No further requests."""
        self._stopped = True

    async def run(self, count: int, over: float = 1.0) -> None:
        """`count` clients, who start spread over `over` seconds, until `stop` and the end of what runs then."""
        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(self._customer, number, over * number / count)

    async def _customer(self, number: int, delay: float) -> None:
        await trio.sleep(delay)
        chance = random.Random(f"{self._seed}:{number}")
        stream: trio.SocketStream | None = None
        try:
            for turn in range(1_000_000):
                if self._stopped:
                    return
                visit = self._draw(chance, f"{self._seed}.{number}.{turn}")
                self.begun += 1
                self.inside += 1
                self.most = max(self.most, self.inside)
                began = time.monotonic()
                exchange = _Exchange(self, visit, chance, stream)
                await exchange.run()
                visit.seconds = time.monotonic() - began
                self.inside -= 1
                self.visits.append(visit)
                self.outcomes[visit.outcome] += 1
                stream = exchange.kept(chance.random() < self.habits.kept)
                if visit.outcome not in ("complete", "left"):
                    await trio.sleep(self.habits.pause)
        finally:
            if stream is not None:
                stream.socket.close()

    def _draw(self, chance: random.Random, ident: str) -> Visit:
        habits = self.habits
        kinds = {
            "document": habits.documents, "upload": habits.uploads, "leaver": habits.leavers, "slow": habits.slow,
        }  # fmt: skip
        kinds["stream"] = 1 - sum(kinds.values())
        kind = chance.choices(list(kinds), list(kinds.values()))[0]
        tokens = chance.randint(*habits.tokens)
        interval = round(chance.uniform(*habits.interval), 3)
        behaviour = Behaviour(tokens=tokens, interval=interval, jitter=0.3)
        if kind in ("document", "upload"):
            behaviour = Behaviour(tokens=tokens, head=round(chance.uniform(0, 0.3), 3))
        return Visit(ident, kind, behaviour)


class _Exchange:
    """One visit on a connection, kept or new."""

    def __init__(
        self, customers: Customers, visit: Visit, chance: random.Random, stream: trio.SocketStream | None
    ) -> None:
        self.target = customers.target
        self.key = customers.key
        self.visit = visit
        self.chance = chance
        self.stream = stream
        self.reused = stream is not None
        self.response = Response()
        self.payload = bytearray()
        self.silence = trio.CancelScope()

    async def run(self) -> None:
        visit = self.visit
        with trio.move_on_after(SILENCE) as self.silence:
            visit.outcome = await self._outcome()
        if self.silence.cancelled_caught:
            visit.outcome = "hung"
            visit.note = f"after {len(self.payload)} bytes"
        visit.status = self.response.status
        visit.answered = visit.answered or self.response.headed

    def kept(self, wanted: bool) -> trio.SocketStream | None:
        """The connection, if it can be used again and that is wanted; else it is closed."""
        if self.stream is None:
            return None
        if wanted and self.visit.outcome in ("complete", "answered") and not self.response.close:
            return self.stream
        self.stream.socket.close()
        return None

    async def _outcome(self) -> str:
        try:
            if self.stream is None:
                self.stream = await trio.open_tcp_stream(self.target.address, self.target.port)
            if self.visit.kind == "leaver":
                return await self._leave()
            await self._send()
            await self._receive()
        except OSError as exc:
            self.visit.note = str(exc)
        except trio.BrokenResourceError as exc:
            self.visit.note = f"{exc.__cause__ or exc}"
        except Malformed as exc:
            self.visit.note = f"malformed: {exc}"
            return "dishonest"
        return self._judged()

    async def _send(self) -> None:
        assert self.stream is not None
        try:
            await self.stream.send_all(_request(self.visit, self.target, self.key))
            self.visit.sent = True
        except trio.BrokenResourceError:  # an answer may be here all the same
            self.visit.note = "the request could not be sent whole"

    async def _receive(self) -> None:
        assert self.stream is not None
        slow = self.visit.kind == "slow"
        while not self.response.done:
            data = await self.stream.receive_some(2000 if slow else 16_384)
            if not data:
                self.response.eof()
                return
            self.visit.answered = True
            self.silence.deadline = trio.current_time() + SILENCE
            self.payload += self.response.feed(bytes(data))
            if slow:
                await trio.sleep(self.chance.uniform(0, 0.2))

    async def _leave(self) -> str:
        """Go away at some moment, with a FIN or a reset, unless it is over before."""
        lasting = self.visit.behaviour.lasting
        with trio.move_on_after(self.chance.uniform(0, lasting * 1.1)) as scope:
            await self._send()
            await self._receive()
        if not scope.cancelled_caught:
            return self._judged()
        assert self.stream is not None
        if self.chance.random() < 0.5:
            self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.stream.socket.close()
        self.stream = None
        return "left"

    def _judged(self) -> str:
        """What the bytes that came amount to."""
        response, visit = self.response, self.visit
        payload = bytes(self.payload)
        visit.tokens = len(_TOKEN.findall(payload))
        if not response.headed:
            return "unanswered"
        if response.status != 200:
            if not response.done:
                return "broken"
            return "answered" if _is_error(payload) else self._caught("an error that is no JSON")
        if response.done:
            return "complete" if self._whole(payload) else self._caught("a complete message, but not all is in it")
        if visit.kind == "document":
            return "broken"
        return "error" if _ERROR in payload else "broken"

    def _caught(self, what: str) -> str:
        self.visit.note = f"{what}: …{bytes(self.payload[-300:])!r}"
        return "dishonest"

    def _whole(self, payload: bytes) -> bool:
        behaviour = self.visit.behaviour
        if self.visit.kind in ("document", "upload"):
            return payload == bodies.whole_reply(behaviour.tokens, behaviour.size)
        numbers = [int(number) for number in _TOKEN.findall(payload)]
        return numbers == list(range(behaviour.tokens)) and payload.endswith(_DONE) and payload.count(_DONE) == 1


def _is_error(payload: bytes) -> bool:
    try:
        return "message" in json.loads(payload)["error"]
    except (ValueError, TypeError, KeyError):
        return False


def _request(visit: Visit, target: Target, key: str) -> bytes:
    """The request's bytes; its id is in the head, and its behaviour in `user`."""
    document: dict[str, Any] = {"model": "m", "user": visit.behaviour.encode(visit.ident)}
    document["stream"] = visit.kind not in ("document", "upload")
    size = 200_000 if visit.kind == "upload" else 20
    document["messages"] = [{"role": "user", "content": "x" * size}]
    body = json.dumps(document).encode()
    head = (
        f"POST {target.path}/v1/chat/completions HTTP/1.1\r\nHost: {target.authority}\r\n"
        f"Authorization: Bearer {key}\r\nX-Request-Id: {visit.ident}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
