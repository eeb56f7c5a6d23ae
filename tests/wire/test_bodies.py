"""Bodies: the decoders against h11, the strictness beyond it, and the encoders."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_driving import CUTS, bytewise, cut

from canal_trio.errors import CanalError, Failure, Kind, Phase, Side
from canal_trio.messages import End, Headers, RequestHead, ResponseHead
from canal_trio.wire.bodies import (
    LAST_CHUNK,
    BodyDecoder,
    ChunkedDecoder,
    CloseDecoder,
    LengthDecoder,
    NoBody,
    content_length,
    encode_chunk,
    encode_last_chunk,
    request_decoder,
    request_framing,
    response_decoder,
)


def decode(decoder: BodyDecoder, reads: object) -> tuple[bytes, End | None, str | None, bytes]:
    """Payload, end, fault and rest after `reads`."""
    payload = b"".join([decoder.feed(read) for read in reads])  # type: ignore[attr-defined]  # any iterable of bytes
    return payload, decoder.end, decoder.fault, decoder.rest


def chunked(data: bytes) -> tuple[bytes, End | None, str | None, bytes]:
    """What a chunked decoder makes of `data`, whole and byte by byte alike."""
    seen = decode(ChunkedDecoder(), [data])
    assert decode(ChunkedDecoder(), bytewise(data)) == seen
    return seen


def oracle(data: bytes) -> tuple[bytes, list[tuple[bytes, bytes]] | None, bool, bytes]:
    """What h11 makes of the same bytes: payload, trailers if it ended, whether it refused, rest."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
    connection.next_event()
    payload = b""
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError:
            return payload, None, True, b""
        if isinstance(event, h11.Data):
            payload += event.data
        elif isinstance(event, h11.EndOfMessage):
            return payload, list(event.headers.raw_items()), False, connection.trailing_data[0]
        else:
            return payload, None, False, b""


# -- chunked, against h11 ----------------------------------------------------------------------------------------------

PAYLOADS = st.lists(st.binary(min_size=1, max_size=300), max_size=6)
EXTENSIONS = st.sampled_from([b"", b";a", b";a=b", b';a="b;\\"c"', b"; a = b", b";a;b=c"])
TRAILERS = st.sampled_from([b"", b"X-T: 1\r\n", b"X-T:  a b \r\nX-T:\r\n"])


@given(
    payloads=PAYLOADS,
    extension=EXTENSIONS,
    trailer=TRAILERS,
    upper=st.booleans(),
    rest=st.binary(max_size=9),
    positions=CUTS,
)
@settings(deadline=None)
def test_a_right_body_is_read_as_h11_reads_it(
    payloads: list[bytes], extension: bytes, trailer: bytes, upper: bool, rest: bytes, positions: list[int]
) -> None:
    """Payload, trailers and rest are those that h11 finds, at any split."""
    size = b"%X%b\r\n" if upper else b"%04x%b\r\n"
    data = b"".join(size % (len(payload), extension) + payload + b"\r\n" for payload in payloads)
    data += b"0%b\r\n%b\r\n%b" % (extension, trailer, rest)
    theirs, trailers, refused, behind = oracle(data)
    assert not refused
    assert trailers is not None
    right = b"".join(payloads), End(Headers(trailers)), None, rest
    assert (theirs, behind) == (right[0], rest)
    assert decode(ChunkedDecoder(), cut(data, positions)) == right
    assert chunked(data) == right


BURST = st.lists(
    st.tuples(
        st.binary(min_size=1, max_size=60) | st.sampled_from([b"\r\n", b"\r\n\r\n", b"a\r\nb", b"5\r\nhello\r\n"]),
        st.sampled_from([b"%x", b"%X", b"%04x", b"%x;a=b", b"%x ;a"]),
    ),
    min_size=10,
    max_size=60,
)


@given(burst=BURST, plain=st.booleans(), ended=st.booleans(), rest=st.binary(max_size=9), positions=CUTS)
@settings(deadline=None)
def test_a_burst_of_chunks_is_read_as_h11_reads_it(
    burst: list[tuple[bytes, bytes]], plain: bool, ended: bool, rest: bytes, positions: list[int]
) -> None:
    """Many chunks in one read, plain or not, give the payload and the rest that h11 finds, at any split."""
    data = b"".join(
        (b"%x" if plain else size) % len(payload) + b"\r\n" + payload + b"\r\n" for payload, size in burst
    )
    data += b"0\r\n\r\n" + rest if ended else b""
    seen = chunked(data)
    assert decode(ChunkedDecoder(), cut(data, positions)) == seen
    assert seen == (b"".join(payload for payload, _ in burst), End() if ended else None, None, rest if ended else b"")
    if b" ;" not in data:  # which h11 refuses
        theirs, _, refused, behind = oracle(data)
        assert (theirs, refused) == (seen[0], False)
        assert behind == seen[3] or not ended


