"""HTTP/1.1 as the fuzzer sees it: heads, whole answers, chunked bodies. See `fuzz_targets`."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from typing import Any

import h11
from strict import Recorded, parse_head

from canal_trio.errors import Failure, Side
from canal_trio.messages import RequestHead, ResponseHead
from canal_trio.wire import headers as fields
from canal_trio.wire.bodies import ChunkedDecoder, encode_chunk, request_decoder, response_decoder
from canal_trio.wire.heads import RequestHeadReader, ResponseHeadReader, write_request_head, write_response_head
from canal_trio.wire.targets import origin_form, upstream_target

HEAD_BYTES, HEAD_FIELDS, TARGET_BYTES = 2048, 20, 256
BYTEWISE = 300  # longer inputs are not cut at every byte
BASE = b"/base/v1"


def cuttings(data: bytes, size: int) -> Iterator[list[bytes]]:
    """The same bytes in other reads: of `size` bytes, and one by one."""
    if size:
        yield [data[at : at + size] for at in range(0, len(data), size)]
    if size != 1 and len(data) <= BYTEWISE:
        yield [data[at : at + 1] for at in range(len(data))]


def same_at_every_cut(data: bytes, read: Callable[[list[bytes]], Any]) -> tuple[bytes, Any]:
    """What a stranger sent, and what `read` makes of it: the same however it is cut."""
    size, raw = (data[0] if data else 0), data[1:]
    whole = read([raw])
    for reads in cuttings(raw, size):
        seen = read(reads)
        assert seen == whole, (raw, size, whole, seen)
    return raw, whole


# -- heads -------------------------------------------------------------------------------------------------------------


def read_heads(reader: RequestHeadReader | ResponseHeadReader, reads: list[bytes]) -> tuple[list[Any], Any, Any]:
    """Heads without bodies one after the other, the failure that ended them, and what EOF would mean."""
    heads: list[Any] = []
    for read in reads:
        data = read
        while True:
            verdict = reader.feed(data)
            if isinstance(verdict, Failure):
                return heads, verdict, verdict
            if verdict is None:
                break
            heads.append(verdict)
            data = reader.rest()
    return heads, None, reader.close()


def request_heads(data: bytes) -> None:
    """Request heads from a client, and what of the first one would reach an upstream."""

    def read(reads: list[bytes]) -> tuple[list[Any], Any, Any]:
        limits = {"head_bytes": HEAD_BYTES, "head_fields": HEAD_FIELDS, "target_bytes": TARGET_BYTES}
        return read_heads(RequestHeadReader(**limits), reads)

    raw, (heads, failure, _) = same_at_every_cut(data, read)
    assert failure is None or failure.side is Side.CLIENT
    if not heads:
        return
    first = heads[0]
    event = h11_first(h11.Connection(h11.SERVER), re.sub(rb"^(?:\r\n){,4}", b"", raw))
    assert isinstance(event, h11.Request), (raw, first, event)
    assert (event.method, event.target) == (first.method, first.target)
    assert list(event.headers) == [(lower, value) for _, lower, value in first.headers.lowered()]
    passed_to_upstream(first)


def h11_first(connection: h11.Connection, data: bytes) -> Any:
    """h11's first event, or its exception."""
    connection._max_incomplete_event_size = 1 << 20  # not our question
    connection.receive_data(data)
    try:
        return connection.next_event()
    except h11.RemoteProtocolError as exc:
        return exc


OURS = frozenset(
    b"host content-length transfer-encoding authorization api-key x-api-key via forwarded x-request-id "
    b"upgrade connection accept-encoding".split()
)


def passed_to_upstream(head: RequestHead) -> None:
    """Exactly one well-formed head comes out, and nothing in it that must not go on."""
    decoder = request_decoder(head)
    assert not isinstance(decoder, Failure), "refused with the head, or not at all"
    form = origin_form(head)
    assert not isinstance(form, Failure), "the same"
    target = upstream_target(BASE, form[0])
    if isinstance(target, Failure):
        return
    if target != b"*":
        decoded = re.sub(rb"%2f|%5c", b"/", target.partition(b"?")[0].lower()).replace(b"%2e", b".")
        segments = [segment.partition(b";")[0] for segment in decoded.split(b"/")]
        assert (posixpath.normpath(b"/".join(segments)) + b"/").startswith(BASE + b"/"), target
    upgrade = fields.upgrade_of(head)
    chunked = b"transfer-encoding" in head.headers
    length = int(head.headers.get(b"content-length") or b"0")
    options = fields.ForUpstream(
        target=target,
        authority=b"up.test",
        client="192.0.2.1",
        client_trusted=False,
        scheme="http",
        request_id=fields.request_id(head.headers),
        pseudonym="canal",
        body=None if chunked else length,
        upgrade=upgrade,
    )
    block = write_request_head(fields.for_upstream(head, options))
    assert block.endswith(b"\r\n\r\n")
    assert block.count(b"\r\n\r\n") == 1
    seen = parse_head(block.decode("latin-1").split("\r\n")[:-2])
    assert (seen.method, seen.target) == (head.method.decode(), target.decode())
    assert bool(seen.all("transfer-encoding")) == chunked
    if length and not chunked:
        assert seen.all("content-length") == [str(length)]
    assert seen.all("connection") == (["Upgrade"] if upgrade else [])
    nothing_named(seen, head.headers.tokens(b"connection"))


def nothing_named(seen: Recorded, named: list[bytes]) -> None:
    """No field that Connection named goes on, unless it is one that we write, or that must not be taken away."""
    for option in named:
        if option not in OURS and not option.startswith(b"x-forwarded-"):
            assert not seen.all(option.decode("latin-1")), option


