"""Runs a scenario against a target and says what it saw, and what the upstream saw where we can ask it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from loadtest.engine import Engine
from loadtest.histogram import Latency
from loadtest.processes import Process, UpstreamProcess
from loadtest.safety import Target
from loadtest.scenario import Scenario
from loadtest.table import table
from loadtest.tally import Tally

__all__ = ["joined", "run", "shown"]

Say = Callable[[str], None]
STALLED = 2.0  # a stream stalls when the 99th percentile between two events passes this many intervals


def run(
    scenario: Scenario,
    target: Target,
    say: Say,
    upstream: UpstreamProcess | None = None,
    gateway: Process | None = None,
) -> dict[str, Any]:
    """Warm up, measure, stop. Bounded by the scenario's seconds; `gateway` is watched for CPU and memory."""
    engine = Engine(target, scenario.parts, read_size=262_144 if _bursts(scenario) else 16_384)
    result: dict[str, Any] = {"kind": "run", "scenario": scenario.name, "about": scenario.about, "mode": scenario.mode}
    memory_before = gateway.memory() if gateway else 0
    try:
        if scenario.mode == "ramp":
            return result | _ramp(engine, scenario, say)
        if scenario.mode == "open":
            engine.open(scenario.rate, scenario.arrivals, scenario.most_in_flight)
        else:
            engine.closed(scenario.streams, scenario.warm_up / 2)
        growth: list[list[int]] = []

        def warming() -> None:
            say(f"{scenario.name}: warming up, {engine.in_flight} in flight")
            if gateway and (not growth or growth[-1][0] < engine.in_flight):
                growth.append([engine.in_flight, gateway.memory() - memory_before])

        engine.run(scenario.warm_up, warming)
        if upstream:
            upstream.reset()
        engine.tally = Tally()
        cpu_before = gateway.cpu() if gateway else 0.0
        began = time.monotonic()

        def progress() -> None:
            tally, seconds = engine.tally, time.monotonic() - began
            errors = f", {sum(tally.errors.values())} errors" if tally.errors else ""
            say(
                f"{scenario.name}: {seconds:.0f} of {scenario.seconds:g} s, {engine.in_flight} in flight, "
                f"{tally.finished / seconds:.0f} requests/s, {tally.events / seconds:.0f} events/s{errors}"
            )

        engine.after(scenario.seconds / 2, lambda _argument: engine.leave_together(), 0)
        seconds = engine.run(scenario.seconds, progress)
        tally, engine.tally = engine.tally, Tally()
        result |= tally.summary(seconds)
        if gateway:
            cpu = gateway.cpu() - cpu_before
            result["cpu_s"] = cpu
            result["cpu_us_per_event"] = cpu * 1e6 / tally.events if tally.events else None
            result["cpu_us_per_request"] = cpu * 1e6 / tally.finished if tally.finished else None
            result["rss_bytes"] = gateway.memory()
            result["memory_curve"] = [*growth, [engine.in_flight, result["rss_bytes"] - memory_before]]
            result["rss_per_stream"] = (result["rss_bytes"] - memory_before) / max(engine.in_flight, 1)
        if upstream:
            engine.run(0.3)  # those who left last are seen
            result |= joined(tally.left, upstream.report())
        return result
    finally:
        engine.close()


def _bursts(scenario: Scenario) -> bool:
    return any(part.upstream.interval == 0 for part in scenario.parts)


def _ramp(engine: Engine, scenario: Scenario, say: Say) -> dict[str, Any]:
    """Add streams step by step until one step stalls, errs, or time is up."""
    interval = min(part.upstream.interval for part in scenario.parts)
    limit = STALLED * interval * 1000
    steps: list[dict[str, Any]] = []
    best, verdict, streams = 0, "time was up before a stall", scenario.streams
    end = time.monotonic() + scenario.seconds
    while time.monotonic() < end and streams <= 30_000:
        engine.closed(streams, 1.0)
        engine.run(1.5)
        engine.tally = Tally()
        engine.run(scenario.step_seconds)
        tally = engine.tally
        p99 = tally.gap.at(99) / 1000
        step = {
            "streams": streams, "gap_p50_ms": tally.gap.at(50) / 1000, "gap_p99_ms": p99,
            "events": tally.events, "errors": dict(tally.errors),
        }  # fmt: skip
        steps.append(step)
        say(f"ramp: {streams} streams, p99 between events {p99:.1f} ms (limit {limit:g} ms)")
        if tally.errors or p99 >= limit or not tally.events:
            verdict = f"{streams} streams: " + (f"errors {dict(tally.errors)}" if tally.errors else f"p99 {p99:.1f} ms")
            break
        best = streams
        streams += scenario.step
    return {"streams_without_stall": best, "limit_ms": limit, "ended_because": verdict, "steps": steps}


