"""What the edge costs is measured on a gateway that really refuses: the measuring finds out one that does not."""

from __future__ import annotations

import pytest

from loadtest import edge


def test_it_measures_refusals_and_idle_connections(monkeypatch: pytest.MonkeyPatch):
    """Over TLS and without, with the refusal that was meant; a gateway that lets everybody in is no measurement."""
    monkeypatch.setattr(edge, "SETTLE", 0.2)
    assert edge._idle(20, tls=True, asked=True) > 0
    with pytest.raises(AssertionError, match="not the refusal that was expected"):
        edge._shed("exchanges = 1\nwaiters = 0", 1, b"upstream_unavailable", 1)
    text = edge.shown({"shed_us": {"this": 12.3}, "idle_bytes": {"that": 4096}})
    assert [line.split()[:3] for line in text.splitlines()] == [["this", "12", "µs"], ["that", "4.0", "KiB"]]
