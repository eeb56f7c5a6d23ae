"""`GET /v1/models` through the whole gateway: what this key may use, with what the upstreams list themselves."""

from __future__ import annotations

import hashlib
import json
import socket
from dataclasses import replace
from typing import Any

import pytest
import trio
from kit import RunningGateway, eventually, request, running_gateway, settings_for

from canal_trio.settings import Bounds, Deadlines, Key, Model, Route, Settings, Target, Upstream
from canal_trio.testing.scripts import Script, Send, Stall, openai_error, reply
from canal_trio.testing.upstreams import ScriptedUpstream, in_order

KEYS = (
    Key("all", hashlib.sha256(b"sk-all").hexdigest()),
    Key("some", hashlib.sha256(b"sk-some").hexdigest(), ("gpt", "open/a")),
)
LIST = reply(json.dumps({"object": "list", "data": [{"id": "a", "owned_by": "them"}, {"id": "b"}]}).encode())


def settings(*upstreams: Upstream, **more: Any) -> Settings:
    """A configured model, and all that the first upstream lists as `open/…`."""
    models = (Model("gpt", (Target("u0"),)), Model("open/*", (Target("u0", "*"),)))
    return replace(settings_for(*upstreams, **more), models=models, keys=KEYS)


def listed(url: str, number: int = 0) -> Upstream:
    """An upstream whose list is asked for."""
    return Upstream(f"u{number}", url, api_key="sk-own", list_models=True)


async def ids(gateway: RunningGateway, secret: str = "sk-all") -> list[str]:
    """What a key sees."""
    answer = await gateway.ask(request("GET", "/v1/models", None, f"Authorization: Bearer {secret}"))
    assert (answer.status, answer.header("content-type")) == (200, "application/json")
    assert answer.json["object"] == "list"
    return [entry["id"] for entry in answer.json["data"]]


async def test_each_key_sees_its_models() -> None:
    """Configured and listed ones; the upstream is asked once, with its own key, and its answer is kept."""
    async with ScriptedUpstream(LIST) as upstream, running_gateway(settings(listed(upstream.url))) as gateway:
        assert await ids(gateway) == ["gpt", "open/a", "open/b"]
        assert await ids(gateway, "sk-some") == ["gpt", "open/a"]
        assert [(seen.method, seen.target) for seen in upstream.requests] == [("GET", "/v1/models")]
        assert upstream.requests[0].header("authorization") == "Bearer sk-own"
        await eventually(lambda: upstream.open_connections == 0)
        record = (await gateway.records.wait(2))[0]
        assert (record.status, record.outcome.value, record.upstream) == (200, "completed", None)
        refused = await gateway.ask(request("GET", "/v1/models"))
        assert refused.status == 401


async def test_a_whole_url_as_target_showed_the_upstreams_own_list() -> None:
    """A target in absolute-form asks for the same as its path does: this key's models, and nothing of the upstream."""
    async with ScriptedUpstream(LIST) as upstream, running_gateway(settings(listed(upstream.url))) as gateway:
        ask = request("GET", "http://gw.test/v1/models?x", None, "Authorization: Bearer sk-some")
        answer = await gateway.ask(ask)
        assert [entry["id"] for entry in answer.json["data"]] == ["gpt", "open/a"]
        assert (await gateway.records.wait(1))[0].path == "/v1/models"


async def test_one_model_is_told_of() -> None:
    """With what its upstream says about it; one that is not there is a 404, one that is not for this key a 403."""
    async with ScriptedUpstream(LIST) as upstream, running_gateway(settings(listed(upstream.url))) as gateway:
        client = await gateway.connect()

        async def one(name: str, secret: str = "sk-all", method: str = "GET") -> Any:
            await client.send(request(method, f"/v1/models/{name}", None, f"Authorization: Bearer {secret}"))
            return await client.response(method)

        assert (await one("open%2Fa")).json == {"object": "model", "created": 0, "owned_by": "them", "id": "open/a"}
        assert (await one("gpt")).json["id"] == "gpt"
        assert (await one("open/b", "sk-some")).status == 403
        missing = await one("open/zzz")
        assert (missing.status, missing.json["error"]["code"]) == (404, "model_not_found")
        head = await one("gpt", method="HEAD")
        assert (head.status, head.body) == (200, b"")
        assert int(head.header("content-length") or 0) > 10


