"""Editing by splicing: a few bytes of a body are exchanged, every other byte stays the one that the client sent.

An `Edit` is a place and what stands there instead. Order, spacing, escapes, large numbers and unknown fields around it
cannot change, because nothing is parsed and written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import msgspec

__all__ = ["Edit", "grown", "splice", "spliced"]


class Edit(msgspec.Struct, frozen=True):
    """The bytes from `start` to `end` (not included) become `text`."""

    start: int
    end: int
    text: bytes


_place = attrgetter("start", "end")


def grown(edits: Sequence[Edit]) -> int:
    """By how many bytes they make a body longer; negative: shorter."""
    longer = 0
    for edit in edits:
        longer += len(edit.text) - (edit.end - edit.start)
    return longer


def splice(pieces: Sequence[bytes], edits: Sequence[Edit]) -> list[bytes]:
    """The body in `pieces` with `edits` made, which must not overlap. Pieces that no edit touches are not copied.

    Of two edits at the same place the one that is named first comes first.
    """
    out: list[bytes] = []
    waiting = sorted(edits, key=_place)
    at = 0  # where the piece begins
    done = 0  # up to where the body was taken or dropped
    for piece in pieces:
        end = at + len(piece)
        while waiting and waiting[0].start < end:
            edit = waiting.pop(0)
            out.append(piece[done - at : edit.start - at])
            out.append(edit.text)
            done = edit.end
        if done < end:
            out.append(piece[max(done - at, 0) :] if done > at else piece)
            done = end
        at = end
    out += [edit.text for edit in waiting]
    return [piece for piece in out if piece]


def spliced(body: bytes, edits: Sequence[Edit]) -> bytes:
    """The same for a body in one piece, as most are: as one piece."""
    if len(edits) == 1:
        edit = edits[0]
        return body[: edit.start] + edit.text + body[edit.end :]
    if len(edits) == 2:
        first, second = edits
        if _place(second) < _place(first):
            first, second = second, first
        return b"".join(
            (body[: first.start], first.text, body[first.end : second.start], second.text, body[second.end :])
        )
    return b"".join(splice([body], edits))
