"""The streams that can hand over: every test of the protocol runs on each of them."""

from __future__ import annotations

import pytest
from relay_pairs import sim_pair, tcp_pair

from canal_trio.relay import wait_in_poller


@pytest.fixture(params=[tcp_pair, sim_pair], ids=["tcp", "sim"])
async def pair(request):
    """Two connected streams that can hand over, closed in the end."""
    streams = await request.param()
    yield streams
    for stream in streams:
        stream.close()


@pytest.fixture(params=["in_trio", "in_poller"])
async def waits(request, nursery):
    """The run waits in Trio's epoll, as ever, or in the poller's."""
    if request.param == "in_poller":
        await nursery.start(wait_in_poller)
