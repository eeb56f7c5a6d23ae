"""Which limits count for whom, what a request is expected to use, and what clients are told."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canal_trio.policy.expected import estimate, guess_used
from canal_trio.policy.limit_fields import go_duration, limit_fields, refusal_text
from canal_trio.policy.prices import NANOS
from canal_trio.policy.ratelimit import Refusal, State, What
from canal_trio.policy.scopes import Scopes
from canal_trio.settings import Limit
from canal_trio.wire.json_fields import JsonFields, json_fields


def streams(scopes: Scopes, principal: str | None, model: str | None) -> dict[str, float]:
    """Kind of scope -> its `streams`, which tells the limits of the test apart."""
    return {scope.kind: scope.rule.streams for scope in scopes.of(principal, model)}


def test_the_most_exact_limit_counts_in_each_scope():
    """In total, for the principal, for the model, for both: a name before a star, and only one of each."""
    scopes = Scopes(
        [
            Limit(streams=1),
            Limit(principal="*", streams=2),
            Limit(principal="a", streams=3),
            Limit(model="*", streams=4),
            Limit(model="m", streams=5),
            Limit(principal="*", model="*", streams=6),
            Limit(principal="*", model="m", streams=7),
            Limit(principal="a", model="*", streams=8),
            Limit(principal="a", model="m", streams=9),
        ]
    )
    assert streams(scopes, "a", "m") == {"total": 1, "principal": 3, "model": 5, "pair": 9}
    assert streams(scopes, "a", "x") == {"total": 1, "principal": 3, "model": 4, "pair": 8}
    assert streams(scopes, "b", "m") == {"total": 1, "principal": 2, "model": 5, "pair": 7}
    assert streams(scopes, "b", "x") == {"total": 1, "principal": 2, "model": 4, "pair": 6}
    assert streams(scopes, None, None) == {"total": 1}
    assert streams(scopes, None, "m") == {"total": 1, "model": 5}
    assert streams(Scopes([Limit(principal="a", streams=1)]), "b", "m") == {}
    assert not Scopes([])


def test_what_limits_look_at():
    """Whether tokens, money or models matter is known in advance: a body is held only for that."""
    one = Scopes([Limit(requests=1)])
    assert (one.tokens, one.spend, one.models, bool(one)) == (False, False, False, True)
    two = Scopes([Limit(tokens=1), Limit(model="m", spend_month=1)])
    assert (two.tokens, two.spend, two.models) == (True, True, True)
    assert Scopes([Limit(spend_day=1)]).spend


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(max_size=200), st.text(max_size=200)), min_size=2, max_size=2, unique=True))
def test_no_two_scopes_are_counted_together(names: list[tuple[str, str]]):
    """Whatever the names hold, different pairs have different ids, short enough for a key, in visible ASCII."""
    scopes = Scopes([Limit(principal="*", model="*", streams=1)])
    ids = [scopes.of(principal, model)[0].id for principal, model in names]
    assert ids[0] != ids[1]
    assert all(one.isascii() and " " not in one and len(one) <= 160 for one in ids)


def test_models_that_clients_make_up_are_forgotten():
    """What is remembered about look-ups is bounded; the same scope comes out again."""
    scopes = Scopes([Limit(model="*", streams=1)])
    first = scopes.of(None, "m0")[0].id
    for number in range(17_000):
        scopes.of(None, f"m{number}")
    assert len(scopes._found) <= 16_384
    assert scopes.of(None, "m0")[0].id == first


@pytest.mark.parametrize(
    ("said", "completion"),
    [
        ({"max_tokens": 50}, 50),
        ({"max_completion_tokens": 60, "max_tokens": 50}, 60),
        ({"max_output_tokens": 70}, 70),
        ({"max_tokens": 50, "n": 3}, 150),
        ({"max_tokens": 0}, 0),
        ({"max_tokens": -5}, 0),
        ({"max_tokens": 1e300}, 10**9),
        ({"max_tokens": 1e300, "n": 10**400}, 10**9),
        ({"max_tokens": 10**400, "n": 1.5}, 10**9),
        ({"n": "many"}, 1000),
        ({"n": 0}, 1000),
        ({"max_tokens": None}, 1000),
        ({"max_tokens": "many"}, 1000),
        ({}, 1000),
    ],
)
def test_an_answer_is_taken_to_be_as_long_as_it_may_be(said: dict[str, object], completion: int):
    """The maximum that a request names, whatever the API calls it, times its choices; else the configured guess."""
    body = json.dumps(said | {"messages": []}).encode()
    fields = json_fields(body)
    assert isinstance(fields, JsonFields)
    got = estimate(body, fields.wanted, 1000)
    assert got == (-(-len(body) // 4), completion)


def test_what_generates_nothing_is_not_taken_to():
    """Embeddings cost their prompt; without a body, or with one that is no JSON, little is guessed."""
    assert estimate(b'{"input":"x"}', None, 0) == (4, 0)
    assert estimate(None, None, 1000) == (0, 0)
    assert estimate(b"[1", None, 9) == (1, 9)


def test_an_image_is_not_a_million_tokens():
    """Base64 in a body counts as an attachment, not as text: data URLs, and audio beside them."""
    image = "data:image/png;base64," + "A" * 400_000
    audio = "B" * 200_000
    body = json.dumps(
        {"content": [{"image_url": {"url": image}}, {"input_audio": {"data": audio, "format": "wav"}}]}
    ).encode()
    assert 2000 <= estimate(body, None, 0)[0] < 2200
    text = json.dumps({"content": "A" * 400_000}).encode()
    assert estimate(text, None, 0)[0] > 100_000
    short = json.dumps({"data": "x", "content": "word " * 4000}).encode()
    assert estimate(short, None, 0)[0] == -(-len(short) // 4)
    open_end = b'{"data"' + b" " * 9000
    assert estimate(open_end, None, 0)[0] > 2000
    unended = b'{"x":"data:;base64,' + b"A" * 9000
    assert estimate(unended, None, 0)[0] > 2000


def test_the_search_for_attachments_ends():
    """A body of nothing but beginnings of attachments is looked at no longer than it is worth."""
    body = b'{"a":["' + b'","'.join([b";base64," + b"A" * 9000] * 1500) + b'"]}'
    assert estimate(body, None, 0)[0] > 500 * 9000 / 4


def test_what_was_used_is_guessed_from_what_was_delivered():
    """Without usage: events are tokens, else four bytes are one; nothing where nothing was answered."""
    expected = (100, 1000)
    assert guess_used(expected, delivered_bytes=9999, events=7, answered=True) == (100, 7)
    assert guess_used(expected, delivered_bytes=41, events=0, answered=True) == (100, 11)
    assert guess_used(expected, delivered_bytes=0, events=0, answered=False) == (0, 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, b"0s"),
        (0.0171, b"18ms"),
        (0.5, b"500ms"),
        (1, b"1s"),
        (8.64, b"8.64s"),
        (59.9999, b"1m0s"),
        (60, b"1m0s"),
        (1e-12, b"0s"),
        (360, b"6m0s"),
        (90.5, b"1m30.5s"),
        (3600, b"1h0m0s"),
        (90_061.25, b"25h1m1.25s"),
    ],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: bytes):
    """Go's notation, never too short."""
    assert go_duration(seconds) == text


