"""Names, and patterns with one `*`, as a dictionary.

An exact name wins over every pattern; among patterns the one that spells out most of the name wins, and of two that
spell out as much the one with the longer beginning. Finding takes as long with ten entries as with ten thousand: one
look for the exact name, then one for each *shape* of pattern (how long it is before and behind its `*`), of which there
are few, whatever the number of patterns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar, final

__all__ = ["Names"]

T = TypeVar("T")


@final
class Names(Generic[T]):
    """What belongs to a name. Of two equal names the last one counts."""

    __slots__ = ("_exact", "_shapes", "_wild")

    def __init__(self, entries: Iterable[tuple[str, T]]) -> None:
        self._exact: dict[str, tuple[T, None]] = {}
        self._wild: dict[tuple[str, str], T] = {}
        for name, value in entries:
            front, star, back = name.partition("*")
            if star:
                self._wild[front, back] = value
            else:
                self._exact[name] = value, None
        shapes = {(len(front), len(back)) for front, back in self._wild}
        self._shapes = sorted(shapes, key=lambda shape: (-sum(shape), -shape[0]))

    def find(self, name: str) -> tuple[T, str | None] | None:
        """The value, and what the `*` stood for (None: the name is there as it is); None if nothing fits."""
        found = self._exact.get(name)
        if found is not None:
            return found
        for front, back in self._shapes:
            end = len(name) - back
            if front <= end:
                wild = self._wild.get((name[:front], name[end:]))
                if wild is not None:
                    return wild, name[front:end]
        return None

    def __contains__(self, name: str) -> bool:
        return self.find(name) is not None
