"""What the store in Redis is made of: its records, and the words that go to the scripts and come back."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import trio

from canal_trio.policy.calendar import Calendar
from canal_trio.policy.ratelimit import Ask, Refusal, State, What, worst
from canal_trio.policy.scopes import Scope
from canal_trio.quota.admission import Keeper, Verdict

__all__ = [
    "Held",
    "Name",
    "Pending",
    "Spent",
    "limit_words",
    "micros",
    "rate_words",
    "root_of",
    "tls_options",
    "verdict_of",
]


@dataclass(slots=True)
class Held:
    """What this worker has in flight in a scope."""

    scope: Scope
    streams: int = 0
    reserved: int = 0


@dataclass(slots=True, eq=False)
class Pending:
    """A command whose answer is awaited."""

    request: Awaitable[Any]
    scopes: Sequence[Any]
    answered: Callable[[Any], None] = lambda _: None
    event: trio.Event = field(default_factory=trio.Event)
    answer: Any = None
    given_up: bool = False  # nobody waits for it any more


@dataclass(slots=True)
class Spent:
    """Money that Redis was told of, or will be, by its number."""

    number: int
    scopes: Sequence[Scope]
    cost: int


@dataclass(frozen=True, slots=True)
class Name:
    """What stands for a scope where only its name matters."""

    id: str


def limit_words(scopes: Sequence[Scope]) -> list[float]:
    """What ADMIT wants of each scope. Infinite: no limit."""
    found: list[float] = []
    for scope in scopes:
        rule = scope.rule
        found += [rule.request_rate, rule.request_burst, rule.token_rate, rule.token_burst]
        found += [rule.streams, rule.spend_day, rule.spend_month]
    return found


def rate_words(scopes: Sequence[Scope], *, burst: bool) -> list[float]:
    """What the other scripts want of each scope."""
    found: list[float] = []
    for scope in scopes:
        found += [scope.rule.request_rate, scope.rule.token_rate]
        if burst:
            found.append(scope.rule.token_burst)
    return found


def tls_options(url: str) -> tuple[str, dict[str, Any]]:
    """`url` and options for coredis: with `rediss` a context that checks the certificate and whose it is.

    Its own, by default, does not check the name. `ssl_ca_certs=FILE` in the query is trusted instead of the system's.
    """
    parts = urlsplit(url)
    if parts.scheme != "rediss":
        return url, {}
    query = dict(parse_qsl(parts.query))
    context = ssl.create_default_context(cafile=query.pop("ssl_ca_certs", None))
    return urlunsplit(parts._replace(query=urlencode(query))), {"ssl_context": context}


def micros(seconds: float) -> int:
    """Microseconds."""
    return int(seconds * 1e6)


def root_of(exc: BaseException) -> BaseException:
    """The first exception of a group."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc


def verdict_of(scopes: Sequence[Scope], ask: Ask, answer: Any, keeper: Keeper) -> Verdict:
    """What ADMIT has answered."""
    now = float(answer[1]) / 1e6
    moment = Calendar(lambda: now).moment(now)
    counted: list[tuple[Scope, State]] = []
    for number, scope in enumerate(scopes):
        at = 2 + 6 * number
        requests, tokens = float(answer[at]), float(answer[at + 1])
        streams, reserved, day, month = (int(float(text)) for text in answer[at + 2 : at + 6])
        state = State(requests, tokens, now, streams, reserved, moment.day, day, moment.month, month)
        counted.append((scope, state))
    if answer[0] == 1:
        return Verdict(counted, None, keeper)
    why = worst(counted, ask, moment)
    if why is None:  # on the very edge the two may disagree about a billionth
        why = (scopes[0], Refusal(What.REQUESTS, scopes[0].rule.requests or 0, 0.001))
    return Verdict(counted, why, keeper)
