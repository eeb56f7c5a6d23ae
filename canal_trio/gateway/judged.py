"""What a request's body was judged to say, and what of it an upstream gets in other words.

A body is judged once, whole and held: its fields decide the route. For an upstream with another name for the model, and
where the gateway asks for usage itself, the body is edited by splicing; it is then a few bytes longer or shorter, and
all the rest of it is what the client sent.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import trio

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.messages import Headers
from canal_trio.relay.course import in_task
from canal_trio.wire.facts import RequestFacts
from canal_trio.wire.form_fields import FormFields, form_fields, is_form
from canal_trio.wire.json_fields import JsonFields, json_fields

__all__ = ["AT_ONCE_BYTES", "Judged", "judge", "judge_in_thread"]

AT_ONCE_BYTES: Final = 1024 * 1024  # up to these it takes a millisecond or two; more are judged in a thread

_CHARSET: Final = "The body's charset is not UTF-8."

Judged: TypeAlias = JsonFields | FormFields


async def judge_in_thread(headers: Headers, facts: RequestFacts, body: bytes, strict: bool) -> Judged | Failure | None:
    """As `judge`, for a large body: the loop goes on meanwhile. A checkpoint. Cancelling it leaves the thread to end by
    itself."""
    await in_task()
    return await trio.to_thread.run_sync(judge, headers, facts, body, strict, abandon_on_cancel=True)


def judge(headers: Headers, facts: RequestFacts, body: bytes, strict: bool) -> Judged | Failure | None:
    """What `body` says. MALFORMED if it says it twice or cannot be read; None for the latter if not `strict`.

    `headers` and `facts` are its request's.
    """
    if not facts.one_type:
        return _malformed("There is more than one Content-Type.")
    fields: Judged | str
    if facts.json:
        fields = json_fields(body) if facts.utf8 else _CHARSET
    else:
        kind = headers.get(b"content-type") or b""
        fields = form_fields(kind, body) if is_form(kind) else json_fields(body) if facts.utf8 else _CHARSET
    if not isinstance(fields, str):
        return fields
    if b"content-encoding" in headers and strict:
        return _malformed("The body is compressed: it has to be sent as it is, to be read.")
    return _malformed(fields) if strict or "more than once" in fields else None


def _malformed(detail: str) -> Failure:
    return Failure(Side.CLIENT, Phase.ROUTE, Kind.MALFORMED, detail)
