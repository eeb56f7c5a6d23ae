"""Which upstream is asked: the strategies of a model's upstreams. No I/O; `now` and a random number are arguments.

First who can be asked at all: not tried before in this exchange, not avoided (`policy.health`), and of the lowest tier
that has such a one. At most a share of the upstreams is avoided at once, rounded down, those of an active check first:
beyond that, those that would be back soonest are asked like any other, for the rest must not be crushed. Then the
strategy chooses. Every choice is O(upstreams of the model).

Invariants: nothing is chosen twice in an exchange; `pick` answers None only if everything was tried or is avoided.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import final

from canal_trio.policy.health import Standing
from canal_trio.settings import Balance

__all__ = ["STRATEGIES", "Balancer", "Member"]

_LONG_KEY = 256  # bytes
STRATEGIES = ("in_order", "round_robin", "fewest_streams", "fastest", "hash")


@dataclass(frozen=True, slots=True)
class Member:
    """One upstream of a model."""

    standing: Standing
    weight: float = 1.0
    tier: int = 0


@final
class Balancer:
    """The upstreams of one model. `start` from 0 to 1 is where its round robin begins: another one in each worker."""

    def __init__(self, members: Sequence[Member], options: Balance, *, most_ejected: float, start: float = 0.0) -> None:
        self.members = tuple(members)
        self.options = options
        self._avoidable = math.floor(most_ejected * len(self.members) + 1e-9)
        count = len(self.members)
        self._turns = [member.weight * ((start + number / count) % 1.0) for number, member in enumerate(self.members)]
        self._hashes = [
            hashlib.blake2b(digest_size=8, key=hashlib.blake2b(member.standing.name.encode()).digest())
            for member in self.members
        ]
        self._tiers = sorted({member.tier for member in self.members})
        self._standings = [member.standing for member in self.members]
        self._first_tier = [number for number, one in enumerate(self.members) if one.tier == self._tiers[0]]
        # What `pick` says while that one's standing is calm, whatever the others': None if chance or a turn decides.
        plain = count == 1 or (options.strategy == "in_order" and count > 0)
        self.usual = self._first_tier[0] if plain else None

    def pick(self, now: float, chance: float, *, tried: Collection[int] = (), key: bytes | None = None) -> int | None:
        """Which of the members to ask: its number; None if there is none. `chance`: a random number from [0, 1).

        `key` is what `hash` goes by; without one it spreads the load. Changes nothing but whose turn it is next.
        """
        candidates = self._candidates(now, tried)
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        strategy = self.options.strategy
        if strategy == "in_order":
            return candidates[0]
        if strategy == "round_robin":
            return self._round_robin(candidates, now)
        if strategy == "hash" and key is not None:
            return self._hashed(candidates, now, key)
        if strategy == "fastest":
            return self._fastest(candidates, now, chance)
        return self._fewest(candidates, now, chance)

    def available(self, now: float) -> bool:
        """Could an exchange that begins now be sent anywhere?"""
        return bool(self._candidates(now, ()))

    def wait(self, now: float) -> float:
        """Seconds until one that is avoided can be asked; 0 if nobody knows, or there is one."""
        until = [member.standing.avoided(now) for member in self.members if not member.standing.down]
        return max(min(until) - now, 0.0) if until else 0.0

    # -- who can be asked ----------------------------------------------------------------------------------------------

    def _candidates(self, now: float, tried: Collection[int]) -> list[int]:
        members = self.members
        avoided = self._avoided(now)
        if not avoided and not tried:
            return self._first_tier  # nearly always
        for tier in self._tiers:
            found = [
                number
                for number, member in enumerate(members)
                if member.tier == tier and number not in avoided and number not in tried
            ]
            if found:
                return found
        return []

    def _all_calm(self) -> bool:
        return all(standing.calm for standing in self._standings)

    def _avoided(self, now: float) -> Collection[int]:
        if self._all_calm():
            return ()
        troubled = [number for number, member in enumerate(self.members) if not member.standing.calm]
        down = {number for number in troubled if self.members[number].standing.down}
        until = {number: self.members[number].standing.avoided(now) for number in troubled if number not in down}
        most = self._avoidable - len(down)
        others = sorted((number for number, when in until.items() if when), key=lambda n: until[n], reverse=True)
        return down | set(others[: max(most, 0)])

    # -- strategies ----------------------------------------------------------------------------------------------------

    def _weight(self, number: int, now: float) -> float:
        member = self.members[number]
        return member.weight * member.standing.rise(now)

    def _round_robin(self, candidates: list[int], now: float) -> int:
        """Smooth: in every stretch each gets its part, and the turns of a heavy one are not all in a row."""
        turns, total = self._turns, 0.0
        for number in candidates:
            weight = self._weight(number, now)
            turns[number] += weight
            total += weight
        chosen = max(candidates, key=turns.__getitem__)
        turns[chosen] -= total
        return chosen

    def _fewest(self, candidates: list[int], now: float, chance: float) -> int:
        """Fewest streams for its weight; among equals it is chance."""
        first = int(chance * len(candidates))
        return min(
            candidates[first:] + candidates[:first],
            key=lambda number: (self.members[number].standing.in_flight + 1) / self._weight(number, now),
        )

    def _fastest(self, candidates: list[int], now: float, chance: float) -> int:
        """Of two by chance the one whose first token is expected sooner, for its weight and what waits there."""
        count = len(candidates)
        first, second = divmod(int(chance * count * (count - 1)), count - 1)
        pair = (candidates[first], candidates[second + (second >= first)])
        memory = self.options.memory
        known = all(self.members[number].standing.first_token for number in pair)

        def cost(number: int) -> tuple[float, float]:
            standing = self.members[number].standing
            queue = (standing.in_flight + 1) / self._weight(number, now)
            # What nobody has measured yet is tried, but not flooded before its first token.
            return (queue * standing.expected(now, memory), 0.0) if known else (queue, standing.first_token)

        return min(pair, key=cost)

    def _hashed(self, candidates: list[int], now: float, key: bytes) -> int:
        """Rendezvous hashing: a key stays where it is unless its own upstream goes, or a better one comes."""
        if len(key) > _LONG_KEY:  # megabytes, perhaps, and each upstream would read all of it
            key = hashlib.blake2b(key).digest()

        def distance(number: int) -> float:
            seeded = self._hashes[number].copy()
            seeded.update(key)
            point = (int.from_bytes(seeded.digest(), "big") + 1) / (2.0**64 + 2)  # within 0 and 1, and neither
            return -math.log(point) / self._weight(number, now)

        return min(candidates, key=distance)
