"""Failures and their answers (design, section 7): status, shape, hints, connection and record, row by row."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from typing import Any

import pytest
import trio
from kit import Response, RunningGateway, chat, eventually, request, running_gateway, scene, settings_for

from canal_trio.errors import Failure, Kind, Phase, Retry, Side
from canal_trio.hooks import ExchangeRecord, Outcome
from canal_trio.settings import Bounds, Deadlines, Key, Model, Settings, Target, Upstream
from canal_trio.testing.scripts import Script, Send, Stall, reply
from canal_trio.testing.upstreams import ScriptedUpstream

SECRET = "sk-team"
KEY = Key("team", hashlib.sha256(SECRET.encode()).hexdigest(), models=("small",))
SMALL = Bounds(head_bytes=2048, head_fields=20, target_bytes=256, body_bytes=1000)


@dataclass(frozen=True)
class Row:
    """One situation of the table."""

    raw: bytes
    status: int
    code: str
    outcome: Outcome
    side: Side
    kind: Kind
    closes: bool = True
    settings: Any = None  # a function of the settings, what differs in them
    type: str = "invalid_request_error"
    retry_after: bool = False
    should_retry: str | None = None
    param: str | None = None


def rejected(raw: bytes, status: int, code: str, kind: Kind, **more: Any) -> Row:
    """The client's fault."""
    return Row(raw, status, code, Outcome.REJECTED, Side.CLIENT, kind, **more)


def small(settings: Settings) -> Settings:
    """Limits that a test can reach."""
    return replace(settings, bounds=SMALL)


def keyed(settings: Settings) -> Settings:
    """A key for one model, and two models."""
    targets = (Target(settings.upstreams[0].name),)
    return replace(settings, keys=(KEY,), models=(Model("small", targets), Model("large", targets)))


def forbidden(raw: bytes) -> Row:
    """The key is for one model, and this is not it."""
    more = {"settings": keyed, "closes": False, "type": "permission_error", "param": "model"}
    return rejected(raw, 403, "model_not_allowed", Kind.FORBIDDEN, **more)


def routed(settings: Settings) -> Settings:
    """Models without keys."""
    return replace(settings, models=(Model("small", (Target(settings.upstreams[0].name),)),))


def no_upstream(settings: Settings) -> Settings:
    """Nothing to go to."""
    return replace(settings, upstreams=())


def refusing(settings: Settings) -> Settings:
    """An upstream that nobody serves."""
    return replace(settings, upstreams=(Upstream("u0", "http://127.0.0.1:1"),))


JSON = "Content-Type: application/json"
AUTH = f"Authorization: Bearer {SECRET}"
GET = request("GET", "/v1/models")

