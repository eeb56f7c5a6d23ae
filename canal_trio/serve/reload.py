"""SIGHUP: read the configuration again, in a thread, and have it applied; a bad one changes nothing.

Invariants: one reload at a time, and a signal that comes meanwhile leads to another one, so that the last state of the
file counts. What a running process cannot change keeps its old value, and that is told.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar, final

import trio

from canal_trio.errors import ConfigError
from canal_trio.observe.log import describe
from canal_trio.serve.systemd import Notifier
from canal_trio.settings import Settings

__all__ = ["Reloader", "in_a_thread"]

# What a running process cannot change: it needs new sockets or another process.
_NEEDS_RESTART = ("listen", "admin", "workers")

_SWITCH = 0.0005  # seconds

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger("canal_trio.serve")


async def in_a_thread(job: Callable[P, T], *arguments: P.args, **_none: P.kwargs) -> T:
    """What `job` returns, after long work that must not hold up the loop. Cancelled, the thread ends by itself.

    A thread keeps the interpreter's lock for an interval at a time, and the loop gives it away with each system call:
    at Python's 5 ms a burst of events would take seconds. So it is made short meanwhile. The garbage collector would
    hold everything up while it looks through what is made here, which is no garbage: it rests, and is spared the sight.
    """
    before, collects = sys.getswitchinterval(), gc.isenabled()
    sys.setswitchinterval(_SWITCH)
    gc.disable()
    try:
        return await trio.to_thread.run_sync(job, *arguments, abandon_on_cancel=True)
    finally:
        sys.setswitchinterval(before)
        if collects:
            gc.freeze()
            gc.enable()


@final
class Reloader:
    """Loads with `load` (in a thread; None: it is never asked to) and applies with `apply`.

    `apply` raises `ConfigError` if it cannot, having changed nothing. `count(result)` gets `ok` or `refused`, `stopped`
    says that the end has begun, and `settings` are those in use. `notifier` hears when it begins and how it ended.
    """

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], Settings] | None,
        apply: Callable[[Settings], Awaitable[None]],
        count: Callable[[str], None],
        stopped: Callable[[], bool],
        notifier: Notifier,
    ) -> None:
        self.settings = settings
        self._load = load
        self._apply = apply
        self._count = count
        self._stopped = stopped
        self._notifier = notifier
        self._result = ""  # of the last one, for people
        self._running = False
        self._again = False

    def begin(self, nursery: trio.Nursery) -> None:
        """Reload, in a task of `nursery`."""
        if self._running:
            self._again = True
        else:
            self._running = True
            if not self._stopped():
                self._notifier.reloading()
            nursery.start_soon(self._run)

    async def _run(self) -> None:
        while True:
            self._again = False
            try:
                await self._once()
            except ConfigError as exc:
                self._refuse(str(exc))
            except Exception as exc:
                self._refuse(describe(exc))
            if not self._again:
                self._running = False
                if not self._stopped():
                    self._notifier.ready(self._result)
                return

    async def _once(self) -> None:
        if self._load is None or self._stopped():
            _log.warning("not reloaded: draining")
            return
        new = await in_a_thread(self._load)
        old = self.settings
        fixed = {name: getattr(old, name) for name in _NEEDS_RESTART}
        if (new.tls is None) is not (old.tls is None):
            fixed["tls"] = old.tls
        changed = [name for name in fixed if fixed[name] != getattr(new, name)]
        new = dataclasses.replace(new, **fixed)
        await self._apply(new)
        self.settings = new
        self._count("ok")
        self._result = "reloaded the configuration"
        _log.info("reloaded the configuration")
        if changed:
            _log.warning("a change of %s needs a restart; the old value stays", ", ".join(changed))

    def _refuse(self, reason: str) -> None:
        self._count("refused")
        self._result = f"the new configuration is refused, the old one stays: {reason}"
        for line in reason.splitlines() or [""]:
            _log.error("the new configuration is refused, the old one stays: %s", line)
