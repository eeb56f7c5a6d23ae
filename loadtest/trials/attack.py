"""A thousand slow heads, and the streams of others meanwhile.

Rounds of two windows each, calm and attacked, on the same streams in the same run, so that only the ratio counts. Each
attack begins anew in its round, goes on (who is thrown out comes again) until its window is over, and must be gone one
deadline later.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from loadtest.behaviour import Behaviour
from loadtest.engine import Engine
from loadtest.processes import upstream_process
from loadtest.promises.kit import Verdict
from loadtest.safety import target_of
from loadtest.scenario import Part
from loadtest.tally import Tally
from loadtest.trials.gateway import compared, trial
from loadtest.trials.slowheads import attacking

__all__ = ["RATIO", "attack"]

RATIO = 2.0  # attacked : calm
SLACK = 2.0  # seconds after the deadline, for a busy machine; and what the attackers' own clock was late
PATIENCE = 15.0  # seconds after the deadline, in which who is still there at the end may go
INTERVAL = 0.05


def attack(
    attackers: int, streams: int, window: float, rounds: int, deadline: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """The trial. `window` and `deadline` in seconds; a window longer than the deadline sees attackers come again."""
    part = Part(upstream=Behaviour(tokens=200, interval=INTERVAL))
    found: list[dict[str, Any]] = []
    errors: Counter[str] = Counter()
    with (
        upstream_process() as upstream,
        trial(upstream.port, say, deadlines={"request_head": deadline, "first_byte": 30.0}) as gateway,
    ):
        engine = Engine(target_of(gateway.gateway.url), (part,))
        idle = gateway.quiet(5)

        def measured(name: str) -> None:
            engine.tally = tally = Tally()
            engine.run(window, lambda: say(f"round {len(found)}: {name}, {engine.in_flight} streams"))
            errors.update(tally.errors)
            found[-1][name] = tally.event.at(99) / 1000
            found[-1][f"{name}_events"] = tally.events

        try:
            engine.closed(streams, 1.0)
            engine.run(2.0)
            for _ in range(rounds):
                found.append({})
                measured("calm")
                with attacking(gateway.gateway.port, attackers, window + 1.0, deadline + PATIENCE) as process:
                    while "all are there" not in process.said() and process.popen.poll() is None:
                        engine.run(0.05)
                    measured("attacked")
                    end = time.monotonic() + deadline + 2 * PATIENCE
                    while process.popen.poll() is None and time.monotonic() < end:
                        engine.run(0.1)
                    found[-1]["attackers"] = json.loads(process.said().splitlines()[-1])
        finally:
            engine.close()
        after = gateway.quiet()
    return _result(found, errors, deadline, compared(idle, after), attackers, streams)


def _result(
    found: list[dict[str, Any]],
    errors: Counter[str],
    deadline: float,
    leaks: dict[str, Any],
    attackers: int,
    streams: int,
) -> dict[str, Any]:
    calm, attacked = (statistics.median(one[name] for one in found) for name in ("calm", "attacked"))
    ratio = attacked / calm if calm else float("inf")
    worst = max(one["attackers"]["worst_s"] for one in found)
    late = max(one["attackers"]["late_s"] for one in found)
    limit = deadline + SLACK + late
    stayed = sum(one["attackers"]["still_there"] for one in found)
    thrown = sum(one["attackers"]["thrown_out"] for one in found)
    answers = sum((Counter(one["attackers"]["answers"]) for one in found), Counter())
    verdicts = [
        Verdict("streams flow", "event p99, attacked against calm", f"{ratio:.2f} x", f"<= {RATIO:g} x", ratio <= RATIO,
                f"{attacked:.1f} ms against {calm:.1f} ms, medians of {len(found)} rounds"),
        Verdict("streams flow", "streams that failed", str(sum(errors.values())), "0", not errors, str(dict(errors))),
        Verdict("attackers are gone", "longest life of a slow head", f"{worst:.2f} s", f"<= {limit:.1f} s",
                worst <= limit, f"{thrown} thrown out, answers {dict(answers)}; their clock was late by {late:.1f} s"),
        Verdict("attackers are gone", "still there after the end", str(stayed), "0", not stayed),
        Verdict("no leak", "tasks, descriptors, connections, pools", ", ".join(leaks["leaked"]) or "none", "none",
                not leaks["leaked"]),
    ]  # fmt: skip
    return {
        "kind": "attack", "attackers": attackers, "streams": streams, "deadline": deadline, "rounds": found,
        "ratio": ratio, "calm_p99_ms": calm, "attacked_p99_ms": attacked, "state": leaks, "verdicts": verdicts,
    }  # fmt: skip
