"""Keys and routes: who it is and where it goes, without any I/O."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from types import FrameType

import pytest

from canal_trio.errors import Failure, Kind
from canal_trio.hooks import Principal
from canal_trio.messages import Headers, RequestHead
from canal_trio.policy.exchange import answer_for
from canal_trio.policy.routing import Choice, Identity, Plan, Router, key_in
from canal_trio.settings import Key, Model, Route, Settings, Target, Upstream

ONE = Upstream("one", "http://127.0.0.1:1/v1")
TWO = Upstream("two", "http://127.0.0.1:2/v1")
NOW = 1_000.0


def digest(key: str) -> str:
    """The SHA-256 of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


TEAM = Key("team", digest("sk-team"), ("small",))
MODELS = (Model("small", (Target("two"),)), Model("big", (Target("one"), Target("two"))))


def router(**fields: object) -> Router:
    """A router over two upstreams."""
    return Router(Settings(upstreams=(ONE, TWO), **fields))  # type: ignore[arg-type]


def bearer(key: str) -> Headers:
    """The fields of a client with this key."""
    return Headers([(b"Authorization", b"Bearer " + key.encode())])


def asked(routes: Router, headers: Headers, now: float = NOW) -> Principal | Failure:
    """Who a new connection's first request is from."""
    return Identity().principal(RequestHead(b"GET", b"/v1/models", headers), routes, now)


def who(routes: Router, key: str) -> Principal:
    """The principal of a key that is known."""
    found = asked(routes, bearer(key))
    assert isinstance(found, Principal)
    return found


def tried(verdict: Plan | Failure | None) -> list[tuple[str, str | None]]:
    """The upstreams of a plan, and what each calls the model."""
    assert isinstance(verdict, Plan), verdict
    return [(choice.upstream.name, choice.model) for choice in verdict.choices]


def refused(verdict: object, kind: Kind) -> Failure:
    """The failure that a verdict is."""
    assert isinstance(verdict, Failure)
    assert verdict.kind is kind
    return verdict


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ([(b"Authorization", b"Bearer sk-team")], b"sk-team"),
        ([(b"authorization", b"bearer  sk-team ")], b"sk-team"),
        ([(b"Authorization", b"Basic abc"), (b"api-key", b"x")], None),
        ([(b"Api-Key", b"sk-azure")], b"sk-azure"),
        ([(b"X-API-Key", b"sk-x")], b"sk-x"),
        ([(b"Sec-WebSocket-Protocol", b"realtime, openai-insecure-api-key.sk-web, x")], b"sk-web"),
        ([(b"Sec-WebSocket-Protocol", b"realtime")], None),
        ([], None),
    ],
)
def test_where_a_key_is_looked_for(fields: list[tuple[bytes, bytes]], key: bytes | None):
    """A bearer token wins; Azure's and Anthropic's fields are understood."""
    assert key == key_in(Headers(fields))


def test_without_keys_everybody_is_anonymous():
    """No keys configured: nothing is checked and the client's key is not ours."""
    assert not router().keyed
    assert not router().limited(None)


def test_a_known_key_has_a_principal():
    """The key's SHA-256 leads to its principal."""
    assert Principal("team", ("small",), "team") == who(router(keys=(TEAM,)), "sk-team")
    assert router(keys=(TEAM,)).keyed


def test_a_principal_can_have_several_keys():
    """While a key is rotated the old and the new one are the same principal, and each has its own name."""
    both = router(keys=(Key("ci-1", digest("a"), principal="ci"), Key("ci-2", digest("b"), principal="ci")))
    assert [(who(both, key).name, who(both, key).key) for key in "ab"] == [("ci", "ci-1"), ("ci", "ci-2")]


@pytest.mark.parametrize("value", [b"Bearer sk-wrong", b"Bearer ", b"Bearer sk-team' OR 1=1", b"Bearer \xff"])
def test_an_unknown_key_is_refused(value: bytes):
    """Anything but a configured key is unauthenticated, whatever bytes it has."""
    refused(asked(router(keys=(TEAM,)), Headers([(b"Authorization", value)])), Kind.UNAUTHENTICATED)


def test_a_missing_key_is_told_how_to_come():
    """Without any key the answer says where to put one."""
    verdict = refused(asked(router(keys=(TEAM,)), Headers()), Kind.UNAUTHENTICATED)
    assert "Bearer" in verdict.detail


def test_a_key_that_is_not_valid_is_told_apart_in_the_log_only():
    """Unknown, expired and revoked are one answer to the caller and three remarks in the log."""
    routes = router(keys=(Key("old", digest("old"), expires=NOW), Key("lost", digest("lost"), revoked=True)))
    verdicts = [
        refused(asked(routes, bearer(key)), Kind.UNAUTHENTICATED) for key in ("never", "old", "lost")
    ]
    assert len({repr(answer_for(verdict)) for verdict in verdicts}) == 1
    assert [str(verdict).rpartition(": ")[2] for verdict in verdicts] == [
        f"[the key is unknown; its SHA-256 begins with {digest('never')[:8]}]",
        "[the key 'old' has expired]",
        "[the key 'lost' is revoked]",
    ]


