"""How the upstream answers one request: plain numbers, and their form inside a request.

Invariant: a behaviour travels in the request's `user` field (`lt-ID;tokens=100;interval=0.02`), so it passes any
gateway that hands the body on, even one that parses and writes it anew; `parse(behaviour.encode(id))` gives it back.
Times are seconds, sizes bytes, -1 means never or endless.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Self

__all__ = ["Behaviour", "BehaviourError", "parse", "split_user"]

FRAMINGS = ("chunked", "length", "close")
MOST = {
    "tokens": 10_000_000,
    "head": 3600.0,
    "first": 3600.0,
    "interval": 3600.0,
    "jitter": 1.0,
    "size": 1 << 20,
    "batch": 4096,
    "split": 1 << 20,
    "status": 599,
    "cut": 1 << 40,
    "stall": 1 << 40,
    "error_after": 10_000_000,
    "read_rate": 1 << 32,
}
LEAST = {"tokens": -1, "cut": -1, "stall": -1, "error_after": -1, "status": 200, "batch": 1}


class BehaviourError(ValueError):
    """A behaviour that nobody can play; the text names the field and what it takes."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """An answer. Streamed if the request says `"stream": true`, one JSON document otherwise."""

    tokens: int = 100  # events that carry text; -1: endless
    head: float = 0.0  # from the complete request to the response's head
    first: float = 0.0  # from the head to the first token
    interval: float = 0.02  # between tokens; 0: as fast as the socket takes them
    jitter: float = 0.0  # share of the interval, drawn evenly from both sides
    size: int = 0  # extra text per token
    batch: int = 1  # tokens per send; 1 except for bursts
    split: int = 0  # each send cut into writes of this size; 0: whole
    framing: str = "chunked"
    usage: bool = False  # a usage chunk before [DONE]
    stamp: str = "field"  # where an event says when it was sent: its own JSON field, or the text ("content")
    status: int = 200
    error_after: int = -1  # tokens, then an in-band error and the end
    cut: int = -1  # bytes on the wire, then FIN
    reset: bool = False  # …or RST
    stall: int = -1  # bytes on the wire, then silence
    body: str = ""  # a body of `bodies.CANNED`, instead of tokens
    read_rate: int = 0  # the request's body is read this slowly, bytes/s; 0: as it comes

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in MOST and not LEAST.get(field.name, 0) <= value <= MOST[field.name]:
                raise BehaviourError(
                    f"{field.name} is {value}, expected {LEAST.get(field.name, 0)} to {MOST[field.name]}"
                )
        if self.framing not in FRAMINGS:
            raise BehaviourError(f"framing is {self.framing!r}, expected one of {', '.join(FRAMINGS)}")
        if self.stamp not in {"field", "content"}:
            raise BehaviourError(f"stamp is {self.stamp!r}, expected field or content")

    @classmethod
    def of(cls, table: dict[str, Any]) -> Self:
        """From a TOML table; unknown keys and wrong types are errors that name them."""
        known = _TYPES
        for key, value in table.items():
            if key not in known:
                raise BehaviourError(f"unknown key {key!r} in a behaviour; known: {', '.join(known)}")
            wanted = (int, float) if known[key] is float else (known[key],)
            if not isinstance(value, wanted) or (isinstance(value, bool) and known[key] is not bool):
                raise BehaviourError(f"{key} is {value!r}, expected {known[key].__name__}")
        return cls(**table)

    def encode(self, ident: str = "0") -> str:
        """The text for the request's `user` field: the identity and what differs from the default."""
        parts = [f"lt-{ident}"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value != getattr(DEFAULT, field.name):
                parts.append(f"{field.name}={int(value) if isinstance(value, bool) else value}")
        return ";".join(parts)

    @property
    def lasting(self) -> float:
        """Seconds from the request to the last token if nobody is in the way; infinite for an endless one."""
        if self.tokens < 0:
            return float("inf")
        return self.head + self.first + self.interval * max(self.tokens - 1, 0)


DEFAULT = Behaviour()
_TYPES: dict[str, type] = {field.name: type(getattr(DEFAULT, field.name)) for field in fields(Behaviour)}


def split_user(user: str) -> tuple[str, str]:
    """Identity and the rest; an identity that is not ours comes back as it is, with nothing."""
    ident, _, rest = user.partition(";")
    return (ident[3:], rest) if ident.startswith("lt-") else (user, "")


@lru_cache(maxsize=4096)
def parse(rest: str, default: Behaviour = DEFAULT) -> Behaviour:
    """The behaviour that `rest` (`key=value;…`) asks for on top of `default`; `BehaviourError` if it is none."""
    values = {field.name: getattr(default, field.name) for field in fields(Behaviour)}
    for part in filter(None, rest.split(";")):
        key, _, text = part.partition("=")
        if key not in _TYPES:
            raise BehaviourError(f"unknown key {key!r} in a behaviour")
        try:
            values[key] = bool(int(text)) if _TYPES[key] is bool else _TYPES[key](text)
        except ValueError:
            raise BehaviourError(f"{key} is {text!r}, expected {_TYPES[key].__name__}") from None
    return Behaviour(**values)
