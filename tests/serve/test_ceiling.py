"""The ceiling of memory: what the machine has, what a cgroup leaves of it, and what is made of that."""

from __future__ import annotations

import os
from pathlib import Path

from serve_fakes import FakeGateway, serving, settings

from canal_trio.serve.limits import machine_memory, share_of, with_ceiling
from canal_trio.settings import Bounds, Settings

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_cgroup_may_leave_less(tmp_path: Path) -> None:
    """The smallest number counts; a file that is not there or says "max" says nothing."""
    files = {"small": "1048576\n", "max": "max\n", "huge": "9223372036854771712\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert machine_memory([str(tmp_path / name) for name in ("none", "max", "huge")]) == MACHINE
    assert machine_memory([str(tmp_path / name) for name in ("huge", "small")]) == 1048576
    assert 0 < machine_memory() <= MACHINE


def test_half_of_it_is_for_bodies_and_flows() -> None:
    """Unless a number was given; several workers share it."""
    bounds = with_ceiling(Settings()).bounds
    assert bounds.memory_bytes == machine_memory() // 2
    given = Settings(bounds=Bounds(memory_bytes=4000))
    assert with_ceiling(given) is given
    assert share_of(given, 0, 4).bounds.memory_bytes == 1000
    assert share_of(Settings(), 1, 4).bounds.memory_bytes == machine_memory() // 8


async def test_a_served_gateway_has_a_number() -> None:
    """Whoever serves decides it: the gateway is made with one."""
    async with serving(settings()) as server:
        assert isinstance(server.gateway, FakeGateway)
        assert server.gateway.settings.bounds.memory_bytes == machine_memory() // 2
