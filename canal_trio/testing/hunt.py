"""Run a plan on both paths and judge it; make a plan that breaks a promise smaller.

`check` is what the command line, the tests and the hunt for mutants share.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from canal_trio.settings import Bounds, Deadlines
from canal_trio.testing.draws import plan_of
from canal_trio.testing.judge import judge
from canal_trio.testing.mutants import Mutant
from canal_trio.testing.plans import Ask, Client, Plan, Reply
from canal_trio.testing.simlink import SimLink
from canal_trio.testing.simworld import BUDGET, Seen, simulate
from canal_trio.testing.twins import compare

__all__ = ["Verdict", "check", "kill", "shown", "smaller"]


@dataclass(slots=True)
class Verdict:
    """What came of a plan, run twice. `outcomes` counts records by how their exchanges ended."""

    complaints: list[str]
    exchanges: int = 0
    compared: int = 0  # of them, those whose twin on the other path had to be the same
    virtual: float = 0.0  # seconds
    outcomes: Counter[str] = field(default_factory=Counter)

    def add(self, other: Verdict) -> None:
        """Count another one in."""
        self.exchanges += other.exchanges
        self.compared += other.compared
        self.virtual += other.virtual
        self.outcomes += other.outcomes


def check(plan: Plan, *, steps: int = BUDGET, run: Callable[..., Seen] = simulate) -> Verdict:
    """Run `plan` handed over and on the plain path, and hold the promises against both."""
    one, other = (run(plan, handover=handover, steps=steps) for handover in (True, False))
    found, count = compare(one, other)
    verdict = Verdict(judge(one) + judge(other) + found, one.exchanges + other.exchanges, 2 * count)
    for seen in (one, other):
        verdict.virtual += seen.virtual
        verdict.outcomes.update(noted.record.outcome.value for each in seen.records.values() for noted in each)
    return verdict


def kill(mutant: Mutant, *, seeds: int = 2_000) -> tuple[int, str] | None:
    """The first seed from the mutant's own on that finds it, and how; None if it lives. Exceptions count as found."""
    with mutant.planted():
        for seed in range(mutant.seed, mutant.seed + seeds):
            try:
                complaints = check(plan_of(seed)).complaints
            except Exception as exc:
                return seed, f"the run failed: {exc!r}"
            if complaints:
                return seed, complaints[0]
    return None


# -- smaller -----------------------------------------------------------------------------------------------------------


def smaller(plan: Plan, bad: Callable[[Plan], bool], *, most: int = 300) -> Plan:
    """A plan that is still `bad`, with less in it. `most` bounds the runs."""
    left = most
    again = True
    while again:
        again = False
        for candidate in _simpler(plan):
            if not left:
                return plan
            left -= 1
            if candidate != plan and bad(candidate):
                plan, again = candidate, True
                break
    return plan


def _simpler(plan: Plan) -> Iterator[Plan]:
    for number, client in enumerate(plan.clients):
        if client.asks:
            yield _with(plan, number, replace(client, asks=()))
    yield replace(plan, drain=None)
    yield replace(plan, reload=None)
    yield replace(plan, request_link=SimLink(1 << 20), response_link=SimLink(1 << 20))
    yield replace(plan, bounds=Bounds())
    yield replace(plan, deadlines=Deadlines())
    for number, client in enumerate(plan.clients):
        for other in _simpler_clients(client):
            yield _with(plan, number, other)


def _simpler_clients(client: Client) -> Iterator[Client]:
    if len(client.asks) > 1:
        yield replace(client, asks=client.asks[:-1])
    usual = Client(())
    for name in ("leave", "out", "raises", "pipelined", "waits", "start", "read"):
        yield replace(client, **{name: getattr(usual, name)})
    yield replace(client, to_gateway=usual.to_gateway, to_client=usual.to_client, pause=0.0)
    yield replace(client, send=0, spacing=0.0)
    for index, ask in enumerate(client.asks):
        for other in _simpler_asks(ask):
            yield replace(client, asks=(*client.asks[:index], other, *client.asks[index + 1 :]))


def _simpler_asks(ask: Ask) -> Iterator[Ask]:
    if not ask.upgrade and not ask.model:
        yield Ask(ask.tag)
    for name in ("pause", "dials", "expect", "chunked", "version", "close"):
        yield replace(ask, **{name: getattr(Ask(ask.tag), name)})
    for index, reply in enumerate(ask.replies):
        if len(ask.replies) > 1:
            yield replace(ask, replies=(*ask.replies[:index], *ask.replies[index + 1 :]))
        for name in ("out", "into", "garbage", "quits", "informational", "gap", "wait", "cut", "trailers"):
            other = replace(reply, **{name: getattr(Reply(), name)})
            yield replace(ask, replies=(*ask.replies[:index], other, *ask.replies[index + 1 :]))
        if len(reply.sizes) > 1:
            other = replace(reply, sizes=reply.sizes[: len(reply.sizes) // 2])
            yield replace(ask, replies=(*ask.replies[:index], other, *ask.replies[index + 1 :]))


def _with(plan: Plan, number: int, client: Client) -> Plan:
    return replace(plan, clients=(*plan.clients[:number], client, *plan.clients[number + 1 :]))


def shown(value: Any) -> str:
    """A plan as a Python expression, without what is as usual: it can be pasted into a test."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = []
        for each in dataclasses.fields(value):
            usual = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
            if getattr(value, each.name) != usual:
                parts.append(f"{each.name}={shown(getattr(value, each.name))}")
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value))}{',' if len(value) == 1 else ''})"
    return str(value) if hasattr(value, "value") else repr(value)
