"""What a flow holds, counted in bytes: nothing is forgotten, nothing is counted twice, nothing is left at the end."""

from __future__ import annotations

import contextlib

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from canal_trio.relay.flow import FlowReceiver, FlowSender, Meter, open_flow


def metered(capacity: int = 4, piece_bytes: int = 100) -> tuple[FlowSender, FlowReceiver, Meter]:
    """A flow with a meter of its own."""
    meter = Meter()
    return (*open_flow(capacity, piece_bytes=piece_bytes, handover_bytes=200, meter=meter), meter)


async def test_from_the_channel_to_the_hand_and_out() -> None:
    """A piece counts in the channel and in the receiver's hand, until the receiver comes back for more."""
    sender, receiver, meter = metered()
    sender.put_nowait(b"x" * 10)
    sender.put_nowait(b"y" * 20)
    assert meter.bytes == 30
    assert await receiver.take() == [b"x" * 10, b"y" * 20]
    assert meter.bytes == 30
    assert receiver.take_nowait() == []
    assert meter.bytes == 0
    sender.put_nowait(b"z")
    sender.end()
    await receiver.take()
    receiver.close()
    assert meter.bytes == 0


async def test_two_flows_count_together() -> None:
    """A meter adds up all the flows that were opened with it; others are none of its business."""
    meter = Meter()
    flows = [open_flow(meter=meter) for _ in range(2)]
    open_flow()[0].put_nowait(b"other")
    for sender, _ in flows:
        sender.put_nowait(b"12345")
    assert meter.bytes == 10
    flows[0][1].close()
    assert meter.bytes == 5
    flows[1][1].close()
    flows[1][1].close()
    assert meter.bytes == 0


async def test_a_piece_that_goes_straight_through_is_not_held() -> None:
    """Handed over, it counts for nothing; kept by the sink, it counts until the receiver has dealt with it."""
    sender, receiver, meter = metered()
    answers = [True, False]

    async def receive() -> None:
        assert await receiver.take(lambda _piece: answers.pop(0)) == []
        assert meter.bytes == 150
        assert receiver.take_nowait() == []
        assert meter.bytes == 0

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        sender.put_nowait(b"x" * 200)
        assert meter.bytes == 0
        sender.put_nowait(b"x" * 150)
        assert meter.bytes == 150


@pytest.mark.parametrize("close_first", [False, True])
async def test_a_put_that_waits(close_first: bool) -> None:
    """It is counted once, whether it is noted before or after the receiver has taken it or closed."""
    sender, receiver, meter = metered(capacity=1)
    sender.put_nowait(b"a" * 10)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.put, b"b" * 100)
        await trio.testing.wait_all_tasks_blocked()
        assert meter.bytes == 110
        assert receiver.take_nowait() == [b"a" * 10, b"b" * 100]  # the second one moved up as the first one went
        if close_first:
            receiver.close()
    assert meter.bytes == (0 if close_first else 110)
    receiver.close()
    assert meter.bytes == 0


STEPS = st.lists(st.tuples(st.sampled_from(["put", "wait", "take", "end", "abort"]), st.integers(1, 300)), max_size=30)


@given(STEPS, st.integers(1, 4))
def test_nothing_is_left(steps: list[tuple[str, int]], capacity: int) -> None:
    """Whatever happened, a closed flow counts for nothing, and an open one for what is in it and in the hand."""

    async def main() -> None:
        sender, receiver, meter = metered(capacity)

        async def put(size: int) -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await sender.put(b"x" * size)

        async with trio.open_nursery() as nursery:
            waiting = False
            for step, size in steps:
                if step == "put" and not waiting and 0 < size <= sender.room and sender.room:
                    await put(size)
                elif step == "wait" and not waiting:
                    waiting = True
                    nursery.start_soon(put, size)
                elif step == "take":
                    receiver.take_nowait()
                elif step in ("end", "abort"):
                    getattr(sender, step)()
                await trio.testing.wait_all_tasks_blocked()
                held = receiver.statistics().held
                assert 0 <= meter.bytes <= (2 * capacity + 2) * 100
                assert held == 0 or meter.bytes >= held
            receiver.close()
            nursery.cancel_scope.cancel()
        assert meter.bytes == 0

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
