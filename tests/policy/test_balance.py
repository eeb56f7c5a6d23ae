"""Who is chosen: each strategy's promise, tiers, and how many may be avoided; no clock, no chance but the given one."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canal_trio.policy.balance import STRATEGIES, Balancer, Member
from canal_trio.policy.health import Standing, Verdict
from canal_trio.settings import Balance, Health

HEALTH = Health(failures=1, eject=10.0)
weights_of = st.lists(st.integers(1, 5).map(float), min_size=1, max_size=6)
points = st.floats(0, 1, exclude_max=True)


def balancer(
    strategy: str,
    weights: list[float],
    *,
    tiers: list[int] | None = None,
    most: float = 1.0,
    start: float = 0.0,
    health: Health = HEALTH,
) -> Balancer:
    """One whose members are named by their numbers."""
    members = [
        Member(Standing(str(number), health), weight, tiers[number] if tiers else 0)
        for number, weight in enumerate(weights)
    ]
    return Balancer(members, Balance(strategy), most_ejected=most, start=start)


def eject(here: Balancer, *numbers: int, now: float = 0.0) -> None:
    """One failure is enough with `HEALTH`."""
    for number in numbers:
        standing = here.members[number].standing
        standing.end(Verdict.BAD, now, trial=standing.begin())


@given(st.sampled_from(STRATEGIES), weights_of, points, st.binary(max_size=8) | st.none(), st.data())
def test_nothing_is_chosen_twice(
    strategy: str, weights: list[float], start: float, key: bytes | None, data: st.DataObject
) -> None:
    """Whatever the strategy, each upstream has its turn once in an exchange, and then there is none."""
    here = balancer(strategy, weights, start=start)
    tried: list[int] = []
    while (number := here.pick(1.0, data.draw(points), tried=tried, key=key)) is not None:
        assert number not in tried
        tried.append(number)
    assert sorted(tried) == list(range(len(weights)))


@given(weights_of, points, st.integers(1, 40))
def test_round_robin_gives_each_its_part(weights: list[float], start: float, rounds: int) -> None:
    """After any number of whole rounds everyone has had its part of the turns, give or take one."""
    here = balancer("round_robin", weights, start=start)
    picks = Counter(here.pick(1.0, 0.0) for _ in range(rounds * int(sum(weights))))
    for number, weight in enumerate(weights):
        assert abs(picks[number] - rounds * weight) <= 1


def test_round_robin_does_not_give_a_heavy_one_all_its_turns_in_a_row() -> None:
    """Smooth: the light ones come in between."""
    here = balancer("round_robin", [4.0, 1.0, 1.0])
    turns = [here.pick(1.0, 0.0) for _ in range(12)]
    assert all(set(turns[at : at + 6]) == {0, 1, 2} for at in range(6))
    assert turns != sorted(turns)


def test_every_worker_began_with_the_first_upstream() -> None:
    """Round robins that begin elsewhere do not all send their first request to the same upstream."""
    firsts = {balancer("round_robin", [1.0] * 4, start=start).pick(1.0, 0.0) for start in (0.0, 0.3, 0.55, 0.8)}
    assert len(firsts) > 1


def test_in_order_goes_to_the_first() -> None:
    """The first that can be asked, whatever it has to do already."""
    here = balancer("in_order", [1.0, 1.0])
    here.members[0].standing.in_flight = 100
    assert here.pick(1.0, 0.9) == 0


@given(st.lists(st.integers(0, 20), min_size=2, max_size=6), points)
def test_fewest_streams_goes_to_the_emptiest(loads: list[int], chance: float) -> None:
    """Nobody has fewer streams than the one that is chosen."""
    here = balancer("fewest_streams", [1.0] * len(loads))
    for member, load in zip(here.members, loads, strict=True):
        member.standing.in_flight = load
    chosen = here.pick(1.0, chance)
    assert chosen is not None
    assert loads[chosen] == min(loads)


def test_fewest_streams_counts_by_weight() -> None:
    """One of weight three carries three times the streams; among equals chance decides."""
    here = balancer("fewest_streams", [3.0, 1.0])
    for _ in range(400):
        number = here.pick(1.0, 0.5)
        assert number is not None
        here.members[number].standing.begin()
    assert [member.standing.in_flight for member in here.members] == [300, 100]
    even = balancer("fewest_streams", [1.0, 1.0])
    assert {even.pick(1.0, 0.0), even.pick(1.0, 0.99)} == {0, 1}


@given(points)
def test_p2c_picks_the_faster_of_two(chance: float) -> None:
    """Of two with nothing else to do the one with the shorter time to its first token, whatever the chance."""
    here = balancer("fastest", [1.0, 1.0])
    here.members[0].standing.took(0.9, 0.0, 10.0)
    here.members[1].standing.took(0.3, 0.0, 10.0)
    assert here.pick(1.0, chance) == 1


@given(points)
def test_p2c_counts_who_waits_there(chance: float) -> None:
    """A fast one with a queue is not fast."""
    here = balancer("fastest", [1.0, 1.0])
    here.members[0].standing.took(0.9, 0.0, 10.0)
    here.members[1].standing.took(0.3, 0.0, 10.0)
    here.members[1].standing.in_flight = 3
    assert here.pick(1.0, chance) == 0


def test_p2c_does_not_flood_the_one_it_knows_nothing_of() -> None:
    """An upstream without a measurement is tried, but not with everything that comes before its first token."""
    here = balancer("fastest", [1.0, 1.0])
    here.members[0].standing.took(0.5, 0.0, 10.0)
    for _ in range(100):
        number = here.pick(0.0, 0.0)
        assert number is not None
        here.members[number].standing.begin()
    assert [member.standing.in_flight for member in here.members] == [50, 50]


def test_p2c_sends_most_to_the_faster_ones() -> None:
    """A slow one among five gets less than a tenth; each pair is as likely as any other."""
    here, chance = balancer("fastest", [1.0] * 5), random.Random(5)
    for member in here.members:
        member.standing.took(2.0 if member.standing.name == "2" else 0.2, 0.0, 10.0)
    picks = Counter(here.pick(1.0, chance.random()) for _ in range(2000))
    assert picks[2] == 0
    assert min(picks[number] for number in (0, 1, 3, 4)) > 350


KEYS = [b"key %d" % number for number in range(4000)]


def homes(here: Balancer, tried: tuple[int, ...] = ()) -> dict[bytes, int]:
    """Where each key goes."""
    found = {key: here.pick(1.0, 0.0, key=key, tried=tried) for key in KEYS}
    return {key: number for key, number in found.items() if number is not None}


@pytest.mark.parametrize("count", [2, 5, 10])
def test_hashing_moves_only_the_keys_of_the_one_that_went(count: int) -> None:
    """Without an upstream its own keys move, evenly, and no other: one in n."""
    here = balancer("hash", [1.0] * count)
    before, after = homes(here), homes(here, tried=(0,))
    moved = [key for key in KEYS if before[key] != after[key]]
    assert {before[key] for key in moved} == {0}
    assert len(moved) == sum(number == 0 for number in before.values())
    assert len(moved) / len(KEYS) == pytest.approx(1 / count, rel=0.2)
    parts = Counter(after[key] for key in moved)
    assert max(parts.values()) < 2 * min(parts.values())  # some 45 each, give or take 7


def test_hashing_spreads_by_weight() -> None:
    """One of weight three has three times the keys."""
    parts = Counter(homes(balancer("hash", [1.0, 3.0])).values())
    assert parts[1] / parts[0] == pytest.approx(3, rel=0.2)


def test_hashing_does_not_depend_on_the_order_in_the_file() -> None:
    """A key's home is an upstream, not a place in a list."""
    one = Balancer([Member(Standing(n, HEALTH)) for n in "abc"], Balance("hash"), most_ejected=1.0)
    other = Balancer([Member(Standing(n, HEALTH)) for n in "cab"], Balance("hash"), most_ejected=1.0)
    for key in KEYS[:200]:
        numbers = one.pick(1.0, 0.0, key=key), other.pick(1.0, 0.0, key=key)
        assert None not in numbers
        assert one.members[numbers[0] or 0].standing.name == other.members[numbers[1] or 0].standing.name


