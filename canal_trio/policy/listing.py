"""Which models a principal may use: what `/v1/models` says, from the settings and from upstreams' own lists.

A configured name is listed if the key opens it. What an upstream lists itself is listed under the name by which a
client would reach it: a `[[model]]` with a `*` that leads there is read backwards. Whatever is listed, the router would
take there; what an upstream says about a model (its owner, its context's length) stands with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, final

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.hooks import Principal
from canal_trio.policy.routing import Router
from canal_trio.settings import Model, Settings, Target

__all__ = ["Listing", "Lists"]

Lists = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""By upstream's name, what it lists by id; an upstream that is not there has no list (yet)."""

ENTRIES: Final = 4096


@final
class Listing:
    """Lists for one configuration."""

    def __init__(self, settings: Settings, router: Router) -> None:
        self._router = router
        self._owner = settings.pseudonym
        self._exact = [model for model in settings.models if "*" not in model.name]
        self._wild = [model for model in settings.models if "*" in model.name]
        self._everything = () if settings.models else tuple(Target(upstream.name) for upstream in settings.upstreams)
        self.sources = tuple(upstream for upstream in settings.upstreams if upstream.list_models)

    def answers(self, principal: Principal | None) -> bool:
        """Is the list the gateway's to make? Without models, lists or limits it is the upstream's own."""
        return bool(self._exact or self._wild or self.sources) or self._router.limited(principal)

    def models(self, principal: Principal | None, lists: Lists) -> list[dict[str, Any]]:
        """Every model that `principal` may use and that is known by name, at most 4,096."""
        found: dict[str, dict[str, Any]] = {}
        for name, said, source in self._candidates(principal, lists):
            if name in found:
                continue
            plan = self._router.route(name, principal)
            if not isinstance(plan, Failure) and plan.entry is source:
                found[name] = self._entry(name, said)
                if len(found) == ENTRIES:
                    break
        return list(found.values())

    def model(self, name: str, principal: Principal | None, lists: Lists) -> dict[str, Any] | Failure:
        """One of them, or one that nobody lists but that goes to an upstream without a list; else why not."""
        plan = self._router.route(name, principal)
        if isinstance(plan, Failure):
            return plan
        known = plan.entry is not None and "*" not in plan.entry.name
        for choice in plan.choices:
            listed = lists.get(choice.upstream.name)
            said = None if listed is None else listed.get(choice.model or name)
            if said is not None:
                return self._entry(name, said)
            known = known or listed is None
        if known:
            return self._entry(name, {})
        return Failure(Side.CLIENT, Phase.ROUTE, Kind.NOT_FOUND, f"The model '{name}' does not exist.")

    def _candidates(
        self, principal: Principal | None, lists: Lists
    ) -> Iterator[tuple[str, Mapping[str, Any], Model | None]]:
        """Names that a client might use, what an upstream says about each, and the entry that would lead there."""
        for model in self._exact:
            said = (lists.get(target.name, {}).get(target.model or model.name) for target in model.upstreams)
            yield model.name, next((one for one in said if one is not None), {}), model
        for model in self._wild:
            for target in model.upstreams:
                for known, entry in lists.get(target.name, {}).items():
                    name = _backwards(model.name, target.model or model.name, known)
                    if name is not None:
                        yield name, entry, model
        for target in self._everything:
            yield from ((name, entry, None) for name, entry in lists.get(target.name, {}).items())
        if self._everything and principal is not None:
            for name in principal.models:
                if "*" not in name:
                    yield name, {}, None

    def _entry(self, name: str, said: Mapping[str, Any]) -> dict[str, Any]:
        return {"object": "model", "created": 0, "owned_by": self._owner, **said, "id": name}


def _backwards(pattern: str, target: str, known: str) -> str | None:
    """The name that `pattern` takes and that becomes `known` in `target`; None if there is none, or more than one."""
    front, star, back = target.partition("*")
    if not star or len(known) < len(front) + len(back) or not (known.startswith(front) and known.endswith(back)):
        return None
    return pattern.replace("*", known[len(front) : len(known) - len(back)])
