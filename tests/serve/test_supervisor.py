"""The supervisor in this process, its workers in theirs: starts that fail, and what is left then."""

from __future__ import annotations

import os
import pathlib
import socket

import pytest
import trio

from canal_trio.errors import CanalError
from canal_trio.serve import WorkerError, workers
from canal_trio.serve.control import Ask, Drain, Reload, Reloaded, Report, Start
from canal_trio.serve.spawn import Worker
from canal_trio.settings import ServerTLS, Settings, Upstream

SETTINGS = Settings(
    listen=(("127.0.0.1", 0),), admin=None, workers=2, upstreams=(Upstream("up", "http://127.0.0.1:1"),)
)


def children() -> set[int]:
    """The processes that this one has started."""
    tasks = pathlib.Path(f"/proc/{os.getpid()}/task")
    return {int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()}


async def test_workers_that_cannot_listen_fail_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is a worker's own, there is one error for each at most, and no process is left."""
    before = children()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        async def careless(_addresses: object) -> list[socket.socket]:
            await trio.lowlevel.checkpoint()
            return [other.dup()]

        monkeypatch.setattr(workers, "reserve", careless)
        with trio.fail_after(30), pytest.raises(ExceptionGroup) as caught:
            await workers._supervise(SETTINGS, None)
    found = list(leaves(caught.value))
    assert 1 <= len(found) <= 2
    for exc in found:
        assert isinstance(exc, WorkerError)
        assert "the address is in use" in str(exc)
    assert children() <= before


def leaves(exc: BaseException) -> list[BaseException]:
    """The exceptions in a group."""
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for inner in exc.exceptions for leaf in leaves(inner)]
    return [exc]


async def live(worker: Worker, settings: Settings, address: tuple[str, int], *then: object) -> None:
    """Let it run one process with these first orders."""
    orders = [Start(worker.number, settings, [address]), *then]
    with trio.fail_after(30):
        await worker.live(lambda: orders, lambda: None)  # type: ignore[arg-type,return-value]  # messages


async def test_a_worker_says_why_it_cannot_start(tmp_path: pathlib.Path) -> None:
    """An address of another machine, certificates that are gone: the complaint reaches the supervisor."""
    worker = Worker(1)
    await live(worker, SETTINGS, ("192.0.2.1", 80))
    assert worker.complaint == "cannot listen on 192.0.2.1:80: this machine has no such address"
    assert (worker.code, worker.fate) == (1, "ended with exit code 1")
    tls = ServerTLS(str(tmp_path / "gone.pem"), str(tmp_path / "gone.key"))
    secure = Settings(tls=tls, upstreams=SETTINGS.upstreams)
    await live(worker, secure, ("127.0.0.1", 0))
    assert worker.complaint.startswith("server.tls.certificate: cannot read ")


async def test_a_worker_without_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no process can be started that is a complaint; orders and questions find nobody, at once."""

    async def lacking(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    worker = Worker(1)
    with monkeypatch.context() as patch:
        patch.setattr(trio.lowlevel, "open_process", lacking)
        await live(worker, SETTINGS, ("127.0.0.1", 0))
    assert worker.complaint == "cannot start a process: Resource temporarily unavailable"
    assert worker.code == 1
    await worker.say(Drain(), within=60)
    assert await worker.ask(Ask(0, "state"), Report, within=60) is None
    assert not worker.kill()


async def test_orders_before_it_accepts_are_obeyed_in_their_order() -> None:
    """Drain right behind Start: it serves, drains and ends with 0, and its last words are its metrics."""
    worker = Worker(1)
    await live(worker, SETTINGS, ("127.0.0.1", 0), Drain())
    assert (worker.complaint, worker.code) == ("", 0)
    assert "canal_exchanges_in_flight" in {family.name for family in worker.metrics}


async def test_a_worker_that_refuses_new_settings(tmp_path: pathlib.Path) -> None:
    """What it cannot apply it says, and keeps the old; cancelling `live` leaves no process."""
    before = children()
    worker = Worker(1)
    bad = Settings(tls=ServerTLS(str(tmp_path / "a"), str(tmp_path / "b")), upstreams=SETTINGS.upstreams)
    async with trio.open_nursery() as nursery:
        accepting = trio.Event()
        orders = [Start(1, SETTINGS, [("127.0.0.1", 0)])]
        nursery.start_soon(worker.live, lambda: orders, accepting.set)
        with trio.fail_after(30):
            await accepting.wait()
            answer = await worker.ask(Reload(bad), Reloaded, within=20)
            assert answer is not None
            assert answer.refusal.startswith("server.tls.certificate: cannot read ")
            report = await worker.ask(Ask(0, "state"), Report, within=20)
        assert report is not None
        assert report.ready
        assert worker.capacity is not None
        nursery.cancel_scope.cancel()
    assert worker.capacity is None
    assert children() <= before


def test_errors_are_canals() -> None:
    """What the command line shows as one line."""
    assert issubclass(WorkerError, CanalError)
