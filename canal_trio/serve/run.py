"""One serving process: listeners, gateway, admin, signals, and the order in which they start and stop.

Start: the addresses first (a taken port must cost nothing), then the gateway's services, then the accept loops, then
the line `listening on …`. Stop, on SIGTERM or SIGINT: the gateway drains (`/readyz` says 503 from here), what the
kernel has accepted already is taken in, the listeners close, streams finish until the deadline and are then ended
honestly by the gateway; a second signal cancels everything at once. The admin listener goes last.

Three nurseries, one inside the other: services, connections, doors. Leaving the inner one closes the doors; the middle
one waits for the streams; the outer one is cancelled when they are done. Every wait of a stop has a deadline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, final

import trio

from canal_trio.hooks import Admissions, Recorder
from canal_trio.observe.accesslog import AccessLog
from canal_trio.observe.admin import Admin
from canal_trio.observe.lines import LineWriter
from canal_trio.observe.log import logging_to, restyle
from canal_trio.observe.metrics import Metrics, Statistics
from canal_trio.relay.streams import TcpStream
from canal_trio.relay.waiting import wait_in_poller
from canal_trio.serve.authority import subject_of
from canal_trio.serve.books import Booked, Books
from canal_trio.serve.counting import Counting, Stores, show_limits
from canal_trio.serve.crowd import Crowd, Partings, refusal
from canal_trio.serve.greeting import greet
from canal_trio.serve.limits import Capacity, capacity_of, freeze_garbage, raise_descriptor_limit, with_ceiling
from canal_trio.serve.listen import Acceptor, ListenError, Slots, open_listeners, set_options
from canal_trio.serve.reload import Reloader, in_a_thread
from canal_trio.serve.systemd import Handed, handed_over
from canal_trio.serve.tls import Certificates, Terminator
from canal_trio.settings import Settings

__all__ = [
    "ADMIN_HINT",
    "GRACE",
    "LISTEN_HINT",
    "SIGNALS",
    "Served",
    "ServedGateway",
    "Server",
    "hinting",
    "longest_stop",
    "real_gateway",
    "run",
    "serve",
]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LISTEN_HINT = "--listen HOST:PORT chooses another address"
ADMIN_HINT = "--admin HOST:PORT puts the admin listener elsewhere, --admin off leaves it out"
GRACE = 3.0  # seconds after the drain deadline and the lingering close, in which an honest ending is written

_log = logging.getLogger("canal_trio.serve")


class ServedGateway(Booked, Protocol):
    """What serving needs of a gateway. `canal_trio.gateway.Gateway` is the one."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Background services, until cancelled."""

    async def handle(
        self, stream: trio.abc.Stream, *, peer: str = "", scheme: str = "http", certificate: str | None = None
    ) -> None:
        """Serve one client connection and close it."""

    def prepare(self, settings: Settings) -> None:
        """In any thread: do what a reload with them would take long for."""

    def reload(self, settings: Settings) -> None:
        """Use `settings` for the next requests."""

    def make_room(self) -> int:
        """Close some idle client connections; how many."""

    def drain(self, deadline: float) -> None:
        """Finish what runs, end it honestly at `deadline` (Trio's clock)."""

    @property
    def draining(self) -> bool:
        """Draining has begun."""

    def ready(self) -> bool:
        """New exchanges are welcome."""

    def exchanges(self) -> Iterable[object]:
        """The exchanges in flight."""

    def statistics(self) -> Statistics:
        """Counts of now."""

    def limit_by(self, admissions: Admissions) -> None:
        """Have each exchange admitted by the hook that this gives for a configuration."""


@dataclasses.dataclass(frozen=True, slots=True)
class Served:
    """Where a started server can be reached: what `serve` reports to `nursery.start`."""

    listen: tuple[tuple[str, int], ...]
    admin: tuple[tuple[str, int], ...]
    gateway: ServedGateway


