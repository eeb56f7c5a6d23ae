"""The official Python SDK through the gateway, in its three flavours, on good days and bad ones."""

from __future__ import annotations

import json

import openai
import pytest
import trio
from openai_drivers import FLAVOURS, MESSAGES, Outcome, call, stream_chat

from canal_trio.testing.scripts import (
    Cut,
    Reset,
    Script,
    Send,
    Stall,
    Step,
    chat_stream,
    cut_after,
    cut_at,
    error_event,
    openai_error,
    reply,
    stream,
)
from canal_trio.testing.upstreams import ScriptedUpstream, in_order

pytestmark = [
    pytest.mark.real,
    pytest.mark.parametrize("flavour", FLAVOURS),
    # The SDK and its HTTP library leave their own async generators to the garbage collector, which Trio reports.
    pytest.mark.filterwarnings("ignore:Async generator '(openai|httpx2|httpcore2):ResourceWarning"),
]

LEAVE_SECONDS = 2.0  # a bound for a noisy machine; how fast it is, is measured elsewhere


async def test_a_whole_stream(flavour: str, base_url: str, upstream: ScriptedUpstream) -> None:
    """Every token, the finish reason and the usage arrive, and the upstream sees the client's own request."""
    upstream.answer = chat_stream(40, usage=True)
    outcome = await stream_chat(flavour, base_url, stream_options={"include_usage": True})
    assert outcome == Outcome([f"word{index} " for index in range(40)], "stop", outcome.usage)
    assert outcome.usage.completion_tokens == 40
    (request,) = upstream.requests
    assert (request.method, request.target) == ("POST", "/v1/chat/completions")
    assert request.header("authorization") == "Bearer sk-test"
    assert request.header("x-stainless-retry-count") == "0"
    assert request.json["messages"] == MESSAGES
    assert request.left is None


async def test_an_answer_that_is_not_streamed(flavour: str, base_url: str, upstream: ScriptedUpstream) -> None:
    """A plain completion arrives whole, with the upstream's own headers."""
    completion = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "scripted",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "ö" * 50_000}, "finish_reason": "stop"}],
    }
    upstream.answer = reply(completion, headers=[("x-request-id", "req_of_upstream"), ("openai-version", "2020")])
    answer = await call(
        flavour,
        base_url,
        lambda client: client.chat.completions.with_raw_response.create(model="scripted", messages=MESSAGES),
    )
    assert answer.headers["openai-version"] == "2020"
    assert answer.headers["x-request-id"]
    assert answer.parse().choices[0].message.content == "ö" * 50_000


async def test_models(flavour: str, base_url: str, upstream: ScriptedUpstream) -> None:
    """The list of models arrives."""
    models = [{"id": name, "object": "model", "created": 1, "owned_by": "us"} for name in ("a", "b")]
    upstream.answer = reply({"object": "list", "data": models})

    def names_sync(client: openai.OpenAI) -> list[str]:
        return [model.id for model in client.models.list()]

    async def names(client: openai.AsyncOpenAI) -> list[str]:
        return [model.id async for model in client.models.list()]

    assert await call(flavour, base_url, names_sync if flavour == "sync" else names) == ["a", "b"]
    assert (upstream.requests[0].method, upstream.requests[0].target) == ("GET", "/v1/models")


async def test_a_large_request(flavour: str, base_url: str, upstream: ScriptedUpstream) -> None:
    """Two megabytes of messages reach the upstream byte for byte, and the answer streams."""
    messages = [{"role": "user", "content": "Zwei Brücken. " * 140_000}]
    outcome = await stream_chat(flavour, base_url, messages=messages)
    assert outcome.finish == "stop"
    assert upstream.requests[0].json["messages"] == messages


async def test_breaking_out_early(flavour: str, base_url: str, upstream: ScriptedUpstream) -> None:
    """An application that breaks out of its loop stops the upstream."""
    upstream.answer = chat_stream(1000, gap=0.01)
    outcome = await stream_chat(flavour, base_url, take=3)
    assert len(outcome.texts) == 3
    await upstream.until(lambda: upstream.requests[0].left is not None, seconds=LEAVE_SECONDS)
    assert upstream.requests[0].tokens < 1000


