"""The README's worked example is run as it stands there: bytes, backpressure, endings."""

from __future__ import annotations

import re
import socket
import struct
from pathlib import Path

import pytest
import trio

README = Path(__file__).parent.parent / "README.md"
DIRECTION = 10 * 16_384 + 32_768  # what a direction holds at most, by the README

# What the kernel lets one receive buffer and one send buffer grow to.
LARGEST_BUFFERS = sum(int(Path(f"/proc/sys/net/ipv4/tcp_{way}mem").read_text().split()[2]) for way in "rw")


def example() -> str:
    """The one python block of the README."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    return block


@pytest.fixture
def program(capsys):
    """The example's names, executed but not started."""
    names = {"__name__": "example"}
    exec(compile(example(), str(README), "exec"), names)  # the README is ours
    return names


async def serve(nursery: trio.Nursery, handler, *, small: bool = False) -> tuple[str, int]:
    """The address of a server on the loopback that runs `handler` for each connection."""
    listener = trio.socket.socket()
    if small:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await listener.bind(("127.0.0.1", 0))
    listener.listen(16)
    nursery.start_soon(trio.serve_listeners, handler, [trio.SocketListener(listener)])
    return listener.getsockname()


async def echo(stream: trio.SocketStream) -> None:
    """Send back what comes, until it ends."""
    async for data in stream:
        await stream.send_all(data)
    await stream.send_eof()


def test_the_example_is_about_as_long_as_it_says():
    """Some twenty lines of code: it is to be read at a glance."""
    assert len([line for line in example().splitlines() if line.strip()]) <= 23


async def test_the_example_relays(program, nursery, capsys):
    """Bytes go there and come back whole, a half-close passes, and the report's numbers are printed."""
    program["UPSTREAM"] = await serve(nursery, echo)
    client = await trio.open_tcp_stream(*await serve(nursery, program["handle"]))
    data = b"".join(b"%07d" % number for number in range(100_000))
    got = bytearray()
    with trio.fail_after(60):
        async with trio.open_nursery() as sending:

            async def send() -> None:
                await client.send_all(data)
                await client.send_eof()

            sending.start_soon(send)
            async for piece in client:
                got += piece
    assert got == data
    await client.aclose()
    with trio.fail_after(10):
        while not (printed := capsys.readouterr().out):
            await trio.lowlevel.checkpoint()
    assert printed == f"{len(data)} bytes there, {len(data)} back \n"
    nursery.cancel_scope.cancel()


async def test_the_example_holds_a_sender_back(program, nursery):
    """While the upstream does not read, the client can send what kernels and relay hold, and no more; then all of it
    arrives."""
    reading, received = trio.Event(), bytearray()

    async def stalls(stream: trio.SocketStream) -> None:
        await reading.wait()
        async for data in stream:
            received.extend(data)

    program["UPSTREAM"] = await serve(nursery, stalls, small=True)
    client = await trio.open_tcp_stream(*await serve(nursery, program["handle"]))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sent = 0
    most = LARGEST_BUFFERS + DIRECTION + 2 * 65_536  # two buffers that may grow by themselves, and two small ones

    async def send_for_ever() -> None:
        nonlocal sent
        piece = bytes(4096)
        while sent <= most:
            sent += await client.socket.send(piece)

    with trio.fail_after(60):
        while True:
            before = sent
            with trio.move_on_after(0.3):
                await send_for_ever()
            if sent == before:
                break
            assert sent <= most
    assert sent > DIRECTION
    reading.set()
    with trio.fail_after(60):
        await client.send_all(b"the last of it")
        await client.send_eof()
        async for _ in client:
            pass
    assert received == bytes(sent) + b"the last of it"
    await client.aclose()
    nursery.cancel_scope.cancel()


async def test_the_example_makes_no_end_of_a_cut(program, nursery, capsys):
    """An upstream that is reset resets the client, after the bytes that came before."""
    seen = trio.Event()

    async def breaks(stream: trio.SocketStream) -> None:
        await stream.send_all(b"half an ans")
        await seen.wait()
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    program["UPSTREAM"] = await serve(nursery, breaks)
    client = await trio.open_tcp_stream(*await serve(nursery, program["handle"]))
    with trio.fail_after(10):
        assert await client.receive_some() == b"half an ans"
        seen.set()
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
    await client.aclose()
    nursery.cancel_scope.cancel()


async def test_the_example_survives_an_upstream_that_is_not_there(program, nursery, capsys):
    """The client's connection ends, and the next one is served."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        program["UPSTREAM"] = nobody.getsockname()
        address = await serve(nursery, program["handle"])
        client = await trio.open_tcp_stream(*address)
        with trio.fail_after(10):
            assert await client.receive_some() == b""
        await client.aclose()
    program["UPSTREAM"] = await serve(nursery, echo)
    client = await trio.open_tcp_stream(*address)
    with trio.fail_after(10):
        await client.send_all(b"there now")
        assert await client.receive_some() == b"there now"
    await client.aclose()
    nursery.cancel_scope.cancel()
