"""Failures to answers, blame, outcomes and further attempts: design, sections 6 and 7, row by row."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canal_trio.errors import Failure, Kind, Phase, Retry, Side
from canal_trio.hooks import Outcome
from canal_trio.policy.exchange import Step, answer_for, blames_upstream, next_step, outcome_of, retries_status

C, U, G = Side.CLIENT, Side.UPSTREAM, Side.GATEWAY

failures = st.builds(
    Failure, st.sampled_from(Side), st.sampled_from(Phase), st.sampled_from(Kind), st.text(), st.sampled_from(Retry)
)


@pytest.mark.parametrize(
    ("side", "kind", "status"),
    [
        (C, Kind.MALFORMED, 400),
        (C, Kind.CUT, 400),
        (C, Kind.HEAD_TOO_LARGE, 431),
        (C, Kind.TARGET_TOO_LONG, 414),
        (C, Kind.BODY_TOO_LARGE, 413),
        (C, Kind.UNSUPPORTED_CODING, 501),
        (C, Kind.UNSUPPORTED_VERSION, 505),
        (C, Kind.METHOD_NOT_ALLOWED, 405),
        (C, Kind.EXPECTATION, 417),
        (C, Kind.TIMEOUT, 408),
        (C, Kind.UNAUTHENTICATED, 401),
        (C, Kind.FORBIDDEN, 403),
        (C, Kind.LIMITED, 429),
        (C, Kind.NOT_FOUND, 404),
        (G, Kind.UNAVAILABLE, 503),
        (G, Kind.BUFFERS_FULL, 503),
        (G, Kind.OVERLOADED, 503),
        (G, Kind.DRAINING, 503),
        (G, Kind.TIMEOUT, 504),
        (G, Kind.INTERNAL, 500),
        (U, Kind.DNS, 502),
        (U, Kind.REFUSED, 502),
        (U, Kind.TLS, 502),
        (U, Kind.TIMEOUT, 504),
        (U, Kind.STALLED, 504),
        (U, Kind.NO_STREAM, 502),
        (U, Kind.MALFORMED, 502),
        (U, Kind.CUT, 502),
        (U, Kind.RESET, 502),
    ],
)
def test_each_situation_has_its_status(side: Side, kind: Kind, status: int):
    """The status is that of the design's table."""
    assert status == answer_for(Failure(side, Phase.HEAD, kind)).status


@given(failures)
def test_every_failure_has_an_answer(failure: Failure):
    """No failure is without an answer, and none is answered as a success."""
    answer = answer_for(failure)
    assert 400 <= answer.status < 600
    assert answer.code
    assert answer.type
    assert answer.message


@given(failures)
def test_unavailable_answers_say_when_to_come_back(failure: Failure):
    """429 and 503 carry retry-after."""
    answer = answer_for(failure)
    assert (answer.retry_after is not None) == (answer.status in (429, 503))


def test_retry_after_is_never_too_early():
    """What the failure knows is rounded up to whole seconds; without it the kind's own number stands."""
    known = [Failure(G, Phase.LEASE, Kind.UNAVAILABLE, retry_after=after) for after in (0.0, 0.2, 1.0, 7.01)]
    assert [answer_for(failure).retry_after for failure in known] == [1, 1, 1, 8]
    assert answer_for(Failure(C, Phase.ROUTE, Kind.LIMITED)).retry_after == 1


@pytest.mark.parametrize(
    ("retry", "expected"), [(Retry.UNSENT, True), (Retry.FRESH, True), (Retry.SENT, False), (Retry.NO, False)]
)
def test_should_retry_is_honest_about_a_second_generation(retry: Retry, expected: bool):
    """The SDK is told to retry only when no generation can have been started."""
    assert answer_for(Failure(U, Phase.DIAL, Kind.REFUSED, retry=retry)).should_retry is expected


def test_a_drain_that_cuts_a_generation_does_not_ask_for_a_second_one():
    """The SDK is told to retry only where the upstream did not have the request yet."""
    told = {phase: answer_for(Failure(G, phase, Kind.DRAINING)).should_retry for phase in Phase}
    assert [phase for phase, retries in told.items() if not retries] == list(Phase)[list(Phase).index(Phase.SEND) :]