FRAGMENTS = st.sampled_from(
    [
        b"5\r\nhello\r\n",
        b"3\r\nabc\r\n",
        b"0\r\n",
        b"\r\n",
        b"0\r\n\r\n",
        b"5",
        b"a",
        b";x",
        b";x=y",
        b'"',
        b"\r",
        b"\n",
        b" ",
        b"0",
        b"-",
        b"0x",
        b"g",
        b"X-T: 1",
        b":",
        b"\t",
        b"\x00",
        b"\x80",
        b"hello",
        b"5;a=b\r\nhello\r\n",
        b"5\nhello\r\n",
    ]
)


@given(fragments=st.lists(FRAGMENTS, max_size=10), positions=CUTS)
@settings(deadline=None, max_examples=300)
def test_any_body_is_read_as_strictly_as_h11_reads_it_or_more(fragments: list[bytes], positions: list[int]) -> None:
    """The allowed differences from h11, precisely: we may refuse what it accepts or waits for, and then our payload is
    the beginning of its payload. What we accept it accepts alike, and where we wait it waits with the same payload;
    except that white space before the semicolon of an extension, which it refuses, is a MUST in RFC 9112 7.1.1."""
    data = b"".join(fragments)
    payload, end, fault, rest = seen = chunked(data)
    assert decode(ChunkedDecoder(), cut(data, positions)) == seen
    theirs, trailers, refused, behind = oracle(data)
    if refused and fault is None:
        assert b" ;" in data or b"\t;" in data
        assert payload.startswith(theirs)
    elif fault is not None:
        assert theirs.startswith(payload)
        assert (end, rest) == (None, b"")
    elif end is not None:
        assert (payload, list(end.trailers), rest) == (theirs, trailers, behind)
    else:
        assert (theirs, trailers, refused) == (payload, None, False)


LENIENT = {
    b"5 \r\nhello\r\n0\r\n\r\n": b"",  # white space after the size
    b"5;a=\x00\r\nhello\r\n0\r\n\r\n": b"",  # a control byte in an extension
    b"5;\r\nhello\r\n0\r\n\r\n": b"",  # an extension without a name
    b'5;a="b\r\nhello\r\n0\r\n\r\n': b"",  # an open quote
    b"5;a b\r\nhello\r\n0\r\n\r\n": b"",
    b"00000000000000005\r\nhello\r\n0\r\n\r\n": b"",  # 17 digits
    b"5;" + b"a" * 1024 + b"\r\nhello\r\n0\r\n\r\n": b"",
    b"5\r\nhello\r\n0\r\nX-T: 1\n\n": b"hello",  # bare LF in the trailers
    b"5\r\nhello\r\n0\r\n\n": b"hello",
    b"5\r\nhello\r\n0\r\nX-T: a\r\n b\r\n\r\n": b"hello",  # folded
    b"5\r\nhello\r\n0\r\nX-T: a\x01b\r\n\r\n": b"hello",
    b"5\r\nhello\r\n0\r\n" + b"X-T: 1\r\n" * 101 + b"\r\n": b"hello",
    b"5\r\nhello\r\n0\r\nX-T: " + b"1" * 32_768 + b"\r\n\r\n": b"hello",
}


@pytest.mark.parametrize("data", LENIENT, ids=lambda data: repr(data[:30]))
def test_what_h11_accepts_and_we_refuse(data: bytes) -> None:
    """Each known leniency of h11 is one, and is a fault here; the payload before it was returned."""
    assert oracle(data)[:3:2] == (b"hello", False)
    payload, end, fault, _ = chunked(data)
    assert (payload, end) == (LENIENT[data], None)
    assert fault is not None


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"\r",
        b"\n",
        b" ",
        b"-",
        b"+",
        b"5\n",
        b"5\rX",
        b"5;a\x00",
        b"0\r\n\rX",
        b"5\r\nhelloX",
        b"5\r\nhello\rX",
    ],
)
def test_a_fault_is_seen_with_its_byte(data: bytes) -> None:
    """Nobody has to wait for more bytes, or for a deadline, to see that a body is broken."""
    decoder = ChunkedDecoder()
    decode(decoder, [data[:-1]])
    assert decoder.fault is None
    decode(decoder, [data[-1:]])
    assert decoder.fault is not None
    assert decode(decoder, [b"5\r\nhello\r\n"])[0] == b""


def test_bad_white_space_around_an_extension_is_removed() -> None:
    """BWS is parsed where the grammar has it (RFC 9112 7.1.1), which is not at the end of the line."""
    assert chunked(b"5 \t; a\t= b ;c\r\nhello\r\n0\r\n\r\n") == (b"hello", End(), None, b"")
    assert chunked(b"5;a \r\n")[2] is not None


