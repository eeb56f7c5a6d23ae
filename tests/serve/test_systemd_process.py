"""systemd and the real program, alone and with workers: inherited sockets, restarts, signs of life, hung workers."""

from __future__ import annotations

import os
import pathlib
import signal
import socket

import pytest
import trio
from serve_fakes import read_all, refused
from serve_process import until
from systemd_kit import Manager, activated, listener
from workers_kit import BODY, CHAT, two_workers

from canal_trio.testing.scripts import chat_stream
from canal_trio.testing.upstreams import ScriptedUpstream


async def ask(address: tuple[str, int]) -> trio.SocketStream:
    """A client that has asked for a stream."""
    client = await trio.open_tcp_stream(*address)
    head = b"POST %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
    await client.send_all(head % (CHAT.encode(), len(BODY)) + BODY)
    return client


async def answer(client: trio.SocketStream) -> bytes:
    """All that it gets."""
    async with client:
        return await read_all(client)


@pytest.mark.parametrize("workers", [1, 2])
async def test_socket_activation(tmp_path: pathlib.Path, workers: int) -> None:
    """It serves on the socket it was handed, says where, tells that it is ready, lives, stops; the admin's, too."""
    sock, admin = listener(), listener()
    address = sock.getsockname()
    script = chat_stream(2)
    async with ScriptedUpstream(script) as upstream, Manager(tmp_path) as manager:
        early = await ask(address)  # nobody runs yet: the kernel keeps it
        told = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "400000"}
        flags = ("--upstream", upstream.base_url, "--workers", str(workers))
        async with activated([sock, admin], *flags, names="gateway:admin", environ=told) as process:
            await manager.told("READY=1")
            assert await process.address() == address
            assert await process.admin() == admin.getsockname()
            assert b"[DONE]" in await answer(early)
            for _ in range(6):
                assert b"[DONE]" in await answer(await ask(address))
            assert b"alive" in await until(await process.ask(admin.getsockname(), "/livez"), b"alive")
            before = manager.count("WATCHDOG=1")
            for _ in range(3):
                await manager.told("WATCHDOG=1")
            assert manager.count("WATCHDOG=1") == before + 3
            sock.close()
            admin.close()
            process.signal(signal.SIGTERM)
            assert (await manager.told("STOPPING=1"))[0] == "STOPPING=1"
            assert await process.ended() == 0
            assert refused(address)
            assert "Traceback" not in process.said
    assert manager.count("READY=1") == 1


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_restart_refuses_nobody(workers: int) -> None:
    """While systemd holds the socket, a client that comes between the end and the next start is served by the next."""
    sock = listener()
    address = sock.getsockname()
    async with ScriptedUpstream(chat_stream(2)) as upstream:
        flags = ("--upstream", upstream.base_url, "--workers", str(workers))
        async with activated([sock], *flags) as first:
            await first.address()
            assert b"[DONE]" in await answer(await ask(address))
            first.signal(signal.SIGTERM)
            assert await first.ended() == 0
        assert not refused(address)
        between = await ask(address)
        async with activated([sock], *flags) as second:
            await second.address()
            assert b"[DONE]" in await answer(between)
    sock.close()


async def test_a_descriptor_of_no_use_ends_the_start() -> None:
    """One line, exit code 1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as odd:
        async with activated([odd], "--upstream", "http://127.0.0.1:1", names="odd") as process:
            assert await process.ended() == 1
            await process.saying(r"^canal-trio: systemd handed over descriptor 3 \(odd\), which is no listening TCP")
            assert process.said.count("\n") == 1


async def test_workers_as_systemd_hears_them(tmp_path: pathlib.Path) -> None:
    """Ready once all accept, a status that counts them, and a reload with its time."""
    file = tmp_path / "canal.toml"
    file.write_text('[[upstream]]\nname = "up"\nbase_url = "http://127.0.0.1:1"\n')
    async with Manager(tmp_path) as manager:
        told = {"NOTIFY_SOCKET": manager.address}
        async with activated([], "--config", str(file), "--workers", "2", environ=told) as process:
            message = await manager.told("READY=1")
            assert message == ["READY=1", "STATUS=serving: 2 of 2 workers"]
            process.signal(signal.SIGHUP)
            assert (await manager.told("RELOADING=1"))[1].startswith("MONOTONIC_USEC=")
            await manager.told("READY=1")
            process.signal(signal.SIGTERM)
            assert "STATUS=draining: 2 of 2 workers" in await manager.told("STOPPING=1")
            assert await process.ended() == 0


async def test_a_hung_worker_is_killed_and_replaced(tmp_path: pathlib.Path) -> None:
    """A worker that answers nothing for `worker_answer` ends, a new one serves, and the other one's streams go on."""
    config = '[deadlines]\nworker_answer = "1s"\n'
    async with two_workers(config=config, folder=tmp_path) as workers:
        process = workers.process
        clients = await workers.spread()
        rows = await workers.streams()
        victim, other = workers.pids
        os.kill(victim, signal.SIGSTOP)
        found = await process.saying(r"worker (\d) died of SIGKILL \(it hung: .*\); a new one starts in 0\.1 s")
        lost = sum(row["worker"] == int(found[1]) for row in rows)
        await workers.reaches("canal_workers", 2)
        assert other in workers.pids
        assert victim not in workers.pids
        workers.go.set()
        whole = sum([b"[DONE]" in await read_all(client) for client in clients])
        assert whole == len(clients) - lost
        process.signal(signal.SIGTERM)
        assert await process.ended() == 0
        assert process.said.count("it hung") == 1
