"""One worker of several: a `Server` that takes its settings and its orders from the supervisor.

Started as a fresh process with one end of the control channel. Signals are not for it (a terminal's Ctrl-C reaches the
whole session), except SIGTERM, which drains this one alone. Invariant: when the supervisor is gone, it drains and ends.
"""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, final

import msgspec
import trio

from canal_trio.errors import CanalError, ConfigError
from canal_trio.observe.lines import LineWriter
from canal_trio.observe.log import describe, logging_to
from canal_trio.serve.books import Books
from canal_trio.serve.control import (
    Accepting,
    Ask,
    Channel,
    Drain,
    Failed,
    Message,
    Reload,
    Reloaded,
    Report,
    Start,
    Stop,
)
from canal_trio.serve.counting import stores_of_worker
from canal_trio.serve.limits import capacity_of, freeze_garbage, raise_descriptor_limit
from canal_trio.serve.listen import open_listeners
from canal_trio.serve.merge import snapshot
from canal_trio.serve.run import Server, real_gateway
from canal_trio.serve.tls import Certificates

__all__ = ["work"]

LAST_WORDS = 1.0  # seconds

_log = logging.getLogger("canal_trio.serve")


def work(control: int) -> int:
    """Be a worker, under orders that come over the descriptor `control`; the exit code."""
    # SIGTTOU: we are no foreground process of a terminal, and may write to it all the same.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)
    return trio.run(_work, socket.socket(fileno=control), raise_descriptor_limit())


async def _work(control: socket.socket, descriptors: int) -> int:
    channel = Channel(control)
    start = await channel.receive()
    if not isinstance(start, Start):
        return 1  # the supervisor is gone already
    settings = start.settings
    writer = LineWriter(2, capacity=settings.bounds.log_lines, shared=True)
    try:
        with logging_to(writer, settings.log) as logger, trio.open_signal_receiver(signal.SIGTERM) as signals:
            for handler in logger.handlers:
                handler.addFilter(partial(_named, start.number))
            listening: list[socket.socket] = []
            try:
                certificates = None if settings.tls is None else Certificates(settings.tls)
                books = Books(settings, start.number)
                if start.sockets:
                    listening = [socket.socket(fileno=fd) for fd in start.sockets]
                else:
                    listening = await open_listeners(start.addresses, share=True)
            except CanalError as exc:
                await channel.send(Failed(str(exc)))
                return 1
            stores = stores_of_worker(settings, start.memory, start.number - 1, start.workers)
            capacity = capacity_of(settings, descriptors)
            server = Server(settings, real_gateway, capacity, writer, certificates, stores, books)
            try:
                return await _Worker(channel, server).run(listening, signals)
            finally:
                books.close()
                for sock in listening:
                    sock.close()  # closed already, unless this was cancelled
    finally:
        writer.close()
        channel.close()


def _named(number: int, record: logging.LogRecord) -> bool:
    """A filter that lets everything through, with the worker's number in front."""
    record.msg = f"worker {number}: {record.msg}"
    return True


@final
class _Worker:
    def __init__(self, channel: Channel, server: Server) -> None:
        self._channel = channel
        self._server = server
        self._accepting = trio.Event()

    async def run(self, listening: list[socket.socket], signals: AsyncIterator[int]) -> int:
        code = await self._server.run(listening, [], partial(self._orders, signals), self._started)
        with trio.move_on_after(LAST_WORDS):
            await self._channel.send(self._report(Ask(0, "metrics")))
        return code

    def _started(self) -> None:
        freeze_garbage()
        self._accepting.set()

    async def _orders(self, signals: AsyncIterator[int], services: trio.Nursery) -> None:
        services.start_soon(self._until_sigterm, signals)
        services.start_soon(self._announce)
        while (message := await self._channel.receive()) is not None:
            if isinstance(message, Ask):
                await self._channel.send(self._report(message))
            else:
                await self._obey(message)
        if not self._server.stop.is_set():
            _log.warning("the supervisor is gone: draining")
            self._server.stop.set()

    async def _obey(self, message: Message) -> None:
        match message:
            case Reload():
                await self._channel.send(Reloaded(await self._reload(message)))
            case Drain():
                self._server.stop.set()
            case Stop():
                self._server.cut()

    async def _announce(self) -> None:
        await self._accepting.wait()
        capacity = self._server.capacity
        await self._channel.send(Accepting(capacity.connections, capacity.descriptors, capacity.wanted))

    async def _until_sigterm(self, signals: AsyncIterator[int]) -> None:
        async for _ in signals:
            self._server.stop.set()

    async def _reload(self, message: Reload) -> str:
        """Apply new settings; why not, or nothing."""
        try:
            await self._server.apply(message.settings)
        except ConfigError as exc:
            return str(exc)
        except Exception as exc:
            return describe(exc)
        return ""

    def _report(self, ask: Ask) -> Report:
        gateway = self._server.gateway
        report = Report(ask.id, gateway.ready(), gateway.draining)
        if ask.what == "metrics":
            report.metrics = snapshot(self._server.metrics.registry)
        elif ask.what == "streams":
            streams: list[dict[str, Any]] = msgspec.to_builtins(list(gateway.exchanges()))
            report.streams = streams
        return report
