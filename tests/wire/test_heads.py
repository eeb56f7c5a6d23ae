"""Head readers: verdicts, limits and their places."""

from __future__ import annotations

import pytest
from wire_driving import bytewise, request, request_reader, response_of, response_reader, verdict_of

from canal_trio.errors import CanalError, Failure, Kind, Phase, Side
from canal_trio.messages import Headers, RequestHead, ResponseHead
from canal_trio.wire.heads import RequestHeadReader, ResponseHeadReader


def kind_of(data: bytes) -> Kind | None:
    """The kind of failure that `data` is, None if it is a head; whole and byte by byte alike."""
    verdict = verdict_of([data])
    assert verdict == verdict_of(bytewise(data))
    assert verdict is not None
    if isinstance(verdict, Failure):
        assert (verdict.side, verdict.phase) == (Side.CLIENT, Phase.HEAD)
        return verdict.kind
    return None


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_request_head_is_read_as_it_is() -> None:
    """Names keep their case, values lose the white space around them, order stays."""
    reader = request_reader()
    data = b"POST /v1/x?y HTTP/1.1\r\nHOST: a.test:8080\r\nx-A:\t v  w \r\nX-a:\r\nContent-Length: 3\r\n\r\nabcGET"
    fields = [(b"HOST", b"a.test:8080"), (b"x-A", b"v  w"), (b"X-a", b""), (b"Content-Length", b"3")]
    assert reader.feed(data) == RequestHead(b"POST", b"/v1/x?y", Headers(fields), b"1.1")
    assert reader.rest() == b"abcGET"


@pytest.mark.parametrize(
    ("first", "version"), [(b"GET / HTTP/1.1", b"1.1"), (b"GET / HTTP/1.0", b"1.0"), (b"GET / HTTP/1.7", b"1.1")]
)
def test_versions(first: bytes, version: bytes) -> None:
    """1.0 and 1.1 are themselves, a higher minor version is read as 1.1 (RFC 9110 2.5)."""
    head = verdict_of([request(first=first)])
    assert isinstance(head, RequestHead)
    assert head.version == version


REFUSED = {
    b"\x16": Kind.MALFORMED,  # a TLS handshake
    b" ": Kind.MALFORMED,
    b"GET\t": Kind.MALFORMED,
    b"\n": Kind.MALFORMED,
    b"\r\r": Kind.MALFORMED,
    b"\rG": Kind.MALFORMED,
    b"GET /\x00": Kind.MALFORMED,
    b"GET /\xc3": Kind.MALFORMED,
    b"GET  ": Kind.MALFORMED,
    b"GET /\r": Kind.MALFORMED,
    b"GET / h": Kind.MALFORMED,
    b"GET / HTTP/1.1\n": Kind.MALFORMED,
    b"GET / HTTP/1.1 ": Kind.MALFORMED,
    b"GET / HTTP/1.10": Kind.MALFORMED,
    b"GET / HTTP/1.\r": Kind.MALFORMED,
    b"GET / HTTP/2.0": Kind.UNSUPPORTED_VERSION,
    b"GET / HTTP/0.9": Kind.UNSUPPORTED_VERSION,
    b"GET / HTTP/1.1\r\n ": Kind.MALFORMED,
    b"GET / HTTP/1.1\r\n:": Kind.MALFORMED,
    b"GET / HTTP/1.1\r\nHost ": Kind.MALFORMED,
    b"GET / HTTP/1.1\r\nHost: a\n": Kind.MALFORMED,
    b"GET / HTTP/1.1\r\nHost: a\x7f": Kind.MALFORMED,
    b"GET / HTTP/1.1\r\nHost: a\r\r": Kind.MALFORMED,
    b"GET / HTTP/1.1\r\nHost: a\r\n\t": Kind.MALFORMED,
    b"GET / HTTP/1.1\r\nHost\r": Kind.MALFORMED,
    b"GET / HTTP/1.1\r\n\rX": Kind.MALFORMED,
    b"A" * 65: Kind.METHOD_NOT_ALLOWED,
}


@pytest.mark.parametrize("data", REFUSED, ids=repr)
def test_what_cannot_become_a_head_is_refused_at_once(data: bytes) -> None:
    """The first byte that breaks a head decides, and the byte before it does not."""
    reader = request_reader()
    position = next(at for at in range(len(data)) if reader.feed(data[at : at + 1]) is not None)
    assert kind_of(data) is REFUSED[data]
    assert position == len(data) - 1
    assert reader.feed(b"more") == reader.feed(b"") == reader.close()  # and there is no way back


