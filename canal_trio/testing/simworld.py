"""One run of a plan: the whole gateway, unchanged, between simulated peers, under virtual time.

`simulate(plan, handover=...)` runs it to its end and returns what was seen. While it runs, what can only be judged at
the time is judged: bytes between two ends, where a record's exchange stood, what is left when all have gone, and
whether new clients are served then. Invariant: a run is decided by its plan alone, down to the order of the tasks.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, final
from unittest import mock

import trio
import trio.testing

from canal_trio.errors import Failure, Kind, Phase, Retry, Side
from canal_trio.gateway import Gateway, respond
from canal_trio.hooks import ExchangeRecord, Outcome
from canal_trio.settings import Bounds, Upstream
from canal_trio.testing.causes import hazards_of
from canal_trio.testing.plans import Ask, Client, Plan, settings_of
from canal_trio.testing.simbooks import SimBooks
from canal_trio.testing.simlink import SimLink
from canal_trio.testing.simnet import WHO, GatewayEnd, Moment, SimNetwork, Steps, Trace
from canal_trio.testing.simpeers import Attempt, ClientPeer, UpstreamPeer
from canal_trio.wire import headers

__all__ = ["BUDGET", "Noted", "Seen", "simulate"]

KEPT_BYTES = 64 * 1024  # of a refusal that may have to be relayed after all
HELD_BYTES = 16 * 1024  # of a first event
BUDGET = 400_000  # steps of the scheduler in one run: more is a busy loop
HORIZON = 20_000.0  # virtual seconds: more is a hang
SETTLE = 5.0  # virtual seconds for what is under way when all have left


@dataclass(frozen=True, slots=True)
class Noted:
    """A record, when it was made, and how long nothing had moved for its client by then."""

    record: ExchangeRecord
    moment: Moment
    idle: float
    upstream_idle: float
    dials: int  # for this exchange


@dataclass(slots=True)
class Seen:
    """What came of a run. `complaints` are violations that were seen while it ran."""

    plan: Plan
    handover: bool
    clients: list[ClientPeer] = field(default_factory=list)
    attempts: dict[str, list[Attempt]] = field(default_factory=dict)
    records: dict[int, list[Noted]] = field(default_factory=dict)  # by client, in order
    client_ends: dict[int, GatewayEnd] = field(default_factory=dict)
    upstream_ends: list[GatewayEnd] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    steps: int = 0
    virtual: float = 0.0
    digest: str = ""
    began: float = 0.0

    @property
    def exchanges(self) -> int:
        """Records that were made."""
        return sum(map(len, self.records.values()))


def simulate(
    plan: Plan, *, handover: bool, steps: int = BUDGET, trace: Trace | None = None, digest: bool = False
) -> Seen:
    """Run `plan` once, in a `trio.run` of its own. `digest` makes one of everything that happens."""
    seen = Seen(plan, handover)
    traced = trace or (Trace() if digest else None)
    scope = trio.CancelScope()
    counter = Steps(steps, scope.cancel)

    async def main() -> None:
        with scope:
            await _World(plan, seen, counter, traced).run()
        if counter.count >= steps:
            seen.complaints.append(f"more than {steps} steps of the scheduler: a busy loop")

    clock = trio.testing.MockClock(autojump_threshold=0)
    with _decided_by(plan.order), _bugs_into(seen):
        trio.run(main, clock=clock, instruments=[counter])
    seen.steps = counter.count
    seen.digest = traced.digest if traced is not None else ""
    return seen


@contextmanager
def _decided_by(order: int) -> Iterator[None]:
    """What is left to chance is that of a seed in here: the order of tasks, ids, pauses; and the date stands still."""
    import trio._core._run as internals  # what Hypothesis' plugin of Trio does, too

    core: Any = internals
    chance = random.Random(order)
    before, states = core._ALLOW_DETERMINISTIC_SCHEDULING, (core._r.getstate(), random.getstate())
    core._ALLOW_DETERMINISTIC_SCHEDULING = True
    core._r.seed(order)
    random.seed(order)
    with (
        mock.patch.object(headers, "_random_bits", chance.getrandbits),
        mock.patch.object(respond, "time", SimpleNamespace(time=lambda: 1_000_000_000.0)),
    ):
        try:
            yield
        finally:
            core._ALLOW_DETERMINISTIC_SCHEDULING = before
            core._r.setstate(states[0])
            random.setstate(states[1])


class _Bugs(logging.Handler):
    """What the gateway logs as a bug is a complaint, unless the plan plants one."""

    def __init__(self, seen: Seen) -> None:
        super().__init__(logging.ERROR)
        self._seen = seen

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the last lines."""
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f": {record.exc_info[1]!r}"
        if "a planted bug" not in text:
            self._seen.complaints.append(f"the log says: {text[-1500:]}")


