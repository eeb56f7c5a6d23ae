"""Whose request it is and where it may go: keys and routes as pure look-ups.

A `Router` is built once from the settings and replaced as a whole on reload. Without models every request goes to the
upstreams in their configured order; with models the request's `model` chooses, and requests that have no body go to
all upstreams in order. A key for certain models opens nothing that does not name one of them.
"""

from __future__ import annotations

import hashlib
from typing import final

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.hooks import Principal
from canal_trio.messages import Headers
from canal_trio.settings import Settings, Upstream

__all__ = ["Router", "key_in"]


def key_in(headers: Headers) -> bytes | None:
    """The key a client shows: a bearer token, or `api-key` / `x-api-key` as Azure's clients send it."""
    authorization = headers.get(b"authorization")
    if authorization is not None:
        scheme, _, token = authorization.partition(b" ")
        return token.strip() if scheme.lower() == b"bearer" else None
    return headers.get(b"api-key") or headers.get(b"x-api-key")


@final
class Router:
    """Answers "who is it" and "where to" from frozen settings."""

    def __init__(self, settings: Settings) -> None:
        self._upstreams = {upstream.name: upstream for upstream in settings.upstreams}
        self._models = {model.name: model for model in settings.models}
        # Looked up by digest: the time it takes says nothing about any key.
        self._principals = {key.sha256: Principal(key.name, key.models) for key in settings.keys}

    def needs_model(self, principal: Principal | None, *, is_json: bool) -> bool:
        """The request's model decides, so its body must be read before it can be routed.

        A key for certain models is held to them whatever the body calls itself: many upstreams do not look at that.
        """
        return _limited(principal) or (is_json and bool(self._models))

    @property
    def keyed(self) -> bool:
        """Keys are configured: the client's key is ours, and never goes to an upstream."""
        return bool(self._principals)

    def authenticate(self, headers: Headers) -> Principal | Failure | None:
        """The principal, None where no keys are configured, or the failure to answer with."""
        if not self._principals:
            return None
        shown = key_in(headers)
        if not shown:
            detail = "Send it as 'Authorization: Bearer KEY'."
            return Failure(Side.CLIENT, Phase.ROUTE, Kind.UNAUTHENTICATED, f"No API key was given. {detail}")
        principal = self._principals.get(hashlib.sha256(shown).hexdigest())
        return principal or Failure(Side.CLIENT, Phase.ROUTE, Kind.UNAUTHENTICATED)

    def route(
        self, model: str | None, principal: Principal | None, *, has_body: bool = False
    ) -> list[Upstream] | Failure:
        """The upstreams to try, best first. `model` is None when the request names none.

        A request without a body (a list of models) asks for no generation; one with a body that names no model may.
        """
        if model is None and has_body and _limited(principal):
            detail = "The key is for certain models, and the request's body names none."
            return Failure(Side.CLIENT, Phase.ROUTE, Kind.FORBIDDEN, detail)
        if principal is not None and model is not None and not {model, "*"} & set(principal.models):
            return Failure(Side.CLIENT, Phase.ROUTE, Kind.FORBIDDEN, f"The key has no access to the model '{model}'.")
        if not self._models or model is None:
            return list(self._upstreams.values())
        entry = self._models.get(model) or self._models.get("*")
        if entry is None:
            return Failure(Side.CLIENT, Phase.ROUTE, Kind.NOT_FOUND, f"The model '{model}' does not exist.")
        return [self._upstreams[name] for name in entry.upstreams]


def _limited(principal: Principal | None) -> bool:
    return principal is not None and "*" not in principal.models
