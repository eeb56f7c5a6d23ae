"""The tap on usage: what 20 recorded answers used, however their bytes are split, and what is never taken for it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canal_trio.config.quotas import MOST_PRICE
from canal_trio.hooks import Usage
from canal_trio.policy.prices import Tariff
from canal_trio.settings import Price
from canal_trio.wire.usage import USAGE_BYTES, BodyUsage, StreamUsage, usage_of

CASES = Path(__file__).parent.parent / "cases" / "usage"
EXPECTED = json.loads((CASES / "expected.json").read_text())


def tap_for(name: str) -> BodyUsage | StreamUsage:
    """The tap for a recording, by its kind."""
    return StreamUsage() if name.endswith(".sse") else BodyUsage()


def expected(name: str) -> Usage | None:
    """What the recording used."""
    counts = EXPECTED[name]["usage"]
    return None if counts is None else Usage(**counts)


def tapped(name: str, *pieces: bytes) -> Usage | None:
    """What the tap says after these pieces."""
    tap = tap_for(name)
    for piece in pieces:
        assert tap.feed(piece) is piece
    assert tap.flush() == b""
    return tap.usage


def cuts(data: bytes) -> list[int]:
    """Each place about the last `usage`, and every 11th of the others. `python -m loadtest ledger` tries them all."""
    near = data.rfind(b'"usage"')
    return sorted({*range(0, len(data) + 1, 11), *range(max(0, near - 10), min(len(data), near + 60))})


def test_there_are_twenty_recordings():
    """Each file has an expectation and the other way round."""
    assert len(EXPECTED) == 20
    assert {path.name for path in CASES.iterdir()} == {*EXPECTED, "expected.json"}


@pytest.mark.parametrize("name", EXPECTED)
def test_usage_lost_when_an_event_straddles_reads(name: str):
    """Envoy AI gateway 2162: cut in two, and fed by bytes, a recording used what it used."""
    data = (CASES / name).read_bytes()
    assert tapped(name, data) == expected(name)
    assert tapped(name, *(data[at : at + 1] for at in range(len(data)))) == expected(name)
    wrong = [at for at in cuts(data) if tapped(name, data[:at], data[at:]) != expected(name)]
    assert wrong == []


@settings(deadline=None)
@given(st.sampled_from(sorted(EXPECTED)), st.lists(st.integers(0, 5000), max_size=12))
def test_cut_anywhere_any_number_of_times(name: str, where: list[int]):
    """The result does not depend on how the bytes are split."""
    data = (CASES / name).read_bytes()
    edges = [0, *sorted(min(cut, len(data)) for cut in where), len(data)]
    assert tapped(name, *(data[a:b] for a, b in itertools.pairwise(edges))) == expected(name)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)  # JSON has neither
    | st.text(max_size=6)
    | st.just("usage"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["usage", "response", "message", 'a"b', "prompt_tokens", "é", "\\"]), inner, max_size=4
        )
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(JSON, st.integers(1, 7), st.booleans())
def test_the_skimmer_agrees_with_a_json_reader(value: object, size: int, spaced: bool):
    """Whatever the JSON holds, the tap finds the `usage` at the top, in `response` or `message`, and nothing else."""
    text = json.dumps(value, indent=1 if spaced else None).encode()
    tap = BodyUsage()
    for at in range(0, len(text), size):
        tap.feed(text[at : at + size])
    wanted = before = None
    if isinstance(value, dict):  # in the order of the text: the last one counts
        for key, member in value.items():
            around = key in ("response", "message") and isinstance(member, dict)
            found = usage_of(member if key == "usage" else member.get("usage") if around else None, before)
            if key == "message":
                before = found or before
            else:
                wanted = found or wanted
    assert tap.usage == wanted


def test_a_text_that_nobody_asked_about_counts_when_the_next_one_begins():
    """A whole text is decoded late, but not forgotten for another one, of a later event."""
    tap = BodyUsage()
    tap.feed(b'{"usage":{"prompt_tokens":2,"completion_tokens":3}}')
    tap.reset()
    tap.feed(b'{"choices":[]}')
    assert tap.usage == Usage(2, 3)


TOKENS = [
    *"{}[]:,\"\\ \n",
    *('"usage"', '"us\\u0061ge"', '"response"', '"message"', '"x"', "null", "1"),
    *('{"prompt_tokens":2}', '{"prompt_tokens":"\\ud800"}', '{"prompt_tokens":2,"completion_tokens":3}'),
    *('"prompt_tokens":6', '"completion_tokens":7.0', '"input_tokens":8'),
    *('"prompt_tokens_details":{"cached_tokens":9}', '"input_tokens_details":{"cached_tokens":10}'),
    *('"prompt_tokens_details":null', '"completion_tokens_details":{"reasoning_tokens":null}'),
    *('{"usage":{"prompt_tokens":3}}', '"usage":{"completion_tokens":4}', '{"response":{"usage":{"prompt_tokens":5}}}'),
]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(TOKENS), max_size=12), st.integers(1, 9), st.booleans())
def test_a_text_in_one_piece_counts_as_it_does_in_many(tokens: list[str], size: int, within: bool):
    """JSON or not: what is read at once, where a text comes whole, is what the skimmer finds in its bytes; so it is for
    a text behind it."""
    text = "".join(tokens).encode()
    text = b'{"a":%b}\n' % text if within else text
    whole, parts = BodyUsage(), BodyUsage()
    for _ in range(2):
        whole.feed(text)
        for at in range(0, len(text), size):
            parts.feed(text[at : at + size])
        assert whole.usage == parts.usage


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.lists(st.sampled_from(TOKENS), max_size=8), st.booleans()), max_size=4), st.data())
def test_texts_one_behind_another_count_however_they_come(texts: list[tuple[list[str], bool]], data: st.DataObject):
    """Each of them may be read at once, or be asked about before more comes, and leaves the next one as it was."""
    pieces = [('{"a":' + "".join(tokens) + "}" if within else "".join(tokens)).encode() for tokens, within in texts]
    several, parts = BodyUsage(), BodyUsage()
    for piece in pieces:
        assert several.feed(piece) is piece
        for at in piece:
            parts.feed(bytes([at]))
        if data.draw(st.booleans()):
            assert several.usage == parts.usage
    assert several.usage == parts.usage


@pytest.mark.parametrize("before", [0, 5, 9000])
@pytest.mark.parametrize("behind", [0, 5, 9000])
def test_a_usage_of_eight_kilobytes_in_one_piece_counts_as_in_two(before: int, behind: int):
    """Up to the bound, at it and beyond it, and whatever stands before and behind it."""
    counted = set()
    for blanks in (0, *range(USAGE_BYTES - 60, USAGE_BYTES + 20)):
        value = b'{"prompt_tokens":1,%b"completion_tokens":2}' % (b" " * blanks)
        text = b'{"x":"%b","usage":%b,"y":"%b"}' % (b"x" * before, value, b"y" * behind)
        whole, parts = BodyUsage(), BodyUsage()
        whole.feed(text)
        parts.feed(text[:-1])
        parts.feed(text[-1:])
        assert whole.usage == parts.usage == (Usage(1, 2) if len(value) <= USAGE_BYTES else None)
        counted.add(whole.usage)
    assert counted == {None, Usage(1, 2)}


COUNTS = st.sampled_from(["0", "3", "3.0", "-1", "9007199254740992", "null", "true", '"3"', "1e2"])
DETAILS = st.one_of(
    st.sampled_from(["null", "[]", "{}", "3"]),
    st.builds('{{"{}":{}}}'.format, st.sampled_from(["cached_tokens", "reasoning_tokens", "x"]), COUNTS),
)
NAMES = ["prompt_tokens", "completion_tokens", "input_tokens", "output_tokens"]
MEMBERS = st.one_of(
    st.builds('"{}":{}'.format, st.sampled_from(NAMES), COUNTS),
    st.builds('"{}_details":{}'.format, st.sampled_from(NAMES), DETAILS),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(MEMBERS, max_size=7), st.booleans())
def test_a_usage_in_one_piece_has_the_counts_that_it_has_in_two(members: list[str], usual: bool):
    """Whatever stands in a `usage`, twice or of a kind that it should not be, counts the same, read at once or not."""
    members = ['"prompt_tokens":1', '"completion_tokens":2', *members] if usual else members
    text = b'{"id":"x","usage":{%b}}' % ",".join(members).encode()
    whole, parts = BodyUsage(), BodyUsage()
    whole.feed(text)
    parts.feed(text[:1])
    parts.feed(text[1:])
    assert whole.usage == parts.usage


def test_a_long_usage_is_kept_to_the_same_byte_in_one_piece():
    """The bound on a `usage` is the same, whether its text comes whole or in parts."""
    for blanks in (USAGE_BYTES // 2, *range(USAGE_BYTES - 60, USAGE_BYTES)):
        text = b'{"usage":{"completion_tokens":0,"prompt_tokens":%b7}}' % (b" " * blanks)
        whole, parts = BodyUsage(), BodyUsage()
        whole.feed(text)
        parts.feed(text[:3])
        parts.feed(text[3:])
        assert whole.usage == parts.usage
        assert (whole.usage is None) == (blanks + len(b'{"completion_tokens":0,"prompt_tokens":7}') > USAGE_BYTES)


@pytest.mark.parametrize(
    ("text", "usage"),
    [
        ("{}", None),
        ('{"seconds": 3}', None),
        ("[1]", None),
        ('{"prompt_tokens": true, "completion_tokens": -1}', None),
        ('{"prompt_tokens": 9e99, "completion_tokens": "3"}', None),
        ('{"prompt_tokens": 3.0}', Usage(prompt=3)),
        ('{"output_tokens": 4, "output_tokens_details": null}', Usage(completion=4)),
        ('{"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 1}}', Usage(1, 0, 1)),
        ('{"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": -1}}', Usage(1)),
        ('{"prompt_tokens": 7, "completion_tokens": 3.5}', None),
        ('{"prompt_tokens": null, "input_tokens": 7, "completion_tokens": null}', Usage(7)),
        ('{"input_tokens": 5, "output_tokens": 2, "cache_read_input_tokens": 30}', Usage(35, 2, 30)),
        ('{"prompt_tokens": 35, "output_tokens": 2, "cache_read_input_tokens": 30}', Usage(35, 2)),
        ('{"input_tokens": 5, "cache_creation_input_tokens": 8, "cache_read_input_tokens": null}', Usage(13)),
    ],
)
def test_what_counts_as_usage(text: str, usage: Usage | None):
    """Whole numbers of tokens by their usual names; anything else is no usage, and no error."""
    assert usage_of(json.loads(text)) == usage


@pytest.mark.parametrize("tap", [BodyUsage, StreamUsage])
def test_one_absurd_count_ended_the_gateway(tap: type[BodyUsage | StreamUsage]):
    """A count that no model reaches is none, in one piece or in many: at a price it would go beyond the ledger's 64
    bits, and the limits'."""
    text = '{"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 1000000000}}'
    data = text.encode() if tap is BodyUsage else b"data: " + text.encode() + b"\n\n"
    whole, parts = tap(), tap()
    whole.feed(data)
    for at in range(len(data)):
        parts.feed(data[at : at + 1])
    assert whole.usage is parts.usage is None
    assert usage_of({"prompt_tokens": 999_999_999}) == Usage(999_999_999)
    dearest = Tariff(Price("m", input=MOST_PRICE, output=MOST_PRICE, request=MOST_PRICE))
    assert dearest.cost(999_999_999, 999_999_999) < 2**62