def test_hashing_by_a_long_prompt_looks_at_all_of_it() -> None:
    """Prompts that differ in their last byte only have homes of their own, and stay there."""
    here = balancer("hash", [1.0, 1.0])
    found = [[here.pick(1.0, 0.0, key=b"x" * 10_000 + b"%03d" % number) for number in range(300)] for _ in range(2)]
    assert found[0] == found[1]
    assert found[0].count(0) == pytest.approx(150, rel=0.2)


def test_hashing_without_a_key_spreads_the_load() -> None:
    """Who has no key is no reason to flood one upstream."""
    here = balancer("hash", [1.0, 1.0])
    here.members[0].standing.in_flight = 5
    assert here.pick(1.0, 0.0) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_higher_tier_waits_until_it_is_needed(strategy: str) -> None:
    """The second tier is asked when the first is tried or avoided, and only then."""
    here = balancer(strategy, [1.0, 1.0, 9.0], tiers=[1, 1, 2])
    assert all(here.pick(1.0, chance / 50) in (0, 1) for chance in range(50))
    assert here.pick(1.0, 0.0, tried=(0, 1)) == 2
    eject(here, 0, 1)
    assert here.pick(1.0, 0.0) == 2
    assert here.pick(1.0, 0.0, tried=(2,)) is None