def test_a_key_expires_when_it_says():
    """The moment it names is the first one at which it is not valid."""
    routes = router(keys=(Key("old", digest("old"), expires=NOW),))
    assert isinstance(asked(routes, bearer("old"), NOW - 0.001), Principal)
    refused(asked(routes, bearer("old")), Kind.UNAUTHENTICATED)


def test_without_models_all_upstreams_serve():
    """No models configured: every upstream, in configured order."""
    assert tried(router().route("anything", None)) == [("one", None), ("two", None)]
    assert not router().needs_model(None, named=True)


def test_a_model_leads_to_its_upstreams():
    """A configured model goes to its upstreams in order; a request without a model may go anywhere."""
    routes = router(models=MODELS)
    assert routes.needs_model(None, named=True)
    assert not routes.needs_model(None, named=False)
    assert tried(routes.route("small", None)) == [("two", None)]
    assert tried(routes.route("big", None)) == [("one", None), ("two", None)]
    assert tried(routes.route(None, None)) == [("one", None), ("two", None)]


def test_a_plan_says_which_entry_made_it():
    """Whoever is asked next (limits, prices, the ledger) finds the table that decided."""
    plan = router(models=MODELS).route("small", None)
    assert plan == Plan((Choice(TWO),), MODELS[0])


def test_an_unknown_model_is_not_found():
    """With models configured an unknown one is a 404 that names it, unless `*` takes all."""
    assert "huge" in refused(router(models=MODELS).route("huge", None), Kind.NOT_FOUND).detail
    everything = router(models=(*MODELS, Model("*", (Target("one"),))))
    assert tried(everything.route("huge", None)) == [("one", None)]
    assert tried(everything.route("small", None)) == [("two", None)]


def test_an_alias_is_each_upstreams_own_name():
    """The same model may be called differently by each upstream; a `*` becomes what it stood for."""
    models = (
        Model("gpt", (Target("one"), Target("two", "gpt-2026"))),
        Model("open/*", (Target("one", "*"), Target("two", "x-*-y"))),
        Model("ft:*", (Target("one"),)),
        Model("fixed-*", (Target("one", "always"),)),
    )
    routes = router(models=models)
    assert tried(routes.route("gpt", None)) == [("one", None), ("two", "gpt-2026")]
    assert tried(routes.route("open/a/b", None)) == [("one", "a/b"), ("two", "x-a/b-y")]
    assert tried(routes.route("ft:m:1", None)) == [("one", None)]
    assert tried(routes.route("fixed-7", None)) == [("one", "always")]
    mixed = router(models=(Model("open/*", (Target("one"), Target("two", "*"))),))
    assert tried(mixed.route("open/a", None)) == [("one", None), ("two", "a")]


def test_a_principal_uses_only_its_models():
    """A key's models bound what it may ask for, by name or by pattern."""
    keys = (TEAM, Key("all", digest("sk-all")), Key("s", digest("sk-s"), ("sm*", "big-*")))
    routes = router(models=MODELS, keys=keys)
    assert tried(routes.route("small", who(routes, "sk-team"))) == [("two", None)]
    assert tried(routes.route("small", who(routes, "sk-s"))) == [("two", None)]
    assert tried(routes.route("big", who(routes, "sk-all"))) == [("one", None), ("two", None)]
    for key in ("sk-team", "sk-s"):
        refused(routes.route("big", who(routes, key)), Kind.FORBIDDEN)


def test_a_limited_key_cannot_find_out_which_models_there_are():
    """Not allowed and not there are one answer to such a key, and two in the log."""
    routes = router(models=MODELS, keys=(TEAM,))
    there, not_there = (refused(routes.route(name, who(routes, "sk-team")), Kind.FORBIDDEN) for name in ("big", "bug"))
    assert answer_for(there).message.replace("big", "bug") == answer_for(not_there).message
    assert (there.remark, not_there.remark) == ("", "there is no such model")


@pytest.mark.parametrize("models", [(), MODELS], ids=["no-models", "models"])
def test_a_limited_key_went_round_its_models(models: tuple[Model, ...]):
    """A key for certain models is held to them without [[model]] tables, whatever a body calls itself, and when it
    names none; a request without a body asks for nothing."""
    routes = router(models=models, keys=(TEAM, Key("all", digest("sk-all"), ("small", "*"))))
    team = who(routes, "sk-team")
    assert routes.needs_model(team, named=False)
    assert not routes.needs_model(who(routes, "sk-all"), named=False)
    for model in (None, "big"):
        refused(routes.route(model, team, has_body=True), Kind.FORBIDDEN)
    assert tried(routes.route(None, team, has_body=False)) == [("one", None), ("two", None)]
    assert tried(routes.route(None, None, has_body=True)) == [("one", None), ("two", None)]


