"""Reloads under load: routes, keys and limits change again and again, and nobody notices.

Files alternate between two upstreams, two sets of keys and two limits; now and then one is bad, and must change
nothing. Every stream and every document has to come whole.
"""

from __future__ import annotations

import hashlib
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import trio

from loadtest.processes import upstream_process
from loadtest.promises.kit import Verdict
from loadtest.safety import target_of
from loadtest.trials.books import agree
from loadtest.trials.customers import Customers, Habits
from loadtest.trials.gateway import DEADLINES, Trial, compared, tables, trial
from loadtest.trials.load import lasting, load

__all__ = ["reload"]

BAD_EVERY = 10  # after so many good ones comes a bad one
PAUSE = (0.2, 1.2)  # seconds between two
PATIENCE = 30.0  # seconds for one
HABITS = Habits(documents=0.1, uploads=0.02, leavers=0, slow=0, tokens=(20, 60), interval=(0.1, 0.3))


def reload(
    reloads: int,
    streams: int,
    workers: int,
    seed: str,
    say: Callable[[str], None],
    deadlines: Mapping[str, float] | None = None,
    habits: Habits = HABITS,
    bad_every: int = BAD_EVERY,
) -> dict[str, Any]:
    """The trial."""
    began = time.monotonic()
    times = {**DEADLINES, **(deadlines or {})}
    chance = random.Random(seed)
    took: list[float] = []
    with (
        upstream_process() as one,
        upstream_process() as two,
        trial(one.port, say, workers=workers, deadlines=times) as gateway,
    ):
        server = gateway.config.read_text().partition("[[upstream]]")[0]
        target = target_of(gateway.gateway.url)
        load(Customers(target, habits, f"w{seed}"), 20, lasting(0.5), say)
        before = gateway.quiet()

        async def during() -> None:
            await trio.sleep(1.5)
            for number in range(1, reloads + 1):
                await _reload(gateway, _file(server, number, one.port, two.port, times), "reloaded the config", took)
                if number % bad_every == 0:
                    await _reload(gateway, server + '[[upstream]]\nname = "x"\n', "refused, the old one stays", [])
                await trio.sleep(chance.uniform(*PAUSE))

        customers = Customers(target, habits, f"r{seed}")
        load(customers, streams, during, lambda text: say(f"reload {len(took)} of {reloads}: {text}"))
        leaks = compared(before, gateway.quiet())
        visits = customers.visits
        mine = {visit.ident for visit in visits}
        faults = agree(visits, (record for record in gateway.records() if record["request_id"] in mine))
        served = [process.report()["totals"]["finished"] for process in (one, two)]
        refused = sum("the old one stays" in line for line in gateway.log_lines())
    outcomes = Counter(visit.outcome for visit in visits)
    failed = [visit for visit in visits if visit.outcome != "complete"]
    lost = [f"{one.ident} ({one.kind}): {one.outcome} {one.status} {one.note}" for one in failed]
    wrong = [text for found in faults.values() for text in found]
    verdicts = [
        Verdict("nobody notices", "streams and documents lost", str(len(lost)), "0", not lost, "; ".join(lost[:5])),
        Verdict("nobody notices", "clients at a time, reached", str(customers.most), f">= {streams}",
                customers.most >= streams),
        Verdict("every reload counts", "in use", f"{len(took)} of {reloads}", "all", len(took) == reloads,
                f"worst {max(took, default=0):.2f} s; bad files refused: {refused}"),
        Verdict("every reload counts", "answers from each of the upstreams", str(served), "both > 0", min(served) > 0),
        Verdict("the accounts agree", "clients and records", str(len(wrong)), "0 faults", not wrong,
                "; ".join(wrong[:5])),
        Verdict("no leak", "tasks, descriptors, connections, pools", ", ".join(leaks["leaked"]) or "none", "none",
                not leaks["leaked"]),
    ]  # fmt: skip
    return {
        "kind": "reload", "reloads": len(took), "refused": refused, "streams": streams, "workers": workers,
        "requests": len(visits), "outcomes": dict(outcomes), "seconds": round(time.monotonic() - began, 1),
        "state": leaks, "verdicts": verdicts,
    }  # fmt: skip


def _file(server: str, number: int, one: int, two: int, times: Mapping[str, float]) -> str:
    """The configuration of the reload `number`."""
    port = (one, two)[number % 2]
    names = ["sk-test", f"sk-other-{number}"]
    keys = "".join(
        f'[[key]]\nname = "k{place}"\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n'
        for place, name in enumerate(names[:: 1 if number % 2 else -1])
    )
    bounds = f"[bounds]\nbody_bytes = {10_000_000 + number}\nwaiters = {500 + number % 2}\n"
    upstream = f'[[upstream]]\nname = "up{number % 2}"\nbase_url = "http://127.0.0.1:{port}"\n'
    model = f'[[model]]\nname = "{("m", "*")[number % 2]}"\nupstreams = ["up{number % 2}"]\n'
    return server + bounds + upstream + model + keys + tables({**times, "first_byte": times["first_byte"] + number % 2})


async def _reload(gateway: Trial, text: str, answer: str, took: list[float]) -> None:
    """One reload, until the gateway says `answer` once more."""

    def said() -> int:
        return sum(answer in line for line in gateway.log_lines())

    before = await trio.to_thread.run_sync(said)
    gateway.config.write_text(text)
    began = time.monotonic()
    assert gateway.gateway.process is not None
    gateway.gateway.process.popen.send_signal(signal.SIGHUP)
    while time.monotonic() < began + PATIENCE:
        if await trio.to_thread.run_sync(said) > before:
            took.append(time.monotonic() - began)
            return
        await trio.sleep(0.05)
    raise RuntimeError(f"no reload within {PATIENCE:g} s: {gateway.log_lines()[-3:]}")