@pytest.mark.parametrize(
    "script",
    [
        openai_error(500),
        reply(b"<html>"),
        reply(b'{"data":[{"id":"a\xff"}]}'),
        reply(b'{"data":[{"id":"a"}]}' + b" " * 2000),
        Script((Send(b"HTTP/9.9 what\r\n\r\n"),)),
        Script(()),
        Script((Stall(),)),
    ],
    ids=["error", "html", "no-utf8", "large", "no-http", "closed", "silent"],
)
async def test_an_upstream_without_a_list_spoils_nothing(script: Script, caplog: pytest.LogCaptureFixture) -> None:
    """What is configured is listed all the same, soon, and the log says why the rest is missing."""
    bounds, deadlines = Bounds(model_list_bytes=1000), Deadlines(model_list=0.3)
    async with ScriptedUpstream(script) as upstream:
        configuration = settings(listed(upstream.url), bounds=bounds, deadlines=deadlines)
        async with running_gateway(configuration) as gateway:
            assert await ids(gateway) == ["gpt"]
            assert await ids(gateway) == ["gpt"]
            assert len(upstream.requests) <= 1  # it is left alone for a while
            await eventually(lambda: upstream.open_connections == 0)
    assert "the list of models of 'u0' was not fetched" in caplog.text


async def test_an_upstream_that_is_not_there_spoils_nothing() -> None:
    """Two upstreams, one refuses: the other one's list is there."""
    async with ScriptedUpstream(LIST) as there:
        with socket.socket() as taken:  # nobody listens there
            taken.bind(("127.0.0.1", 0))
            gone = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
            configuration = replace(settings(listed(gone), listed(there.url, 1)), models=())
            async with running_gateway(configuration) as gateway:
                assert await ids(gateway) == ["a", "b"]


async def test_a_crowd_asks_the_upstream_once() -> None:
    """However many want the list at once, one fetch runs; when its client leaves, another one takes over."""
    scripts = in_order(Script((Stall(),)), LIST)
    async with ScriptedUpstream(scripts) as upstream, running_gateway(settings(listed(upstream.url))) as gateway:
        first = await gateway.connect()
        await first.send(request("GET", "/v1/models", None, "Authorization: Bearer sk-all"))
        await upstream.until(lambda: len(upstream.requests) == 1)
        found: list[list[str]] = []

        async def another() -> None:
            found.append(await ids(gateway))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(another)
            await eventually(lambda: gateway.gateway.statistics().in_flight == 6)
            first.reset()
        assert found == [["gpt", "open/a", "open/b"]] * 5
        assert len(upstream.requests) == 2


async def test_a_list_that_nobody_makes_goes_on() -> None:
    """Without models, limits and lists it is the upstream's own answer, byte for byte; a route of its own is, too."""
    odd = reply(b'{ "data" : [] }')
    async with ScriptedUpstream(odd) as upstream:
        async with running_gateway(settings_for(upstream.url)) as gateway:
            assert (await gateway.ask(request("GET", "/v1/models"))).body == b'{ "data" : [] }'
        route = Route("models", "/v1/models", (Target("u0"),))
        async with running_gateway(replace(settings(listed(upstream.url)), routes=(route,))) as gateway:
            answer = await gateway.ask(request("GET", "/v1/models", None, "Authorization: Bearer sk-all"))
            assert answer.body == b'{ "data" : [] }'


async def test_a_limited_key_changes_nothing_by_a_request_without_a_body() -> None:
    """It may look, and neither delete nor cancel what belongs to others."""
    async with ScriptedUpstream(LIST) as upstream, running_gateway(settings(listed(upstream.url))) as gateway:
        for method, path, status in (
            ("GET", "/v1/files", 200),
            ("DELETE", "/v1/models/ft", 403),
            ("DELETE", "/v1/files/f", 403),
            ("POST", "/v1/responses/r/cancel", 403),
        ):
            answer = await gateway.ask(request(method, path, None, "Authorization: Bearer sk-some"))
            assert answer.status == status, path
