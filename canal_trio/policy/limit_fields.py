"""What clients are told about their limits: `x-ratelimit-*` in OpenAI's format, and a sentence for a refusal. Pure.

There is one set of fields and there may be four scopes: each of the two families (requests, tokens) tells of the scope
that has least left. `reset` is when the whole burst is there again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from canal_trio.policy.prices import money
from canal_trio.policy.ratelimit import Refusal, State, What
from canal_trio.policy.scopes import Scope

__all__ = ["Counted", "go_duration", "limit_fields", "refusal_text"]

Counted = Sequence[tuple[Scope, State]]
"""Each scope of an exchange and what it has counted, this exchange included if it was let in."""


def go_duration(seconds: float) -> bytes:
    """A duration as OpenAI writes it, which is as Go does: `0s`, `17ms`, `8.64s`, `6m0s`, `1h0m0s`. Rounded up."""
    if seconds <= 1.001e-9:
        return b"0s"
    millis = math.ceil(seconds * 1000 - 1e-6)  # what rounding may have added
    if millis < 1000:
        return b"%dms" % millis
    minutes, rest = divmod(millis, 60_000)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{text}s".encode("ascii")
    return f"{minutes}m{text}s".encode("ascii") if minutes else f"{text}s".encode("ascii")


_REQUESTS, _TOKENS = (
    b"x-ratelimit-limit-%b: %%d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %%b\r\n" % ((name,) * 3)
    for name in (b"requests", b"tokens")
)
_BOTH = _REQUESTS + _TOKENS


def limit_fields(counted: Counted) -> bytes:
    """The fields for an answer, as lines; none where neither requests nor tokens are limited."""
    requests = tokens = None
    for scope, state in counted:
        rule = scope.rule
        if rule.requests is not None:
            left = rule.request_burst - state.requests
            if requests is None or left < requests[0]:
                requests = (left, rule.requests, state.requests / rule.request_rate)
        if rule.tokens is not None:
            left = rule.token_burst - state.tokens
            if tokens is None or left < tokens[0]:
                tokens = (left, rule.tokens, state.tokens / rule.token_rate)
    words: tuple[float | bytes, ...] = ()
    if requests is not None:
        left, most, reset = requests
        words = (most, left + 1e-6 if left > 0 else 0, go_duration(reset))
    if tokens is None:
        return _REQUESTS % words if words else b""
    left, most, reset = tokens
    form = _BOTH if words else _TOKENS
    return form % (*words, most, left + 1e-6 if left > 0 else 0, go_duration(reset))


_UNITS = {
    What.REQUESTS: "requests per minute",
    What.TOKENS: "tokens per minute",
    What.STREAMS: "requests at once",
    What.SPEND_DAY: "a day (UTC)",
    What.SPEND_MONTH: "a month (UTC)",
}


def refusal_text(scope: Scope, refusal: Refusal) -> str:
    """One sentence or two: which limit of whom, and when to come again."""
    unit = _UNITS[refusal.what]
    if refusal.what in (What.SPEND_DAY, What.SPEND_MONTH):
        when = go_duration(math.ceil(refusal.wait)).decode("ascii")
        return f"The budget of {scope.text}, {money(int(refusal.limit))} {unit}, is spent. It begins anew in {when}."
    if refusal.what is What.STREAMS:
        return f"Rate limit reached for {scope.text}: {refusal.limit:g} {unit}. Try again when one has ended."
    when = go_duration(refusal.wait).decode("ascii")
    return f"Rate limit reached for {scope.text}: {refusal.limit:.15g} {unit}. Try again in {when}."
