"""Several gateways under the same loads, in interleaved rounds: what an event, a request and a stream cost each.

Invariants: every peer gets the same load from the same client, in the same round, on the same core; ratios are taken
within a round and only then the median over rounds, because a shared machine changes its mind between rounds. CPU is
user and system time of the whole process tree. A peer that cannot be had is named with its reason.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loadtest import run as runs
from loadtest.peers import PEERS, Gateway, Missing, running
from loadtest.processes import UpstreamProcess, busy_seconds, cores, pinned, upstream_process
from loadtest.safety import target_of
from loadtest.scenario import Scenario, load, stamped
from loadtest.table import table

__all__ = ["MEASURES", "compare", "shown"]

BASE = "nginx"  # whom the others are compared with, unless another one is named


@dataclass(frozen=True, slots=True)
class Measure:
    """One load. `fresh`: a new process each time, since memory is looked at; `once`: in one round only."""

    scenario: str
    seconds: float
    warm_up: float
    fresh: bool = False
    once: bool = False


MEASURES = {
    "steady": Measure("steady", 4, 2),
    "burst": Measure("burst", 2.5, 0.5),
    "batched": Measure("burst_batched", 2, 0.5),
    "small": Measure("small", 2.5, 0.5),
    "upload": Measure("upload", 2, 0.5),
    "idle": Measure("idle", 6, 6, fresh=True, once=True),
    "leave": Measure("leave_together", 2, 1.5),
}
DEFAULT = ("steady", "burst", "batched", "small", "upload", "idle", "leave")


def _figures(result: dict[str, Any]) -> dict[str, float]:
    """The figures of one run, flat; what was not measured is absent."""
    found: dict[str, float | None] = {
        key: result.get(key)
        for key in (
            "cpu_us_per_event", "cpu_us_per_request", "events_per_s", "requests_per_s", "upload_mib_per_s",
            "rss_per_stream", "cpu_s",
        )
    }  # fmt: skip
    for kind in ("event", "first", "gap", "whole"):
        for point in ("p50", "p99"):
            found[f"{kind}_{point}_ms"] = result.get(f"{kind}_ms", {}).get(point)
    if cpu := result.get("cpu_s"):
        found["events_per_cpu_s"] = result["events"] / cpu
        found["mib_per_cpu_s"] = result["upload_mib_per_s"] * result["seconds"] / cpu
    if (cancel := result.get("cancel")) and cancel["left"]:
        found["cancel_p99_ms"] = cancel["ms"].get("p99")
        found["cancel_max_ms"] = cancel["ms"].get("max")
        found["tokens_wasted"] = cancel["tokens_wasted"]
        found["cancel_unseen"] = cancel["left"] - cancel["seen_by_upstream"]
    found["errors"] = sum(count for kind, count in result["errors"].items() if "sent again" not in kind)
    return {key: float(value) for key, value in found.items() if value is not None}


def compare(
    peers: Sequence[str],
    measures: Sequence[str],
    say: Callable[[str], None],
    *,
    rounds: int = 3,
    shorter: float = 1.0,
    tls: bool = False,
    base: str = BASE,
) -> dict[str, Any]:
    """Interleaved rounds over all peers that can be had. Never raises for a missing one: it is in `missing`.

    Ratios are those to `base`; without it among the peers there are none.
    """
    own, others = cores()[0], cores()[-1]
    missing: dict[str, str] = {}
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    curves: dict[str, dict[str, Any]] = {}
    began = time.time()
    others_before = busy_seconds() - sum(os.times()[:4])
    with ExitStack() as stack:
        upstream = stack.enter_context(upstream_process(core=others))
        gateways: dict[str, Gateway] = {}
        for name in peers:
            say(f"starting {name}")
            try:
                gateways[name] = stack.enter_context(running(name, upstream.port, core=own, tls=tls, say=say))
            except Missing as exc:
                missing[name] = str(exc)
        stack.enter_context(pinned(others))
        for measure in measures:
            wanted = MEASURES[measure]
            for number in range(1 if wanted.once else rounds):
                for name, gateway in gateways.items():
                    say(f"{measure}, round {number + 1}, {name}")
                    scenario = _scaled(wanted, name, shorter)
                    try:
                        with _maybe_fresh(wanted, gateway, upstream, own, tls) as one:
                            target = target_of(one.url)
                            result = runs.run(scenario, target, say, upstream, one.process)
                            if one.process is not None and one.process.popen.poll() is not None:
                                raise Missing(f"it ended under the load: {one.process.said()[-300:]!r}")
                    except Missing as exc:
                        missing[f"{name} ({measure})"] = str(exc)
                        continue
                    found.setdefault(measure, {}).setdefault(name, []).append(_figures(result))
                    curves.setdefault(measure, {})[name] = {
                        "event": result["event_ms"].get("curve"),
                        "cancel": result.get("cancel", {}).get("ms", {}).get("curve"),
                        "memory": result.get("memory_curve"),
                    }
    # By now all we started has ended and was waited for, so its time is in ours.
    others_used = busy_seconds() - sum(os.times()[:4]) - others_before
    return {
        "kind": "compare",
        "at": time.strftime("%Y-%m-%d %H:%M", time.localtime(began)),
        "machine": machine(),
        "others_cores": max(others_used, 0) / (time.time() - began),
        "seconds": round(time.time() - began),
        "rounds": rounds,
        "tls": tls,
        "base": base,
        "peers": {name: PEERS[name].about for name in gateways},
        "missing": missing,
        "figures": found,
        "medians": {
            measure: {name: _medians(rows) for name, rows in by_peer.items()} for measure, by_peer in found.items()
        },
        "ratios": {measure: _ratios(by_peer, base) for measure, by_peer in found.items()},
        "curves": curves,
    }


def _scaled(measure: Measure, peer: str, shorter: float) -> Scenario:
    """The scenario; a peer that could not carry it gets a smaller one, and the table says so."""
    scenario = load(measure.scenario)
    scenario = replace(
        scenario, seconds=max(measure.seconds * shorter, 0.5), warm_up=max(measure.warm_up * shorter, 0.3)
    )
    about = PEERS[peer]
    streams = max(int(scenario.streams * about.share), 1)
    return stamped(replace(scenario, streams=streams), about.stamp)


@contextmanager
def _maybe_fresh(
    measure: Measure, gateway: Gateway, upstream: UpstreamProcess, core: int, tls: bool
) -> Iterator[Gateway]:
    """The running gateway, or a new one of the same kind where its memory is to be looked at."""
    if measure.fresh and gateway.process is not None:
        with running(gateway.name, upstream.port, core=core, tls=tls) as fresh:
            yield fresh
    else:
        yield gateway


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {
        key: statistics.median(row[key] for row in rows if key in row) for key in sorted({k for r in rows for k in r})
    }


def _ratios(by_peer: dict[str, list[dict[str, float]]], name: str) -> dict[str, dict[str, float]]:
    """Per peer and figure: the median over rounds of peer / base, which is the one of that `name`, within the round."""
    base = by_peer.get(name)
    if base is None:
        return {}
    out: dict[str, dict[str, float]] = {}
    for name, rows in by_peer.items():
        pairs = list(zip(rows, base, strict=False))
        keys = {key for row in rows for key in row}
        out[name] = {}
        for key in sorted(keys):
            ratios = [mine[key] / other[key] for mine, other in pairs if mine.get(key) is not None and other.get(key)]
            if ratios:
                out[name][key] = statistics.median(ratios)
    return out


def machine() -> str:
    """What this ran on, in a few words."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{len(cores())} cores {model}, Linux {platform.release()}, Python {platform.python_version()}"


