"""Whose request it is and where it may go: keys, models and routes as pure look-ups.

A `Router` is built once from the settings and replaced as a whole on reload; building it may take a while, asking it
takes as long with ten thousand keys as with ten. Where a request goes is a `Plan`: the path's `[[route]]` if there is
one, else the `[[model]]` of its `model`, else every upstream in its configured order.

A key for certain models opens nothing that does not name one of them, except the routes that it is given. What a key is
told is the same whether it was never known, has expired or is revoked, and whether a model exists that it may not use;
the failure's `remark` tells them apart in the log.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import final

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.hooks import Principal
from canal_trio.messages import Headers, RequestHead
from canal_trio.policy.names import Names
from canal_trio.settings import Key, Model, Route, Settings, Upstream

__all__ = ["Choice", "Identity", "Plan", "Router", "key_in"]


_KEY_PROTOCOL = b"openai-insecure-api-key."


@dataclass(frozen=True, slots=True)
class Choice:
    """An upstream to try, and what the request's `model` becomes for it; None: it stays as it is."""

    upstream: Upstream
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a request goes: the entry of the settings that said so (None: none did), and the choices, best first."""

    choices: tuple[Choice, ...]
    entry: Model | Route | None = None


@dataclass(frozen=True, slots=True)
class _Holder:
    """What a key opens."""

    principal: Principal
    models: Names[bool] | None  # None: every one
    routes: Names[bool]
    until: float  # Unix time from which on it is no key; -inf if it is revoked

    def at(self, now: float) -> Principal | Failure:
        """The principal, if the key is one at `now` (Unix time)."""
        if now < self.until:
            return self.principal
        why = "is revoked" if self.until == -math.inf else "has expired"
        return _unauthenticated(f"the key '{self.principal.key}' {why}")


def key_in(headers: Headers) -> bytes | None:
    """The key a client shows: a bearer token, `api-key` / `x-api-key` as Azure's clients send it, or a subprotocol of
    the Realtime API's clients in browsers, which can set no field."""
    authorization = headers.get(b"authorization")
    if authorization is not None:
        scheme, _, token = authorization.partition(b" ")
        return token.strip() if scheme.lower() == b"bearer" else None
    key = headers.get(b"api-key") or headers.get(b"x-api-key")
    if key is None and b"sec-websocket-protocol" in headers:
        for member in b",".join(headers.get_all(b"sec-websocket-protocol")).split(b","):
            if member.strip().startswith(_KEY_PROTOCOL):
                return member.strip().removeprefix(_KEY_PROTOCOL)
    return key


