"""Bodies: where one ends, and its payload without the framing; and chunks for the other direction.

Each decoder takes bytes and returns payload. `end`, `fault` and `rest` say how it ended: with a clean end, with broken
framing, or (neither, at EOF) cut. They depend only on the bytes, never on how they were split. Which decoder applies is
RFC 9112 6.3, read strictly: whatever two parsers could frame differently is refused.

Chunked framing is stricter than h11, the oracle of the tests: no white space after the size (but before an extension,
where RFC 9112 7.1.1 has it parsed), extensions must follow the grammar and stay within a budget, trailers know no bare
LF, no folding and no control bytes, and are bounded.
"""

from __future__ import annotations

import re
from typing import Final, Protocol, final

from canal_trio.errors import CanalError, Failure, Kind, Phase, Side
from canal_trio.messages import End, Headers, RequestHead, ResponseHead
from canal_trio.wire.scan import FIELDS, Scanner

__all__ = [
    "LAST_CHUNK",
    "BodyDecoder",
    "ChunkedDecoder",
    "CloseDecoder",
    "LengthDecoder",
    "NoBody",
    "content_length",
    "encode_chunk",
    "encode_last_chunk",
    "framed_decoder",
    "request_decoder",
    "request_framing",
    "response_decoder",
]

LAST_CHUNK: Final = b"0\r\n\r\n"
_END: Final = End()  # of a body without trailers
_MAX_LENGTH: Final = 2**63 - 1
_SIZE_LINE_BYTES: Final = 1024
_EXTENSION_BYTES: Final = 16 * 1024  # per body, beyond as many bytes as there is payload (as h2o bounds overhead)
_TRAILER_BYTES: Final = 32 * 1024
_TRAILER_FIELDS: Final = 100


class BodyDecoder(Protocol):
    """What the four decoders have in common."""

    @property
    def end(self) -> End | None:
        """Set once the body is complete."""

    @property
    def fault(self) -> str | None:
        """What broke the framing. The payload before it was returned, nothing after it ever is."""

    @property
    def rest(self) -> bytes:
        """What was fed beyond the end of the body."""

    def feed(self, data: bytes) -> bytes:
        """The payload that `data` completes, perhaps none."""

    def close(self) -> None:
        """EOF: the end of a body that only EOF ends; any other body without an `end` is cut."""


@final
class NoBody:
    """There is none; everything fed is `rest`."""

    __slots__ = ("rest",)
    end: End | None = _END
    fault: str | None = None

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """Nothing."""
        self.rest += data
        return b""

    def close(self) -> None:
        """Of no effect."""


@final
class LengthDecoder:
    """A body of a known number of bytes."""

    __slots__ = ("_left", "end", "rest")
    fault: str | None = None

    def __init__(self, length: int) -> None:
        self._left = length
        self.end: End | None = _END if length == 0 else None
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """What of `data` belongs to the body."""
        left = self._left - len(data)
        if left > 0:
            self._left = left
            return data
        payload = data
        if left < 0:
            payload = data[: self._left]
            self.rest += data[self._left :]
        self._left = 0
        self.end = _END
        return payload

    def close(self) -> None:
        """Of no effect: without an `end` the body is cut."""


@final
class CloseDecoder:
    """A body that ends with the connection."""

    __slots__ = ("end",)
    fault: str | None = None
    rest: bytes = b""

    def __init__(self) -> None:
        self.end: End | None = None

    def feed(self, data: bytes) -> bytes:
        """All of it."""
        return data

    def close(self) -> None:
        """The body is complete."""
        self.end = _END


