"""Heads: bytes to `RequestHead` and `ResponseHead`, and back.

The scanner finds where a head ends, or the byte that breaks it (`wire.scan`); h11 parses and checks the block that was
cut; what h11 is too lenient for comes on top (reliability.md 3): equal duplicates and lists of Content-Length,
Content-Length together with Transfer-Encoding, Transfer-Encoding in HTTP/1.0, the grammar of Host and of the target,
duplicate credentials. Verdicts and limits do not depend on how the bytes were split.

h11 costs more than everything else here. A block that came in one read, that the grammar of `wire.scan` has accepted
and whose framing fields are the plain ones is cut into lines without it (`_plain_fields`): a way for what is accepted,
never for a refusal, held to h11's result by a property test. A head that is byte for byte the one before is that one.
"""

from __future__ import annotations

import re
from typing import Final, final

import h11

from canal_trio.errors import CanalError, Failure, Kind, Phase, Side
from canal_trio.messages import Headers, RequestHead, ResponseHead
from canal_trio.wire.bodies import request_framing
from canal_trio.wire.scan import REQUEST, REQUEST_HEAD, RESPONSE, RESPONSE_HEAD, Fault, Scanner
from canal_trio.wire.targets import origin_form

__all__ = ["RequestHeadReader", "ResponseHeadReader", "write_request_head", "write_response_head"]

_EMPTY_LINES: Final = 4  # before a request line, RFC 9112 2.2 asks for one at least
_CREDENTIALS: Final = (b"authorization", b"api-key", b"x-api-key")
_FIELD_LINE: Final = re.compile(rb"([^:\r]+):([^\r]*)\r\n")  # of a block that REQUEST_HEAD or RESPONSE_HEAD matched
_REFUSED_METHODS: Final = frozenset({b"CONNECT", b"TRACE"})  # neither is a request to an API


@final
class RequestHeadReader:
    """Reads request heads from one client, one after the other.

    After `feed` returned a head, `rest()` gives what came behind it and makes the reader ready for the next one. A
    failure is final: it is returned again from then on.
    """

    __slots__ = (
        "_begin",
        "_empty_lines",
        "_head_bytes",
        "_head_fields",
        "_last",
        "_rest",
        "_scanner",
        "_target_bytes",
        "_verdict",
        "started",
    )

    def __init__(self, *, head_bytes: int, head_fields: int, target_bytes: int) -> None:
        self._head_bytes = head_bytes
        self._head_fields = head_fields
        self._target_bytes = target_bytes
        self._scanner: Scanner | None = None
        self._verdict: RequestHead | Failure | None = None
        self._rest = b""
        self._begin = b""  # an empty line that is not complete
        self._empty_lines = 0
        self._last: tuple[bytes, RequestHead] | None = None  # the head before this one, and its bytes
        self.started = False  # a byte of the head was seen; empty lines before it do not count

    def feed(self, data: bytes) -> RequestHead | Failure | None:
        """The head, a failure of the client's (MALFORMED, HEAD_TOO_LARGE, TARGET_TOO_LONG, UNSUPPORTED_VERSION,
        UNSUPPORTED_CODING, METHOD_NOT_ALLOWED), or None: more is needed. Raises CanalError if `rest()` was not called
        after a head."""
        if self._verdict is not None:
            if isinstance(self._verdict, RequestHead):
                raise CanalError("call rest() after a head, before more is fed")
            return self._verdict
        if not self.started:
            begun = self._skip_empty_lines(data)
            if begun is None:
                return self._verdict
            data = begun
            self.started = True
        if self._scanner is None:
            last = self._last
            if last is not None and data.startswith(last[0]):  # which ends as a head does, so this one ends there, too
                self._rest = data[len(last[0]) :]
                self._verdict = last[1]
                return last[1]
            match = REQUEST_HEAD.match(data, 0, self._head_bytes)
            if match is not None and data.count(b"\r\n", 0, match.end()) - 2 <= self._head_fields:
                return self._judge(data, match.end(), plain=True)
            self._scanner = Scanner(REQUEST, self._head_bytes, self._head_fields, self._target_bytes)
        fault = self._scanner.feed(data)
        if fault is not None:
            return self._refuse(fault)
        if self._scanner.size is not None:
            return self._judge(bytes(self._scanner.data), self._scanner.size, plain=False)
        return None

    def forget(self) -> None:
        """Remember no head: the next one comes after a long while, if at all."""
        self._last = None

    def _skip_empty_lines(self, data: bytes) -> bytes | None:
        """What follows the empty lines, or None if nothing does yet."""
        if self._begin:
            data = self._begin + data
        while data.startswith(b"\r"):
            if data == b"\r":
                self._begin = data
                return None
            self._empty_lines += 1
            if data[1] != 10 or self._empty_lines > _EMPTY_LINES:
                self._refuse(Fault(Kind.MALFORMED, "The request does not begin with a request line."))
                return None
            data = data[2:]
        self._begin = b""
        return data or None

    def _judge(self, data: bytes, size: int, *, plain: bool) -> RequestHead | Failure:
        self._rest = data[size:]
        block = data[:size]
        if self._last is not None and self._last[0] == block:
            self._verdict = self._last[1]
            return self._verdict
        verdict = _parse_request(block, self._target_bytes, plain=plain)
        if isinstance(verdict, Fault):
            return self._refuse(verdict)
        self._last = (block, verdict)
        self._verdict = verdict
        return verdict

    def _refuse(self, fault: Fault) -> Failure:
        failure = Failure(Side.CLIENT, Phase.HEAD, fault.kind, fault.detail)
        self._verdict = failure
        return failure

    def rest(self) -> bytes:
        """What came behind the head; the reader then waits for the next one."""
        rest, self._rest = self._rest, b""
        self._verdict = self._scanner = None
        self._empty_lines = 0
        self.started = False
        return rest

    def close(self) -> Failure | None:
        """The client sent EOF: None if no head had begun, else MALFORMED."""
        if isinstance(self._verdict, Failure):
            return self._verdict
        if not self.started or self._verdict is not None:
            return None
        return self._refuse(Fault(Kind.MALFORMED, "The connection was closed inside the head."))


def _plain_fields(block: bytes) -> Headers | None:
    """The fields of a block that the scanner has accepted, as h11 would give them; None: ask h11."""
    start = block.index(b"\r\n") + 2
    lines = _FIELD_LINE.findall(block, start, len(block) - 2)
    headers = Headers([(name, value.strip(b" \t")) for name, value in lines])
    lengths = headers.get_all(b"content-length")
    if lengths and not (len(lengths) == 1 and lengths[0].isdigit() and len(lengths[0]) < 19):
        return None
    codings = headers.get_all(b"transfer-encoding")
    if codings and codings != [b"chunked"]:
        return None
    return headers


def _plain_request(block: bytes) -> RequestHead | None:
    """What h11 makes of an accepted block, without h11; None: ask it."""
    headers = _plain_fields(block)
    if headers is None or len(headers.get_all(b"host")) != 1:
        return None
    method, target, version = block[: block.index(b"\r\n")].split(b" ")
    return RequestHead(method, target, headers, version[5:])


def _h11_request(block: bytes) -> RequestHead | Fault:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(block)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError as exc:
        return _fault(exc)
    assert isinstance(event, h11.Request)
    version = b"1.0" if event.http_version == b"1.0" else b"1.1"  # RFC 9110 2.5: a higher minor version is ours
    return RequestHead(event.method, event.target, Headers(event.headers.raw_items()), version)


def _parse_request(block: bytes, target_bytes: int, *, plain: bool) -> RequestHead | Fault:
    """The head in an accepted block; `plain`: REQUEST_HEAD has matched it."""
    head = (_plain_request(block) if plain else None) or _h11_request(block)
    if isinstance(head, Fault):
        return head
    if len(head.target) > target_bytes:
        return Fault(Kind.TARGET_TOO_LONG, f"The request target is longer than {target_bytes} bytes.")
    return _objection(head, block) or head


def _objection(head: RequestHead, block: bytes) -> Fault | None:
    """What h11 has nothing against and a gateway has to."""
    if head.method in _REFUSED_METHODS:
        return Fault(Kind.METHOD_NOT_ALLOWED, f"{head.method.decode('ascii')} is not relayed.")
    if not _one_length(head.headers, block):
        return Fault(Kind.MALFORMED, "Content-Length must be given once, as digits.")
    framing = request_framing(head)
    if isinstance(framing, Failure):
        return Fault(framing.kind, framing.detail)
    form = origin_form(head)
    if isinstance(form, Failure):
        return Fault(form.kind, form.detail)
    for name in _CREDENTIALS:
        if name in head.headers and len(head.headers.get_all(name)) > 1:
            return Fault(Kind.MALFORMED, "A credential was given twice.")
    return None


def _fault(exc: h11.RemoteProtocolError) -> Fault:
    # h11 raises it from a frame that holds it: with its traceback it would keep the connection that sent the head
    # until the garbage collector looks, which is seldom.
    exc.__traceback__ = None
    if exc.error_status_hint == 501:
        return Fault(Kind.UNSUPPORTED_CODING, "It must be chunked.")
    # What follows a colon may quote the head, secrets included.
    return Fault(Kind.MALFORMED, str(exc).partition(":")[0] + ".")


def _one_length(headers: Headers, block: bytes) -> bool:
    """h11 joins equal duplicates and lists of Content-Length into one value; a gateway refuses both (RFC 9112 6.3)."""
    value = headers.get(b"content-length")
    if value is None:
        return True
    lowered = block.lower()
    start = lowered.index(b"\r\ncontent-length:") + 17
    raw = block[start : block.index(b"\r\n", start)].strip(b" \t")
    return raw == value and lowered.find(b"\r\ncontent-length:", start) < 0


@final
class ResponseHeadReader:
    """Reads response heads from one upstream, informational ones included, one after the other."""

    __slots__ = (
        "_head_bytes",
        "_head_fields",
        "_last",
        "_rest",
        "_scanner",
        "_verdict",
        "started",
    )

    def __init__(self, *, head_bytes: int, head_fields: int) -> None:
        self._head_bytes = head_bytes
        self._head_fields = head_fields
        self._scanner: Scanner | None = None
        self._verdict: ResponseHead | Failure | None = None
        self._rest = b""
        self._last: tuple[bytes, ResponseHead] | None = None  # the head before this one, and its bytes
        self.started = False

    def feed(self, data: bytes) -> ResponseHead | Failure | None:
        """The head (101 and the other 1xx too), a failure of the upstream's (always MALFORMED), or None: more is
        needed. Raises CanalError if `rest()` was not called after a head."""
        if self._verdict is not None:
            if isinstance(self._verdict, ResponseHead):
                raise CanalError("call rest() after a head, before more is fed")
            return self._verdict
        if not data:
            return None
        self.started = True
        if self._scanner is None:
            last = self._last
            if last is not None and data.startswith(last[0]):
                self._rest = data[len(last[0]) :]
                self._verdict = last[1]
                return last[1]
            match = RESPONSE_HEAD.match(data, 0, self._head_bytes)
            if match is not None and data.count(b"\r\n", 0, match.end()) - 2 <= self._head_fields:
                return self._judge(data, match.end(), plain=True)
            self._scanner = Scanner(RESPONSE, self._head_bytes, self._head_fields)
        fault = self._scanner.feed(data)
        if fault is not None:
            return self._refuse(fault.detail)
        if self._scanner.size is not None:
            return self._judge(bytes(self._scanner.data), self._scanner.size, plain=False)
        return None

    def forget(self) -> None:
        """Remember no head: the next one comes after a long while, if at all."""
        self._last = None

    def _judge(self, data: bytes, size: int, *, plain: bool) -> ResponseHead | Failure:
        self._rest = data[size:]
        block = data[:size]
        if self._last is not None and self._last[0] == block:
            self._verdict = self._last[1]
            return self._verdict
        verdict = _parse_response(block, plain=plain)
        if isinstance(verdict, Fault):
            return self._refuse(verdict.detail)
        self._last = (block, verdict)
        self._verdict = verdict
        return verdict

    def _refuse(self, detail: str) -> Failure:
        failure = Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.MALFORMED, detail)
        self._verdict = failure
        return failure

    def rest(self) -> bytes:
        """What came behind the head; the reader then waits for the next one."""
        rest, self._rest = self._rest, b""
        self._verdict = self._scanner = None
        self.started = False
        return rest

    def close(self) -> Failure | None:
        """The upstream sent EOF: None if no head had begun, else CUT."""
        if isinstance(self._verdict, Failure):
            return self._verdict
        if not self.started or self._verdict is not None:
            return None
        failure = Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.CUT, "The connection was closed inside the head.")
        self._verdict = failure
        return failure


def _plain_response(block: bytes) -> ResponseHead | None:
    """What h11 makes of an accepted block of a final response, without h11; None: ask it."""
    headers = _plain_fields(block)
    if headers is None or block[9:10] == b"1" or block[12:13] != b" ":
        return None
    return ResponseHead(int(block[9:12]), headers, block[13 : block.index(b"\r\n")], block[5:8])


def _h11_response(block: bytes) -> ResponseHead | Fault:
    connection = h11.Connection(h11.CLIENT)
    if block[9:10] == b"1":
        connection.send(_ASKED)  # h11 takes 1xx only for an answer, and 101 only if an upgrade was asked for
    connection.receive_data(block)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError as exc:
        return _fault(exc)
    assert isinstance(event, h11.Response | h11.InformationalResponse)
    version = b"1.0" if event.http_version == b"1.0" else b"1.1"
    return ResponseHead(event.status_code, Headers(event.headers.raw_items()), event.reason, version)


def _parse_response(block: bytes, *, plain: bool) -> ResponseHead | Fault:
    """The head in an accepted block; `plain`: RESPONSE_HEAD has matched it."""
    if not b"100" <= block[9:12] <= b"599":
        return Fault(Kind.MALFORMED, "The status code is not one of HTTP.")  # RFC 9110 15
    if not block.startswith(b"HTTP/1."):
        return Fault(Kind.MALFORMED, "The upstream does not speak HTTP/1.")
    head = (_plain_response(block) if plain else None) or _h11_response(block)
    if isinstance(head, ResponseHead) and not _one_length(head.headers, block):
        return Fault(Kind.MALFORMED, "Content-Length must be given once, as digits.")
    return head


_ASKED = h11.Request(method="GET", target="/", headers=[("Host", "a"), ("Connection", "upgrade"), ("Upgrade", "a")])


# -- writing -----------------------------------------------------------------------------------------------------------


def write_request_head(head: RequestHead) -> bytes:
    """The head as bytes, always as HTTP/1.1. Raises CanalError if a part holds what does not belong there."""
    block = b"%b %b HTTP/1.1\r\n%b" % (head.method, head.target, _write_fields(head.headers))
    if REQUEST_HEAD.fullmatch(block) is None or block.count(b"\r\n") != len(head.headers) + 2:
        raise CanalError("a request head holds a byte that does not belong there")
    return block


def write_response_head(head: ResponseHead) -> bytes:
    """The head as bytes, always as HTTP/1.1 (RFC 9110 6.2: our version, not the client's). Raises CanalError if a part
    holds what does not belong there."""
    block = b"HTTP/1.1 %d %b\r\n%b" % (head.status, head.reason, _write_fields(head.headers))
    if RESPONSE_HEAD.fullmatch(block) is None or block.count(b"\r\n") != len(head.headers) + 2:
        raise CanalError("a response head holds a byte that does not belong there")
    return block


def _write_fields(headers: Headers) -> bytes:
    if b":" in b"".join([name for name, _, _ in headers.lowered()]):
        raise CanalError("a field name holds a colon")
    return b"".join([b"%b: %b\r\n" % (name, value) for name, _, value in headers.lowered()]) + b"\r\n"
