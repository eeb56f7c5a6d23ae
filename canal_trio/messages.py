"""Heads and endings: the frozen records that travel between the floors.

Field names keep the casing their sender gave them (the bytes are sacred) and are looked up in lower case (RFC 9110
5.1). Values are bytes, already stripped of surrounding white space. Nothing here parses or serialises; `wire` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

__all__ = ["End", "Headers", "RequestHead", "ResponseHead"]


# The usual names are kept once, not once for each head of each stream.
_USUAL = b"""Accept Accept-Encoding Accept-Language Authorization Cache-Control Connection Content-Encoding
    Content-Length Content-Type Date Forwarded Host Server Trailer Transfer-Encoding User-Agent Vary Via
    X-Accel-Buffering X-Forwarded-For X-Forwarded-Host X-Forwarded-Proto X-Request-Id X-Stainless-Arch
    X-Stainless-Async X-Stainless-Lang X-Stainless-OS X-Stainless-Package-Version X-Stainless-Read-Timeout
    X-Stainless-Retry-Count X-Stainless-Runtime X-Stainless-Runtime-Version""".split()
_lower = {name: lower for usual in _USUAL for lower in [usual.lower()] for name in (usual, lower)}.get


class Headers:
    """An immutable, ordered list of fields. Iterating gives `(name, value)` pairs with the sender's casing."""

    __slots__ = ("_fields", "_first", "_repeated")

    def __init__(self, fields: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self._fields = tuple([(name, _lower(name) or name.lower(), value) for name, value in fields])
        self._first: dict[bytes, bytes] | None = None  # made by the first look-up; many heads are only written
        self._repeated = False  # some name comes more than once

    def _values(self) -> dict[bytes, bytes]:
        first = self._first
        if first is None:
            first = self._first = {lower: value for _, lower, value in reversed(self._fields)}
            self._repeated = len(first) < len(self._fields)
        return first

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return iter([(name, value) for name, _, value in self._fields])

    def __len__(self) -> int:
        return len(self._fields)

    def __contains__(self, name: bytes) -> bool:
        return name in self._values()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Headers) and self._fields == other._fields

    def __hash__(self) -> int:
        return hash(self._fields)

    def __repr__(self) -> str:
        return f"Headers({list(self)!r})"

    def lowered(self) -> Iterator[tuple[bytes, bytes, bytes]]:
        """`(name, lower-case name, value)` for each field, in order."""
        return iter(self._fields)

    def get(self, name: bytes, default: bytes | None = None) -> bytes | None:
        """The first value of `name` (lower case), or `default`."""
        return self._values().get(name, default)

    def get_all(self, name: bytes) -> list[bytes]:
        """Every value of `name` (lower case), in order."""
        found = self._values().get(name)
        if found is None:
            return []
        return [value for _, lower, value in self._fields if lower == name] if self._repeated else [found]

    def replaced(self, name: bytes, value: bytes) -> Headers:
        """The same fields with another value for each `name` (lower case)."""
        changed = Headers()
        changed._fields = tuple([(n, low, value if low == name else old) for n, low, old in self._fields])
        return changed

    def tokens(self, name: bytes) -> list[bytes]:
        """The lower-cased members of the comma list `name`, all its lines together, empty members dropped
        (RFC 9110 5.6.1)."""
        members = [member.strip(b" \t").lower() for value in self.get_all(name) for member in value.split(b",")]
        return [member for member in members if member]


_NO_FIELDS = Headers()


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request's start line and fields. `version` is `b"1.1"` or `b"1.0"`."""

    method: bytes
    target: bytes
    headers: Headers = _NO_FIELDS
    version: bytes = b"1.1"
    facts: object = field(default=None, init=False, repr=False, compare=False)  # what `keep` was given

    def keep(self, facts: object) -> None:
        """Keep what was found out about this head with it. Of the head itself nothing changes."""
        object.__setattr__(self, "facts", facts)

    def bare(self) -> RequestHead:
        """The same without its fields; what was found out about it stays."""
        bare = RequestHead(self.method, self.target, _NO_FIELDS, self.version)
        bare.keep(self.facts)
        return bare


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """A response's start line and fields; informational (1xx) heads use it too."""

    status: int
    headers: Headers = _NO_FIELDS
    reason: bytes = b""
    version: bytes = b"1.1"
    facts: object = field(default=None, init=False, repr=False, compare=False)  # what `keep` was given

    def keep(self, facts: object) -> None:
        """Keep what was found out about this head with it. Of the head itself nothing changes."""
        object.__setattr__(self, "facts", facts)

    @property
    def informational(self) -> bool:
        """True for a 1xx head, after which another head follows (RFC 9110 15.2)."""
        return self.status < 200


@dataclass(frozen=True, slots=True)
class End:
    """The clean end of a body, with its trailer fields. A flow without it was aborted."""

    trailers: Headers = _NO_FIELDS