@contextmanager
def _bugs_into(seen: Seen) -> Iterator[None]:
    logger, handler = logging.getLogger("canal_trio"), _Bugs(seen)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


@final
class _World:
    """A gateway, its network and its peers, for one run."""

    def __init__(self, plan: Plan, seen: Seen, counter: Steps, trace: Trace | None) -> None:
        self._seen = seen
        self._network = SimNetwork(counter, plan, handover=seen.handover, traced=trace)
        self._network.complaints = seen.complaints
        self._network.first_sent = self._first_sent
        self._gateway = Gateway(settings_of(plan), recorders=[self], dialer=self._dial)
        self._books = self._retired = SimBooks(seen.complaints)
        self._gateway.keep_books(self._books)
        self._dials: dict[tuple[int, int], int] = {}
        self._serving: set[int] = set()
        self._read_before: dict[int, int] = {}  # bytes of each client, before its present exchange
        self._answering: dict[GatewayEnd, tuple[Attempt, int, int]] = {}
        self._drained_by = math.inf
        self._pools = set(self._gateway.generation.pools.values())
        self._bound = _bound(plan.bounds)
        if plan.reload is not None:
            self._bound = max(self._bound, _bound(replace(plan.bounds, piece_bytes=plan.reload.piece_bytes)))
        self.nursery: trio.Nursery

    @property
    def _plan(self) -> Plan:
        return self._network.plan

    # -- from its beginning to its end ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """All of it."""
        seen, start = self._seen, trio.current_time()
        seen.began = start
        with trio.move_on_after(HORIZON) as horizon:
            async with trio.open_nursery() as self.nursery:
                await self.nursery.start(self._gateway.run)
                async with trio.open_nursery() as players:
                    for number, client in enumerate(self._plan.clients):
                        if not client.asks:  # a plan that was made smaller
                            continue
                        players.start_soon(self._client, number, client)
                    self.nursery.start_soon(self._drain)
                    self.nursery.start_soon(self._reload)
                await self._empty("all clients have left")
                await self._probe()
                seen.virtual = trio.current_time() - start
                self._settle()
                self.nursery.cancel_scope.cancel()
        if horizon.cancelled_caught:
            left = [f"c{peer.number}" for peer in seen.clients if not peer.over]
            views = [f"{view.id}: {view.phase}" for view in self._gateway.exchanges()]
            seen.complaints.append(f"a hang: after {HORIZON:g} s {left} still wait, exchanges {views}")

    async def _client(self, number: int, plan: Client) -> None:
        await trio.sleep(plan.start)
        network = self._network
        ours, theirs = network.pair(f"c{number}", plan.to_gateway, plan.to_client)
        ours.raises = plan.raises
        peer = ClientPeer(plan, network, number, theirs)
        self._seen.clients.append(peer)
        self._seen.client_ends[number] = ours
        self._seen.records.setdefault(number, [])
        ours.measure = lambda: self._measure_upload(ours)
        self._serving.add(number)
        self.nursery.start_soon(self._handle, ours, number)
        await peer.run()

    async def _handle(self, end: GatewayEnd, number: int) -> None:
        WHO.set(number)
        try:
            await self._gateway.handle(self._network.for_gateway(end), peer=f"192.0.2.{number}")
        except Exception as exc:
            self._seen.complaints.append(f"c{number}: an exception left the gateway: {exc!r}")
        finally:
            self._serving.discard(number)

    async def _drain(self) -> None:
        if self._plan.drain is not None:
            await trio.sleep(self._plan.drain)
            self._network.note("gateway", "drains")
            self._drained_by = trio.current_time() + self._plan.deadlines.drain
            self._gateway.drain(self._drained_by)

    async def _reload(self) -> None:
        reload = self._plan.reload
        if reload is not None:
            await trio.sleep(reload.at)
            self._network.note("gateway", "reloads")
            bounds = replace(self._plan.bounds, piece_bytes=reload.piece_bytes)
            deadlines = replace(self._plan.deadlines, upstream_idle=reload.upstream_idle)
            self._gateway.reload(settings_of(self._plan, bounds, deadlines))
            self._pools |= set(self._gateway.generation.pools.values())
            old, self._books = self._books, SimBooks(self._seen.complaints, self._books)
            self._gateway.keep_books(self._books)
            self._retired = old
            await self._gateway.settled()
            if old.open:
                self._seen.complaints.append(f"settled, and not ended in the old books: {old.open}")
            self._gateway.drop_books(old)

    async def _empty(self, when: str) -> None:
        """Every connection that the gateway serves must end now that its client has."""
        deadlines = self._plan.deadlines
        patience = SETTLE + deadlines.linger + max(deadlines.client_write, deadlines.keep_alive)
        if any(upstream.on_client_eof == "finish" for upstream in self._plan.upstreams):
            patience += deadlines.first_byte  # an answer is waited for that may never come
        if any(ask.upgrade for client in self._plan.clients for ask in client.asks):
            patience += deadlines.tunnel_idle  # who has ended its side of a tunnel can leave without a word
        patience += max((model.on_disconnect.seconds for model in self._plan.models if model.on_disconnect), default=0)
        if self._plan.bounds.exchanges < math.inf:
            patience += deadlines.lease
        with trio.move_on_after(patience):
            while self._serving:  # noqa: ASYNC110  # virtual time
                await trio.sleep(0.25)
        if self._serving:
            self._seen.complaints.append(f"{patience:g} s after {when} the gateway still serves {self._serving}")
            self._serving.clear()
        await trio.sleep(SETTLE)
        await trio.testing.wait_all_tasks_blocked()

    async def _probe(self) -> None:
        """Faults have stopped: new clients must be served at once, whatever happened before."""
        for upstream in self._plan.upstreams:
            if self._gateway.draining:  # the plan may have it so late
                return
            number = len(self._plan.clients)
            models = [model.name for model in self._plan.models if model.upstreams[0].name == upstream.name]
            if self._plan.models and not models:
                continue
            ask = Ask(f"{number}.0", body=12, model=models[0] if models else None)
            client = Client((ask,))
            self._network.plan = self._seen.plan = replace(self._plan, clients=(*self._plan.clients, client))
            before = trio.current_time()
            with trio.move_on_after(HORIZON / 10):
                await self._client(number, client)
            peer = self._seen.clients[-1]
            dead = hazards_of(self._plan, client, ask) & {"stall", "delay"}  # an idle connection, which nobody can know
            far = self._plan.request_link.latency + self._plan.response_link.latency >= self._plan.deadlines.exchange
            fit, most = ((200, 504), SETTLE + self._plan.deadlines.first_byte) if dead or far else ((200,), SETTLE)
            if self._drained_by < math.inf:
                pass
            elif not (peer.answers and peer.answers[0].complete and peer.answers[0].status in fit):
                self._seen.complaints.append(f"when all was over a new client was not served by {upstream.name}")
            elif trio.current_time() - before > most:
                self._seen.complaints.append(f"when all was over {upstream.name} took long to serve a new client")
            await self._empty("the last client has left")
            if not self._plan.models:
                return  # all go to the first one

    def _settle(self) -> None:
        """Nothing may be left."""
        statistics, say = self._gateway.statistics(), self._seen.complaints.append
        if statistics.connections or statistics.in_flight or statistics.held_bytes:
            say(f"left in the gateway: {statistics}")
        if self._gateway.places.used or statistics.waiting or statistics.flow_bytes:
            say(f"places or bytes are left: {self._gateway.places.used} used, {statistics}")
        for books in dict.fromkeys((self._retired, self._books)):
            if books.open:
                say(f"not ended in the books: {books.open}")
        idle = 0
        for pool in self._pools:
            counts = pool.statistics()
            idle += counts.idle
            if counts.used or counts.waiting:
                say(f"a slot was not given back: {pool!r}")
        still = [end for end in self._network.ends if not end.closed]
        if len(still) != idle:
            say(f"{len(still)} streams are open and {idle} are idle in pools: {still}")
        self._seen.upstream_ends = [end for end in self._network.ends if end.client < 0]

    # -- what the gateway asks of the world ----------------------------------------------------------------------------

    async def _dial(self, upstream: Upstream) -> trio.abc.Stream | Failure:
        client = WHO.get()
        key = (client, self._network.turn.get(client, 0))
        number = self._dials[key] = self._dials.get(key, -1) + 1
        asks = self._plan.clients[client].asks
        how = asks[min(key[1], len(asks) - 1)].dial(number)
        self._network.note(f"c{client}", f"dials {upstream.name}: {how}")
        await trio.lowlevel.checkpoint()
        if how == "silent":
            await trio.sleep_forever()
        if how in ("refused", "dns"):
            kind = Kind.REFUSED if how == "refused" else Kind.DNS
            return Failure(Side.UPSTREAM, Phase.DIAL, kind, how, Retry.UNSENT)
        if how == "slow":
            await trio.sleep(self._plan.deadlines.connect * 0.6)
        plan, network = self._plan, self._network
        name = f"{upstream.name}/{len(network.ends)}"
        link = plan.request_link
        ours, theirs = network.pair(name, plan.response_link, SimLink(link.buffer, link.latency))
        network.moved[client] = trio.current_time()
        peer = UpstreamPeer(network, self._seen.attempts, upstream.name, ours, theirs)
        ours.measure = lambda: self._measure_answer(ours, peer)
        self.nursery.start_soon(peer.run)
        return network.for_gateway(ours)

    def _first_sent(self, client: int, number: int) -> None:
        self._books.sent(self._plan.clients[client].asks[number].tag)

    def finished(self, record: ExchangeRecord) -> None:
        """A record was made."""
        network, client = self._network, int(record.client.rpartition(".")[2])
        now = network.now
        used = [end for end in network.ends if end.uses and end.uses[-1].client == client and end.client < 0]
        heard = max((end.heard for end in used), default=-math.inf)
        key = (client, network.turn.get(client, 0))
        noted = Noted(
            record,
            now,
            now.time - network.moved.get(client, now.time),
            now.time - heard,
            self._dials.get(key, -1) + 1,
        )
        self._seen.records[client].append(noted)
        network.turn[client] = network.turn.get(client, 0) + 1
        network.uploaded[client] = 0
        self._read_before[client] = self._seen.client_ends[client].received
        network.note(f"c{client}", f"record: {record.outcome.value} {record.failure or ''} {record.flags or ''}")
        if record.outcome is Outcome.DRAINED and now.time < self._drained_by - 0.01:
            self._seen.complaints.append(f"{record.request_id} was drained before the time to finish was over")
        since = max(self._drained_by, now.time - noted.idle)  # a slow client that still takes bytes has its time
        if now.time - since > self._plan.deadlines.client_write + 1:
            self._seen.complaints.append(f"{record.request_id} ended {now.time - self._drained_by:g} s after the drain")

    # -- bounds --------------------------------------------------------------------------------------------------------

    def _measure_answer(self, end: GatewayEnd, peer: UpstreamPeer) -> None:
        """The payload of one answer that is in the gateway now."""
        attempt, use = peer.current, end.uses[-1] if end.uses else None
        client = self._seen.client_ends.get(use.client) if use is not None else None
        if attempt is None or client is None or use is None:
            return
        if any(model.on_disconnect for model in self._plan.models) and self._has_left(use.client):
            return  # it may be read to be dropped
        answering = self._answering.get(end)
        if answering is None or answering[0] is not attempt:
            answering = self._answering[end] = attempt, peer.said_before, client.sent
        _, raw_before, sent_before = answering
        held = attempt.said.payload_at(end.received - raw_before) - (client.sent - sent_before)
        ask, status = self._plan.ask(attempt.tag), attempt.said.status
        refused = status == 429 or status >= 500  # kept while another upstream is asked
        if ask.streams and (status != 200 or not ask.reply(attempt.number).sse):
            refused = True  # kept to be told in a stream that has begun
        more = (2 * KEPT_BYTES if refused else 0) + (HELD_BYTES if self._plan.holds else 0)
        if held > self._bound + more:
            self._seen.complaints.append(f"{attempt.tag}: {held} bytes of an answer are held, of {self._bound}")

    def _has_left(self, number: int) -> bool:
        return any(peer.number == number and (peer.left or peer.over) for peer in self._seen.clients)

    def _measure_upload(self, end: GatewayEnd) -> None:
        """The bytes of a client's requests that are in the gateway now."""
        client, bounds = end.client, self._plan.bounds
        held = end.received - self._read_before.get(client, 0) - self._network.uploaded.get(client, 0)
        if held <= self._bound + bounds.held_body_bytes + bounds.pipelined_bytes + bounds.head_bytes:
            return
        if any(view.client == f"192.0.2.{client}" for view in self._gateway.exchanges()):  # else it is thrown away
            self._seen.complaints.append(f"c{client}: the gateway holds {held} bytes of requests")


def _bound(bounds: Bounds) -> int:
    """Bytes that one direction may hold (design, section 4)."""
    return (2 * bounds.capacity + 2) * bounds.piece_bytes + max(bounds.handover_bytes, bounds.piece_bytes)