# -- chunked -----------------------------------------------------------------------------------------------------------

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"'
_EXTENSION = rb"[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?" % (_TOKEN, _TOKEN, _QUOTED)
_SIZES: Final = re.compile(rb"[0-9A-Fa-f]{1,16}(?:\n[0-9A-Fa-f]{1,16})*")
_BULK_BYTES: Final = 512  # fewer are as quickly looked at one by one
_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n")
_SIZE_AND_EXTENSIONS: Final = re.compile(rb"([0-9A-Fa-f]{1,16})((?:%b)+)\r\n" % _EXTENSION)
_BEGUN_SIZE: Final = re.compile(rb"[0-9A-Fa-f][\t\x20-\x7e\x80-\xff]*\r?")
_FIELD: Final = re.compile(rb"([^:\r\n]+):[ \t]*([^\r\n]*)\r\n")

# The length of a read that holds exactly one chunk of less than 2 KiB tells its size line. Comparing costs a third of
# parsing, and streamed tokens come one chunk per read.
_SIZE_LINES: Final = {size + len(b"%x" % size) + 4: b"%x\r\n" % size for size in range(1, 2048)}
_size_line = _SIZE_LINES.get

_BAD_SIZE: Final = "A chunk does not begin with its size."
_LONG_SIZE: Final = "The line with a chunk's size is too long."
_BAD_END: Final = "A chunk does not end where its size says."

# Fields that would frame, route, authenticate or describe the message if somebody merged them into its head
# (RFC 9110 6.5.1), and those that are the gateway's own.
_NOT_IN_TRAILERS: Final = frozenset(
    b"transfer-encoding content-length host connection keep-alive te trailer upgrade via forwarded expect range "
    b"max-forwards cache-control pragma authorization cookie set-cookie api-key x-api-key www-authenticate "
    b"content-encoding content-type content-range content-location date age expires location retry-after vary warning "
    b"if-match if-none-match if-modified-since if-unmodified-since if-range x-request-id x-real-ip".split()
)
_PREFIXES_NOT_IN_TRAILERS: Final = (b"proxy-", b"x-forwarded-", b"x-canal-")


