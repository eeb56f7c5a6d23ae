"""What a client's connection, and the gateway's own, live through: refusals, reloads, drains, bugs of ours."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace

import pytest
import trio
from kit import chat, eventually, request, running_gateway, scene, settings_for

from canal_trio.errors import Kind, Side
from canal_trio.gateway import connection as connection_module
from canal_trio.hooks import Outcome
from canal_trio.settings import Bounds, Deadlines, Key
from canal_trio.testing.scripts import Close, Script, Send, Stall, WaitFor, chat_stream, cut_after, reply, stream
from canal_trio.testing.upstreams import ScriptedUpstream

EVENT = b"data: 1\n\n"
KEY = Key("team", hashlib.sha256(b"sk-team").hexdigest())


async def test_refused_post_sometimes_closed_the_connection() -> None:
    """A refusal whose request was read whole keeps the connection, every time: with the body it is one segment."""
    async with ScriptedUpstream(reply({})) as upstream:
        settings = replace(settings_for(upstream.url), keys=(KEY,))
        async with running_gateway(settings) as gateway:
            client = await gateway.connect()
            for count in range(30):
                await client.send(chat())
                response = await client.response()
                assert response.status == 401
                assert response.header("connection") == "keep-alive", f"closed at the {count}th refusal"
            await client.send(chat("Authorization: Bearer sk-team"))
            assert (await client.response()).status == 200
            assert len(gateway.accepted) == 1


async def test_reload_touches_no_stream() -> None:
    """An exchange keeps the settings it began with; the next one uses the new ones, and old idle connections close."""
    go = trio.Event()
    whole = stream([EVENT, EVENT])
    slow = Script((*whole.steps[:2], WaitFor(go), *whole.steps[2:]))
    async with (
        ScriptedUpstream(slow) as old,
        ScriptedUpstream(reply({"new": 1})) as new,
        running_gateway(settings_for(old.url)) as gateway,
    ):
        client, other = await gateway.connect(), await gateway.connect()
        await client.send(chat())
        head = await client.final_head()
        gateway.gateway.reload(settings_for(new.url))
        await other.send(chat())
        assert (await other.response()).json == {"new": 1}
        go.set()
        await client.body(head)
        assert head.complete
        assert head.body == EVENT * 2
        await client.send(chat())
        assert (await client.response()).json == {"new": 1}
        await old.until(lambda: old.open_connections == 0)
        assert len(old.requests) == 1


@pytest.mark.parametrize("changed", [False, True], ids=["same-bounds", "other-bounds"])
async def test_reload_keeps_the_connections_of_unchanged_upstreams(changed: bool) -> None:
    """An upstream that did not change keeps its pool, unless bounds or deadlines did; a removed one loses its."""
    async with (
        ScriptedUpstream(reply({})) as kept,
        ScriptedUpstream(reply({})) as removed,
        running_gateway(settings_for(kept.url, removed.url)) as gateway,
    ):
        assert (await gateway.ask(chat())).status == 200
        await eventually(lambda: gateway.gateway.statistics().pools["u0"].idle == 1)
        bounds = Bounds(capacity=2) if changed else Bounds()
        gateway.gateway.reload(settings_for(kept.url, bounds=bounds))
        assert (await gateway.ask(chat())).status == 200
        assert len(kept.connections) == (2 if changed else 1)
        assert set(gateway.gateway.statistics().pools) == {"u0"}
        assert gateway.gateway.ready()


async def test_drain_waits_for_what_is_in_flight() -> None:
    """While draining an idle connection closes, a running exchange finishes, and then its connection closes, too."""
    go = trio.Event()
    whole = stream([EVENT, EVENT])
    slow = Script((*whole.steps[:2], WaitFor(go), *whole.steps[2:]))
    async with scene(slow) as (_, gateway):
        busy, idle = await gateway.connect(), await gateway.connect()
        await busy.send(chat())
        head = await busy.final_head()
        gateway.gateway.drain(trio.current_time() + 30)
        assert not gateway.gateway.ready()
        assert await idle.rest() == b""
        go.set()
        await busy.body(head)
        assert head.complete
        assert await busy.rest() == b""
        assert (await gateway.records.one()).outcome is Outcome.COMPLETED


@pytest.mark.parametrize("ending", ["answer", "stream", "cut", "deadline"])
async def test_a_drain_closed_connections_that_were_said_to_stay(ending: str) -> None:
    """An answer that begins while draining says that its connection ends: whose next request met the end, failed."""
    go = trio.Event()
    then = {
        "answer": reply({"ok": True}).steps,
        "stream": stream([EVENT]).steps,
        "cut": (Close(),),
        "deadline": (Stall(),),
    }
    async with scene(Script((WaitFor(go), *then[ending]))) as (upstream, gateway):
        client = await gateway.connect()
        await client.send(chat())
        await upstream.until(lambda: bool(upstream.requests) and upstream.requests[0].complete)
        gateway.gateway.drain(trio.current_time() + (0.05 if ending == "deadline" else 30))
        go.set()
        response = await client.response()
        assert response.status == {"cut": 502, "deadline": 503}.get(ending, 200)
        assert response.header("connection") == "close"
        assert await client.rest() == b""


async def test_drain_deadline_before_the_head() -> None:
    """What has no answer yet when the drain's time is over gets one: 503 `gateway_draining`, to be tried elsewhere."""
    async with scene(Script((Stall(),))) as (upstream, gateway):
        client = await gateway.connect()
        await client.send(chat())
        await upstream.until(lambda: bool(upstream.requests) and upstream.requests[0].complete)
        gateway.gateway.drain(trio.current_time() + 0.1)
        response = await client.response()
        assert response.status == 503
        assert response.error["code"] == "gateway_draining"
        assert response.header("retry-after") is not None
        record = await gateway.records.one()
        assert record.outcome is Outcome.DRAINED
        await upstream.until(lambda: upstream.connections[0].left is not None)


