"""Keys through the whole gateway: who is let in, what is told to whom, and where a client's key never gets."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from kit import Response, chat, request, running_gateway, settings_for

from canal_trio.hooks import ExchangeRecord
from canal_trio.observe.accesslog import json_line, text_line
from canal_trio.settings import Key, Model, Route, Settings, Target, Upstream
from canal_trio.testing.scripts import reply
from canal_trio.testing.upstreams import ScriptedUpstream, SeenRequest

OWN = "sk-upstream-own"


def key(name: str, secret: str, models: tuple[str, ...] = ("*",), **more: Any) -> Key:
    """A key by its secret."""
    return Key(name, hashlib.sha256(secret.encode()).hexdigest(), models, **more)


KEYS = (
    key("all", "sk-all"),
    key("small-only", "sk-small", ("small",), principal="team"),
    key("files-too", "sk-files", ("small",), routes=("files",)),
    key("old", "sk-old", expires=1.0),
    key("lost", "sk-lost", revoked=True),
)


def settings(url: str, **more: Any) -> Settings:
    """Keys, models and a route before one upstream with a key of its own."""
    upstream = Upstream("up", url, api_key=OWN, **more)
    models = (Model("small", (Target("up", "upstreams-small"),)), Model("big", (Target("up"),)))
    return replace(
        settings_for(upstream), keys=KEYS, models=models, routes=(Route("files", "/v1/files*", (Target("up"),)),)
    )


def secrets_in(seen: SeenRequest) -> list[str]:
    """Which of the clients' keys are anywhere in a request that an upstream got."""
    text = repr(seen.headers) + repr(seen.target) + repr(seen.body)
    return [secret for secret in ("sk-all", "sk-small", "sk-files", "sk-old", "sk-lost") if secret in text]


def told(response: Response) -> tuple[Any, ...]:
    """Everything a client can tell an answer by, but its id and date."""
    fields = sorted((name, value) for name, value in response.headers if name not in ("x-request-id", "date"))
    return response.status, fields, response.body


@pytest.mark.parametrize(
    "field",
    ["Authorization: Bearer sk-small", "authorization: bearer sk-small", "api-key: sk-small", "X-API-Key: sk-small"],
)
async def test_a_key_is_taken_in_every_usual_field(field: str) -> None:
    """As OpenAI's, Azure's and Anthropic's clients send it; the upstream gets its own key instead, once."""
    async with ScriptedUpstream(reply(b"{}")) as upstream, running_gateway(settings(upstream.url)) as gateway:
        assert (await gateway.ask(chat(field, model="small"))).status == 200
        seen = upstream.requests[0]
        shown = [pair for pair in seen.headers if pair[0].lower() in ("authorization", "api-key", "x-api-key")]
        assert [value for _, value in shown] == [f"Bearer {OWN}"]
        assert secrets_in(seen) == []
        record = await gateway.records.one()
        assert (record.principal, record.key) == ("team", "small-only")


@pytest.mark.parametrize("name", ["api-key", "x-api-key"])
async def test_an_upstreams_key_goes_where_it_wants_it(name: str) -> None:
    """Azure wants `api-key`, others `x-api-key`: without "Bearer", and nothing else that is a key."""
    async with (
        ScriptedUpstream(reply(b"{}")) as upstream,
        running_gateway(settings(upstream.url, key_header=name)) as gateway,
    ):
        fields = ("Authorization: Bearer sk-all", "X-Api-Key: sk-all", "Api-Key: sk-all")
        assert (await gateway.ask(chat(*fields, model="big"))).status == 200
        seen = {key.lower(): value for key, value in upstream.requests[0].headers}
        assert seen[name] == OWN
        assert not {"authorization", "api-key", "x-api-key"} - {name} & set(seen)
        assert secrets_in(upstream.requests[0]) == []


def refusals() -> dict[str, bytes]:
    """Requests of clients that are not let in."""
    return {
        "unknown": chat("Authorization: Bearer sk-nobody", model="small"),
        "expired": chat("Authorization: Bearer sk-old", model="small"),
        "revoked": chat("Authorization: Bearer sk-lost", model="small"),
    }


