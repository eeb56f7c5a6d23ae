"""Chaos on real sockets: hundreds of clients, a link that breaks, and accounts that must agree afterwards.

The gateway stands between honest clients and a link that breaks as a seed says (`faults`). After a warm-up the trial
waits until nobody is served and looks at the gateway; then comes the trial itself; then it looks again.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loadtest.processes import resident, upstream_process
from loadtest.promises.kit import Verdict
from loadtest.safety import Target, target_of
from loadtest.trials.books import agree
from loadtest.trials.customers import Customers, Habits, Visit
from loadtest.trials.gateway import State, Trial, compared, trial
from loadtest.trials.load import lasting, load
from loadtest.trials.proxy import link_process

__all__ = ["GROWTH", "chaos"]

GROWTH = 0.05  # share by which the resident memory may have grown
JUDGED = 240.0  # seconds of warm-up and trial from which on memory says something
SHOWN = 5  # examples of each fault


def _memory(before: State, after: State, seconds: float) -> Verdict:
    """Of the warmed-up state, where there was time for it to warm up."""
    grown = after.memory / before.memory - 1
    judged = seconds >= JUDGED
    return Verdict(
        "no leak", "resident memory against the warmed-up state", f"{grown:+.1%} ({after.memory >> 20} MiB)",
        f"<= +{GROWTH:.0%}", grown <= GROWTH if judged else None,
        "" if judged else f"too short: {JUDGED:g} s say something",
    )  # fmt: skip


def _verdicts(
    faults: dict[str, list[str]], visits: list[Visit], before: State, after: State, trial_: Trial, seconds: float
) -> list[Verdict]:
    verdicts = [
        Verdict("the accounts agree", rule, str(len(found)), "0", not found, "; ".join(found[:SHOWN])[:2000])
        for rule, found in faults.items()
    ]
    metrics = trial_.metrics()
    records, counted = sum(1 for _ in trial_.records()), int(metrics.get("canal_exchanges_total", 0))
    dropped = int(metrics.get("canal_log_lines_dropped", 0))
    verdicts.append(
        Verdict(
            "the accounts agree", "records in the log = exchanges in the metrics", f"{records} = {counted}", "equal",
            records == counted and not dropped, f"{dropped} lines dropped" if dropped else "",
        )
    )  # fmt: skip
    leaks = compared(before, after)
    bugs = trial_.complaints()
    verdicts += [
        Verdict("no leak", "tasks, descriptors, connections, pools", ", ".join(leaks["leaked"]) or "none", "none",
                not leaks["leaked"], f"{after.tasks} tasks, {after.descriptors} descriptors"),
        _memory(before, after, seconds),
        Verdict("no bug", "errors in the log", str(len(bugs)), "0", not bugs, "; ".join(bugs[:SHOWN])[:2000]),
        Verdict("alive", "requests answered whole", str(sum(one.outcome == "complete" for one in visits)), "> 0",
                any(one.outcome == "complete" for one in visits)),
    ]  # fmt: skip
    return verdicts


def chaos(
    minutes: float,
    streams: int,
    seed: str,
    say: Callable[[str], None],
    workers: int = 1,
    deadlines: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The whole trial; a fifth of the time is warm-up."""
    seconds = minutes * 60
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="loadtest-chaos-") as folder,
        upstream_process() as upstream,
        link_process(upstream.port, seed, Path(folder)) as link,
        trial(link.port, say, workers=workers, deadlines=deadlines) as gateway,
    ):
        target = target_of(gateway.gateway.url)
        visits: list[Visit] = []
        memory: list[int] = []  # MiB, each second

        def look() -> None:
            memory.append(resident(gateway.pid) >> 20)

        _phase(visits, target, "warm-up", seed, streams, seconds / 5, say, look)
        before = gateway.quiet()
        _phase(visits, target, "chaos", seed, streams, seconds * 4 / 5, say, look)
        after = gateway.quiet()
        link.process.stop()
        attempts = link.attempts()
        faults = agree(visits, gateway.records(), attempts)
        verdicts = _verdicts(faults, visits, before, after, gateway, time.monotonic() - began)
        leaks = compared(before, after)
    broke = Counter(str(one["fault"]) for one in attempts if one["broke"])
    return {
        "kind": "chaos", "seed": seed, "streams": streams, "workers": workers,
        "seconds": round(time.monotonic() - began, 1), "requests": len(visits), "attempts": len(attempts),
        "outcomes": dict(Counter(visit.outcome for visit in visits).most_common()), "broke": dict(broke.most_common()),
        "state": leaks, "memory_mib": memory[:: max(len(memory) // 60, 1)], "verdicts": verdicts,
    }  # fmt: skip


def _phase(
    visits: list[Visit],
    target: Target,
    name: str,
    seed: str,
    streams: int,
    seconds: float,
    say: Callable[[str], None],
    look: Callable[[], object],
) -> None:
    customers = Customers(target, Habits(), f"{seed}.{name[0]}")
    load(customers, streams, lasting(seconds, look), lambda text: say(f"{name}: {text}"))
    visits += customers.visits
