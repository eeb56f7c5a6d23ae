"""TLS as its users have it: a file, the program, curl and the official SDK with an authority of their own."""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
from pathlib import Path

import httpx
import openai
import pytest
import trio
from serve_process import Process, running
from tls_kit import Authority, ask, until

from canal_trio.testing.scripts import Script, WaitFor, chat_stream
from canal_trio.testing.upstreams import ScriptedUpstream

pytestmark = pytest.mark.real


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Whom the clients trust."""
    return Authority(tmp_path)


def configured(authority: Authority, upstream: ScriptedUpstream) -> list[str]:
    """The arguments for a file that names its certificate relatively."""
    authority.issue("gateway")
    file = authority.folder / "canal.toml"
    file.write_text(
        '[server.tls]\ncertificate = "gateway.pem"\nkey = "gateway.key"\n'
        f'[[upstream]]\nname = "up"\nbase_url = "{upstream.base_url}"\n'
    )
    return ["--config", str(file)]


async def base_url(process: Process) -> str:
    """What one gives to an SDK; the line of the contract says https."""
    found = await process.saying(r"^listening on (https://127\.0\.0\.1:\d+)$")
    return f"{found[1]}/v1"


async def test_curl_with_cacert(authority: Authority) -> None:
    """The line of the README with `--cacert`: a stream, byte for byte."""
    script = chat_stream(5, gap=0.01)
    async with ScriptedUpstream(script) as upstream, running(*configured(authority, upstream)) as process:
        url = f"{await base_url(process)}/chat/completions"
        body = json.dumps({"model": "m", "messages": [], "stream": True})
        options = ["-q", "-N", "-s", "-S", "--cacert", authority.ca_file, "-H", "Content-Type: application/json"]
        with trio.fail_after(30):
            curl = await trio.run_process(["curl", *options, url, "-d", body], capture_stdout=True)
        assert curl.stdout == script.payload
        metrics = await process.ask(await process.admin(), "/metrics")
        page = await until(metrics, b'canal_tls_handshakes_total{result="ok"} 1.0')
        assert b'canal_pieces_total{path="handed_over"} 0.0' not in page


@pytest.mark.parametrize("kind", ["sync", "asyncio"])
async def test_the_sdk_with_a_custom_authority(authority: Authority, kind: str) -> None:
    """openai-python over httpx with a custom CA: two streams, whole."""
    script = chat_stream(6)
    context = ssl.create_default_context(cafile=authority.ca_file)
    async with ScriptedUpstream(script) as upstream, running(*configured(authority, upstream)) as process:
        options = {"base_url": await base_url(process), "api_key": "sk-test", "max_retries": 0, "timeout": 20}
        asked = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}
        texts: list[str] = []

        def plain() -> None:
            with (
                httpx.Client(verify=context) as http,
                openai.OpenAI(**options, http_client=http) as client,
            ):
                for _ in range(2):
                    chunks = client.chat.completions.create(**asked)
                    texts.extend(chunk.choices[0].delta.content or "" for chunk in chunks)

        async def on_asyncio() -> None:
            async with (
                httpx.AsyncClient(verify=context) as http,
                openai.AsyncOpenAI(**options, http_client=http) as client,
            ):
                for _ in range(2):
                    chunks = await client.chat.completions.create(**asked)
                    texts.extend([chunk.choices[0].delta.content or "" async for chunk in chunks])

        await trio.to_thread.run_sync(plain if kind == "sync" else lambda: asyncio.run(on_asyncio()))
        assert "".join(texts).split() == [f"word{number}" for number in range(6)] * 2
        assert upstream.requests[0].header("x-forwarded-proto") == "https"


async def test_sighup_reads_the_files_again(authority: Authority) -> None:
    """A new certificate in the same files; a bad one is refused with file and line; a stream lives through both."""
    go, whole = trio.Event(), chat_stream(3)
    script = Script((*whole.steps[:3], WaitFor(go), *whole.steps[3:]))
    async with ScriptedUpstream(script) as upstream, running(*configured(authority, upstream)) as process:
        address = await process.address()

        async def client() -> trio.SSLStream[trio.SocketStream]:
            raw = await process.connect(address)
            stream = trio.SSLStream(raw, authority.client, server_hostname="127.0.0.1", https_compatible=False)
            await stream.do_handshake()
            return stream

        streaming = await client()
        await streaming.send_all(ask())
        await until(streaming, b"word0")
        first = streaming.getpeercert(binary_form=True)
        authority.issue("gateway")
        process.signal(signal.SIGHUP)
        await process.saying("reloaded the configuration")
        second = (await client()).getpeercert(binary_form=True)
        assert second != first
        (authority.folder / "gateway.key").write_text("nothing")
        process.signal(signal.SIGHUP)
        await process.saying(r"the old one stays: \S+canal\.toml:3: server\.tls\.key: expected a file with a PEM priv")
        assert (await client()).getpeercert(binary_form=True) == second
        go.set()
        assert b"[DONE]" in await until(streaming, b"0\r\n\r\n")
        process.signal(signal.SIGTERM)
        assert await process.ended() == 0
        assert "Traceback" not in process.said
