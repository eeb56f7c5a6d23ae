"""Honest endings (design, section 6), over real sockets: a cut never looks finished, `[DONE]` is never made up."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import trio
from kit import Response, chat, data_of, request, running_gateway, settings_for

from canal_trio.errors import Kind, Side
from canal_trio.hooks import ExchangeRecord, Outcome
from canal_trio.relay.streams import TcpStream
from canal_trio.settings import Deadlines
from canal_trio.testing.scripts import (
    DONE,
    Cut,
    Framing,
    Reset,
    Script,
    Send,
    Stall,
    WaitFor,
    chat_stream,
    cut_after,
    cut_at,
    error_event,
    reply,
    stream,
)
from canal_trio.testing.upstreams import ScriptedUpstream, SeenRequest

EVENTS = [b'data: {"n":1}\n\n', b"event: e\ndata: \xc3\xa9\n\n", b'data: {"n":3}\n\n', DONE]
AT_ONCE = 12


def payload_of(wire: bytes, framing: Framing) -> bytes:
    """The body bytes that the first `wire` bytes after the head carry."""
    if framing != "chunked":
        return wire
    payload = b""
    while match := re.match(rb"([0-9a-f]+)\r\n", wire):
        size = int(match[1], 16)
        payload += wire[match.end() : match.end() + size]
        wire = wire[match.end() + size + 2 :]
    return payload


def judge_cut(response: Response, record: ExchangeRecord, payload: bytes) -> None:
    """A stream whose upstream broke off after `payload`."""
    at_boundary = payload == b"" or payload.endswith(b"\n\n")
    terminal = b"data: [DONE]\n" in payload
    assert response.status == 200
    assert not response.complete, "a cut answer looks finished"
    assert response.body.count(b"[DONE]") == payload.count(b"[DONE]"), "a made-up [DONE]"
    assert response.body.startswith(payload), "bytes are missing or changed"
    appended = response.body[len(payload) :]
    if terminal:
        assert appended == b""
        assert record.outcome is Outcome.COMPLETED
        assert "cut_after_terminal" in record.flags
    else:
        assert record.outcome is Outcome.UPSTREAM_FAILED
        assert record.failure is not None
        assert record.failure.side is Side.UPSTREAM
        assert record.failure.kind in (Kind.CUT, Kind.RESET)
        if at_boundary:
            judge_error_event(appended)
        else:
            assert appended == b"", "something was appended inside an event"


def judge_error_event(event: bytes) -> dict[str, Any]:
    """The error event of the chat API: one event, OpenAI's shape."""
    assert re.fullmatch(rb"data: [^\n]+\n\n", event), event
    error = json.loads(event[6:])
    assert set(error) == {"error"}
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert error["error"]["type"] == "upstream_error"
    assert error["error"]["param"] is None
    assert error["error"]["code"]
    return error["error"]


@pytest.mark.parametrize("how", [Cut(), Reset()], ids=["fin", "rst"])
@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
async def test_cut_at_every_byte(framing: Framing, how: Cut | Reset) -> None:
    """Cut anywhere, a stream never looks finished, keeps its bytes, and gets the error event between events only."""
    whole = stream(EVENTS, framing=framing, head_alone=False)
    wire, head_bytes = whole.wire, whole.head_bytes
    answers: dict[int, Response] = {}

    def answer(seen: SeenRequest) -> Script:
        return cut_at(whole, int(seen.target.rpartition("/")[2]), how)

    async with ScriptedUpstream(answer) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        limit = trio.CapacityLimiter(AT_ONCE)

        async def ask(offset: int) -> None:
            async with limit:
                answers[offset] = await gateway.ask(request("GET", f"/cut/{offset}"))

        async with trio.open_nursery() as nursery:
            for offset in range(len(wire)):
                nursery.start_soon(ask, offset)
        records = {int(r.path.rpartition("/")[2]): r for r in await gateway.records.wait(len(wire))}
    assert len(records) == len(gateway.records.all) == len(wire)
    for offset in range(len(wire)):
        response, record = answers[offset], records[offset]
        try:
            if offset < head_bytes:
                assert response.status == 502
                assert response.error["type"] == "upstream_error"
                assert record.outcome is Outcome.UPSTREAM_FAILED
            elif framing == "close" and isinstance(how, Cut):
                # RFC 9112 8: such a body is complete when the connection is closed; that it lacks its end is noted.
                assert response.complete
                assert response.body == wire[head_bytes:offset]
                assert record.outcome is Outcome.COMPLETED
                assert ("no_terminal_event" in record.flags) == (b"data: [DONE]\n" not in response.body)
            else:
                judge_cut(response, record, payload_of(wire[head_bytes:offset], framing))
        except AssertionError as exc:
            raise AssertionError(f"cut at byte {offset} of {len(wire)}: {exc}; {response}; {record}") from exc


