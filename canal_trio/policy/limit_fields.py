"""What clients are told about their limits: `x-ratelimit-*` in OpenAI's format, and a sentence for a refusal. Pure.

There is one set of fields and there may be four scopes: each of the two families (requests, tokens) tells of the scope
that has least left. `reset` is when the whole burst is there again.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf

from canal_trio.policy.prices import money
from canal_trio.policy.ratelimit import Refusal, Rule, State, What
from canal_trio.policy.scopes import Scope

__all__ = ["Counted", "go_duration", "limit_fields", "refusal_text"]

Counted = Sequence[tuple[Scope, State]]
"""Each scope of an exchange and what it has counted, this exchange included if it was let in."""


_NEARLY = 1e-6  # of one: what rounding may have taken
_MILLIS = [b"0s", *(b"%dms" % number for number in range(1, 1000))]


def go_duration(seconds: float) -> bytes:
    """A duration as OpenAI writes it, which is as Go does: `0s`, `17ms`, `8.64s`, `6m0s`, `1h0m0s`. Rounded up.

    None is below zero.
    """
    millis = ceil(seconds * 1000 - 1e-6)  # what rounding may have added
    if millis < 1000:
        return _MILLIS[millis]
    if millis < 60_000:
        return b"%gs" % (millis / 1000)
    minutes, rest = divmod(millis, 60_000)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return b"%dh%dm%gs" % (hours, minutes, rest / 1000)
    return b"%dm%gs" % (minutes, rest / 1000)


_FORM = b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %%b\r\n"


def _forms(rule: Rule) -> tuple[bytes, bytes, bytes]:
    """What is filled in for requests, for tokens, and for both, of those that `rule` limits. Made once for a rule."""
    requests, tokens = (
        b"" if most is None else _FORM % (name, max(1, most), name, name)
        for name, most in ((b"requests", rule.requests), (b"tokens", rule.tokens))
    )
    rule.forms = forms = requests, tokens, requests + tokens if requests and tokens else b""
    return forms


def limit_fields(counted: Counted) -> bytes:
    """The fields for an answer, as lines; none where neither requests nor tokens are limited."""
    if len(counted) == 1:  # all of one scope, as often: what is below in half the time
        scope, state = counted[0]
        rule = scope.rule
        form = (rule.forms or _forms(rule))[2]
        if form:
            requests, tokens = state.requests, state.tokens
            left, rest = rule.request_burst - requests, rule.token_burst - tokens
            return form % (
                left + _NEARLY if left > 0 else 0,
                go_duration(requests / rule.request_rate),
                rest + _NEARLY if rest > 0 else 0,
                go_duration(tokens / rule.token_rate),
            )
    fewest = least = inf  # where nothing is limited as much is left, which is not less
    few = little = None  # whose rule
    done = used = 0.0
    for scope, state in counted:
        rule = scope.rule
        left = rule.request_burst - state.requests
        if left < fewest:
            fewest, few, done = left, rule, state.requests
        left = rule.token_burst - state.tokens
        if left < least:
            least, little, used = left, rule, state.tokens
    lines = b""
    if few is not None:
        form = (few.forms or _forms(few))[0]
        lines = form % (fewest + _NEARLY if fewest > 0 else 0, go_duration(done / few.request_rate))
    if little is not None:
        form = (little.forms or _forms(little))[1]
        lines += form % (least + _NEARLY if least > 0 else 0, go_duration(used / little.token_rate))
    return lines


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
        budget = f"The budget of {scope.text}, {money(int(refusal.limit))} {unit},"
        if refusal.aside:
            return f"{budget} is set aside for requests under way. Try again when one has ended."
        return f"{budget} is spent. It begins anew in {go_duration(ceil(refusal.wait)).decode('ascii')}."
    if refusal.what is What.STREAMS:
        return f"Rate limit reached for {scope.text}: {refusal.limit:g} {unit}. Try again when one has ended."
    when = go_duration(refusal.wait).decode("ascii")
    return f"Rate limit reached for {scope.text}: {refusal.limit:.15g} {unit}. Try again in {when}."
