"""SIGKILL at random moments under load: of the upstream, of a worker, of a client.

Whatever dies, the others must be served on: nobody waits longer than the deadlines say, nobody is told that a message
is complete which is not, and afterwards nothing is left of the dead.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, final

import trio

from loadtest.behaviour import Behaviour
from loadtest.processes import free_port, upstream_process
from loadtest.promises.kit import Verdict
from loadtest.safety import Target, target_of
from loadtest.trials.books import agree
from loadtest.trials.customers import Customers, Habits, Visit
from loadtest.trials.gateway import DEADLINES, State, Trial, compared, trial
from loadtest.trials.load import lasting, load

__all__ = ["VICTIMS", "kill"]

VICTIMS = ("upstream", "worker", "client")
PAUSE = (0.05, 1.0)  # seconds between two kills
HABITS = Habits(leavers=0.05, slow=0.02, tokens=(5, 40), interval=(0.02, 0.1), pause=0.5)
CALM = Habits(leavers=0, slow=0, tokens=(3, 10), interval=(0.02, 0.05), kept=0.0)
# Seconds that an exchange may last beyond its own length: every deadline once, and a machine that is busy.
BEYOND = sum(DEADLINES[name] for name in ("lease", "connect", "first_byte", "upstream_idle", "body_idle")) + 10
_CLIENT = """
import socket, sys
address, idents = (sys.argv[1], int(sys.argv[2])), sys.argv[3].split(",")
socks = []
for ident in idents:
    body = ('{"model":"m","user":"lt-%s;tokens=2000;interval=0.05","stream":true}' % ident).encode()
    sock = socket.create_connection(address)
    sock.sendall(b"POST /v1/chat/completions HTTP/1.1\\r\\nHost: x\\r\\nX-Request-Id: %b\\r\\n"
                 b"Content-Length: %d\\r\\n\\r\\n%b" % (ident.encode(), len(body), body))
    socks.append(sock)
print("asked", flush=True)
while True:
    for sock in socks:
        sock.recv(1000)
"""


@final
class Upstream:
    """An upstream that is killed and started again on the same port."""

    def __init__(self) -> None:
        self.port = free_port()
        self._stack = ExitStack()

    def start(self) -> None:
        """Until it listens. Blocks."""
        options = ("--listen", f"127.0.0.1:{self.port}")
        self._process = self._stack.enter_context(upstream_process(options=options)).process

    def kill(self) -> None:
        """Now."""
        assert self._process is not None
        self._process.popen.kill()
        self._stack.close()

    def close(self) -> None:
        """End it."""
        self._stack.close()


class Killer:
    """What the three have in common: `kill` one at a random moment, so many times."""

    def __init__(self, gateway: Trial, upstream: Upstream, target: Target, seed: str) -> None:
        self.gateway = gateway
        self.upstream = upstream
        self.target = target
        self.chance = random.Random(seed)
        self.seed = seed
        self.killed = 0
        self.victims: list[Visit] = []  # clients that died with a request of theirs

    async def run(self, victim: str, times: int) -> None:
        """Kill."""
        one: Callable[[], Awaitable[None]] = getattr(self, f"_{victim}")
        await trio.sleep(1.0)
        for _ in range(times):
            await one()
            self.killed += 1
            await trio.sleep(self.chance.uniform(*PAUSE))

    async def _upstream(self) -> None:
        await trio.to_thread.run_sync(self.upstream.kill)
        await trio.sleep(self.chance.choice((0.0, self.chance.uniform(0, 0.5))))
        await trio.to_thread.run_sync(self.upstream.start)

    async def _worker(self) -> None:
        """One of at least two that accept; a dead one is started again with a back-off."""
        with trio.fail_after(60):
            while await trio.to_thread.run_sync(self._accepting) < 2:  # noqa: ASYNC110  # they have to be asked
                await trio.sleep(0.1)
            os.kill(self.chance.choice(self.gateway.workers()), signal.SIGKILL)

    def _accepting(self) -> float:
        return self.gateway.metrics().get("canal_workers", 0)

    async def _client(self) -> None:
        idents = [f"victim-{self.seed}-{self.killed}-{number}" for number in range(3)]
        argv = [sys.executable, "-S", "-c", _CLIENT, self.target.address, str(self.target.port), ",".join(idents)]
        run = partial(trio.run_process, argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(run)
            assert process.stdout is not None
            if self.chance.random() < 0.8:  # else it may die before it has asked
                await process.stdout.receive_some()
                await trio.sleep(self.chance.uniform(0, 0.5))
            process.kill()
        self.victims += [Visit(ident, "victim", Behaviour(), "left") for ident in idents]


def kill(
    times: int,
    streams: int,
    workers: int,
    victims: tuple[str, ...],
    seed: str,
    say: Callable[[str], None],
    deadlines: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The trial: one victim after the other, `times` each."""
    began = time.monotonic()
    verdicts: list[Verdict] = []
    outcomes: dict[str, dict[str, int]] = {}
    upstream = Upstream()
    upstream.start()
    try:
        with trial(upstream.port, say, workers=workers, deadlines=deadlines) as gateway:
            target = target_of(gateway.gateway.url)
            _calm(target, "warm", say)
            before = gateway.quiet()
            for victim in victims:
                killer = Killer(gateway, upstream, target, f"{seed}.{victim}")
                customers = Customers(target, HABITS, f"{seed}.{victim}")
                during = _during(killer, victim, times)
                load(customers, streams, during, partial(_tell, say, victim, killer))
                with suppress(TimeoutError):
                    _wait_for_workers(gateway, workers)
                later = _calm(target, f"{seed}.{victim}.later", say)  # before the look: a new worker has served, too
                after = gateway.quiet()
                outcomes[victim] = dict(customers.outcomes.most_common())
                verdicts += _verdicts(victim, killer, customers.visits, later, gateway, compared(before, after))
                before = _remembered(before, after)
    finally:
        upstream.close()
    return {
        "kind": "kill", "kills": times, "streams": streams, "workers": workers,
        "seconds": round(time.monotonic() - began, 1), "outcomes": outcomes, "verdicts": verdicts,
    }  # fmt: skip


