"""The store in memory: where nobody shares its table it counts in a short way, and comes to the same."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canal_trio.errors import Phase
from canal_trio.hooks import Asked, ExchangeRecord, Outcome, Refused, Usage
from canal_trio.policy.ratelimit import Ask
from canal_trio.policy.scopes import Scope, Scopes
from canal_trio.quota import admission
from canal_trio.quota.admission import Limits, Verdict
from canal_trio.quota.memory import MemoryStore
from canal_trio.quota.table import IDLE, WAYS, Table, table_bytes
from canal_trio.settings import Limit, Price, Settings, Upstream

NOON = 1_767_268_800.0
LIMITS = [
    Limit(requests=60, tokens=1000),
    Limit(principal="*", streams=3, requests=100),
    Limit(model="*", spend_day=1e-6, spend_month=5e-6),
    Limit(principal="*", model="*", tokens=600, streams=5),
]


class Clock:
    """Time that passes when it is told to: seconds, and Unix time with it."""

    now = 1000.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now

    def wall(self) -> float:
        """Unix time."""
        return NOON + self.now


def store_with(clock: Clock, *, shared: bool, records: int = 2 * WAYS) -> MemoryStore:
    """A store over a table of its own, or of one that others may have, too."""
    table = Table(bytearray(table_bytes(records, 1)))
    if not shared:
        table.own()
    return MemoryStore(table, clock=clock, wall=clock.wall)


class Asks:
    """Asks `store` as the hook does: first whoever let such scopes in before."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self._known: dict[tuple[Scope, ...], Verdict] = {}
        self.short = 0  # times that it was enough

    def __call__(self, scopes: tuple[Scope, ...], ask: Ask) -> Verdict:
        """The verdict."""
        known = self._known.get(scopes)
        if known is not None and known.again is not None and known.again.begin(known.counted, ask):
            self.short += 1
            return Verdict(known.counted, None, known.again)
        verdict = self.store.admit_now(scopes, ask)
        assert verdict is not None
        self._known[scopes] = verdict
        return verdict


def alike(one: Verdict, other: Verdict) -> None:
    """They say the same, but for rounding."""
    assert (one.why is None) == (other.why is None)
    for (scope, mine), (theirs, other_state) in zip(one.counted, other.counted, strict=True):
        assert scope is theirs
        assert (mine.requests, mine.tokens) == pytest.approx((other_state.requests, other_state.tokens), abs=1e-6)
        assert replace(mine, requests=0, tokens=0) == replace(other_state, requests=0, tokens=0)


