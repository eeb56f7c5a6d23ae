"""What goes wrong on a link, drawn from a seed.

Pure. Invariant: the fault of an exchange depends on the seed, the exchange's id and the number of the attempt, and on
nothing else: the same run has the same faults, whatever the order in which its exchanges come.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["KINDS", "Fault", "draw"]

# What happens, how often, and what it does.
KINDS: dict[str, float] = {
    "none": 8,
    "latency": 2,  # every piece of the response comes later
    "slicer": 2,  # the response comes in small slices
    "cut": 2,  # the connection ends with a FIN after so many bytes
    "reset": 2,  # …with an RST
    "half_close": 1,  # a FIN towards the gateway, but what it sends is still taken
    "stall": 1,  # nothing moves any more, in either direction
    "deaf": 1,  # the request is not taken beyond so many bytes
    "cut_request": 1,  # an RST after so many bytes of the request
}
ENDS = frozenset({"cut", "reset", "half_close", "stall"})
MOST_REQUEST, MOST_RESPONSE = 300, 9000  # bytes, where a break is drawn


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `at` counts bytes of the response (of the request for `deaf` and `cut_request`) that still pass;
    with `tail` it is that many bytes before the response's end, instead."""

    kind: str = "none"
    at: int = 0
    tail: int = 0
    boundary: bool = False  # not in the middle of a piece, but before it
    delay: float = 0.0  # seconds, of each piece
    size: int = 0  # bytes, of a slice


def draw(seed: str, ident: str, attempt: int, weight_of_none: float | None = None) -> Fault:
    """The fault of this attempt of this exchange."""
    chance = random.Random(f"{seed}/{ident}/{attempt}")
    weights = dict(KINDS)
    if weight_of_none is not None:
        weights["none"] = weight_of_none
    kind = chance.choices(list(weights), list(weights.values()))[0]
    if kind == "latency":
        return Fault(kind, delay=chance.uniform(0.001, 0.15))
    if kind == "slicer":
        return Fault(kind, delay=chance.choice((0.0, 0.001, 0.005)), size=chance.randint(1, 64))
    if kind in ("deaf", "cut_request"):
        return Fault(kind, chance.choice((0, 1, chance.randint(1, MOST_REQUEST), chance.randint(1, 150_000))))
    if kind in ENDS:
        if chance.random() < 0.2:
            return Fault(kind, tail=chance.randint(1, 7))  # in the very end of the message
        at = chance.choice((0, chance.randint(1, 250), chance.randint(1, MOST_RESPONSE)))
        return Fault(kind, at, boundary=chance.random() < 0.5)
    return Fault(kind)
