"""What several workers are made of, one by one: merged pages, shares of bounds, the reserved address, the channel."""

from __future__ import annotations

import errno
import socket

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from canal_trio.serve import merge
from canal_trio.serve.control import Ask, Channel, Drain, Family, Report, Start
from canal_trio.serve.limits import share_of
from canal_trio.serve.listen import ListenError, open_listeners, reserve
from canal_trio.settings import Bounds, Key, Model, NamedCertificate, ServerTLS, Settings, Target, Upstream

# -- metrics -----------------------------------------------------------------------------------------------------------


def registry(counts: dict[str, float], waits: list[float], open_now: float) -> CollectorRegistry:
    """One worker's metrics."""
    found = CollectorRegistry()
    counter = Counter("canal_things", "Things.", ["kind"], registry=found)
    for kind, count in counts.items():
        counter.labels(kind).inc(count)
    histogram = Histogram("canal_wait_seconds", "Waits.", buckets=(1, 10), registry=found)
    for wait in waits:
        histogram.observe(wait)
    Gauge("canal_open", "Open now.", registry=found).set(open_now)
    Gauge("canal_ready", "1 if ready.", registry=found).set(1)
    Gauge("canal_build_info", "Always 1.", ["version"], registry=found).labels("1").set(1)
    return found


def samples(page: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of a page, read by the library's own parser."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


amounts = st.dictionaries(st.sampled_from("abc"), st.integers(0, 100).map(float), max_size=3)
waits = st.lists(st.sampled_from([0.5, 5.0, 50.0]), max_size=5)


@given(st.lists(st.tuples(amounts, waits, st.integers(0, 9).map(float)), min_size=1, max_size=4))
def test_a_merged_page_is_that_of_one_who_did_it_all(parts: list[tuple[dict[str, float], list[float], float]]) -> None:
    """Counters, histograms and gauges add up; readiness is told by worker; the build is told once."""
    workers = {str(number): merge.snapshot(registry(*part)) for number, part in enumerate(parts, 1)}
    found = samples(merge.page(merge.merged(workers)))
    total: dict[str, float] = {}
    for counts, _, _ in parts:
        for kind, count in counts.items():
            total[kind] = total.get(kind, 0) + count
    alone = samples(merge.page(merge.merged({"x": merge.snapshot(
        registry(total, [wait for _, some, _ in parts for wait in some], sum(part[2] for part in parts))
    )})))  # fmt: skip
    ready = {key: value for key, value in found.items() if key[0] == "canal_ready"}
    assert ready == {("canal_ready", (("worker", name),)): 1.0 for name in workers}
    rest = {key: value for key, value in found.items() if key[0] != "canal_ready"}
    assert rest == {key: value for key, value in alone.items() if key[0] != "canal_ready"}


def test_counters_do_not_fall_when_a_worker_is_gone() -> None:
    """What it had counted stays; what it had open does not."""
    first, second = (merge.snapshot(registry({"a": 3.0}, [5.0], 4.0)) for _ in range(2))
    both = samples(merge.page(merge.merged({"1": first, "2": second})))
    gone = merge.retired(merge.retired([], second), second)
    left = samples(merge.page(merge.merged({"1": first}, gone=gone)))
    things = ("canal_things_total", (("kind", "a"),))
    assert (both[things], left[things]) == (6.0, 9.0)
    assert left["canal_wait_seconds_count", ()] == 3.0
    assert left["canal_wait_seconds_bucket", (("le", "10.0"),)] == 3.0
    assert left["canal_open", ()] == 4.0
    assert ("canal_ready", (("worker", ""),)) not in left


def test_the_supervisor_counts_reloads() -> None:
    """Each worker applies every reload; the page shows one."""

    def reloads(count: int) -> list[Family]:
        found = CollectorRegistry()
        Counter("canal_reloads", "Reloads.", registry=found).inc(count)
        return merge.snapshot(found)

    page = samples(merge.page(merge.merged({"1": reloads(7), "2": reloads(7)}, reloads(1))))
    assert page == {("canal_reloads_total", ()): 1.0}


# -- bounds ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 16), st.integers(1, 1000), st.integers(1, 1000), st.integers(0, 1000))
def test_shares_add_up(count: int, clients: int, connections: int, waiters: int) -> None:
    """What bounds the whole gateway bounds all workers together, as far as each of them gets one."""
    whole = Settings(
        bounds=Bounds(
            client_connections=clients,
            waiters=waiters,
            upstream_connections=connections,
            exchanges=clients,
            memory_bytes=connections * 1000,
        ),
        upstreams=(Upstream("a", "http://a", connections=connections), Upstream("b", "http://b")),
    )
    parts = [share_of(whole, number, count) for number in range(count)]
    for total, shares in (
        (clients, [part.bounds.client_connections for part in parts]),
        (clients, [part.bounds.exchanges for part in parts]),
        (connections, [part.bounds.upstream_connections for part in parts]),
        (connections, [part.upstreams[0].connections for part in parts]),
    ):
        assert sum(shares) == max(total, count)  # type: ignore[arg-type]  # none of them is None here
        assert max(shares) - min(shares) <= 1  # type: ignore[operator, type-var]
    assert sum(part.bounds.waiters for part in parts) == (max(waiters, count) if waiters else 0)
    assert {part.bounds.memory_bytes for part in parts} == {connections * 1000 // count}
    assert {part.upstreams[1].connections for part in parts} == {None}
    assert share_of(Settings(), 0, 4).bounds.client_connections is None
    assert share_of(Settings(), 0, 16).bounds.held_total_bytes == Bounds().held_body_bytes


# -- the address -------------------------------------------------------------------------------------------------------


async def test_a_reserved_address_is_taken_for_all_but_sharers() -> None:
    """Before any worker listens, and while they do: who does not share is refused, who shares is not in the way."""
    [held] = await reserve([("127.0.0.1", 0)])
    address = held.getsockname()
    with pytest.raises(ListenError, match="the address is in use"):
        await open_listeners([address])
    with pytest.raises(ListenError, match="the address is in use"):
        await reserve([address])
    workers = [*await open_listeners([address], share=True), *await open_listeners([address], share=True)]
    with pytest.raises(ListenError, match="the address is in use"):
        await reserve([address])
    with socket.create_connection(address):
        pass
    for sock in workers:
        sock.close()
    with socket.socket() as nobody:
        assert nobody.connect_ex(address) == errno.ECONNREFUSED, "the holder must not accept"
    held.close()
    [again] = await open_listeners([address])
    again.close()


async def test_a_name_with_two_addresses_is_reserved_as_one_port() -> None:
    """localhost:0, as with one process."""
    held = await reserve([("localhost", 0)])
    assert len({sock.getsockname()[1] for sock in held}) == 1
    for sock in held:
        sock.close()


# -- the channel -------------------------------------------------------------------------------------------------------

SETTINGS = Settings(
    tls=ServerTLS("a.pem", "a.key", (NamedCertificate(("x.test",), "b.pem", "b.key"),)),
    upstreams=(Upstream("u", "http://u", api_key="sk-x", heartbeat=1.5, connections=float("inf")),),
    models=(Model("m", (Target("u"),)),),
    keys=(Key("k", "00" * 32, ("m",)),),
)


async def test_settings_arrive_as_they_were() -> None:
    """Infinities and secrets included; several messages in one read are several messages."""
    ours, theirs = map(Channel, socket.socketpair())
    assert await ours.send(Start(1, SETTINGS, [("::1", 5)]))
    assert await ours.send(Drain())
    found = await theirs.receive()
    assert isinstance(found, Start)
    assert (found.number, found.settings, found.addresses) == (1, SETTINGS, [("::1", 5)])
    assert isinstance(await theirs.receive(), Drain)
    ours.close()
    assert await theirs.receive() is None
    assert not await theirs.send(Drain())
    theirs.close()
    theirs.close()


async def test_large_reports_pass() -> None:
    """More than a socket's buffer holds."""
    ours, theirs = map(Channel, socket.socketpair())
    streams = [{"id": f"req_{number}", "age": 1.0} for number in range(50_000)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.send, Report(3, True, False, streams=streams))
        found = await theirs.receive()
    assert isinstance(found, Report)
    assert found.streams == streams
    ours.close()
    theirs.close()


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\0\0\0\x01\xc1", b"\0\0\0\x02\x81", b"\0\0\0\x05ab"])
async def test_what_is_no_message_ends_the_channel(garbage: bytes) -> None:
    """Too long, no msgpack, cut off: nobody is there any more, and nothing is raised."""
    near, far = socket.socketpair()
    channel = Channel(near)
    far.sendall(garbage)
    far.close()
    assert await channel.receive() is None
    channel.close()


async def test_a_message_that_was_cut_off_breaks_the_channel() -> None:
    """Cancelled in the middle of a message, nothing can follow it."""
    ours, theirs = map(Channel, socket.socketpair())
    with trio.move_on_after(0.05):
        await ours.send(Report(1, True, False, streams=[{"x": "y" * 10_000_000}]))
    assert not await ours.send(Ask(1, "state"))
    assert await theirs.receive() is None
    theirs.close()


def test_messages_are_told_apart() -> None:
    """A tag in each, so that none is mistaken for another."""
    encoded = msgspec.msgpack.encode(Drain())
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(encoded, type=Start)
