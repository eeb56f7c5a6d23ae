"""Active checks: who is asked how, what makes an upstream down and up, and that nothing is left of a check."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing
from several import answers, asked, named, ok, several, silent, talk
from simkit import OK, Conversation, Play, World

from canal_trio.settings import Health, Upstream

HEALTH = Health(check_interval=10.0, check_timeout=2.0, check_failures=2, slow_start=0.0)
SICK = b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n"


class Patient:
    """An upstream that serves everything and answers its checks as told."""

    def __init__(self, name: str = "u0") -> None:
        self.name = name
        self.says: Play = ok
        self.checks: list[tuple[float, bytes]] = []

    async def play(self, upstream: Conversation) -> None:
        """Serve one request."""
        request = upstream.requests[-1]
        if not request.startswith(b"GET /health"):
            await upstream.say(OK)
            return
        self.checks.append((trio.current_time(), request))
        await self.says(upstream)


@asynccontextmanager
async def watched(
    *patients: Patient, handover: bool, health: Health = HEALTH, others: tuple[Upstream, ...] = (), **options: Any
) -> AsyncIterator[World]:
    """A gateway before patients, which are checked, and others, which are not."""
    upstreams = [replace(named(1, check="/health?deep=1", **options)[0], name=patient.name) for patient in patients]
    plays: dict[str, Play] = {patient.name: patient.play for patient in patients}
    plays |= {other.name: ok for other in others}
    async with several(plays, *upstreams, *others, handover=handover, health=health) as here:
        await trio.testing.wait_all_tasks_blocked()
        yield here


def state(here: World, name: str = "u0") -> str:
    """As the metrics show it."""
    return here.gateway.statistics().upstreams[name].state


async def test_what_is_asked(autojump_clock: Any, handover: bool) -> None:
    """A GET of the path, at the root of the upstream, with its key; at once, then every interval, roughly."""
    patient = Patient()
    async with watched(patient, handover=handover, api_key="sk-ours") as here:
        await trio.sleep(45)
        assert state(here) == "usable"
        times = [at for at, _ in patient.checks]
        assert times[0] == pytest.approx(0, abs=0.1)
        assert all(9 <= after - before <= 11 for before, after in itertools.pairwise(times))
        request = patient.checks[0][1]
        assert request.startswith(b"GET /health?deep=1 HTTP/1.1\r\n")
        assert b"authorization: Bearer sk-ours\r\n".lower() in request.lower()
        assert b"host: u0.test\r\n" in request.lower()
        assert here.gateway.statistics().pools["u0"].dialled == 0, "a check takes none of the pool's connections"


@pytest.mark.parametrize("how", ["503", "silent", "refused", "cut", "garbage", "endless"])
async def test_down_and_up(autojump_clock: Any, handover: bool, how: str) -> None:
    """Two failed checks in a row are down: nobody is sent there; one good check is up again."""

    async def endless(upstream: Conversation) -> None:
        await upstream.say(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n" + b"x" * 3_000_000)

    async def cut(upstream: Conversation) -> None:
        upstream.stream.close()

    async def garbage(upstream: Conversation) -> None:
        await upstream.say(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")

    ways: dict[str, Play] = {
        "503": answers(503),
        "silent": silent,
        "cut": cut,
        "garbage": garbage,
        "endless": endless,
        "refused": ok,
    }
    patient = Patient()
    async with watched(patient, handover=handover, others=named(2)[1:]) as here:
        patient.says = ways[how]
        if how == "refused":
            here.refusing.add("u0")
        await trio.sleep(13)
        assert state(here) == "usable", "one failed check is an accident"
        await trio.sleep(13)
        assert state(here) == "down"
        assert (await talk(here)).status == 200
        assert asked(here)["u1"] == 1
        patient.says = ok
        here.refusing.clear()
        await trio.sleep(13)
        assert state(here) == "usable"
        assert (await talk(here)).status == 200
        assert asked(here)["u1"] == 1


async def test_ready_means_that_an_upstream_is_usable(autojump_clock: Any, handover: bool) -> None:
    """With every upstream down the gateway is not ready, and says so to clients at once; then it is again."""
    patient = Patient()
    patient.says = answers(503)
    async with watched(patient, handover=handover) as here:
        assert here.gateway.ready(), "nothing is known yet"
        await trio.sleep(13)
        assert not here.gateway.ready()
        response = await talk(here)
        assert (response.status, response.error["code"]) == (503, "upstream_unavailable")
        assert response.header("retry-after") == "1"
        patient.says = ok
        await trio.sleep(13)
        assert here.gateway.ready()
        assert (await talk(here)).status == 200


@pytest.mark.parametrize(("status", "well"), [(200, True), (204, True), (302, True), (401, False), (404, False)])
async def test_which_answers_are_well(autojump_clock: Any, handover: bool, status: int, well: bool) -> None:
    """200 to 399."""
    patient = Patient()
    patient.says = answers(status, body=b"")
    async with watched(patient, handover=handover) as here:
        await trio.sleep(25)
        assert (state(here) == "usable") is well


async def test_a_slow_check_is_given_up_and_made_again(autojump_clock: Any, handover: bool) -> None:
    """After its timeout its connection is closed; the next one comes at its time, and one check runs at a time."""
    patient = Patient()
    patient.says = silent
    async with watched(patient, handover=handover) as here:
        for _ in range(60):  # their times are spread by chance
            if len(patient.checks) < 4:
                await trio.sleep(1)
        await trio.sleep(5)  # the fourth is over, and the next has not begun
        times = [at for at, _ in patient.checks]
        assert len(times) == 4
        assert all(11 <= after - before <= 13 for before, after in itertools.pairwise(times))
        assert [one.left is not None for one in here.conversations[:3]] == [True] * 3


async def test_a_reload_changes_who_is_checked(autojump_clock: Any, handover: bool) -> None:
    """Checks stop with their configuration, in the middle of one too, and a word about who is no longer checked is
    forgotten; what is new is checked at once."""
    patient, other = Patient("u0"), Patient("u1")
    patient.says = silent
    async with watched(patient, other, handover=handover) as here:
        await trio.sleep(20)
        assert state(here) == "down"
        unchecked = tuple(replace(upstream, check=None) for upstream in here.gateway.settings.upstreams)
        here.gateway.reload(replace(here.gateway.settings, upstreams=unchecked))
        await trio.testing.wait_all_tasks_blocked()
        assert all(one.left is not None for one in here.conversations)
        counts = len(patient.checks), len(other.checks)
        await trio.sleep(100)
        assert (len(patient.checks), len(other.checks)) == counts
        assert state(here) == "usable"
        again = (unchecked[0], replace(unchecked[1], check="/health"))
        here.gateway.reload(replace(here.gateway.settings, upstreams=again))
        await trio.testing.wait_all_tasks_blocked()
        assert len(other.checks) == counts[1] + 1


async def test_a_bug_in_a_check_ends_nothing(
    autojump_clock: Any, handover: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and counts as a failed check."""

    async def broken(*_args: object, **_more: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("canal_trio.gateway.checks.fetch", broken)
    async with watched(Patient(), handover=handover, others=named(2)[1:]) as here:
        await trio.sleep(25)
        assert state(here) == "down"
        assert "a bug" in caplog.text
        assert (await talk(here)).status == 200


async def test_without_a_path_nobody_is_asked(autojump_clock: Any, handover: bool) -> None:
    """Off by default."""
    async with several({"u0": ok}, handover=handover, health=HEALTH) as here:
        await trio.sleep(1000)
        assert not here.conversations


async def test_down_and_up_are_logged(autojump_clock: Any, handover: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Once each, with the reason."""
    caplog.set_level("INFO", "canal_trio.gateway")
    patient = Patient()
    patient.says = answers(503)
    async with watched(patient, handover=handover):
        await trio.sleep(50)
        patient.says = ok
        await trio.sleep(30)
    lines = [record.getMessage() for record in caplog.records if "upstream u0" in record.getMessage()]
    assert lines == ["upstream u0 is down: It answered 503.", "upstream u0 is up again"]