@pytest.mark.parametrize("tokens", [None, 0, 3], ids=["before the head", "before the first token", "mid-stream"])
async def test_giving_up(flavour: str, tokens: int | None, base_url: str, upstream: ScriptedUpstream) -> None:
    """An application that gives up while nothing comes, in whatever phase, frees the upstream."""
    upstream.answer = Script((Stall(),)) if tokens is None else cut_after(chat_stream(), tokens, Stall())
    outcome = await stream_chat(flavour, base_url, patience=0.4)
    assert outcome.gave_up
    assert len(outcome.texts) == (tokens or 0)
    await upstream.until(lambda: upstream.requests[0].left is not None, seconds=LEAVE_SECONDS)


async def test_giving_up_on_a_plain_answer(flavour: str, base_url: str, upstream: ScriptedUpstream) -> None:
    """Giving up frees the upstream when nothing is streamed, too."""
    upstream.answer = Script((Stall(),))
    outcome = await stream_chat(flavour, base_url, patience=0.4, stream=False)
    assert outcome.gave_up
    await upstream.until(lambda: upstream.requests[0].left is not None, seconds=LEAVE_SECONDS)


async def test_an_error_in_the_stream(flavour: str, base_url: str, upstream: ScriptedUpstream) -> None:
    """An error that the upstream reports in its stream is the application's exception, after the tokens before it."""
    last = Send(b"0\r\n\r\n")
    upstream.answer = cut_after(chat_stream(), 2, error_event("the engine died", code="overloaded"), last)
    outcome = await stream_chat(flavour, base_url)
    assert len(outcome.texts) == 2
    assert isinstance(outcome.error, openai.APIError)
    assert (outcome.error.message, outcome.error.code) == ("the engine died", "overloaded")


BREAKS = {
    "fin between events": (cut_after(chat_stream(), 2, Cut()), 2),
    "reset between events": (cut_after(chat_stream(), 2, Reset()), 2),
    "fin inside an event": (cut_at(chat_stream(), len(cut_after(chat_stream(), 2).wire) + 20, Cut()), 2),
    "fin before the last chunk": (cut_at(chat_stream(done=False), len(chat_stream(done=False).wire) - 5, Cut()), 5),
    "fin before the first token": (cut_after(chat_stream(), 0, Cut()), 0),
    "not chunked": (cut_after(chat_stream(framing="length"), 2, Cut()), 2),
}


@pytest.mark.parametrize("how", BREAKS)
async def test_a_cut_stream_never_looks_finished(
    flavour: str, how: str, base_url: str, upstream: ScriptedUpstream
) -> None:
    """However the upstream breaks off, the application gets what was said before, and then an exception."""
    upstream.answer, tokens = BREAKS[how]
    outcome = await stream_chat(flavour, base_url)
    assert not outcome.looks_finished
    assert isinstance(outcome.error, openai.APIError)
    # A reset may overtake what was sent before it.
    assert len(outcome.texts) == tokens or (how.startswith("reset") and len(outcome.texts) <= tokens)
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("breaks", [Cut(), Reset()], ids=["fin", "reset"])
async def test_cut_before_the_head(flavour: str, breaks: Step, base_url: str, upstream: ScriptedUpstream) -> None:
    """An upstream that dies before its head is a 502 in OpenAI's shape, and `x-should-retry` keeps the SDK from paying
    for a second generation."""
    upstream.answer = Script((breaks,))
    outcome = await stream_chat(flavour, base_url, retries=2)
    assert isinstance(outcome.error, openai.InternalServerError)
    assert outcome.error.status_code == 502
    assert outcome.error.code == "upstream_disconnected"
    assert outcome.error.request_id
    assert len(upstream.requests) == 1


async def test_a_limit_is_waited_for(flavour: str, base_url: str, upstream: ScriptedUpstream) -> None:
    """A 429 with `retry-after-ms` reaches the SDK, which waits and succeeds, on the second try of its own."""
    upstream.answer = in_order(openai_error(429, headers=[("retry-after-ms", "20")]), chat_stream())
    outcome = await stream_chat(flavour, base_url, retries=2)
    assert outcome.finish == "stop"
    assert [request.header("x-stainless-retry-count") for request in upstream.requests] == ["0", "1"]


