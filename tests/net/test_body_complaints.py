"""What users of other gateways complained about in bodies, headers and errors (gateways.md, section C), over real
sockets. Each is named by its symptom."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
from kit import chat, data_of, request, running_gateway, scene, settings_for

from canal_trio.hooks import Outcome
from canal_trio.settings import Bounds, Key, Model, Settings, Target
from canal_trio.testing.scripts import Close, Script, reply, stream
from canal_trio.testing.upstreams import ScriptedUpstream

JSON = "Content-Type: application/json"
ODD_EVENTS = (
    b'data: {"id":"1","choices":[],"prompt_filter_results":[{"a":1}],"created":1.0e3}\n\n',
    b'data: {"z":0,"choices":[{"delta":{"role":"assistant"},"index":0}],"model":"its-own-name"}\n\n',
    b'data:{"choices":[{"delta":{"reasoning":"hm","reasoning_items":[{"x":null}],"refusal":null},"index":0}]}\n\n',
    b': a comment\nevent: x\nid: 7\ndata: {"choices":[{"delta":{},"finish_reason":"stop","index":0}]}\r\n\r\n',
    b'data: {"choices":[{"delta":{"content":"\\u00e9\\ud83d\\ude00 \xc3\xa9"},"index":0}],"obfuscation":"aa"}\n\n',
    b"data: [DONE]\n\n",
)


def aliased(url: str, **more: object) -> Settings:
    """`m` has another name at the upstream, so that requests are edited."""
    return replace(settings_for(url), models=(Model("m", (Target("u0", "its-own-name"),)),), **more)  # type: ignore[arg-type]


async def test_unknown_fields_of_a_stream_were_dropped() -> None:
    """gateways.md C19: role-only deltas, refusals, reasoning, empty choices, comments, odd spacing and numbers arrive
    byte for byte, and the model's name is not stamped over, although the request was edited."""
    async with ScriptedUpstream(stream(ODD_EVENTS)) as upstream, running_gateway(aliased(upstream.url)) as gateway:
        answer = await gateway.ask(chat())
        assert answer.body == b"".join(ODD_EVENTS)
        assert json.loads(upstream.requests[0].body)["model"] == "its-own-name"


async def test_unknown_fields_of_a_request_were_dropped() -> None:
    """gateways.md C19: what the gateway has never heard of reaches the upstream, in its order and its spelling."""
    body = b'{ "reasoning":{"effort" : "high"},"seed":18446744073709551616, "model":"m","x\\u002dy":1e-9,"n":[ ] }'
    async with ScriptedUpstream(reply(b"{}")) as upstream, running_gateway(aliased(upstream.url)) as gateway:
        assert (await gateway.ask(request("POST", "/v1/chat/completions", body, JSON))).status == 200
        assert upstream.requests[0].body == body.replace(b'"m"', b'"its-own-name"')


async def test_gzip_that_the_client_offered_emptied_the_stream() -> None:
    """gateways.md C16: an upstream is not asked to compress what has to flow, whatever the client would take."""
    async with scene(stream(ODD_EVENTS)) as (upstream, gateway):
        answer = await gateway.ask(chat("Accept-Encoding: gzip, br", "TE: gzip"))
        assert answer.body == b"".join(ODD_EVENTS)
        seen = [value for name, value in upstream.requests[0].headers if name.lower() in ("accept-encoding", "te")]
        assert seen == ["identity"]


async def test_a_tool_call_of_five_mebibytes_killed_the_stream() -> None:
    """gateways.md C15: one `data:` line of any length passes, and what comes behind it."""
    large = b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % (b"x" * 5 * 1024 * 1024)
    async with scene(stream((large, b"data: [DONE]\n\n"))) as (_, gateway):
        answer = await gateway.ask(chat())
        assert answer.body == large + b"data: [DONE]\n\n"
        record = await gateway.records.one()
        assert (record.outcome, record.events) == (Outcome.COMPLETED, 2)


async def test_events_that_came_in_single_bytes_broke_the_json() -> None:
    """gateways.md C13 and C14: wherever an event or a character is cut, what arrives is what was sent."""
    whole = b"".join(ODD_EVENTS)
    pieces = tuple(whole[at : at + 1] for at in range(len(whole)))
    async with scene(stream(pieces)) as (_, gateway):
        answer = await gateway.ask(chat())
        assert answer.body == whole
        assert (await gateway.records.one()).events == len(data_of(whole))


async def test_done_in_a_text_ended_the_stream() -> None:
    """gateways.md C29: only a whole payload of `[DONE]` is the end."""
    events = (
        b'data: {"choices":[{"delta":{"content":"data: [DONE]\\n\\n"}}]}\n\n',
        b'data: "[DONE]"\n\n',
        b"data: [DONE] not\n\n",
        b"data: [DONE]\n\n",
    )
    async with scene(stream(events)) as (_, gateway):
        assert (await gateway.ask(chat())).body == b"".join(events)
        record = await gateway.records.one()
        assert (record.events, record.flags) == (4, ())


@pytest.mark.parametrize(
    "body",
    [b'{"error": "a string"}', b"<html>busy</html>", b'{"detail":[{"loc":["body"]}]}', b""],
    ids=["string", "html", "fastapi", "empty"],
)
async def test_errors_of_the_upstream_were_dressed_up(body: bytes) -> None:
    """gateways.md C27: what the upstream says about its error is the client's, whatever shape it has."""
    async with scene(reply(body, status=422, headers=[("X-Detail", "1")])) as (_, gateway):
        answer = await gateway.ask(chat())
        assert (answer.status, answer.body, answer.header("x-detail")) == (422, body, "1")


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (request("POST", "/v1/chat/completions", b"{", JSON, "api-key: sk"), 400),
        (chat(), 401),
        (chat("api-key: sk", model="other"), 403),
        (request("POST", "/v1/chat/completions", b'{"model":"%b"}' % (b"m" * 2000), JSON, "api-key: sk"), 413),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"BREW / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 40_000 + b"\r\n\r\n", 431),
        (chat("api-key: sk", model="m"), 502),
    ],
    ids=str,
)
async def test_error_bodies_were_not_in_openais_shape(raw: bytes, status: int) -> None:
    """gateways.md C27: each error of ours is JSON with all four keys, never a 200, and has a request id."""
    key = Key("k", hashlib.sha256(b"sk").hexdigest(), ("m",))
    bounds = Bounds(held_body_bytes=1000, held_total_bytes=10_000)
    async with (
        ScriptedUpstream(Script((Close(),))) as upstream,
        running_gateway(aliased(upstream.url, keys=(key,), bounds=bounds)) as gateway,
    ):
        answer = await gateway.ask(raw)
    assert answer.status == status
    assert answer.header("content-type") == "application/json"
    assert answer.header("x-request-id")
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert all(isinstance(error[name], str) and error[name] for name in ("message", "type", "code"))
