"""Active checks: upstreams with a `check` path are asked from time to time whether they are well. Off without one.

Each has a task of its own, in a nursery that goes with the configuration: a reload cancels it and begins anew. Checks
are control calls (`upstream.control`): a connection for each, nothing of the pools, nothing on the way of an exchange.
Invariants: of one upstream one check runs at a time; whatever it answers, or raises, is a verdict and no end.
"""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from typing import Final, final

import trio

from canal_trio.errors import Failure
from canal_trio.gateway.requests import credential_of
from canal_trio.policy.health import Standing
from canal_trio.settings import Settings, Upstream
from canal_trio.upstream.connect import Connector
from canal_trio.upstream.control import fetch
from canal_trio.wire.targets import parse_base_url

__all__ = ["Checks"]

MOST: Final = 1024 * 1024  # bytes of an answer
_SPREAD: Final = 0.1  # of the interval, to either side: several gateways do not fall into step

_log = logging.getLogger("canal_trio.gateway")


@final
class Checks:
    """Those of one gateway."""

    def __init__(self) -> None:
        self._watched: list[tuple[Upstream, Standing]] = []
        self._settings = Settings()
        self._connector: Connector | None = None
        self._changed = trio.Event()

    def configure(self, settings: Settings, connector: Connector, standings: dict[str, Standing]) -> None:
        """From now on these upstreams, by these numbers. Not a checkpoint."""
        self._settings = settings
        self._connector = connector
        self._watched = [
            (_root(upstream), standings[upstream.name]) for upstream in settings.upstreams if upstream.check is not None
        ]
        self._changed.set()

    async def run(self) -> None:
        """Check until cancelled."""
        while True:
            self._changed = trio.Event()
            async with trio.open_nursery() as nursery:
                for upstream, standing in self._watched:
                    nursery.start_soon(self._watch, upstream, standing)
                await self._changed.wait()
                nursery.cancel_scope.cancel(reason="the configuration was reloaded")

    async def _watch(self, upstream: Upstream, standing: Standing) -> None:
        interval = self._settings.health.check_interval
        while True:
            reason = await self._ask(upstream)
            was = standing.down
            standing.checked(not reason, trio.current_time())
            if standing.down and not was:
                _log.warning("upstream %s is down: %s", upstream.name, reason)
            elif was and not standing.down:
                _log.info("upstream %s is up again", upstream.name)
            await trio.sleep(interval * random.uniform(1 - _SPREAD, 1 + _SPREAD))

    async def _ask(self, upstream: Upstream) -> str:
        """Empty, or why it is not well."""
        assert self._connector is not None
        assert upstream.check is not None
        credential = credential_of(upstream)
        try:
            answer = await fetch(
                self._connector,
                upstream,
                upstream.check.encode("ascii"),
                fields=[(b"Accept", b"*/*"), *([credential] if credential is not None else [])],
                most=MOST,
                limit=self._settings.health.check_timeout,
            )
        except Exception:  # a bug, which must not end the gateway; `Cancelled` is none
            _log.exception("the check of upstream %s failed", upstream.name)
            return "The check itself failed."
        if isinstance(answer, Failure):
            return answer.detail or answer.kind.value
        return "" if 200 <= answer[0] < 400 else f"It answered {answer[0]}."


def _root(upstream: Upstream) -> Upstream:
    """`upstream` without the path of its base URL: what says whether it is well lies beside its API."""
    base = parse_base_url(upstream.base_url)
    if isinstance(base, str):
        return upstream  # nothing is asked of it either
    return replace(upstream, base_url=f"{base.scheme}://{base.authority.decode('ascii')}")