@pytest.mark.parametrize("status", [429, 503])
async def test_should_retry_is_obeyed(flavour: str, status: int, base_url: str, upstream: ScriptedUpstream) -> None:
    """`x-should-retry: false` and `retry-after` reach the SDK as the upstream sent them: one attempt, its own error."""
    headers = [("x-should-retry", "false"), ("retry-after", "7")]
    upstream.answer = openai_error(status, "out of credit", code="insufficient_quota", headers=headers)
    outcome = await stream_chat(flavour, base_url, retries=2)
    assert isinstance(outcome.error, openai.RateLimitError if status == 429 else openai.InternalServerError)
    assert outcome.error.code == "insufficient_quota"
    assert outcome.error.response.headers["retry-after"] == "7"
    assert len(upstream.requests) == 1


@pytest.mark.parametrize(("status", "kind"), [(400, "BadRequestError"), (404, "NotFoundError")])
async def test_errors_keep_their_shape(
    flavour: str, status: int, kind: str, base_url: str, upstream: ScriptedUpstream
) -> None:
    """The upstream's own error answers arrive as the SDK's own exceptions, told once."""
    upstream.answer = openai_error(status, "no such thing", code="model_not_found")
    outcome = await stream_chat(flavour, base_url, retries=2)
    assert type(outcome.error).__name__ == kind
    assert isinstance(outcome.error, openai.APIStatusError)
    assert outcome.error.code == "model_not_found"
    assert len(upstream.requests) == 1


def response_events(*kinds: str) -> list[bytes]:
    """Events of the Responses API, named as it names them."""
    response = {"id": "resp_1", "object": "response", "created_at": 1, "model": "m", "output": [], "status": "queued"}
    delta = {"item_id": "i", "output_index": 0, "content_index": 0, "delta": "word "}
    bodies = {kind: delta if kind.endswith("delta") else {"response": response} for kind in kinds}
    datas = [{"type": kind, "sequence_number": number, **bodies[kind]} for number, kind in enumerate(kinds)]
    return [f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode() for data in datas]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "cut"])
async def test_the_responses_api(flavour: str, whole: bool, base_url: str, upstream: ScriptedUpstream) -> None:
    """Named events stream through; cut, they end in the error event that this API has, and then in an exception."""
    delta = "response.output_text.delta"
    script = stream(response_events("response.created", delta, delta, "response.completed"), first=1, last=3)
    upstream.answer = script if whole else cut_after(script, 2)
    seen: list[str] = []
    note = seen.append
    request = {"model": "m", "input": "Stream a haiku.", "stream": True}

    def use_sync(client: openai.OpenAI) -> None:
        for event in client.responses.create(**request):
            note(event.type)

    async def use(client: openai.AsyncOpenAI) -> None:
        async for event in await client.responses.create(**request):
            note(event.type)

    if whole:
        await call(flavour, base_url, use_sync if flavour == "sync" else use)
        assert seen == ["response.created", delta, delta, "response.completed"]
    else:
        with pytest.raises(openai.APIError):
            await call(flavour, base_url, use_sync if flavour == "sync" else use)
        assert seen == ["response.created", delta, delta, "error"]


async def test_upstream_connections_are_used_again(flavour: str, base_url: str, upstream: ScriptedUpstream) -> None:
    """Streams one after the other, read to their end, go over one upstream connection, whatever the SDK does with its
    own."""
    for _ in range(3):
        assert (await stream_chat(flavour, base_url)).finish == "stop"
    assert len(upstream.connections) == 1
    assert len(upstream.requests) == 3


async def test_many_at_once(flavour: str, base_url: str, upstream: ScriptedUpstream) -> None:
    """Twenty concurrent streams each get their own tokens."""
    upstream.answer = lambda request: chat_stream([f"{request.json['user']}-{index} " for index in range(10)], gap=0.01)
    outcomes: dict[str, Outcome] = {}

    async def one(name: str) -> None:
        outcomes[name] = await stream_chat(flavour, base_url, user=name)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(one, f"user{number}")
    for name, outcome in outcomes.items():
        assert outcome.texts == [f"{name}-{index} " for index in range(10)]
        assert outcome.finish == "stop"
