"""Event streams: the parser against the WHATWG cases, the scanner against the parser."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_driving import CUTS, by_name, bytewise, cut, load_cases

from canal_trio.wire.sse import BlindScanner, Event, EventParser, EventScanner

CASES = load_cases("sse_cases.json")
OPENROUTER = (
    b'data: {"id":"gen-1","object":"chat.completion.chunk","created":1,"model":"m","provider":"p","error":{"code":502,'
    b'"message":"Provider disconnected"},"choices":[{"index":0,"delta":{"content":""},"finish_reason":"error"}]}\n\n'
)
TERMINAL_EVENTS = ["response.completed", "response.failed", "response.incomplete"]


def raw(case: dict[str, Any]) -> bytes:
    """The bytes of the stream."""
    text: str = case["raw"]
    return text.encode("latin-1")


def parse(reads: Any) -> tuple[list[Event], str, int | None]:
    """Events, last event id and reconnection time."""
    parser = EventParser()
    events = [event for read in reads for event in parser.feed(read)]
    return events, parser.last_event_id, parser.retry


def scan(reads: Any) -> tuple[int, bool, bool, bool]:
    """What the scanner knows after `reads`."""
    scanner = EventScanner()
    for read in reads:
        scanner.feed(read)
    return scanner.events, scanner.at_boundary, scanner.terminal, scanner.error


def cut_positions(data: bytes) -> range:
    """Every position, or a hundred of them where there are many."""
    return range(0, len(data), 1 + len(data) // 100 if len(data) > 300 else 1)


def expected(case: dict[str, Any]) -> tuple[list[Event], str, int | None]:
    """What the case says."""
    events = [Event(**event) for event in case["events"]]
    return events, case["final"]["last_event_id"], case["final"]["retry"]


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_sse_case(case: dict[str, Any]) -> None:
    """The parser finds the events of the case, whole, in its reads, byte by byte and at every cut."""
    data = raw(case)
    right = expected(case)
    assert parse([data]) == right
    assert parse(bytewise(data)) == right
    assert parse([read.encode("latin-1") for read in case.get("reads", [case["raw"]])]) == right
    for position in cut_positions(data):
        assert parse([data[:position], data[position:]]) == right


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_the_scanner_counts_the_events_of_a_case(case: dict[str, Any]) -> None:
    """The scanner counts what the parser dispatches, at every cut."""
    data = raw(case)
    seen = scan([data])
    assert seen[0] == len(case["events"])
    assert scan(bytewise(data)) == seen
    for position in cut_positions(data):
        assert scan([data[:position], b"", data[position:]]) == seen


LINES = st.sampled_from(
    [
        b'data: {"id":"1","choices":[]}',
        b"data: [DONE]",
        b"data:[DONE] \t",
        b"data: [DONE]x",
        b"data:  [DONE]",
        b'data: {"error": {"message":"x"}}',
        b'data: {"error":null}',
        b'data: { "error" : "x"}',
        b'data: {"errors":1}',
        b'data: {"id":"1","error":{"code":502},"choices":[]}',
        b'data: {"id":"1","error":',
        b'data: {"a":[{',
        b'data:"error": {"a":1}}',
        b'data: "x" } ] }',
        b'data: "type":"error"',
        b'data: {"a":{"error":{"code":1}},"b":"{\\"error\\":{\\"a\\":1}}"}',
        b'data: {"id":"1","error":{},"x":{"error":"x"}}',
        b'data: {"id":"1","error":null:{"a":1}}',
        b'data: {"type":"response.failed","response":{"error":null}}',
        b'data: {"sequence_number":1,"type":"response.completed"}',
        b'data: {"type":"response.created","type":"response.completed"}',
        b'data: {"type":"x","error":"' + b"z" * 2_100 + b'"}',
        b"data",
        b"data:",
        b": comment",
        b":",
        b"event: error",
        b"event: response.completed",
        b"event:response.failed",
        b"event: response.incomplete",
        b"event: response.output_text.delta",
        b"event",
        b"error: {}",
        b"error",
        b"id: 1",
        b"retry: 5",
        b"\xef\xbb\xbfdata: x",
        b"\xef",
        b"x" * 200,
        b"data: " + b"y" * 200,
        b"",
    ]
)
STREAMS = st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n"]))).map(
    lambda lines: b"".join(line + end for line, end in lines)
)
USUAL_STREAMS = st.lists(
    st.sampled_from(
        [
            b'data: {"id":1}\n\n',
            b'event: response.output_text.delta\ndata: {"type":"x"}\n\n',
            b'event: response.completed\ndata: {"type":"x"}\n\n',
            b'event: error\ndata: {"type":"error"}\n\n',
            b'data: {"error":{"message":"x"}}\n\n',
            b'data: {"error_code":1}\n\n',
            b'data: {"id":1,"error":{"code":502},"choices":[]}\n\n',
            b'data: {"id":1,"error":null,"item":{"error":{"code":1}}}\n\n',
            b'data: {"id":1,"error":null:{"code":1},"x":"%b"}\n\n' % (b"z" * 2_100),
            b'data: {"type":"response.failed","response":{}}\n\n',
            b'data: {"response":{},"type":"response.completed"}\n\n',
            b'data: {"type":"response.created","type":"response.completed"}\n\n',
            b'data: {"type":"error","message":"x"}\n\n',
            b"data: [DONE]\n\n",
            b": ping\n",
            b": ping\n\n",
            b'data: {"a":1}\rdata: b\n\n',
            b'data: {"a":1}\r\rdata: {"b":2}\n\n',
            b"\n",
            b"data: x\n\r\n",
        ]
    )
)


@given(data=STREAMS, positions=CUTS)
@settings(deadline=None)
def test_the_scanner_knows_the_same_at_any_split(data: bytes, positions: list[int]) -> None:
    """What the scanner knows depends on the bytes only, and its count is the parser's."""
    seen = scan([data])
    assert scan(bytewise(data)) == seen
    assert scan(cut(data, positions)) == seen
    assert parse(cut(data, positions)) == parse([data])
    assert seen[0] == len(parse([data])[0])


