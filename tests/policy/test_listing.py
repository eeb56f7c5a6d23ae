"""What `/v1/models` says, and that it says what the router does."""

from __future__ import annotations

import hashlib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from canal_trio.errors import Failure, Kind
from canal_trio.hooks import Principal
from canal_trio.messages import Headers, RequestHead
from canal_trio.policy.listing import ENTRIES, Listing
from canal_trio.policy.routing import Identity, Plan, Router
from canal_trio.settings import Key, Model, Settings, Target, Upstream

ONE = Upstream("one", "http://127.0.0.1:1/v1", list_models=True)
TWO = Upstream("two", "http://127.0.0.1:2/v1")
LISTS = {"one": {"a": {"id": "a", "owned_by": "them", "max_model_len": 8}, "x-b": {"id": "x-b"}, "c": {"id": "c"}}}
KEYS = tuple(
    Key(name, hashlib.sha256(name.encode()).hexdigest(), models)
    for name, models in (("all", ("*",)), ("some", ("gpt", "open/*")), ("one", ("a",)), ("none", ()))
)
MODELS = (
    Model("gpt", (Target("two"), Target("one", "a"))),
    Model("far", (Target("two"),)),
    Model("open/*", (Target("one", "*"),)),
    Model("y*", (Target("one", "x*"), Target("two"))),
    Model("fixed*", (Target("one", "a"),)),
)


def made(**fields: Any) -> tuple[Router, Listing]:
    """A router and its lists."""
    settings = Settings(upstreams=fields.pop("upstreams", (ONE, TWO)), **fields)
    router = Router(settings)
    return router, Listing(settings, router)


def who(router: Router, key: str) -> Principal:
    """The principal of a key."""
    found = Identity().principal(RequestHead(b"GET", b"/v1/models", Headers([(b"api-key", key.encode())])), router, 0.0)
    assert isinstance(found, Principal)
    return found


def names(entries: list[dict[str, Any]]) -> list[str]:
    """Their ids."""
    return [entry["id"] for entry in entries]


def test_configured_and_listed_models():
    """Configured names first, then what upstreams list, by the name that leads there; with what they say about it."""
    _, listing = made(models=MODELS)
    entries = listing.models(None, LISTS)
    assert names(entries) == ["gpt", "far", "open/a", "open/x-b", "open/c", "y-b"]
    assert entries[0] == {"object": "model", "created": 0, "owned_by": "them", "id": "gpt", "max_model_len": 8}
    assert entries[1] == {"object": "model", "created": 0, "owned_by": "canal", "id": "far"}
    assert names(listing.models(None, {})) == ["gpt", "far"]


def test_a_key_sees_what_it_may_use():
    """Nothing else, with a pattern and without."""
    router, listing = made(models=MODELS, keys=KEYS)
    assert names(listing.models(who(router, "some"), LISTS)) == ["gpt", "open/a", "open/x-b", "open/c"]
    assert listing.models(who(router, "none"), LISTS) == []


def test_without_models_the_upstreams_lists_are_it():
    """Every listed one, or those that the key names."""
    router, listing = made(keys=KEYS)
    assert names(listing.models(who(router, "all"), LISTS)) == ["a", "x-b", "c"]
    assert names(listing.models(who(router, "one"), LISTS)) == ["a"]
    assert names(listing.models(who(router, "some"), {})) == ["gpt"]


def test_whose_list_it_is():
    """The gateway's, where it knows something that the upstream does not; else the request goes on."""
    assert made(models=MODELS)[1].answers(None)
    assert made()[1].answers(None)  # ONE is listed
    router, listing = made(upstreams=(TWO,), keys=KEYS)
    assert not listing.answers(None)
    assert not listing.answers(who(router, "all"))
    assert listing.answers(who(router, "one"))


def test_one_model():
    """Known by configuration or by a list; not there, or not for this key; or with an upstream that lists nothing."""
    router, listing = made(models=MODELS, keys=KEYS)

    def one(name: str, key: str = "all") -> object:
        found = listing.model(name, who(router, key), LISTS)
        return found.kind if isinstance(found, Failure) else found["id"]

    assert one("gpt") == "gpt"
    assert one("open/a") == "open/a"
    assert one("open/nothing") is Kind.NOT_FOUND
    assert one("yz") == "yz"  # two has no list: it may know it
    assert one("nothing") is Kind.NOT_FOUND
    assert one("far", "some") is Kind.FORBIDDEN
    assert one("fixed-1") == "fixed-1"


def test_a_list_is_bounded():
    """No more than 4,096 models are listed."""
    _, listing = made()
    assert len(listing.models(None, {"one": {str(number): {} for number in range(ENTRIES + 3)}})) == ENTRIES


TEXT = st.text("ab", max_size=2)
PATTERN = st.tuples(TEXT, TEXT).map("*".join)


KNOWN = st.sets(st.text("ab", min_size=1, max_size=4))


@given(st.lists(st.tuples(PATTERN, st.one_of(st.none(), PATTERN)), max_size=3), KNOWN)
def test_what_is_listed_is_what_the_router_finds(models: list[tuple[str, str | None]], known: set[str]):
    """Each listed name goes to an upstream that lists the name which it then has there."""
    router, listing = made(models=tuple(Model(name, (Target("one", target),)) for name, target in models))
    for name in names(listing.models(None, {"one": {one: {} for one in known}})):
        plan = router.route(name, None)
        assert isinstance(plan, Plan)
        if models:
            model = plan.choices[0].model
            assert (name if model is None else model) in known
