"""Flushed at once: what the gateway adds to an event's way, against a direct connection in the same minute."""

from __future__ import annotations

import time

from loadtest.behaviour import Behaviour
from loadtest.histogram import Latency
from loadtest.peers import Gateway
from loadtest.processes import busy_seconds
from loadtest.promises.kit import Client, Site, Verdict
from loadtest.wire import stamps

__all__ = ["latency"]

EVENTS, GAP, RUNS = 40, 0.025, 5
P50_LIMIT, WORST_LIMIT = 1.0, 10.0  # ms
IDLE = 0.25  # cores that others may use while the machine still counts as idle


def _one_run(gateway: Gateway) -> list[float]:
    """Microseconds from the upstream's send to our receive, event by event."""
    client = Client(gateway)
    try:
        client.ask(Behaviour(tokens=EVENTS, interval=GAP, first=GAP), tag="latency")
        seen = []
        while (payload := client.read()) is not None:
            now = time.monotonic_ns()
            seen += [(now - stamp) / 1000 for stamp in stamps(payload)]
        if len(seen) != EVENTS or not client.response.done:
            raise RuntimeError(f"{gateway.name}: {len(seen)} of {EVENTS} events came")
        return seen
    finally:
        client.close()


def latency(site: Site) -> list[Verdict]:
    """Interleaved runs, direct and through the gateway; the first of each only warms up."""
    through, direct = Latency(), Latency()
    worsts: list[float] = []
    direct_worsts: list[float] = []
    began, others = time.monotonic(), _others(site)
    for run in range(1 + (2 if site.quick else RUNS)):
        for gateway, into, worst_of_runs in ((site.direct, direct, direct_worsts), (site.gateway, through, worsts)):
            site.say(f"added latency: run {run}, {gateway.name}")
            seen = _one_run(gateway)
            if run:
                worst_of_runs.append(max(seen) / 1000)
                for value in seen:
                    into.record(value)
    added = (through.at(50) - direct.at(50)) / 1000
    details = {"gateway": through.summary(), "direct": direct.summary(), "worst_per_run_ms": worsts}
    first = Verdict(
        "flushed at once", f"added latency per event, p50 ({EVENTS} events {GAP * 1000:g} ms apart)",
        f"{added:.2f} ms", f"< {P50_LIMIT:g} ms", added < P50_LIMIT,
        f"direct {direct.at(50) / 1000:.2f} ms, gateway {through.at(50) / 1000:.2f} ms", details,
    )  # fmt: skip
    worst, quiet = max(worsts), max(direct_worsts)
    share = (_others(site) - others) / (time.monotonic() - began)
    kept: bool | None = worst < WORST_LIMIT
    note = f"per run {', '.join(f'{value:.1f}' for value in worsts)}; direct {quiet:.1f} ms"
    if not kept and (quiet > WORST_LIMIT / 2 or share > IDLE):
        kept, note = None, f"not judged, the machine is not idle (others used {share:.1f} cores): {note}"
    second = Verdict("flushed at once", "…worst", f"{worst:.2f} ms", f"< {WORST_LIMIT:g} ms", kept, note)
    return [first, second]


def _others(site: Site) -> float:
    """CPU seconds that were not used for this measurement."""
    ours = sum(process.cpu() for process in (site.upstream.process, site.gateway.process) if process)
    return busy_seconds() - ours - time.process_time()