async def test_why_a_key_is_refused_is_in_the_log_only() -> None:
    """Unknown, expired and revoked keys get the same 401 in OpenAI's shape, and nothing reaches the upstream."""
    async with ScriptedUpstream(reply(b"{}")) as upstream, running_gateway(settings(upstream.url)) as gateway:
        answers = [await gateway.ask(raw) for raw in refusals().values()]
        assert len({repr(told(answer)) for answer in answers}) == 1
        assert answers[0].status == 401
        assert answers[0].json == {
            "error": {
                "message": "Incorrect API key provided.",
                "type": "invalid_request_error",
                "param": None,
                "code": "invalid_api_key",
            }
        }
        assert answers[0].header("x-should-retry") == "false"
        assert answers[0].header("www-authenticate") == "Bearer"
        assert upstream.requests == []
        records: list[ExchangeRecord] = await gateway.records.wait(3)
        remarks = [record.failure.remark for record in records if record.failure is not None]
        assert [remark.split(";")[0] for remark in remarks] == [
            "the key is unknown",
            "the key 'old' has expired",
            "the key 'lost' is revoked",
        ]
        for record, remark in zip(records, remarks, strict=True):
            for line in (text_line(record).decode(), json_line(record).decode()):
                assert remark in line.replace('\\"', "'")
                assert "sk-" not in line


@pytest.mark.parametrize(
    ("secret", "model", "status", "code"),
    [
        ("sk-all", "small", 200, None),
        ("sk-all", "huge", 404, "model_not_found"),
        ("sk-small", "small", 200, None),
        ("sk-small", "big", 403, "model_not_allowed"),
        ("sk-small", "huge", 403, "model_not_allowed"),
    ],
)
async def test_what_a_key_opens(secret: str, model: str, status: int, code: str | None) -> None:
    """Its models; of the others a limited key does not learn which there are."""
    async with ScriptedUpstream(reply(b"{}")) as upstream, running_gateway(settings(upstream.url)) as gateway:
        answer = await gateway.ask(chat(f"Authorization: Bearer {secret}", model=model))
        assert answer.status == status
        if code is not None:
            assert (answer.json["error"]["code"], answer.json["error"]["param"]) == (code, "model")
            assert set(answer.json["error"]) == {"message", "type", "param", "code"}
            assert upstream.requests == []


async def test_a_limited_key_is_held_to_the_deployment_of_an_azure_path() -> None:
    """Its body may name a model that is open to it; the path, by which Azure goes, must as well."""
    async with ScriptedUpstream(reply(b"{}")) as upstream, running_gateway(settings(upstream.url)) as gateway:

        async def post(secret: str, deployment: str) -> int:
            path = f"/openai/deployments/{deployment}/chat/completions?api-version=2024-10-21"
            fields = (f"api-key: {secret}", "Content-Type: application/json")
            return (await gateway.ask(request("POST", path, b'{"model":"small"}', *fields))).status

        assert await post("sk-small", "small") == 200
        assert await post("sk-all", "big") == 200
        for deployment in ("big", "%62ig", "small/../big"):
            assert await post("sk-small", deployment) == 403
        assert len(upstream.requests) == 2


async def test_a_limited_key_has_the_routes_that_it_is_given() -> None:
    """A path's route is open to whom it is given; a strange path to it is not that route."""
    body = b"x" * 100
    async with ScriptedUpstream(reply(b"{}")) as upstream, running_gateway(settings(upstream.url)) as gateway:

        async def post(secret: str, path: str) -> int:
            return (await gateway.ask(request("POST", path, body, f"Authorization: Bearer {secret}"))).status

        assert await post("sk-files", "/v1/files") == 200
        assert await post("sk-all", "/v1/files?purpose=batch") == 200
        assert len(upstream.requests) == 2
        assert await post("sk-small", "/v1/files") == 403
        assert await post("sk-files", "/v1/files/../chat/completions") == 403
        assert await post("sk-files", "/v1/files/%2e%2e/chat/completions") == 403
        assert await post("sk-files", "/v1/files;/../chat/completions") == 403
        assert len(upstream.requests) == 2


async def test_without_keys_the_clients_own_goes_on() -> None:
    """Nothing is configured: the client's key is the upstream's business."""
    async with ScriptedUpstream(reply(b"{}")) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        assert (await gateway.ask(chat("Authorization: Bearer sk-all"))).status == 200
        assert upstream.requests[0].header("authorization") == "Bearer sk-all"


async def test_a_key_that_is_revoked_ends_with_the_reload() -> None:
    """The next request with it is a 401, on the same connection, and a rotated one goes on."""
    async with ScriptedUpstream(reply(b"{}")) as upstream:
        before = settings(upstream.url)
        async with running_gateway(before) as gateway:
            client = await gateway.connect()
            statuses = []
            for secret in ("sk-all", "sk-small"):
                await client.send(chat(f"Authorization: Bearer {secret}", model="small"))
                statuses.append((await client.response()).status)
            gateway.gateway.reload(replace(before, keys=(replace(KEYS[0], revoked=True), *KEYS[1:])))
            for secret in ("sk-all", "sk-small"):
                await client.send(chat(f"Authorization: Bearer {secret}", model="small"))
                statuses.append((await client.response()).status)
            assert statuses == [200, 200, 401, 200]
