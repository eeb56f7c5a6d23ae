"""A request body that is held for another attempt: who gets what, to the step."""

from __future__ import annotations

import trio
import trio.testing

from canal_trio.gateway.body import Budget, HeldBody
from canal_trio.relay.flow import Ended, open_flow


async def test_a_piece_was_lost_for_the_next_attempt_with_the_task_that_was_woken_with_it() -> None:
    """What a source was woken with as it was superseded is the next one's, beyond the bound if need be; it is never
    told of an end, so what it sent so far cannot look complete."""
    sender, receiver = open_flow()
    budget = Budget(4)
    body = HeldBody(receiver, budget, 4)
    first = body.source()
    taken: list[list[bytes]] = []

    async def upload() -> None:
        taken.append(await first.take())
        taken.append(await first.take())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(upload)
        sender.put_nowait(b"1234")
        await trio.testing.wait_all_tasks_blocked()
        assert taken == [[b"1234"]]
        sender.put_nowait(b"5")
        sender.end()
        body.keep_back()
        await trio.testing.wait_all_tasks_blocked()
        assert len(taken) == 1
        assert (first.ending, first.take_nowait()) == (None, [])
        nursery.cancel_scope.cancel()
    assert body.replayable
    second = body.source()
    assert await second.take() == [b"1234", b"5"]
    assert isinstance(second.ending, Ended)
    assert budget.held == 5
    body.close()
    assert budget.held == 0
