"""Two workers against one: both are measured under the same loads, and both workers carry streams."""

from __future__ import annotations

import pytest

from loadtest import workers


def test_two_workers_are_measured_against_one(monkeypatch: pytest.MonkeyPatch):
    """Each kind has a cost per round, and the streams of the last part are spread over two processes."""
    monkeypatch.setattr(workers, "STREAMS", 20)
    result = workers.workers(lambda _text: None, rounds=1, many=100, shorter=0.1)
    assert [len(row) for row in result["cpu_us_per_event"].values()] == [1, 1, 1]
    assert result["ratios"]["one"] == 1.0
    many = result["many"]
    assert many["streams"] == 100
    assert many["errors"] == {}
    assert len(many["descriptors_of_each_worker"]) == 2
    assert min(many["descriptors_of_each_worker"]) > 40  # of which some twenty are not streams
    assert "two workers, 100 streams" in workers.shown(result)
