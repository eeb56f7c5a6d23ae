"""systemd: the sockets it hands over, and what it is told; a fake manager, in this process."""

from __future__ import annotations

import itertools
import os
import pathlib
import signal
import socket
import time
from collections.abc import Iterator

import pytest
import trio
from serve_fakes import FakeGateway, read_all, refused, serving, settings
from systemd_kit import Manager, listener, own_pid

from canal_trio.errors import ConfigError
from canal_trio.serve import ListenError
from canal_trio.serve.systemd import Handed, Notifier, handed_over
from canal_trio.settings import Deadlines


@pytest.fixture
def first() -> Iterator[int]:
    """A number from which on two hundred descriptors are free."""
    number = 700
    assert not any(pathlib.Path(f"/proc/self/fd/{fd}").exists() for fd in range(number, number + 200))
    yield number
    assert not any(pathlib.Path(f"/proc/self/fd/{fd}").exists() for fd in range(number, number + 200))


def put(sock: socket.socket, fd: int) -> None:
    """The socket is descriptor `fd` from now on."""
    with sock:
        os.dup2(sock.fileno(), fd)


def test_variables_for_another_process_are_nobodys() -> None:
    """What a parent of ours was handed is not taken, and is not passed on to children."""
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "WATCHDOG_PID": "1", "WATCHDOG_USEC": "5", "HOME": "/"}
    handed = handed_over(environ)
    assert (handed.listening, handed.admin, handed.notifier.watchdog) == ([], [], None)
    assert environ == {"HOME": "/"}


def test_sockets_by_their_names(first: int) -> None:
    """Those named `admin` are for the admin pages, all others for clients; none blocks, and no child gets one."""
    for number in range(3):
        put(listener(), first + number)
    environ = {"LISTEN_PID": own_pid(), "LISTEN_FDS": "3", "LISTEN_FDNAMES": "canal.socket:admin"}
    handed = handed_over(environ, first=first)
    try:
        assert [sock.fileno() for sock in handed.listening] == [first, first + 2]
        assert [sock.fileno() for sock in handed.admin] == [first + 1]
        for sock in [*handed.listening, *handed.admin]:
            assert not sock.getblocking()
            assert not sock.get_inheritable()
    finally:
        handed.close()


