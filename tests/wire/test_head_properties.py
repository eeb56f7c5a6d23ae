"""Head readers and writers, for any bytes: one verdict at any split; what is written equals h11's bytes."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_driving import CUTS, bytewise, cut, request, response_of, verdict_of

from canal_trio.errors import CanalError, Failure
from canal_trio.messages import Headers, RequestHead, ResponseHead
from canal_trio.wire import heads
from canal_trio.wire.heads import RequestHeadReader, write_request_head, write_response_head
from canal_trio.wire.scan import REQUEST_HEAD, RESPONSE_HEAD, Fault

TOKENS = st.text("!#$%&'*+-.^_`|~0123456789ABCXYZabcxyz", min_size=1, max_size=12).map(str.encode)
VALUES = st.binary(max_size=20).map(lambda raw: bytes(byte for byte in raw if byte >= 0x20 and byte != 0x7F).strip())
NAMES = TOKENS.filter(lambda name: name.lower() not in (b"host", b"content-length", b"transfer-encoding"))
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=6)
PATHS = st.text("abc/?&=%20.~-_:@!$'()*+,;", max_size=20).map(lambda text: b"/" + text.encode())

PARTS = st.sampled_from(
    [
        b"GET",
        b"POST",
        b" ",
        b"/",
        b"*",
        b"http://a/",
        b" HTTP/1.1",
        b" HTTP/1.0",
        b" HTTP/2.0",
        b"\r\n",
        b"\n",
        b"\r",
        b":",
        b"Host: a",
        b"Host:",
        b"X-A: b",
        b"Content-Length: 5",
        b"Transfer-Encoding: chunked",
        b"\t",
        b"\x00",
        b"\x80",
        b"a",
        b"GET / HTTP/1.1\r\nHost: a\r\n",
        b"\r\n\r\n",
    ]
)


@given(parts=st.lists(PARTS, max_size=14), positions=CUTS)
@settings(deadline=None, max_examples=250)
def test_verdicts_do_not_depend_on_splits(parts: list[bytes], positions: list[int]) -> None:
    """Whatever the bytes are: one verdict, whole, byte by byte and cut anywhere; nothing but verdicts comes out."""
    data = b"".join(parts)
    verdict = verdict_of([data])
    assert verdict_of(bytewise(data)) == verdict
    assert verdict_of(cut(data, positions)) == verdict


@given(data=st.binary(max_size=80), positions=CUTS)
@settings(deadline=None)
def test_garbage_makes_failures_not_exceptions(data: bytes, positions: list[int]) -> None:
    """Any bytes at all, to both readers."""
    assert verdict_of(cut(data, positions)) == verdict_of([data])
    response_of(data)
    response_of(b"HTTP/1.1 200 OK\r\n" + data)


@given(method=TOKENS, target=PATHS, fields=FIELDS, positions=CUTS)
@settings(deadline=None)
def test_request_heads_are_written_as_h11_writes_them(
    method: bytes, target: bytes, fields: list[tuple[bytes, bytes]], positions: list[int]
) -> None:
    """Our bytes are h11's (which puts Host first wherever it stands), and read back they are the same head."""
    head = RequestHead(method, target, Headers([(b"Host", b"a.test"), *fields]))
    event = h11.Request(method=method, target=target, headers=list(head.headers))
    assert write_request_head(head) == h11.Connection(h11.CLIENT).send(event)
    names = [name.lower() for name, _ in fields]
    if method not in (b"CONNECT", b"TRACE") and len(set(names)) == len(names):
        assert verdict_of(cut(write_request_head(head), positions)) == head


@given(status=st.integers(200, 599), reason=VALUES, fields=FIELDS)
@settings(deadline=None)
def test_response_heads_are_written_as_h11_writes_them(
    status: int, reason: bytes, fields: list[tuple[bytes, bytes]]
) -> None:
    """Our bytes are h11's, and read back they are the same head."""
    fields = [(name, value) for name, value in fields if name.lower() != b"connection"]
    head = ResponseHead(status, Headers([(b"Content-Length", b"0"), *fields]), reason)
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(request())
    connection.next_event()
    event = h11.Response(status_code=status, reason=reason, headers=list(head.headers))
    assert write_response_head(head) == connection.send(event)
    assert response_of(write_response_head(head)) == head