def _tell(say: Callable[[str], None], victim: str, killer: Killer, text: str) -> None:
    say(f"{victim} {killer.killed}: {text}")


def _during(killer: Killer, victim: str, times: int) -> Callable[[], Awaitable[None]]:
    return lambda: killer.run(victim, times)


def _calm(target: Target, seed: str, say: Callable[[str], None]) -> list[Visit]:
    """Enough clients for every worker to get some: what a worker makes for its first one is no leak."""
    customers = Customers(target, CALM, seed)
    load(customers, 40, lasting(1.0), say)
    return customers.visits


def _wait_for_workers(gateway: Trial, count: int) -> None:
    """All of them, the back-off of the last one included."""
    end = time.monotonic() + 30
    while gateway.metrics().get("canal_workers", count) < count:
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.2)


def _remembered(before: State, after: State) -> State:
    """What the next victim's aftermath is held against: a leak is told once."""
    return after if not after.busy else before


def _verdicts(
    victim: str, killer: Killer, visits: list[Visit], later: list[Visit], gateway: Trial, leaks: dict[str, Any]
) -> list[Verdict]:
    name = f"{killer.killed} x {victim}"
    mine = {visit.ident for visit in [*visits, *killer.victims]}
    records = [record for record in gateway.records() if record["request_id"] in mine]
    faults = agree([*visits, *killer.victims], records)
    if victim == "worker":
        faults["no record"] = []  # what a dead worker would have written is lost with it
    late = [visit for visit in visits if visit.seconds > visit.behaviour.lasting * 1.3 + BEYOND]
    dishonest, hung = faults.pop("dishonest"), faults.pop("hung")
    wrong = [text for found in faults.values() for text in found]
    failed = Counter(visit.outcome for visit in later if visit.outcome not in ("complete", "left"))
    return [
        Verdict(name, "hangs past a deadline", str(len(hung) + len(late)), "0", not hung and not late,
                "; ".join(hung + [f"{one.ident}: {one.outcome} after {one.seconds:.1f} s" for one in late])[:500]),
        Verdict(name, "dishonest endings", str(len(dishonest)), "0", not dishonest, "; ".join(dishonest[:3])[:2000]),
        Verdict(name, "accounts that do not agree", str(len(wrong)), "0", not wrong, "; ".join(wrong[:3])[:2000]),
        Verdict(name, "leaks", ", ".join(leaks["leaked"]) or "none", "none", not leaks["leaked"], str(leaks["after"])),
        Verdict(name, "requests that fail afterwards", str(sum(failed.values())), "0", not failed,
                f"of {len(later)}; {dict(failed) or ''}"),
    ]  # fmt: skip
