"""Drives the wire floor as a connection would, without a connection: bytes in, what was seen out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.messages import End, RequestHead, ResponseHead
from canal_trio.wire.bodies import BodyDecoder, request_decoder, response_decoder
from canal_trio.wire.headers import keep_alive, wants_continue
from canal_trio.wire.heads import RequestHeadReader, ResponseHeadReader

HEAD_BYTES, HEAD_FIELDS, TARGET_BYTES, INFORMATIONAL_HEADS = 32_768, 100, 8_192, 16

STATUS = {
    Kind.MALFORMED: 400,
    Kind.METHOD_NOT_ALLOWED: 405,
    Kind.TARGET_TOO_LONG: 414,
    Kind.EXPECTATION: 417,
    Kind.HEAD_TOO_LARGE: 431,
    Kind.UNSUPPORTED_CODING: 501,
    Kind.UNSUPPORTED_VERSION: 505,
}


def load_cases(name: str) -> list[dict[str, Any]]:
    """The cases of one file, in order."""
    cases: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "cases" / name).read_text())
    return cases


def by_name(case: dict[str, Any]) -> str:
    """The id of a case as a test parameter."""
    return str(case["name"])


def bytewise(data: bytes) -> list[bytes]:
    """One read per byte."""
    return [data[at : at + 1] for at in range(len(data))]


def cut(data: bytes, positions: Iterable[int]) -> Iterator[bytes]:
    """`data` in reads that end at `positions`."""
    start = 0
    for position in sorted({position % (len(data) + 1) for position in positions}):
        yield data[start:position]
        start = position
    yield data[start:]


CUTS = st.lists(st.integers(0, 70_000), max_size=8)


def request_reader() -> RequestHeadReader:
    """A reader with the limits of the defaults."""
    return RequestHeadReader(head_bytes=HEAD_BYTES, head_fields=HEAD_FIELDS, target_bytes=TARGET_BYTES)


def response_reader() -> ResponseHeadReader:
    """A reader with the limits of the defaults."""
    return ResponseHeadReader(head_bytes=HEAD_BYTES, head_fields=HEAD_FIELDS)


def request(*lines: bytes, first: bytes = b"GET / HTTP/1.1", host: bytes = b"a.test") -> bytes:
    """A request head with these lines."""
    return b"\r\n".join([first, b"Host: " + host, *lines, b"", b""])


def verdict_of(reads: Iterable[bytes]) -> RequestHead | Failure | None:
    """What a request reader says after `reads`."""
    reader = request_reader()
    verdict = None
    for read in reads:
        if verdict is None:
            verdict = reader.feed(read)
    return verdict


def response_of(data: bytes) -> ResponseHead | Failure | None:
    """What a response reader says, whole and byte by byte alike."""
    whole = response_reader().feed(data)
    reader = response_reader()
    verdict = None
    for byte in bytewise(data):
        if verdict is None:
            verdict = reader.feed(byte)
    assert verdict == whole
    return whole


@dataclass
class Requests:
    """What was seen of a client: whole requests with their payloads, and what ended the connection, if anything."""

    whole: list[tuple[RequestHead, bytes, End]] = field(default_factory=list)
    failure: Failure | None = None
    fault: str | None = None
    cut: bool = False  # EOF inside a request
    closed: bool = False  # a request asked for the connection to be closed

    @property
    def ended(self) -> bool:
        """Nothing more is read."""
        return self.failure is not None or self.fault is not None or self.closed


def read_requests(reads: Iterable[bytes]) -> Requests:
    """What a gateway would see of a client that sends `reads` and then EOF."""
    seen = Requests()
    reader = request_reader()
    head: RequestHead | None = None
    decoder: BodyDecoder | None = None
    payload = b""
    for read in reads:
        data = read
        while data and not seen.ended:
            if head is None:
                verdict = reader.feed(data)
                if isinstance(verdict, Failure):
                    seen.failure = verdict
                    return seen
                if verdict is None:
                    break
                chosen = request_decoder(verdict)
                expectation = wants_continue(verdict)
                refusal = chosen if isinstance(chosen, Failure) else expectation
                if isinstance(refusal, Failure):
                    seen.failure = refusal
                    return seen
                assert not isinstance(chosen, Failure)
                head, decoder, data = verdict, chosen, reader.rest()
            assert decoder is not None
            payload += decoder.feed(data)
            if decoder.fault is not None:
                seen.fault = decoder.fault
            elif decoder.end is not None:
                seen.whole.append((head, payload, decoder.end))
                seen.closed = not keep_alive(head.version, head.headers)
                head, payload, data = None, b"", decoder.rest
                continue
            break
        if seen.ended:
            return seen
    seen.failure = reader.close() if head is None else None
    seen.cut = head is not None
    return seen


@dataclass
class Response:
    """What was seen of an upstream's answer."""

    informational: list[ResponseHead] = field(default_factory=list)
    head: ResponseHead | None = None
    payload: bytes = b""
    end: End | None = None
    fault: str | None = None
    failure: Failure | None = None
    rest: bytes = b""


def read_response(reads: Iterable[bytes], method: bytes = b"GET", *, eof: bool = False) -> Response:
    """What a gateway would see of an upstream that sends `reads`, and then EOF if `eof`."""
    seen = Response()
    reader = response_reader()
    decoder: BodyDecoder | None = None
    for read in reads:
        data = read
        while decoder is None:
            verdict = reader.feed(data)
            if isinstance(verdict, Failure):
                seen.failure = verdict
                return seen
            if verdict is None:
                break
            data = reader.rest()
            if verdict.informational and verdict.status != 101:
                seen.informational.append(verdict)
                if len(seen.informational) > INFORMATIONAL_HEADS:
                    seen.failure = Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.MALFORMED)
                    return seen
                continue
            seen.head = verdict
            chosen = response_decoder(verdict, method)
            if isinstance(chosen, Failure):
                seen.failure = chosen
                return seen
            decoder = chosen
        if decoder is not None:
            seen.payload += decoder.feed(data)
    if eof and decoder is None:
        seen.failure = reader.close()
    elif eof and decoder is not None:
        decoder.close()
    if decoder is not None:
        seen.end, seen.fault, seen.rest = decoder.end, decoder.fault, decoder.rest
    return seen