@settings(deadline=None)
@given(st.one_of(st.floats(0, 2), st.floats(0, 200), st.floats(0, 1e7)))
def test_a_duration_is_the_next_millisecond(seconds: float):
    """Read as Go reads it, it is what was meant, rounded up to whole milliseconds: never less, never one more."""
    text = go_duration(seconds).decode()
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:([\d.]+)s|(\d+)ms)", text)
    assert parts is not None
    hours, minutes, rest, millis = (float(part or 0) for part in parts.groups())
    assert -2e-9 <= hours * 3600 + minutes * 60 + rest + millis / 1000 - seconds < 0.001


def said(fields: bytes) -> dict[bytes, bytes]:
    """The fields in these lines."""
    return dict(line.split(b": ") for line in fields.removesuffix(b"\r\n").split(b"\r\n"))


def test_the_fields_tell_of_the_scope_with_least_left():
    """Limit, remaining and reset, for requests and for tokens each from where it is tightest; whole numbers."""
    limits = [Limit(requests=100, tokens=5000), Limit(principal="a", requests=60, tokens=6000)]
    total, mine = Scopes(limits).of("a", "m")
    fields = limit_fields([(total, State(requests=70.5, tokens=100)), (mine, State(requests=10, tokens=5950))])
    assert said(fields) == {
        b"x-ratelimit-limit-requests": b"100",
        b"x-ratelimit-remaining-requests": b"29",
        b"x-ratelimit-reset-requests": b"42.3s",
        b"x-ratelimit-limit-tokens": b"6000",
        b"x-ratelimit-remaining-tokens": b"50",
        b"x-ratelimit-reset-tokens": b"59.5s",
    }
    other = limit_fields([(mine, State(requests=10, tokens=9000)), (total, State(requests=0, tokens=0))])
    assert said(other)[b"x-ratelimit-remaining-tokens"] == b"0"
    assert said(other)[b"x-ratelimit-remaining-requests"] == b"50"
    assert limit_fields([]) == b""
    (only,) = Scopes([Limit(streams=1)]).of(None, None)
    assert limit_fields([(only, State())]) == b""
    for state in (State(requests=70.5, tokens=100), State(requests=100, tokens=9000), State()):
        one_of_two = limit_fields([(total, state), (only, State())])
        assert limit_fields([(total, state)]) == one_of_two  # the other one says nothing of either


