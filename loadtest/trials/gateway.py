"""A gateway of ours under trial: started with short deadlines, looked at from outside.

What is looked at: its records (the access log as JSON), its metrics, and what the kernel says of its processes
(descriptors, resident memory). Invariant: nothing here is asked of the gateway more than a few times per second.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadtest.peers import Gateway, running
from loadtest.processes import descendants, get, resident

__all__ = ["DEADLINES", "QUICK", "State", "Trial", "compared", "tables", "trial"]

# Short, so that a trial meets all of them. Seconds.
DEADLINES = {
    "first_byte": 4.0, "upstream_idle": 3.0, "connect": 2.0, "lease": 5.0, "upstream_keep_alive": 2.0,
    "body_idle": 5.0, "client_write": 10.0, "drain": 10.0, "keep_alive": 20.0,
}  # fmt: skip
# For a slice of a trial in the tests.
QUICK = {"first_byte": 1.5, "upstream_idle": 1.0, "upstream_keep_alive": 0.3, "body_idle": 1.5, "drain": 3.0}
IDLE_GAUGES = ("canal_exchanges_in_flight", "canal_connections", "canal_pool_used", "canal_pool_waiters",
               "canal_pool_idle", "canal_held_bytes")  # fmt: skip
_SAMPLE = re.compile(r"^(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class State:
    """What it holds at one moment, all of its processes together."""

    descriptors: int
    memory: int  # bytes
    tasks: int  # Trio's
    busy: dict[str, float]  # the gauges that are 0 when nobody is served, where they are not


@dataclass(slots=True)
class Trial:
    """A running gateway."""

    gateway: Gateway
    say: Callable[[str], None]

    @property
    def pid(self) -> int:
        """Its process, or the parent of its workers."""
        assert self.gateway.process is not None
        return self.gateway.process.pid

    @property
    def config(self) -> Path:
        """Its configuration file."""
        assert self.gateway.process is not None
        arguments = [str(one) for one in self.gateway.process.popen.args]  # type: ignore[union-attr]
        return Path(arguments[arguments.index("--config") + 1])

    def workers(self) -> list[int]:
        """The processes of its workers."""
        return [pid for pid in descendants(self.pid) if pid != self.pid]

    def metrics(self) -> dict[str, float]:
        """Every sample, summed over its labels."""
        found: dict[str, float] = {}
        for name, value in _SAMPLE.findall(get(f"{self.gateway.admin}/metrics").decode()):
            found[name] = found.get(name, 0.0) + float(value)
        return found

    def state(self) -> State:
        """Now."""
        descriptors = sum(map(_descriptors, descendants(self.pid)))  # before the question, whose connection is one, too
        metrics = self.metrics()
        return State(
            descriptors,
            resident(self.pid),
            int(metrics.get("canal_tasks", 0)),
            {name: metrics[name] for name in IDLE_GAUGES if metrics.get(name)},
        )

    def quiet(self, seconds: float = 30.0) -> State:
        """The state once nobody is served and no upstream connection is kept; as it is then, if that takes too long."""
        end = time.monotonic() + seconds
        last = self.state()
        while time.monotonic() < end:
            time.sleep(0.5)
            now = self.state()
            if not now.busy and (now.descriptors, now.tasks) == (last.descriptors, last.tasks):
                return now
            last = now
        return last

    def records(self) -> Iterator[dict[str, Any]]:
        """What its access log says."""
        assert self.gateway.process is not None
        with self.gateway.process.log.open(encoding="utf-8", errors="replace") as log:
            for line in log:
                if line.startswith("{") and '"kind":"exchange"' in line:
                    yield json.loads(line)

    def complaints(self) -> list[str]:
        """Lines of its log that are no access lines and speak of errors, tracebacks included."""
        return [line for line in self.log_lines() if '"level":"error"' in line or not line.startswith("{")]

    def log_lines(self) -> list[str]:
        """Its log without the access lines and the greeting's last."""
        assert self.gateway.process is not None
        with self.gateway.process.log.open(encoding="utf-8", errors="replace") as log:
            return [line.strip() for line in log if '"kind":"exchange"' not in line and line[:9] != "listening"]


def _descriptors(pid: int) -> int:
    try:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return 0


def tables(deadlines: Mapping[str, float], more: str = "") -> str:
    """The end of a configuration file."""
    lines = "".join(f"{name} = {value}\n" for name, value in deadlines.items())
    return f"\n[deadlines]\n{lines}{more}"


@contextmanager
def trial(
    upstream_port: int,
    say: Callable[[str], None],
    *,
    workers: int = 1,
    deadlines: Mapping[str, float] | None = None,
    arguments: Sequence[str] = (),
) -> Iterator[Trial]:
    """The gateway for the length of the block, with its records as JSON."""
    flags = ["--log", "json", "--workers", str(workers), *arguments]
    with running("canal", upstream_port, extra=tables({**DEADLINES, **(deadlines or {})}), arguments=flags) as gateway:
        assert gateway.process is not None
        gateway.process.saying(r"^listening on ", 60)
        yield Trial(gateway, say)


def compared(before: State, after: State) -> dict[str, Any]:
    """Both, and what of the second is too much."""
    leaked = [f"{name} {value:g}" for name, value in after.busy.items()]
    for name in ("descriptors", "tasks"):
        more = getattr(after, name) - getattr(before, name)
        leaked += [f"{more} {name}"] if more > 0 else []
    grown = after.memory / before.memory - 1 if before.memory else 0.0
    return {"before": asdict(before), "after": asdict(after), "grown": grown, "leaked": leaked}
