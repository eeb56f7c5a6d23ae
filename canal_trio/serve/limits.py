"""What the process may use: descriptors, and how many client connections they are good for; memory; the garbage
collector.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass, replace

from canal_trio.settings import Settings

__all__ = [
    "Capacity",
    "capacity_of",
    "freeze_garbage",
    "machine_memory",
    "raise_descriptor_limit",
    "share_of",
    "with_ceiling",
]

# Standard streams, epolls, wake-up pipes, listeners, resolver threads, certificate files; refused clients.
RESERVE = 128
MOST_DESCRIPTORS = 1_048_576  # the hard limit may be "unlimited", which the kernel would not give anyway

CGROUPS = {"": ("", "memory.max"), "memory": ("memory/", "memory.limit_in_bytes")}  # version 2, version 1


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many client connections are accepted, of how many descriptors; `wanted` is more than they are good for."""

    connections: int
    descriptors: int
    wanted: int | None = None


def raise_descriptor_limit() -> int:
    """Raise the soft limit to the hard one; the limit that now holds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else hard
    if soft == resource.RLIM_INFINITY or soft >= top:
        return MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
    except (OSError, ValueError):  # a sandbox says no: the old limit stays
        return soft
    return top


def capacity_of(settings: Settings, descriptors: int) -> Capacity:
    """Client connections for `descriptors`: each exchange needs one for its client and one for its upstream."""
    reserve = RESERVE + settings.bounds.admin_connections
    common = settings.bounds.upstream_connections
    upstreams = sum(common if one.connections is None else one.connections for one in settings.upstreams)
    free = max(2, descriptors - reserve)
    # Upstreams that are bounded tightly leave more for clients, who may wait.
    most = free - int(upstreams) if math.isfinite(upstreams) and upstreams < free // 2 else free // 2
    wanted = settings.bounds.client_connections
    if wanted is None:
        return Capacity(most, descriptors)
    return Capacity(min(wanted, most), descriptors, wanted if wanted > most else None)


def machine_memory(root: str = "/") -> int:
    """Bytes of memory that this process may use: the machine's, or less, as its cgroup or one around it says."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in _limit_files(root):
        # There is no such file, or it says "max".
        with contextlib.suppress(OSError, ValueError), open(name, encoding="ascii") as file:
            found = min(found, int(file.read()))
    return found


def _limit_files(root: str) -> Iterator[str]:
    """Where the limit of our cgroup may stand, and those of the ones around it (cgroups(7))."""
    try:
        with open(os.path.join(root, "proc/self/cgroup"), encoding="utf-8") as file:
            memberships = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:  # no cgroups here
        return
    for _, controllers, path in memberships:
        if (place := CGROUPS.get(controllers)) is None:
            continue
        folder = path.strip("/")
        while True:
            yield os.path.join(root, "sys/fs/cgroup", place[0], folder, place[1])
            if not folder:
                break
            folder = folder.rpartition("/")[0]


def with_ceiling(settings: Settings) -> Settings:
    """The same with a number for `memory_bytes`, where that was left to us: half of what there is."""
    if settings.bounds.memory_bytes is not None:
        return settings
    return replace(settings, bounds=replace(settings.bounds, memory_bytes=machine_memory() // 2))


def share_of(settings: Settings, number: int, count: int) -> Settings:
    """What the worker `number` (from 0) of `count` gets of the bounds that are those of the whole gateway.

    The shares of all workers add up to the whole, but nobody gets less than one, or than one body that may be held.
    """

    def part(whole: float) -> float:
        if math.isinf(whole):
            return whole
        each, rest = divmod(int(whole), count)
        return max(1, each + (number < rest))

    ledger = settings.ledger
    if ledger is not None:
        ledger = replace(ledger, journal_bytes=ledger.journal_bytes // count)
    bounds = with_ceiling(settings).bounds
    assert bounds.memory_bytes is not None
    clients = bounds.client_connections
    return replace(
        settings,
        ledger=ledger,
        bounds=replace(
            bounds,
            client_connections=None if clients is None else int(part(clients)),
            listener_connections=part(bounds.listener_connections),
            address_connections=part(bounds.address_connections),
            upstream_connections=part(bounds.upstream_connections),
            waiters=int(part(bounds.waiters)) if bounds.waiters else 0,
            exchanges=part(bounds.exchanges),
            memory_bytes=max(1, bounds.memory_bytes // count),
            held_total_bytes=max(bounds.held_body_bytes, int(part(bounds.held_total_bytes))),
        ),
        upstreams=tuple(
            one if one.connections is None else replace(one, connections=part(one.connections))
            for one in settings.upstreams
        ),
    )


def freeze_garbage() -> None:
    """What was allocated until now stays: let the collector never look at it again, and look less often at all.

    Left alone it took 22 % of the time with 500 streams (design, section 10).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