def responses(data: bytes) -> None:
    """One answer of an upstream: its heads and its body, and what of its head would reach a client."""
    flags, rest = (data[0] if data else 0), data[1:]
    method = b"HEAD" if flags & 1 else b"GET"
    eof = bool(flags & 2)

    def read(reads: list[bytes]) -> Any:
        return read_response(reads, method, eof=eof)

    raw, (heads, failure, payload, end, fault, left) = same_at_every_cut(rest, read)
    assert failure is None or failure.side is Side.UPSTREAM
    if not heads or heads[-1].status < 200:
        return
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
    connection.send(h11.EndOfMessage())
    seen, body, complete = h11_response(connection, raw, eof=eof)
    final = heads[-1]
    if failure is None:
        assert isinstance(seen, h11.Response), (raw, seen)
        assert seen.status_code == final.status
        assert list(seen.headers) == [(lower, value) for _, lower, value in final.headers.lowered()]
        assert body.startswith(payload), (raw, payload, body)
        if end is not None:
            assert complete, (raw, payload, body)
            assert body == payload
        if end is None and fault is None:
            assert left == b""
    passed_to_client(final, method)


def read_response(reads: list[bytes], method: bytes, *, eof: bool) -> Any:
    """Heads, failure, payload, end, fault and what is left over."""
    reader = ResponseHeadReader(head_bytes=HEAD_BYTES, head_fields=HEAD_FIELDS)
    heads: list[ResponseHead] = []
    decoder = None
    payload = b""
    for read in reads:
        data = read
        while decoder is None:
            verdict = reader.feed(data)
            if isinstance(verdict, Failure):
                return heads, verdict, b"", None, None, b""
            if verdict is None:
                break
            heads.append(verdict)
            data = reader.rest()
            if verdict.status == 101:
                return heads, None, b"", None, None, b""
            if not verdict.informational:
                chosen = response_decoder(verdict, method)
                if isinstance(chosen, Failure):
                    return heads, chosen, b"", None, None, b""
                decoder = chosen
        if decoder is not None:
            payload += decoder.feed(data)
    if decoder is None:
        return heads, reader.close() if eof else None, b"", None, None, b""
    if eof:
        decoder.close()
    return heads, None, payload, decoder.end, decoder.fault, decoder.rest


def h11_response(connection: h11.Connection, raw: bytes, *, eof: bool) -> tuple[Any, bytes, bool]:
    """What h11 makes of it: the final head (or an exception), the body, and whether that is complete."""
    connection._max_incomplete_event_size = 1 << 20
    connection.receive_data(raw)
    if eof and raw:
        connection.receive_data(b"")
    head, body = None, b""
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as exc:
            return head or exc, body, False
        if isinstance(event, h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return head, body, True
        elif not isinstance(event, h11.InformationalResponse):
            return head, body, False


def passed_to_client(final: ResponseHead, method: bytes) -> None:
    """Exactly one well-formed head comes out, framed by one field at most."""
    for version, size in ((b"1.1", None), (b"1.0", None), (b"1.1", 5)):
        options = fields.ForClient(
            request_version=version, request_method=method, request_id=b"req_1", pseudonym="canal", body=size
        )
        block = write_response_head(fields.for_client(final, options))
        assert block.count(b"\r\n\r\n") == 1
        lines = block.decode("latin-1").split("\r\n")[:-2]
        assert re.fullmatch(rf"HTTP/1\.1 {final.status} [\t\x20-\x7e\x80-\xff]*", lines[0])
        without_host = [line for line in lines[1:] if line[:5].lower() != "host:"]
        seen = parse_head(["GET / HTTP/1.1", "Host: stands in", *without_host])
        assert len(seen.all("content-length")) + len(seen.all("transfer-encoding")) <= 1
        nothing_named(seen, final.headers.tokens(b"connection"))


# -- chunks ------------------------------------------------------------------------------------------------------------

ASKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunks(data: bytes) -> None:
    """A chunked body."""

    def read(reads: list[bytes]) -> Any:
        decoder = ChunkedDecoder()
        payload = b"".join([decoder.feed(read) for read in reads])
        return payload, decoder.end, decoder.fault, decoder.rest

    raw, (payload, end, fault, rest) = same_at_every_cut(data, read)
    assert end is None or fault is None
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(ASKED + raw)
    body, trailers, complete = b"", [], False
    try:
        while not complete and (event := connection.next_event()) is not h11.NEED_DATA:
            if isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                complete = True
                trailers = list(event.headers)
    except h11.RemoteProtocolError:
        if re.search(rb"[0-9A-Fa-f][ \t]+;", raw):
            return  # white space before an extension is legal (RFC 9112 7.1.1) and refused by h11
        # A length or a coding in the trailers is dropped unread by us, and read by h11.
        dropped = re.search(rb"\n(?:content-length|transfer-encoding)[^\n]*:", raw, re.IGNORECASE)
        assert end is None or dropped, (raw, payload)
        if end is not None:
            assert payload == body
            assert not {b"content-length", b"transfer-encoding"} & {lower for _, lower, _ in end.trailers.lowered()}
            return
    assert body.startswith(payload), (raw, payload, body)
    if end is not None:
        assert complete
        assert payload == body
        assert rest == connection.trailing_data[0]
        assert {(lower, value) for _, lower, value in end.trailers.lowered()} <= set(trailers)
    elif fault is None:
        assert body == payload
        assert not complete
    if payload:
        again = ChunkedDecoder()
        assert again.feed(encode_chunk(payload) + b"0\r\n\r\n") == payload
        assert again.end is not None
