"""Counting in Redis or Valkey, for all gateways that use it; and going on while it is away.

One connection for each worker, on which every command is written in the order of the calls; one task takes the answers
in the same order. So nothing overtakes, and nobody who is cancelled leaves a question behind: the answer comes, and a
place that was let in for somebody who has gone is given back.

When an answer is late, or wrong, or the connection breaks, Redis is away: from then on nobody waits for it. It is tried
again with back-off. A new session begins by telling it what this worker has in flight and what was spent meanwhile;
only then it is asked again. Invariants: `_held` is what this worker has in flight, wherever it was let in; what was
spent is told exactly once.
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, final

import trio
from coredis import Redis
from coredis.exceptions import RedisError

from canal_trio.policy.limit_fields import Counted
from canal_trio.policy.ratelimit import Ask
from canal_trio.policy.scopes import Scope
from canal_trio.quota import scripts
from canal_trio.quota.admission import Verdict
from canal_trio.quota.meanwhile import Local, Open
from canal_trio.quota.memory import MemoryStore
from canal_trio.quota.redis_parts import (
    Held,
    Name,
    Pending,
    Spent,
    limit_words,
    micros,
    rate_words,
    root_of,
    tls_options,
    verdict_of,
)
from canal_trio.settings import LimitStore

__all__ = ["RedisStore"]

LIVES = 15.0  # seconds after which a worker that says nothing is taken for dead
BEAT = 4.0
BACK_OFF_FIRST, BACK_OFF_LAST = 0.1, 2.0
CONNECT = 2.0
LAST = 60.0  # seconds in which one that was replaced may be back, to be told the rest
_LOOKS = 0.1
REMEMBERED = 65_536  # scopes of which Redis has to be told; clients may choose the models

_log = logging.getLogger("canal_trio.quota")
_theirs = logging.getLogger("coredis")
_theirs.addHandler(logging.NullHandler())
_theirs.propagate = False  # it logs a traceback for each failed connection; ours is one line for each absence


class _Away(Exception):
    """The session is over."""


@final
class RedisStore:
    """A `quota.admission.Store` in the Redis that `settings` name. `local` counts meanwhile, if that was chosen."""

    admit_now = None

    def __init__(self, settings: LimitStore, local: MemoryStore) -> None:
        assert settings.redis is not None
        self._local = local
        self._url = settings.redis
        self._name = "Redis"  # for people
        self.configure(settings)
        self._me = os.urandom(9).hex()
        self._prefix = f"{{{settings.prefix}}}:"  # in braces: one slot of a cluster
        self._workers = f"{self._prefix}workers".encode()
        self._mine = f"{self._prefix}worker:{self._me}".encode()
        self._session = 0
        self._number = 0
        self._connection: Any = None  # while it is asked
        self._digests: dict[str, bytes] = {}
        self._pending: deque[Pending] = deque()
        self._waiting = trio.Event()  # for something to be pending
        self._trouble = trio.Event()
        self._held: dict[str, Held] = {}
        self._stale: set[str] = set()  # scopes in which Redis may think otherwise of what is held
        self._told: deque[Spent] = deque()  # without an answer yet
        self._owed: dict[str, tuple[Scope, int]] = {}
        self._reason = "it was not reached yet"
        self.errors = 0

    def configure(self, settings: LimitStore) -> None:
        """From now on `fail` and `timeout` are these; the URL and the prefix are the same. Not a checkpoint."""
        self._timeout = settings.timeout
        self._fail = settings.fail
        meanwhile: dict[str, Local | Open] = {"local": Local(self, self._local), "open": Open(self, REMEMBERED)}
        self._meanwhile = meanwhile.get(settings.fail)  # none: nothing is let in

    def replaced(self) -> None:
        """Another store is asked from now on: `finish` is due once everything of this one has ended."""
        self._name, self._fail = "the former Redis", "replaced"

    @property
    def away(self) -> bool:
        """It is not asked at the moment."""
        return self._connection is None

    @property
    def untold(self) -> int:
        """Scopes of which Redis has to be told when it is back."""
        return len(self._stale)

    # -- exchanges -----------------------------------------------------------------------------------------------------

    async def admit(self, scopes: tuple[Scope, ...], ask: Ask) -> Verdict | None:
        """By Redis, or as was chosen while it is away. A checkpoint; cancelled, a place is given back when it comes."""
        if self._connection is not None:
            pending = self._send(scripts.ADMIT, scopes, [ask.tokens, ask.cost, *limit_words(scopes)])
            if pending is not None:
                pending.answered = lambda answer: self._was_asked(pending, scopes, ask, answer)
                try:
                    await pending.event.wait()
                except trio.Cancelled:
                    pending.given_up = True
                    if self._let_in(pending.answer):
                        self.settle_in(scopes, ask, Ask())
                    raise
                if pending.answer is not None:
                    return verdict_of(scopes, ask, pending.answer, self)
        await trio.lowlevel.checkpoint()
        return None if self._meanwhile is None else self._meanwhile.admit(scopes, ask)

    def _was_asked(self, pending: Pending, scopes: Sequence[Scope], ask: Ask, answer: Any) -> None:
        if self._let_in(answer):
            self.hold(scopes, ask, told=True)
            if pending.given_up:
                self.settle_in(scopes, ask, Ask())

    @staticmethod
    def _let_in(answer: Any) -> bool:
        return answer is not None and answer[0] == 1

    def hold(self, scopes: Sequence[Scope], ask: Ask, *, told: bool) -> None:
        """An exchange of this worker was let in. `told`: by Redis itself."""
        for scope in scopes:
            held = self._held.setdefault(scope.id, Held(scope))
            held.streams += 1
            held.reserved += ask.cost
            if not told:
                self._stale.add(scope.id)

    def drop(self, scopes: Sequence[Scope], ask: Ask, used: Ask, *, told: bool) -> None:
        """It has ended. `told`: Redis hears of it in a command of its own; else it is told when that is possible."""
        for scope in scopes:
            held = self._held[scope.id]
            held.streams -= 1
            held.reserved -= ask.cost
            if not told:
                self._stale.add(scope.id)
                if used.cost:
                    self._owed[scope.id] = (scope, self._owed.get(scope.id, (scope, 0))[1] + used.cost)
            if not held.streams:
                del self._held[scope.id]

    def settle(self, counted: Counted, ask: Ask, used: Ask) -> None:
        """What Redis let in has ended. Not a checkpoint."""
        self.settle_in([scope for scope, _ in counted], ask, used)

    def settle_in(self, scopes: Sequence[Scope], ask: Ask, used: Ask) -> None:
        """What was let in with these scopes has ended. Not a checkpoint."""
        if self._connection is not None:
            spent = Spent(self._next(), scopes, used.cost)
            arguments = [spent.number, ask.tokens, ask.cost, used.tokens, used.cost, *rate_words(scopes, burst=True)]
            self._told.append(spent)
            if self._send(scripts.SETTLE, scopes, arguments, lambda _: self._heard(spent)) is not None:
                self.drop(scopes, ask, used, told=True)
                return
            self._told.pop()
        self.drop(scopes, ask, used, told=False)

    def _heard(self, spent: Spent) -> None:
        assert self._told[0] is spent, "answers come in the order of the questions"
        self._told.popleft()

    def _next(self) -> int:
        self._number += 1
        return self._number

    async def flush(self) -> None:
        """Wait until Redis knows what was settled; not for longer than it may take to answer."""
        with trio.move_on_after(2 * self._timeout):
            while self._pending:  # an answer may lead to another question: its exchange has gone
                await self._pending[-1].event.wait()

    async def finish(self) -> None:
        """Nothing is in flight here any more: wait until Redis knows all of it. If it is away, not for ever."""
        with trio.move_on_after(LAST):
            while self._pending or self._told or self._owed or self._stale:  # noqa: ASYNC110  # seldom, and no hurry
                await trio.sleep(_LOOKS)
            return
        _log.error("limits: %s is still away: what was spent there last it is not told", self._name)

    # -- commands ------------------------------------------------------------------------------------------------------

    def _send(
        self,
        script: str,
        scopes: Sequence[Scope],
        arguments: Sequence[float],
        answered: Callable[[Any], None] = lambda _: None,
        connection: Any = None,
    ) -> Pending | None:
        """Write a command; its place in the line of answers, or None if that cannot be done. Not a checkpoint."""
        keys = [self._workers, self._mine, *(f"{self._prefix}{scope.id}".encode() for scope in scopes)]
        words: list[bytes] = [b"", self._me.encode(), b"%d" % self._session]
        words += [b"-1" if math.isinf(one) else repr(one).encode() for one in arguments]
        try:
            request = (connection or self._connection).create_request(
                b"EVALSHA", self._digests[script], len(keys), *keys, *words, decode=False
            )
        except RedisError as exc:
            self._lost(exc)
            return None
        pending = Pending(request, scopes, answered)
        self._pending.append(pending)
        self._waiting.set()
        return pending

    def _lost(self, exc: BaseException | str) -> None:
        """From here on nobody waits for Redis."""
        if not self._trouble.is_set():
            self.errors += 1
            self._reason = str(exc) or type(exc).__name__
            self._trouble.set()
        self._give_up()

    async def _take_answers(self) -> None:
        """In their order, each in time. Ends when one is not."""
        while True:
            if not self._pending:
                self._waiting = trio.Event()
                await self._waiting.wait()
            pending = self._pending[0]
            try:
                with trio.fail_after(self._timeout):
                    answer = await pending.request
                if isinstance(answer, list) and answer[0] == b"stale":
                    raise _Away("it does not know of us: was it emptied?")
            except trio.TooSlowError:
                self._lost(f"no answer in {self._timeout:g} s")
                return
            except Exception as exc:
                self._lost(exc)
                return
            if not self._pending or self._pending[0] is not pending:
                return  # given up meanwhile
            self._pending.popleft()
            pending.answer = answer
            pending.answered(answer)
            pending.event.set()

    # -- sessions ------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a session, as long as that is possible, until cancelled. Started once the first one is, or fails."""
        back_off, told, began = BACK_OFF_FIRST, False, False
        while True:
            self._trouble = trio.Event()
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self._keep)
                    if told:
                        _log.info("limits: %s is back", self._name)
                    back_off, told = BACK_OFF_FIRST, False
                    if not began:
                        began = True
                        task_status.started()
                    await self._trouble.wait()
                    nursery.cancel_scope.cancel(reason="Redis is away")
            except Exception as exc:
                self._lost(root_of(exc))
            finally:
                self._give_up()
            if not told:
                told = True
                meanwhile = _MEANWHILE[self._fail]
                _log.error("limits: %s is away (%s): %s until it is back", self._name, self._reason, meanwhile)
            if not began:
                began = True
                task_status.started()
            await trio.sleep(back_off)
            back_off = min(back_off * 2, BACK_OFF_LAST)

    async def _keep(self, *, task_status: trio.TaskStatus[None]) -> None:
        """One session, on one connection."""
        url, options = tls_options(self._url)
        client: Redis[bytes] = Redis.from_url(
            url, max_connections=1, connect_timeout=CONNECT, verify_version=False, decode_components=True, **options
        )
        async with client:
            with trio.fail_after(CONNECT + 2 * self._timeout):
                connection = await client.connection_pool.get_connection()
                for script in scripts.ALL:
                    self._digests[script] = await connection.create_request(b"SCRIPT LOAD", script, decode=False)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._take_answers)
                await self._catch_up(connection)
                self._connection = connection
                task_status.started()
                while True:
                    await trio.sleep(BEAT)
                    if self._send(scripts.BEAT, (), [micros(LIVES)]) is None:
                        return

    async def _catch_up(self, connection: Any) -> None:
        """Begin a session and tell Redis what it does not know, until it knows all."""
        self._session += 1
        await self._tell(connection, scripts.BEGIN, (), [micros(LIVES)])
        self._stale.update(self._held)
        while self._told or self._owed or self._stale:
            for scope, cost in self._owed.values():
                self._told.append(Spent(self._next(), (scope,), cost))
            self._owed.clear()
            while self._told:
                spent = self._told[0]
                arguments = [spent.number, spent.cost, *rate_words(spent.scopes, burst=False)]
                await self._tell(connection, scripts.SPEND, spent.scopes, arguments)
                self._told.popleft()
            if self._stale:
                name = self._stale.pop()
                try:
                    await self._tell_count(connection, name)
                except BaseException:
                    self._stale.add(name)
                    raise

    async def _tell_count(self, connection: Any, name: str) -> None:
        held = self._held.get(name)
        streams, reserved = (held.streams, held.reserved) if held is not None else (0, 0)
        await self._tell(connection, scripts.COUNT, (Name(name),), [streams, reserved])

    async def _tell(
        self, connection: Any, script: str, scopes: Sequence[Any], arguments: Sequence[float]
    ) -> None:
        pending = self._send(script, scopes, arguments, connection=connection)
        if pending is not None:
            await pending.event.wait()
        if pending is None or pending.answer is None or self._trouble.is_set():
            raise _Away(self._reason)

    def _give_up(self) -> None:
        """Nobody waits any longer: what was asked has no answer."""
        self._connection = None
        for pending in self._pending:
            self._stale.update(scope.id for scope in pending.scopes)  # whether it was done is not known
            pending.event.set()
        self._pending.clear()


_MEANWHILE = {
    "open": "everything is let in",
    "closed": "nothing is let in",
    "local": "this machine counts by itself",
    "replaced": "it does not hear what was spent there last",
}