def test_informational_heads_are_written_as_h11_writes_them() -> None:
    """A 103 goes out as h11 would send it."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(request())
    connection.next_event()
    event = h11.InformationalResponse(status_code=103, reason=b"Early Hints", headers=[(b"Link", b"</a>")])
    head = ResponseHead(103, Headers([(b"Link", b"</a>")]), b"Early Hints")
    assert write_response_head(head) == connection.send(event)


EVIL = st.one_of(
    st.binary(max_size=8),
    st.sampled_from(
        [b"a\r\nb: c", b"a: b", b"a\r\n\r\nGET /", b"\n", b"\r", b"\x00", b"a b", b"", b"a:", b"x HTTP/1.1\r\nY:"]
    ),
)


@given(method=EVIL, target=EVIL, name=EVIL, value=EVIL)
@settings(deadline=None, max_examples=200)
def test_nothing_can_be_smuggled_through_a_request_head(
    method: bytes, target: bytes, name: bytes, value: bytes
) -> None:
    """Any bytes in any part: refused, or one head with exactly these parts, or one that our own reader refuses."""
    for head in (
        RequestHead(method, b"/", Headers([(b"Host", b"a")])),
        RequestHead(b"GET", target, Headers([(b"Host", b"a")])),
        RequestHead(b"GET", b"/", Headers([(b"Host", b"a"), (name, b"v")])),
        RequestHead(b"GET", b"/", Headers([(b"Host", b"a"), (b"n", value.strip(b" \t"))])),
    ):
        try:
            block = write_request_head(head)
        except CanalError:
            continue
        verdict = verdict_of([block])
        assert verdict == head or isinstance(verdict, Failure)


@given(name=EVIL, value=EVIL, reason=EVIL)
@settings(deadline=None, max_examples=200)
def test_nothing_can_be_smuggled_through_a_response_head(name: bytes, value: bytes, reason: bytes) -> None:
    """The same for responses."""
    for head in (
        ResponseHead(200, Headers([(name, b"v")])),
        ResponseHead(200, Headers([(b"n", value.strip(b" \t"))])),
        ResponseHead(200, Headers(), reason),
    ):
        try:
            block = write_response_head(head)
        except CanalError:
            continue
        verdict = response_of(block)
        assert verdict == head or isinstance(verdict, Failure)


@pytest.mark.parametrize("bad", [b"a\r\nX: b", b"a\nb", b"a\rb", b"a\x00b", b"a\x1fb", b"a\x7fb"])
def test_control_bytes_are_never_written(bad: bytes) -> None:
    """CR, LF, NUL and the other control bytes are refused in every part."""
    for head in (
        RequestHead(bad, b"/"),
        RequestHead(b"GET", bad),
        RequestHead(b"GET", b"/", Headers([(bad, b"v")])),
        RequestHead(b"GET", b"/", Headers([(b"n", bad)])),
    ):
        with pytest.raises(CanalError):
            write_request_head(head)
    for answer in (ResponseHead(200, reason=bad), ResponseHead(200, Headers([(b"n", bad)])), ResponseHead(99)):
        with pytest.raises(CanalError):
            write_response_head(answer)


# -- without h11 -------------------------------------------------------------------------------------------------------

NAMES_THAT_MATTER = st.sampled_from(
    [b"Host", b"host", b"Content-Length", b"CONTENT-LENGTH", b"Transfer-Encoding", b"Connection", b"X-A", b"Upgrade"]
)
VALUES_THAT_MATTER = st.sampled_from(
    [*b"a.test 5 05 5,5 +5 chunked Chunked gzip,chunked close a:b \xff".split(), b"", b"5, 5", b" \t ", b"x\ty"]
    + [b"9" * digits for digits in (18, 19, 25)]
)
LINES = st.lists(
    st.tuples(
        TOKENS | NAMES_THAT_MATTER, st.sampled_from([b":", b": ", b":\t "]), VALUES | VALUES_THAT_MATTER,
        st.sampled_from([b"", b" ", b"\t"]),
    ).map(b"".join),
    max_size=7,
)  # fmt: skip


@given(method=TOKENS, target=PATHS, version=st.sampled_from([b"1.1", b"1.0"]), lines=LINES, host=st.booleans())
@settings(deadline=None, max_examples=400)
def test_request_heads_without_h11(
    method: bytes, target: bytes, version: bytes, lines: list[bytes], host: bool
) -> None:
    """What is read without h11 is what h11 reads; where they might differ h11 is asked."""
    start = b"%b %b HTTP/%b" % (method, target, version)
    block = b"\r\n".join([start, *([b"Host: a.test"] if host else []), *lines, b"", b""])
    if REQUEST_HEAD.fullmatch(block) is not None:
        plain = heads._plain_request(block)
        assert plain is None or plain == heads._h11_request(block)


@given(
    status=st.integers(200, 599),
    reason=st.sampled_from([b" OK", b" ", b"", b" a b\xff", b"  x "]),
    version=st.sampled_from([b"1.1", b"1.0"]),
    lines=LINES,
)
@settings(deadline=None, max_examples=400)
def test_response_heads_without_h11(status: int, reason: bytes, version: bytes, lines: list[bytes]) -> None:
    """The same for an upstream's heads."""
    block = b"\r\n".join([b"HTTP/%b %d%b" % (version, status, reason), *lines, b"", b""])
    if RESPONSE_HEAD.fullmatch(block) is not None:
        plain = heads._plain_response(block)
        assert plain is None or plain == heads._h11_response(block)


def test_usual_heads_need_no_h11() -> None:
    """The heads of the SDKs and of inference servers take the short way: otherwise it would be there for nothing."""
    block = request(b"Content-Length: 5", b"Accept: */*", first=b"POST /v1/x HTTP/1.1")
    assert heads._plain_request(block) is not None
    for framing in (b"Content-Length: 5", b"Transfer-Encoding: chunked"):
        assert heads._plain_response(b"HTTP/1.1 200 OK\r\n%b\r\nServer: x\r\n\r\n" % framing) is not None
    assert isinstance(heads._h11_request(b"GET / HTTP/1.1\r\n\r\n"), Fault)


def test_a_head_seen_before_is_the_same_head() -> None:
    """The very head is answered again for equal bytes, and another one for others, refused ones too."""
    reader = RequestHeadReader(head_bytes=1000, head_fields=10, target_bytes=100)
    first, other = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /b HTTP/1.1\r\nHost: a\r\n\r\n"
    seen = []
    for block in (first, first, other, first):
        seen.append(reader.feed(block + b"rest"))
        assert reader.rest() == b"rest"
    assert seen[0] is seen[1]
    assert seen[0] == seen[3] != seen[2]
    assert isinstance(reader.feed(b"TRACE /a HTTP/1.1\r\nHost: a\r\n\r\n"), Failure)
