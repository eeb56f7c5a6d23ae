"""Ports for programs that listen later."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from loadtest import processes
from loadtest.processes import free_port


@pytest.fixture
def five(monkeypatch: pytest.MonkeyPatch) -> range:
    """Five ports to give away, so that each case is met."""
    kernel = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]
    monkeypatch.setattr(processes, "_LOWEST_PORT", int(kernel) - 5)
    monkeypatch.setattr(processes, "_GIVEN", set())
    return range(int(kernel) - 5, int(kernel))


def test_a_gateway_and_its_admin_do_not_get_one_port(five: range):
    """No port is given twice, though nobody listens on it yet, and none that the kernel gives away."""
    assert sorted(free_port() for _ in five) == list(five)


def test_a_port_with_a_listener_is_not_free(five: range):
    """The others are given."""
    with socket.create_server(("127.0.0.1", five[2])):
        assert {free_port() for _ in range(4)} == set(five) - {five[2]}


def test_no_port_left(five: range):
    """Said, with where it looked."""
    for _ in five:
        free_port()
    with pytest.raises(OSError, match=f"no free port on 127.0.0.1 among 100 of {five[0]}..{five[-1]}"):
        free_port()


def test_a_kernel_that_gives_away_all(monkeypatch: pytest.MonkeyPatch):
    """Then it is one of those."""
    monkeypatch.setattr(processes, "_LOWEST_PORT", 61_000)
    assert free_port() >= 61_000