def test_a_limited_key_went_round_its_models_by_an_azure_path():
    """The deployment in a path has to be one that the key opens, besides the body's model; for other keys it is only a
    path."""
    routes = router(models=MODELS, keys=(TEAM, Key("all", digest("sk-all"), ("*",))))
    team, everybody = who(routes, "sk-team"), who(routes, "sk-all")
    plan = tried(routes.route("small", team, has_body=True))
    assert tried(routes.route("small", team, has_body=True, deployment="small")) == plan
    said = {name: refused(routes.route("small", team, deployment=name), Kind.FORBIDDEN).detail for name in ("big", "")}
    assert said["big"] == "The key has no access to the deployment 'big'."
    assert "not clear" in said[""]
    for anybody in (everybody, None):
        assert tried(routes.route("small", anybody, deployment="big")) == plan


ROUTES = (Route("files", "/v1/files*", (Target("two"),)), Route("batches", "/v1/files/batches", (Target("one"),)))


def test_a_path_leads_to_its_route():
    """A route takes its path whatever the model; the longest one that fits wins, and a strange path has none."""
    routes = router(routes=ROUTES)
    assert tried(routes.by_path("/v1/files", None)) == [("two", None)]
    assert tried(routes.by_path("/v1/files/a/content", None)) == [("two", None)]
    assert tried(routes.by_path("/v1/files/batches", None)) == [("one", None)]
    assert routes.by_path("/v1/models", None) is None
    assert routes.by_path(None, None) is None
    assert router().by_path("/v1/files", None) is None


def test_a_key_uses_only_its_routes():
    """A key for certain models has no route but those it is given; one for all models has all, unless it says."""
    keys = (
        TEAM,
        Key("a", digest("sk-a"), ("small",), ("files",)),
        Key("all", digest("sk-all")),
        Key("none", digest("sk-none"), routes=()),
    )
    routes = router(routes=ROUTES, keys=keys)
    for key in ("sk-a", "sk-all"):
        assert tried(routes.by_path("/v1/files", who(routes, key))) == [("two", None)]
    for key in ("sk-team", "sk-none"):
        assert "'files'" in refused(routes.by_path("/v1/files", who(routes, key)), Kind.FORBIDDEN).detail
    refused(routes.by_path("/v1/files/batches", who(routes, "sk-a")), Kind.FORBIDDEN)


def _events(job: Callable[[], object]) -> int:
    """How many lines, calls and returns of Python it takes, those into C included."""
    count = 0

    def trace(_frame: FrameType, _event: str, _argument: object) -> Callable[..., object]:
        nonlocal count
        count += 1
        return trace

    def profile(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event.startswith("c_")

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(trace)
    sys.setprofile(profile)
    try:
        job()
    finally:
        sys.setprofile(before[1])
        sys.settrace(before[0])
    return count


def _large(keys: int, models: int) -> Router:
    names = [f"m{number:04}" for number in range(models)]
    return router(
        keys=tuple(Key(f"k{number}", digest(f"sk-{number}"), tuple(names)) for number in range(keys)),
        models=tuple(Model(name, (Target("two", "x"),)) for name in (*names, *(f"w{name}-*" for name in names[::9]))),
        routes=tuple(Route(f"r{number}", f"/r{number}", (Target("one"),)) for number in range(models)),
    )


def test_looking_up_takes_as_long_with_ten_thousand_keys():
    """The steps to find a key, a model, a refusal and a path are the same in number with many entries as with few."""
    counts = []
    for large in (_large(10, 10), _large(10_000, 1_000)):
        principal = who(large, "sk-5")
        jobs: list[Callable[[], object]] = [
            lambda large=large: asked(large, bearer("sk-5")),
            lambda large=large: asked(large, bearer("never")),
            lambda large=large, principal=principal: large.route("m0005", principal),
            lambda large=large, principal=principal: large.route("m5000", principal),
            lambda large=large: large.by_path("/r5", None),
            lambda large=large: large.limited(who(large, "sk-5")),
        ]
        counts.append([_events(job) for job in jobs])
    assert min(counts[0]) > 3
    assert counts[0] == counts[1]


def test_who_a_connection_belongs_to_is_asked_anew_with_another_head_or_router():
    """Remembered for the very same head only: a reload that revokes the key counts at once, so does its expiry, and a
    refusal is not remembered as anything else."""
    identity, head = Identity(), RequestHead(b"GET", b"/v1/models", bearer("sk-team"))
    routes = router(keys=(replace(TEAM, expires=NOW + 5),), models=MODELS)
    first = identity.principal(head, routes, NOW)
    assert first == who(routes, "sk-team")
    assert identity.principal(head, routes, NOW + 4) is first
    refused(identity.principal(head, routes, NOW + 5), Kind.UNAUTHENTICATED)
    other = RequestHead(b"GET", b"/v1/models", bearer("sk-other"))
    refused(identity.principal(other, routes, NOW), Kind.UNAUTHENTICATED)
    assert identity.principal(head, routes, NOW) is first
    reloaded = router(keys=(replace(TEAM, revoked=True),), models=MODELS)
    refused(identity.principal(head, reloaded, NOW), Kind.UNAUTHENTICATED)
    renamed = router(keys=(replace(TEAM, name="again"),), models=MODELS)
    assert identity.principal(head, renamed, NOW) == who(renamed, "sk-team")
    identity.forget()
    assert identity.principal(head, renamed, NOW) == who(renamed, "sk-team")
