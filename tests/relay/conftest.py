"""The streams that can hand over: every test of the protocol runs on each of them."""

from __future__ import annotations

import pytest
from relay_pairs import sim_pair, tcp_pair


@pytest.fixture(params=[tcp_pair, sim_pair], ids=["tcp", "sim"])
async def pair(request):
    """Two connected streams that can hand over, closed in the end."""
    streams = await request.param()
    yield streams
    for stream in streams:
        stream.close()
