"""What a proxy does to fields, for any list of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from wire_driving import HEAD_BYTES, TARGET_BYTES

from canal_trio.messages import Headers, RequestHead, ResponseHead
from canal_trio.wire.bodies import (
    ChunkedDecoder,
    CloseDecoder,
    LengthDecoder,
    NoBody,
    request_decoder,
    response_decoder,
)
from canal_trio.wire.headers import HOP_BY_HOP, ForClient, ForUpstream, for_client, for_upstream
from canal_trio.wire.heads import RequestHeadReader, ResponseHeadReader, write_request_head, write_response_head

UPSTREAM = ForUpstream(
    target=b"/v1/x",
    authority=b"up.test:8000",
    client="192.0.2.7",
    client_trusted=False,
    scheme="http",
    request_id=b"req_1",
    pseudonym="canal",
)
CLIENT = ForClient(request_version=b"1.1", request_method=b"GET", request_id=b"req_1", pseudonym="canal")

NAMES = st.sampled_from(
    sorted(HOP_BY_HOP)
    + b"Content-Length Transfer-Encoding Host Authorization X-Forwarded-For Via Forwarded X-A X-B x_a Trailer".split()
    + b"Accept-Encoding X-Request-Id Expect Max-Forwards Content-Type X-Api-Key Cache-Control Date".split()
)
VALUES = st.one_of(
    NAMES,
    st.sampled_from(
        [b"", b"1", b"close", b"chunked", b"x-a, X-B ,,via", b"host, authorization, content-length", b"\xff\t\x80"]
    ),
)
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=12)
# What the gateway writes itself, whoever named it, and what a nomination cannot remove.
OURS = set(
    b"host authorization x-api-key content-length transfer-encoding x-request-id via x-forwarded-for forwarded "
    b"connection upgrade accept-encoding cache-control date".split()
)


@given(
    method=st.sampled_from([b"GET", b"POST", b"OPTIONS"]),
    fields=FIELDS,
    body=st.sampled_from([None, 0, 5]),
    trusted=st.booleans(),
    credential=st.sampled_from([None, (b"Authorization", b"Bearer up"), (b"api-key", b"up")]),
)
@settings(deadline=None, max_examples=200)
def test_what_goes_upstream_is_right_for_any_fields(
    method: bytes, fields: list[tuple[bytes, bytes]], body: int | None, trusted: bool, credential: Any
) -> None:
    """One Host, one framing, nothing that Connection named; and our own strict reader, which knows no control byte,
    reads it back."""
    names = [name.lower() for name, _ in fields]
    fields = [field for at, field in enumerate(fields) if names.index(names[at]) == at]  # a reader saw no duplicates
    head = RequestHead(method, b"/v1/x", Headers(fields))
    options = replace(UPSTREAM, body=body, client_trusted=trusted, credential=credential)
    seen = for_upstream(head, options)
    reader = RequestHeadReader(head_bytes=HEAD_BYTES, head_fields=200, target_bytes=TARGET_BYTES)
    assert reader.feed(write_request_head(seen)) == seen
    assert seen.headers.get_all(b"host") == [b"up.test:8000"]
    assert not (b"content-length" in seen.headers and b"transfer-encoding" in seen.headers)
    assert not {lower for _, lower, _ in seen.headers.lowered()} & (set(head.headers.tokens(b"connection")) - OURS)
    assert not {lower for _, lower, _ in seen.headers.lowered()} & HOP_BY_HOP
    expected = {None: ChunkedDecoder, 0: NoBody, 5: LengthDecoder}[body]
    assert isinstance(request_decoder(seen), expected)


@given(
    status=st.sampled_from([100, 103, 200, 204, 304, 500]),
    fields=FIELDS,
    version=st.sampled_from([b"1.0", b"1.1"]),
    method=st.sampled_from([b"GET", b"HEAD"]),
    body=st.sampled_from([None, 0, 5]),
    stream=st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_what_goes_to_the_client_is_right_for_any_fields(
    status: int, fields: list[tuple[bytes, bytes]], version: bytes, method: bytes, body: int | None, stream: bool
) -> None:
    """One framing, the one that fits; nothing that Connection named; and our own strict reader reads it back."""
    head = ResponseHead(status, Headers(fields))
    options = CLIENT._replace(request_version=version, request_method=method, body=body, event_stream=stream)
    seen = for_client(head, options)
    reader = ResponseHeadReader(head_bytes=HEAD_BYTES, head_fields=200)
    assert reader.feed(write_response_head(seen)) == seen
    assert not {lower for _, lower, _ in seen.headers.lowered()} & (set(head.headers.tokens(b"connection")) - OURS)
    if method == b"HEAD" or status in (100, 103, 204, 304):
        expected: type = NoBody
    elif body is None:
        expected = ChunkedDecoder if version == b"1.1" else CloseDecoder
    else:
        expected = LengthDecoder if body else NoBody
    assert isinstance(response_decoder(seen, method), expected)