@final
class Router:
    """Answers "who is it" and "where to" from frozen settings."""

    def __init__(self, settings: Settings) -> None:
        self._upstreams = {upstream.name: upstream for upstream in settings.upstreams}
        self._all = Plan(tuple(Choice(upstream) for upstream in settings.upstreams))
        self._models = Names((model.name, self._plan(model)) for model in settings.models)
        self._routes = Names((route.path, self._plan(route)) for route in settings.routes)
        self.early_heads = any(upstream.early_head_after is not None for upstream in settings.upstreams)
        self._has_models = bool(settings.models)
        self._has_routes = bool(settings.routes)
        # Looked up by digest: the time it takes says nothing about any key.
        self._holders: dict[str, _Holder] = {}
        self._by_key: dict[str, _Holder] = {}
        self.keyed = bool(settings.keys)  # the client's key is ours, and never goes to an upstream
        opened: dict[tuple[str, ...], Names[bool]] = {}  # many keys open the same
        for key in settings.keys:
            self._holders[key.sha256] = self._by_key[key.name] = _holder(key, opened)

    def _plan(self, entry: Model | Route) -> Plan:
        """Where `entry` goes, if its `*` (should it have one) stood for itself."""
        return Plan(tuple(Choice(self._upstreams[target.name], target.model) for target in entry.upstreams), entry)

    # -- who -----------------------------------------------------------------------------------------------------------

    def holder(self, headers: Headers) -> _Holder | Failure:
        """What the key in these fields opens, whether or not it may still be used."""
        shown = key_in(headers)
        if not shown:
            detail = "Send it as 'Authorization: Bearer KEY'."
            return _unauthenticated("no key was given", f"No API key was given. {detail}")
        digest = hashlib.sha256(shown).hexdigest()
        holder = self._holders.get(digest)
        if holder is None:
            return _unauthenticated(f"the key is unknown; its SHA-256 begins with {digest[:8]}")
        return holder

    def limited(self, principal: Principal | None) -> bool:
        """Does the principal's key open certain models only?"""
        return principal is not None and self._by_key[principal.key].models is not None

    # -- where to ------------------------------------------------------------------------------------------------------

    def by_path(self, path: str | None, principal: Principal | None) -> Plan | Failure | None:
        """Where the `[[route]]` of `path` leads, None if there is none. `path` is None for one that is not plain."""
        found = self._routes.find(path) if self._has_routes and path is not None else None
        if found is None:
            return None
        plan = found[0]
        if principal is not None:
            name = plan.entry.name if plan.entry is not None else ""
            if name not in self._by_key[principal.key].routes:
                detail = f"The key has no access to the route '{name}'."
                return Failure(Side.CLIENT, Phase.ROUTE, Kind.FORBIDDEN, detail)
        return plan

    def needs_model(self, principal: Principal | None, *, named: bool) -> bool:
        """The request's model decides, so its body must be read before it can be routed.

        `named`: it is of a kind that names its model. A key for certain models is held to them whatever the body calls
        itself: many upstreams do not look at that.
        """
        return (named and self._has_models) or self.limited(principal)

    def route(
        self, model: str | None, principal: Principal | None, *, has_body: bool = False, deployment: str | None = None
    ) -> Plan | Failure:
        """Where a request goes that no path's route takes. `model` is None when the request names none.

        A request without a body (a list of files) asks for no generation; one with a body that names no model may.
        A `deployment` that its path names is what some upstreams take for the model, whatever the body says: so a key
        for certain models must open both.
        """
        allowed = self._by_key[principal.key].models if principal is not None else None
        if deployment is not None and allowed is not None and deployment not in allowed:
            detail = "It is not clear which deployment the path names, and the key is for certain models."
            if deployment:
                detail = f"The key has no access to the deployment '{deployment}'."
            return Failure(Side.CLIENT, Phase.ROUTE, Kind.FORBIDDEN, detail)
        if model is None:
            if has_body and allowed is not None:
                detail = "The key is for certain models, and the request's body names none."
                return Failure(Side.CLIENT, Phase.ROUTE, Kind.FORBIDDEN, detail)
            return self._all
        found = self._models.find(model) if self._has_models else (self._all, None)
        if allowed is not None and model not in allowed:
            detail = f"The key has no access to the model '{model}'."
            remark = "" if found is not None else "there is no such model"
            return Failure(Side.CLIENT, Phase.ROUTE, Kind.FORBIDDEN, detail, remark=remark)
        if found is None:
            return Failure(Side.CLIENT, Phase.ROUTE, Kind.NOT_FOUND, f"The model '{model}' does not exist.")
        plan, star = found
        return plan if star is None else _with_star(plan, star)


@final
class Identity:
    """Who sends the requests of one client connection: found out once for each head, which comes again and again.

    Asked anew where the head or the router is another one; whether a key has expired is asked each time.
    """

    __slots__ = ("_head", "_holder", "_router")

    def __init__(self) -> None:
        self._head: RequestHead | None = None
        self._router: Router | None = None
        self._holder: _Holder | None = None

    def principal(self, head: RequestHead, router: Router, now: float) -> Principal | Failure:
        """Who sends this head, by the keys of `router`, or the failure to answer with. `now` is Unix time. The very
        same object stands for the same head."""
        holder = self._holder
        if holder is None or self._head is not head or self._router is not router:
            found = router.holder(head.headers)
            if isinstance(found, Failure):
                return found
            self._head, self._router, self._holder = head, router, found
            holder = found
        return holder.at(now)

    def forget(self) -> None:
        """Remember nothing."""
        self._head = self._router = self._holder = None


def _holder(key: Key, opened: dict[tuple[str, ...], Names[bool]]) -> _Holder:
    def names(chosen: tuple[str, ...]) -> Names[bool]:
        if chosen not in opened:
            opened[chosen] = Names((name, True) for name in chosen)
        return opened[chosen]

    everything = "*" in key.models
    routes = key.routes if key.routes is not None else (("*",) if everything else ())
    principal = Principal(key.principal or key.name, key.models, key.name, key.on_disconnect)
    expires = math.inf if key.expires is None else key.expires
    until = -math.inf if key.revoked else expires
    return _Holder(principal, None if everything else names(key.models), names(routes), until)


def _unauthenticated(remark: str, detail: str = "") -> Failure:
    return Failure(Side.CLIENT, Phase.ROUTE, Kind.UNAUTHENTICATED, detail, remark=remark)


def _with_star(plan: Plan, star: str) -> Plan:
    """`plan` with what the `*` in the model's name stood for."""
    if not any(choice.model is not None and "*" in choice.model for choice in plan.choices):
        return plan
    choices = [
        choice if choice.model is None else Choice(choice.upstream, choice.model.replace("*", star))
        for choice in plan.choices
    ]
    return Plan(tuple(choices), plan.entry)