_COLUMNS: tuple[tuple[str, tuple[tuple[str, str, str, float], ...]], ...] = (
    (
        "Streams",
        (
            ("steady", "cpu_us_per_event", "CPU µs/event", 1),
            ("burst", "cpu_us_per_event", "burst: CPU µs/event", 1),
            ("burst", "events_per_s", "events/s", 1),
            ("batched", "cpu_us_per_event", "16 per send: CPU µs/event", 1),
            ("idle", "rss_per_stream", "KiB/idle stream", 1 / 1024),
        ),
    ),
    (
        "Requests",
        (
            ("small", "cpu_us_per_request", "CPU µs/small exchange", 1),
            ("small", "requests_per_s", "exchanges/s", 1),
            ("upload", "mib_per_cpu_s", "upload MiB/CPU s", 1),
        ),
    ),
)


def shown(result: dict[str, Any]) -> str:
    """Tables for people: a figure and its ratio to the base; latencies as what is added to a direct connection."""
    medians, ratios = result["medians"], result["ratios"]
    blocks = []
    for title, columns in _COLUMNS:
        columns = tuple(column for column in columns if column[0] in medians)
        if columns:
            rows = [
                [name, *(_cell(medians, ratios, name, *column[:2], column[3]) for column in columns)]
                for name in result["peers"]
                if name != "direct" or not all("cpu" in column[1] for column in columns)
            ]
            blocks.append(title + "\n" + table(["", *(column[2] for column in columns)], rows))
    if latency := _latencies(result):
        blocks.append(latency)
    notes = [f"missing: {name}: {why}" for name, why in result["missing"].items()]
    errors = {
        f"{measure}/{name}": int(sum(row["errors"] for row in rows))
        for measure, by_peer in result["figures"].items()
        for name, rows in by_peer.items()
        if any(row["errors"] for row in rows)
    }
    notes.append(f"errors: {errors or 'none'}")
    if busy := disturbed(result):
        notes.append(f"CAUTION: {busy}")
    notes += [
        f"{name} carried {PEERS[name].share:g} of the streams" for name in result["peers"] if PEERS[name].share < 1
    ]
    notes.append(
        f"{result['machine']}; others used {result.get('others_cores', 0):.1f} cores; "
        f"medians of {result['rounds']} interleaved rounds, × is the ratio to {result.get('base', BASE)} within a round"
        f"{'; TLS to the client' if result['tls'] else ''}; {result['seconds']} s"
    )
    return "\n\n".join([*blocks, "\n".join(notes)])