def run(settings: Settings, *, config_loader: Callable[[], Settings] | None = None) -> int:
    """Serve in a process of our own until told to stop; the exit code. Raises `ListenError`."""
    descriptors, handed = raise_descriptor_limit(), handed_over()
    return trio.run(
        partial(
            serve,
            settings,
            config_loader=config_loader,
            descriptors=descriptors,
            on_listening=freeze_garbage,
            handed=handed,
        )
    )


def real_gateway(settings: Settings, recorders: Sequence[Recorder]) -> ServedGateway:
    """`canal_trio.gateway.Gateway`, as a maker of gateways."""
    from canal_trio.gateway import Gateway  # late: tests serve others

    return Gateway(settings, recorders=recorders)


async def serve(
    settings: Settings,
    *,
    config_loader: Callable[[], Settings] | None = None,
    make_gateway: Callable[[Settings, Sequence[Recorder]], ServedGateway] = real_gateway,
    descriptors: int = 1024,
    log_fd: int = 2,
    on_listening: Callable[[], None] = lambda: None,
    handed: Handed | None = None,
    task_status: trio.TaskStatus[Served] = trio.TASK_STATUS_IGNORED,
) -> int:
    """Serve until SIGTERM or SIGINT, then drain. The exit code: 0, or 1 if streams were cut without their ending.

    Main thread only (signals). `config_loader` is called in a thread on SIGHUP and returns the new settings or raises
    `ConfigError`; without one SIGHUP ends it, too (the terminal is gone). `log_fd` stays open. Sockets that were
    `handed` over are used instead of `settings`' addresses. Raises `ListenError`, or `ConfigError` for certificates
    that cannot be used, before anything was started. Cancelling it closes the listeners and cancels every connection.
    """
    handed = handed or Handed()
    certificates = None if settings.tls is None else Certificates(settings.tls)
    counting = Counting(settings)
    stores = counting.stores(settings)
    writer = LineWriter(log_fd, capacity=settings.bounds.log_lines)
    try:
        with logging_to(writer, settings.log), trio.open_signal_receiver(*SIGNALS) as signals:
            with hinting(LISTEN_HINT):
                listening = handed.listening or await open_listeners(settings.listen)
            try:
                books = Books(settings)
                with hinting(ADMIN_HINT):
                    admin = handed.admin or await open_listeners([settings.admin] if settings.admin else [])
            except BaseException:
                _close(listening)
                raise
            capacity = capacity_of(settings, descriptors)
            server = Server(settings, make_gateway, capacity, writer, certificates, stores, books)
            stopping = server.stop.is_set
            reloader = Reloader(settings, config_loader, server.apply, server.count_reload, stopping, handed.notifier)

            def started() -> None:
                on_listening()
                greet(writer, settings, capacity, listening, admin)
                handed.notifier.ready("serving")
                task_status.started(Served(_addresses(listening), _addresses(admin), server.gateway))

            async def orders(services: trio.Nursery) -> None:
                services.start_soon(handed.notifier.beat, server.status)
                services.start_soon(counting.run)
                async for number in signals:
                    if number == signal.SIGHUP and config_loader is not None:
                        reloader.begin(services)
                    elif not server.stop.is_set():
                        server.stop.set()
                        handed.notifier.stopping(longest_stop(server.settings), "draining")
                    else:
                        server.cut()

            try:
                return await server.run(listening, admin, orders, started)
            finally:
                books.close()
                _close(listening + admin)
    finally:
        counting.close()
        handed.close()
        writer.close()


def longest_stop(settings: Settings) -> float:
    """Seconds from SIGTERM to the end of this process, at most."""
    return settings.deadlines.drain + settings.deadlines.linger + GRACE


@contextlib.contextmanager
def hinting(hint: str) -> Iterator[None]:
    """A `ListenError` in the block says what to do about it."""
    try:
        yield
    except ListenError as exc:
        raise ListenError(f"{exc}; {hint}") from None


def _close(sockets: Iterable[socket.socket]) -> None:
    for sock in sockets:
        if sock.fileno() >= 0:
            trio.lowlevel.notify_closing(sock)
            sock.close()


