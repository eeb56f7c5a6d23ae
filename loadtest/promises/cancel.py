"""Cancelled at once: in every phase, from the client's FIN or RST to the moment the upstream's socket sees the close.

Both ends are ours and read the same monotonic clock, so nothing the gateway says about itself is believed. Where no
upstream connection exists yet (waiting for a lease, dialling) the gateway is watched from outside: the socket that
dials must be closed, its list of exchanges must forget the client, and the upstream must never see the request.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loadtest import bodies
from loadtest.behaviour import Behaviour
from loadtest.histogram import Latency
from loadtest.peers import Missing, running
from loadtest.processes import get
from loadtest.promises.kit import Client, Site, Verdict, until

__all__ = ["cancel", "cancel_unconnected"]

LIMIT = 50.0  # ms
ROUNDS = 20
_HEAD = bodies.head(200, "chunked", "text/event-stream")
_EVENT = bodies.event_maker(0, "field", True)(time.monotonic_ns(), 0)
_ENDLESS = Behaviour(tokens=-1, interval=0.01)


@dataclass(frozen=True, slots=True)
class Phase:
    """Where an exchange stands when its client leaves, and how we know that it stands there."""

    name: str
    behaviour: Behaviour
    streamed: bool = True
    part: float = 1.0
    at_upstream: str = ""  # the phase the upstream must report first
    words: bytes = b""  # the payload the client must have first
    headed: bool = False  # the response's head must be here


PHASES = (
    Phase("during upload", Behaviour(), part=0.5, at_upstream="upload"),
    Phase("waiting for the head", Behaviour(head=600), at_upstream="head"),
    Phase("between head and first token", Behaviour(first=600), headed=True),
    Phase("mid-stream", _ENDLESS, words=b"token2"),
    Phase("mid-event", Behaviour(interval=0, stall=len(_HEAD) + 3 * len(_EVENT) + len(_EVENT) // 2), words=b"token2"),
    Phase("non-streaming, before the head", Behaviour(head=600), streamed=False, at_upstream="head"),
    Phase("non-streaming, in the body", Behaviour(size=100, stall=3000), streamed=False, words=b"token7"),
)


def _stands_there(site: Site, client: Client, phase: Phase) -> bool:
    """Bring the exchange into its phase; False if the upstream never sees it."""
    if phase.at_upstream:
        return until(
            lambda: any(
                entry["user"] == client.ident and entry["phase"] == phase.at_upstream
                for entry in site.upstream.report()["live"]
            ),
            2,
        )
    if phase.headed:
        client.read_head()
    else:
        client.read_until(phase.words)
    return True


def _round(site: Site, phase: Phase, how: str, into: Latency) -> tuple[int, bool]:
    """One client: (1 if its leaving was seen, did it get into the phase at all)."""
    client = Client(site.gateway)
    try:
        client.ask(phase.behaviour, streamed=phase.streamed, upload=200_000 if phase.part < 1 else 0, part=phase.part)
        if not _stands_there(site, client, phase):
            return 0, False
        left = client.leave(how)
        entries: list[int] = []

        def seen() -> bool:
            entries[:] = [entry["seen"] for entry in site.upstream.report()["left"] if entry["user"] == client.ident]
            return bool(entries)

        time.sleep(0.02)  # asking for the report keeps the upstream busy: not while it should be looking
        if not until(seen, 2, every=0.05):
            return 0, True
        into.record(max(entries[0] - left, 0) / 1000)
        return 1, True
    finally:
        client.close()


def cancel(site: Site) -> list[Verdict]:
    """All phases with a connected upstream, FIN and RST."""
    verdicts = []
    rounds = 3 if site.quick else ROUNDS
    for phase in PHASES:
        for how in ("fin", "rst"):
            site.say(f"cancel: {phase.name}, {how.upper()}")
            site.upstream.reset()
            times, seen, entered = Latency(), 0, 0
            for _ in range(rounds):
                one, inside = _round(site, phase, how, times)
                seen += one
                entered += inside
                if not inside:
                    break
            what = f"{phase.name}, {how.upper()} → upstream closed"
            if not entered:
                note = "the upstream never saw the request: this gateway holds it back"
                verdicts.append(Verdict("cancelled at once", what, "–", "–", None, note))
                continue
            worst = times.worst / 1000
            verdicts.append(
                Verdict(
                    "cancelled at once", what, f"{100 * seen / entered:.0f} %, worst {worst:.1f} ms",
                    f"100 %, < {LIMIT:g} ms", seen == entered and worst < LIMIT,
                    f"p50 {times.at(50) / 1000:.1f} ms, {entered} clients", times.summary(),
                )
            )  # fmt: skip
    return verdicts


def cancel_unconnected(site: Site) -> list[Verdict]:
    """Leaving while waiting for a lease and while dialling: only for the gateway whose settings we know."""
    verdicts = []
    for name, measure in (("waiting for a lease", _lease), ("dialling", _dial)):
        site.say(f"cancel: {name}")
        times = Latency()
        if site.gateway.name != "canal":
            note = f"not arranged for {site.gateway.name}"
            verdicts.append(Verdict("cancelled at once", f"{name}, FIN and RST", "–", "–", None, note))
            continue
        try:
            seen, tried = measure(site, times)
        except Missing as exc:
            verdicts.append(Verdict("cancelled at once", f"{name}, FIN and RST", "–", "–", None, str(exc)))
            continue
        worst = times.worst / 1000
        verdicts.append(
            Verdict(
                "cancelled at once", f"{name}, FIN and RST → given up",
                f"{100 * seen / tried:.0f} %, worst {worst:.1f} ms",
                f"100 %, < {LIMIT:g} ms", seen == tried and worst < LIMIT,
                f"p50 {times.at(50) / 1000:.1f} ms, {tried} clients, watched from outside", times.summary(),
            )
        )  # fmt: skip
    return verdicts


def _lease(site: Site, times: Latency) -> tuple[int, int]:
    """One connection allowed, and taken: the second client waits, and leaves."""
    seen = tried = 0
    extra = "\n[bounds]\nupstream_connections = 1\n"
    with running("canal", site.upstream.port, extra=extra) as gateway:
        occupant = Client(gateway)
        occupant.ask(_ENDLESS, tag="occupant")
        occupant.read_until(b"token0")

        def exchanges() -> int:
            return len(json.loads(get(f"{gateway.admin}/streams"))["exchanges"])

        waited = []
        for how in ("fin", "rst") * (2 if site.quick else 10):
            waiter = Client(gateway)
            waiter.ask(Behaviour(), tag="waiter")
            if not until(lambda: exchanges() == 2, 2):
                raise Missing("the waiting exchange never showed")
            waited.append(waiter.ident)
            left = waiter.leave(how)
            tried += 1
            if until(lambda: exchanges() == 1, 2, every=0.001):
                seen += 1
                times.record((time.monotonic_ns() - left) / 1000)
            waiter.close()
        occupant.leave("rst")
        last = Client(gateway)  # the freed connection serves the next in line, so none of the gone ones comes first
        last.ask(Behaviour(tokens=1), tag="last")
        last.rest()
        last.close()
        ghosts = set(waited) & {entry["user"] for entry in site.upstream.report()["left"]}
        return seen - len(ghosts), tried


@contextmanager
def _mute_port() -> Iterator[int]:
    """A port whose accept queue is full: whoever dials it waits in SYN-SENT."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers: list[socket.socket] = []
        try:
            for _ in range(8):
                filler = socket.socket()
                filler.setblocking(False)
                fillers.append(filler)
                with suppress(BlockingIOError):
                    filler.connect(listener.getsockname())
            time.sleep(0.05)
            yield int(listener.getsockname()[1])
        finally:
            for filler in fillers:
                filler.close()


def _syn_sent(port: int) -> int:
    """Sockets of this machine that dial `port` right now."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[3] == "02" and int(row[2].rpartition(":")[2], 16) == port for row in rows)


def _at_most(folder: Path, most: int) -> bool:
    return len(os.listdir(folder)) <= most


def _dial(site: Site, times: Latency) -> tuple[int, int]:
    """The upstream never answers the dial; the client leaves meanwhile."""
    seen = tried = 0
    with _mute_port() as port, running("canal", port) as gateway:
        ours = _syn_sent(port)
        assert gateway.process is not None
        files = Path(f"/proc/{gateway.process.pid}/fd")
        for how in ("fin", "rst") * (2 if site.quick else 10):
            client = Client(gateway)
            client.ask(Behaviour(), tag="dialling")
            if not until(lambda: _syn_sent(port) > ours, 2, every=0.001):
                raise Missing("this kernel does not keep a dial waiting")
            most = len(os.listdir(files)) - 2  # without the client's socket and the one that dials
            left = client.leave(how)
            tried += 1
            if until(partial(_at_most, files, most), 2, every=0.0005):
                seen += 1
                times.record((time.monotonic_ns() - left) / 1000)
            client.close()
    return seen, tried
