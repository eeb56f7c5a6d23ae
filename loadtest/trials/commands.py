"""The trials on the command line. Each prints a table and PASS or FAIL; exit code 1 if something broke."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import trio

from loadtest.table import table

__all__ = ["COMMANDS", "passed", "shown"]

Give = Callable[[dict[str, Any], str, str | None], None]
_JSON = click.option("--json", "json_to", metavar="FILE", help="Write the result as JSON; - for stdout.")
_SEED = click.option("--seed", default="1", show_default=True, help="What is drawn is drawn from it.")


def passed(result: dict[str, Any]) -> bool:
    """Nothing broke."""
    return all(verdict.kept is not False for verdict in result["verdicts"])


def shown(result: dict[str, Any]) -> str:
    """For people."""
    rows = []
    for one in result["verdicts"]:
        mark = {True: "kept", False: "BROKEN", None: "not judged"}[one.kept]
        rows.append([one.promise, one.what, one.measured, one.limit, mark, one.note[:160]])
    lines = [table(["", "what", "measured", "limit", "", "note"], rows), ""]
    hidden = {"verdicts", "kind", "state", "passed", "rounds"}
    lines += [f"{key}: {value}" for key, value in result.items() if key not in hidden]
    return "\n".join([*lines, "", f"{result['kind']}: {'PASS' if passed(result) else 'FAIL'}"])


def _done(result: dict[str, Any], json_to: str | None) -> int:
    from loadtest.__main__ import give

    text, good = shown(result), passed(result)
    verdicts = [dataclasses.asdict(verdict) for verdict in result["verdicts"]]
    give({**result, "verdicts": verdicts, "passed": good}, text, json_to)
    return 0 if good else 1


def _progress() -> Any:
    from loadtest.__main__ import Progress

    return Progress()


@click.command()
@click.option("--minutes", default=15.0, show_default=True, type=click.FloatRange(0.05, 24 * 60))
@click.option("--streams", default=200, show_default=True, type=click.IntRange(1, 5000))
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 64))
@_SEED
@_JSON
def chaos(minutes: float, streams: int, workers: int, seed: str, json_to: str | None) -> int:
    """Break the link to the upstream in every way, under load; afterwards all accounts must agree and nothing leak."""
    from loadtest.trials.chaos import chaos as run

    progress = _progress()
    result = run(minutes, streams, seed, progress, workers)
    progress.end()
    return _done(result, json_to)


@click.command(hidden=True)
@click.option("--upstream", required=True, metavar="HOST:PORT")
@click.option("--seed", required=True)
@click.option("--book", required=True, type=click.Path(path_type=Path))
@click.option("--calm", type=float, help="The weight of exchanges without a fault.")
def link(upstream: str, seed: str, book: Path, calm: float | None) -> int:
    """Be the link that breaks."""
    from loadtest.trials.proxy import FaultProxy, serve

    host, _, port = upstream.rpartition(":")
    with book.open("w") as file:
        trio.run(serve, FaultProxy((host, int(port)), seed, file, calm))
    return 0


@click.command()
@click.option("--attackers", default=1000, show_default=True, type=click.IntRange(1, 20_000))
@click.option("--streams", default=200, show_default=True, type=click.IntRange(1, 5000))
@click.option("--window", default=10.0, show_default=True, type=click.FloatRange(0.5, 600), help="Seconds.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 50))
@click.option("--deadline", default=5.0, show_default=True, type=click.FloatRange(0.2, 600), help="For a head.")
@_JSON
def attack(attackers: int, streams: int, window: float, rounds: int, deadline: float, json_to: str | None) -> int:
    """Slow heads against the streams of others: events must go on as before, attackers must be gone in time."""
    from loadtest.trials.attack import attack as run

    progress = _progress()
    result = run(attackers, streams, window, rounds, deadline, progress)
    progress.end()
    return _done(result, json_to)


@click.command(hidden=True)
@click.option("--port", required=True, type=int)
@click.option("--count", required=True, type=int)
@click.option("--seconds", required=True, type=float)
@click.option("--grace", required=True, type=float)
def slowheads(port: int, count: int, seconds: float, grace: float) -> int:
    """Be the attackers."""
    from loadtest.trials.slowheads import attack as run

    run(("127.0.0.1", port), count, seconds, grace)
    return 0


@click.command()
@click.option("--times", default=100, show_default=True, type=click.IntRange(1, 10_000), help="Kills of each.")
@click.option("--streams", default=100, show_default=True, type=click.IntRange(1, 5000))
@click.option("--workers", default=4, show_default=True, type=click.IntRange(2, 64))
@click.option("--only", default="upstream,worker,client", show_default=True, help="Whom.")
@_SEED
@_JSON
def kill(times: int, streams: int, workers: int, only: str, seed: str, json_to: str | None) -> int:
    """SIGKILL the upstream, workers and clients at random moments under load."""
    from loadtest.__main__ import some_of
    from loadtest.trials.kill import VICTIMS
    from loadtest.trials.kill import kill as run

    victims = tuple(some_of(only, VICTIMS, "--only"))
    progress = _progress()
    result = run(times, streams, workers, victims, seed, progress)
    progress.end()
    return _done(result, json_to)


@click.command()
@click.option("--reloads", default=50, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--streams", default=500, show_default=True, type=click.IntRange(1, 5000))
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1, 64))
@_SEED
@_JSON
def reload(reloads: int, streams: int, workers: int, seed: str, json_to: str | None) -> int:
    """Reload again and again under load: nobody may notice."""
    from loadtest.trials.reload import reload as run

    progress = _progress()
    result = run(reloads, streams, workers, seed, progress)
    progress.end()
    return _done(result, json_to)


@click.command()
@click.option("--only", default="rate,kills,away,splits", show_default=True, help="Which parts.")
@click.option("--rate", default=1000, show_default=True, type=click.IntRange(10, 100_000), help="Exchanges per second.")
@click.option("--seconds", default=20, show_default=True, type=click.IntRange(1, 3600), help="At that rate.")
@click.option("--kills", default=50, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--times", default=10, show_default=True, type=click.IntRange(1, 1000), help="The store is away.")
@click.option("--away", default=30.0, show_default=True, type=click.FloatRange(0.1, 3600), help="Seconds of each.")
@_JSON
def ledger(only: str, rate: int, seconds: int, kills: int, times: int, away: float, json_to: str | None) -> int:
    """One row for each admitted exchange: at a rate, under SIGKILL, with the store away; usage at every cut."""
    from loadtest.__main__ import some_of
    from loadtest.trials.ledger import PARTS
    from loadtest.trials.ledger import ledger as run

    parts = tuple(some_of(only, PARTS, "--only"))
    progress = _progress()
    result = run(parts, rate, seconds, kills, times, away, progress)
    progress.end()
    return _done(result, json_to)


COMMANDS = (chaos, attack, kill, ledger, reload, link, slowheads)
