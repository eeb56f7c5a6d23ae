"""The demo as a new user meets it: the command, the line it prints, the line pasted into a shell."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
from functools import partial
from pathlib import Path

import openai
import pytest
import trio
from sdk_programs import BIN, Program, clean_environment

from canal_trio.demo import run_demo
from canal_trio.demo_upstream import MODEL, serve_demo_upstream

pytestmark = [
    pytest.mark.real,
    # As in test_openai_python.py.
    pytest.mark.filterwarnings("ignore:Async generator '(openai|httpx2|httpcore2):ResourceWarning"),
]

LINE = re.compile(r"(?m)^(?:\$ )?(curl -N .*)$")


async def demo_once(**environment: str) -> subprocess.CompletedProcess[bytes]:
    """`canal-trio demo --once`, run to its end."""
    with trio.fail_after(60):
        return await trio.run_process(
            [BIN / "canal-trio", "demo", "--once"],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=clean_environment() | environment,
        )


def path_with(folder: Path, curl: str | None) -> str:
    """A PATH on which `curl` is this shell script, or nothing at all."""
    if curl is not None:
        (folder / "curl").write_text(f"#!/bin/sh\n{curl}\n")
        (folder / "curl").chmod(0o755)
    return str(folder)


async def test_once() -> None:
    """`demo --once` shows the request of OpenAI's streaming guide and its stream, and exits 0."""
    result = await demo_once()
    text = result.stdout.decode()
    assert result.returncode == 0, result.stderr.decode()
    if "There is no curl" not in text:
        line = LINE.search(text)
        assert line
        argv = shlex.split(line[1])
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1/chat/completions", argv[2])
        assert any(part.startswith("Authorization: Bearer ") for part in argv)
        body = json.loads(argv[argv.index("-d") + 1])
        assert body["stream"] is True
        assert body["messages"][0]["content"] == "Stream a haiku."
    assert text.count("data: {") > 10
    assert "\ndata: [DONE]\n" in text
    assert re.search(r"(?m)^listening on http://127\.0\.0\.1:\d+$", result.stderr.decode())


async def test_once_without_curl(tmp_path: Path) -> None:
    """Where there is no curl it says so, shows the request it sends instead, and its stream."""
    result = await demo_once(PATH=path_with(tmp_path, None))
    text = result.stdout.decode()
    assert result.returncode == 0, result.stderr.decode()
    assert "There is no curl on this machine." in text
    assert "\nPOST /v1/chat/completions HTTP/1.1\nHost: 127.0.0.1:" in text
    assert LINE.search(text) is None
    assert text.count("data: {") > 10
    assert "\ndata: [DONE]\n" in text


async def test_once_where_a_proxy_is_set() -> None:
    """A proxy named by the environment is not asked for our loopback: the line itself keeps curl from it."""
    result = await demo_once(http_proxy="http://127.0.0.1:9", no_proxy="")
    assert result.returncode == 0, result.stderr.decode()
    assert " --noproxy 127.0.0.1 " in result.stdout.decode() or "There is no curl" in result.stdout.decode()


CURLS = {
    "fails": ("echo 'curl: (7) no way' >&2; exit 7", "curl ended with exit code 7: curl: (7) no way"),
    "says nothing": ("exit 0", "did not end with [DONE]"),
    "is cut": ("printf 'data: {}\\n\\n'", "did not end with [DONE]"),
    "is not finished": ("printf 'data: [DONE]\\n\\n'", "the answer was not finished"),
    "comes in one lump": ("""printf 'data: {"finish_reason":"stop"}\\n\\ndata: [DONE]\\n\\n'""", "one lump"),
}


@pytest.mark.parametrize("how", CURLS)
async def test_once_does_not_lie(how: str, tmp_path: Path) -> None:
    """When the stream is not what it has to be, the demo says what is wrong with it and exits 1."""
    script, complaint = CURLS[how]
    path = f"{path_with(tmp_path, script)}{os.pathsep}{os.environ['PATH']}"
    result = await demo_once(PATH=path)
    assert result.returncode == 1
    assert complaint in result.stderr.decode()
    assert "Traceback" not in result.stderr.decode()


async def test_nobody_reads() -> None:
    """Its output piped into something that stops reading is no bug of ours to report."""
    argv = f"{shlex.quote(str(BIN / 'canal-trio'))} demo --once | head -n 1"
    run = partial(trio.run_process, capture_stdout=True, capture_stderr=True, check=False, env=clean_environment())
    with trio.fail_after(60):
        result = await run(["sh", "-c", argv])
    assert b"unexpected" not in result.stderr
    assert b"Traceback" not in result.stderr


