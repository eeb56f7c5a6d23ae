"""The ceiling of memory: what the machine has, what a cgroup leaves of it, and what is made of that."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from serve_fakes import FakeGateway, serving, settings

from canal_trio.serve.limits import machine_memory, share_of, with_ceiling
from canal_trio.settings import Bounds, Settings

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/a.slice/canal.service\n", {"a.slice/canal.service/memory.max": "1048576"}, 1048576),
        ("0::/a.slice/canal.service\n", {"a.slice/canal.service/memory.max": "max", "a.slice/memory.max": "77"}, 77),
        ("0::/\n", {"memory.max": "88"}, 88),
        ("0::/a\n", {"b/memory.max": "1"}, MACHINE),
        ("9:pids:/\n4:memory:/a/b\n0::/\n", {"memory/a/memory.limit_in_bytes": "66"}, 66),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "9223372036854771712"}, MACHINE),
        (None, {}, MACHINE),
    ],
    ids=["own", "around", "container", "another", "version 1", "no limit", "no cgroups"],
)
def test_a_cgroup_may_leave_less(tmp_path: Path, cgroup: str | None, files: dict[str, str], expected: int) -> None:
    """The smallest number of our cgroup and those around it; a file that is not there or says "max" says nothing."""
    if cgroup is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        place = tmp_path / "sys/fs/cgroup" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{text}\n")
    assert machine_memory(str(tmp_path)) == expected
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
