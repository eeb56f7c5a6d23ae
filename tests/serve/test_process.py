"""The real program in its own process: start, drain, signals, reload, limits, exit codes."""

from __future__ import annotations

import json
import pathlib
import signal
import socket
import sys

import pytest
from serve_fakes import eventually, read_all, refused
from serve_process import fronting, running, until

from canal_trio.testing.scripts import Pause, Script, chat_stream
from canal_trio.testing.upstreams import ScriptedUpstream
from loadtest.processes import free_port

CHAT = "/v1/chat/completions"
BODY = b'{"model": "m", "stream": true, "messages": []}'
SHORT = chat_stream(3)


def _long(tokens: int = 40) -> Script:
    """A stream of about two seconds."""
    return chat_stream(tokens, gap=0.05)


def _endless() -> Script:
    """A stream that goes silent after its first tokens."""
    script = chat_stream(3)
    return Script((*script.steps[:3], Pause(600)))


async def test_streams_and_drains_on_sigterm() -> None:
    """SIGTERM in the middle of a stream: no new connection, the stream comes whole, the log line, exit code 0."""
    async with fronting(_long()) as (process, _):
        address = await process.address()
        client = await process.ask(address, CHAT, BODY)
        head = await until(client, b"word0")
        process.signal(signal.SIGTERM)
        await process.saying("draining: 1 exchange ")
        await eventually(lambda: refused(address))
        status = await until(await process.ask(await process.admin(), "/readyz"), b"draining")
        assert status.startswith(b"HTTP/1.1 503")
        body = head + await read_all(client)
        assert b"data: [DONE]" in body
        assert body.endswith(b"0\r\n\r\n")
        assert await process.ended() == 0
        await process.saying(r"POST /v1/chat/completions 200 completed .*events=4\d .*id=req_")
        assert "Traceback" not in process.said


async def test_the_drain_deadline_ends_honestly(tmp_path: pathlib.Path) -> None:
    """A stream that outlives the drain deadline gets the error event and no end, and the process exits with 0."""
    async with ScriptedUpstream(_endless()) as upstream:
        config = tmp_path / "canal.toml"
        config.write_text(
            f'[deadlines]\ndrain = "200ms"\n[[upstream]]\nname = "up"\nbase_url = "{upstream.base_url}"\n'
        )
        async with running("--config", str(config)) as process:
            client = await process.ask(await process.address(), CHAT, BODY)
            head = await until(client, b"word")
            process.signal(signal.SIGTERM)
            body = head + await read_all(client)
            assert b'"code":"gateway_draining"' in body.replace(b'": "', b'":"')
            assert b"[DONE]" not in body
            assert not body.endswith(b"0\r\n\r\n")
            assert await process.ended() == 0
            await process.saying(r" 200 drained phase=")


async def test_a_second_signal_stops_now() -> None:
    """The second Ctrl-C does not wait for the stream: exit code 1, at once, and no made-up end."""
    async with fronting(_endless()) as (process, upstream):
        client = await process.ask(await process.address(), CHAT, BODY)
        await until(client, b"word")
        process.signal(signal.SIGINT)
        await process.saying("signal again to stop now")
        process.signal(signal.SIGINT)
        assert await process.ended() == 1
        assert not (await read_all(client)).endswith(b"0\r\n\r\n")
        await upstream.until(lambda: upstream.open_connections == 0)
        assert "Traceback" not in process.said


async def test_reload_moves_new_requests_and_leaves_streams_alone(tmp_path: pathlib.Path) -> None:
    """SIGHUP with a good file moves new requests; a bad file is refused and the old one stays; streams go on."""
    config = tmp_path / "canal.toml"
    async with ScriptedUpstream(_long()) as first, ScriptedUpstream(SHORT) as second:
        config.write_text(f'[[upstream]]\nname = "up"\nbase_url = "{first.base_url}"\n')
        async with running("--config", str(config)) as process:
            address = await process.address()
            client = await process.ask(address, CHAT, BODY)
            head = await until(client, b"word0")
            config.write_text(f'[[upstream]]\nname = "up"\nbase_url = "{second.base_url}"\n')
            process.signal(signal.SIGHUP)
            await process.saying("reloaded the configuration")
            await read_all(await process.ask(address, CHAT, BODY))
            assert len(second.connections) == 1
            config.write_text('[[upstream]]\nname = "up"\nbase_url = "nonsense"\n')
            process.signal(signal.SIGHUP)
            await process.saying(
                r"configuration is refused, the old one stays: \S+canal.toml:3: upstream\[0\].base_url: expected"
            )
            await read_all(await process.ask(address, CHAT, BODY))
            assert len([request for one in second.connections for request in one.requests]) == 2
            assert b"data: [DONE]" in head + await read_all(client)
            process.signal(signal.SIGTERM)
            assert await process.ended() == 0


