"""Models through the whole gateway: whatever carries the name, it is judged once, exchanged in place, and nothing else
of the body changes."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest
from kit import request, running_gateway, settings_for

from canal_trio.settings import Bounds, Model, Route, Settings, Target
from canal_trio.testing.scripts import openai_error, reply
from canal_trio.testing.upstreams import ScriptedUpstream

JSON = "Content-Type: application/json"
FORM = "Content-Type: multipart/form-data; boundary=B0undary"
ODD = b'{ "model" :\t"gpt" , "n":123456789012345678901234567890,"t":1.0e-07,"x":"\\u00e9\\/\xc3\xa9","u":{"model":[]}}'


def form(model: bytes, size: int = 100) -> bytes:
    """An upload of `size` bytes of audio, its model behind it."""
    return (
        b'--B0undary\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
        b"Content-Type: audio/wav\r\n\r\n" + bytes(range(256)) * (size // 256 + 1) + b"\r\n"
        b'--B0undary\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n--B0undary--\r\n' % model
    )


def settings(*urls: str, **more: Any) -> Settings:
    """`gpt` has another name at each upstream, `open/*` is passed on without its beginning."""
    targets = tuple(Target(f"u{number}", f"name-at-{number}") for number in range(len(urls)))
    models = (Model("gpt", targets), Model("open/*", (Target("u0", "*"),)))
    return replace(settings_for(*urls), models=models, **more)


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "embeddings", "moderations"])
async def test_an_alias_is_written_and_every_other_byte_is_the_clients(path: str) -> None:
    """Whatever the endpoint: the upstream's own name stands where the alias stood, with a length that fits."""
    async with ScriptedUpstream(reply(b"{}")) as upstream, running_gateway(settings(upstream.url)) as gateway:
        client = await gateway.connect()
        for _ in range(2):  # the second time what was made of the head is remembered
            await client.send(request("POST", f"/v1/{path}", ODD, JSON))
            assert (await client.response()).status == 200
        expected = ODD.replace(b'"gpt"', b'"name-at-0"')
        assert [seen.body for seen in upstream.requests] == [expected, expected]
        assert upstream.requests[1].header("content-length") == str(len(expected))
        record = (await gateway.records.wait(2))[0]
        assert (record.model, record.upstream_model, record.request_bytes) == ("gpt", "name-at-0", len(ODD))


async def test_two_models_of_one_length_on_one_connection() -> None:
    """What is remembered of a head does not give a request the length of another one."""
    async with ScriptedUpstream(reply(b"{}")) as upstream, running_gateway(settings(upstream.url)) as gateway:
        client = await gateway.connect()
        bodies = [b'{"model":"gpt","input":"%b"}' % (b"y" * 7), b'{"model":"open/x","input":"yyyy"}']
        assert len(bodies[0]) == len(bodies[1])
        for body in bodies:
            await client.send(request("POST", "/v1/embeddings", body, JSON))
            assert (await client.response()).status == 200
        assert [json.loads(seen.body)["model"] for seen in upstream.requests] == ["name-at-0", "x"]


@pytest.mark.parametrize("size", [100, 300_000], ids=["small", "large"])
@pytest.mark.parametrize("path", ["audio/transcriptions", "audio/translations", "images/edits"])
async def test_a_forms_model_decides_and_is_exchanged(path: str, size: int) -> None:
    """Audio and images name their model in a multipart form, perhaps behind a large file."""
    async with ScriptedUpstream(reply(b"{}")) as upstream, running_gateway(settings(upstream.url)) as gateway:
        assert (await gateway.ask(request("POST", f"/v1/{path}", form(b"gpt", size), FORM))).status == 200
        assert upstream.requests[0].body == form(b"name-at-0", size)
        refused = await gateway.ask(request("POST", f"/v1/{path}", form(b"other", size), FORM))
        assert (refused.status, refused.json["error"]["code"]) == (404, "model_not_found")


async def test_a_body_in_chunks_is_edited() -> None:
    """A body without a length, in many pieces, with the model in its middle."""
    pieces = [ODD[:14], ODD[14:16], ODD[16:], b" " * 70_000]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    async with ScriptedUpstream(reply(b"{}")) as upstream, running_gateway(settings(upstream.url)) as gateway:
        head = request("POST", "/v1/chat/completions", None, JSON, "Transfer-Encoding: chunked")
        assert (await gateway.ask(head + chunks)).status == 200
        assert upstream.requests[0].body == ODD.replace(b'"gpt"', b'"name-at-0"') + b" " * 70_000