@given(pieces=USUAL_STREAMS)
@settings(deadline=None)
def test_whole_events_are_scanned_as_their_bytes_are(pieces: list[bytes]) -> None:
    """The straight line for whole events gives what looking at every byte gives."""
    data = b"".join(pieces)
    assert scan(pieces) == scan(bytewise(data)) == scan([data])
    assert scan(pieces)[0] == len(parse([data])[0])


@given(pieces=USUAL_STREAMS, positions=CUTS)
@settings(deadline=None)
def test_bursts_are_scanned_as_their_bytes_are(pieces: list[bytes], positions: list[int]) -> None:
    """Reads that hold many events, cut inside some of them, too."""
    data = b"".join(pieces)
    assert scan(cut(data, positions)) == scan(bytewise(data))


@given(data=st.binary(max_size=60), positions=CUTS)
@settings(deadline=None)
def test_any_bytes_can_be_scanned_and_parsed(data: bytes, positions: list[int]) -> None:
    """Garbage raises nothing and is read alike at any split."""
    assert scan(cut(data, positions)) == scan([data])
    assert parse(cut(data, positions)) == parse([data])


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_boundaries(end: bytes) -> None:
    """The boundary is where something of our own may be put: before the first byte, after an event, after a comment."""
    scanner = EventScanner()
    trail = []
    for read in (b"", b": pi", b"ng" + end, b"data: a", end, end, b":" + end, b"id: 1" + end, end, end):
        scanner.feed(read)
        trail.append(scanner.at_boundary)
    assert trail == [True, False, True, False, False, True, True, False, True, True]
    assert scanner.events == 1


def test_a_byte_order_mark_is_not_an_event() -> None:
    """Inside the mark nothing may be put; behind it, everything may."""
    scanner = EventScanner()
    trail = []
    for read in (b"\xef", b"\xbb", b"\xbf", b"data: a\n\n"):
        scanner.feed(read)
        trail.append((scanner.at_boundary, scanner.events))
    assert trail == [(False, 0), (False, 0), (True, 0), (True, 1)]


@pytest.mark.parametrize("name", TERMINAL_EVENTS)
def test_the_last_event_of_the_responses_api_is_terminal(name: str) -> None:
    """`response.completed`, `.failed` and `.incomplete` end a stream as `[DONE]` does; the second one is an error."""
    event = f'event: {name}\ndata: {{"type":"{name}"}}\n\n'.encode()
    before = b'event: response.created\ndata: {"x":1}\n\n'
    assert scan([before]) == (1, True, False, False)
    assert scan([before, event]) == scan(bytewise(before + event)) == (2, True, True, name == "response.failed")


