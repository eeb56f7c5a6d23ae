"""Keys and routes: who it is and where it goes, without any I/O."""

from __future__ import annotations

import hashlib

import pytest

from canal_trio.errors import Failure, Kind
from canal_trio.hooks import Principal
from canal_trio.messages import Headers
from canal_trio.policy.routing import Router, key_in
from canal_trio.settings import Key, Model, Settings, Upstream

ONE = Upstream("one", "http://127.0.0.1:1/v1")
TWO = Upstream("two", "http://127.0.0.1:2/v1")
TEAM = Key("team", hashlib.sha256(b"sk-team").hexdigest(), ("small",))


def router(**fields: object) -> Router:
    """A router over two upstreams."""
    return Router(Settings(upstreams=(ONE, TWO), **fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ([(b"Authorization", b"Bearer sk-team")], b"sk-team"),
        ([(b"authorization", b"bearer  sk-team ")], b"sk-team"),
        ([(b"Authorization", b"Basic abc"), (b"api-key", b"x")], None),
        ([(b"Api-Key", b"sk-azure")], b"sk-azure"),
        ([(b"X-API-Key", b"sk-x")], b"sk-x"),
        ([], None),
    ],
)
def test_where_a_key_is_looked_for(fields: list[tuple[bytes, bytes]], key: bytes | None):
    """A bearer token wins; Azure's and Anthropic's fields are understood."""
    assert key == key_in(Headers(fields))


def test_without_keys_everybody_is_anonymous():
    """No keys configured: nothing is checked and the client's key is not ours."""
    assert router().authenticate(Headers()) is None
    assert not router().keyed


def test_a_known_key_has_a_principal():
    """The key's SHA-256 leads to its principal."""
    found = router(keys=(TEAM,)).authenticate(Headers([(b"Authorization", b"Bearer sk-team")]))
    assert Principal("team", ("small",)) == found
    assert router(keys=(TEAM,)).keyed


@pytest.mark.parametrize("value", [b"Bearer sk-wrong", b"Bearer ", b"Bearer sk-team' OR 1=1", b"Bearer \xff"])
def test_an_unknown_key_is_refused(value: bytes):
    """Anything but a configured key is unauthenticated, whatever bytes it has."""
    verdict = router(keys=(TEAM,)).authenticate(Headers([(b"Authorization", value)]))
    assert isinstance(verdict, Failure)
    assert verdict.kind is Kind.UNAUTHENTICATED


def test_a_missing_key_is_told_how_to_come():
    """Without any key the answer says where to put one."""
    verdict = router(keys=(TEAM,)).authenticate(Headers())
    assert isinstance(verdict, Failure)
    assert "Bearer" in verdict.detail


def test_without_models_all_upstreams_serve():
    """No models configured: every upstream, in configured order."""
    assert router().route("anything", None) == [ONE, TWO]
    assert not router().needs_model(None, is_json=True)


MODELS = (Model("small", ("two",)), Model("big", ("one", "two")))


def test_a_model_leads_to_its_upstreams():
    """A configured model goes to its upstreams in order; a request without a model may go anywhere."""
    routes = router(models=MODELS)
    assert routes.needs_model(None, is_json=True)
    assert not routes.needs_model(None, is_json=False)
    assert routes.route("small", None) == [TWO]
    assert routes.route("big", None) == [ONE, TWO]
    assert routes.route(None, None) == [ONE, TWO]


def test_an_unknown_model_is_not_found():
    """With models configured an unknown one is a 404 that names it, unless `*` takes all."""
    verdict = router(models=MODELS).route("huge", None)
    assert isinstance(verdict, Failure)
    assert verdict.kind is Kind.NOT_FOUND
    assert "huge" in verdict.detail
    assert router(models=(*MODELS, Model("*", ("one",)))).route("huge", None) == [ONE]


def test_a_principal_uses_only_its_models():
    """A key's models bound what it may ask for."""
    routes = router(models=MODELS)
    assert routes.route("small", Principal("team", ("small",))) == [TWO]
    assert routes.route("big", Principal("all", ("*",))) == [ONE, TWO]
    verdict = routes.route("big", Principal("team", ("small",)))
    assert isinstance(verdict, Failure)
    assert verdict.kind is Kind.FORBIDDEN


@pytest.mark.parametrize("models", [(), MODELS], ids=["no-models", "models"])
def test_a_limited_key_went_round_its_models(models: tuple[Model, ...]):
    """A key for certain models is held to them without [[model]] tables, whatever a body calls itself, and when it
    names none; a request without a body asks for nothing."""
    routes, team = router(models=models), Principal("team", ("small",))
    assert routes.needs_model(team, is_json=False)
    assert not routes.needs_model(Principal("all", ("small", "*")), is_json=False)
    for model in (None, "big"):
        verdict = routes.route(model, team, has_body=True)
        assert isinstance(verdict, Failure)
        assert verdict.kind is Kind.FORBIDDEN
    assert routes.route(None, team, has_body=False) == [ONE, TWO]
    assert routes.route(None, None, has_body=True) == [ONE, TWO]
