"""Several workers, as real processes: spread, merged pages, deaths, reloads, and who may have the address."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import socket
import sys

import pytest
import trio
from serve_fakes import read_all, refused
from serve_process import running
from tls_kit import Authority
from workers_kit import BODY, CHAT, Workers, two_workers

from canal_trio.testing.scripts import chat_stream
from canal_trio.testing.upstreams import ScriptedUpstream


async def process_connect(workers: Workers, request: bytes) -> bytes:
    """The answer to raw bytes."""
    client = await workers.process.connect(await workers.process.address())
    await client.send_all(request)
    return await read_all(client)


async def test_connections_spread_and_pages_are_merged() -> None:
    """Both workers serve; one page of metrics and one list of streams tell of both; the first line comes once."""
    async with two_workers() as workers:
        clients = await workers.spread()
        count = len(clients)
        rows = await workers.streams()
        assert len(rows) == count
        assert {row["worker"] for row in rows} == {1, 2}
        assert [row["age"] for row in rows] == sorted((row["age"] for row in rows), reverse=True)
        assert await workers.metric("canal_exchanges_in_flight") == count
        assert await workers.metric("canal_workers") == 2
        assert await workers.page("/readyz") == b"ready\n"
        assert await workers.page("/livez") == b"alive\n"
        workers.go.set()
        for client in clients:
            assert b"[DONE]" in await read_all(client)
        await workers.reaches('canal_responses_total{status="200"}', count)
        await workers.reaches('canal_exchange_duration_seconds_count{streamed="true"}', count)
        page = (await workers.page("/metrics")).decode()
        bound = re.search(r'canal_exchange_duration_seconds_bucket\{le="\+Inf",streamed="true"\} (\S+)', page)
        assert bound
        assert float(bound[1]) == count
        for worker in ("1", "2", "supervisor"):
            assert f'process_resident_memory_bytes{{worker="{worker}"}}' in page
        assert page.count("canal_build_info{") == 1
        workers.process.signal(signal.SIGTERM)
        assert await workers.process.ended() == 0
        assert workers.process.said.count("listening on ") == 1
        assert "Traceback" not in workers.process.said


async def test_a_killed_worker_loses_its_own_streams_only() -> None:
    """SIGKILL of one: the other's streams go on to their end, a new worker takes its place, counters do not fall."""
    async with two_workers() as workers:
        clients = await workers.spread()
        rows = await workers.streams()
        await workers.reaches("canal_exchanges_in_flight", len(clients))
        refused_head = await process_connect(workers, b"GET / HTTP/1.1\r\n\r\n")  # without Host: answered here
        assert refused_head.startswith(b"HTTP/1.1 400 ")
        page = (await workers.page("/metrics")).decode()
        before = sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("canal_responses_total"))
        assert before == 1
        victim = workers.pids[0]
        os.kill(victim, signal.SIGKILL)
        found = await workers.process.saying(r"worker (\d) died of SIGKILL; a new one starts in 0\.1 s")
        lost = sum(row["worker"] == int(found[1]) for row in rows)
        assert 0 < lost < len(clients)
        await workers.reaches("canal_workers", 2)
        assert victim not in workers.pids
        assert len(workers.pids) == 2
        workers.go.set()
        whole = 0
        for client in clients:
            whole += b"[DONE]" in await read_all(client)
        assert whole == len(clients) - lost
        await workers.reaches('canal_responses_total{status="200"}', whole)
        page = (await workers.page("/metrics")).decode()
        after = sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("canal_responses_total"))
        assert after == whole + before
        assert await workers.metric("canal_worker_restarts_total") == 1
        address = await workers.process.address()
        for _ in range(8):
            assert b"[DONE]" in await read_all(await workers.process.ask(address, CHAT, BODY))
        workers.process.signal(signal.SIGTERM)
        assert await workers.process.ended() == 0, "the successor drained cleanly"


async def test_reload_swaps_settings_in_each_worker(tmp_path: pathlib.Path) -> None:
    """One SIGHUP moves new requests of both workers; a bad file is refused once; no process and no stream ends."""
    async with two_workers(config="", folder=tmp_path) as workers, ScriptedUpstream(chat_stream(1)) as other:
        process = workers.process
        address = await process.address()
        clients = await workers.spread()
        pids = workers.pids
        file = tmp_path / "canal.toml"
        file.write_text(f'[[upstream]]\nname = "up"\nbase_url = "{other.base_url}"\n')
        process.signal(signal.SIGHUP)
        await process.saying("reloaded the configuration")
        seen = len(workers.upstream.requests)
        for _ in range(12):
            assert b"[DONE]" in await read_all(await process.ask(address, CHAT, BODY))
        assert len(other.requests) == 12
        assert len(workers.upstream.requests) == seen
        file.write_text('[[upstream]]\nname = "up"\nbase_url = "nonsense"\n')
        process.signal(signal.SIGHUP)
        await process.saying(r"the new configuration is refused, the old one stays: \S+canal\.toml:3: upstream")
        assert b"[DONE]" in await read_all(await process.ask(address, CHAT, BODY))
        assert workers.pids == pids
        workers.go.set()
        for client in clients:
            assert b"[DONE]" in await read_all(client)
        assert await workers.metric('canal_reloads_total{result="ok"}') == 1
        assert await workers.metric('canal_reloads_total{result="refused"}') == 1
        process.signal(signal.SIGTERM)
        assert await process.ended() == 0
        assert process.said.count("refused") == 1
        assert process.said.count("reloaded the configuration") == 1