def test_extensions_are_bounded_by_the_payload() -> None:
    """Small extensions go on for ever beside as much payload, but not beside little (CVE-2023-39326)."""
    extension = b";" + b"a" * 500
    large = b"258" + extension + b"\r\n" + b"x" * 600 + b"\r\n"
    small = b"1" + extension + b"\r\nx\r\n"
    assert decode(ChunkedDecoder(), [large] * 200)[2] is None
    assert decode(ChunkedDecoder(), [small] * 30)[2] is None
    many = decode(ChunkedDecoder(), [small] * 40)
    assert many == chunked(small * 40)
    assert many[2] is not None


@pytest.mark.parametrize(
    "name",
    [
        b"Content-Length",
        b"transfer-encoding",
        b"Host",
        b"Authorization",
        b"X-Forwarded-For",
        b"Proxy-Foo",
        b"X-Canal-Key",
    ],
)
def test_trailers_cannot_frame_route_or_authenticate(name: bytes) -> None:
    """Such fields are dropped, the others stay (RFC 9110 6.5.1)."""
    _, end, _, _ = chunked(b"0\r\nX-A: 1\r\n" + name + b": 5\r\nx-b:\t 2 \r\n\r\n")
    assert end == End(Headers([(b"X-A", b"1"), (b"x-b", b"2")]))


def test_a_chunk_of_five_mebibytes_is_not_copied() -> None:
    """Reads inside a chunk are passed on as they are, not collected."""
    decoder = ChunkedDecoder()
    read = b"x" * 65_536
    assert decoder.feed(b"500000\r\n") == b""
    pieces = [decoder.feed(read) for _ in range(80)]
    assert all(piece is read for piece in pieces)
    assert decode(decoder, [b"\r\n0\r\n\r\nrest"]) == (b"", End(), None, b"rest")


def test_many_tiny_chunks_in_one_read_are_joined() -> None:
    """Work grows with the bytes, not with their square (CVE-2025-69229)."""
    assert chunked(b"1\r\nx\r\n" * 5_000)[0] == b"x" * 5_000


def test_after_the_end_everything_is_rest() -> None:
    """What comes behind a body is kept for whoever reads next."""
    for decoder in (ChunkedDecoder(), LengthDecoder(5), NoBody()):
        body = {ChunkedDecoder: b"5\r\nhello\r\n0\r\n\r\n", LengthDecoder: b"hello", NoBody: b""}[type(decoder)]
        payload, end, fault, rest = decode(decoder, [body, b"GET", b" /"])
        assert payload == (b"hello" if body else b"")
        assert (end, fault, rest) == (End(), None, b"GET /")
        decoder.close()
        assert decoder.end == End()


# -- the other framings ------------------------------------------------------------------------------------------------


@given(data=st.binary(max_size=30), length=st.integers(0, 40), positions=CUTS)
@settings(deadline=None)
def test_a_length_is_counted(data: bytes, length: int, positions: list[int]) -> None:
    """Exactly so many bytes are payload, at any split; short of them there is no end, and EOF makes none."""
    decoder = LengthDecoder(length)
    payload, end, fault, rest = decode(decoder, cut(data, positions))
    assert (payload, rest, fault) == (data[:length], data[length:], None)
    assert (end is not None) == (len(data) >= length)
    decoder.close()
    assert decoder.end == end


def test_an_eof_ends_only_the_body_that_waits_for_it() -> None:
    """A close-delimited body is complete at EOF; a chunked one was cut."""
    decoder = CloseDecoder()
    assert decode(decoder, [b"ab", b"", b"c"]) == (b"abc", None, None, b"")
    decoder.close()
    assert decoder.end == End()
    cut_short = ChunkedDecoder()
    cut_short.feed(b"5\r\nhello\r\n")
    cut_short.close()
    assert cut_short.end is None


# -- which framing applies ---------------------------------------------------------------------------------------------


def head_with(*fields: tuple[bytes, bytes], version: bytes = b"1.1") -> RequestHead:
    """A request head with these fields."""
    return RequestHead(b"POST", b"/", Headers(fields), version)


CL5, CHUNKED = (b"Content-Length", b"5"), (b"Transfer-Encoding", b"Chunked")


