"""Several workers: the parent that starts them, restarts them, passes orders on, and shows them as one.

Each worker is a fresh process with a listener of its own on the shared address (SO_REUSEPORT); the kernel spreads the
connections, the parent touches none. It holds the address, so that a second gateway is refused and a dead worker's
place stays ours. Invariants: a worker that dies takes its own streams with it and nothing else, and is started again
with back-off; settings are read here, once, and go to every worker as one; the line `listening on …` is said once, when
all accept; whatever becomes of the parent, no worker outlives its drain.
"""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import final

import trio
from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector

from canal_trio.errors import CanalError
from canal_trio.observe.admin import Admin
from canal_trio.observe.lines import LineWriter
from canal_trio.observe.log import logging_to, restyle
from canal_trio.serve.books import try_books
from canal_trio.serve.control import Drain, Message, Reload, Reloaded, Start, Stop
from canal_trio.serve.counting import Counting
from canal_trio.serve.greeting import greet
from canal_trio.serve.limits import raise_descriptor_limit, share_of
from canal_trio.serve.listen import Acceptor, Slots, open_listeners, reserve
from canal_trio.serve.merged_view import MergedView
from canal_trio.serve.reload import Reloader
from canal_trio.serve.run import ADMIN_HINT, LISTEN_HINT, SIGNALS, hinting, longest_stop
from canal_trio.serve.spawn import Worker
from canal_trio.serve.systemd import Handed, handed_over
from canal_trio.serve.watchdog import guard
from canal_trio.settings import Settings

__all__ = ["WorkerError", "supervise"]

BACK_OFF_FIRST, BACK_OFF_LAST = 0.1, 10.0  # seconds before a dead worker is started again
STEADY = 30.0  # seconds after which a worker has lived long enough to begin with the first back-off again
ORDER = 5.0  # seconds in which a worker takes an order
ANSWER = 10.0  # seconds in which a worker applies new settings
LAST = 5.0  # seconds from the last deadline to the kill

_log = logging.getLogger("canal_trio.serve")


class WorkerError(CanalError):
    """The workers could not be started. The text says why."""


def supervise(settings: Settings, *, config_loader: Callable[[], Settings] | None = None) -> int:
    """Serve with `settings.workers` processes until told to stop; the exit code: 0 if all of them drained cleanly.

    Main thread only (signals). Raises `ListenError` or `WorkerError`, in a group, with nothing left running.
    """
    raise_descriptor_limit()  # the workers inherit it
    return trio.run(_supervise, settings, config_loader, handed_over())


async def _supervise(
    settings: Settings, config_loader: Callable[[], Settings] | None, handed: Handed | None = None
) -> int:
    handed = handed or Handed()
    writer = LineWriter(2, capacity=settings.bounds.log_lines, shared=True)
    sockets: list[socket.socket] = []
    try:
        with logging_to(writer, settings.log), trio.open_signal_receiver(*SIGNALS) as signals:
            with hinting(LISTEN_HINT):
                held = handed.listening or await reserve(settings.listen)
            sockets += held
            with hinting(ADMIN_HINT):
                admin = handed.admin or await open_listeners([settings.admin] if settings.admin else [])
            sockets += admin
            counting = Counting(settings, settings.workers)
            try:
                return await _Supervisor(settings, config_loader, writer, handed, counting).run(held, admin, signals)
            finally:
                counting.close()
    finally:
        for sock in sockets:
            sock.close()
        handed.close()
        writer.close()