async def test_a_successor_has_the_settings_of_now(tmp_path: pathlib.Path) -> None:
    """A worker that is started after a reload, and after the file became bad, serves what was last accepted."""
    async with two_workers(config="", folder=tmp_path) as workers, ScriptedUpstream(chat_stream(1)) as other:
        process = workers.process
        file = tmp_path / "canal.toml"
        file.write_text(f'[[upstream]]\nname = "up"\nbase_url = "{other.base_url}"\n')
        process.signal(signal.SIGHUP)
        await process.saying("reloaded the configuration")
        file.write_text("nonsense")
        for pid in workers.pids:
            os.kill(pid, signal.SIGKILL)
        await process.saying("worker 1 died of SIGKILL")
        await process.saying("worker 2 died of SIGKILL")
        await workers.reaches("canal_workers", 2)
        for _ in range(8):
            assert b"[DONE]" in await read_all(await process.ask(await process.address(), CHAT, BODY))
        assert len(other.requests) == 8


@pytest.mark.parametrize("taken_by", ["another program", "workers"])
async def test_a_taken_address(taken_by: str) -> None:
    """Whoever serves there, even workers who would share the port: one line, exit code 1, no worker left."""
    async with two_workers() as workers:
        host, port = await workers.process.address()
        with socket.socket() as other:
            if taken_by == "another program":
                other.bind((host, 0))
                other.listen()
                port = other.getsockname()[1]
            command = [
                sys.executable,
                "-m",
                "canal_trio",
                "serve",
                "--upstream",
                "http://127.0.0.1:1",
                "--workers",
                "2",
            ]
            command += ["--admin", "off", "--listen", f"{host}:{port}"]
            with trio.fail_after(20):
                done = await trio.run_process(command, check=False, capture_stderr=True)
        assert done.returncode == 1
        said = done.stderr.decode()
        assert f"cannot listen on {host}:{port}: the address is in use" in said
        assert len(said.splitlines()) == 1
        assert not refused(await workers.process.address())


async def test_workers_speak_tls(tmp_path: pathlib.Path) -> None:
    """Certificates go to every worker, and SIGHUP swaps them in each."""
    authority = Authority(tmp_path)
    authority.issue("gw")
    table = '[server.tls]\ncertificate = "gw.pem"\nkey = "gw.key"\n'
    async with two_workers(config=table, folder=tmp_path) as workers:
        process = workers.process
        await process.saying(r"^listening on https://")

        async def shown() -> set[bytes]:
            found: set[bytes] = set()
            for _ in range(12):
                raw = await process.connect(await process.address())
                stream = trio.SSLStream(raw, authority.client, server_hostname="127.0.0.1")
                await stream.do_handshake()
                found.add(stream.getpeercert(binary_form=True))
            return found

        before = await shown()
        assert len(before) == 1
        authority.issue("gw")
        process.signal(signal.SIGHUP)
        await process.saying("reloaded the configuration")
        after = await shown()
        assert len(after) == 1
        assert before != after
        assert await workers.metric('canal_tls_handshakes_total{result="ok"}') == 24


async def test_auto_is_one_per_processor() -> None:
    """`auto` counts the processors that this process may use."""
    async with running("--upstream", "http://127.0.0.1:1", "--workers", "auto") as process:
        await process.address()
        await process.saying("capacity: ")
        count = len(os.sched_getaffinity(0))
        assert (f"in each of {count} workers" in process.said) is (count > 1)
        process.signal(signal.SIGTERM)
        assert await process.ended() == 0


async def test_a_worker_without_a_supervisor_ends() -> None:
    """A control channel that ends before the first order is the end of the worker."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-m", "canal_trio", "worker", str(theirs.fileno())]
        ours.shutdown(socket.SHUT_RDWR)
        with trio.fail_after(20):
            done = await trio.run_process(command, check=False, capture_stderr=True, pass_fds=[theirs.fileno()])
    assert done.returncode == 1
    assert done.stderr == b""


async def test_a_worker_that_hangs_does_not_hide_the_others(tmp_path: pathlib.Path) -> None:
    """A stopped process: the pages tell of the others, and the end kills it."""
    async with two_workers(config="", folder=tmp_path) as workers:
        process = workers.process
        os.kill(workers.pids[0], signal.SIGSTOP)
        assert await workers.page("/readyz") == b"ready\n"
        process.signal(signal.SIGTERM)
        await process.saying("draining: 2 workers")
        process.signal(signal.SIGTERM)
        assert await process.ended() == 1
        assert re.search(r"worker \d did not end in time: killed", process.said)


async def test_access_log_lines_of_both_workers_are_whole(tmp_path: pathlib.Path) -> None:
    """Every line that reaches the common stderr is one JSON object."""
    async with two_workers("--log", "json") as workers:
        workers.go.set()
        address = await workers.process.address()
        clients = [await workers.process.ask(address, CHAT, BODY) for _ in range(40)]
        for client in clients:
            assert b"[DONE]" in await read_all(client)
        workers.process.signal(signal.SIGTERM)
        assert await workers.process.ended() == 0
        said = [line for line in workers.process.said.splitlines() if not line.startswith("listening on ")]
        assert sum(json.loads(line)["kind"] == "exchange" for line in said) == 40
