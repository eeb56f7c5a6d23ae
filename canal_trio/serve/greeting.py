"""The first lines of a gateway: who it is, what it may use, what is open, and, last and by itself, where it listens.

Invariant: the line `listening on …` is written when, and only when, connections are accepted.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Iterable, Sequence

from canal_trio import __version__
from canal_trio.observe.lines import LineWriter
from canal_trio.serve.limits import Capacity
from canal_trio.serve.listen import listening_texts
from canal_trio.settings import Settings

__all__ = ["greet"]

_log = logging.getLogger("canal_trio.serve")


def greet(
    writer: LineWriter,
    settings: Settings,
    capacity: Capacity,
    listening: Sequence[socket.socket],
    admin: Sequence[socket.socket],
    *,
    workers: int = 1,
    warnings: Iterable[str] = (),
) -> None:
    """Say everything. `capacity` is that of each worker, `listening` are sockets bound to where clients connect."""
    each = "" if workers == 1 else f" in each of {workers} workers"
    lines = [f"canal-trio {__version__}"]
    lines += [f"upstream {upstream.name}: {upstream.base_url}" for upstream in settings.upstreams]
    lines.append(f"capacity: {capacity.connections} client connections ({capacity.descriptors} descriptors){each}")
    lines += [f"admin on {url}" for url in listening_texts(admin)]
    warned = [*warnings, *_warnings(settings, capacity, listening, admin)]
    if settings.log == "json":
        for line in lines:
            _log.info("%s", line)
        for line in warned:
            _log.warning("%s", line)
    else:
        for line in [*lines, *(f"warning: {warning}" for warning in warned)]:
            writer.write(f"{line}\n".encode())
    for url in listening_texts(listening, "http" if settings.tls is None else "https"):
        writer.write(f"listening on {url}\n".encode())


def _warnings(
    settings: Settings, capacity: Capacity, listening: Sequence[socket.socket], admin: Sequence[socket.socket]
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