def _addresses(sockets: Iterable[socket.socket]) -> tuple[tuple[str, int], ...]:
    return tuple(sock.getsockname()[:2] for sock in sockets)


@final
class Server:
    """A gateway with its doors: what serves in this process, whoever gives the orders.

    `stop` begins the drain, `cut` ends everything at once, `apply` swaps settings.
    """

    def __init__(
        self,
        settings: Settings,
        make_gateway: Callable[[Settings, Sequence[Recorder]], ServedGateway],
        capacity: Capacity,
        writer: LineWriter,
        certificates: Certificates | None,
        stores: Stores,
        books: Books,
    ) -> None:
        self.settings = settings = with_ceiling(settings)
        self.capacity = capacity
        self.metrics = metrics = Metrics()
        self.access_log = AccessLog(writer, settings.log)
        self.gateway = make_gateway(settings, [metrics, self.access_log])
        self.books = books
        books.kept_by(self.gateway, metrics)
        metrics.watch(self.gateway)
        self._stores = stores
        self.gateway.limit_by(stores.limits.admission)
        show_limits(metrics, stores)
        self.slots = Slots(capacity.connections)
        self.listener_slots: list[Slots] = []  # of each listener
        shed = metrics.shed.labels
        self.crowd = Crowd(settings.bounds.address_connections, settings.trusted_proxies, lambda: shed("address").inc())
        self.partings = Partings()
        metrics.gauge("canal_connection_slots", "Client connections there may be.", lambda: self.slots.total)
        metrics.gauge("canal_tasks", "Tasks that live: the gateway's own, and those of its connections.",
                      lambda: trio.lowlevel.current_statistics().tasks_living)  # fmt: skip
        metrics.gauge("canal_log_lines_dropped", "Log lines lost: read too slowly, or not written.",
                      lambda: writer.dropped)  # fmt: skip
        self.terminator: Terminator | None = None
        if certificates is not None:
            shaken = metrics.tls_handshakes.labels
            most = settings.bounds.tls_handshakes
            self.terminator = terminator = Terminator(certificates, lambda result: shaken(result).inc(), most)
            shakes = terminator.handshakes
            metrics.gauge("canal_tls_handshakes_running", "Handshakes of clients at work.", lambda: shakes.running)
            metrics.gauge("canal_tls_handshakes_waiting", "Handshakes of clients in line.", lambda: shakes.waiting)
        self.sockets: list[socket.socket] = []
        self.stop = trio.Event()
        self.stopped = trio.CancelScope()  # around the connections
        self.forced = False

    async def run(
        self,
        listening: list[socket.socket],
        admin: list[socket.socket],
        orders: Callable[[trio.Nursery], Awaitable[None]],
        started: Callable[[], None],
    ) -> int:
        """Serve until `stop` is set, then drain; the exit code. The sockets stay the caller's to close.

        `orders` is a task that runs meanwhile, in the nursery it gets; `started` is called when connections are
        accepted. Cancelling it cancels every connection.
        """
        self.sockets = listening
        async with trio.open_nursery() as services:
            services.start_soon(wait_in_poller)
            await services.start(self.books.run)
            services.start_soon(orders, services)
            await self._stores.begin(services, self.gateway.settled)
            await services.start(self.gateway.run)
            services.start_soon(self.partings.run)
            page = Admin(self.gateway, self.metrics)
            admin_slots = Slots(self.settings.bounds.admin_connections)
            for sock in admin:
                acceptor = Acceptor(sock, admin_slots, lambda stream, _peer: page.handle(stream), services)
                services.start_soon(acceptor.run)
            with self.stopped:
                async with trio.open_nursery() as connections:
                    doors = [self._door(sock, connections) for sock in listening]
                    async with trio.open_nursery() as open_doors:
                        for door in doors:
                            open_doors.start_soon(door.run)
                        started()
                        await self.stop.wait()
                        self._begin_drain()
                        open_doors.cancel_scope.cancel(reason="draining")
                    for door in doors:
                        door.close()
            await self.books.finish()
            await self._stores.flush()
            services.cancel_scope.cancel(reason="served")
        if self.stopped.cancelled_caught:
            _log.warning("stopped: %s", "told twice" if self.forced else "some streams did not end in time")
            return 1
        _log.info("stopped: every stream has ended")
        return 0

    # -- connections ---------------------------------------------------------------------------------------------------

    def _door(self, sock: socket.socket, connections: trio.Nursery) -> Acceptor:
        set_options(sock, self.settings.bounds, self.settings.deadlines)
        trouble = self.metrics.accept_errors.labels
        slots = Slots(self.settings.bounds.listener_connections, self.slots)
        self.listener_slots.append(slots)
        return Acceptor(
            sock,
            slots,
            self._connection,
            connections,
            trouble=lambda cause: trouble(cause).inc(),
            make_room=self._make_room,
            crowd=self.crowd,
            partings=self.partings,
            refusal=refusal if self.terminator is None else bytes,
            bug=self.metrics.internal_errors.inc,
        )

    def _make_room(self) -> None:
        self.metrics.shed.labels("idle").inc(self.gateway.make_room())

    def _connection(self, stream: TcpStream, peer: str) -> Coroutine[Any, Any, None]:
        terminator = self.terminator
        if terminator is None:  # no coroutine of its own for each stream
            return self.gateway.handle(stream, peer=peer)
        return self._secured(terminator, stream, peer)

    async def _secured(self, terminator: Terminator, stream: TcpStream, peer: str) -> None:
        deadlines = self.settings.deadlines
        secured = await terminator.secure(stream, peer, limit=deadlines.tls_handshake, linger=deadlines.linger)
        if secured is not None:
            subject = subject_of(secured.peer_certificate())
            await self.gateway.handle(secured, peer=peer, scheme="https", certificate=subject)

    # -- orders --------------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """End everything now."""
        self.stop.set()
        self.forced = True
        self.stopped.cancel(reason="a second signal")

    def _begin_drain(self) -> None:
        deadlines = self.settings.deadlines
        deadline = trio.current_time() + deadlines.drain
        self.gateway.drain(deadline)
        if self.terminator is not None:
            self.terminator.hurry(deadlines.linger)  # who has not said a word by now must not hold up the end
        self.stopped.deadline = trio.current_time() + longest_stop(self.settings)
        what = "1 exchange has" if (count := self.gateway.statistics().in_flight) == 1 else f"{count} exchanges have"
        _log.info("draining: %s %g seconds to finish; signal again to stop now", what, deadlines.drain)

    def status(self) -> str:
        """For systemd: how many it serves now."""
        now = self.gateway.statistics()
        state = "draining" if self.stop.is_set() else "serving"
        return f"{state}: {now.in_flight} exchanges, {now.connections} connections"

    def count_reload(self, result: str) -> None:
        """For the metrics: `ok` or `refused`."""
        self.metrics.reloads.labels(result).inc()

    async def apply(self, new: Settings) -> None:
        """Swap settings and what they name, touching no stream. Raises `ConfigError`, with nothing changed."""
        new = with_ceiling(new)
        certificates = None if new.tls is None else await in_a_thread(Certificates, new.tls)  # other files, perhaps
        await in_a_thread(self.gateway.prepare, new)
        with await self.books.prepare(new) as books:
            self._stores.swap(await self._stores.prepare(new.limit_store))  # the last that can fail; before the hooks
            self.gateway.reload(new)
            books.swap()
        self.access_log.restyle(new.log)
        restyle(new.log)
        if self.terminator is not None and certificates is not None:
            self.terminator.certificates = certificates
            self.terminator.handshakes.resize(new.bounds.tls_handshakes)
        self.settings = new
        self.slots.resize(capacity_of(new, self.capacity.descriptors).connections)
        for slots in self.listener_slots:
            slots.resize(new.bounds.listener_connections)
        self.crowd.configure(new.bounds.address_connections, new.trusted_proxies)
        for sock in self.sockets:
            if sock.fileno() >= 0:
                set_options(sock, new.bounds, new.deadlines)
        await self._stores.swapped()