def disturbed(result: dict[str, Any]) -> str:
    """Why the figures may not be those of a quiet machine; empty if nothing says so.

    A gateway that is kept from its core reads several events at once and looks cheaper per event than it is.
    """
    reasons = []
    short = [
        name
        for name, row in result["medians"].get("steady", {}).items()
        if row.get("events_per_s", 0) < 0.95 * 10_000 * PEERS[name].share
    ]
    if short:
        reasons.append(f"not all events of the steady load got through in time at {', '.join(short)}")
    late = result["medians"].get("steady", {}).get("direct", {}).get("event_p99_ms", 0)
    if late > 5:
        reasons.append(f"the direct connection's p99 was {late:.1f} ms")
    if result.get("others_cores", 0) > 0.25:
        reasons.append(f"others used {result.get('others_cores', 0):.1f} cores meanwhile")
    return "; ".join(reasons)


def _cell(medians: Any, ratios: Any, name: str, measure: str, key: str, scale: float) -> str:
    value = medians[measure].get(name, {}).get(key)
    if value is None:
        return "–"
    value *= scale
    text = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    ratio = ratios.get(measure, {}).get(name, {}).get(key)
    return f"{text} ({ratio:.2f} ×)" if ratio is not None else text


def _latencies(result: dict[str, Any]) -> str:
    medians = result["medians"]
    rows = []
    for name in result["peers"]:
        row = [name]
        for measure in ("steady", "idle"):
            mine, direct = medians.get(measure, {}).get(name, {}), medians.get(measure, {}).get("direct", {})
            for key in ("event_p50_ms", "event_p99_ms"):
                value = mine.get(key)
                added = f" ({value - direct[key]:+.2f})" if value is not None and key in direct else ""
                row.append("–" if value is None else f"{value:.2f}{added}")
        leave = medians.get("leave", {}).get(name, {})
        row.append(f"{leave['cancel_p99_ms']:.1f}" if "cancel_p99_ms" in leave else "–")
        row.append(f"{leave['tokens_wasted']:.0f}" if "tokens_wasted" in leave else "–")
        rows.append(row)
    header = ["", "steady p50", "steady p99", "idle p50", "idle p99", "100 leave: p99", "tokens wasted"]
    return "Latency in ms (in brackets: more than direct)\n" + table(header, rows)
