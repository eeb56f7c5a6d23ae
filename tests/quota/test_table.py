"""The table that limits are counted in: the arithmetic's states in shared memory, all scopes or none, bounded."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canal_trio.policy.ratelimit import Ask, Moment, Rule, State, What, begin, refill, refusal, settle
from canal_trio.policy.scopes import Scope
from canal_trio.quota.table import IDLE, WAYS, Table, table_bytes
from canal_trio.settings import Limit

NOW = Moment(1000.0, 20_000, 24_000, 3600.0, 86_400.0)
NONE = Ask()
SEVERAL = [Limit(requests=60, tokens=1000), Limit(streams=3, requests=100), Limit(spend_day=1e-6, spend_month=5e-6)]


def scope(name: str, limit: Limit) -> Scope:
    """A scope by this name."""
    return Scope(name, Rule(limit), "total", name)


def of(*scopes: Scope) -> list[tuple[Scope, State]]:
    """As a verdict has them: to a table only matters which they are."""
    return [(one, State()) for one in scopes]


def tables(columns: int = 2, records: int = WAYS) -> list[Table]:
    """The views of several workers of one piece of memory."""
    memory = bytearray(table_bytes(records, columns))
    return [Table(memory, column=column, columns=columns) for column in range(columns)]


def alike(some: list[State], others: list[State]) -> None:
    """They say the same, but for rounding: in how many steps a level has drained may differ."""
    for one, other in zip(some, others, strict=True):
        assert (one.requests, one.tokens) == pytest.approx((other.requests, other.tokens), abs=1e-6)
        assert replace(one, requests=0, tokens=0) == replace(other, requests=0, tokens=0)


STEPS = st.lists(
    st.tuples(st.integers(0, 1), st.floats(0, 30), st.integers(0, 400), st.integers(0, 900), st.booleans()),
    max_size=60,
)


@pytest.mark.parametrize("workers", [0, 1, 2])
@settings(deadline=None)
@given(STEPS)
def test_several_workers_count_as_one(workers: int, steps: list[tuple[int, float, int, int, bool]]):
    """Whichever worker asks and settles, the table says what the arithmetic says of one state for each scope; so does
    a table that nobody shares (0)."""
    columns = max(workers, 1)
    views, now = tables(columns), NOW
    if not workers:
        views[0].own()
    scopes = tuple(scope(f"s{number}", limit) for number, limit in enumerate(SEVERAL))
    states = [State(at=now.now, day=now.day, month=now.month) for _ in scopes]
    running: list[tuple[int, Ask]] = []
    for number, gap, tokens, cost, ends in steps:
        worker = number % columns
        now = now._replace(now=now.now + gap)
        if ends and running:
            owner, ask = running.pop()
            used = Ask(tokens, cost)
            views[owner].settle(of(*scopes), ask, used, now)
            for one, state in zip(scopes, states, strict=True):
                refill(one.rule, state, now)
                settle(one.rule, state, ask, used)
            continue
        ask = Ask(tokens, cost)
        reasons = []
        now_states = [replace(state) for state in states]  # a refusal leaves no trace
        for one, state in zip(scopes, now_states, strict=True):
            refill(one.rule, state, now)
            reasons.append(refusal(one.rule, state, ask, now))
        counted, why = views[worker].admit(scopes, ask, now)
        assert (why is None) == (reasons == [None] * 3)
        if why is None:
            running.append((worker, ask))
            states = now_states
            for one, state in zip(scopes, states, strict=True):
                assert begin([(one, state)], ask, now) is None
        else:
            longest = max(reason.wait for reason in reasons if reason is not None)
            assert why[1].wait == pytest.approx(longest, abs=1e-6)  # the short way drains levels in other steps
            assert why[1] in [replace(reason, wait=why[1].wait) for reason in reasons if reason is not None]
        alike([state for _, state in counted], now_states)


def test_a_refusal_leaves_no_trace_in_any_scope():
    """The last of three scopes says no: the others have counted nothing."""
    (table, _) = tables()
    free, full = scope("free", Limit(requests=10)), scope("full", Limit(streams=1))
    assert table.admit([full], NONE, NOW)[1] is None
    for _ in range(20):
        counted, why = table.admit([free, full], NONE, NOW)
        assert why is not None
        assert why[1].what is What.STREAMS
        assert counted[0][1].requests == 0


def test_slots_of_a_worker_that_died_are_free_again():
    """Its exchanges are in flight no longer, and the money that was set aside for them counts as spent."""
    mine, other = tables()
    one = scope("s", Limit(streams=2, spend_day=100))
    assert mine.admit([one], Ask(0, 500), NOW)[1] is None
    assert other.admit([one], Ask(0, 70), NOW)[1] is None
    assert mine.admit([one], NONE, NOW)[1] is not None
    mine.bury(1)
    counted, why = mine.admit([one], NONE, NOW)
    assert why is None
    assert (counted[0][1].streams, counted[0][1].reserved, counted[0][1].spent_day) == (2, 500, 70)


def test_what_was_spent_can_be_kept_and_is_there_again():
    """Days and months as they were; what a worker had set aside is counted, what is over is not."""
    (table, _) = tables()
    one, two = scope("one", Limit(spend_day=1)), scope("two", Limit(spend_month=1))
    assert table.admit([one, two], Ask(0, 100), NOW)[1] is None
    before = table.changes
    table.settle(of(one, two), Ask(0, 100), Ask(0, 40), NOW)
    assert table.changes > before
    assert table.admit([two], Ask(0, 7), NOW)[1] is None
    kept = table.spent(NOW)
    assert sorted(kept.values()) == [(20_000, 40, 24_000, 40), (20_000, 47, 24_000, 47)]
    (again, _) = tables()
    again.restore(kept, NOW)
    states = {name.id: state for name, state in again.admit([one, two], NONE, NOW)[0]}
    assert (states["one"].spent_day, states["two"].spent_month) == (40, 47)
    tomorrow = NOW._replace(day=20_001)
    assert {spent[1] for spent in again.spent(tomorrow).values()} == {0}
    assert again.spent(NOW._replace(month=24_001)) == {}
    (later, _) = tables()
    later.restore(kept, NOW._replace(month=24_001))
    assert later.spent(NOW._replace(month=24_001)) == {}


@pytest.mark.parametrize("alone", [True, False])
def test_what_was_kept_elsewhere_is_taken_where_it_is_more(alone: bool) -> None:
    """A table in use goes on with the larger number of each day and month; what is in flight, and levels, are its own;
    what the other has of yesterday, of tomorrow or of another month is no reason to forget anything."""
    table = tables(1 if alone else 2)[0]
    if alone:
        table.own()
    names = ("more", "less", "yesterday", "tomorrow", "far", "over", "new")
    scopes = {name: scope(name, Limit(requests=60, spend_day=1)) for name in names}
    for name in names[:-1]:
        assert table.admit([scopes[name]], Ask(0, 20), NOW)[1] is None
        assert table.admit([scopes[name]], Ask(0, 3), NOW)[1] is None
        table.settle(of(scopes[name]), Ask(0, 20), Ask(0, 40), NOW)
    other = {name: hashlib.blake2b(name.encode(), digest_size=16).hexdigest() for name in names}
    day, month = NOW.day, NOW.month
    found = {
        "more": (day, 50, month, 60), "less": (day, 30, month, 39), "yesterday": (day - 1, 50, month, 60),
        "tomorrow": (day + 1, 50, month, 60), "far": (day + 5, 50, month, 60), "over": (day, 50, month - 1, 60),
        "new": (day, 50, month, 60),
    }  # fmt: skip
    for _ in range(2):  # again changes nothing
        table.restore({other[name]: spent for name, spent in found.items()}, NOW)
    states = {name: table.admit([scopes[name]], NONE, NOW)[0][0][1] for name in names}
    assert {name: (state.spent_day, state.spent_month) for name, state in states.items()} == {
        "more": (50, 60), "less": (40, 40), "yesterday": (40, 60), "tomorrow": (50, 60), "far": (40, 60),
        "over": (40, 40), "new": (50, 60),
    }  # fmt: skip
    assert {(state.streams, state.reserved, state.requests) for state in list(states.values())[:-1]} == {(2, 3, 3.0)}
    full = tables(1)[0]
    for number in range(WAYS):
        assert full.admit([scope(f"s{number}", Limit(streams=1))], NONE, NOW)[1] is None
    full.restore({other["new"]: found["new"]}, NOW)
    assert full.spent(NOW) == {}


def test_money_beyond_64_bits_is_as_much_as_they_hold():
    """However dear what was spent or set aside is, counting, keeping and restoring go on: it is as much as a record can
    say."""
    most = 2**63 - 1
    (mine, other) = tables()
    one = scope("s", Limit(spend_day=1))
    assert mine.admit([one], NONE, NOW)[1] is None
    mine.settle(of(one), NONE, Ask(0, most), NOW)
    assert mine.admit([scope("t", Limit(streams=9))], Ask(0, most), NOW)[1] is None
    assert mine.admit([scope("t", Limit(streams=9))], Ask(0, most), NOW)[1] is None
    other.settle(of(one), NONE, Ask(0, most), NOW)
    other.bury(0)
    for view in (mine, *tables()):
        kept = mine.spent(NOW)
        view.restore({text: (day, spent * 4, month, spent * 4) for text, (day, spent, month, _) in kept.items()}, NOW)
        assert {spent[1] for spent in view.spent(NOW).values()} == {most}
    (alone,) = tables(1)
    assert alone.admit([one], NONE, NOW)[1] is None
    for _ in range(2):
        alone.settle(of(one), NONE, Ask(0, most), NOW)
    assert [spent[1] for spent in alone.spent(NOW).values()] == [most]


def test_the_memory_is_bounded_whatever_clients_invent():
    """Scopes that have nothing in flight and nothing spent give way, the least used first; those that have stay."""
    (table, _) = tables()
    busy = [scope(f"busy{number}", Limit(streams=1)) for number in range(WAYS - 1)]
    for one in busy:
        assert table.admit([one], NONE, NOW)[1] is None
    for number in range(200):
        one = scope(f"new{number}", Limit(requests=1))
        assert table.admit([one], NONE, NOW)[1] is None
        table.settle(of(one), NONE, NONE, NOW)
    assert all(table.admit([one], NONE, NOW)[1] is not None for one in busy)
    assert table.overflows == 0
    last = scope("last", Limit(streams=1))
    assert table.admit([last], NONE, NOW)[1] is None
    assert table.admit([scope("one too many", Limit(streams=1))], NONE, NOW) == ([], None)
    assert table.overflows == 1
    table.settle(of(scope("one too many", Limit(streams=1))), NONE, NONE, NOW)
    long_after = NOW._replace(now=NOW.now + 10_000)
    assert table.admit([busy[0]], NONE, long_after)[1] is not None


def test_one_exchange_does_not_push_out_its_own_scope():
    """Two scopes of one exchange never take the same place, however full the table is."""
    (table, _) = tables()
    for number in range(WAYS - 1):
        assert table.admit([scope(f"busy{number}", Limit(streams=1))], NONE, NOW)[1] is None
    pair = [scope("a", Limit(requests=5)), scope("b", Limit(requests=5))]
    counted, why = table.admit(pair, NONE, NOW)
    assert why is None
    assert [name.id for name, _ in counted] == ["a"]


def test_one_exchange_does_not_push_out_its_own_scope_where_nobody_shares() -> None:
    """Nor there: the one that keeps its place goes on counting where it is found again."""
    (table,) = tables(1)
    table.own()
    for number in range(WAYS - 1):
        assert table.admit([scope(f"busy{number}", Limit(streams=1))], NONE, NOW)[1] is None
    first, second = scope("a", Limit(streams=2)), scope("b", Limit(streams=2))
    for _ in range(2):
        counted, why = table.admit([first, second], NONE, NOW)
        assert why is None
        assert [name.id for name, _ in counted] == ["a"]
    assert table.admit([first], NONE, NOW)[1] is not None


def test_a_place_that_another_worker_gave_away_is_noticed():
    """A worker remembers where a scope's record was, and looks whether it is still there."""
    mine, other = tables()
    one = scope("mine", Limit(requests=2))
    for _ in range(2):
        assert mine.admit([one], NONE, NOW)[1] is None
        mine.settle(of(one), NONE, NONE, NOW)
    for number in range(WAYS):
        assert other.admit([scope(f"other{number}", Limit(streams=1))], NONE, NOW._replace(now=9e9))[1] is None
    assert mine.admit([one], NONE, NOW) == ([], None)  # no place left: not counted, and not mistaken for another's
    assert mine.overflows == 1