async def test_each_upstream_gets_its_own_name() -> None:
    """When another upstream is asked, it is asked for its own model, whole."""
    async with AsyncExitStack() as stack:
        busy, good = [
            await stack.enter_async_context(ScriptedUpstream(script)) for script in (openai_error(503), reply(b"{}"))
        ]
        async with running_gateway(settings(busy.url, good.url)) as gateway:
            assert (await gateway.ask(request("POST", "/v1/chat/completions", ODD, JSON))).status == 200
            assert json.loads(busy.requests[0].body)["model"] == "name-at-0"
            assert good.requests[0].body == ODD.replace(b'"gpt"', b'"name-at-1"')
            assert (await gateway.records.one()).upstream_model == "name-at-1"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"model":"gpt","model":"other"}', JSON),
        (b'{"model":"gpt","\\u006dodel":"other"}', JSON),
        (b'{"model":"gpt","Model":"other"}', JSON),
        (b'{"model":"gpt","stream":true,"stream":false}', JSON),
        (b'{"model":"gpt","stream_options":{},"stream_options":null}', JSON),
        (form(b"gpt").replace(b"--B0undary--", b"--B0undary") + form(b"other"), FORM),
        (b'{"model":"gpt"', JSON),
        (b'{"model":"gpt"}', f"{JSON}\r\nContent-Type: text/plain"),
        (b"\x1f\x8b\x08", f"{JSON}\r\nContent-Encoding: gzip"),
        (b'{"model":"gpt","+AG0AbwBkAGUAbA-":"other"}', f"{JSON}; charset=utf-7"),
        (b'{"model":"gpt"}', f"{JSON}; charset=utf-8; charset*=UTF-8''utf-7"),
    ],
    ids=["twice", "escaped", "case", "stream", "options", "form", "cut", "types", "gzip", "utf7", "charsets"],
)
async def test_what_two_parsers_would_read_differently_is_refused(body: bytes, field: str) -> None:
    """What was judged is what the upstream gets, so that a body which says two things is a 400."""
    async with ScriptedUpstream(reply(b"{}")) as upstream, running_gateway(settings(upstream.url)) as gateway:
        answer = await gateway.ask(request("POST", "/v1/chat/completions", body, field))
        assert (answer.status, answer.json["error"]["code"]) == (400, "malformed_request")
        assert upstream.requests == []


@pytest.mark.parametrize("charset", ["utf-8", '"UTF-8"', "utf8;", "us-ascii", "ISO-8859-1", ""])
async def test_json_in_a_usual_charset_is_read(charset: str) -> None:
    """Clients say which charset they mean, and mean UTF-8 or ASCII."""
    async with ScriptedUpstream(reply(b"{}")) as upstream, running_gateway(settings(upstream.url)) as gateway:
        answer = await gateway.ask(request("POST", "/v1/embeddings", ODD, f"{JSON}; charset={charset}"))
        assert (answer.status, upstream.requests[0].json["model"]) == (200, "name-at-0")


async def test_a_form_hid_its_model_behind_the_path_of_files() -> None:
    """A path that some upstreams resolve to another one is no upload of files: its model is judged."""
    async with ScriptedUpstream(reply(b"{}")) as upstream, running_gateway(settings(upstream.url)) as gateway:
        for path in ("/v1/files/../audio/transcriptions", "/v1/files/%2e%2e/audio/transcriptions"):
            refused = await gateway.ask(request("POST", path, form(b"other"), FORM))
            assert (refused.status, refused.json["error"]["code"]) == (404, "model_not_found")
        assert upstream.requests == []


async def test_an_upload_of_files_streams_on_unheld() -> None:
    """Files have no model: more than may be held goes through, with models configured, and by a route of its own."""
    bounds = Bounds(held_body_bytes=1000, held_total_bytes=100_000)
    body = form(b"gpt", 200_000)
    async with (
        ScriptedUpstream(reply(b"{}")) as upstream,
        running_gateway(
            settings(upstream.url, bounds=bounds, routes=(Route("large", "/large/*", (Target("u0"),)),))
        ) as gateway,
    ):
        for path in ("/v1/files", "/v1/uploads/up_1/parts", "/large/x"):
            assert (await gateway.ask(request("POST", path, body, FORM))).status == 200
            assert upstream.requests[-1].body == body
        refused = await gateway.ask(request("POST", "/v1/audio/transcriptions", body, FORM))
        assert refused.status == 413


async def test_a_large_body_is_judged_in_a_thread() -> None:
    """More than a mebibyte is read and edited all the same."""
    body = b'{"input":"%b","model":"gpt"}' % (b"x" * 2_000_000)
    async with ScriptedUpstream(reply(b"{}")) as upstream, running_gateway(settings(upstream.url)) as gateway:
        assert (await gateway.ask(request("POST", "/v1/embeddings", body, JSON))).status == 200
        assert upstream.requests[0].body == body.replace(b'"gpt"', b'"name-at-0"')