@pytest.mark.parametrize(
    ("lines", "kind"),
    [
        ([b"Content-Length: 5", b"Content-Length: 5"], Kind.MALFORMED),
        ([b"Content-Length: 5, 5"], Kind.MALFORMED),
        ([b"Content-Length: 5,6"], Kind.MALFORMED),
        ([b"Content-Length: +5"], Kind.MALFORMED),
        ([b"Content-Length: 99999999999999999999"], Kind.MALFORMED),
        ([b"Content-Length: 9223372036854775808"], Kind.MALFORMED),
        ([b"Content-Length: 5", b"Transfer-Encoding: chunked"], Kind.MALFORMED),
        ([b"Transfer-Encoding: gzip"], Kind.UNSUPPORTED_CODING),
        ([b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"], Kind.UNSUPPORTED_CODING),
        ([b"Transfer-Encoding:"], Kind.UNSUPPORTED_CODING),
        ([b"Host: a.test"], Kind.MALFORMED),
        ([b"Authorization: Bearer a", b"authorization: Bearer a"], Kind.MALFORMED),
        ([b"X-Api-Key: a", b"x-api-key: b"], Kind.MALFORMED),
        ([b"Api-Key: a", b"X-Api-Key: b"], None),
        ([b"Transfer-Encoding: Chunked"], None),
        ([b"CONTENT-LENGTH:  07 "], None),
        ([b"Content-Length: 9223372036854775807"], None),
    ],
)
def test_what_fields_mean_is_judged(lines: list[bytes], kind: Kind | None) -> None:
    """Framing that two parsers could read differently is refused, and so are credentials given twice."""
    assert kind_of(request(*lines)) is kind


@pytest.mark.parametrize(
    ("first", "kind"),
    [
        (b"CONNECT a.test:443 HTTP/1.1", Kind.METHOD_NOT_ALLOWED),
        (b"TRACE / HTTP/1.1", Kind.METHOD_NOT_ALLOWED),
        (b"GET foo HTTP/1.1", Kind.MALFORMED),
        (b"FROB / HTTP/1.1", None),
        (b"OPTIONS * HTTP/1.1", None),
    ],
)
def test_methods_and_targets_are_judged(first: bytes, kind: Kind | None) -> None:
    """A method that is never relayed and a target that is none are refused by the reader already."""
    assert kind_of(request(first=first)) is kind


def test_transfer_encoding_needs_a_version_that_has_it() -> None:
    """HTTP/1.0 with Transfer-Encoding is faulty framing (RFC 9112 6.1)."""
    assert kind_of(request(b"Transfer-Encoding: chunked", first=b"POST / HTTP/1.0")) is Kind.MALFORMED


def test_a_host_is_needed_since_http_1_1() -> None:
    """No Host is malformed in any 1.x but 1.0."""
    assert kind_of(b"GET / HTTP/1.1\r\n\r\n") is Kind.MALFORMED
    assert kind_of(b"GET / HTTP/1.5\r\n\r\n") is Kind.MALFORMED
    assert kind_of(b"GET / HTTP/1.0\r\n\r\n") is None


def test_failures_do_not_quote_the_head() -> None:
    """Details go to logs and clients, so they hold nothing of what was sent."""
    for lines in ([b"Content-Length: sk-secret"], [b"Transfer-Encoding: sk-secret"], [b"Host: sk-secret"]):
        verdict = verdict_of([request(*lines)])
        assert isinstance(verdict, Failure)
        assert "sk-secret" not in str(verdict)


def limited(head: bytes, *, head_bytes: int = 10_000, fields: int = 100, target: int = 1_000) -> Kind | None:
    """The verdict of a reader with small limits, whole and byte by byte alike."""
    verdicts = []
    for reads in ([head], bytewise(head)):
        reader = RequestHeadReader(head_bytes=head_bytes, head_fields=fields, target_bytes=target)
        verdict = None
        for read in reads:
            if verdict is None:
                verdict = reader.feed(read)
        verdicts.append(verdict)
    assert verdicts[0] == verdicts[1]
    assert verdicts[0] is not None
    return verdicts[0].kind if isinstance(verdicts[0], Failure) else None


def test_limits_are_exact() -> None:
    """A head at a limit passes, one byte or one field more does not, and the rest behind it does not count."""
    head = request(b"X-A: 1", first=b"GET /1234 HTTP/1.1")
    rest = b"x" * 20_000
    assert limited(head + rest, head_bytes=len(head)) is None
    assert limited(head + rest, head_bytes=len(head) - 1) is Kind.HEAD_TOO_LARGE
    assert limited(head, fields=2) is None
    assert limited(head, fields=1) is Kind.HEAD_TOO_LARGE
    assert limited(head, target=5) is None
    assert limited(head, target=4) is Kind.TARGET_TOO_LONG
    assert limited(head.replace(b"HTTP/1.1", b"HTTP/1.4"), target=5) is None


def test_the_limit_that_is_passed_first_decides() -> None:
    """Two limits and a bad byte: the earlier position wins, at any split."""
    head = request(b"X-A: \x00", first=b"GET /123456789 HTTP/1.1")
    assert limited(head, head_bytes=12, target=6) is Kind.TARGET_TOO_LONG
    assert limited(head, head_bytes=9, target=6) is Kind.HEAD_TOO_LARGE
    assert limited(head, head_bytes=len(head), target=100) is Kind.MALFORMED
    assert limited(head, head_bytes=24, target=100) is Kind.HEAD_TOO_LARGE


def test_a_reader_reads_one_head_after_the_other() -> None:
    """`rest()` gives what came behind a head and makes the reader ready; feeding before it is a bug of the caller."""
    reader = request_reader()
    assert not reader.started
    assert isinstance(reader.feed(request() + b"\r\n" + request(first=b"GET /2 HTTP/1.1")), RequestHead)
    assert reader.started
    with pytest.raises(CanalError):
        reader.feed(b"x")
    rest = reader.rest()
    assert not reader.started
    second = reader.feed(rest)
    assert isinstance(second, RequestHead)
    assert second.target == b"/2"
    assert reader.close() is None
    assert reader.rest() == b""


def test_empty_lines_before_a_request_are_skipped_and_bounded() -> None:
    """Some are skipped (RFC 9112 2.2) and begin nothing; an endless row of them is refused."""
    reader = request_reader()
    for data in (b"\r\n", b"\r", b"\n", b"\r\n"):
        assert reader.feed(data) is None
        assert not reader.started
        assert reader.close() is None
    assert isinstance(reader.feed(b"\r\n" + request()), RequestHead)
    assert kind_of(b"\r\n" * 5) is Kind.MALFORMED


def test_eof_inside_a_request_head_is_malformed() -> None:
    """EOF before a head is silence, inside one it is a failure."""
    reader = request_reader()
    assert reader.close() is None
    assert reader.feed(b"GET / HT") is None
    failure = reader.close()
    assert failure is not None
    assert failure.kind is Kind.MALFORMED


# -- responses ---------------------------------------------------------------------------------------------------------


def test_informational_heads_come_one_by_one() -> None:
    """100, 103 and 101 are heads like any other; `rest()` leads to the next one."""
    reader = response_reader()
    data = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n"
    data += b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\nraw"
    statuses = []
    for _ in range(3):
        head = reader.feed(data)
        assert isinstance(head, ResponseHead)
        statuses.append(head.status)
        data = reader.rest()
    assert statuses == [100, 103, 101]
    assert data == b"raw"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"HTTP/1.1 200 OK", b"OK"),
        (b"HTTP/1.0 200 Fine \xe9", b"Fine \xe9"),
        (b"HTTP/1.1 200 ", b""),
        (b"HTTP/1.1 200", b""),
    ],
)
def test_status_lines(line: bytes, reason: bytes) -> None:
    """The reason may be anything or nothing, and its space may be missing."""
    head = response_of(line + b"\r\nContent-Length: 0\r\n\r\n")
    version = line[5:8]
    assert head == ResponseHead(200, Headers([(b"Content-Length", b"0")]), reason, version)


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0",
        b"\r\n",
        b"HTTP/1.1 99 OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1.1 600 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200 O\x00K\r\n",
        b"HTTP/1.1 200 OK\n",
        b"HTTP/1.1 200 OK\r\n folded",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 101 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"1" * 40_000 + b"\r\n\r\n",
    ],
)
def test_malformed_responses(data: bytes) -> None:
    """Whatever is wrong with an upstream's head is MALFORMED, the upstream's fault, and final."""
    failure = response_of(data)
    assert isinstance(failure, Failure)
    assert (failure.side, failure.phase, failure.kind) == (Side.UPSTREAM, Phase.FIRST_BYTE, Kind.MALFORMED)
    reader = response_reader()
    reader.feed(data)
    assert reader.feed(b"more") == reader.close() == failure


def test_a_response_reader_reads_one_head_after_the_other() -> None:
    """The same life as a request reader's, but EOF inside a head is a cut."""
    reader = ResponseHeadReader(head_bytes=100, head_fields=1)
    assert reader.feed(b"") is None
    assert not reader.started
    assert reader.close() is None
    assert isinstance(reader.feed(b"HTTP/1.1 200 OK\r\n\r\nbody"), ResponseHead)
    assert reader.started
    assert reader.close() is None
    with pytest.raises(CanalError):
        reader.feed(b"x")
    assert reader.rest() == b"body"
    assert reader.feed(b"HTTP") is None
    failure = reader.close()
    assert failure is not None
    assert failure.kind is Kind.CUT
    assert reader.feed(b"/1.1 200 OK\r\n\r\n") == failure
