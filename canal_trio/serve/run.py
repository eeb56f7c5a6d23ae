"""One serving process: listeners, gateway, admin, signals, and the order in which they start and stop.

Start: the addresses first (a taken port must cost nothing), then the gateway's services, then the accept loops, then
the line `listening on …`. Stop, on SIGTERM or SIGINT: the gateway drains (`/readyz` says 503 from here), what the
kernel has accepted already is taken in, the listeners close, streams finish until the deadline and are then ended
honestly by the gateway; a second signal cancels everything at once. The admin listener goes last.

Three nurseries, one inside the other: services, connections, doors. Leaving the inner one closes the doors; the middle
one waits for the streams; the outer one is cancelled when they are done. Every wait of a stop has a deadline.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from typing import Protocol, final

import trio

from canal_trio import __version__
from canal_trio.errors import ConfigError
from canal_trio.hooks import Recorder
from canal_trio.observe.accesslog import AccessLog
from canal_trio.observe.admin import Admin
from canal_trio.observe.lines import LineWriter
from canal_trio.observe.log import describe, logging_to
from canal_trio.observe.metrics import Metrics, Statistics
from canal_trio.relay.streams import TcpStream
from canal_trio.serve.limits import Capacity, capacity_of, freeze_garbage, raise_descriptor_limit
from canal_trio.serve.listen import Acceptor, Slots, listening_texts, open_listeners, set_options
from canal_trio.serve.tls import Certificates, Terminator
from canal_trio.settings import Settings

__all__ = ["Served", "ServedGateway", "run", "serve"]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE = 3.0  # seconds after the drain deadline and the lingering close, in which an honest ending is written

# What a running process cannot change: it needs new sockets, another process or another log.
_NEEDS_RESTART = ("listen", "admin", "workers", "log")

_log = logging.getLogger("canal_trio.serve")


class ServedGateway(Protocol):
    """What serving needs of a gateway. `canal_trio.gateway.Gateway` is the one."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Background services, until cancelled."""

    async def handle(self, stream: trio.abc.Stream, *, peer: str = "", scheme: str = "http") -> None:
        """Serve one client connection and close it."""

    def reload(self, settings: Settings) -> None:
        """Use `settings` for the next requests."""

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


@dataclasses.dataclass(frozen=True, slots=True)
class Served:
    """Where a started server can be reached: what `serve` reports to `nursery.start`."""

    listen: tuple[tuple[str, int], ...]
    admin: tuple[tuple[str, int], ...]
    gateway: ServedGateway


def run(settings: Settings, *, config_loader: Callable[[], Settings] | None = None) -> int:
    """Serve in a process of our own until told to stop; the exit code. Raises `ListenError`."""
    descriptors = raise_descriptor_limit()
    return trio.run(
        partial(serve, settings, config_loader=config_loader, descriptors=descriptors, on_listening=freeze_garbage)
    )


def _real_gateway(settings: Settings, recorders: Sequence[Recorder]) -> ServedGateway:
    from canal_trio.gateway import Gateway  # late: tests serve others

    return Gateway(settings, recorders=recorders)


async def serve(
    settings: Settings,
    *,
    config_loader: Callable[[], Settings] | None = None,
    make_gateway: Callable[[Settings, Sequence[Recorder]], ServedGateway] = _real_gateway,
    descriptors: int = 1024,
    log_fd: int = 2,
    on_listening: Callable[[], None] = lambda: None,
    task_status: trio.TaskStatus[Served] = trio.TASK_STATUS_IGNORED,
) -> int:
    """Serve until SIGTERM or SIGINT, then drain. The exit code: 0, or 1 if streams were cut without their ending.

    Main thread only (signals). `config_loader` is called in a thread on SIGHUP and returns the new settings or raises
    `ConfigError`. `log_fd` stays open. Raises `ListenError`, or `ConfigError` for certificates that cannot be used,
    before anything was started. Cancelling it closes the listeners and cancels every connection.
    """
    certificates = None if settings.tls is None else Certificates(settings.tls)
    writer = LineWriter(log_fd, capacity=settings.bounds.log_lines)
    try:
        with logging_to(writer, settings.log), trio.open_signal_receiver(*SIGNALS) as signals:
            listening = await open_listeners(settings.listen)
            try:
                admin = await open_listeners([settings.admin] if settings.admin else [])
            except BaseException:
                _close(listening)
                raise
            capacity = capacity_of(settings, descriptors)
            server = _Server(settings, config_loader, make_gateway, capacity, writer, certificates)
            try:
                return await server.run(listening, admin, signals, on_listening, task_status)
            finally:
                _close(listening + admin)
    finally:
        writer.close()