async def test_a_taken_port() -> None:
    """A port that is in use: one line that says so, exit code 1."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        async with running("--upstream", "http://127.0.0.1:1", "--listen", taken) as process:
            assert await process.ended() == 1
            await process.saying("in use")
            assert process.said == (
                f"canal-trio: cannot listen on {taken}: the address is in use; another program serves there; "
                "--listen HOST:PORT chooses another address\n"
            )


async def test_a_second_gateway_on_the_same_port() -> None:
    """Two gateways never share a port silently."""
    async with running("--upstream", "http://127.0.0.1:1") as first:
        host, port = await first.address()
        async with running("--upstream", "http://127.0.0.1:1", "--listen", f"{host}:{port}") as second:
            assert await second.ended() == 1


async def test_json_logs() -> None:
    """With --log json the access line is an object with the exchange's numbers, and no key is in it."""
    async with fronting(SHORT, "--log", "json") as (process, _):
        stream = await process.connect(await process.address())
        async with stream:
            await stream.send_all(
                b"POST /v1/chat/completions?key=sk-hunter2 HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-hunter2\r\n"
                b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)
            )
            await until(stream, b"[DONE]")
        line = await process.saying(r'^\{.*"kind":"exchange".*\}$')
        record = json.loads(line[0])
        assert (record["outcome"], record["status"], record["path"]) == ("completed", 200, CHAT)
        assert record["events"] >= 5
        assert record["first_byte"] > 0
        assert "hunter2" not in process.said


async def test_few_descriptors_bound_the_clients() -> None:
    """With few descriptors the gateway takes as many clients as it can serve, lets the others wait, and stays quiet."""
    command = ["/bin/sh", "-c", 'ulimit -n 256; exec "$@"', "sh", sys.executable, "-m", "canal_trio"]
    async with fronting(SHORT, command=command) as (process, _):
        address = await process.address()
        found = await process.saying(r"^capacity: (\d+) client connections \(256 descriptors\)$")
        slots = int(found[1])
        idle = [await process.connect(address) for _ in range(slots + 30)]
        last = await process.ask(address, CHAT, BODY)
        await process.saying(f"has all its {slots} connections: new ones wait")
        admin = await until(await process.ask(await process.admin(), "/metrics"), b"canal_accept_errors")
        assert b"canal_connections %d.0" % slots in admin
        for client in idle:
            await client.aclose()
        assert b"[DONE]" in await read_all(last)
        assert process.said.count("\n") < 12 + slots


async def test_the_gateway_port_serves_only_the_api() -> None:
    """The admin pages are not on the gateway's listener: there such a path goes to the upstream like any other."""
    async with fronting(SHORT) as (process, upstream):
        await read_all(await process.ask(await process.address(), "/metrics"))
        [connection] = upstream.connections
        assert connection.requests[0].target == "/v1/metrics"


async def test_streams_page_shows_what_runs() -> None:
    """/streams lists the exchange in flight, with its model, phase and counts."""
    async with fronting(_endless()) as (process, _):
        client = await process.ask(await process.address(), CHAT, BODY)
        await until(client, b"word")
        page = await read_all(await process.ask(await process.admin(), "/streams"))
        [view] = json.loads(page.partition(b"\r\n\r\n")[2])["exchanges"]
        assert view["phase"] == "stream"
        assert view["upstream"]
        assert view["events"] >= 1
        assert view["age"] > 0
        await client.aclose()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_stopping_an_idle_gateway(number: signal.Signals) -> None:
    """An idle gateway ends at once and cleanly on either signal, and says nothing odd."""
    async with running("--upstream", "http://127.0.0.1:1") as process:
        await process.address()
        process.signal(number)
        assert await process.ended() == 0
        await process.saying("stopped: every stream has ended")


async def test_a_closed_stderr_is_no_reason_to_stop() -> None:
    """When whoever read the log goes away the gateway serves on."""
    command = ["/bin/sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "canal_trio"]
    async with ScriptedUpstream(SHORT) as upstream:
        address = ("127.0.0.1", free_port())
        flags = ("--upstream", upstream.base_url, "--listen", f"127.0.0.1:{address[1]}")
        async with running(*flags, command=command) as process:
            await eventually(lambda: not refused(address), 20)
            client = await process.ask(address, CHAT, BODY)
            assert b"[DONE]" in await read_all(client)
            process.signal(signal.SIGTERM)
            assert await process.ended() == 0