@pytest.mark.parametrize(
    ("stream", "terminal", "error"),
    [
        (b"data: [DONE]\n\n", True, False),
        (b"data:[DONE]\r\n\r\n", True, False),
        (b"data: [DONE]  \n", True, False),
        (b"data: [DONE]", False, False),
        (b"data: [DONE] x\n\n", False, False),
        (b'data: {"error":{"message":"x"}}\n\n', False, True),
        (b'data: {"error": "x"}\n\n', False, True),
        (b'data: {"error":null,"id":1}\n\n', False, False),
        (b'data: {"text":"{\\"error\\": {"}\n\n', False, False),
        (b'event: error\ndata: {"type":"error"}\n\n', False, True),
        (b"error: {}\n\n", False, True),
        (b"event: errors\ndata: x\n\n", False, False),
        (b": data: [DONE]\n\n", False, False),
        (OPENROUTER, False, True),
        (b'data: {"id":1,"error":"x"}\n\n', False, True),
        (b'data: {"id":1, "error" : {"code":1}}\r\n\r\n', False, True),
        (b'data: {"id":1,\ndata: "error":\ndata: {"code":1}}\n\n', False, True),
        (b'data: {"id":1,"error":{"message":"never closed, but it says en', False, False),
        (b'data: {"id":1,"error":{"message":"never closed, but it says enough\n\n', False, True),
        (b'data: {"pad":"%b","error":{"code":1}}\n\n' % (b"x" * 5_000), False, True),
        (b'data: %b{"error":{"code":1}}\n\n' % (b" " * 5_000), False, True),
        (b'data: {"type":"%b","error":"x"}\n\n' % (b"x" * 100), False, True),
        (b'data: {"id":1,"error":null}\n\n', False, False),
        (b'data: {"id":1,"error":false}\n\n', False, False),
        (b'data: {"id":1,"error":""}\n\n', False, False),
        (b'data: {"id":1,"error":{ }}\n\n', False, False),
        (b'data: {"id":1,\ndata: "error":\ndata: {\ndata: }}\n\n', False, False),
        (b'data: {"id":1,"error":3}\n\n', False, False),
        (b'data: {"id":1,"error":[{"code":1}]}\n\n', False, False),
        (b'data: {"type":"response.output_item.done","item":{"type":"mcp_call","error":{"x":1}}}\n\n', False, False),
        (b'data: {"id":1,"arguments":"{\\"error\\":{\\"a\\":1}}"}\n\n', False, False),
        (b'data: {"id":1,"text":"x\\\\","x":[{"error":"x"}]}\n\n', False, False),
        (b'data: [{"error":{"a":1}}]\n\n', False, False),
        (b'data: {"id":1,"error\ndata:":{"code":1}}\n\n', False, False),
        (b'data: {"type":"response.created","type":"response.failed"}\n\n', False, False),
        (b'data: He said {"error": {"a":1}}\n\n', False, False),
        (b'data: He said "error": {"a":1}}\n\n', False, False),
        (b'data: {"type":"response.completed","response":{"error":null}}\n\n', True, False),
        (b'data: {"type":"response.completed","error":{"code":1}}\n\n', True, True),
        (b'data: {"type":"response.completed","x":1,}\n\n', True, False),
        (b'data: {"sequence_number":9,"type":"response.incomplete"}\n\n', True, False),
        (b'data: {"type":"response.failed","response":{"error":{"code":"x"}}}\n\n', True, True),
        (b'data: {"type":"error","message":"x","param":null}\n\n', False, True),
        (b'data: {"type":"response.failed.not"}\n\n', False, False),
        (b'data: {"id":1,"delta":{"type":"response.failed"}}\n\n', False, False),
        (b'data: {"id":1,"level":"error"}\n\n', False, False),
    ],
)
def test_notable_lines(stream: bytes, terminal: bool, error: bool) -> None:
    """Endings and in-band errors are seen, and nothing else is taken for one."""
    first = b'data: {"id":1}\n\n'
    for reads in ([stream], [first, stream], [first + stream], bytewise(first + stream)):
        assert scan(reads)[2:] == (terminal, error)


VALUES = st.recursive(
    st.none() | st.booleans() | st.sampled_from([3, "", "error", "response.failed", 'a"error":{"b":1}', "\\"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["error", "type", "id", 'a"error', "\\"]), inner, max_size=4)
    ),
    max_leaves=15,
)


