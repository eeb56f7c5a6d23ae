"""One serving process: start, drain, second signal, reload, and what the log says about them."""

from __future__ import annotations

import dataclasses
import json
import signal
import socket

import pytest
import trio
from serve_fakes import FakeGateway, eventually, read_all, refused, serving, settings

from canal_trio.errors import ConfigError
from canal_trio.serve import ListenError, serve
from canal_trio.settings import Bounds, Deadlines, Key, LimitStore, Upstream


async def test_serves_and_greets() -> None:
    """Connections are served, and the last line of the greeting says where, the others who we are."""
    async with serving() as server:
        async with await server.connect(b"hi") as client:
            assert await read_all(client) == b"echo hi\n"
        lines = (await server.logged("listening on")).splitlines()
        assert lines[0].startswith("canal-trio ")
        assert lines[1] == "upstream up: http://127.0.0.1:1"
        assert lines[2].startswith("capacity: ")
        assert lines[3] == f"admin on http://127.0.0.1:{server.served.admin[0][1]}"
        assert lines[4] == f"listening on http://127.0.0.1:{server.address[1]}"
        assert server.gateway.peers == ["127.0.0.1"]
        assert (await server.page("/readyz"))[0] == 200
        page = (await server.page("/metrics"))[1]
        assert b"canal_connection_slots 416.0" in page
        assert 5 < float(page.partition(b"\ncanal_tasks ")[2].split()[0]) < 100


async def test_greets_machines_in_json() -> None:
    """With JSON logs every line but the contract's `listening on` is an object."""
    async with serving(settings(log="json", admin=None)) as server:
        lines = (await server.logged("listening on")).splitlines()
        assert lines[-1] == f"listening on http://127.0.0.1:{server.address[1]}"
        assert {json.loads(line)["kind"] for line in lines[:-1]} == {"log"}


async def test_warns_of_what_is_open() -> None:
    """Off loopback a gateway without keys and an admin page without a lock are told; with keys only the latter."""
    everywhere = settings(listen=(("0.0.0.0", 0),), admin=("0.0.0.0", 0))
    async with serving(everywhere) as server:
        log = await server.logged("listening on")
        assert "warning: no keys are configured" in log
        assert "warning: the admin address can be reached from other machines" in log
    async with serving(dataclasses.replace(everywhere, keys=(Key("k", "00" * 32),))) as server:
        assert "no keys" not in await server.logged("listening on")


async def test_warns_of_too_few_descriptors() -> None:
    """Where the configuration asks for more connections than descriptors allow, the greeting says what is done."""
    async with serving(settings(bounds=Bounds(client_connections=5000))) as server:
        log = await server.logged("listening on")
        assert "warning: client_connections = 5000 needs more descriptors than the limit of 1024; 416 are" in log