async def test_the_line_works_when_pasted(tmp_path: Path) -> None:
    """The one line that the demo prints streams a haiku when a shell runs it; Ctrl-C in the middle of that stream
    lets it finish, and exits 0."""
    curl = f'exec "{BIN}/python" "{Path(__file__).parent / "curl.py"}" "$@"'
    stand_in = path_with(tmp_path, curl)
    with Program([BIN / "canal-trio", "demo"]) as demo:
        line = demo.wait_for(LINE.pattern)[1]
        assert len(LINE.findall(demo.text)) == 1
        arrivals: list[float] = []
        received = b""
        async with trio.open_nursery() as nursery:
            environment = clean_environment() | {"PATH": f"{os.environ['PATH']}{os.pathsep}{stand_in}"}
            run = partial(
                trio.run_process, ["sh", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
            process = await nursery.start(run)
            async for piece in process.stdout:
                arrivals.append(trio.current_time())
                received += piece
                if len(arrivals) == 3:
                    demo.process.send_signal(signal.SIGINT)
        assert received.endswith(b'"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n')
        assert len(arrivals) >= 10
        assert await trio.to_thread.run_sync(demo.process.wait, 10) == 0
        assert "Traceback" not in demo.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_ctrl_c(number: signal.Signals) -> None:
    """Told to end with nothing in flight, the demo ends at once and exits 0."""
    with Program([BIN / "canal-trio", "demo"]) as demo:
        demo.wait_for(r"Ctrl-C drains")
        demo.process.send_signal(number)
        assert await trio.to_thread.run_sync(demo.process.wait, 10) == 0
        assert "Traceback" not in demo.text


async def test_a_taken_port() -> None:
    """When its port is taken the demo picks another one and says so."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        out = io.StringIO()
        assert await run_demo(once=True, port=port, out=out) == 0
    assert f"Port {port} is taken" in out.getvalue()
    assert f":{port}/v1" not in out.getvalue()


async def test_the_upstream_speaks_openai(nursery: trio.Nursery) -> None:
    """The official SDK understands the demo upstream: streams, usage, plain answers, models, errors."""
    base_url = await nursery.start(partial(serve_demo_upstream, gap=0.001))
    async with openai.AsyncOpenAI(base_url=base_url, api_key="any", max_retries=0) as client:
        messages = [{"role": "user", "content": "Stream a haiku."}]
        text, finish, usage = "", None, None
        options = {"include_usage": True}
        async for chunk in await client.chat.completions.create(
            model="whatever", messages=messages, stream=True, stream_options=options
        ):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
        assert finish == "stop"
        assert text.count("\n") == 2
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (3, len(text.split()))

        answer = await client.chat.completions.create(model="whatever", messages=messages)
        assert answer.choices[0].message.content.count("\n") == 2
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL

        with pytest.raises(openai.NotFoundError, match="'other' does not exist") as missing:
            await client.models.retrieve("other")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError, match="Unknown request URL"):
            await client.embeddings.create(model="m", input="x")
        with pytest.raises(openai.BadRequestError, match="messages") as bad:
            await client.chat.completions.create(model="m", messages=[])
        assert bad.value.param == "messages"
        with pytest.raises(openai.BadRequestError, match="model"):
            await client.chat.completions.create(model=None, messages=messages)
        with pytest.raises(openai.APIStatusError, match="larger than") as large:
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 2_000_000}])
        assert large.value.status_code == 413
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff"])
async def test_the_upstream_refuses_what_is_no_request(body: bytes, nursery: trio.Nursery) -> None:
    """A body that is no JSON object is a 400 in OpenAI's shape."""
    base_url = await nursery.start(serve_demo_upstream)
    status, answer = await ask(base_url, b"POST /v1/chat/completions", body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    status, answer = await ask(base_url, b"GET /v1/chat/completions", b"")
    assert (status, answer["error"]["code"]) == (405, "method_not_supported")
    nursery.cancel_scope.cancel()


async def ask(base_url: str, line: bytes, body: bytes) -> tuple[int, dict]:
    """One request by hand; the status and the JSON body of its answer."""
    async with await connect(base_url) as client:
        head = b"%b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        await client.send_all(head % (line, len(body)) + body)
        received = b"".join([piece async for piece in client])
    head, _, answer = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(answer)


async def connect(base_url: str) -> trio.SocketStream:
    """A connection to the demo upstream."""
    return await trio.open_tcp_stream("127.0.0.1", int(base_url.removesuffix("/v1").rpartition(":")[2]))


async def test_the_upstream_stops_when_its_client_leaves(nursery: trio.Nursery) -> None:
    """After its client's FIN it writes no further token: the connection ends far from the haiku's end."""
    base_url = await nursery.start(serve_demo_upstream)
    async with await connect(base_url) as client:
        body = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"x"}]}'
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        await client.send_all(head + body)
        received = b""
        while received.count(b"data: ") < 3:
            received += await client.receive_some()
        await client.send_eof()
        received += b"".join([piece async for piece in client])
    assert received.count(b"data: ") < 6
    assert b"[DONE]" not in received
    nursery.cancel_scope.cancel()
