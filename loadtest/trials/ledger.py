"""The ledger's promises: no stall at a thousand exchanges a second, and one row for each admitted request.

Four parts. *rate*: a loop with a ledger at work, second by second beside the same loop without one. *kills*: SIGKILL of
a gateway under load. *away*: the store locked by somebody else, again and again. *splits*: every recorded answer of
`tests/cases/usage`, cut in two at every byte. The first and the last look at the insides of `canal_trio`: what they
judge is not to be seen from outside.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, final

import trio

from canal_trio.errors import Failure, Phase
from canal_trio.hooks import Admitted, ExchangeRecord, Outcome, Usage, UsageSource
from canal_trio.observe.ledger import Ledger
from canal_trio.settings import Ledger as LedgerSettings
from canal_trio.testing.scripts import Pause, Script, chat_stream
from canal_trio.testing.upstreams import ScriptedUpstream
from canal_trio.wire.usage import BodyUsage, StreamUsage
from loadtest.processes import free_port
from loadtest.promises.kit import Verdict

__all__ = ["PARTS", "ledger"]

PARTS = ("rate", "kills", "away", "splits")
STALL = 0.010  # seconds
CASES = Path(__file__).parent.parent.parent / "tests" / "cases" / "usage"
BODY = json.dumps({"model": "m", "stream": True, "messages": []}).encode()
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
)
Say = Callable[[str], None]


def ledger(
    parts: tuple[str, ...], rate: int, seconds: int, kills: int, times: int, away: float, say: Say
) -> dict[str, Any]:
    """The trial: these parts of it."""
    began = time.monotonic()
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory(prefix="canal-ledger-") as folder:
        if "rate" in parts:
            verdicts += trio.run(_rate, Path(folder), rate, seconds, say)
        if "kills" in parts:
            verdicts += trio.run(_kills, Path(folder), kills, say)
        if "away" in parts:
            verdicts += trio.run(_away, Path(folder), times, away, say)
    if "splits" in parts:
        verdicts += _splits(say)
    return {"kind": "ledger", "seconds": round(time.monotonic() - began, 1), "verdicts": verdicts}


def _rows(file: Path) -> Counter[str]:
    """How many rows have which outcome."""
    connection = sqlite3.connect(file, timeout=60)
    try:
        return Counter(dict(connection.execute("SELECT outcome, count(*) FROM exchanges GROUP BY outcome")))
    finally:
        connection.close()


# -- rate --------------------------------------------------------------------------------------------------------------


@final
class _Late:
    """How late a tick of a millisecond was, in seconds with the ledger and in those without."""

    def __init__(self) -> None:
        self.late: dict[bool, list[float]] = {True: [], False: []}
        self.booking = False

    async def tick(self) -> None:
        """Until cancelled."""
        due = trio.current_time()
        while True:
            due = max(due + 0.001, trio.current_time())
            await trio.sleep_until(due)
            self.late[self.booking].append(trio.current_time() - due)


async def _rate(folder: Path, rate: int, seconds: int, say: Say) -> list[Verdict]:
    settings = LedgerSettings(file=str(folder / "rate.db"), journal=str(folder / "rate"), instance="trial")
    book, watch, count, longest = Ledger(settings), _Late(), 0, 0.0
    async with trio.open_nursery() as nursery:
        await nursery.start(book.run)
        nursery.start_soon(watch.tick)
        due = trio.current_time()
        turn = math.gcd(seconds, 5)  # seconds without it and seconds with it, by turns
        for second in range(2 * seconds):
            books = second // turn % 2 == 1
            say(f"rate: {second // 2} of {seconds} s, {count} exchanges")
            open_now: list[int] = []
            for number in range(rate // 10):  # ten at once, a hundred times a second, as a loop under load does
                due += 10 / rate
                watch.booking = books or book.statistics().backlog > 0  # the thread comes later, and is a part of it
                for _ in range(10):
                    if books:
                        began = time.perf_counter()
                        (entry,) = book.admitted([_admitted(number)])
                        longest = max(longest, time.perf_counter() - began)
                        assert not isinstance(entry, Failure)
                        open_now.append(entry)
                while len(open_now) > 50 or (open_now and not books):
                    book.ended([(open_now.pop(0), _record(number))])
                    count += 1
                await trio.sleep_until(due)
            for entry in open_now:
                book.ended([(entry, _record(0))])
                count += 1
        await book.finish(30)
        nursery.cancel_scope.cancel()
    with_it, without = (sorted(watch.late[booking]) for booking in (True, False))
    many = [sum(late > STALL for late in lates) for lates in (with_it, without)]
    noise = "the machine stalls by itself; " if many[1] else ""
    rows = _rows(folder / "rate.db").total()
    shown = " · ".join(f"{name} {_ms(lates[int(len(lates) * 0.999)])} / {_ms(lates[-1])}"
                       for name, lates in (("with", with_it), ("without", without)))  # fmt: skip
    return [
        Verdict("no stall", f"ticks late by more than 10 ms at {rate}/s, with the ledger · without",
                f"{many[0]} · {many[1]}", "no more with it", None if min(many) else not many[0],
                f"{noise}p99.9 / worst: {shown}; longest admission {_ms(longest)}"),
        Verdict("one row each", "rows of admitted exchanges", f"{rows} of {count}", "all", rows == count),
    ]  # fmt: skip


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"


def _admitted(number: int) -> Admitted:
    return Admitted(f"req_{number}", time.time(), "/v1/chat/completions", "team", "team-1", "gpt-4o-mini", "local")


def _record(number: int) -> ExchangeRecord:
    return ExchangeRecord(
        f"req_{number}", time.time(), "10.0.0.1", "POST", "/v1/chat/completions", Outcome.COMPLETED, Phase.DELIVER,
        200, None, "team", model="gpt-4o-mini", upstream="local", attempts=1, streamed=True, events=20, duration=1.0,
        usage=Usage(10, 20), usage_source=UsageSource.UPSTREAM,
    )  # fmt: skip


# -- a gateway in a process --------------------------------------------------------------------------------------------


@final
class _Gateway:
    """`canal-trio serve` with a ledger, in front of `upstream`; killed and started again on the same port."""

    def __init__(self, folder: Path, name: str, upstream: ScriptedUpstream) -> None:
        self.file = folder / f"{name}.db"
        self.journal = folder / f"{name}.db.journal"
        self._port = free_port()
        self._config = folder / f"{name}.toml"
        self._config.write_text(
            f'[server]\nlisten = ["127.0.0.1:{self._port}"]\nadmin = "off"\n'
            f'[ledger]\nfile = "{self.file.name}"\ninstance = "trial"\n'
            f'[[upstream]]\nname = "up"\nbase_url = "{upstream.base_url}"\n'
        )
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Until it listens."""
        command = [sys.executable, "-m", "canal_trio", "serve", "--config", str(self._config)]
        popen = partial(subprocess.Popen, command, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        self._process = await trio.to_thread.run_sync(popen)
        with trio.fail_after(60):
            while True:
                with suppress(OSError):
                    (await trio.open_tcp_stream("127.0.0.1", self._port)).socket.close()
                    return
                await trio.sleep(0.05)

    async def end(self, number: signal.Signals) -> None:
        """Send it a signal and wait for its end."""
        assert self._process is not None
        self._process.send_signal(number)
        await trio.to_thread.run_sync(self._process.wait)
        self._process = None

    async def caught_up(self) -> None:
        """Until no journal of a dead process is left."""
        with trio.move_on_after(60):
            while len(os.listdir(self.journal)) > 1:  # noqa: ASYNC110  # another process's work
                await trio.sleep(0.05)

    async def ask(self) -> int:
        """One request; the status of its answer, 0 if it was not answered whole."""
        data = b""
        with suppress(OSError, trio.BrokenResourceError):
            async with await trio.open_tcp_stream("127.0.0.1", self._port) as stream:
                await stream.send_all(REQUEST)
                async for piece in stream:
                    data += piece
        whole = data.endswith(b"\r\n0\r\n\r\n") or b"content-length" in data.lower()
        return int(data[9:12]) if data and whole else 0


def _upstream() -> ScriptedUpstream:
    whole = chat_stream(3)
    return ScriptedUpstream(Script((*whole.steps[:2], Pause(0.02), *whole.steps[2:])))


async def _kills(folder: Path, kills: int, say: Say) -> list[Verdict]:
    chance, clients = random.Random(1), 16
    async with _upstream() as upstream:
        gateway = _Gateway(folder, "kills", upstream)
        for number in range(kills):
            say(f"kills: {number} of {kills}, {len(upstream.requests)} requests")
            await gateway.start()
            async with trio.open_nursery() as nursery:
                for _ in range(clients):
                    nursery.start_soon(_again_and_again, gateway)
                await trio.sleep(chance.uniform(0.2, 1.0))
                await gateway.end(signal.SIGKILL)
                nursery.cancel_scope.cancel()
        await gateway.start()
        await gateway.caught_up()
        await gateway.end(signal.SIGTERM)
        seen = {request.header("x-request-id") for request in upstream.requests}
    connection = sqlite3.connect(gateway.file)
    rows = Counter(row[0] for row in connection.execute("SELECT request_id FROM exchanges"))
    connection.close()
    outcomes = _rows(gateway.file)
    missing, twice = len(seen - set(rows)), sum(count > 1 for count in rows.values())
    good = not missing and not twice and not outcomes["open"] and not os.listdir(gateway.journal)
    return [
        Verdict("one row each", f"{kills} x SIGKILL under load: requests that the upstream saw without a row, with two",
                f"{missing}, {twice} of {len(seen)}", "0, 0", good, f"rows: {dict(outcomes)}")
    ]  # fmt: skip


async def _again_and_again(gateway: _Gateway) -> None:
    while True:
        await gateway.ask()
        await trio.lowlevel.checkpoint()


async def _away(folder: Path, times: int, seconds: float, say: Say) -> list[Verdict]:
    answered: Counter[int] = Counter()
    async with _upstream() as upstream:
        gateway = _Gateway(folder, "away", upstream)
        await gateway.start()

        async def client() -> None:
            while True:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 30):
                    answered[await gateway.ask()] += 1
                await trio.sleep(0.1)

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(client)
            await trio.sleep(2)
            for number in range(times):
                say(f"away: {number} of {times}, {answered.total()} requests")
                other = sqlite3.connect(gateway.file, isolation_level=None, timeout=60)
                other.execute("BEGIN EXCLUSIVE")
                await trio.sleep(seconds)
                other.execute("ROLLBACK")
                other.close()
                await trio.sleep(3)
            nursery.cancel_scope.cancel()
        await gateway.end(signal.SIGTERM)
        count = len(upstream.requests)
    outcomes = _rows(gateway.file)
    good = outcomes.total() == count == answered[200] and set(answered) == {200}
    return [
        Verdict("one row each", f"store away {times} x {seconds:g} s: rows of admitted requests",
                f"{outcomes.total()} of {count}", "all", good, f"answers: {dict(answered)}, rows: {dict(outcomes)}")
    ]  # fmt: skip


# -- splits ------------------------------------------------------------------------------------------------------------


def _splits(say: Say) -> list[Verdict]:
    expected = json.loads((CASES / "expected.json").read_text())
    tried = wrong = 0
    for name, case in expected.items():
        say(f"splits: {name}")
        data = (CASES / name).read_bytes()
        usage = None if case["usage"] is None else Usage(**case["usage"])
        for cut in range(len(data) + 1):
            tap = StreamUsage() if name.endswith(".sse") else BodyUsage()
            tap.feed(data[:cut])
            tap.feed(data[cut:])
            tried += 1
            wrong += tap.usage != usage
    what = f"usage of {len(expected)} recordings, cut in two at every byte"
    return [Verdict("usage", what, f"{wrong} of {tried} wrong", "0", wrong == 0)]