@final
class _Supervisor:
    def __init__(
        self,
        settings: Settings,
        config_loader: Callable[[], Settings] | None,
        writer: LineWriter,
        handed: Handed,
        counting: Counting,
    ) -> None:
        self._writer = writer
        self._counting = counting
        self._handed = handed
        self._notifier = handed.notifier
        self._settings = settings
        self._stopping = trio.Event()
        self._greeted = False
        self._workers = [Worker(number) for number in range(1, settings.workers + 1)]
        self._accepting = trio.Event()  # all of them, for the first time
        self._ended = trio.Event()  # all of them, for good
        self._killed = False
        registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=registry)
        reloads = Counter("canal_reloads", "Reloads of the configuration.", ["result"], registry=registry)
        Gauge("canal_workers", "Worker processes that accept connections.", registry=registry).set_function(
            lambda: sum(worker.accepting is not None for worker in self._workers)
        )
        self._restarts = Counter("canal_worker_restarts", "Workers that died and were replaced.", registry=registry)
        self._view = MergedView(self._workers, registry, self._stopping.is_set)
        self._reloader = Reloader(
            settings,
            config_loader,
            self._apply,
            lambda result: reloads.labels(result).inc(),
            self._stopping.is_set,
            self._notifier,
        )

    async def run(self, held: list[socket.socket], admin: list[socket.socket], signals: AsyncIterator[int]) -> int:
        addresses = [sock.getsockname()[:2] for sock in held]
        async with trio.open_nursery() as services:
            services.start_soon(self._obey, signals, services)
            services.start_soon(self._keep_all, addresses)
            services.start_soon(self._notifier.beat, self._status)
            services.start_soon(self._counting.run)
            page = Admin(self._view, self._view, refresh=self._view.refresh)
            slots = Slots(self._settings.bounds.admin_connections)
            for sock in admin:
                services.start_soon(Acceptor(sock, slots, lambda stream, _: page.handle(stream), services).run)
            await self._first(held, admin)
            await self._stopping.wait()
            await self._order(Drain())
            with trio.move_on_after(longest_stop(self._settings) + LAST):
                await self._ended.wait()
            self._kill()
            await self._ended.wait()
            services.cancel_scope.cancel(reason="every worker has ended")
        clean = not self._killed and all(worker.code in (0, None) for worker in self._workers)
        _log.log(
            logging.INFO if clean else logging.WARNING,
            "stopped: %s",
            "every worker has drained" if clean else "not every worker has drained",
        )
        return 0 if clean else 1

    async def _first(self, held: list[socket.socket], admin: list[socket.socket]) -> None:
        """Wait until all workers accept, and say so; or until there is no need any more."""
        await self._accepting.wait()
        self._greeted = True
        if self._stopping.is_set():
            return
        count = len(self._workers)
        warnings = [
            f"upstream {one.name}: {count} workers share {one.connections:g} connections, and each of them needs one"
            for one in self._settings.upstreams
            if one.connections is not None and one.connections < count
        ]
        capacity = self._workers[0].capacity
        assert capacity is not None
        greet(self._writer, self._settings, capacity, held, admin, workers=count, warnings=warnings)
        self._notifier.ready(self._status())

    def _status(self) -> str:
        """For systemd."""
        count = sum(worker.accepting is not None for worker in self._workers)
        return f"{'draining' if self._stopping.is_set() else 'serving'}: {count} of {len(self._workers)} workers"

    # -- the life of a worker ------------------------------------------------------------------------------------------

    async def _keep_all(self, addresses: list[tuple[str, int]]) -> None:
        async with trio.open_nursery() as nursery:
            for worker in self._workers:
                nursery.start_soon(self._keep, worker, addresses)
        self._ended.set()

    async def _keep(self, worker: Worker, addresses: list[tuple[str, int]]) -> None:
        """Have `worker` run until the end, in one process after the other if need be."""
        back_off = BACK_OFF_FIRST
        while not self._stopping.is_set():
            began = trio.current_time()
            await self._live(worker, addresses)
            if self._stopping.is_set():
                break
            if not self._greeted:
                raise WorkerError(worker.complaint or f"worker {worker.number} {worker.fate} before it accepted")
            if trio.current_time() >= began + STEADY:
                back_off = BACK_OFF_FIRST
            self._view.bury(worker)
            self._counting.bury(worker.number - 1)
            self._restarts.inc()
            _log.error(
                "worker %d %s%s; a new one starts in %g s",
                worker.number,
                worker.fate,
                f" ({worker.complaint})" if worker.complaint else "",
                back_off,
            )
            worker.code = None  # its successor's will count
            with trio.move_on_after(back_off):
                await self._stopping.wait()
            back_off = min(back_off * 2, BACK_OFF_LAST)
        self._began()  # nobody needs to wait for this one to accept

    async def _live(self, worker: Worker, addresses: list[tuple[str, int]]) -> None:
        """One process of `worker`, under our eyes."""
        inherited = [sock.fileno() for sock in self._handed.listening if sock.fileno() >= 0]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guard, worker, lambda: self._settings.deadlines.worker_answer)
            orders = partial(self._first_orders, worker, addresses, inherited)
            await worker.live(orders, self._began, [*inherited, self._counting.memory.fd])
            nursery.cancel_scope.cancel(reason="its process has ended")

    def _first_orders(
        self, worker: Worker, addresses: list[tuple[str, int]], inherited: list[int]
    ) -> list[Message]:
        share = share_of(self._settings, worker.number - 1, len(self._workers))
        memory = self._counting.memory.fd
        start = Start(worker.number, share, addresses, inherited, memory, len(self._workers))
        return [start, Drain()] if self._stopping.is_set() else [start]

    def _began(self) -> None:
        """A worker accepts, or will not any more."""
        if self._stopping.is_set() or all(worker.accepting is not None for worker in self._workers):
            self._accepting.set()

    # -- orders --------------------------------------------------------------------------------------------------------

    async def _obey(self, signals: AsyncIterator[int], services: trio.Nursery) -> None:
        async for number in signals:
            if number == signal.SIGHUP:
                self._reloader.begin(services)
            elif not self._stopping.is_set():
                _log.info("draining: %d workers; signal again to stop now", len(self._workers))
                self._stopping.set()
                self._accepting.set()
                self._notifier.stopping(longest_stop(self._settings) + LAST, self._status())
                for sock in self._handed.listening:  # for as long as we hold them, clients come in and find nobody
                    sock.close()
            else:
                services.start_soon(self._stop_now)

    async def _stop_now(self) -> None:
        self._killed = True
        await self._order(Stop())
        with trio.move_on_after(LAST):
            await self._ended.wait()
        self._kill()

    def _kill(self) -> None:
        for worker in self._workers:
            if worker.kill():
                self._killed = True
                _log.error("worker %d did not end in time: killed", worker.number)

    async def _order(self, message: Message) -> None:
        """Say it to all workers at once. One that does not listen loses its channel, and drains."""
        async with trio.open_nursery() as nursery:
            for worker in self._workers:
                nursery.start_soon(partial(worker.say, message, within=ORDER))

    async def _apply(self, new: Settings) -> None:
        """Have every worker use `new`, whoever starts from now on included; what one of them refuses is told.

        What is ours comes first. Raises `ConfigError`, with nothing changed, for what none of them could use.
        """
        await try_books(self._settings, new)
        await self._counting.change(new.limit_store.state)
        self._settings = new
        count = len(self._workers)
        refusals: dict[int, str] = {}

        async def one(worker: Worker) -> None:
            answer = await worker.ask(Reload(share_of(new, worker.number - 1, count)), Reloaded, within=ANSWER)
            if answer is None and worker.accepting is not None:
                refusals[worker.number] = "it does not answer"
            elif answer is not None and answer.refusal:
                refusals[worker.number] = answer.refusal

        async with trio.open_nursery() as nursery:
            for worker in self._workers:
                nursery.start_soon(one, worker)
        restyle(new.log)
        for number, refusal in sorted(refusals.items()):
            _log.error("worker %d keeps its old configuration: %s", number, refusal)