@final
class ChunkedDecoder:
    """The chunked transfer coding (RFC 9112 7.1)."""

    __slots__ = ("_extensions", "_held", "_left", "_payload", "_trailers", "end", "fault", "rest")

    def __init__(self) -> None:
        self.end: End | None = None
        self.fault: str | None = None
        self.rest = b""
        # Payload still to come of the present chunk; -1: a size line comes next; 0: the CRLF behind the payload, or
        # nothing at all, for a fault, trailers or an end are looked at first.
        self._left = -1
        self._held = b""  # the beginning of a size line or of that CRLF
        self._extensions = 0
        self._payload = 0
        self._trailers: Scanner | None = None

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`, joined. A read that holds one whole chunk takes a straight line."""
        start = self.whole(data)
        return data[start:-2] if start else self._feed(data)

    def whole(self, data: bytes) -> int:
        """Feed `data` if it is one whole chunk, written as `encode_chunk` writes it; else leave everything as it is.

        Where its payload begins, which ends two bytes before the end; 0 if it is no such chunk.
        """
        if self._left < 0 and not self._held:
            line = _size_line(len(data))
            if line is not None and data.startswith(line) and data.endswith(b"\r\n"):
                start = len(line)
                self._payload += len(data) - start - 2
                return start
        return 0

    def close(self) -> None:
        """Of no effect: without an `end` the body is cut."""

    def _feed(self, data: bytes) -> bytes:
        if self.end is not None:
            self.rest += data
            return b""
        if self.fault is not None:
            return b""
        if self._trailers is not None:
            self._trail(self._trailers, data)
            return b""
        if self._held:
            data, self._held = self._held + data, b""
        pieces: list[bytes] = []
        at: int | None = 0
        while at is not None and at < len(data):
            if self._left > 0:
                at = self._take(data, at, pieces)
            elif self._left == 0:
                at = self._chunk_end(data, at)
            elif len(data) - at > _BULK_BYTES and not pieces[1:]:
                at = self._bulk(data, at, pieces)
            else:
                at = self._chunk_begin(data, at, pieces)
        return b"".join(pieces)

    def _bulk(self, data: bytes, at: int, pieces: list[bytes]) -> int | None:
        """Behind all the whole chunks from `at` on, if they are plain: a burst of events, a sixth of the time for each.

        Cut at every CRLF, plain chunks are size, payload, size, payload, …; one comparison of what the sizes say with
        what the payloads are proves it. Otherwise (a CRLF in a payload, an extension) chunk by chunk.
        """
        parts = data[at:].split(b"\r\n")
        lengths = list(map(len, parts[1:-1:2]))  # what follows the last CRLF is not whole
        if 0 in lengths:
            del lengths[lengths.index(0) :]  # the last chunk, most likely; in any case not a plain one
        pairs = len(lengths)
        sizes, payloads = parts[0 : 2 * pairs : 2], parts[1 : 2 * pairs : 2]
        if _SIZES.fullmatch(b"\n".join(sizes)) is None or [int(size, 16) for size in sizes] != lengths:
            return self._chunk_begin(data, at, pieces)
        self._payload += sum(lengths)
        pieces += payloads
        return at + sum(lengths) + sum(map(len, sizes)) + 4 * pairs

    def _take(self, data: bytes, at: int, pieces: list[bytes]) -> int:
        piece = data[at : at + self._left]
        pieces.append(piece)
        self._left -= len(piece)
        self._payload += len(piece)
        return at + len(piece)

    def _break(self, why: str) -> None:
        self.fault = why
        self._left = 0

    def _chunk_end(self, data: bytes, at: int) -> int | None:
        """Behind the CRLF after a chunk's payload; None if it is not whole."""
        if data.startswith(b"\r\n", at):
            self._left = -1
            return at + 2
        if len(data) == at + 1 and data.endswith(b"\r"):
            self._held = b"\r"
        else:
            self._break(_BAD_END)
        return None

    def _chunk_begin(self, data: bytes, at: int, pieces: list[bytes]) -> int | None:
        """Behind a size line, or behind the whole chunk if it is here; None if the line is not, or was the last one."""
        match = _SIZE.match(data, at) or self._extended_size(data, at)
        if match is None:
            return None
        size = int(match[1], 16)
        start = match.end()
        if size and data.startswith(b"\r\n", start + size):
            pieces.append(data[start : start + size])
            self._payload += size
            return start + size + 2
        self._left = size
        if size:
            return start
        self._trailers = Scanner(FIELDS, _TRAILER_BYTES, _TRAILER_FIELDS)
        self._trail(self._trailers, data[start:])
        return None

    def _extended_size(self, data: bytes, at: int) -> re.Match[bytes] | None:
        """A size line with extensions; None if it is not one, or not whole."""
        line = data[at : at + _SIZE_LINE_BYTES]
        match = _SIZE_AND_EXTENSIONS.match(data, at) if b"\r\n" in line else None
        if match is not None:
            self._extensions += len(match[2])
            if self._extensions <= _EXTENSION_BYTES + self._payload:
                return match
            self._break("The chunk extensions are out of proportion.")
        elif _BEGUN_SIZE.fullmatch(line) is None:
            self._break(_BAD_SIZE)
        elif len(line) == _SIZE_LINE_BYTES:
            self._break(_LONG_SIZE)
        else:
            self._held = line
        return None

    def _trail(self, scanner: Scanner, data: bytes) -> None:
        """The trailer section, and the end of the body with it."""
        if data == b"\r\n" and not scanner.data:
            self.end = _END
            return
        fault = scanner.feed(data)
        if fault is not None:
            self._break(f"Trailers: {fault.detail}")
        elif scanner.size is not None:
            self.rest = bytes(scanner.data[scanner.size :])
            self.end = End(_trailers(bytes(scanner.data[: scanner.size])))


def _trailers(block: bytes) -> Headers:
    kept = []
    for name, value in _FIELD.findall(block):
        lower = name.lower()
        if lower not in _NOT_IN_TRAILERS and not lower.startswith(_PREFIXES_NOT_IN_TRAILERS):
            kept.append((name, value.rstrip(b" \t")))
    return Headers(kept)


def encode_chunk(piece: bytes) -> bytes:
    """`piece` as one chunk. Raises CanalError for an empty one, which would be the end of the body."""
    if not piece:
        raise CanalError("an empty piece would end the body")
    return b"%x\r\n%b\r\n" % (len(piece), piece)


def encode_last_chunk(trailers: Headers | None = None) -> bytes:
    """The end of a chunked body. Raises CanalError if a trailer holds what does not belong there."""
    if not trailers:
        return LAST_CHUNK
    block = b"".join([b"%b: %b\r\n" % field for field in trailers]) + b"\r\n"
    scanner = Scanner(FIELDS, len(block), len(trailers))
    if scanner.feed(block) is not None or scanner.size != len(block) or any(b":" in name for name, _ in trailers):
        raise CanalError("a trailer holds a byte that does not belong there")
    return b"0\r\n" + block


# -- which decoder applies ---------------------------------------------------------------------------------------------


def _failure(side: Side, kind: Kind, detail: str) -> Failure:
    if side is Side.CLIENT:
        return Failure(side, Phase.HEAD, kind, detail)
    return Failure(side, Phase.FIRST_BYTE, Kind.MALFORMED, detail)  # design, section 7: malformed response


def content_length(headers: Headers, side: Side = Side.CLIENT) -> int | Failure | None:
    """The announced length, None if there is none. MALFORMED (of `side`) unless it was given once, as ASCII digits."""
    values = headers.get_all(b"content-length")
    if not values:
        return None
    value = values[0]
    # bytes.isdigit() knows ASCII digits only. 19 digits are enough for 2**63 - 1, and int() of thousands is slow.
    if len(values) == 1 and value.isdigit() and len(value) <= 19:
        length = int(value)
        if length <= _MAX_LENGTH:
            return length
    return _failure(side, Kind.MALFORMED, "Content-Length must be given once, as digits.")


def _framing(version: bytes, headers: Headers, side: Side) -> int | Failure | None:
    """The length, -1 for chunked, None for neither (RFC 9112 6.3)."""
    length = content_length(headers, side)
    codings = headers.get_all(b"transfer-encoding")
    if not codings or isinstance(length, Failure):
        return length
    if length is not None:
        return _failure(side, Kind.MALFORMED, "Content-Length and Transfer-Encoding exclude each other.")
    if version == b"1.0":
        return _failure(side, Kind.MALFORMED, "HTTP/1.0 knows no Transfer-Encoding.")
    if len(codings) > 1 or codings[0].lower() != b"chunked":
        return _failure(side, Kind.UNSUPPORTED_CODING, "It must be chunked.")
    return -1


def request_framing(head: RequestHead) -> int | Failure:
    """The length of the request's body, -1 if it is chunked. Failures as for `request_decoder`."""
    framing = _framing(head.version, head.headers, Side.CLIENT)
    return 0 if framing is None else framing


def request_decoder(head: RequestHead) -> BodyDecoder | Failure:
    """The decoder for the request's body. MALFORMED or UNSUPPORTED_CODING if its framing is in doubt."""
    framing = request_framing(head)
    return framing if isinstance(framing, Failure) else framed_decoder(framing)


def response_decoder(head: ResponseHead, request_method: bytes) -> BodyDecoder | Failure:
    """The decoder for the response's body; MALFORMED if its framing is in doubt."""
    if request_method == b"HEAD" or head.informational or head.status in (204, 304):
        return NoBody()
    framing = _framing(head.version, head.headers, Side.UPSTREAM)
    if isinstance(framing, Failure):
        return framing
    return CloseDecoder() if framing is None else framed_decoder(framing)


def framed_decoder(framing: int) -> BodyDecoder:
    """The decoder for a body of `framing` bytes; -1: a chunked one."""
    if framing < 0:
        return ChunkedDecoder()
    return LengthDecoder(framing) if framing else NoBody()