@pytest.mark.parametrize("kind", ["datagrams", "unix", "connects", "file"])
def test_what_cannot_be_served_is_refused_by_name(first: int, kind: str, tmp_path: pathlib.Path) -> None:
    """A descriptor that is no listening TCP socket is an error that says which one, and nothing stays open."""
    put(listener(), first)
    if kind == "file":
        with (tmp_path / "f").open("w") as file:
            os.dup2(file.fileno(), first + 1)
    else:
        family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_DGRAM if kind == "datagrams" else socket.SOCK_STREAM)
        put(sock, first + 1)
    environ = {"LISTEN_PID": own_pid(), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:odd"}
    with pytest.raises(ListenError, match=rf"descriptor {first + 1} \(odd\), which is no "):
        handed_over(environ, first=first)
    if kind == "file":  # not a socket, so not ours to close
        os.close(first + 1)


@pytest.mark.parametrize("count", ["x", "-1", "257"])
def test_a_count_of_sockets_that_is_none(count: str) -> None:
    """Nonsense is an error, not a crash."""
    with pytest.raises(ListenError, match="LISTEN_FDS"):
        handed_over({"LISTEN_PID": own_pid(), "LISTEN_FDS": count})


@pytest.mark.parametrize(
    ("variables", "watchdog"),
    [
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": own_pid()}, 3.0),
        ({"WATCHDOG_USEC": "500000"}, 0.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdogs_time(variables: dict[str, str], watchdog: float | None) -> None:
    """It is ours only if it names us or nobody."""
    handed = handed_over({"NOTIFY_SOCKET": "@nobody-listens-here", **variables})
    assert handed.notifier.watchdog == watchdog
    handed.close()


async def test_signs_of_life_at_half_the_watchdogs_time(
    tmp_path: pathlib.Path, autojump_clock: trio.testing.MockClock
) -> None:
    """At once and then every half of it; the status comes along when it has changed, as one line."""
    texts = itertools.chain(["one", "one", "two\nlines"], itertools.repeat("two\nlines"))
    async with Manager(tmp_path) as manager, trio.open_nursery() as nursery:
        notifier = Notifier(manager.address, 3.0)
        began = trio.current_time()
        nursery.start_soon(notifier.beat, lambda: next(texts))
        for _ in range(4):
            await manager.told("WATCHDOG=1")
        assert trio.current_time() - began == 4.5
        nursery.cancel_scope.cancel()
    notifier.close()
    assert manager.messages == [
        ["WATCHDOG=1", "STATUS=one"], ["WATCHDOG=1"], ["WATCHDOG=1", "STATUS=two lines"], ["WATCHDOG=1"],
    ]  # fmt: skip


async def test_without_a_watchdog_only_news_are_told(
    tmp_path: pathlib.Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A status that stays is told once."""
    texts = iter(["one", "one", "two"])
    async with Manager(tmp_path) as manager, trio.open_nursery() as nursery:
        notifier = Notifier(manager.address)
        nursery.start_soon(notifier.beat, lambda: next(texts))
        await manager.told("STATUS=two", seconds=90)
        nursery.cancel_scope.cancel()
    notifier.close()
    assert manager.messages == [["STATUS=one"], ["STATUS=two"]]


async def test_a_manager_that_does_not_listen_stops_nobody(tmp_path: pathlib.Path) -> None:
    """Gone, never there, or with a full socket: telling it neither raises nor blocks; nobody to tell costs nothing."""
    absent = Notifier(str(tmp_path / "nowhere"))
    absent.ready("x")
    absent.close()
    absent.ready("x")
    full = Notifier(str(tmp_path / "deaf"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        for _ in range(5000):
            full.reloading()
    full.close()
    with trio.fail_after(5):
        await Notifier().beat(lambda: "x")


async def test_an_abstract_address() -> None:
    """`@name` is a name without a file."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"canal-trio-test-{os.getpid()}"
        manager.bind(f"\0{name}")
        handed = handed_over({"NOTIFY_SOCKET": f"@{name}"})
        handed.notifier.ready("here")
        handed.close()
        assert manager.recv(100) == b"READY=1\nSTATUS=here"


async def test_the_life_of_a_server_as_systemd_hears_it(tmp_path: pathlib.Path) -> None:
    """Ready when it accepts; reloading and ready again, also when the file is refused; stopping, with the time it may
    take."""
    answers = iter([settings(deadlines=Deadlines(drain=7)), ConfigError("canal.toml:3: bad")])

    def load() -> object:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async with Manager(tmp_path) as manager:
        handed = Handed(notifier=Notifier(manager.address, 30.0))
        async with serving(handed=handed, config_loader=load) as server:
            await manager.told("READY=1")
            assert not refused(server.address)
            assert manager.count("READY=1") == 1
            before = time.monotonic_ns() // 1000
            signal.raise_signal(signal.SIGHUP)
            message = await manager.told("RELOADING=1")
            assert before <= int(message[1].removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
            assert await manager.told("READY=1") == ["READY=1", "STATUS=reloaded the configuration"]
            assert len(server.gateway.reloads) == 1
            signal.raise_signal(signal.SIGHUP)
            await manager.told("RELOADING=1")
            [_, status] = await manager.told("READY=1")
            assert status.endswith("the old one stays: canal.toml:3: bad")
            client = await server.connect(b"stay")
            assert await client.receive_some() == b"hello\n"
            signal.raise_signal(signal.SIGTERM)
            message = await manager.told("STOPPING=1")
            assert message == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=12000000", "STATUS=draining"]
            signal.raise_signal(signal.SIGHUP)  # comes too late: systemd must not take us for alive again
            await server.logged("not reloaded: draining")
            await client.send_all(b"done\n")
            assert await read_all(client) == b"bye\n"
            with trio.fail_after(10):
                await server.ended.wait()
        assert server.code == 0
        assert manager.count("RELOADING=1") == 2


async def test_handed_over_sockets_are_used_instead_of_the_addresses() -> None:
    """Clients and the admin pages are served on them, and both are closed at the end."""
    handed = Handed([listener()], [listener()])
    for sock in [*handed.listening, *handed.admin]:
        sock.setblocking(False)
    places = [sock.getsockname() for sock in [*handed.listening, *handed.admin]]
    async with serving(settings(listen=(("192.0.2.1", 1),), admin=None), handed=handed) as server:
        assert [server.served.listen[0], server.served.admin[0]] == places
        async with await server.connect(b"hi") as client:
            assert await read_all(client) == b"echo hi\n"
        assert (await server.page("/livez"))[0] == 200
    assert all(map(refused, places))


async def test_a_queue_of_connections_is_served_after_the_start() -> None:
    """Who connected before we ran, to the socket that systemd holds, is served like anybody else."""
    early = listener()
    early.setblocking(False)
    clients = [await trio.open_tcp_stream(*early.getsockname()) for _ in range(20)]
    async with serving(settings(admin=None), handed=Handed([early]), make_gateway=FakeGateway):
        for client in clients:
            async with client:
                await client.send_all(b"hi\n")
                assert await read_all(client) == b"echo hi\n"
