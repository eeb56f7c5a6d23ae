"""Prices: which one applies, and what a use costs, exactly."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from canal_trio.hooks import Usage
from canal_trio.policy.prices import NANOS, Prices, Tariff, money
from canal_trio.settings import Price

PRICE = Price("m", input=2.5, output=10.0, cached_input=1.25, reasoning=12.0, request=0.01)
TOKENS = st.integers(0, 10**7)


def found(prices: Prices, *names: str | None) -> Price | None:
    """The price that is found by these."""
    tariff = prices.find(*names)
    return None if tariff is None else tariff.price


def test_every_kind_of_token_has_its_price():
    """A million of each costs what the table says, cached among the prompt's and reasoning among the completion's."""
    million = 10**6
    assert Tariff(Price("m", input=2.5)).cost(million, 0) == 2.5 * NANOS
    assert Tariff(Price("m", output=10.0)).cost(0, million) == 10 * NANOS
    assert Tariff(PRICE).cost(2 * million, 3 * million, million, million) == round(
        (2.5 + 1.25 + 2 * 10.0 + 12.0 + 0.01) * NANOS
    )


def test_what_has_no_price_of_its_own_costs_what_its_kind_costs():
    """Cached input costs as input and reasoning as output where nothing else is said."""
    plain = Tariff(Price("m", input=3.0, output=5.0))
    assert plain.cost(1000, 1000, 900, 900) == plain.cost(1000, 1000)


@settings(deadline=None)
@given(TOKENS, TOKENS, TOKENS, TOKENS)
def test_a_cost_is_never_negative_and_grows_with_use(prompt: int, completion: int, cached: int, reasoning: int):
    """However strange an upstream's numbers are, more tokens never cost less."""
    tariff = Tariff(PRICE)
    one = tariff.cost(prompt, completion, cached, reasoning)
    more = tariff.cost(prompt + 1, completion + 1, cached, reasoning)
    assert 0 <= one <= more


MILLS = st.integers(0, 10**5)  # thousandths per million tokens: nanos per token


@settings(deadline=None)
@given(TOKENS, TOKENS, TOKENS, TOKENS, st.tuples(MILLS, MILLS, MILLS, MILLS))
def test_a_cost_is_exact_to_the_nano(prompt: int, completion: int, cached: int, reasoning: int, mills: tuple[int, ...]):
    """What prices of three decimals come to, in whole numbers."""
    names = ("input", "output", "cached_input", "reasoning")
    tariff = Tariff(Price("m", **{name: number / 1000 for name, number in zip(names, mills, strict=True)}))
    cached_too, reasoning_too = min(cached, prompt), min(reasoning, completion)
    tokens = prompt - cached_too, completion - reasoning_too, cached_too, reasoning_too
    exact = sum(number * count for number, count in zip(mills, tokens, strict=True))
    assert tariff.cost(prompt, completion, cached, reasoning) == exact


def test_the_nearest_price_wins():
    """This upstream before any, an exact name before a pattern, a longer pattern before a shorter one."""
    exact, here = Price("gpt-4o", input=1), Price("gpt-4o", input=2, upstream="azure")
    short, long, all_else = Price("gpt-*", input=3), Price("gpt-4o-*", input=4), Price("*", input=5, upstream="local")
    prices = Prices([all_else, short, exact, long, here])
    assert found(prices, "azure", "gpt-4o") == here
    assert found(prices, "openai", "gpt-4o") == exact
    assert found(prices, "openai", "gpt-4o-mini") == long
    assert found(prices, "openai", "gpt-5") == short
    assert found(prices, "local", "llama") == all_else
    assert found(prices, "openai", "llama") is None
    assert found(prices, "openai", None) is None
    assert found(prices, "local", None) == all_else
    assert found(prices, "openai", "gpt-5") == short  # remembered


def test_the_upstreams_own_name_comes_before_the_clients():
    """An alias costs what the model behind it costs; where that has no price, what the alias costs."""
    prices = Prices([Price("cheap", input=1), Price("real", input=9)])
    assert found(prices, "u", "real", "cheap") == Price("real", input=9)
    assert found(prices, "u", "unknown", "cheap") == Price("cheap", input=1)


def test_names_that_clients_make_up_are_not_remembered_for_ever():
    """What is remembered about look-ups is bounded."""
    prices = Prices([Price("*", input=1)])
    for number in range(5000):
        assert prices.find("u", f"m{number}") is not None
    assert len(prices._found) <= 4096


def test_money_is_shown_as_people_write_it():
    """Two decimals, more where there is more."""
    assert [money(n) for n in (0, NANOS, 12_340_000_000, 150, -2_500_000_000)] == [
        "0.00",
        "1.00",
        "12.34",
        "0.00000015",
        "-2.50",
    ]


def test_a_use_is_charged_by_the_price_of_its_model():
    """What was used has the cost of the price that is found for it, and none where there is none."""
    prices = Prices([Price("m", input=1.0, output=2.0, cached_input=0.5, reasoning=4.0)])
    assert prices.charge(Usage(100, 50, 20, 10), "u", "m") == 80 * 1000 + 20 * 500 + 40 * 2000 + 10 * 4000
    assert prices.charge(Usage(), "u", None, "m") == 0
    assert prices.charge(Usage(100, 50), "u", "other") is None
