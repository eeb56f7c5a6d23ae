"""The gateway's own answers: errors in OpenAI's shape, and the few requests it answers itself.

Never status 200 for an error, always `x-request-id`, `retry-after` on 429 and 503, `x-should-retry` where we know
better than the status: the official SDKs obey it.
"""

from __future__ import annotations

import time
from email.utils import formatdate

from canal_trio.errors import Failure, Kind
from canal_trio.gateway.answers import with_fields
from canal_trio.messages import Headers, RequestHead, ResponseHead
from canal_trio.policy.exchange import Answer, answer_for
from canal_trio.wire.error_bodies import error_body
from canal_trio.wire.heads import write_response_head

__all__ = ["continue_head", "error_response", "http_date", "own_answer"]


_last_date = (0, b"")


def http_date() -> bytes:
    """The time, as Date wants it (RFC 9110 5.6.7). Made once a second."""
    global _last_date  # a cache of one value
    now = int(time.time())
    if _last_date[0] != now:
        _last_date = (now, formatdate(now, usegmt=True).encode("ascii"))
    return _last_date[1]


def continue_head() -> bytes:
    """`100 Continue`: the body will be read (RFC 9110 10.1.1)."""
    return write_response_head(ResponseHead(100, reason=b"Continue"))


def error_response(
    failure: Failure,
    *,
    request_id: str,
    head: RequestHead | None,
    close: bool,
    more: bytes = b"",
) -> tuple[int, bytes]:
    """The status and the whole response for `failure`, as bytes; `more` are further fields, as lines."""
    answer = answer_for(failure)
    body = error_body(answer.message, answer.type, answer.code, answer.param)
    fields = [
        (b"date", http_date()),
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id.encode("ascii")),
        *_hints(answer, failure),
        (b"connection", b"close" if close else b"keep-alive"),
    ]
    response = write_response_head(ResponseHead(answer.status, Headers(fields), _REASONS.get(answer.status, b"")))
    if more:
        response = with_fields(response, more)
    if head is not None and head.method == b"HEAD":
        return answer.status, response
    return answer.status, response + body


def _hints(answer: Answer, failure: Failure) -> list[tuple[bytes, bytes]]:
    hints: list[tuple[bytes, bytes]] = []
    if answer.retry_after is not None:
        hints.append((b"retry-after", b"%d" % answer.retry_after))
    if answer.should_retry is not None:
        hints.append((b"x-should-retry", b"true" if answer.should_retry else b"false"))
    if answer.status == 401:
        hints.append((b"www-authenticate", b"Bearer"))  # RFC 9110 11.6.1: a 401 names a scheme
    if failure.kind is Kind.METHOD_NOT_ALLOWED:
        hints.append((b"allow", b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"))  # RFC 9110 15.5.6
    return hints


def own_answer(head: RequestHead, *, request_id: str, close: bool) -> tuple[int, bytes] | None:
    """The response to a request that ends here by its own wish (`Max-Forwards: 0`), else None (RFC 9110 7.6.2)."""
    if head.method != b"OPTIONS" or head.headers.get(b"max-forwards") != b"0":
        return None
    fields = [
        (b"allow", b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),
        (b"x-request-id", request_id.encode("ascii")),
        (b"connection", b"close" if close else b"keep-alive"),
    ]
    return 204, write_response_head(ResponseHead(204, Headers(fields), b"No Content"))


_REASONS = {
    400: b"Bad Request",
    401: b"Unauthorized",
    403: b"Forbidden",
    404: b"Not Found",
    405: b"Method Not Allowed",
    408: b"Request Timeout",
    413: b"Content Too Large",
    414: b"URI Too Long",
    417: b"Expectation Failed",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
    505: b"HTTP Version Not Supported",
}
