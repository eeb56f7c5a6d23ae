"""The official JavaScript SDK through the gateway, on the Node that comes as a wheel."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import trio
from openai_drivers import MESSAGES
from sdk_programs import BIN, ENVIRONMENT, clean_environment

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
)
from canal_trio.testing.upstreams import ScriptedUpstream, in_order

pytestmark = pytest.mark.real

VERSION = "7.57.0"  # needs Node 22
CACHE = Path(__file__).parent.parent / ".cache" / "node"
LEAVE_SECONDS = 2.0


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """A git-ignored folder with the SDK in it; installed by npm on first use, and whenever the version changes."""
    CACHE.mkdir(parents=True, exist_ok=True)
    manifest = CACHE / "node_modules" / "openai" / "package.json"
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs may share the folder
        if not manifest.exists() or json.loads(manifest.read_text())["version"] != VERSION:
            argv = [
                BIN / "npm",
                "install",
                "--prefix",
                CACHE,
                "--no-save",
                "--no-package-lock",
                "--no-audit",
                "--no-fund",
            ]
            path = f"{BIN}{os.pathsep}{ENVIRONMENT['PATH']}"
            run = subprocess.run(
                [*argv, f"openai@{VERSION}"],
                env=ENVIRONMENT | {"PATH": path},
                capture_output=True,
                text=True,
                check=False,
            )
            assert run.returncode == 0, f"npm could not install openai@{VERSION}:\n{run.stdout}{run.stderr}"
        assert json.loads(manifest.read_text())["version"] == VERSION
    return CACHE


class Node:
    """A Node process that does one task after the other."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._tasks: IO[str] = process.stdin
        self._outcomes: IO[str] = process.stdout
        self._count = 0

    async def __call__(self, base_url: str, what: str = "chat", **task: Any) -> dict[str, Any]:
        """Have one task done; what the application saw."""
        self._count += 1
        body = {"model": "scripted", "messages": MESSAGES, "stream": True} | task.pop("body", {})
        line = json.dumps({"id": self._count, "base_url": base_url, "what": what, "body": body, **task})
        with trio.fail_after(30):
            outcome = await trio.to_thread.run_sync(self._do, line, abandon_on_cancel=True)
        assert outcome.pop("id") == self._count
        return outcome

    def _do(self, line: str) -> dict[str, Any]:
        self._tasks.write(f"{line}\n")
        self._tasks.flush()
        outcome: dict[str, Any] = json.loads(self._outcomes.readline())
        return outcome


