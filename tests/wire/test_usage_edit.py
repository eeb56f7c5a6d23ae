"""The one edit: the usage chunk we asked for is taken out, and nothing else, however the bytes are split."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canal_trio.wire.usage_edit import UsageEdit

CASES = Path(__file__).parent.parent / "cases" / "usage"
EXPECTED = json.loads((CASES / "expected.json").read_text())
STREAMS = [name for name in EXPECTED if name.endswith(".sse")]


def edited(*pieces: bytes, most: int = 16_384) -> bytes:
    """What comes out of an edit in all."""
    edit = UsageEdit(most)
    return b"".join(edit.feed(piece) for piece in pieces) + edit.flush()


def without_usage_chunk(data: bytes) -> bytes:
    """By another way: the events, apart from the first one without choices and with usage."""
    events = re.split(rb"(?<=\n\n)|(?<=\r\n\r\n)", data)
    for number, event in enumerate(events):
        payload = event.strip().removeprefix(b"data:")
        if b'"choices":[]' in payload and json.loads(payload).get("usage") is not None:
            return b"".join(events[:number] + events[number + 1 :])
    return data


@pytest.mark.parametrize("name", STREAMS)
def test_every_byte_but_the_usage_chunk(name: str):
    """gateways.md C20: cut in two and fed by bytes, exactly one chunk is missing, where there is one."""
    data = (CASES / name).read_bytes()
    wanted = without_usage_chunk(data)
    assert (wanted != data) is EXPECTED[name]["usage_chunk"]
    assert edited(data) == wanted
    assert edited(*(data[at : at + 1] for at in range(len(data)))) == wanted
    near = data.rfind(b'"usage"')
    places = {
        *range(0, len(data) + 1, 11),
        *range(max(0, near - 10), min(len(data), near + 60)),
        *range(len(data))[-40:],
    }
    assert [at for at in sorted(places) if edited(data[:at], data[at:]) != wanted] == []


LINES = st.sampled_from(
    [b"", b"", b": c", b"data: 1", b'data: {"choices":[{}]', b'data: "usage"', b"event: usage", b"data: x" * 9]
)
ENDS = st.sampled_from([b"\n", b"\r", b"\r\n"])


@settings(deadline=None)
@given(st.lists(st.tuples(LINES, ENDS), max_size=20), st.lists(st.integers(0, 300), max_size=9), st.integers(8, 40))
def test_nothing_else_is_ever_changed(lines: list[tuple[bytes, bytes]], cuts: list[int], most: int):
    """A stream without the chunk comes out as it went in, and never more than one bounded event is held."""
    data = b"".join(line + end for line, end in lines)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    edit, out = UsageEdit(most), b""
    for a, b in itertools.pairwise(edges):
        out += edit.feed(data[a:b])
        assert len(edit.held) <= most
        assert out + edit.held == data[:b]
    assert out + edit.flush() == data
    assert not edit.removed


CHUNK = b'data: {"choices":[],"usage":{"prompt_tokens":1}}\n\n'


def test_only_one_chunk_is_removed():
    """A second one is the upstream's own affair."""
    assert edited(CHUNK + CHUNK) == CHUNK
    assert edited(CHUNK, CHUNK) == CHUNK


def test_a_long_event_is_released_unjudged():
    """Beyond the bound an event goes out as it is, and the one behind it is judged again."""
    long = b'data: {"usage":{},"choices":[],"x":"' + b"y" * 200
    edit = UsageEdit(100)
    assert edit.feed(long) == long
    assert edit.held == b""
    assert edit.feed(b'"}\n') == b'"}\n'
    assert edit.feed(b"\n" + CHUNK) == b"\n"
    assert edit.removed
    assert edit.feed(b"data: [DO") == b"data: [DO"


def test_an_event_with_a_choice_is_not_held():
    """Its beginning shows that it is not the chunk: it is not kept from the client until its end comes."""
    edit = UsageEdit()
    begun = b'data: {"id":"x","choices":[{"index":0'
    assert edit.feed(begun[:20]) == b""
    assert edit.feed(begun[20:]) == begun
    assert edit.feed(b"}]}\n\n" + CHUNK) == b"}]}\n\n"


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices":[],"prompt_filter_results":[]}\n\n',
        b'data: {"choices":[],"usage":null}\n\n',
        b'data: {"choices":[{}],"usage":{"prompt_tokens":1}}\n\n',
        b'data: {"usage":{"prompt_tokens":1}}\n\n',
        b'data: "usage"\n\n',
        b'data: {"usage"\n\n',
        b'data: {"choices":[],"usage":7}\n\n',
        b': "usage"\n\n',
    ],
)
def test_what_is_not_the_chunk_stays(event: bytes):
    """gateways.md C19: empty choices alone, or a usage beside a choice, are the client's."""
    assert edited(event, b"data: [DONE]\n\n") == event + b"data: [DONE]\n\n"


def test_what_is_held_comes_out_at_the_end():
    """A stream that is cut inside of an event loses nothing of it."""
    edit = UsageEdit()
    assert edit.feed(CHUNK[:-1]) == b""
    assert edit.flush() == CHUNK[:-1]
    assert edit.flush() == b""
    assert edit.feed(b"\n") == b"\n"


def test_an_event_that_is_not_utf8_passes() -> None:
    """It raised: the decoder has another error for text than for JSON."""
    event = b'data: {"choices": ["\xee"], "usage": {"note": "\xee"}}\n\n'
    assert edited(event + b"data: [DONE]\n\n") == event + b"data: [DONE]\n\n"