@pytest.mark.parametrize(
    ("fields", "version", "kind"),
    [
        ([CL5, CHUNKED], b"1.1", Kind.MALFORMED),
        ([CHUNKED], b"1.0", Kind.MALFORMED),
        ([CHUNKED, CHUNKED], b"1.1", Kind.UNSUPPORTED_CODING),
        ([(b"Transfer-Encoding", b"gzip, chunked")], b"1.1", Kind.UNSUPPORTED_CODING),
        ([(b"Transfer-Encoding", b"chunked;q=1")], b"1.1", Kind.UNSUPPORTED_CODING),
        ([CL5, CL5], b"1.1", Kind.MALFORMED),
        ([(b"Content-Length", b"5, 5")], b"1.1", Kind.MALFORMED),
        ([(b"Content-Length", b"+5")], b"1.1", Kind.MALFORMED),
        ([(b"Content-Length", b"5_0")], b"1.1", Kind.MALFORMED),
        ([(b"Content-Length", b"0x5")], b"1.1", Kind.MALFORMED),
        ([(b"Content-Length", b"")], b"1.1", Kind.MALFORMED),
        ([(b"Content-Length", "٥".encode())], b"1.1", Kind.MALFORMED),
        ([(b"Content-Length", b"9" * 5_000)], b"1.1", Kind.MALFORMED),
        ([(b"Content-Length", b"9223372036854775808")], b"1.1", Kind.MALFORMED),
    ],
)
def test_framing_in_doubt_is_a_failure(fields: list[tuple[bytes, bytes]], version: bytes, kind: Kind) -> None:
    """For a request of the client's with its kind, for a response MALFORMED (design, section 7)."""
    failure = request_decoder(head_with(*fields, version=version))
    assert isinstance(failure, Failure)
    assert (failure.side, failure.phase, failure.kind) == (Side.CLIENT, Phase.HEAD, kind)
    assert request_framing(head_with(*fields, version=version)) == failure
    other = response_decoder(ResponseHead(200, Headers(fields), b"", version), b"GET")
    assert isinstance(other, Failure)
    assert (other.side, other.phase, other.kind) == (Side.UPSTREAM, Phase.FIRST_BYTE, Kind.MALFORMED)


def test_the_framing_of_requests() -> None:
    """Chunked, a length, or nothing; a request is never delimited by EOF (RFC 9112 6.3)."""
    assert isinstance(request_decoder(head_with(CHUNKED)), ChunkedDecoder)
    assert isinstance(request_decoder(head_with(CL5)), LengthDecoder)
    assert isinstance(request_decoder(head_with((b"Content-Length", b"000"))), NoBody)
    assert isinstance(request_decoder(head_with()), NoBody)
    assert content_length(Headers([(b"content-LENGTH", b"010")])) == 10
    assert content_length(Headers()) is None


@pytest.mark.parametrize(
    ("status", "method", "fields", "decoder"),
    [
        (200, b"GET", [CHUNKED], ChunkedDecoder),
        (200, b"GET", [CL5], LengthDecoder),
        (200, b"GET", [(b"Content-Length", b"0")], NoBody),
        (200, b"GET", [], CloseDecoder),
        (200, b"HEAD", [CL5], NoBody),
        (200, b"HEAD", [CHUNKED], NoBody),
        (204, b"GET", [CL5], NoBody),
        (304, b"GET", [CL5], NoBody),
        (101, b"GET", [], NoBody),
    ],
)
def test_the_framing_of_responses(
    status: int, method: bytes, fields: list[tuple[bytes, bytes]], decoder: type[BodyDecoder]
) -> None:
    """What was asked and the status come first, then the fields, then EOF."""
    assert isinstance(response_decoder(ResponseHead(status, Headers(fields)), method), decoder)


# -- encoding ----------------------------------------------------------------------------------------------------------


@given(pieces=PAYLOADS, trailers=st.sampled_from([[], [(b"X-T", b"1")]]))
@settings(deadline=None)
def test_chunks_are_encoded_as_h11_encodes_them(pieces: list[bytes], trailers: list[tuple[bytes, bytes]]) -> None:
    """Our bytes are h11's, and decoded they are the same pieces."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("Host", "a"), ("Transfer-Encoding", "chunked")]))
    theirs = b"".join(connection.send(h11.Data(data=piece)) or b"" for piece in pieces)
    theirs += connection.send(h11.EndOfMessage(headers=trailers)) or b""
    ours = b"".join(encode_chunk(piece) for piece in pieces) + encode_last_chunk(Headers(trailers))
    assert ours == theirs
    assert chunked(ours) == (b"".join(pieces), End(Headers(trailers)), None, b"")


def test_an_end_is_not_encoded_by_accident() -> None:
    """An empty piece would be the end of the body; a bad trailer would be more than a trailer."""
    with pytest.raises(CanalError):
        encode_chunk(b"")
    assert encode_last_chunk() == LAST_CHUNK
    for field in ((b"X", b"a\r\nY: b\r\n\r\nGET /"), (b"X", b"a\nb"), (b"X: a", b"b"), (b"", b"a"), (b"X", b"\x00")):
        with pytest.raises(CanalError):
            encode_last_chunk(Headers([field]))