async def test_a_taken_port_starts_nothing() -> None:
    """A taken address, the admin's too, is one plain error before anything else was opened or said."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()
        with pytest.raises(ListenError, match=r"in use.*; --listen HOST:PORT chooses another"):
            await serve(settings(listen=(taken,)), make_gateway=FakeGateway)
        with pytest.raises(ListenError, match=r"in use.*; --admin HOST:PORT puts the admin listener elsewhere"):
            await serve(settings(admin=taken), make_gateway=FakeGateway)


async def test_drain() -> None:
    """SIGTERM: not ready, nobody new, what runs may finish, then exit code 0."""
    async with serving() as server:
        client = await server.connect(b"stay")
        assert await client.receive_some() == b"hello\n"
        before = trio.current_time()
        signal.raise_signal(signal.SIGTERM)
        await eventually(lambda: server.gateway.draining)
        assert before + 30 <= server.gateway.deadline <= trio.current_time() + 30
        await eventually(lambda: refused(server.address))
        assert await server.page("/readyz") == (503, b"draining\n")
        assert not server.ended.is_set()
        await client.send_all(b"done\n")
        assert await read_all(client) == b"bye\n"
        with trio.fail_after(10):
            await server.ended.wait()
        assert server.code == 0
        assert refused(server.served.admin[0])
        log = server.log()
        assert "draining: 1 exchange has 30 seconds to finish" in log
        assert "stopped: every stream has ended" in log


async def test_drain_with_nothing_to_do_is_quick() -> None:
    """SIGINT on an idle server ends it with 0."""
    async with serving() as server:
        signal.raise_signal(signal.SIGINT)
        with trio.fail_after(10):
            await server.ended.wait()
        assert server.code == 0


async def test_the_deadline_ends_streams_honestly(autojump_clock: trio.testing.MockClock) -> None:
    """What has not finished at the drain deadline is ended by the gateway, and that is a clean stop."""
    async with serving() as server:
        client = await server.connect(b"stay")
        assert await client.receive_some() == b"hello\n"
        signal.raise_signal(signal.SIGTERM)
        assert await read_all(client) == b"drained\n"
        await server.ended.wait()
        assert server.code == 0
        assert trio.current_time() < 31


async def test_a_stream_that_will_not_end_is_cut(autojump_clock: trio.testing.MockClock) -> None:
    """A connection that outlives the deadline and its grace is cancelled, and the exit code tells."""
    async with serving() as server:
        client = await server.connect(b"stuck")
        assert await client.receive_some() == b"hello\n"
        signal.raise_signal(signal.SIGTERM)
        await server.ended.wait()
        assert server.code == 1
        assert server.gateway.cancelled == 1
        assert 30 < trio.current_time() < 40
        assert "stopped: some streams did not end in time" in server.log()
        await client.aclose()


async def test_a_second_signal_stops_now() -> None:
    """The second SIGTERM or SIGINT ends every stream at once, with exit code 1."""
    async with serving() as server:
        client = await server.connect(b"stay")
        assert await client.receive_some() == b"hello\n"
        signal.raise_signal(signal.SIGTERM)
        await eventually(lambda: server.gateway.draining)
        signal.raise_signal(signal.SIGINT)
        with trio.fail_after(5):
            await server.ended.wait()
        assert server.code == 1
        assert await read_all(client) == b""
        assert "stopped: told twice" in server.log()


async def test_a_bug_ends_one_connection_only() -> None:
    """An exception out of the gateway is one line and a count; the other connections live on."""
    async with serving() as server:
        other = await server.connect(b"stay")
        assert await other.receive_some() == b"hello\n"
        async with await server.connect(b"bug") as client:
            assert await read_all(client) == b""
        log = await server.logged("a bug ended a connection from 127.0.0.1: ValueError: a planted bug")
        assert "Traceback" not in log
        assert b"canal_internal_errors_total 1.0" in (await server.page("/metrics"))[1]
        await other.send_all(b"x")
        assert await read_all(other) == b"bye\n"


async def test_a_full_gateway_still_shows_itself() -> None:
    """With all its connections in use the gateway lets the next one wait, and the admin pages answer."""
    async with serving(settings(bounds=Bounds(client_connections=1))) as server:
        first = await server.connect(b"stay")
        assert await first.receive_some() == b"hello\n"
        second = await server.connect(b"hi")
        assert (await server.page("/livez"))[0] == 200
        await server.logged("has all its 1 connections: new ones wait")
        assert server.gateway.peers == ["127.0.0.1"]
        await first.send_all(b"x")
        assert await read_all(second) == b"echo hi\n"


async def test_reload() -> None:
    """SIGHUP swaps the settings while a stream runs; what needs a restart stays and is named."""
    new = settings(
        listen=(("127.0.0.1", 4),),
        log="json",
        limit_store=LimitStore(output_tokens=5),
        upstreams=(Upstream("other", "http://127.0.0.1:2"),),
        bounds=Bounds(client_connections=77, client_unsent_bytes=9999),
        deadlines=Deadlines(drain=5),
    )
    async with serving(config_loader=lambda: new) as server:
        client = await server.connect(b"stay")
        assert await client.receive_some() == b"hello\n"
        signal.raise_signal(signal.SIGHUP)
        log = await server.logged("needs a restart")
        assert "reloaded the configuration" in log
        assert "a change of listen needs a restart; the old value stays" in log
        [used] = server.gateway.reloads
        assert used.upstreams == new.upstreams
        assert used.listen == (("127.0.0.1", 0),)
        page = (await server.page("/metrics"))[1]
        assert b"canal_connection_slots 77.0" in page
        assert b'canal_reloads_total{result="ok"} 1.0' in page
        async with await server.connect(b"stay") as later:
            assert await later.receive_some() == b"hello\n"
            sock = server.gateway.streams[-1].socket
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 9999
        await client.send_all(b"x")
        assert await read_all(client) == b"bye\n"
        signal.raise_signal(signal.SIGTERM)
        await server.logged("have 5 seconds to finish")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (ConfigError("canal.toml:3: a\ncanal.toml:4: b"), ["canal.toml:3: a", "canal.toml:4: b"]),
        (RuntimeError("odd"), ["RuntimeError: odd ("]),
    ],
    ids=["bad file", "bug"],
)
async def test_a_bad_reload_changes_nothing(fault: Exception, words: list[str]) -> None:
    """A configuration that is refused is told line by line, counted, and the old one stays in use."""

    def loader():
        raise fault

    async with serving(config_loader=loader) as server:
        signal.raise_signal(signal.SIGHUP)
        for word in words:
            await server.logged(f"error: the new configuration is refused, the old one stays: {word}")
        assert server.gateway.reloads == []
        assert b'canal_reloads_total{result="refused"} 1.0' in (await server.page("/metrics"))[1]
        async with await server.connect(b"hi") as client:
            assert await read_all(client) == b"echo hi\n"


async def test_without_a_configuration_a_closed_terminal_ends_it() -> None:
    """Without a loader (the demo) there is nothing to read again: SIGHUP drains, like SIGTERM, and the port is free."""
    async with serving() as server:
        signal.raise_signal(signal.SIGHUP)
        with trio.fail_after(10):
            await server.ended.wait()
        assert server.code == 0
        assert refused(server.address)


async def test_a_reload_that_comes_too_late() -> None:
    """While draining SIGHUP is answered with a line, and does no harm."""
    async with serving(config_loader=settings) as server:
        client = await server.connect(b"stay")
        assert await client.receive_some() == b"hello\n"
        signal.raise_signal(signal.SIGTERM)
        await eventually(lambda: server.gateway.draining)
        signal.raise_signal(signal.SIGHUP)
        await server.logged("warning: not reloaded: draining")
        await client.send_all(b"done\n")
        assert await read_all(client) == b"bye\n"


async def test_reloads_do_not_overlap() -> None:
    """Signals during a reload lead to exactly one more, so that the last state of the file counts."""
    loads = 0
    started, go_on = trio.Event(), trio.Event()
    token = trio.lowlevel.current_trio_token()

    def loader():
        nonlocal loads
        loads += 1
        trio.from_thread.run_sync(started.set, trio_token=token)
        trio.from_thread.run(go_on.wait, trio_token=token)
        return settings()

    async with serving(config_loader=loader) as server:
        signal.raise_signal(signal.SIGHUP)
        await started.wait()
        for _ in range(3):
            signal.raise_signal(signal.SIGHUP)
            await trio.testing.wait_all_tasks_blocked()
        go_on.set()
        await eventually(lambda: len(server.gateway.reloads) == 2)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert loads == 2


async def test_cancelling_leaves_nothing_open() -> None:
    """Cancelled from outside, as the demo does, the server closes its listeners and its connections."""
    async with serving() as server:
        client = await server.connect(b"stay")
        assert await client.receive_some() == b"hello\n"
        server.keep_clients = True
    assert refused(server.address)
    assert refused(server.served.admin[0])
    async with client:
        assert await read_all(client) == b""
    assert server.code is None
