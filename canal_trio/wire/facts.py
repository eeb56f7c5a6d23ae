"""What the gateway asks of a head, found out once and kept with it.

Clients and upstreams that stay send the same head again and again, and the readers of `wire.heads` give the very same
object then; asked one by one, these questions were a tenth of a small exchange. Invariant: a fact depends on nothing
but the head.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from canal_trio.errors import Failure
from canal_trio.messages import RequestHead, ResponseHead
from canal_trio.wire.bodies import content_length, request_framing
from canal_trio.wire.form_fields import is_form
from canal_trio.wire.headers import is_event_stream, is_json, keep_alive, upgrade_of, wants_continue
from canal_trio.wire.sse import BlindScanner, EventScanner
from canal_trio.wire.targets import deployment_in, origin_form, plain_path
from canal_trio.wire.usage import BodyUsage, StreamUsage

__all__ = ["RequestFacts", "ResponseFacts", "request_facts", "response_facts"]

# Uploads that have no model in OpenAI's API, and may be far larger than what is held.
_NAMELESS = ("/v1/files", "/v1/uploads")
# The charsets that read ASCII as UTF-8 does; in others (UTF-7, HZ) a body can say something else than in ours.
_CHARSET = re.compile(
    rb"charset[ \t]*=[ \t]*(\"?)(?:utf-?8|us-ascii|iso-8859-1|windows-1252|)\1[ \t]*(?:;|\Z)", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """Of a client's request. Failures are the client's."""

    framing: int | Failure  # the body's length, -1 if it is chunked
    length: int | Failure | None  # what Content-Length announces
    keep_alive: bool  # the client keeps the connection open
    wants_continue: bool | Failure
    upgrade: bytes | None  # the protocol it wants to switch to
    json: bool  # the content type says that the body is JSON
    names_model: bool  # the body is of a kind that names its model: JSON, or a form that is no upload of files
    one_type: bool  # there is one content type at most
    utf8: bool  # it names no charset in which JSON says something else
    method: str  # for people
    path: str  # of the target; without the query, which may hold secrets
    deployment: str | None  # the model that the path names, as Azure's do; "": it is not clear which


@dataclass(frozen=True, slots=True)
class ResponseFacts:
    """Of an upstream's response."""

    event_stream: bool
    scanner: type[EventScanner]  # what looks at one as it passes
    known: int | None  # the body's length, where it was announced in a way that can be passed on
    bodyless: bool  # by its status
    keep_alive: bool  # the upstream keeps the connection open
    tap: type[BodyUsage | StreamUsage] | None  # what reads in its body what was used, if that can be read
    tells_limits: bool  # it has fields of the kind that tell a client its rate limits

    @property
    def legible_stream(self) -> bool:
        """It is an event stream, and not compressed."""
        return self.event_stream and self.scanner.legible


def request_facts(head: RequestHead) -> RequestFacts:
    """Those of `head`. Not a checkpoint."""
    kept = head.facts
    if isinstance(kept, RequestFacts):
        return kept
    headers = head.headers
    json, types = is_json(headers), headers.get_all(b"content-type")
    path = _path(head)
    facts = RequestFacts(
        framing=request_framing(head),
        length=content_length(headers),
        keep_alive=keep_alive(head.version, headers),
        wants_continue=wants_continue(head),
        upgrade=upgrade_of(head),
        json=json,
        names_model=json or (bool(types) and is_form(types[0]) and not _nameless(path)),
        one_type=len(types) <= 1,
        utf8=all(_is_utf8(value) for value in types),
        method=head.method.decode("ascii", "backslashreplace"),
        path=path,
        deployment=deployment_in(path),
    )
    head.keep(facts)
    return facts


def _path(head: RequestHead) -> str:
    """The path that `head` asks for, in whichever form; all of a target that cannot be read."""
    target = head.target
    if not target.startswith(b"/"):
        origin = origin_form(head)
        target = target if isinstance(origin, Failure) else origin[0]
    return target.partition(b"?")[0].decode("ascii", "backslashreplace")


def _nameless(path: str) -> bool:
    """An upload of files, for every upstream: `/v1/files/../audio/transcriptions` is none for some."""
    return path.startswith(_NAMELESS) and plain_path(path.encode("ascii")) is not None


def _is_utf8(content_type: bytes) -> bool:
    said = content_type.lower().count(b"charset")
    return not said or said == len(_CHARSET.findall(content_type))


def response_facts(head: ResponseHead) -> ResponseFacts:
    """Those of `head`, which is a final one. Not a checkpoint."""
    kept = head.facts
    if isinstance(kept, ResponseFacts):
        return kept
    headers = head.headers
    length = content_length(headers)
    event_stream = is_event_stream(headers)
    coded = (headers.get(b"content-encoding") or b"identity").strip().lower() != b"identity"
    tap = StreamUsage if event_stream else BodyUsage if is_json(headers) else None
    facts = ResponseFacts(
        event_stream=event_stream,
        scanner=BlindScanner if coded else EventScanner,
        known=length if isinstance(length, int) and b"transfer-encoding" not in headers else None,
        bodyless=head.status in (204, 304),
        keep_alive=keep_alive(head.version, headers),
        tap=None if coded else tap,
        tells_limits=any(lower.startswith(b"x-ratelimit-") for _, lower, _ in headers.lowered()),
    )
    head.keep(facts)
    return facts