@given(
    value=VALUES,
    spaced=st.sampled_from([None, 0, 1]),
    end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    padding=st.sampled_from([0, 3_000]),
    positions=CUTS,
)
@settings(deadline=None)
def test_an_error_is_where_a_json_reader_finds_one(
    value: object, spaced: int | None, end: bytes, padding: int, positions: list[int]
) -> None:
    """A member at the top of an object, whatever else there is, on one line or on many, and however it is cut."""
    if padding and isinstance(value, dict):
        value = {"padding": "x" * padding, **value}
    lines = json.dumps(value, indent=spaced).encode().split(b"\n")
    event = b"".join(b"data: " + line + end for line in lines) + end
    error, type_ = (value.get("error"), value.get("type")) if isinstance(value, dict) else (None, None)
    said = isinstance(error, dict | str) and len(error) > 0
    right = (1, True, type_ == "response.failed", said or type_ in ("error", "response.failed"))
    assert scan([event]) == scan(bytewise(event)) == scan(cut(event, positions)) == right


TOKENS = [
    *"{}[]:,\"\\ \n\r",
    *('"error"', '"type"', '"x"', "null", "1", '""', "{}", "\ndata:", "\n\ndata:", "\r\ndata: "),
    *('"error":', '"error" : {"code":1}', '"error":"x"', '"error":null', '"\\"error":{"code":1}'),
    *('"type":"error"', '"type" :"response.failed"', '"type":"response.completed",', '"id":{"error":"x"'),
    "x" * 2_100,
]


@given(
    start=st.sampled_from([b'data: {"id":1,', b'data: {"', b'event: x\ndata: {"type":"response.x",', b"data:"]),
    tokens=st.lists(st.sampled_from(TOKENS), max_size=14),
    positions=CUTS,
)
@settings(deadline=None, max_examples=300)
def test_data_that_is_no_json_is_scanned_alike_at_any_split(
    start: bytes, tokens: list[str], positions: list[int]
) -> None:
    """Whole events, behind one another and cut: the short way says of anything what looking at each byte says."""
    event = start + "".join(tokens).encode() + b"\n\n"
    first = b'data: {"id":1}\n\n'
    seen = scan(bytewise(first + event))
    assert scan([first, event]) == scan([first + event]) == scan(cut(first + event, positions)) == seen


def test_an_event_that_does_not_end_is_not_held() -> None:
    """An event of many lines costs the scanner two KiB at the most."""
    scanner = EventScanner()
    most = 0
    for _ in range(2_000):
        scanner.feed(b'data: {"id":"xxxx",\n')
        assert scanner._text is not None
        most = max(most, len(scanner._text._held or b""))
    assert 1_000 < most <= 2_048
    scanner.feed(b"\n")
    assert (scanner.events, scanner.error) == (1, False)


def test_two_events_with_carriage_returns_are_two() -> None:
    """What looks like one event of one line, to who minds line feeds only, is counted as a client counts it."""
    assert scan([b'data: {"id":1}\n\n', b'data: {"a":1}\r\rdata: {"b":2}\n\n'])[0] == 3


def test_a_long_line_is_not_kept() -> None:
    """A line of 5 MiB costs the scanner a few bytes, and the event is counted once."""
    scanner = EventScanner()
    scanner.feed(b"data: ")
    piece = b"x" * 65_536
    for _ in range(80):
        scanner.feed(piece)
    assert len(scanner._kept) < 128
    assert scanner._text is not None
    assert scanner._text._held is None
    assert not scanner.at_boundary
    scanner.feed(b"\n\n")
    assert (scanner.events, scanner.at_boundary) == (1, True)


def test_a_reconnection_time_of_any_length_is_no_trouble() -> None:
    """Thousands of digits are not turned into a number."""
    assert parse([b"retry: " + b"9" * 5_000 + b"\ndata: a\n\n"]) == ([Event("message", "a", "")], "", None)


def test_a_blind_scanner_counts_nothing() -> None:
    """What cannot be read has no events, no end and no place between two events."""
    scanner = BlindScanner()
    assert not scanner.at_boundary
    for piece in (b"data: 1\n\n", b"\n\n", b"data: [DONE]\n\n"):
        scanner.feed(piece)
        assert (scanner.events, scanner.terminal, scanner.error, scanner.at_boundary) == (0, False, False, False)
    assert EventScanner.legible
    assert not scanner.legible
