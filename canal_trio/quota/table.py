"""What limits have counted, as records in a piece of memory that the workers of one machine may share.

One record for each scope; it holds the scope's levels and spending, and a cell for each worker with its exchanges in
flight and the money set aside for them. A worker writes its own cell only, so that when it dies the others know what
was its. Everything is read and written under one lock, which the kernel takes from a process that dies.

The place of a record follows from the digest of its scope's id: it is one of the `WAYS` records of a set. A record that
says nothing any more (all drained, nobody in flight, nothing spent this month) gives way to another scope. Invariants:
an operation happens in all scopes or in none (but for a worker that is killed in the middle of it); the memory is
bounded, whatever clients invent.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import inf
from typing import final

from canal_trio.policy.ratelimit import Ask, Moment, Refusal, State, begin, refill, settle, turn
from canal_trio.policy.scopes import Scope

__all__ = ["Spent", "Table", "table_bytes"]

WAYS = 32
IDLE = 3600.0  # seconds after which every level has drained
_HEADER = 64  # bytes; the first eight count changes of what was spent
_CHANGES = struct.Struct("<Q")
_HEAD = struct.Struct("<16sdddqqqq")  # digest, requests, tokens, at, day, spent_day, month, spent_month
_CELL = struct.Struct("<qq")  # in flight, reserved
_WHOLE = struct.Struct("<16sdddqqqqqq")  # head and cell, where there is one worker
_NOBODY = bytes(16)
_MOST = 2**63 - 1  # of money in a record

Spent = tuple[int, int, int, int]
"""Day, spent on it, month, spent in it."""


Counted = Sequence[tuple[Scope, State]]
"""Scopes, and what each of them has counted."""


def table_bytes(records: int, columns: int) -> int:
    """The size of a table for that many records (a multiple of `WAYS`) and workers."""
    return _HEADER + records * (_HEAD.size + columns * _CELL.size)


@final
class Table:
    """A view of `memory` for the worker that has `column` of `columns`. `lock` is entered for each operation.

    Places of `remembers` scopes are remembered at most.
    """

    def __init__(
        self,
        memory: mmap.mmap | bytearray,
        *,
        column: int = 0,
        columns: int = 1,
        lock: AbstractContextManager[object] | None = None,
        remembers: int = 65_536,
    ) -> None:
        self._remembers = remembers
        self._memory = memory
        self._lock = nullcontext() if lock is None else lock
        self.shared = True
        # Where nobody else has it:
        self.spends = False  # what was spent has changed since somebody looked at `changes`
        self._own_changes = 0
        self._known: dict[int, State] = {}  # by its place
        self._size = _HEAD.size + columns * _CELL.size
        self._cells = struct.Struct(f"<{2 * columns}q")
        self._single = columns == 1
        self._mine = _HEAD.size + column * _CELL.size
        self._records = (len(memory) - _HEADER) // self._size
        self._places: dict[str, tuple[int, bytes]] = {}  # scope id -> where its record is, unless it gave way
        self.overflows = 0  # scopes that found no place, and were not counted

    def own(self) -> None:
        """Nobody else has the memory from now on: nothing is locked, and states stay objects, which other threads may
        look at. The memory then says only which scopes there are.

        Who has got states from `admit` may count in them by itself: those with exchanges in flight stay, and one that
        gives way is out of time (infinite), so that `begin_far` lets nobody in.
        """
        assert self._single
        self._own_changes = self.changes
        self._lock = nullcontext()
        self.shared = False

    # -- exchanges -----------------------------------------------------------------------------------------------------

    def admit(
        self, scopes: Sequence[Scope], ask: Ask, moment: Moment
    ) -> tuple[Counted, tuple[Scope, Refusal] | None]:
        """Let `ask` in everywhere, or nowhere: what each scope has counted by then, and why not."""
        counted: list[tuple[Scope, State]] = []
        places: list[int] = []
        with self._lock:
            for scope in scopes:
                place = self._place(scope.id, moment, places)
                if place is None:
                    self.overflows += 1
                    continue
                counted.append((scope, self._read(place)))
                places.append(place)
            worst = begin(counted, ask, moment)
            if worst is None:
                for place, (scope, state) in zip(places, counted, strict=True):
                    self._write(place, scope.id, state, 1, ask.cost)
                if ask.cost:
                    self._changed()
        return counted, worst

    def settle(self, counted: Counted, ask: Ask, used: Ask, moment: Moment) -> None:
        """What was let in by `admit` with these has ended."""
        with self._lock:
            for scope, _ in counted:
                place = self._place(scope.id, moment)
                if place is None:
                    continue
                state = self._read(place)
                refill(scope.rule, state, moment)
                settle(scope.rule, state, ask, used)
                self._write(place, scope.id, state, -1, -ask.cost)
            if ask.cost or used.cost:
                self._changed()

    # -- the others ----------------------------------------------------------------------------------------------------

    def bury(self, column: int) -> None:
        """The worker of that `column` is dead: nothing of it is in flight, and what it had set aside counts as spent:
        nobody knows better."""
        offset = _HEAD.size + column * _CELL.size
        for place in self._all():
            streams, reserved = _CELL.unpack_from(self._memory, place + offset)
            if streams or reserved:
                with self._lock:
                    state = self._read(place)
                    digest = bytes(self._memory[place : place + 16])
                    state.spent_day += max(0, reserved)
                    state.spent_month += max(0, reserved)
                    self._pack(_HEAD, place, digest, state)
                    _CELL.pack_into(self._memory, place + offset, 0, 0)
                    self._changed()

    @property
    def changes(self) -> int:
        """Has risen if what was spent has changed."""
        if not self.shared:
            if self.spends:
                self.spends = False  # before anybody reads what it is about
                self._own_changes += 1
            return self._own_changes
        number: int = _CHANGES.unpack_from(self._memory, 0)[0]
        return number

    def spent(self, moment: Moment) -> dict[str, Spent]:
        """What was spent this month, and is set aside, by digest."""
        found: dict[str, Spent] = {}
        for place in self._all():
            state = self._read(place)
            if state.month != moment.month or not (state.spent_month or state.reserved):
                continue
            today = state.spent_day if state.day == moment.day else 0
            month = state.spent_month + state.reserved
            digest = self._memory[place : place + 16].hex()
            found[digest] = (moment.day, today + state.reserved, moment.month, month)
        return found

    def restore(self, spent: dict[str, Spent], moment: Moment) -> None:
        """Have it count at least what `spent` said once, of this month: where it has counted more, that stays.

        The lock is had for each record by itself, so that nobody waits for long: where it is not to be had, those
        before are done. To do it again changes nothing.
        """
        for text, (day, spent_day, month, spent_month) in spent.items():
            if month != moment.month:
                continue
            said = State(day=day, spent_day=spent_day, month=month, spent_month=spent_month)
            turn(said, moment.day, moment.month)
            with self._lock:
                digest = bytes.fromhex(text)
                place = self._free(digest, moment)
                if place is None:
                    continue
                state = self._read(place)
                turn(state, moment.day, moment.month)
                state.spent_day = min(max(state.spent_day, said.spent_day), _MOST)
                state.spent_month = min(max(state.spent_month, said.spent_month), _MOST)
                if self.shared:  # else it is the one that is known
                    self._pack(_HEAD, place, digest, state)

    # -- records -------------------------------------------------------------------------------------------------------

    def _all(self) -> Iterator[int]:
        """The places that are in use; others may change meanwhile."""
        memory, size = self._memory, self._size
        for first in range(_HEADER, _HEADER + self._records * size, WAYS * size):
            for place in range(first, first + WAYS * size, size):
                if memory[place : place + 16] == _NOBODY:
                    break  # nor is anybody behind it: see `_free`
                yield place

    def _place(self, name: str, moment: Moment, taken: Collection[int] = ()) -> int | None:
        """Where the record of the scope `name` is from now on, in the place of none in `taken`."""
        known = self._places.get(name)
        if known is None:
            digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        elif self._memory[known[0] : known[0] + 16] == known[1]:
            return known[0]
        else:
            digest = known[1]
        place = self._free(digest, moment, taken)
        if place is not None:
            if len(self._places) >= self._remembers:
                self._places.clear()
            self._places[name] = (place, digest)
        return place

    def _free(self, digest: bytes, moment: Moment, taken: Collection[int] = ()) -> int | None:
        """Where the record with `digest` is, or can be; None: every place it may have is needed."""
        memory, size = self._memory, self._size
        first = _HEADER + int.from_bytes(digest[:8], "little") % (self._records // WAYS) * WAYS * size
        spare: int | None = None
        least: tuple[float, int] | None = None
        for at in range(first, first + WAYS * size, size):
            found = memory[at : at + 16]
            if found == digest:
                return at
            if found == _NOBODY:
                spare = at
                break  # nobody is behind the first free one: records give way, but are never removed
            state = self._read(at)
            if at in taken or state.streams or (state.month == moment.month and (state.spent_month or state.reserved)):
                continue
            weight = 0.0 if state.at + IDLE < moment.now else 1.0 + state.requests + state.tokens
            if least is None or weight < least[0]:
                least = (weight, at)
        place = spare if spare is not None else (None if least is None else least[1])
        if place is not None:
            known = self._known.pop(place, None)
            if known is not None:
                known.at = inf
            self._memory[place + _HEAD.size : place + size] = bytes(size - _HEAD.size)
            self._pack(_HEAD, place, digest, State(at=moment.now, day=moment.day, month=moment.month))
        return place

    def _read(self, place: int) -> State:
        if self.shared:
            return self._unpacked(place)
        state = self._known.get(place)
        if state is None:
            state = self._known.setdefault(place, self._unpacked(place))  # another thread may look just now
        return state

    def _unpacked(self, place: int) -> State:
        if self._single:
            _, requests, tokens, at, day, spent_day, month, spent_month, streams, reserved = _WHOLE.unpack_from(
                self._memory, place
            )
            return State(requests, tokens, at, streams, reserved, day, spent_day, month, spent_month)
        _, requests, tokens, at, day, spent_day, month, spent_month = _HEAD.unpack_from(self._memory, place)
        cells = self._cells.unpack_from(self._memory, place + _HEAD.size)
        return State(
            requests, tokens, at, sum(cells[::2]), sum(cells[1::2]), day, spent_day, month, spent_month
        )  # fmt: skip

    def _write(self, place: int, name: str, state: State, streams: int, reserved: int) -> None:
        """Write `state`, in which that many streams and so much money have been added. Negative: taken away."""
        if not self.shared:  # it is the one that is known
            return
        digest = self._places[name][1]
        if not self._single:
            self._pack(_HEAD, place, digest, state)
            self._add(place, streams, reserved)
            return
        self._pack(_WHOLE, place, digest, state, state.streams, state.reserved)

    def _pack(self, form: struct.Struct, place: int, digest: bytes, state: State, *cell: int) -> None:
        """Write the record, with no more money in it than it can say."""
        levels = state.requests, state.tokens, state.at
        numbers = state.day, state.spent_day, state.month, state.spent_month, *cell
        try:
            form.pack_into(self._memory, place, digest, *levels, *numbers)
        except struct.error:
            form.pack_into(self._memory, place, digest, *levels, *(min(number, _MOST) for number in numbers))

    def _add(self, place: int, streams: int, reserved: int) -> None:
        at = place + self._mine
        was = _CELL.unpack_from(self._memory, at)
        _CELL.pack_into(self._memory, at, max(0, was[0] + streams), min(max(0, was[1] + reserved), _MOST))

    def _changed(self) -> None:
        if not self.shared:
            self.spends = True
            return
        _CHANGES.pack_into(self._memory, 0, (self.changes + 1) % 2**64)
