"""curl through the gateway, as the README shows it; and clients that die instead of leaving."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import trio
from sdk_programs import clean_environment

from canal_trio.testing.scripts import (
    Cut,
    Reset,
    Script,
    Send,
    Stall,
    Step,
    chat_stream,
    cut_after,
    openai_error,
    reply,
)
from canal_trio.testing.upstreams import ScriptedUpstream

pytestmark = pytest.mark.real

LEAVE_SECONDS = 2.0
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Stream a haiku."}], "stream": True})
HEADERS = ["-H", "Content-Type: application/json", "-H", "Authorization: Bearer sk-test"]


@pytest.fixture(scope="session")
def curl() -> list[str]:
    """The program, or the stand-in with the same library, or a clear failure."""
    found = shutil.which("curl")
    if not found and not find_spec("pycurl"):
        pytest.fail("These tests need curl: the program (apt-get install curl) or the wheel (pip install pycurl).")
    argv = [found] if found else [sys.executable, str(Path(__file__).parent / "curl.py")]
    return [*argv, "-q", "-N", "-s"]


async def run(argv: list[str], **more: Any) -> subprocess.CompletedProcess[bytes]:
    """Run to the end, with what it said on standard output."""
    with trio.fail_after(30):
        return await trio.run_process(argv, capture_stdout=True, check=False, env=clean_environment(), **more)


async def test_the_line_of_the_readme(curl: list[str], base_url: str, upstream: ScriptedUpstream) -> None:
    """A stream arrives byte for byte, each event as it is written and not when the next one comes."""
    upstream.answer = chat_stream(8, gap=0.05)
    arrivals: list[float] = []
    received = b""
    async with trio.open_nursery() as nursery:
        argv = [*curl, f"{base_url}/chat/completions", *HEADERS, "-d", BODY]
        process = await nursery.start(
            partial(trio.run_process, argv, stdout=subprocess.PIPE, env=clean_environment(), check=False)
        )
        async for piece in process.stdout:
            arrivals.append(trio.current_time())
            received += piece
    assert process.returncode == 0
    assert received == upstream.answer.payload
    assert len(arrivals) >= 8
    assert upstream.requests[0].body == BODY.encode()
    assert upstream.requests[0].header("authorization") == "Bearer sk-test"


async def test_http_1_0(curl: list[str], base_url: str, upstream: ScriptedUpstream) -> None:
    """An HTTP/1.0 client gets the same bytes, without chunked framing, ended by the end of the connection."""
    result = await run([*curl, "--http1.0", "-i", f"{base_url}/chat/completions", *HEADERS, "-d", BODY])
    head, _, body = result.stdout.partition(b"\r\n\r\n")
    assert result.returncode == 0
    assert b"transfer-encoding" not in head.lower()
    assert body == chat_stream().payload


@pytest.mark.parametrize("ending", [Cut(), Reset()], ids=["fin", "reset"])
async def test_a_cut_is_an_error_of_curl(
    curl: list[str], ending: Step, base_url: str, upstream: ScriptedUpstream
) -> None:
    """A broken upstream is a broken transfer for curl, whose exit code says so, and no `[DONE]` is made up."""
    upstream.answer = cut_after(chat_stream(), 3, ending)
    result = await run([*curl, f"{base_url}/chat/completions", *HEADERS, "-d", BODY])
    assert result.returncode != 0
    assert b"[DONE]" not in result.stdout
    if isinstance(ending, Cut):
        assert result.stdout.startswith(upstream.answer.payload)


async def test_an_upload_that_waits_for_100(
    curl: list[str], base_url: str, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """The `Expect: 100-continue` that curl sends with a large body is answered, and the body arrives whole."""
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 1_200_000}]}).encode()
    (tmp_path / "body").write_bytes(body)
    upstream.answer = reply({"ok": True})
    argv = [*curl, "-i", f"{base_url}/chat/completions", *HEADERS, "-H", "Expect: 100-continue"]
    with trio.move_on_after(0.9) as patience:  # curl sends it unasked after a second
        result = await run([*argv, "--data-binary", f"@{tmp_path / 'body'}"])
    assert not patience.cancelled_caught
    assert result.stdout.startswith(b"HTTP/1.1 100")
    assert result.stdout.endswith(b'{"ok": true}')
    assert upstream.requests[0].body == body


async def test_two_requests_on_one_connection(curl: list[str], base_url: str, upstream: ScriptedUpstream) -> None:
    """A second request on the same client connection is answered as the first; errors do not end it."""
    upstream.answer = lambda request: reply(b"ok") if request.target == "/v1/a" else openai_error(404)
    result = await run([*curl, f"{base_url}/b", f"{base_url}/a"])
    assert result.stdout == openai_error(404).payload + b"ok"
    assert [request.target for request in upstream.requests] == ["/v1/b", "/v1/a"]


async def test_head(curl: list[str], base_url: str, upstream: ScriptedUpstream) -> None:
    """A HEAD has the length of what GET would give, and no body."""
    answer = reply(b"x" * 100)
    upstream.answer = Script((Send(answer.wire[: answer.head_bytes]),))
    result = await run([*curl, "-I", f"{base_url}/models"])
    assert result.returncode == 0
    assert b"content-length: 100" in result.stdout.lower()
    assert upstream.requests[0].method == "HEAD"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
@pytest.mark.parametrize("tokens", [None, 3], ids=["before the head", "mid-stream"])
async def test_a_dead_client_frees_the_upstream(
    curl: list[str], tokens: int | None, number: signal.Signals, base_url: str, upstream: ScriptedUpstream
) -> None:
    """Ctrl-C in the terminal, or a kill: the upstream sees its client leave, in whatever phase."""
    upstream.answer = Script((Stall(),)) if tokens is None else chat_stream(1000, gap=0.01)
    async with trio.open_nursery() as nursery:
        argv = [*curl, f"{base_url}/chat/completions", *HEADERS, "-d", BODY]
        process = await nursery.start(
            partial(trio.run_process, argv, stdout=subprocess.DEVNULL, env=clean_environment(), check=False)
        )
        await upstream.until(lambda: bool(upstream.requests) and upstream.requests[0].tokens >= (tokens or 0))
        process.send_signal(number)
        await upstream.until(lambda: upstream.requests[0].left is not None, seconds=LEAVE_SECONDS)
    assert upstream.requests[0].tokens < 1000


async def test_a_killed_application_frees_the_upstream(base_url: str, upstream: ScriptedUpstream) -> None:
    """A Python process killed in the middle of its loop frees the upstream as one that says good-bye does."""
    upstream.answer = chat_stream(1000, gap=0.01)
    code = (
        "import openai, sys\n"
        "client = openai.OpenAI(base_url=sys.argv[1], api_key='k')\n"
        "for chunk in client.chat.completions.create(model='m', messages=[], stream=True): pass"
    )
    async with trio.open_nursery() as nursery:
        argv = [sys.executable, "-c", code, base_url]
        process = await nursery.start(partial(trio.run_process, argv, env=clean_environment(), check=False))
        await upstream.until(lambda: bool(upstream.requests) and upstream.requests[0].tokens >= 3, seconds=30)
        process.kill()
        await upstream.until(lambda: upstream.requests[0].left is not None, seconds=LEAVE_SECONDS)
    assert upstream.requests[0].tokens < 1000