def test_nothing_of_a_body_passes_unseen():
    """Of a JSON body each piece is fed; of a stream, between two events, what says nothing of its usage need not be."""
    event = b'data: {"usage":null}\n\n'
    assert not BodyUsage().passes(event, 0, len(event))
    tap = StreamUsage()
    assert tap.passes(event, 0, len(event))
    assert not tap.passes(event, 0, len(event) - 1)
    tap.feed(event[:9])
    assert not tap.passes(event, 0, len(event))


def test_the_prompt_of_a_messages_stream_was_counted_as_none():
    """Anthropic's Messages tell the prompt at the beginning, within `message`, and the answer at the end: both count,
    in one piece or in many, and a prompt that the end repeats counts once."""
    begin = 'event: message_start\ndata: {"type":"message_start","message":{"id":"m","usage":{"input_tokens":25,'
    begin += '"cache_read_input_tokens":100,"output_tokens":1}}}\n\n'
    end = 'event: message_delta\ndata: {"type":"message_delta","delta":{},"usage":{%s"output_tokens":15}}\n\n'
    for more in ("", '"input_tokens":25,"cache_read_input_tokens":100,'):
        data = (begin + end % more).encode()
        whole, parts = StreamUsage(), StreamUsage()
        whole.feed(data)
        for at in range(len(data)):
            parts.feed(data[at : at + 1])
        assert whole.usage == parts.usage == Usage(125, 15, 100)
    cut = StreamUsage()
    cut.feed(begin.encode())
    assert cut.usage is None  # what was generated is not known: an estimate, and it says so