async def test_done_then_silence_ends_the_body() -> None:
    """A body that does not end within `after_done` of its last event is ended for it, and the upstream closed."""
    script = stream([*EVENTS], head_alone=False)
    silent = Script((Send(script.wire.removesuffix(b"0\r\n\r\n")), Stall()))
    async with ScriptedUpstream(silent) as upstream:
        settings = settings_for(upstream.url, deadlines=Deadlines(after_done=0.2))
        async with running_gateway(settings) as gateway:
            client = await gateway.connect()
            await client.send(chat())
            response = await client.response()
            assert response.complete
            assert response.body == b"".join(EVENTS)
            record = await gateway.records.one()
            assert record.outcome is Outcome.COMPLETED
            assert "late_body_end" in record.flags
            assert record.failure is None
            await upstream.until(lambda: upstream.requests[0].left is not None)
            assert response.header("connection") != "close"
            await client.send(chat())  # the client's connection is as good as new
            assert (await client.response()).complete


async def test_done_is_not_held_for_the_end() -> None:
    """`[DONE]` reaches the client at once although the upstream's body has not ended."""
    go = trio.Event()
    script = stream(EVENTS, head_alone=False)
    waiting = Script((Send(script.wire.removesuffix(b"0\r\n\r\n")), WaitFor(go), Send(b"0\r\n\r\n")))
    async with ScriptedUpstream(waiting) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        client = await gateway.connect()
        await client.send(chat())
        head = await client.final_head()
        await client.until(b"data: [DONE]\n\n\r\n")
        go.set()
        assert await client.until(b"0\r\n\r\n") == b"0\r\n\r\n"
        assert head.status == 200
        record = await gateway.records.one()
        assert record.outcome is Outcome.COMPLETED
        assert record.flags == ()


