"""What a refusal costs, and an idle client: CPU per request that is shed, resident memory per silent connection.

A gateway of ours in a process of its own; its CPU and memory are read from /proc, so that ours do not count. The
upstream accepts and says nothing. Everything is on loopback, and bounded in count.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loadtest.peers import certificate
from loadtest.processes import Process, free_port, started

__all__ = ["edge", "shown"]

BODY = json.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": "x" * 400}]}).encode()
FIELDS = (
    f"Host: a\r\nContent-Type: application/json\r\nContent-Length: {len(BODY)}\r\nAuthorization: Bearer sk-x\r\n\r\n"
)
CHAT = f"POST /v1/chat/completions HTTP/1.1\r\n{FIELDS}".encode() + BODY
KEPT = 8  # connections that the shed requests come over
SETTLE = 1.5  # seconds


@contextmanager
def _gateway(*, bounds: str = "", tls: bool = False) -> Iterator[tuple[Process, int]]:
    """A gateway with these `[bounds]`, before an upstream that never answers."""
    with tempfile.TemporaryDirectory(prefix="loadtest-") as name, socket.create_server(("127.0.0.1", 0)) as mute:
        folder, port = Path(name), free_port()
        text = f'[server]\nlisten = "127.0.0.1:{port}"\nadmin = "off"\n'
        if tls:
            place, key = certificate(folder)
            text += f'[server.tls]\ncertificate = "{place}"\nkey = "{key}"\n'
        text += (
            f'[[upstream]]\nname = "mute"\nbase_url = "http://127.0.0.1:{mute.getsockname()[1]}/v1"\nconnections = 50\n'
        )
        (folder / "canal.toml").write_text(f"{text}[bounds]\n{bounds}\n[deadlines]\nkeep_alive = 600\n")
        argv = [sys.executable, "-m", "canal_trio", "serve", "--config", str(folder / "canal.toml")]
        with started("canal", argv) as process:
            process.saying(r"^listening on ")
            yield process, port


def _connected(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _refused(sock: socket.socket, request: bytes, code: bytes) -> None:
    """Send `request` and read its refusal, which has to be this one."""
    sock.sendall(request)
    answer = b""
    while not answer.endswith(b"}"):
        piece = sock.recv(65_536)
        if not piece:
            break
        answer += piece
    if not answer.startswith(b"HTTP/1.1 503 ") or code not in answer or b"\r\nretry-after: " not in answer.lower():
        raise AssertionError(f"not the refusal that was expected: {answer[:300]!r}")


def _shed(bounds: str, occupants: int, code: bytes, count: int) -> float:
    """Microseconds of the gateway's CPU per shed request, kept-alive connections."""
    with _gateway(bounds=bounds) as (process, port), contextlib.ExitStack() as stack:
        for _ in range(occupants):
            stack.enter_context(_connected(port)).sendall(CHAT)
        time.sleep(SETTLE)
        clients = [stack.enter_context(_connected(port)) for _ in range(KEPT)]
        for client in clients:
            _refused(client, CHAT, code)
        before = process.cpu()
        for number in range(count):
            _refused(clients[number % KEPT], CHAT, code)
        return (process.cpu() - before) / count * 1e6


def _turned_away(count: int) -> float:
    """Microseconds of the gateway's CPU per connection of an address that has too many."""
    with _gateway(bounds="address_connections = 1") as (process, port), _connected(port):
        time.sleep(SETTLE)
        before = process.cpu()
        for _ in range(count):
            with _connected(port) as client:
                _refused(client, b"", b"gateway_overloaded")
        return (process.cpu() - before) / count * 1e6


def _idle(count: int, *, tls: bool, asked: bool) -> float:
    """Resident bytes per silent connection; `asked`: it has had an answer before."""
    with _gateway(bounds="exchanges = 1\nwaiters = 0", tls=tls) as (process, port), contextlib.ExitStack() as stack:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

        def connected() -> socket.socket:
            sock = _connected(port)
            return stack.enter_context(context.wrap_socket(sock) if tls else sock)

        connected().sendall(CHAT)  # the one place is taken: what others ask is refused at once
        time.sleep(SETTLE)
        for _ in range(50):  # what is made once is made now
            _refused(connected(), CHAT, b"gateway_overloaded")
        before = process.memory()
        for _ in range(count):
            client = connected()
            if asked:
                _refused(client, CHAT, b"gateway_overloaded")
        time.sleep(SETTLE)
        return (process.memory() - before) / count


def edge(*, quick: bool = False) -> dict[str, Any]:
    """Measure all of it."""
    count, crowd = (200, 100) if quick else (10_000, 3000)
    return {
        "kind": "edge",
        "shed_us": {
            "every place taken": _shed("exchanges = 1\nwaiters = 0", 1, b"gateway_overloaded", count),
            "every upstream connection taken": _shed("waiters = 0", 50, b"upstream_unavailable", count),
            "too many connections of one address": _turned_away(count),
        },
        "idle_bytes": {
            "never asked": _idle(crowd, tls=False, asked=False),
            "asked before": _idle(crowd, tls=False, asked=True),
            "TLS, never asked": _idle(crowd, tls=True, asked=False),
            "TLS, asked before": _idle(crowd, tls=True, asked=True),
        },
    }


def shown(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{what:38} {number:8.0f} µs of CPU per refusal" for what, number in result["shed_us"].items()]
    lines += [
        f"{what:38} {number / 1024:8.1f} KiB per idle connection" for what, number in result["idle_bytes"].items()
    ]
    return "\n".join(lines)
