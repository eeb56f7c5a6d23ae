"""Who lets exchanges in while Redis is away: this machine's memory, or nobody, who lets in everything.

Either way they are held for Redis to be told: what is in flight when it is back, and what was spent meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, final

from canal_trio.policy.limit_fields import Counted
from canal_trio.policy.ratelimit import Ask
from canal_trio.policy.scopes import Scope
from canal_trio.quota.admission import Verdict
from canal_trio.quota.memory import MemoryStore

__all__ = ["Local", "Open"]


class Told(Protocol):
    """The store in Redis, as far as it is told of others' decisions."""

    @property
    def untold(self) -> int:
        """Scopes of which Redis has to be told when it is back."""

    def hold(self, scopes: Sequence[Scope], ask: Ask, *, told: bool) -> None:
        """An exchange of this worker was let in. `told`: by Redis itself."""

    def settle(self, counted: Counted, ask: Ask, used: Ask) -> None:
        """It has ended."""

    def settle_in(self, scopes: Sequence[Scope], ask: Ask, used: Ask) -> None:
        """The same, for these scopes."""


@final
class Local:
    """The keeper of what was let in by this machine's memory: counted there, and held for Redis to be told."""

    def __init__(self, store: Told, memory: MemoryStore) -> None:
        self._store = store
        self._memory = memory

    def admit(self, scopes: tuple[Scope, ...], ask: Ask) -> Verdict | None:
        """By the memory."""
        verdict = self._memory.admit_now(scopes, ask)
        if verdict is None or verdict.why is not None:
            return verdict
        self._store.hold([scope for scope, _ in verdict.counted], ask, told=False)
        return Verdict(verdict.counted, None, self)

    def settle(self, counted: Counted, ask: Ask, used: Ask) -> None:
        """In the memory, and in Redis if that is possible: it was told, or will be, that it is in flight."""
        self._memory.settle(counted, ask, used)
        self._store.settle(counted, Ask(0, ask.cost), used)  # no tokens were set aside there


@final
class Open:
    """Lets everything in, held for Redis to be told: what it costs was spent all the same. Of `most` scopes at most."""

    def __init__(self, store: Told, most: int) -> None:
        self._store = store
        self._most = most

    def admit(self, scopes: tuple[Scope, ...], ask: Ask) -> Verdict | None:
        """Counted nowhere yet. None: let in, and forgotten, for there is too much to be told already."""
        if self._store.untold >= self._most:
            return None
        self._store.hold(scopes, ask, told=False)
        return Verdict((), None, _Uncounted(self._store, scopes))


@final
class _Uncounted:
    """The keeper of one exchange that was let in unasked."""

    def __init__(self, store: Told, scopes: tuple[Scope, ...]) -> None:
        self._store = store
        self._scopes = scopes

    def settle(self, _counted: Counted, ask: Ask, used: Ask) -> None:
        """In Redis if that is possible: it was told, or will be, that it is in flight."""
        self._store.settle_in(self._scopes, Ask(0, ask.cost), used)  # no tokens were set aside there