@settings(deadline=None)
@given(
    st.sampled_from([None, 0.5, 60, 100.25, 1e9]),
    st.sampled_from([None, 1, 6000, 1e11]),
    st.floats(0, 1e12),
    st.one_of(st.integers(0, 200), st.floats(0, 1e12)),
)
def test_the_fields_of_one_scope_are_made_in_a_short_way(
    requests: float | None, tokens: float | None, done: float, used: float
):
    """They are what they are beside a scope that has nothing to say."""
    (one,) = Scopes([Limit(requests=requests, tokens=tokens)]).of(None, None)
    (other,) = Scopes([Limit(streams=1)]).of(None, None)
    state = State(requests=done, tokens=used)
    assert limit_fields([(one, state)]) == limit_fields([(other, State()), (one, state)])


def test_a_limit_below_one_in_a_minute_was_told_as_none():
    """One every two minutes is told as a limit of one, whose reset says the rest."""
    (one,) = Scopes([Limit(requests=0.5)]).of(None, None)
    assert limit_fields([(one, State(requests=1.0))]).startswith(
        b"x-ratelimit-limit-requests: 1\r\nx-ratelimit-remaining-requests: 0\r\nx-ratelimit-reset-requests: 2m0s"
    )


def test_a_refusal_says_whose_limit_it_was_and_when_to_come_again():
    """For people: the scope, the number, its unit, the wait."""
    total, pair = Scopes([Limit(requests=1), Limit(principal="a", model="m", tokens=1)]).of("a", "m")
    assert refusal_text(total, Refusal(What.REQUESTS, 60.0, 1.5)) == (
        "Rate limit reached for this gateway: 60 requests per minute. Try again in 1.5s."
    )
    assert refusal_text(pair, Refusal(What.STREAMS, 3, 1.0)) == (
        "Rate limit reached for 'a' with the model 'm': 3 requests at once. Try again when one has ended."
    )
    assert refusal_text(pair, Refusal(What.SPEND_DAY, 2.5 * NANOS, 3599.5)) == (
        "The budget of 'a' with the model 'm', 2.50 a day (UTC), is spent. It begins anew in 1h0m0s."
    )
    assert refusal_text(total, Refusal(What.SPEND_MONTH, 100 * NANOS, 1.0, aside=True)) == (
        "The budget of this gateway, 100.00 a month (UTC), is set aside for requests under way. "
        "Try again when one has ended."
    )
