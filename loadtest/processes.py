"""Starts programs, watches them from outside (/proc), and ends what it started, by pid.

Invariants: every process started here is the leader of its own group and is ended (TERM, then KILL after a deadline)
when its block is left, whatever happened; CPU and memory are those of the whole tree of descendants.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.behaviour import Behaviour

__all__ = [
    "NotStarted", "Process", "UpstreamProcess", "asked_at", "busy_seconds", "cores", "cpu_seconds", "descendants",
    "free_port", "get", "pinned", "resident", "started", "upstream_process", "wait_for_port",
]  # fmt: skip

TICK = os.sysconf("SC_CLK_TCK")
ROOT = Path(__file__).resolve().parent.parent
_LOWEST_PORT = 10_000  # below are those of well-known services
_GIVEN: set[int] = set()  # by `free_port`, in this process
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whoever runs us may have a proxy configured


class NotStarted(Exception):
    """A program did not come up; the text says which and why."""


@dataclass(slots=True)
class Process:
    """A running program and the file that holds what it says."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """Of the leader."""
        return self.popen.pid

    def said(self) -> str:
        """Everything so far, both streams."""
        return self.log.read_text(errors="replace")

    def saying(self, pattern: str, seconds: float = 20) -> re.Match[str]:
        """Wait until it has said `pattern`; raises `NotStarted`."""
        end = time.monotonic() + seconds
        while True:
            if found := re.search(pattern, self.said(), re.MULTILINE):
                return found
            if self.popen.poll() is not None or time.monotonic() > end:
                state = "it ended" if self.popen.poll() is not None else f"{seconds:g} s passed"
                raise NotStarted(f"{self.name}: {state} without {pattern!r}; its last words: {self.said()[-400:]!r}")
            time.sleep(0.01)

    def cpu(self) -> float:
        """User and system seconds of the whole tree."""
        return cpu_seconds(self.pid)

    def memory(self) -> int:
        """Resident bytes of the whole tree."""
        return resident(self.pid)

    def stop(self, seconds: float = 5) -> int:
        """End it and its group; its exit code."""
        if self.popen.poll() is None:
            _signal_group(self.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.popen.wait(seconds)
        _signal_group(self.pid, signal.SIGKILL)
        return self.popen.wait(10)


def _signal_group(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, number)


@contextmanager
def started(
    name: str,
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    environ: Mapping[str, str] | None = None,
    core: int | None = None,
) -> Iterator[Process]:
    """A process for the length of the block, on one core if told, with its output in a temporary file."""
    with tempfile.TemporaryDirectory(prefix="loadtest-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out, pinned(core):
            try:
                popen = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    cwd=cwd or folder,
                    env={**os.environ, **(environ or {})},
                    process_group=0,
                )
            except OSError as exc:
                raise NotStarted(f"{name}: {exc}") from exc
        process = Process(name, popen, log)
        try:
            yield process
        finally:
            process.stop()


@contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """We run on this core for the length of the block; what is started meanwhile inherits it."""
    mine = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def cores() -> list[int]:
    """The cores we may use."""
    return sorted(os.sched_getaffinity(0))


def descendants(pid: int) -> list[int]:
    """`pid` and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (stat := _stat(int(entry.name))):
            children.setdefault(int(stat[1]), []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        waiting += children.get(found[-1], [])
    return found


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on, or None if it has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def cpu_seconds(pid: int) -> float:
    """User and system time of `pid`, its descendants, and those descendants that were waited for."""
    ticks = 0
    for one in descendants(pid):
        if stat := _stat(one):
            ticks += int(stat[11]) + int(stat[12]) + int(stat[13]) + int(stat[14])
    return ticks / TICK


def busy_seconds() -> float:
    """What all cores of this machine have worked, whoever it was for, stolen time included."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICK


def resident(pid: int) -> int:
    """Resident bytes of `pid` and its descendants."""
    pages = 0
    for one in descendants(pid):
        if stat := _stat(one):
            pages += int(stat[21])
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    """A loopback port that nobody listens on, for a program to listen on later; never one that was given before.

    From below those that the kernel gives away by itself (`ip_local_port_range`), where it leaves any: who asks for
    "any port", and each client's own end, could otherwise get this one before the program it is meant for. Raises
    `OSError`.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = range(_LOWEST_PORT, first) or range(_LOWEST_PORT, 65_536)
    candidates = [port for port in ports if port not in _GIVEN]
    for port in random.sample(candidates, min(100, len(candidates))):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            _GIVEN.add(port)
            return port
    raise OSError(f"no free port on 127.0.0.1 among 100 of {ports.start}..{ports.stop - 1}")


def wait_for_port(process: Process, port: int, seconds: float = 60) -> None:
    """Wait until `process` accepts on `port`; raises `NotStarted`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.popen.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise NotStarted(f"{process.name}: never accepted on port {port}; its last words: {process.said()[-400:]!r}")


def get(url: str, seconds: float = 10) -> bytes:
    """The body of a GET; raises `OSError`."""
    with _OPENER.open(url, timeout=seconds) as response:
        return bytes(response.read())


@dataclass(slots=True)
class UpstreamProcess:
    """Our upstream in a process of its own."""

    process: Process | None  # None: somebody else's
    host: str
    port: int

    @property
    def url(self) -> str:
        """Its root."""
        return f"http://{self.host}:{self.port}"

    def report(self) -> dict[str, Any]:
        """What it has counted."""
        return dict(json.loads(get(f"{self.url}/_loadtest/report")))

    def reset(self) -> None:
        """Count anew."""
        get(f"{self.url}/_loadtest/reset")


@contextmanager
def upstream_process(
    default: Behaviour | None = None, *, core: int | None = None, options: Sequence[str] = ()
) -> Iterator[UpstreamProcess]:
    """`python -m loadtest upstream` for the length of the block."""
    argv = [sys.executable, "-m", "loadtest", "upstream", "--listen", "127.0.0.1:0", *options]
    if default is not None:
        argv += ["--behaviour", default.encode().partition(";")[2]]
    with started("upstream", argv, cwd=ROOT, core=core) as process:
        found = process.saying(r"^listening on http://(\S+):(\d+)$")
        yield UpstreamProcess(process, found[1], int(found[2]))


def asked_at(url: str) -> UpstreamProcess:
    """An upstream of ours that somebody else started."""
    parts = urllib.parse.urlsplit(url)
    return UpstreamProcess(None, parts.hostname or "127.0.0.1", parts.port or 80)