async def test_done_and_the_last_chunk_leave_in_one_send(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read together, `[DONE]` and the end of the body are written together: one system call, one packet."""
    sends: list[bytes] = []
    plain, batch = TcpStream.try_send, TcpStream.try_send_batch

    def try_send(self: TcpStream, data: Any) -> int:
        sends.append(bytes(data))
        return plain(self, data)

    def try_send_batch(self: TcpStream, pieces: Any) -> Any:
        sends.append(b"".join(bytes(piece) for piece in pieces))
        return batch(self, pieces)

    monkeypatch.setattr(TcpStream, "try_send", try_send)
    monkeypatch.setattr(TcpStream, "try_send_batch", try_send_batch)
    script = chat_stream(3, gap=0.01)
    async with ScriptedUpstream(script) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        response = await gateway.ask(chat())
        assert response.complete
        assert response.body == script.payload
    last = [data for data in sends if b"[DONE]" in data]
    assert len(last) == 1
    assert last[0].endswith(b"0\r\n\r\n")
    assert [data for data in sends if data == b"0\r\n\r\n"] == []


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_client_leaves_after_the_last_event(how: str) -> None:
    """A client that leaves once it has `[DONE]` has its answer: completed, and the upstream closed at once."""
    script = stream(EVENTS, head_alone=False)
    silent = Script((Send(script.wire.removesuffix(b"0\r\n\r\n")), Stall()))
    async with ScriptedUpstream(silent) as upstream:
        settings = settings_for(upstream.url, deadlines=Deadlines(after_done=30))
        async with running_gateway(settings) as gateway:
            client = await gateway.connect()
            await client.send(chat())
            await client.until(b"data: [DONE]\n\n\r\n")
            client.fin() if how == "fin" else client.reset()
            record = await gateway.records.one()
            assert record.outcome is Outcome.COMPLETED
            assert record.failure is None
            assert record.flags == ("left_after_terminal",)
            assert record.events == len(EVENTS)
            await upstream.until(lambda: upstream.requests[0].left is not None)


async def test_completed_event_of_the_responses_api_is_terminal() -> None:
    """`response.completed` ends a Responses stream as `[DONE]` ends a chat."""
    events = [b"event: response.created\ndata: {}\n\n", b'event: response.completed\ndata: {"response":{}}\n\n']
    script = stream(events, head_alone=False)
    silent = Script((Send(script.wire.removesuffix(b"0\r\n\r\n")), Stall()))
    async with ScriptedUpstream(silent) as upstream:
        settings = settings_for(upstream.url, deadlines=Deadlines(after_done=0.1))
        async with running_gateway(settings) as gateway:
            response = await gateway.ask(chat(path="/v1/responses"))
            assert response.complete
            assert response.body == b"".join(events)
            record = await gateway.records.one()
            assert record.outcome is Outcome.COMPLETED
            assert record.flags == ("late_body_end",)


async def test_error_event_of_the_responses_api_is_flat() -> None:
    """On the Responses API the error event has its own form: named, flat."""
    first = b"event: response.created\ndata: {}\n\n"
    whole = stream([first])
    script = Script((Send(whole.wire.removesuffix(b"0\r\n\r\n")), Cut()))
    async with ScriptedUpstream(script) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        response = await gateway.ask(chat(path="/v1/responses"))
        assert not response.complete
        appended = response.body.removeprefix(first)
        name, _, data = appended.partition(b"\n")
        assert name == b"event: error"
        value = json.loads(data.removeprefix(b"data: "))
        assert value["type"] == "error"
        assert value["code"]
        assert value["message"]
        assert "error" not in value
        assert appended.endswith(b"\n\n")


FAILED = b'event: response.failed\ndata: {"type":"response.failed","response":{"error":{"code":"x"}}}\n\n'
OPENROUTER = (
    b'data: {"id":"gen-1","object":"chat.completion.chunk","created":1,"model":"m","provider":"p","error":{"code":502,'
    b'"message":"Provider disconnected"},"choices":[{"index":0,"delta":{"content":""},"finish_reason":"error"}]}\n\n'
)
TWO_LINES = b'data: {"id":"gen-1","error":\ndata: {"code":502}}\n\n'


def chunk(event: bytes) -> Send:
    """One chunk with this event."""
    return Send(b"%x\r\n%b\r\n" % (len(event), event), event)


@pytest.mark.parametrize(
    "error",
    [
        error_event("out of memory"),
        chunk(FAILED),
        chunk(FAILED.partition(b"\n")[2]),
        chunk(OPENROUTER),
        chunk(TWO_LINES),
    ],
    ids=["error", "response-failed", "response-failed-without-a-name", "among-others", "two-lines"],
)
async def test_error_in_band_is_relayed_and_recorded(error: Send) -> None:
    """The upstream's own error event passes verbatim, the record says `upstream_error`, nothing is appended."""
    script = cut_after(chat_stream(5), 2, error, Send(b"0\r\n\r\n"))
    async with ScriptedUpstream(script) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        response = await gateway.ask(chat())
        assert response.complete
        assert response.body == script.payload
        assert response.body.endswith(error.payload)
        record = await gateway.records.one()
        assert record.outcome is Outcome.UPSTREAM_ERROR


async def test_cut_after_an_error_in_band_appends_no_second_error() -> None:
    """An upstream that reports its error and then breaks off has said it: the body stays unterminated, as it was."""
    script = cut_after(chat_stream(5), 2, error_event("out of memory"), Cut())
    async with ScriptedUpstream(script) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        response = await gateway.ask(chat())
        assert not response.complete
        assert response.body == script.payload
        assert (await gateway.records.one()).outcome is Outcome.UPSTREAM_ERROR


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
async def test_http10_client_of_a_cut_stream_is_reset(framing: Framing) -> None:
    """To an HTTP/1.0 client only a reset can say that something is missing; no event is appended."""
    how = Reset() if framing == "close" else Cut()
    script = cut_after(stream(EVENTS, framing=framing, gap=0.01), 2, how)
    async with ScriptedUpstream(script) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        client = await gateway.connect()
        await client.send(chat(version="1.0"))
        response = await client.response()
        assert response.header("transfer-encoding") is None
        assert response.status == 200
        assert not response.complete
        assert client.ended_by == "reset"
        assert script.payload.startswith(response.body)
        assert (await gateway.records.one()).outcome is Outcome.UPSTREAM_FAILED


async def test_http10_client_of_a_whole_stream_gets_a_clean_close() -> None:
    """To an HTTP/1.0 client the end of a stream is the end of the connection."""
    script = chat_stream(3)
    async with ScriptedUpstream(script) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        client = await gateway.connect()
        await client.send(chat("Connection: keep-alive", version="1.0"))
        response = await client.response()
        assert response.complete
        assert response.framing == "close"
        assert response.body == script.payload
        assert client.ended_by == "fin"
        assert (await gateway.records.one()).outcome is Outcome.COMPLETED


@pytest.mark.parametrize("inside", [False, True], ids=["between-events", "inside-an-event"])
async def test_stall_in_the_middle(inside: bool) -> None:
    """An upstream that falls silent is given up after `upstream_idle`, as honestly as one that is cut."""
    last = b'data: {"half":' if inside else EVENTS[1]
    script = Script((Send(stream([EVENTS[0], last]).wire.removesuffix(b"0\r\n\r\n")), Stall()))
    async with ScriptedUpstream(script) as upstream:
        settings = settings_for(upstream.url, deadlines=Deadlines(upstream_idle=0.3))
        async with running_gateway(settings) as gateway:
            response = await gateway.ask(chat())
            assert not response.complete
            appended = response.body.removeprefix(EVENTS[0] + last)
            if inside:
                assert appended == b""
            else:
                assert judge_error_event(appended)["code"] == "upstream_stalled"
            record = await gateway.records.one()
            assert record.outcome is Outcome.UPSTREAM_FAILED
            assert record.failure is not None
            assert record.failure.kind is Kind.STALLED
            await upstream.until(lambda: upstream.requests[0].left is not None)


async def test_stall_of_a_plain_body() -> None:
    """What is no event stream is left unterminated, with nothing appended."""
    whole = reply(b"x" * 100)
    script = cut_at(whole, len(whole.wire) - 10)
    async with ScriptedUpstream(script) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        response = await gateway.ask(chat(stream=False))
        assert not response.complete
        assert response.body == b"x" * 90
        assert (await gateway.records.one()).outcome is Outcome.UPSTREAM_FAILED


async def test_clean_end_without_a_terminal_event_is_noted() -> None:
    """`[DONE]` is not universal: the stream is relayed as it is, complete, and the record notes it."""
    script = chat_stream(3, done=False)
    async with ScriptedUpstream(script) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        response = await gateway.ask(chat())
        assert response.complete
        assert response.body == script.payload
        record = await gateway.records.one()
        assert record.outcome is Outcome.COMPLETED
        assert record.flags == ("no_terminal_event",)


async def test_drain_deadline() -> None:
    """At the drain deadline a stream ends as for a failing upstream, code `gateway_draining`; outcome `drained`."""
    script = cut_after(chat_stream(5), 2, Stall())
    async with ScriptedUpstream(script) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        client, idle = await gateway.connect(), await gateway.connect()
        await client.send(chat())
        head = await client.final_head()
        await upstream.until(lambda: upstream.requests[0].tokens == 2)
        while len(data_of(bytes(client.buffer))) < 3:
            await client.fill()
        gateway.gateway.drain(trio.current_time() + 0.2)
        assert not gateway.gateway.ready()
        assert await idle.rest() == b"", "an idle connection is closed at once"
        await client.body(head)
        assert not head.complete
        assert draining_code(head.body.removeprefix(script.payload)) == "gateway_draining"
        record = await gateway.records.one()
        assert record.outcome is Outcome.DRAINED
        await upstream.until(lambda: upstream.requests[0].left is not None)


def draining_code(event: bytes) -> str:
    """The code of the event, which has the usual shape."""
    assert re.fullmatch(rb"data: [^\n]+\n\n", event), event
    return str(json.loads(event[6:])["error"]["code"])


async def test_stream_that_ends_before_the_drain_deadline_is_whole() -> None:
    """Draining lets a stream end in peace, then closes its connection."""
    go = trio.Event()
    script = cut_after(chat_stream(1), 1, WaitFor(go), Send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(DONE), DONE), DONE))
    async with ScriptedUpstream(script) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        client = await gateway.connect()
        await client.send(chat())
        await upstream.until(lambda: upstream.requests and upstream.requests[0].tokens == 1)
        gateway.gateway.drain(trio.current_time() + 20)
        go.set()
        response = await client.response()
        assert response.complete
        assert response.body == script.payload
        assert await client.rest() == b""
        assert client.ended_by == "fin"
        assert (await gateway.records.one()).outcome is Outcome.COMPLETED


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_stop_in_mid_stream_looked_like_an_end(version: str) -> None:
    """A gateway that stops at once leaves no answer that looks finished, to an HTTP/1.0 client neither."""
    script = cut_after(chat_stream(5), 2, Stall())
    async with ScriptedUpstream(script) as upstream:
        async with running_gateway(settings_for(upstream.url), settle=False) as gateway:
            client = await gateway.connect()
            await client.send(chat(version=version))
            await client.until(b"word1")
            gateway.stop()
            await client.rest()
            assert not client.seen.endswith(b"0\r\n\r\n")
            assert client.ended_by == ("reset" if version == "1.0" else "fin")
        assert (await gateway.records.one()).outcome is Outcome.DRAINED