def test_what_the_detail_says_whole_is_not_said_twice():
    """About keys and models the detail is the message; without one there is a general sentence."""
    failure = Failure(C, Phase.ROUTE, Kind.NOT_FOUND, "The model 'x' does not exist.")
    assert answer_for(failure).message == "The model 'x' does not exist."
    assert answer_for(Failure(C, Phase.ROUTE, Kind.UNAUTHENTICATED)).message == "Incorrect API key provided."


def test_the_detail_reaches_the_client():
    """What is known about the failure is part of the message."""
    assert answer_for(Failure(U, Phase.FIRST_BYTE, Kind.CUT, "It hung up.")).message.endswith("It hung up.")


def test_a_client_does_not_learn_an_upstreams_address() -> None:
    """Why no connection could be made names hosts and ports: that is for the log, and the answer says so."""
    answer = answer_for(Failure(U, Phase.DIAL, Kind.REFUSED, "10.0.0.7:8000: Connection refused."))
    assert answer.message == "The upstream cannot be reached. The gateway's log says why."


def test_a_stale_connection_is_nobodys_fault():
    """Only the upstream's own failures count against it, and an idle connection's death is none."""
    assert blames_upstream(Failure(U, Phase.STREAM, Kind.CUT))
    assert not blames_upstream(Failure(U, Phase.FIRST_BYTE, Kind.STALE))
    assert not blames_upstream(Failure(C, Phase.STREAM, Kind.STALLED))


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (None, Outcome.COMPLETED),
        (Failure(C, Phase.STREAM, Kind.GONE), Outcome.CLIENT_GONE),
        (Failure(C, Phase.STREAM, Kind.STALLED), Outcome.CLIENT_STALLED),
        (Failure(C, Phase.HEAD, Kind.MALFORMED), Outcome.REJECTED),
        (Failure(U, Phase.STREAM, Kind.CUT), Outcome.UPSTREAM_FAILED),
        (Failure(U, Phase.STREAM, Kind.IN_BAND), Outcome.UPSTREAM_ERROR),
        (Failure(G, Phase.STREAM, Kind.DRAINING), Outcome.DRAINED),
        (Failure(G, Phase.ROUTE, Kind.DRAINING), Outcome.REJECTED),
        (Failure(G, Phase.ROUTE, Kind.INTERNAL), Outcome.INTERNAL_ERROR),
        (Failure(G, Phase.LEASE, Kind.UNAVAILABLE), Outcome.REJECTED),
    ],
)
def test_the_first_failure_makes_the_outcome(failure: Failure | None, outcome: Outcome):
    """Each failure gives the record its outcome."""
    assert outcome is outcome_of(failure)


def step(retry: Retry, **known: bool) -> Step:
    """The next step after an upstream failure of `retry`; the rest is favourable unless told."""
    settings = {"replayable": True, "fresh_tried": False, "others": True, "retry_sent": False} | known
    return next_step(Failure(U, Phase.SEND, Kind.RESET, retry=retry), **settings)


def test_a_reused_connection_is_replaced_once():
    """A connection that died idle is replaced by a fresh one, once."""
    assert Step.FRESH is step(Retry.FRESH)
    assert Step.STOP is step(Retry.FRESH, fresh_tried=True)


def test_unsent_requests_move_on():
    """What never left this process may go to another upstream, if there is one."""
    assert Step.NEXT is step(Retry.UNSENT)
    assert Step.STOP is step(Retry.UNSENT, others=False)


def test_a_second_generation_needs_leave():
    """What may have started a generation is sent again only where the route says so."""
    assert Step.STOP is step(Retry.SENT)
    assert Step.NEXT is step(Retry.SENT, retry_sent=True)


@given(failures, st.booleans(), st.booleans(), st.booleans())
def test_what_cannot_be_replayed_is_never_tried_again(failure: Failure, fresh: bool, others: bool, sent: bool):
    """Without the whole request there is no further attempt."""
    assert Step.STOP is next_step(failure, replayable=False, fresh_tried=fresh, others=others, retry_sent=sent)


def test_a_final_failure_stays_final():
    """Retry.NO never leads to another attempt."""
    assert Step.STOP is step(Retry.NO, retry_sent=True)


def test_statuses_worth_another_upstream():
    """429 and 503 always, other 5xx only with leave, the rest never."""
    assert retries_status(429, retry_sent=False)
    assert retries_status(503, retry_sent=False)
    assert not retries_status(500, retry_sent=False)
    assert retries_status(500, retry_sent=True)
    assert not retries_status(404, retry_sent=True)