def test_a_broken_usage_is_no_usage():
    """What is not JSON is passed over, and the next one counts."""
    tap = StreamUsage()
    tap.feed(b'data: {"usage": {"prompt_tokens": oops}}\n\n')
    assert tap.usage is None
    tap.feed(b'data: {"usage": {"prompt_tokens": 3}}\n\n')
    assert tap.usage == Usage(3)


def test_a_huge_usage_is_not_kept():
    """A `usage` beyond 8 KiB is given up, so that memory is bounded; what comes behind it is found."""
    tap = BodyUsage()
    tap.feed(b'{"usage": {"x": "')
    for _ in range(100):
        tap.feed(b"y" * USAGE_BYTES)
        assert tap._kept is None or len(tap._kept) <= 2 * USAGE_BYTES
    tap.feed(b'"}, "usage": {"prompt_tokens": 1}}')
    assert tap.usage == Usage(1)


def test_a_five_megabyte_line_is_passed_over():
    """gateways.md C15: a tool call or an image of 5 MiB in one `data:` line costs the tap a few bytes, and then it goes
    on."""
    tap = StreamUsage()
    for piece in (b'data: {"choices":[{"delta":{"content":"', *[b"A" * 65_536] * 80, b'"}}],"usage":null}\n\n'):
        tap.feed(piece)
        assert len(tap._body._name) <= 12
    tap.feed(b'data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":1}}\n\n')
    assert tap.usage == Usage(2, 1)


def test_a_usage_in_the_text_is_no_usage():
    """What the model writes, however much it looks like a usage, is text."""
    tap = StreamUsage()
    text = json.dumps({"choices": [{"delta": {"content": '"usage": {"prompt_tokens": 7}'}}]}).encode()
    tap.feed(b"data: " + text + b"\n\ndata: " + text)
    tap.feed(b"\n\nretry: 5\n\n")
    assert tap.usage is None


def test_an_object_over_several_data_lines_is_one():
    """Lines of one event belong together, whether they end with LF, CR or both."""
    for end in (b"\n", b"\r", b"\r\n"):
        text = end.join([b'data: {"usage":', b'data: {"prompt_tokens":', b"data: 5}}", b"", b""])
        for cut in range(len(text)):
            assert tapped(".sse", text[:cut], text[cut:]) == Usage(5), (end, cut)
