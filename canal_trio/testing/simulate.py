"""`python -m canal_trio.testing.simulate`: replay a seed, try many, or hunt for minutes. See docs/simulation.md.

Every seed runs twice, with the hand-over and on the plain path. The exit code is 0 if every promise held and 1 if one
was broken; what broke it is printed with the command that replays it.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import nullcontext
from functools import partial
from itertools import count, islice
from multiprocessing import get_context

import click

from canal_trio.testing.draws import plan_of
from canal_trio.testing.hunt import Verdict, check, shown, smaller
from canal_trio.testing.mutants import MUTANTS
from canal_trio.testing.simnet import Trace
from canal_trio.testing.simworld import BUDGET, simulate

__all__ = ["main"]

BATCH = 20  # seeds that one process takes at a time
MOST_FOUND = 10  # seeds that break a promise, then it is enough


def _seeds(text: str) -> range:
    first, dots, last = text.partition("..")
    try:
        return range(int(first), int(last) + 1) if dots else range(int(first), int(first) + 1)
    except ValueError:
        raise click.BadParameter(f"'{text}' is no range of seeds; write A..B, as in 0..999") from None


@click.command(help="Simulate the whole gateway from seeds, and see whether it keeps its promises.")
@click.option("--seed", type=int, help="Run this one.")
@click.option("--seeds", help="Run these, A..B.")
@click.option("--minutes", type=click.FloatRange(min=0), help="Run seeds for so long, from --first on.")
@click.option("--first", type=int, help="Where --minutes begins; chance chooses if it is not given.")
@click.option("--steps", type=click.IntRange(min=1), default=BUDGET, show_default=True,
              help="Steps of the scheduler in one run; more is a busy loop.")  # fmt: skip
@click.option("--trace", is_flag=True, help="Print what happens, byte by byte (with --seed).")
@click.option("--smaller", "reduce", is_flag=True, help="Make a plan that breaks a promise smaller (with --seed).")
@click.option("--processes", type=click.IntRange(min=1), default=os.cpu_count() or 1, show_default=True)
@click.option("--mutant", type=click.Choice(sorted(MUTANTS)), help="Plant this bug first (with --seed or --seeds).")
def main(
    seed: int | None,
    seeds: str | None,
    minutes: float | None,
    first: int | None,
    steps: int,
    trace: bool,
    reduce: bool,
    processes: int,
    mutant: str | None,
) -> None:
    """The command."""
    if sum(given is not None for given in (seed, seeds, minutes)) != 1:
        raise click.UsageError("Say which seeds: --seed S, --seeds A..B or --minutes N.")
    if seed is not None:
        with MUTANTS[mutant].planted() if mutant else nullcontext():
            sys.exit(_one(seed, steps, trace=trace, reduce=reduce))
    if seeds is not None:
        sys.exit(_many(iter(_seeds(seeds)), steps, float("inf"), processes, mutant))
    begin = random.SystemRandom().randrange(1 << 31) if first is None else first
    click.echo(f"simulating for {minutes:g} minutes from seed {begin} on, with {processes} processes")
    assert minutes is not None
    sys.exit(_many(count(begin), steps, minutes * 60, processes, mutant))


def _one(seed: int, steps: int, *, trace: bool, reduce: bool) -> int:
    plan = plan_of(seed)
    if trace:
        click.echo(f"plan: {shown(plan)}")
        for handover in (True, False):
            click.echo(f"\n{'hand-over' if handover else 'plain path'}: virtual seconds, step, who, what")
            kept = Trace(keep=True)
            simulate(plan, handover=handover, steps=steps, trace=kept)
            click.echo("\n".join(kept.lines))
    verdict = check(plan, steps=steps)
    _report(seed, verdict.complaints, steps)
    if verdict.complaints and reduce:
        less = smaller(plan, lambda candidate: bool(check(candidate, steps=steps).complaints))
        click.echo(f"a smaller plan:\n{shown(less)}")
        for complaint in check(less, steps=steps).complaints:
            click.echo(f"  {complaint}")
    if not verdict.complaints:
        click.echo(_summary(1, verdict))
    return 1 if verdict.complaints else 0


def _report(seed: int, complaints: list[str], steps: int, mutant: str | None = None) -> None:
    if not complaints:
        return
    click.echo(f"seed {seed} breaks a promise:")
    for complaint in complaints[:12]:
        click.echo(f"  {complaint}")
    more = "" if steps == BUDGET else f" --steps {steps}"
    more += f" --mutant {mutant}" if mutant else ""
    click.echo(f"  replay: python -m canal_trio.testing.simulate --seed {seed}{more} --trace")


def _summary(seeds: int, verdict: Verdict, seconds: float | None = None) -> str:
    ends = ", ".join(f"{name} {number}" for name, number in verdict.outcomes.most_common())
    pace = f" ({verdict.exchanges / seconds * 60:.0f} a minute)" if seconds else ""
    return (
        f"{seeds} seeds, {verdict.exchanges} exchanges{pace}, {verdict.compared} of them compared between the two "
        f"paths, {verdict.virtual / 3600:.1f} virtual hours\nended: {ends}"
    )


# -- many --------------------------------------------------------------------------------------------------------------


def run_batch(seeds: list[int], steps: int, mutant: str | None) -> tuple[Verdict, dict[int, list[str]]]:
    """Some seeds, in a process of their own: what they came to, and the complaints by seed."""
    total, found = Verdict([]), {}
    with MUTANTS[mutant].planted() if mutant else nullcontext():
        for seed in seeds:
            try:
                verdict = check(plan_of(seed), steps=steps)
            except Exception as exc:
                found[seed] = [f"the run failed: {exc!r}"]
                continue
            total.add(verdict)
            if verdict.complaints:
                found[seed] = verdict.complaints
    return total, found


def _many(seeds: Iterator[int], steps: int, seconds: float, processes: int, mutant: str | None) -> int:
    began, ran, bad = time.monotonic(), 0, 0
    total = Verdict([])
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        pending: set[Future[tuple[Verdict, dict[int, list[str]]]]] = set()
        over = False
        while True:
            while not over and len(pending) < 2 * processes:
                batch = list(islice(seeds, BATCH))
                if batch:
                    pending.add(pool.submit(partial(run_batch, batch, steps, mutant)))
                    ran += len(batch)
                over = len(batch) < BATCH or time.monotonic() - began >= seconds
            if not pending:
                break
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                verdict, found = future.result()
                total.add(verdict)
                for seed, complaints in found.items():
                    bad += 1
                    _report(seed, complaints, steps, mutant)
            over = over or bad >= MOST_FOUND or time.monotonic() - began >= seconds
    click.echo(_summary(ran, total, time.monotonic() - began))
    click.echo(f"{bad} seeds broke a promise" if bad else "every promise held")
    return 1 if bad else 0


if __name__ == "__main__":
    main()
