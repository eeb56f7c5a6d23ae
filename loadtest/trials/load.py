"""Customers for as long as something goes on, then until what they have begun is over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from loadtest.trials.customers import Customers

__all__ = ["lasting", "load"]


def load(
    customers: Customers, count: int, during: Callable[[], Awaitable[object]], say: Callable[[str], None]
) -> None:
    """`count` clients while `during` runs. Raises what it raises."""

    async def tell() -> None:
        while True:
            told = ", ".join(f"{number} {name}" for name, number in customers.outcomes.most_common())
            say(f"{customers.inside} inside; {told}")
            await trio.sleep(1.0)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell)
            async with trio.open_nursery() as clients:
                clients.start_soon(customers.run, count)
                await during()
                customers.stop()
            nursery.cancel_scope.cancel()

    trio.run(main)
    missing = customers.begun - len(customers.visits)
    assert not missing, f"{missing} requests without an outcome"


def lasting(seconds: float, each_second: Callable[[], object] = lambda: None) -> Callable[[], Awaitable[None]]:
    """Something that goes on for so long."""

    async def wait() -> None:
        end = trio.current_time() + seconds
        while (left := end - trio.current_time()) > 0:
            each_second()
            await trio.sleep(min(left, 1.0))

    return wait