STEPS = st.lists(
    st.tuples(
        st.sampled_from([None, "a", "b"]),
        st.sampled_from([None, "m", "n"]),
        st.one_of(st.just(0.0), st.floats(0.001, 30), st.just(40_000.0)),  # the last: a night
        st.integers(0, 400),
        st.integers(0, 900),
        st.booleans(),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(STEPS, st.lists(st.sampled_from(LIMITS), min_size=1, unique=True))
def test_the_short_way_comes_to_the_same(steps: list[tuple[Any, ...]], limits: list[Limit]):
    """Whatever is asked and settled, and in whatever order: a store that has its table for itself says and keeps what
    one says that reads and writes shared memory."""
    clock = Clock()
    own, shared, scopes = Asks(store_with(clock, shared=False)), Asks(store_with(clock, shared=True)), Scopes(limits)
    running: list[tuple[Verdict, Verdict, Ask]] = []
    for principal, model, gap, tokens, cost, ends in steps:
        clock.now += gap
        if ends and running:
            one, other, ask = running.pop(tokens % len(running))
            one.keeper.settle(one.counted, ask, Ask(tokens, cost))
            other.keeper.settle(other.counted, ask, Ask(tokens, cost))
        else:
            ask = Ask(tokens, cost)
            one, other = (here(scopes.of(principal, model), ask) for here in (own, shared))
            alike(one, other)
            if one.why is None:
                running.append((one, other, ask))
    moment = own.store._calendar.moment(clock.now)
    assert own.store.table.spent(moment) == shared.store.table.spent(moment)
    assert not shared.short


def test_what_is_spent_in_the_short_way_is_noticed():
    """Whoever keeps what was spent hears of it, once for all since the last look, and not where nothing was."""
    clock = Clock()
    store = store_with(clock, shared=False)
    ask, table, scopes = Asks(store), store.table, Scopes(LIMITS).of("a", "m")
    seen = [table.changes]
    for cost, used in ((0, 0), (7, 0), (0, 9)):
        for _ in range(2):  # the first time each scope is looked for
            clock.now += 1
            verdict = ask(scopes, Ask(1, cost))
            seen.append(table.changes)
            verdict.keeper.settle(verdict.counted, Ask(1, cost), Ask(1, used))
            seen.append(table.changes)
    assert seen == [0, 0, 0, 0, 0, 1, 2, 3, 4, 4, 5, 5, 6]
    assert ask.short == 5


def test_a_record_in_flight_stays_and_one_that_gave_way_is_looked_for_again():
    """However many others come: what is in flight is settled where it was counted; what gave way begins at nothing."""
    clock = Clock()
    store, scopes = store_with(clock, shared=False, records=WAYS), Scopes([Limit(principal="*", requests=2)])
    asks = Asks(store)

    def ask(name: str) -> Verdict:
        clock.now += 2 * IDLE
        return asks(scopes.of(name, None), Ask())

    ask("mine")
    mine = [ask("mine"), ask("mine")]
    for number in range(3 * WAYS):
        other = ask(f"n{number}")
        other.keeper.settle(other.counted, Ask(), Ask())
    assert mine[0].counted[0][1].streams == 3
    assert ask("mine").counted[0][1].streams == 4
    for verdict in mine:
        verdict.keeper.settle(verdict.counted, Ask(), Ask())
    assert ask("mine").counted[0][1].streams == 3
    assert [ask("n0").counted[0][1].requests for _ in range(2)] == [1, 1]
    assert store.table.overflows == 0
    assert asks.short == 4  # never the first time, nor on another day


@pytest.mark.parametrize("shared", [False, True])
def test_who_was_not_counted_gives_no_place_back(shared: bool):
    """One that found no room for its scope when it began takes nothing from those that do when it ends."""
    clock, scopes = Clock(), Scopes([Limit(principal="*", streams=1)])
    ask = Asks(store_with(clock, shared=shared, records=WAYS))
    busy = [ask(scopes.of(f"busy{number}", None), Ask()) for number in range(WAYS)]
    late = scopes.of("late", None)
    first = ask(late, Ask())
    assert (list(first.counted), first.why) == ([], None)
    busy[0].keeper.settle(busy[0].counted, Ask(), Ask())
    clock.now += 2 * IDLE
    assert ask(late, Ask()).why is None
    first.keeper.settle(first.counted, Ask(), Ask())
    clock.now += 1
    assert ask(late, Ask()).why is not None


HOLDS = (tuple, list, dict, bytes, Asked, Verdict, admission._Slot, admission._Terms)


def admission_with(store: MemoryStore, *limits: Limit) -> Any:
    """The hook of a configuration with these."""
    upstreams = tuple(Upstream(name, "http://127.0.0.1:9") for name in ("u", "dear"))
    prices = Price("m", input=1.0, output=2.0), Price("m", input=9.0, output=18.0, upstream="dear")
    found = Settings(upstreams=upstreams, limits=limits, prices=prices)
    return Limits(store).admission(found)


def asked(body: bytes = b"{}" * 100, model: str = "m") -> Asked:
    """One that asks for a chat."""
    return Asked("/v1/chat/completions", "a", model, "u", "m", body)


def ended(usage: Usage | None, cost: int | None = None, upstream: str = "u") -> ExchangeRecord:
    """How it ended."""
    record = ExchangeRecord("r", 0.0, "", "POST", "/v1/chat/completions", Outcome.COMPLETED, Phase.STREAM, 200)
    return record._replace(upstream=upstream, upstream_model="m", attempts=1, events=3, usage=usage, cost=cost)


@pytest.mark.parametrize(
    ("record", "tokens", "cost"),
    [
        (ended(Usage(10, 5), 70), 15, 70),
        (ended(Usage(10, 5)), 15, 0),
        (ended(None), 53, (50 + 2 * 3) * 1000),  # the prompt as expected, a token for each event
        (ended(None, upstream="dear"), 53, (50 + 2 * 3) * 9000),
        (ended(None)._replace(status=503), 0, 0),
    ],
)
def test_an_exchange_is_settled_by_what_it_used(record: ExchangeRecord, tokens: int, cost: int):
    """What the upstream said, or a guess; at another upstream than was expected by the price there."""
    clock = Clock()
    store = store_with(clock, shared=False)
    hook = admission_with(store, Limit(tokens=6000, spend_day=1.0))
    before = 0
    for _ in range(2):  # the first time the scope is looked for
        clock.now += 60
        slot = hook.admit_now(asked())
        (_, state), *_ = slot.counted
        assert (state.tokens, state.streams, state.reserved) == (50 + 1000, 1, (50 + 2 * 1000) * 1000)
        slot.release(record)
        assert (state.tokens, state.streams, state.reserved) == (tokens, 0, 0)
        assert state.spent_day == before + cost
        before = state.spent_day


def test_a_slot_does_not_keep_the_body():
    """An exchange in flight holds a place, and nothing of its request: a body may be large, and an answer long."""
    hook = admission_with(store_with(Clock(), shared=False), Limit(tokens=10**9))
    body = b"x" * 100_000
    reached = [hook.admit_now(asked(body))]
    seen: set[int] = set()
    while reached:
        one = reached.pop()
        assert one is not body
        seen.add(id(one))
        reached += [other for other in gc.get_referents(one) if id(other) not in seen and type(other) in HOLDS]


def test_terms_that_clients_invent_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    """What an admission remembers of names is bounded."""
    monkeypatch.setattr("canal_trio.quota.admission._REMEMBERED", 10)
    hook = admission_with(store_with(Clock(), shared=False), Limit(requests=1e6))
    for number in range(35):
        assert not isinstance(hook.admit_now(asked(model=f"m{number}")), Refused)
        assert len(hook._terms) <= 10


def test_a_gateway_that_counts_no_tokens_does_not_settle_any():
    """Where only requests are limited the usage that the ledger wants changes nothing."""
    clock = Clock()
    hook = admission_with(store_with(clock, shared=False), Limit(requests=60, streams=2))
    for _ in range(2):
        clock.now += 1
        slot = hook.admit_now(asked())
        slot.release(ended(Usage(10, 5), 70))
        (_, state), *_ = slot.counted
        assert (state.tokens, state.streams, state.spent_day) == (0, 0, 0)


def test_who_is_refused_is_told_by_the_same_fields():
    """The short way lets in, the long one refuses; both tell what is left."""
    clock = Clock()
    store = store_with(clock, shared=False)
    hook = admission_with(store, Limit(requests=2))
    left = []
    for _ in range(3):
        clock.now += 0.001
        verdict = hook.admit_now(asked())
        left.append(verdict.fields.partition(b"remaining-requests: ")[2][:1])
    assert left == [b"1", b"0", b"0"]
    assert isinstance(verdict, Refused)
