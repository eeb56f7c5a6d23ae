"""The upstreams' own lists of models, fetched when somebody asks for them and kept for a while.

Invariants: of one upstream one fetch runs at a time, in the task of the exchange that needs it, and the others wait for
it; a list is bounded in bytes and entries, a fetch in time; what fails leaves the list that was there, and is tried
again after a pause. When the exchange that fetches is cancelled, one of those who wait takes over.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final, final

import trio

from canal_trio.errors import Failure
from canal_trio.gateway.requests import credential_of
from canal_trio.settings import Settings, Upstream
from canal_trio.upstream.connect import Connector
from canal_trio.upstream.control import fetch
from canal_trio.wire.model_lists import ModelEntry, read_model_list

__all__ = ["Catalogue"]

PAUSE: Final = 10.0  # seconds before an upstream that did not answer is asked again

_log = logging.getLogger("canal_trio.gateway")


@final
class _Source:
    """What is known of one upstream."""

    __slots__ = ("due", "fetching", "models")

    def __init__(self) -> None:
        self.models: dict[str, ModelEntry] | None = None
        self.due = 0.0
        self.fetching: trio.Event | None = None


@final
class Catalogue:
    """The lists of one configuration's upstreams."""

    def __init__(self, settings: Settings, connector: Connector) -> None:
        self._settings = settings
        self._connector = connector
        self._sources: dict[str, _Source] = {}

    async def lists(self, upstreams: Sequence[Upstream]) -> dict[str, dict[str, ModelEntry]]:
        """What these list, by their names; who has never answered is missing. A checkpoint if one has to be asked."""
        sources = {upstream.name: self._sources.setdefault(upstream.name, _Source()) for upstream in upstreams}
        now = trio.current_time()
        if any(sources[upstream.name].due <= now for upstream in upstreams):
            async with trio.open_nursery() as nursery:
                for upstream in upstreams:
                    nursery.start_soon(self._update, upstream, sources[upstream.name])
        return {name: source.models for name, source in sources.items() if source.models is not None}

    async def _update(self, upstream: Upstream, source: _Source) -> None:
        while source.due <= trio.current_time():
            if source.fetching is not None:
                await source.fetching.wait()
                continue
            done = source.fetching = trio.Event()
            try:
                await self._fetch(upstream, source)
            finally:
                source.fetching = None
                done.set()

    async def _fetch(self, upstream: Upstream, source: _Source) -> None:
        deadlines = self._settings.deadlines
        credential = credential_of(upstream)
        answer = await fetch(
            self._connector,
            upstream,
            b"/models" if _has_path(upstream) else b"/v1/models",
            fields=[(b"Accept", b"application/json"), *([credential] if credential is not None else [])],
            most=self._settings.bounds.model_list_bytes,
            limit=deadlines.model_list,
        )
        models = None
        if isinstance(answer, Failure):
            reason = answer.detail
        else:
            status, body = answer
            models = read_model_list(body) if status == 200 else None
            reason = f"It answered {status}." if status != 200 else "Its answer is no list of models."
        source.due = trio.current_time() + (PAUSE if models is None else deadlines.model_list_keep)
        if models is not None:
            source.models = models
        else:
            _log.warning("the list of models of '%s' was not fetched: %s", upstream.name, reason)


def _has_path(upstream: Upstream) -> bool:
    """A base URL with a path ends where an SDK puts `/models`; one without gets targets as they are."""
    return upstream.base_url.partition("://")[2].rstrip("/").count("/") > 0
