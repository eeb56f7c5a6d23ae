"""What is legal in a configuration, but unwise: remarks that `canal-trio check` makes, and nobody acts upon."""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Iterator
from typing import Any

from canal_trio.config.values import shown
from canal_trio.policy.names import Names
from canal_trio.policy.prices import Prices
from canal_trio.settings import Key, Settings, address_text
from canal_trio.wire.targets import BaseUrl, parse_base_url

__all__ = ["advice"]

SOON = 14 * 86400.0
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/audio/speech")


def advice(settings: Settings, raw: dict[str, Any], file: str, now: float) -> list[str]:
    """A remark on each thing that is legal and unwise. `raw` is the document in `file`, `now` is Unix time."""
    kinds = (
        _open_doors(settings),
        _secrets(raw, file),
        _upstreams(settings),
        _keys(settings, now),
        _budgets(settings),
        _rest(settings),
    )
    return [remark for kind in kinds for remark in kind]


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _open_doors(settings: Settings) -> Iterator[str]:
    outside = [address for address in settings.listen if not _is_local(address[0])]
    if outside and settings.tls is None and settings.keys and not settings.trusted_proxies:
        where = address_text(outside[0])
        yield f"server.listen: clients' keys travel in the clear to {where}: there is no [server.tls]"
    if outside and not settings.keys and not settings.allow_anonymous:
        yield f"server.listen: there is no [[key]]: whoever reaches {address_text(outside[0])} is relayed"
    if settings.allow_anonymous and any(upstream.api_key is not None for upstream in settings.upstreams):
        yield "server.allow_anonymous: whoever reaches the gateway spends the upstreams' keys"
    if settings.admin is not None and not _is_local(settings.admin[0]):
        yield f"server.admin: {address_text(settings.admin)} shows to everybody what is asked by whom, and has no keys"


def _secrets(raw: dict[str, Any], file: str) -> Iterator[str]:
    literal = [
        f"upstream[{number}].{key}"
        for number, table in enumerate(raw.get("upstream", []))
        for key in ("api_key", "proxy")
        if isinstance(table.get(key), str) and (key == "api_key" or "@" in table[key])
    ]
    literal += [
        f"{name}.{key}"
        for name, key in (("ledger", "postgres"), ("limits", "redis"))
        if isinstance(url := raw.get(name, {}).get(key), str) and "@" in url
    ]
    for place in literal:
        yield f'{place}: a secret in the file: {{ env = "NAME" }} or {{ file = "PATH" }} keeps it out of it'
    if literal and os.stat(file).st_mode & (stat.S_IRGRP | stat.S_IROTH):
        yield f"{file}: it holds secrets, and others than its owner can read it: chmod 600"


def _upstreams(settings: Settings) -> Iterator[str]:
    used = {target.name for model in settings.models for target in model.upstreams}
    used |= {target.name for route in settings.routes for target in route.upstreams}
    for number, upstream in enumerate(settings.upstreams):
        base = parse_base_url(upstream.base_url)
        assert isinstance(base, BaseUrl)  # it was checked
        place, far = f"upstream[{number}]", not _is_local(base.host)
        if upstream.api_key is not None and base.scheme == "http" and far:
            yield f"{place}.base_url: its key travels in the clear to {shown(base.host)}: it is not https"
        if settings.keys and upstream.api_key is None and far:
            yield f"{place}: it has no api_key, and clients' keys are not passed on: it is asked without any"
        if settings.models and upstream.name not in used:
            yield f"{place}: no [[model]] and no [[route]] leads to {shown(upstream.name)}"


def _keys(settings: Settings, now: float) -> Iterator[str]:
    served = [model.name for model in settings.models]
    for number, key in enumerate(settings.keys):
        place = f"key[{number}]"
        if key.revoked:
            continue
        if key.expires is not None and key.expires <= now:
            yield f"{place}.expires: the key {shown(key.name)} has expired"
        elif key.expires is not None and key.expires - now < SOON:
            yield f"{place}.expires: the key {shown(key.name)} expires within two weeks"
        opened = Names((name, True) for name in key.models)
        if not key.models or (served and not any("*" in name or name in opened for name in served)):
            yield f"{place}.models: the key {shown(key.name)} opens no model"
        yield from _round_about(settings, key, place)


def _round_about(settings: Settings, key: Key, place: str) -> Iterator[str]:
    """A route that leads a key for certain models to any of them."""
    if "*" in key.models or not key.routes:
        return
    opened = Names((name, True) for name in key.routes)
    for route in settings.routes:
        taken = Names([(route.path, True)])
        path = next((path for path in GENERATING if path in taken), None)
        if route.name in opened and path is not None:
            yield (
                f"{place}.routes: the route {shown(route.name)} takes {path} whatever the model: "
                f"it lets the key {shown(key.name)} use every one"
            )


def _budgets(settings: Settings) -> Iterator[str]:
    """What no budget stops, because it has no price."""
    if all(limit.spend_day is None and limit.spend_month is None for limit in settings.limits):
        return
    prices = Prices(settings.prices)
    for number, model in enumerate(settings.models):
        for target in model.upstreams:
            called = target.model or model.name
            if "*" not in model.name + called and prices.find(target.name, called, model.name) is None:
                yield f"model[{number}]: {shown(called)} at {shown(target.name)} has no [[price]]: no budget stops it"


def _rest(settings: Settings) -> Iterator[str]:
    if settings.deadlines.first_byte < 60:
        yield f"deadlines.first_byte: some models think for longer than {settings.deadlines.first_byte:g} s"
    if settings.deadlines.upstream_idle < 30:
        yield f"deadlines.upstream_idle: some models pause for longer than {settings.deadlines.upstream_idle:g} s"