@given(st.sampled_from(STRATEGIES), st.integers(1, 6), st.floats(0, 1), st.sets(st.integers(0, 5)), points)
def test_no_more_are_avoided_than_may_be(strategy: str, count: int, most: float, sick: set[int], chance: float) -> None:
    """At most that share, rounded down, is left out; who is well is always in."""
    here = balancer(strategy, [1.0] * count, most=most)
    ejected = [number for number in sick if number < count]
    eject(here, *ejected)
    tried: list[int] = []
    while (number := here.pick(1.0, chance, tried=tried)) is not None:
        tried.append(number)
    assert len(tried) >= count - int(most * count + 1e-9)
    assert set(range(count)) - set(ejected) <= set(tried)
    assert here.available(1.0) is bool(tried)


def test_a_single_upstream_was_never_tried_again() -> None:
    """With the usual share a model's only upstream is asked, however it has failed: a wrong guess costs everything."""
    here = balancer("in_order", [1.0], most=0.5)
    eject(here, 0)
    here.members[0].standing.set_aside(50.0, 0.0)
    assert here.pick(1.0, 0.0) == 0


def test_the_one_that_is_back_soonest_is_asked() -> None:
    """When more are sick than may be avoided, the longest absent stay out."""
    here = balancer("in_order", [1.0] * 4, most=0.5)
    eject(here, 0, 1, 2, now=0.0)
    here.members[0].standing.set_aside(40.0, 0.0)
    here.members[2].standing.set_aside(30.0, 0.0)
    assert here.pick(1.0, 0.0) == 1
    assert here.pick(1.0, 0.0, tried=(1,)) == 3
    assert here.pick(1.0, 0.0, tried=(1, 3)) is None


def test_what_a_check_says_counts_in_full() -> None:
    """Down is down, beyond the share too, and it uses the share up."""
    here = balancer("in_order", [1.0, 1.0], most=0.5)
    for _ in range(2):
        here.members[0].standing.checked(False, 0.0)
    eject(here, 1)
    assert here.pick(1.0, 0.0) == 1
    for _ in range(2):
        here.members[1].standing.checked(False, 0.0)
    assert here.pick(1.0, 0.0) is None
    assert not here.available(1.0)
    assert here.wait(1.0) == 0.0


def test_how_long_until_one_is_back() -> None:
    """The soonest counts."""
    here = balancer("in_order", [1.0, 1.0])
    eject(here, 0, now=0.0)
    assert here.wait(4.0) == 0.0
    eject(here, 1, now=2.0)
    assert here.wait(4.0) == 6.0


def test_who_has_just_come_back_gets_less() -> None:
    """Slow start: a tenth of its turns at first, then more, then all."""
    here = balancer("round_robin", [1.0, 1.0], health=Health(failures=1, eject=10.0, slow_start=100.0))
    eject(here, 0, now=0.0)
    standing = here.members[0].standing
    standing.end(Verdict.GOOD, 20.0, trial=standing.begin())

    def turns(now: float) -> int:
        return Counter(here.pick(now, 0.0) for _ in range(110))[0]

    assert turns(20.0) in (9, 10, 11)
    assert turns(70.0) in (36, 37, 38)
    assert turns(120.0) in (54, 55, 56)
    assert standing.calm


@given(st.lists(st.integers(0, 2), max_size=5), st.sampled_from(STRATEGIES), st.sets(st.integers(0, 4)), points, points)
def test_what_is_usual_is_what_pick_says(
    tiers: list[int], strategy: str, ejected: set[int], most: float, chance: float
) -> None:
    """While that one is well it is chosen, without a clock, chance or a turn, however the others are."""
    here = balancer(strategy, [1.0] * len(tiers), tiers=tiers, most=most)
    eject(here, *(number for number in ejected if number < len(tiers)))
    assert (here.usual is not None) == (len(tiers) == 1 or (strategy == "in_order" and len(tiers) > 0))
    if here.usual is not None and here.members[here.usual].standing.calm:
        assert here.usual == here.pick(1.0, chance)
