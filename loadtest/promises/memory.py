"""Bounded always: clients that never read stop their upstreams, cost a known amount, and go on when they read again."""

from __future__ import annotations

import re
import selectors
import time
from collections import Counter
from pathlib import Path

from loadtest.behaviour import Behaviour
from loadtest.promises.kit import Client, Site, Verdict, until

__all__ = ["memory"]

CLIENTS = 200
PROCESS_LIMIT, TAKEN_LIMIT = 200 << 10, int(1.5 * (1 << 20))
SETTLE, WATCH, RESUME = 1.0, 3.0, 12.0  # seconds: without movement; watching for growth; all of them reading again
ENDLESS = Behaviour(tokens=-1, interval=0, batch=8, size=200)
_NUMBER = re.compile(rb'" token(\d+)x')


def _taken(site: Site) -> dict[str, int]:
    """Bytes taken from each upstream, by request: what its own kernel still queues is not taken, all else is."""
    return {entry["user"]: entry["taken"] for entry in site.upstream.report()["live"]}


def _settled(site: Site) -> bool:
    """Wait until no upstream has moved for a while."""
    last: dict[str, int] = {}
    since = time.monotonic()
    end = since + 20
    while time.monotonic() < end:
        now = _taken(site)
        if now != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > SETTLE:
            return True
        time.sleep(0.1)
    return False


class _Reader:
    """A client that reads again: beyond what was taken from its upstream, and, if checked, token by token in order."""

    def __init__(self, client: Client, wanted: int, check: bool) -> None:
        self.client, self.wanted, self.check = client, wanted, check
        self.payload = b""
        self.trouble = ""

    def read(self) -> bool:
        """Read what is there; whether it is finished, well or not."""
        piece = self.client.read(1 << 18)
        if piece is None:
            self.trouble = f"{self.client.ident}: broken off after {self.client.received} bytes"
            return True
        if self.check:
            self.payload += piece
        if self.client.received < self.wanted:
            return False
        # Of a send only the first event has a number.
        numbers = [int(number) for number in _NUMBER.findall(self.payload)]
        if numbers != list(range(0, len(numbers) * ENDLESS.batch, ENDLESS.batch)):
            self.trouble = f"{self.client.ident}: tokens are missing or out of order"
        return True


def _resume(clients: list[Client], taken: dict[str, int]) -> tuple[list[str], int]:
    """All read at the same time: (troubles, how many of the silent ones wait for the kernel's own retransmission)."""
    troubles: list[str] = []
    with selectors.DefaultSelector() as selector:
        for index, client in enumerate(clients):
            reader = _Reader(client, taken.get(client.ident, 0) + 100_000, index % 20 == 0)
            selector.register(client.sock, selectors.EVENT_READ, reader)
        end = time.monotonic() + RESUME
        while selector.get_map() and time.monotonic() < end:
            for key, _events in selector.select(0.2):
                if key.data.read():
                    troubles += filter(None, [key.data.trouble])
                    selector.unregister(key.fileobj)
        silent = [key.data.client for key in selector.get_map().values()]
    backing_off = _backing_off()
    kernel = [client for client in silent if client.sock.getsockname()[1] in backing_off]
    troubles += [
        f"{client.ident}: nothing more after {client.received} of {taken.get(client.ident)} bytes"
        for client in silent
        if client not in kernel
    ]
    return troubles, len(kernel)


def _backing_off() -> set[int]:
    """Ports whose peer's kernel has bytes for them and waits for its retransmission timer.

    Linux drops segments that a full receive queue cannot hold (`TCPRcvQDrop`) and sends them again after a time that
    doubles, 25 s and more once a client was silent for long; reading does not shorten it. Any gateway suffers it.
    """
    ports = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        row = line.split()
        unsent, timer, retransmissions = row[4].partition(":")[0], row[5].partition(":")[0], int(row[6], 16)
        if int(unsent, 16) and timer == "01" and retransmissions:
            ports.add(int(row[2].rpartition(":")[2], 16))
    return ports


def memory(site: Site) -> list[Verdict]:
    """200 silent clients at an endless upstream."""
    count = 40 if site.quick else CLIENTS
    process = site.gateway.process
    warm = Client(site.gateway)
    warm.ask(Behaviour(tokens=2000, interval=0, batch=8, size=200), tag="warm")
    warm.rest()
    warm.close()
    until(lambda: not _taken(site), 5)
    before = process.memory() if process else 0
    site.say(f"memory: {count} clients that never read")
    clients = []
    for _ in range(count):
        clients.append(Client(site.gateway))
        clients[-1].ask(ENDLESS, tag="deaf")
    idents = {client.ident for client in clients}
    until(lambda: idents <= set(_taken(site)), 20)
    stands = _settled(site)
    taken, resident = _taken(site), process.memory() if process else 0
    site.say("memory: watching for growth")
    time.sleep(WATCH)
    later, resident_later = _taken(site), process.memory() if process else 0
    site.say("memory: they read again")
    asleep, waiting = _resume(clients, later)
    most_resident = process.memory() if process else 0
    for client in clients:
        client.close()
    gone = until(lambda: not _taken(site), 10)
    each = (resident - before) / count
    most = max((later[ident] for ident in idents if ident in later), default=0)
    grown = resident_later - resident
    moved = sum((Counter(later) - Counter(taken)).values())
    details = {
        "clients": count, "rss_before": before, "rss_silent": resident, "rss_later": resident_later,
        "rss_after_resuming": most_resident, "taken_most": most, "upstreams_left_behind": not gone,
    }  # fmt: skip
    return [
        Verdict(
            "bounded", f"process memory per silent stream ({count})", f"{each / 1024:.1f} KiB" if process else "–",
            f"< {PROCESS_LIMIT >> 10} KiB", each < PROCESS_LIMIT if process else None,
            "" if process else "no process to look at", details,
        ),
        Verdict(
            "bounded", "…taken from each upstream, kernel included", f"{most / (1 << 20):.2f} MiB",
            f"< {TAKEN_LIMIT / (1 << 20):g} MiB", most < TAKEN_LIMIT and len(later) >= count,
            f"{len(idents & set(later))} of {count} upstreams still connected",
        ),
        Verdict(
            "bounded", f"…growth in the next {WATCH:g} s", f"{moved} bytes taken, {grown >> 10} KiB RSS",
            "0, < 1 MiB", stands and not moved and grown < 1 << 20,
        ),
        Verdict(
            "bounded", "…go on when they read again", f"{count - len(asleep) - waiting} of {count}", "all", not asleep,
            "; ".join([*([f"{waiting} wait for their kernel's retransmission"] if waiting else []), *asleep[:2]]),
        ),
    ]  # fmt: skip