async def test_bug_outside_of_the_pipeline(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever raises in a connection ends that connection, leaves one record, and no other one notices."""

    class Broken:
        def __init__(self, *_: object) -> None:
            raise ZeroDivisionError

    async with scene(cut_after(chat_stream(3), 1, Stall())) as (_, gateway):
        other = await gateway.connect()
        await other.send(chat())
        await other.until(b"word0")
        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
            patch.setattr(connection_module, "Delivery", Broken)
            client = await gateway.connect()
            await client.send(chat())
            assert await client.rest() == b""
        record = await gateway.records.one()
        assert record.outcome is Outcome.INTERNAL_ERROR
        assert record.failure is not None
        assert (record.failure.side, record.failure.kind) == (Side.GATEWAY, Kind.INTERNAL)
        assert "ZeroDivisionError" in caplog.text
        assert other.ended_by is None


async def test_base_url_with_a_path() -> None:
    """`/v1/x` goes to `<base>/x`; dot segments never leave the base."""
    async with (
        ScriptedUpstream(reply({})) as upstream,
        running_gateway(settings_for(upstream.url + "/deep/base")) as gateway,
    ):
        assert (await gateway.ask(request("GET", "/v1/models?limit=1"))).status == 200
        assert upstream.requests[0].target == "/deep/base/models?limit=1"
        for target in ("/v1/../../secret", "/v1/%2e%2e/%2E%2e/secret"):
            assert (await gateway.ask(request("GET", target))).status == 400
        assert len(upstream.requests) == 1


async def test_idle_client_connection_is_closed_quietly() -> None:
    """After `keep_alive` seconds of idleness: FIN, no bytes, no record."""
    async with scene(reply({}), deadlines=Deadlines(keep_alive=0.2)) as (_, gateway):
        client = await gateway.connect()
        await client.send(request("GET", "/"))
        assert (await client.response()).status == 200
        assert await client.rest() == b""
        assert client.ended_by == "fin"
        assert len(gateway.records.all) == 1


async def test_upstream_that_says_more_than_its_answer_is_not_used_again() -> None:
    """Bytes behind the end of a response belong to nobody: never relayed, and the connection is not trusted again."""
    extra = Script((Send(reply({"n": 1}).wire + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"),))
    async with scene(extra) as (upstream, gateway):
        client = await gateway.connect()
        for _ in range(3):
            await client.send(request("GET", "/"))
            assert (await client.response()).json == {"n": 1}
        assert b"evil" not in client.seen
        assert len(upstream.connections) == 3


async def test_pipelined_bytes_after_the_last_request_cost_its_answer() -> None:
    """What a client sends behind `Connection: close` is dropped, and must not reset the connection under the answer."""
    async with scene(reply({"n": 1})) as (upstream, gateway):
        client = await gateway.connect()
        await client.send(request("GET", "/", None, "Connection: close") + request("GET", "/more") * 3000)
        response = await client.response()
        assert response.json == {"n": 1}
        assert await client.rest() == b""
        assert client.ended_by == "fin", "a reset can overtake the answer's last bytes"
        assert len(upstream.requests) == 1
        assert len(gateway.records.all) == 1
