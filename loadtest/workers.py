"""What a second worker costs, and what two workers carry: CPU per event of one against two, and ten thousand streams.

One worker and two are measured in interleaved rounds, at the same streams in all and at the same streams each; the
ratio is taken within a round. Nobody is pinned to a core, for two workers need two.
"""

from __future__ import annotations

import os
import re
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from loadtest import run as runs
from loadtest.peers import Gateway, Missing, running
from loadtest.processes import UpstreamProcess, descendants, get, upstream_process
from loadtest.safety import target_of
from loadtest.scenario import load, stamped
from loadtest.table import table

__all__ = ["shown", "workers"]

STREAMS = 250
MANY = 10_000
ARGUMENTS = ("--workers", "2")


def workers(say: Callable[[str], None], *, rounds: int = 3, many: int = MANY, shorter: float = 1.0) -> dict[str, Any]:
    """Rounds of 250 streams at 40 events/s, then `many` streams at one event a second through two workers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # for us and for what we start
    try:
        result: dict[str, Any] = {"kind": "workers", "rounds": rounds, "cores": os.cpu_count()}
        with upstream_process() as upstream:
            with running("canal", upstream.port) as one, running("canal", upstream.port, arguments=ARGUMENTS) as two:
                _wait_for_both(two)
                kinds = {"one": (one, STREAMS), "two, as many in all": (two, STREAMS), "two, as many each": (two, 500)}
                costs: dict[str, list[float]] = {kind: [] for kind in kinds}
                for number in range(rounds):
                    for kind, (gateway, streams) in kinds.items():
                        say(f"round {number + 1}: {kind}")
                        figures = _load("steady", streams, 4 * shorter, 2 * shorter, gateway, upstream, say)
                        costs[kind].append(figures["cpu_us_per_event"])
                result["cpu_us_per_event"] = costs
                result["ratios"] = {
                    kind: statistics.median(a / b for a, b in zip(row, costs["one"], strict=True))
                    for kind, row in costs.items()
                }
            with running("canal", upstream.port, arguments=ARGUMENTS) as two:
                _wait_for_both(two)
                result["many"] = _many(two, upstream, many, shorter, say)
        return result
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _wait_for_both(gateway: Gateway, seconds: float = 60) -> None:
    """The first worker that listens gets every connection until the second one does; raises `Missing`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if len(re.findall(rb"(?m)^canal_ready\{[^}]*\} 1", get(f"{gateway.admin}/metrics"))) == 2:
            return
        time.sleep(0.05)
    raise Missing(f"two workers: after {seconds:g} s they were not both ready")


def _load(
    name: str,
    streams: int,
    seconds: float,
    warm_up: float,
    gateway: Gateway,
    upstream: UpstreamProcess,
    say: Callable[[str], None],
) -> dict[str, Any]:
    scenario = replace(load(name), streams=streams, seconds=seconds, warm_up=warm_up)
    scenario = stamped(scenario, gateway.peer.stamp if gateway.peer else "field")
    return runs.run(scenario, target_of(gateway.url), say, upstream, gateway.process)


def _many(
    gateway: Gateway, upstream: UpstreamProcess, streams: int, shorter: float, say: Callable[[str], None]
) -> dict[str, Any]:
    assert gateway.process is not None
    parent = gateway.process.pid
    held: list[list[int]] = []
    began = time.monotonic()

    def saying(text: str) -> None:
        if time.monotonic() - began > len(held):  # once a second
            held.append([len(os.listdir(f"/proc/{pid}/fd")) for pid in descendants(parent)[1:]])
        say(text)

    figures = _load("idle", streams, 12 * shorter, 20 * shorter, gateway, upstream, saying)
    most = max((row for row in held if len(row) >= 2), key=sum, default=[0, 0])
    return {
        "streams": streams,
        "events_per_s": figures["events_per_s"],
        "event_ms": {point: figures["event_ms"].get(point) for point in ("p50", "p99", "max")},
        "rss_per_stream": figures["rss_per_stream"],
        "errors": figures["errors"],
        "descriptors_of_each_worker": sorted(most)[-2:],
    }


def shown(result: dict[str, Any]) -> str:
    """For people."""
    rows = [
        [kind, " ".join(f"{value:.1f}" for value in row), f"{result['ratios'][kind]:.2f}"]
        for kind, row in result["cpu_us_per_event"].items()
    ]
    many = result["many"]
    event = many["event_ms"]
    return "\n".join(
        [
            table(["250 streams of 40 events/s", "CPU µs/event in each round", "× one worker"], rows),
            "",
            f"two workers, {many['streams']:,} streams: {many['events_per_s']:,.0f} events/s, "
            f"added p50 {event['p50']} ms, p99 {event['p99']} ms, max {event['max']} ms, "
            f"{many['rss_per_stream'] / 1024:.1f} KiB each, errors {many['errors'] or 'none'}, "
            f"descriptors of each worker {many['descriptors_of_each_worker']}",
        ]
    )
