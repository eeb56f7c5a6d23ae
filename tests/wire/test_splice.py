"""Editing by splicing: what is edited is edited, and every other byte is the client's."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from canal_trio.wire.splice import Edit, grown, splice, spliced


@st.composite
def bodies_with_edits(draw: st.DrawFn) -> tuple[list[bytes], list[Edit]]:
    """A body in pieces, and edits of it that do not overlap, in any order."""
    pieces = draw(st.lists(st.binary(min_size=1, max_size=6), max_size=5))
    size = len(b"".join(pieces))
    places = sorted(draw(st.lists(st.integers(0, size), max_size=6)))
    edits = [
        Edit(start, end, draw(st.binary(max_size=4))) for start, end in zip(places[::2], places[1::2], strict=False)
    ]
    return pieces, draw(st.permutations(edits))


@given(bodies_with_edits())
@example(([b"abcdef"], [Edit(2, 5, b"x"), Edit(2, 2, b"y")]))
@example(([b"abcdef"], [Edit(4, 5, b"x"), Edit(1, 2, b"y")]))
def test_as_if_in_one_piece(case: tuple[list[bytes], list[Edit]]):
    """Wherever the pieces begin and end, the result is what editing the whole body gives."""
    pieces, edits = case
    body = b"".join(pieces)
    whole, at = b"", 0
    for edit in sorted((edit for edit in edits), key=lambda edit: (edit.start, edit.end)):
        whole += body[at : edit.start] + edit.text
        at = edit.end
    whole += body[at:]
    out = splice(pieces, edits)
    assert b"".join(out) == whole
    assert spliced(body, edits) == whole
    assert len(whole) == len(body) + grown(edits)
    assert all(out)


def test_untouched_pieces_are_not_copied():
    """Memory for an edit is that of the pieces it touches."""
    pieces = [b"a" * 100, b"b" * 100, b"c" * 100]
    out = splice(pieces, [Edit(150, 151, b"x")])
    assert out[0] is pieces[0]
    assert out[-1] is pieces[2]
    assert splice(pieces, []) == pieces


def test_an_edit_over_several_pieces():
    """What is taken out may begin in one piece and end in another."""
    assert b"".join(splice([b"ab", b"cd", b"ef"], [Edit(1, 5, b"-")])) == b"a-f"
