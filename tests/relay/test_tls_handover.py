"""TLS streams: hand-over through them, and any cut of the bytes."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from tls_pairs import read_all, sim_tls, wrapped
from trio.testing import MockClock

from canal_trio.relay.tls import RECORDS, TlsStream
from canal_trio.testing.simstream import Fault, FaultKind, SimLink, sim_stream_pair

# -- hand-over ---------------------------------------------------------------------------------------------------------


async def test_a_sink_gets_what_was_there_before_it_was_armed():
    """Decrypted bytes that nobody asked for are served although the transport is silent."""
    async with sim_tls() as (client, server):
        await server.send_all(b"abcdef")
        assert await client.receive_some(1) == b"a"
        found = []

        def sink() -> bool:
            found.append(client.try_receive(2))
            return len(found) < 3

        client.arm(sink)
        await client.wait_disarmed()
        assert found == [b"bc", b"de", b"f"]


async def test_a_sink_is_served_in_the_transports_step_and_disarmed_by_a_cancel(autojump_clock):
    """Each arrival reaches the sink without waking the owner; after the cancel it is not called again."""
    async with sim_tls() as (client, server):
        found = []

        def sink() -> bool:
            if (data := client.try_receive(100)) is not None:
                found.append(data)
            return True

        async def own(task_status):
            client.arm(sink)
            task_status.started()
            await client.wait_disarmed()

        async with trio.open_nursery() as nursery:
            await nursery.start(own)
            with pytest.raises(trio.BusyResourceError):
                client.arm(sink)
            with pytest.raises(trio.BusyResourceError):
                await client.receive_some()
            for word in (b"one", b"two"):
                await server.send_all(word)
                await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            await_nothing = server.try_send(b"three")
            assert await_nothing == 5
        assert found == [b"one", b"two"]
        assert await client.receive_some() == b"three"


async def test_a_sink_that_raises_is_its_owners_bug():
    """The exception comes out of `wait_disarmed`, and the stream can be armed again."""
    async with sim_tls() as (client, server):

        def sink() -> bool:
            raise RuntimeError("bug")

        for _ in range(2):
            client.arm(sink)
            with pytest.raises(RuntimeError, match="bug"):
                await client.wait_disarmed()
        await server.send_all(b"x")
        assert await client.receive_some() == b"x"


async def test_a_sink_may_disarm_itself(autojump_clock):
    """A sink taken away in its own call is not called again, and its owner goes on sleeping."""
    async with sim_tls() as (client, server):
        calls = 0

        def sink() -> bool:
            nonlocal calls
            calls += 1
            client.try_receive(1)
            client.disarm()
            return True

        await server.send_all(b"xyz")
        assert await client.receive_some(1) == b"x"
        client.arm(sink)
        with trio.move_on_after(1) as patience:
            await client.wait_disarmed()
        assert calls == 1
        assert not patience.cancelled_caught  # disarmed before it slept: nothing to wait for


async def test_a_busy_stream_lets_others_have_their_turn():
    """One turn reads the transport a bounded number of times, and what is left is served in a later one."""
    async with sim_tls(b_to_a=SimLink(buffer=1_000_000)) as (client, server):
        sizes: list[int] = []
        turns: list[int] = []
        step = client._turn

        def counted() -> bool:
            before = sum(sizes)
            again = step()
            turns.append(sum(sizes) - before)
            return again

        client._turn = counted  # type: ignore[method-assign]  # to see how much one turn moves
        await server.send_all(bytes(500_000))

        def sink() -> bool:
            data = client.try_receive(RECORDS)
            sizes.append(len(data or b""))
            return sum(sizes) < 500_000

        client.arm(sink)
        await client.wait_disarmed()
        assert sum(sizes) == 500_000
        assert max(turns) <= 3 * RECORDS


async def test_a_hang_up_is_watched_below():
    """The transport's end is told without reading."""
    async with sim_tls() as (client, server):
        seen = []
        client.watch(lambda: seen.append(client.hangup))
        server.close()
        await trio.testing.wait_all_tasks_blocked()
        assert seen == [True]


# -- any cut gives the same bytes --------------------------------------------------------------------------------------


NARROW = st.tuples(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.integers(1, 64), st.integers(1, 400))
WIDE = st.tuples(
    st.lists(st.integers(1, 40_000), min_size=1, max_size=8), st.integers(2_000, 50_000), st.integers(500, 40_000)
)


@settings(max_examples=80, deadline=None)
@given(sizes=NARROW | WIDE, batch=st.booleans(), armed=st.booleans())
def test_any_sizes_give_the_same_bytes(sizes, batch, armed):
    """Whatever the pieces, the transport's room and the reader's step: the same bytes, then the end."""
    pieces, buffer, step = sizes
    sent = [bytes([65 + index]) * size for index, size in enumerate(pieces)]

    async def send(stream: TlsStream) -> None:
        rest = [memoryview(piece) for piece in sent]
        while batch and rest:
            rest = stream.try_send_batch(rest)
            if rest:
                await stream.wait_send_all_might_not_block()
        if not batch:
            await stream.send_batch(sent)
        await stream.send_eof()

    async def receive(stream: TlsStream) -> bytes:
        if not armed:
            return await read_all(stream, step)
        found: list[bytes] = []

        def sink() -> bool:
            data = stream.try_receive(step)
            if data is not None:
                found.append(data)
            return data != b""

        stream.arm(sink)
        await stream.wait_disarmed()
        return b"".join(found)

    async def main() -> None:
        async with sim_tls(b_to_a=SimLink(buffer=buffer)) as (client, server), trio.open_nursery() as nursery:
            nursery.start_soon(send, server)
            assert await receive(client) == b"".join(sent)

    trio.run(main, clock=MockClock(autojump_threshold=0))


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 6000), kind=st.sampled_from([FaultKind.RESET, FaultKind.TRUNCATE, FaultKind.HALF_CLOSE]))
def test_a_cut_at_any_byte_is_never_an_end(at, kind):
    """Wherever the transport is cut, handshake included, the reader gets a prefix and then a break."""
    text = bytes(range(256)) * 20

    async def main() -> None:
        below = sim_stream_pair(b_to_a=SimLink(buffer=9000, faults=[Fault(kind, at)]))
        client, server = wrapped(below)
        found = b""

        async def serve() -> None:
            with suppress(trio.BrokenResourceError):
                await server.do_handshake()
                await server.send_all(text)
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            with suppress(trio.BrokenResourceError):
                await client.do_handshake()
                while len(found) < len(text):
                    data = await client.receive_some()
                    assert data, "a cut was taken for an end"
                    found += data
            nursery.cancel_scope.cancel()
        assert text.startswith(found)
        client.close()
        server.close()

    trio.run(main, clock=MockClock(autojump_threshold=0))
