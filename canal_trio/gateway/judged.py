"""What a request's body was judged to say, and what of it an upstream gets in other words.

A body is judged once, whole and held: its fields decide the route. For an upstream with another name for the model, and
where the gateway asks for usage itself, the body is edited by splicing; it is then a few bytes longer or shorter, and
all the rest of it is what the client sent.
"""

from __future__ import annotations

from typing import Final, final

import trio

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.hooks import Wanted
from canal_trio.messages import RequestHead
from canal_trio.relay.course import in_task
from canal_trio.wire.facts import request_facts
from canal_trio.wire.form_fields import FormFields, form_fields, form_model_edit, is_form
from canal_trio.wire.json_fields import JsonFields, json_fields, model_edit, usage_edit
from canal_trio.wire.splice import Edit

__all__ = ["AT_ONCE_BYTES", "Judged", "judge", "judge_in_thread"]

AT_ONCE_BYTES: Final = 1024 * 1024  # up to these it takes a millisecond or two; more are judged in a thread


@final
class Judged:
    """A body's fields. `model` is the one that it names, `can_ask_usage` says that it asks for a stream and does not
    say whether it wants its usage, `wanted` how much it wants generated (None: it does not say)."""

    __slots__ = ("_fields", "_usage", "can_ask_usage", "model", "wanted")

    def __init__(self, body: bytes, fields: JsonFields | FormFields) -> None:
        self.model = fields.model
        self._fields = fields
        self._usage: Edit | None = None
        self.wanted: Wanted | None = None
        if isinstance(fields, JsonFields):
            self.wanted = fields.wanted
            if fields.stream:
                self._usage = usage_edit(body, fields)
        self.can_ask_usage = self._usage is not None

    @property
    def stream(self) -> bool:
        """A stream is asked for."""
        return isinstance(self._fields, JsonFields) and self._fields.stream

    def edits(self, model: str | None, *, usage: bool) -> tuple[Edit, ...]:
        """For an upstream that calls the model `model` (None: as the client does), and is asked for usage or not."""
        edits = (self._usage,) if usage and self._usage is not None else ()
        if model is None or self.model is None or model == self.model:
            return edits
        fields = self._fields
        edit = model_edit(fields, model) if isinstance(fields, JsonFields) else form_model_edit(fields, model)
        return (*edits, edit)


async def judge_in_thread(head: RequestHead, body: bytes, strict: bool) -> Judged | Failure | None:
    """As `judge`, for a large body: the loop goes on meanwhile. A checkpoint. Cancelling it leaves the thread to end by
    itself."""
    await in_task()
    return await trio.to_thread.run_sync(judge, head, body, strict, abandon_on_cancel=True)


def judge(head: RequestHead, body: bytes, strict: bool) -> Judged | Failure | None:
    """What `body` says. MALFORMED if it says it twice or cannot be read; None for the latter if not `strict`."""
    headers, facts = head.headers, request_facts(head)
    if not facts.one_type:
        return _malformed("There is more than one Content-Type.")
    fields: JsonFields | FormFields | str
    if facts.json:
        fields = json_fields(body)
    else:
        kind = headers.get(b"content-type") or b""
        fields = form_fields(kind, body) if is_form(kind) else json_fields(body)
    if not isinstance(fields, str):
        return Judged(body, fields)
    if b"content-encoding" in headers and strict:
        return _malformed("The body is compressed: it has to be sent as it is, to be read.")
    return _malformed(fields) if strict or "more than once" in fields else None


def _malformed(detail: str) -> Failure:
    return Failure(Side.CLIENT, Phase.ROUTE, Kind.MALFORMED, detail)