def _close(sockets: Iterable[socket.socket]) -> None:
    for sock in sockets:
        if sock.fileno() >= 0:
            trio.lowlevel.notify_closing(sock)
            sock.close()


@final
class _Server:
    def __init__(
        self,
        settings: Settings,
        config_loader: Callable[[], Settings] | None,
        make_gateway: Callable[[Settings, Sequence[Recorder]], ServedGateway],
        capacity: Capacity,
        writer: LineWriter,
        certificates: Certificates | None,
    ) -> None:
        self.settings = settings
        self.config_loader = config_loader
        self.capacity = capacity
        self.writer = writer
        self.metrics = metrics = Metrics()
        self.gateway = make_gateway(settings, [metrics, AccessLog(writer, settings.log)])
        metrics.watch(self.gateway)
        self.slots = Slots(capacity.connections)
        metrics.gauge("canal_connection_slots", "Client connections there may be.", lambda: self.slots.total)
        metrics.gauge("canal_log_lines_dropped", "Log lines lost because the log is read too slowly.",
                      lambda: writer.dropped)  # fmt: skip
        self.terminator: Terminator | None = None
        if certificates is not None:
            shaken = metrics.tls_handshakes.labels
            self.terminator = Terminator(certificates, lambda result: shaken(result).inc())
        self.sockets: list[socket.socket] = []
        self.stop = trio.Event()
        self.stopped = trio.CancelScope()  # around the connections
        self.forced = False
        self.reloading = False
        self.reload_again = False

    async def run(
        self,
        listening: list[socket.socket],
        admin: list[socket.socket],
        signals: AsyncIterator[int],
        on_listening: Callable[[], None],
        task_status: trio.TaskStatus[Served],
    ) -> int:
        self.sockets = listening
        async with trio.open_nursery() as services:
            services.start_soon(self._obey, signals, services)
            await services.start(self.gateway.run)
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
                        on_listening()
                        self._greet(listening, admin)
                        task_status.started(
                            Served(
                                tuple(sock.getsockname()[:2] for sock in listening),
                                tuple(sock.getsockname()[:2] for sock in admin),
                                self.gateway,
                            )
                        )
                        await self.stop.wait()
                        self._begin_drain()
                        open_doors.cancel_scope.cancel(reason="draining")
                    for door in doors:
                        door.close()
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
        return Acceptor(sock, self.slots, self._connection, connections, trouble=lambda cause: trouble(cause).inc())

    async def _connection(self, stream: TcpStream, peer: str) -> None:
        """The boundary of one connection: what gets here is a bug, and it ends nobody else's stream."""
        try:
            if self.terminator is None:
                await self.gateway.handle(stream, peer=peer)
                return
            deadlines = self.settings.deadlines
            secured = await self.terminator.secure(stream, peer, limit=deadlines.tls_handshake, linger=deadlines.linger)
            if secured is not None:
                await self.gateway.handle(secured, peer=peer, scheme="https")
        except* Exception as group:
            self.metrics.internal_errors.inc()
            _log.error("a bug ended a connection from %s", peer, exc_info=group)

    # -- signals -------------------------------------------------------------------------------------------------------

    async def _obey(self, signals: AsyncIterator[int], services: trio.Nursery) -> None:
        async for number in signals:
            if number == signal.SIGHUP:
                if self.reloading:
                    self.reload_again = True
                else:
                    self.reloading = True
                    services.start_soon(self._reload)
            elif not self.stop.is_set():
                self.stop.set()
            else:
                self.forced = True
                self.stopped.cancel(reason="a second signal")

    def _begin_drain(self) -> None:
        deadlines = self.settings.deadlines
        deadline = trio.current_time() + deadlines.drain
        self.gateway.drain(deadline)
        self.stopped.deadline = deadline + deadlines.linger + GRACE
        count = self.gateway.statistics().in_flight
        _log.info("draining: %d exchanges have %g seconds to finish; signal again to stop now", count, deadlines.drain)

    async def _reload(self) -> None:
        """Read the configuration again, in a thread, and swap it in; a bad one changes nothing."""
        while True:
            self.reload_again = False
            try:
                await self._reload_once()
            except ConfigError as exc:
                self._refuse(str(exc))
            except Exception as exc:
                self._refuse(describe(exc))
            if not self.reload_again:
                self.reloading = False
                return

    async def _reload_once(self) -> None:
        if self.config_loader is None or self.stop.is_set():
            _log.warning("not reloaded: %s", "draining" if self.stop.is_set() else "there is nothing to read again")
            return
        new = await trio.to_thread.run_sync(self.config_loader, abandon_on_cancel=True)
        old = self.settings
        fixed = {name: getattr(old, name) for name in _NEEDS_RESTART}
        if (new.tls is None) is not (old.tls is None):
            fixed["tls"] = old.tls
        changed = [name for name in fixed if fixed[name] != getattr(new, name)]
        new = dataclasses.replace(new, **fixed)
        certificates: Certificates | None = None
        if new.tls is not None:  # the same names may be other files by now
            certificates = await trio.to_thread.run_sync(Certificates, new.tls, abandon_on_cancel=True)
        self.gateway.reload(new)
        if self.terminator is not None and certificates is not None:
            self.terminator.certificates = certificates
        self.settings = new
        self.slots.resize(capacity_of(new, self.capacity.descriptors).connections)
        for sock in self.sockets:
            if sock.fileno() >= 0:
                set_options(sock, new.bounds, new.deadlines)
        self.metrics.reloads.labels("ok").inc()
        _log.info("reloaded the configuration")
        if changed:
            _log.warning("a change of %s needs a restart; the old value stays", ", ".join(changed))

    def _refuse(self, reason: str) -> None:
        self.metrics.reloads.labels("refused").inc()
        for line in reason.splitlines() or [""]:
            _log.error("the new configuration is refused, the old one stays: %s", line)

    # -- the first lines -----------------------------------------------------------------------------------------------

    def _greet(self, listening: list[socket.socket], admin: list[socket.socket]) -> None:
        """A few lines, then the one that says that connections are accepted, last and by itself."""
        capacity, settings = self.capacity, self.settings
        lines = [f"canal-trio {__version__}"]
        lines += [f"upstream {upstream.name}: {upstream.base_url}" for upstream in settings.upstreams]
        lines.append(f"capacity: {capacity.connections} client connections ({capacity.descriptors} descriptors)")
        lines += [f"admin on {url}" for url in listening_texts(admin)]
        warnings = list(_warnings(settings, capacity, listening, admin))
        if settings.log == "json":
            for line in lines:
                _log.info("%s", line)
            for line in warnings:
                _log.warning("%s", line)
        else:
            for line in [*lines, *(f"warning: {warning}" for warning in warnings)]:
                self.writer.write(f"{line}\n".encode())
        for url in listening_texts(listening, "http" if settings.tls is None else "https"):
            self.writer.write(f"listening on {url}\n".encode())


def _warnings(
    settings: Settings, capacity: Capacity, listening: list[socket.socket], admin: list[socket.socket]
) -> Iterable[str]:
    if capacity.wanted is not None:
        yield (
            f"client_connections = {capacity.wanted} needs more descriptors than the limit of {capacity.descriptors}; "
            f"{capacity.connections} are accepted (raise it with ulimit -n)"
        )
    if not settings.keys and not all(map(_private, listening)):
        yield "no keys are configured: whoever reaches this address may use the upstreams"
    if not all(map(_private, admin)):
        yield "the admin address can be reached from other machines; it asks for no key"


def _private(sock: socket.socket) -> bool:
    return ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback
