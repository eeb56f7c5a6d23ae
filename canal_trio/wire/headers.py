"""What a proxy does to fields: which stay, which go, which are its own.

A message is never copied on, it is built anew: fields between two neighbours are dropped, those that Connection names
too (RFC 9110 7.6.1), and then the gateway writes its own framing, Host, Via and identity fields. In this order, so that
a client cannot name one of ours in Connection and have it removed (CVE-2022-31813). Nothing here looks at a body.
"""

from __future__ import annotations

import functools
import ipaddress
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.messages import Headers, RequestHead, ResponseHead
from canal_trio.wire.targets import origin_form

__all__ = [
    "HOP_BY_HOP",
    "ForClient",
    "ForUpstream",
    "client_address",
    "for_client",
    "for_upstream",
    "is_event_stream",
    "is_json",
    "keep_alive",
    "request_id",
    "upgrade_of",
    "wants_continue",
]

Fields = list[tuple[bytes, bytes]]

# RFC 9110 7.6.1, the fields of authentication with a proxy, and what older software made up.
HOP_BY_HOP: Final = frozenset(
    b"connection keep-alive proxy-connection te upgrade http2-settings proxy-authorization proxy-authenticate "
    b"proxy-authentication-info".split()
)
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})
_CREDENTIALS: Final = frozenset({b"authorization", b"api-key", b"x-api-key"})
_KEY_PROTOCOL: Final = b"openai-insecure-api-key."  # of the Realtime API's clients in browsers
_FORWARDED: Final = frozenset({b"forwarded", b"x-real-ip"})
_X_FORWARDED: Final = b"x-forwarded-"
_OURS: Final = b"x-canal-"
# What Connection must not remove: the message would be framed, routed or authenticated differently without it.
_NOT_NOMINATED: Final = _FRAMING | _CREDENTIALS | {b"host"}
# CGI-like upstreams read `-` and `_` alike (CVE-2026-52845): an alias of a field that we guard is that field.
_GUARDED: Final = HOP_BY_HOP | _FRAMING | _CREDENTIALS | _FORWARDED | {b"host", b"proxy", b"via", b"x-request-id"}
# Ids have to differ, not to be secret: this saves a system call for each request. Seeded by the system, per process.
_random_bits: Final = random.Random().getrandbits
_REQUEST_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")
_EXPECTS_BODY: Final = frozenset({b"POST", b"PUT", b"PATCH"})


def keep_alive(version: bytes, headers: Headers) -> bool:
    """Does the sender keep the connection open after this message (RFC 9112 9.3)?"""
    options = headers.tokens(b"connection")
    return b"close" not in options and (version != b"1.0" or b"keep-alive" in options)


def request_id(headers: Headers) -> bytes:
    """The sender's `x-request-id` if it is one, of 1 to 128 visible ASCII characters; else a new one."""
    given = headers.get_all(b"x-request-id")
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return given[0]
    return b"req_%032x" % _random_bits(128)


def is_json(headers: Headers) -> bool:
    """Is the body JSON, by its content type?"""
    media = (headers.get(b"content-type") or b"").partition(b";")[0].strip().lower()
    return media == b"application/json" or media.endswith(b"+json")


def is_event_stream(headers: Headers) -> bool:
    """Is the body Server-Sent Events, by its content type?"""
    value = headers.get(b"content-type", b"") or b""
    return value.partition(b";")[0].strip(b" \t").lower() == b"text/event-stream"


def upgrade_of(head: RequestHead) -> bytes | None:
    """The protocol a client wants to switch to and that is relayed: `b"websocket"`, or None.

    Only with the `upgrade` connection option, by HTTP/1.1, and without a body, which would be taken for the new
    protocol's bytes by one of two parsers.
    """
    headers = head.headers
    if head.version != b"1.1" or head.method != b"GET" or b"upgrade" not in headers.tokens(b"connection"):
        return None
    if b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0":
        return None
    return b"websocket" if headers.tokens(b"upgrade") == [b"websocket"] else None


def wants_continue(head: RequestHead) -> bool | Failure:
    """Does the client wait for `100 Continue`? EXPECTATION for any other expectation (RFC 9110 10.1.1)."""
    expectations = head.headers.tokens(b"expect")
    if head.version == b"1.0" or not expectations:
        return False
    if set(expectations) != {b"100-continue"}:
        return Failure(Side.CLIENT, Phase.HEAD, Kind.EXPECTATION)
    return True


def client_address(headers: Headers, peer: str, trusted: Callable[[str], bool]) -> str:
    """Who the client is: `peer`, or the right-most address in X-Forwarded-For that no trusted proxy has.

    An entry that is not an address ends the search at the proxy that reported it.
    """
    address = peer
    for entry in reversed(headers.tokens(b"x-forwarded-for")):
        if not trusted(address):
            break
        reported = _address(entry.decode("latin-1"))
        if reported is None:
            break
        address = reported
    return address


def _address(text: str) -> str | None:
    """The address in `1.2.3.4`, `1.2.3.4:5`, `::1`, `[::1]` or `[::1]:5`."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None


def _without_nominated(dropped: frozenset[bytes], headers: Headers) -> frozenset[bytes]:
    """`dropped`, and what Connection names."""
    options = headers.tokens(b"connection")
    return dropped | (frozenset(options) - _NOT_NOMINATED) if options else dropped


def _with_via(headers: Headers, version: bytes, pseudonym: str) -> tuple[bytes, bytes]:
    """One Via with what was there and our own entry behind it (RFC 9110 7.6.3)."""
    entries = [value for value in headers.get_all(b"via") if value]
    return b"Via", b", ".join([*entries, b"%b %b" % (version, pseudonym.encode("ascii"))])


# -- to the upstream ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ForUpstream:
    """What the gateway knows about a request on its way to an upstream."""

    target: bytes  # as `targets.upstream_target` gave it
    authority: bytes  # the upstream's, for Host
    client: str  # the peer's address, `""` if it has none
    client_trusted: bool  # the peer is a trusted proxy: what it says about its clients is kept
    scheme: str  # of the client's connection
    request_id: bytes
    pseudonym: str  # our name in Via
    credential: tuple[bytes, bytes] | None = None  # the upstream's own, a whole field, in place of the client's
    strip_credentials: bool = False  # the client's key is ours to check and goes no further
    body: int | None = 0  # bytes; None: not known, so chunked
    upgrade: bytes | None = None  # what `upgrade_of` said


def for_upstream(head: RequestHead, options: ForUpstream) -> RequestHead:
    """The request as the upstream shall see it, with the gateway's own framing. `Expect` is gone: we answer it."""
    fields: Fields = [(b"Host", options.authority), *_request_fields(head, options)]
    if options.credential is not None:
        fields.append(options.credential)
    if options.body != 0:
        fields.append((b"Accept-Encoding", b"identity"))  # a compressing upstream holds events back
    fields += _request_framing(head.method, options)
    fields.append((b"X-Request-Id", options.request_id))
    fields += _forwarded(head, options)
    fields.append(_with_via(head.headers, head.version, options.pseudonym))
    return RequestHead(head.method, options.target, Headers(fields))


def _request_fields(head: RequestHead, options: ForUpstream) -> Iterator[tuple[bytes, bytes]]:
    """The client's own fields that go on."""
    ours = options.strip_credentials or options.credential is not None
    dropped = _without_nominated(
        _dropped(
            credentials=ours,
            accept_encoding=options.body != 0,
            trailer=options.body is not None,
        ),
        head.headers,
    )
    for name, lower, value in head.headers.lowered():
        if lower in dropped or lower.startswith((_X_FORWARDED, _OURS)) or _is_alias(lower):
            continue
        if lower == b"max-forwards" and head.method in (b"OPTIONS", b"TRACE"):
            if value.isdigit() and len(value) <= 9:
                yield name, b"%d" % max(int(value) - 1, 0)  # RFC 9110 7.6.2
            continue
        if lower == b"sec-websocket-protocol" and ours:
            value = _without_keys(value)
            if not value:
                continue
        yield name, value


def _without_keys(protocols: bytes) -> bytes:
    """The subprotocols without those in which browsers, which can set no field, hide a key."""
    members = [member.strip(b" \t") for member in protocols.split(b",")]
    return b", ".join([member for member in members if not member.lower().startswith(_KEY_PROTOCOL)])


@functools.lru_cache
def _dropped(credentials: bool, accept_encoding: bool, trailer: bool) -> frozenset[bytes]:
    dropped = HOP_BY_HOP | _FRAMING | _FORWARDED | {b"host", b"via", b"proxy", b"expect", b"x-request-id"}
    if credentials:
        dropped |= _CREDENTIALS
    if accept_encoding:
        dropped |= {b"accept-encoding"}
    return dropped | {b"trailer"} if trailer else dropped


def _is_alias(lower: bytes) -> bool:
    if b"_" not in lower:
        return False
    plain = lower.replace(b"_", b"-")
    return plain in _GUARDED or plain.startswith((_X_FORWARDED, _OURS))


def _request_framing(method: bytes, options: ForUpstream) -> Fields:
    if options.upgrade is not None:
        return [(b"Connection", b"Upgrade"), (b"Upgrade", options.upgrade)]
    if options.body is None:
        return [(b"Transfer-Encoding", b"chunked")]
    if options.body or method in _EXPECTS_BODY:
        return [(b"Content-Length", b"%d" % options.body)]  # RFC 9110 8.6: 0 where the method expects a body
    return []


_NO_HEADERS: Final = Headers()


def _forwarded(head: RequestHead, options: ForUpstream) -> Fields:
    """Whom we serve: X-Forwarded-For, -Proto, -Host and Forwarded (RFC 7239). A stranger's own claims were dropped."""
    given = head.headers if options.client_trusted else _NO_HEADERS
    form = origin_form(head)
    host = b"" if isinstance(form, Failure) else form[1]
    client = options.client.encode("ascii", "replace")
    fields: Fields = []
    chain = [value for value in given.get_all(b"x-forwarded-for") if value]
    if client:
        chain.append(client)
    if chain:
        fields.append((b"X-Forwarded-For", b", ".join(chain)))
    proto = given.get(b"x-forwarded-proto") or options.scheme.encode("ascii")
    fields.append((b"X-Forwarded-Proto", proto))
    shown = given.get(b"x-forwarded-host") or host
    if shown:
        fields.append((b"X-Forwarded-Host", shown))
    node = b'"[%b]"' % client if b":" in client else client or b"unknown"
    element = b"for=%b;proto=%b" % (node, options.scheme.encode("ascii"))
    if host:
        element += b';host="%b"' % host
    fields.append((b"Forwarded", b", ".join([*filter(None, given.get_all(b"forwarded")), element])))
    return fields


# -- to the client -----------------------------------------------------------------------------------------------------


class ForClient(NamedTuple):
    """What the gateway knows about a response on its way to a client. A tuple, as there is one for each answer."""

    request_id: bytes  # the first, so that what is behind it is what answers have in common
    request_version: bytes
    request_method: bytes
    pseudonym: str
    body: int | None = None  # bytes; None: not known, so chunked for HTTP/1.1 and close-delimited for HTTP/1.0
    close: bool = False  # the connection is closed after this response
    event_stream: bool = False
    upgrade: bytes | None = None  # the protocol of a 101
    date: bytes | None = None  # added to a final response that has none (RFC 9110 6.6.1); we have no clock here


_DROPPED_FOR_CLIENT: Final = {
    (informational, chunked): HOP_BY_HOP
    | _FRAMING
    | (frozenset() if informational else {b"via"})
    | (frozenset() if chunked else {b"trailer"})
    for informational in (False, True)
    for chunked in (False, True)
}


def for_client(head: ResponseHead, options: ForClient) -> ResponseHead:
    """The response as the client shall see it, with the gateway's own framing. Informational heads too.

    Content-Length stays in answers to HEAD and in 304 (`body` is what the upstream announced) and is dropped from 1xx
    and 204 (RFC 9110 8.6). The upstream's own `x-request-id` is kept: it is what its support asks for; ours, by which
    the log and the ledger go, stands beside it.
    """
    chunked = _is_chunked(head, options)
    dropped = _without_nominated(_DROPPED_FOR_CLIENT[head.informational, chunked], head.headers)
    fields: Fields = []
    for name, lower, value in head.headers.lowered():
        if lower not in dropped and not lower.startswith(_OURS):
            fields.append((name, value))
    if head.informational:
        if head.status == 101 and options.upgrade is not None:
            fields += [(b"Connection", b"Upgrade"), (b"Upgrade", options.upgrade)]
        return ResponseHead(head.status, Headers(fields), head.reason)
    fields += _response_framing(head, options, chunked=chunked)
    fields += _added(head, options, {name.lower() for name, _ in fields})
    return ResponseHead(head.status, Headers(fields), head.reason)


def _is_chunked(head: ResponseHead, options: ForClient) -> bool:
    bodyless = options.request_method == b"HEAD" or head.informational or head.status in (204, 304)
    return options.body is None and options.request_version != b"1.0" and not bodyless


def _response_framing(head: ResponseHead, options: ForClient, *, chunked: bool) -> Fields:
    fields: Fields = []
    if chunked:
        fields.append((b"Transfer-Encoding", b"chunked"))
    elif options.body is not None and head.status != 204:
        fields.append((b"Content-Length", b"%d" % options.body))
    if options.close:
        fields.append((b"Connection", b"close"))
    elif options.request_version == b"1.0":
        fields.append((b"Connection", b"keep-alive"))
    return fields


def _added(head: ResponseHead, options: ForClient, present: set[bytes]) -> Fields:
    mine = b"X-Canal-Request-Id" if b"x-request-id" in present else b"X-Request-Id"
    fields: Fields = [(mine, options.request_id)]
    if options.event_stream:
        # A proxy in front of us must flush as well (nginx reads the second one).
        if b"cache-control" not in present:
            fields.append((b"Cache-Control", b"no-cache"))
        if b"x-accel-buffering" not in present:
            fields.append((b"X-Accel-Buffering", b"no"))
    if options.date is not None and b"date" not in present:
        fields.append((b"Date", options.date))
    fields.append(_with_via(head.headers, head.version, options.pseudonym))
    return fields