@pytest.fixture(scope="module")
def node(node_modules: Path) -> Iterator[Node]:
    """A Node process, ready for tasks."""
    process = subprocess.Popen(
        [BIN / "node", Path(__file__).parent / "driver.mjs", node_modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        assert "node" in json.loads(process.stdout.readline() or "{}")
        yield Node(process)
        process.stdin.close()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def test_a_whole_stream(node: Node, base_url: str, upstream: ScriptedUpstream) -> None:
    """Every token, the finish reason and the usage arrive, and the upstream sees the client's own request."""
    upstream.answer = chat_stream(40, usage=True)
    outcome = await node(base_url, body={"stream_options": {"include_usage": True}})
    assert outcome["error"] is None
    assert outcome["texts"] == [f"word{index} " for index in range(40)]
    assert outcome["finish"] == "stop"
    assert outcome["usage"]["completion_tokens"] == 40
    (request,) = upstream.requests
    assert request.header("authorization") == "Bearer sk-test"
    assert request.header("x-stainless-lang") == "js"
    assert request.left is None


async def test_an_answer_that_is_not_streamed(node: Node, base_url: str, upstream: ScriptedUpstream) -> None:
    """A plain completion arrives whole."""
    message = {"role": "assistant", "content": "ö" * 50_000}
    upstream.answer = reply({"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
    outcome = await node(base_url, body={"stream": False})
    assert (outcome["error"], outcome["texts"], outcome["finish"]) == (None, ["ö" * 50_000], "stop")


async def test_models(node: Node, base_url: str, upstream: ScriptedUpstream) -> None:
    """The list of models arrives."""
    upstream.answer = reply({"object": "list", "data": [{"id": "a"}, {"id": "b"}]})
    assert (await node(base_url, "models"))["texts"] == ["a", "b"]


async def test_breaking_out_early(node: Node, base_url: str, upstream: ScriptedUpstream) -> None:
    """An application that breaks out of its loop stops the upstream."""
    upstream.answer = chat_stream(1000, gap=0.01)
    outcome = await node(base_url, take=3)
    assert (outcome["error"], len(outcome["texts"])) == (None, 3)
    await upstream.until(lambda: upstream.requests[0].left is not None, seconds=LEAVE_SECONDS)
    assert upstream.requests[0].tokens < 1000


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("tokens", [None, 0, 3], ids=["before the head", "before the first token", "mid-stream"])
async def test_aborting(
    node: Node, tokens: int | None, stream: bool, base_url: str, upstream: ScriptedUpstream
) -> None:
    """An application that aborts while nothing comes, in whatever phase, frees the upstream."""
    upstream.answer = Script((Stall(),)) if tokens is None else cut_after(chat_stream(), tokens, Stall())
    outcome = await node(base_url, patience=0.3, body={"stream": stream})
    assert outcome["gave_up"]
    assert len(outcome["texts"]) == (tokens or 0 if stream else 0)
    await upstream.until(lambda: upstream.requests[0].left is not None, seconds=LEAVE_SECONDS)


async def test_an_error_in_the_stream(node: Node, base_url: str, upstream: ScriptedUpstream) -> None:
    """An error that the upstream reports in its stream is the application's exception, after the tokens before it."""
    last = Send(b"0\r\n\r\n")
    upstream.answer = cut_after(chat_stream(), 2, error_event("the engine died", code="overloaded"), last)
    outcome = await node(base_url)
    assert len(outcome["texts"]) == 2
    assert outcome["error"]["kind"] == "APIError"
    assert "the engine died" in outcome["error"]["message"]
    assert outcome["error"]["code"] == "overloaded"


BREAKS = {
    "fin between events": cut_after(chat_stream(), 2, Cut()),
    "reset between events": cut_after(chat_stream(), 2, Reset()),
    "fin inside an event": cut_at(chat_stream(), len(cut_after(chat_stream(), 2).wire) + 20, Cut()),
    "fin before the last chunk": cut_at(chat_stream(done=False), len(chat_stream(done=False).wire) - 5, Cut()),
    "fin before the first token": cut_after(chat_stream(), 0, Cut()),
    "not chunked": cut_after(chat_stream(framing="length"), 2, Cut()),
}


@pytest.mark.parametrize("how", BREAKS)
async def test_a_cut_stream_never_looks_finished(
    node: Node, how: str, base_url: str, upstream: ScriptedUpstream
) -> None:
    """However the upstream breaks off, the application gets an exception."""
    upstream.answer = BREAKS[how]
    outcome = await node(base_url)
    assert outcome["error"] is not None
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("breaks", [Cut(), Reset()], ids=["fin", "reset"])
async def test_cut_before_the_head(node: Node, breaks: Step, base_url: str, upstream: ScriptedUpstream) -> None:
    """An upstream that dies before its head is a 502 in OpenAI's shape, and `x-should-retry` keeps the SDK from paying
    for a second generation."""
    upstream.answer = Script((breaks,))
    outcome = await node(base_url, retries=2)
    assert outcome["error"]["kind"] == "InternalServerError"
    assert outcome["error"]["status"] == 502
    assert outcome["error"]["code"] == "upstream_disconnected"
    assert outcome["error"]["request_id"]
    assert len(upstream.requests) == 1


async def test_a_limit_is_waited_for(node: Node, base_url: str, upstream: ScriptedUpstream) -> None:
    """A 429 with `retry-after-ms` reaches the SDK, which waits and succeeds, on the second try of its own."""
    upstream.answer = in_order(openai_error(429, headers=[("retry-after-ms", "20")]), chat_stream())
    outcome = await node(base_url, retries=2)
    assert (outcome["error"], outcome["finish"]) == (None, "stop")
    assert [request.header("x-stainless-retry-count") for request in upstream.requests] == ["0", "1"]


async def test_should_retry_is_obeyed(node: Node, base_url: str, upstream: ScriptedUpstream) -> None:
    """`x-should-retry: false` reaches the SDK as the upstream sent it: one attempt, its own error."""
    upstream.answer = openai_error(429, code="insufficient_quota", headers=[("x-should-retry", "false")])
    outcome = await node(base_url, retries=2)
    assert (outcome["error"]["kind"], outcome["error"]["code"]) == ("RateLimitError", "insufficient_quota")
    assert len(upstream.requests) == 1