def joined(left: dict[str, int], report: dict[str, Any]) -> dict[str, Any]:
    """The clients' account of who left when, against the upstream's account of when it saw that."""
    found = {entry["user"]: entry for entry in report["left"]}
    times, wasted, known = Latency(), 0, 0
    for ident, at in left.items():
        if entry := found.get(ident):
            known += 1
            times.record(max(entry["seen"] - at, 0) / 1000)
            wasted += sum(stamp > at for stamp in entry["sent_at"])
    return {
        "upstream": {"totals": report["totals"], "late_ms": report["late_ms"]},
        # One that left right after its last event, or before its request was whole, is no loss at the upstream.
        "cancel": {"left": len(left), "seen_by_upstream": known, "ms": times.summary(), "tokens_wasted": wasted},
    }


def shown(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{result['scenario']} ({result['mode']} loop): {result['about']}"]
    if "steps" in result:
        rows = [
            [str(step["streams"]), f"{step['gap_p50_ms']:.1f}", f"{step['gap_p99_ms']:.1f}", str(step["events"])]
            for step in result["steps"]
        ]
        lines.append(table(["streams", "gap p50 ms", "gap p99 ms", "events"], rows))
        lines.append(f"most streams without a stall: {result['streams_without_stall']} ({result['ended_because']})")
        return "\n".join(lines)
    lines.append(
        f"{result['seconds']:.1f} s: {result['finished']} requests ({result['requests_per_s']:.0f}/s), "
        f"{result['events']} events ({result['events_per_s']:.0f}/s), {result['mib_per_s']:.1f} MiB/s down, "
        f"{result['upload_mib_per_s']:.1f} MiB/s up"
    )
    rows = []
    for key, name in (
        ("event_ms", "an event's way (send to receive)"),
        ("gap_ms", "between two events"),
        ("first_ms", "intended start to first byte"),
        ("whole_ms", "intended start to end"),
    ):
        if result[key]["count"]:
            rows.append([name, *(f"{result[key][point]:.2f}" for point in ("p50", "p90", "p99", "p99.9", "max"))])
    if rows:
        lines.append(table(["ms", "p50", "p90", "p99", "p99.9", "max"], rows))
    if result.get("cancel", {}).get("left"):
        cancel = result["cancel"]
        worst = cancel["ms"].get("p99", 0), cancel["ms"].get("max", 0)
        lines.append(
            f"{cancel['left']} clients left, the upstream saw {cancel['seen_by_upstream']}: "
            f"p99 {worst[0]:.1f} ms, worst {worst[1]:.1f} ms; {cancel['tokens_wasted']} tokens sent after they left"
        )
    if "cpu_s" in result:
        each = [
            f"{result[key]:.1f} µs per {key[11:]}" for key in ("cpu_us_per_event", "cpu_us_per_request") if result[key]
        ]
        lines.append(f"gateway: {result['cpu_s']:.2f} s CPU, {', '.join(each)}, {result['rss_bytes'] >> 20} MiB RSS")
    if late := result.get("upstream", {}).get("late_ms", {}).get("p99"):
        lines.append(f"the upstream itself was late by {late:.1f} ms at p99")
    if result["held"]:
        lines.append(f"{result['held']} arrivals had to wait for a free place; their waiting is counted")
    lines.append(f"errors: {result['errors'] or 'none'}")
    with suppress(KeyError):
        if result["statuses"].keys() - {"200"}:
            lines.append(f"statuses: {result['statuses']}")
    return "\n".join(lines)