ROWS = {
    "obs-fold": rejected(request("GET", "/", None, "X-A: 1\r\n 2"), 400, "malformed_request", Kind.MALFORMED),
    "bare-lf": rejected(b"GET / HTTP/1.1\nHost: x\n\n", 400, "malformed_request", Kind.MALFORMED),
    "no-host": rejected(b"GET / HTTP/1.1\r\n\r\n", 400, "malformed_request", Kind.MALFORMED),
    "cl-and-te": rejected(
        request("POST", "/", b"x", "Transfer-Encoding: chunked"), 400, "malformed_request", Kind.MALFORMED
    ),
    "head-bytes": rejected(
        request("GET", "/", None, "X-A: " + "x" * 3000), 431, "headers_too_large", Kind.HEAD_TOO_LARGE, settings=small
    ),
    "head-fields": rejected(
        request("GET", "/", None, *["X-A: 1"] * 30), 431, "headers_too_large", Kind.HEAD_TOO_LARGE, settings=small
    ),
    "target": rejected(request("GET", "/" + "a" * 300), 414, "uri_too_long", Kind.TARGET_TOO_LONG, settings=small),
    "body-announced": rejected(
        request("POST", "/", b"x" * 1001), 413, "body_too_large", Kind.BODY_TOO_LARGE, settings=small
    ),
    "coding": rejected(
        request("POST", "/", None, "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
        501,
        "unsupported_transfer_coding",
        Kind.UNSUPPORTED_CODING,
    ),
    "connect": rejected(
        b"CONNECT h:1 HTTP/1.1\r\nHost: h:1\r\n\r\n", 405, "method_not_allowed", Kind.METHOD_NOT_ALLOWED
    ),
    "trace": rejected(request("TRACE", "/"), 405, "method_not_allowed", Kind.METHOD_NOT_ALLOWED),
    "version": rejected(
        b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505, "unsupported_http_version", Kind.UNSUPPORTED_VERSION
    ),
    "expectation": rejected(
        request("GET", "/", None, "Expect: 200-ok"), 417, "expectation_failed", Kind.EXPECTATION, closes=False
    ),
    "no-key": rejected(
        GET, 401, "invalid_api_key", Kind.UNAUTHENTICATED, settings=keyed, closes=False, should_retry="false"
    ),
    "wrong-key": rejected(
        request("GET", "/v1/models", None, "Authorization: Bearer sk-other"),
        401,
        "invalid_api_key",
        Kind.UNAUTHENTICATED,
        settings=keyed,
        closes=False,
        should_retry="false",
    ),
    "basic-auth": rejected(
        request("GET", "/v1/models", None, "Authorization: Basic eDp5"),
        401,
        "invalid_api_key",
        Kind.UNAUTHENTICATED,
        settings=keyed,
        closes=False,
        should_retry="false",
    ),
    "model-not-allowed": forbidden(chat(AUTH, model="large")),
    "model-behind-another-type": forbidden(
        request("POST", "/v1/chat/completions", b'{"model": "large"}', "Content-Type: text/plain", AUTH)
    ),
    "model-not-named": forbidden(request("POST", "/v1/chat/completions", b"{}", JSON, AUTH)),
    "model-in-no-json": forbidden(request("POST", "/v1/audio", b"--x", "Content-Type: audio/wav", AUTH)),
    "model-in-a-tunnel": forbidden(
        request("GET", "/v1/realtime?model=large", None, AUTH, "Connection: Upgrade", "Upgrade: websocket")
    ),
    "no-such-model": rejected(
        chat(model="huge"), 404, "model_not_found", Kind.NOT_FOUND, settings=routed, closes=False, param="model"
    ),
    "not-json": rejected(
        request("POST", "/v1/chat/completions", b"{", JSON),
        400,
        "malformed_request",
        Kind.MALFORMED,
        settings=routed,
        closes=False,
    ),
    "no-upstream": Row(
        GET,
        503,
        "upstream_unavailable",
        Outcome.REJECTED,
        Side.GATEWAY,
        Kind.UNAVAILABLE,
        settings=no_upstream,
        closes=False,
        type="server_error",
        retry_after=True,
        should_retry="true",
    ),
    "refused": Row(
        chat(),
        502,
        "upstream_unreachable",
        Outcome.UPSTREAM_FAILED,
        Side.UPSTREAM,
        Kind.REFUSED,
        settings=refusing,
        closes=False,
        type="upstream_error",
        should_retry="true",
    ),
}


async def judge(row: Row, gateway: RunningGateway, response: Response) -> ExchangeRecord:
    """Status, shape, hints and record; nothing is said twice."""
    assert response.status == row.status
    error = response.error
    sentences = str(error["message"]).split(". ")
    assert len({sentence.rstrip(".") for sentence in sentences}) == len(sentences)
    assert (error["type"], error["code"], error["param"]) == (row.type, row.code, row.param)
    assert (response.header("retry-after") is not None) == row.retry_after
    assert response.header("retry-after") is None or int(response.header("retry-after") or "") >= 1
    assert response.header("x-should-retry") == row.should_retry
    assert (response.header("www-authenticate") is not None) == (row.status == 401)
    assert (response.header("allow") is not None) == (row.status == 405)
    assert response.header("connection") == ("close" if row.closes else "keep-alive")
    record = (await gateway.records.wait(1))[0]
    assert response.header("x-request-id") == record.request_id
    assert record.status == row.status
    assert record.outcome is row.outcome
    assert record.failure is not None
    assert (record.failure.side, record.failure.kind) == (row.side, row.kind)
    assert SECRET not in repr(record)
    return record


@pytest.mark.parametrize("name", ROWS)
async def test_answer(name: str) -> None:
    """The situation gets its row's answer, one record, and the connection stays or closes as the row says."""
    row = ROWS[name]
    async with ScriptedUpstream(reply({"ok": True})) as upstream:
        settings = settings_for(upstream.url)
        async with running_gateway(row.settings(settings) if row.settings else settings) as gateway:
            client = await gateway.connect()
            await client.send(row.raw)
            with trio.fail_after(5):
                response = await client.response()
                await judge(row, gateway, response)
                assert upstream.requests == []
                if row.closes:
                    assert await client.rest() == b""
                    assert client.ended_by == "fin"
                    assert len(gateway.records.all) == 1
                else:
                    await client.send(row.raw)
                    assert (await client.response()).status == row.status
                    assert len(await gateway.records.wait(2)) == 2


FROM_THE_DIALER = {
    "dns": (Kind.DNS, 502, "upstream_unreachable"),
    "refused": (Kind.REFUSED, 502, "upstream_unreachable"),
    "tls": (Kind.TLS, 502, "upstream_tls"),
    "connect-timeout": (Kind.TIMEOUT, 504, "upstream_timeout"),
}


@pytest.mark.parametrize("name", FROM_THE_DIALER)
async def test_no_connection(name: str) -> None:
    """What keeps a connection from being made is the upstream's fault, and the client may try again."""
    kind, status, code = FROM_THE_DIALER[name]

    async def dialer(_upstream: Upstream, *_: Any, **__: Any) -> Failure:
        return Failure(Side.UPSTREAM, Phase.DIAL, kind, "Scripted.", Retry.UNSENT)

    async with running_gateway(settings_for("http://upstream.test"), dialer=dialer) as gateway:
        response = await gateway.ask(chat())
        assert response.status == status
        assert (response.error["type"], response.error["code"]) == ("upstream_error", code)
        assert response.header("x-should-retry") == "true"
        record = await gateway.records.one()
        assert record.outcome is Outcome.UPSTREAM_FAILED
        assert record.phase is Phase.DIAL
        assert record.attempts == 1
        assert record.upstream == "u0"


async def test_plain_server_behind_an_https_url() -> None:
    """A TLS handshake that meets a plain server is 502 `upstream_tls`."""
    async with ScriptedUpstream(reply({})) as upstream:
        settings = settings_for(f"https://127.0.0.1:{upstream.port}", deadlines=Deadlines(connect_tls=1))
        async with running_gateway(settings) as gateway:
            response = await gateway.ask(chat())
            assert response.status == 502
            assert response.error["code"] == "upstream_tls"
            assert (await gateway.records.one()).outcome is Outcome.UPSTREAM_FAILED


async def test_first_byte_timeout() -> None:
    """No response in time: 504, no hint to retry, for the generation may have been paid for; the upstream is closed."""
    async with scene(Script((Stall(),)), deadlines=Deadlines(first_byte=0.2)) as (upstream, gateway):
        response = await gateway.ask(chat())
        assert response.status == 504
        assert response.error["code"] == "upstream_timeout"
        assert response.header("x-should-retry") == "false"
        record = await gateway.records.one()
        assert record.outcome is Outcome.UPSTREAM_FAILED
        assert record.failure is not None
        assert record.failure.kind is Kind.TIMEOUT
        await upstream.until(lambda: upstream.connections[0].left is not None)


async def test_malformed_response() -> None:
    """What is no HTTP is 502, blamed on the upstream, not tried again."""
    async with scene(Script((Send(b"SSH-2.0-x\r\n\r\n"),))) as (_, gateway):
        response = await gateway.ask(chat())
        assert response.status == 502
        assert response.error["code"] == "upstream_malformed"
        record = await gateway.records.one()
        assert record.attempts == 1
        assert record.failure is not None
        assert record.failure.kind is Kind.MALFORMED


@pytest.mark.parametrize("framing", ["announced", "chunked"])
async def test_refused_body_lets_the_answer_arrive(framing: str) -> None:
    """413 while the client still sends: half-close, drain, close, so that no reset swallows the answer."""
    async with scene(reply({}), bounds=Bounds(body_bytes=100_000)) as (upstream, gateway):
        client = await gateway.connect()
        if framing == "announced":
            await client.send(request("POST", "/", None, "Content-Length: 600000") + b"x" * 600_000)
        else:
            await client.send(request("POST", "/", None, "Transfer-Encoding: chunked"))
            for _ in range(60):
                await client.send(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        response = await client.response()
        assert response.status == 413
        assert response.error["code"] == "body_too_large"
        assert response.header("connection") == "close"
        assert response.complete
        await client.rest()
        assert client.ended_by == "fin"
        record = await gateway.records.one()
        assert record.outcome is Outcome.REJECTED
        assert record.request_bytes <= 100_000 + 16_384
        assert not any(seen.complete for seen in upstream.requests)


async def test_model_needs_a_body_that_can_be_held() -> None:
    """A body that names a model is read whole; beyond what may be held it is 413."""
    async with ScriptedUpstream(reply({})) as upstream:
        settings = routed(settings_for(upstream.url, bounds=Bounds(held_body_bytes=1000)))
        async with running_gateway(settings) as gateway:
            fields = (JSON, "Transfer-Encoding: chunked")
            raw = request("POST", "/v1/chat/completions", None, *fields) + b"7d0\r\n" + b" " * 2000 + b"\r\n0\r\n\r\n"
            response = await gateway.ask(raw)
            assert response.status == 413
            assert upstream.requests == []


async def test_budget_of_held_bodies() -> None:
    """When all held bodies together are too many, 503 with retry-after; what was held is free again afterwards."""
    async with ScriptedUpstream(reply({"ok": True})) as upstream:
        settings = routed(settings_for(upstream.url, bounds=Bounds(held_total_bytes=3000)))
        async with running_gateway(settings) as gateway:
            first, second = await gateway.connect(), await gateway.connect()
            head = request(
                "POST", "/v1/chat/completions", None, "Content-Type: application/json", "Content-Length: 2500"
            )
            await first.send(head + b" " * 2400)
            await eventually(lambda: gateway.gateway.statistics().held_bytes == 2400)
            await second.send(head + b" " * 2400)
            response = await second.response()
            assert response.status == 503
            assert response.error["code"] == "overloaded"
            assert response.header("retry-after") is not None
            await first.send(b'{"model":"small"}'.ljust(100))
            assert (await first.response()).status == 200
            assert gateway.gateway.statistics().held_bytes == 0


async def test_draining_takes_no_new_request() -> None:
    """While draining a new request is 503 `gateway_draining`, closed, to be tried elsewhere."""
    async with ScriptedUpstream(reply({})) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        gateway.gateway.drain(trio.current_time() + 30)
        client = await gateway.connect()
        await client.send(chat())
        response = await client.response()
        assert response.status == 503
        assert response.error["code"] == "gateway_draining"
        assert response.header("retry-after") is not None
        assert response.header("x-should-retry") == "true"
        assert response.header("connection") == "close"
        assert (await gateway.records.one()).outcome is Outcome.REJECTED
        assert upstream.requests == []


async def test_a_bug_ends_its_own_exchange_only(caplog: pytest.LogCaptureFixture) -> None:
    """An exception of ours: 500 without details, one record, the traceback in the log; other connections go on."""

    async def dialer(_upstream: Upstream, *_: Any, **__: Any) -> Failure:
        raise ZeroDivisionError("secret detail")

    async with running_gateway(settings_for("http://upstream.test"), dialer=dialer) as gateway:
        other = await gateway.connect()
        with caplog.at_level(logging.ERROR):
            client = await gateway.connect()
            await client.send(chat())
            seen = await client.rest()
        assert b"secret detail" not in seen
        assert b"Traceback" not in seen
        assert seen.startswith(b"HTTP/1.1 500 ")
        record = await gateway.records.one()
        assert record.outcome is Outcome.INTERNAL_ERROR
        assert record.status == 500
        assert "ZeroDivisionError" in caplog.text
        await other.send(request("OPTIONS", "/", None, "Max-Forwards: 0"))
        assert (await other.response()).status == 204


async def test_a_recorder_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """What a recorder raises is logged and goes no further; the others still get the record."""
    async with ScriptedUpstream(reply({})) as upstream, running_gateway(settings_for(upstream.url)) as gateway:

        class Broken:
            def finished(self, record: ExchangeRecord) -> None:
                raise ZeroDivisionError

        gateway.gateway._recorders = (Broken(), *gateway.gateway._recorders)
        with caplog.at_level(logging.ERROR):
            assert (await gateway.ask(chat())).status == 200
            await gateway.records.one()
        assert "a recorder failed" in caplog.text


async def test_request_id_is_passed_or_made() -> None:
    """A client's own x-request-id goes through to the upstream, the answer and the record; a bad one is replaced."""
    async with ScriptedUpstream(reply({})) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        given = await gateway.ask(chat("X-Request-Id: my-id-1"))
        assert given.all("x-request-id") == ["my-id-1"]
        made = await gateway.ask(chat())
        bad = await gateway.ask(chat("X-Request-Id: " + "x" * 200))
        records = await gateway.records.wait(3)
        assert records[0].request_id == "my-id-1"
        for response, record, seen in zip((given, made, bad), records, upstream.requests, strict=True):
            assert response.header("x-request-id") == record.request_id == seen.header("x-request-id")
            assert 1 <= len(record.request_id) <= 128
        assert records[1].request_id != records[2].request_id