def test_a_table_that_nobody_shares_gives_places_away_as_well():
    """A scope that has the place of another one, which says nothing any more, begins at nothing; so does that one
    again. What was spent is known by then, and outlasts everything."""
    table = Table(bytearray(table_bytes(WAYS, 1)))
    table.restore({"ab" * 16: (NOW.day, 5, NOW.month, 7)}, NOW)
    table.own()
    changes = table.changes
    later = NOW
    for number in range(3 * WAYS):
        one = scope(f"n{number % (2 * WAYS)}", Limit(requests=1))
        later = later._replace(now=later.now + 2 * IDLE)
        scopes = (one,)
        for _ in range(2):
            counted, why = table.admit(scopes, Ask(1, 0), later)
            assert why is None
            assert counted[0][1].requests == 1
            table.settle(counted, Ask(1, 0), NONE, later)
            later = later._replace(now=later.now + 2 * IDLE)
    assert table.overflows == 0
    assert table.spent(later) == {"ab" * 16: (NOW.day, 5, NOW.month, 7)}
    payer = scope("payer", Limit(spend_day=1))
    assert table.admit([payer], Ask(1, 10), later)[1] is None
    table.settle(of(payer), Ask(1, 10), Ask(1, 20), later)
    assert table.changes == changes + 1  # since it was looked at
    assert table.changes == changes + 1
    assert sorted(table.spent(later).values()) == [(NOW.day, 5, NOW.month, 7), (NOW.day, 20, NOW.month, 20)]


def test_places_of_names_are_forgotten_in_time():
    """What a worker remembers about places is bounded, too."""
    table = Table(bytearray(table_bytes(WAYS * 4, 1)), remembers=100)
    for number in range(500):
        one = scope(f"n{number}", Limit(requests=1))
        assert table.admit([one], NONE, NOW)[1] is None
        table.settle(of(one), NONE, NONE, NOW)
    assert len(table._places) <= 100
