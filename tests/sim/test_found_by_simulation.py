"""What the simulation found, each by its symptom; `python -m canal_trio.testing.simulate` found them by a seed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing
from kit import chat, request
from simkit import SSE, Conversation, answer_ok, only_record, read_request, world

from canal_trio.gateway.exchange import Exchange
from canal_trio.gateway.record import record_of
from canal_trio.hooks import Outcome
from canal_trio.messages import RequestHead
from canal_trio.settings import Bounds, Model, Target, Upstream
from canal_trio.testing.draws import RARER, plan_of
from canal_trio.testing.hunt import check
from canal_trio.testing.simstream import SimLink, sim_stream_pair
from canal_trio.upstream.pool import Lease
from canal_trio.wire.sse import EventScanner

TOO_LARGE = b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n"
DONE = b"data: [DONE]\n\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
UPGRADE = request("GET", "/v1/realtime", None, "Connection: Upgrade", "Upgrade: websocket")


async def test_an_upload_after_a_reload_with_smaller_pieces_is_a_bug_in_the_log(
    autojump_clock: Any, handover: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that was there before goes on with the bounds that it began with."""
    async with world(answer_ok, handover=handover) as here:
        client = here.connect()
        await client.send(chat())
        assert (await client.response("POST")).status == 200
        here.gateway.reload(replace(here.gateway.settings, bounds=Bounds(piece_bytes=64)))
        head, body = request("POST", "/", None, "Transfer-Encoding: chunked"), b"400\r\n" + b"x" * 1024 + b"\r\n"
        await client.send(head + body)
        await trio.sleep(1)
        await client.send(b"0\r\n\r\n")
        assert (await client.response("POST")).body == b"ok"
        assert here.conversations[-1].requests[-1].endswith(b"0\r\n\r\n")
    assert caplog.records == []


@pytest.mark.parametrize("held", [True, False], ids=["held-for-routing", "as-it-came"])
async def test_an_early_answer_is_seen_only_when_the_upstream_has_stalled(
    autojump_clock: Any, handover: bool, held: bool
) -> None:
    """An upstream that refuses an upload without reading it is heard at once, even if all of it is here already."""

    async def play(upstream: Conversation) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            data += await upstream.stream.receive_some(7)
        await upstream.say(TOO_LARGE)
        await trio.sleep_forever()

    models = {"models": (Model("m", (Target("u0"),)),)} if held else {}
    async with world(play, handover=handover, **models) as here:
        here.by_request = False
        here.request_link = SimLink(7)
        start = trio.current_time()
        client = here.connect()
        await client.send(chat())
        assert (await client.response("POST")).status == 413
        assert trio.current_time() == start
        record = await only_record(here)
        assert record.outcome is Outcome.COMPLETED


async def test_a_client_that_took_the_whole_answer_and_left_counts_as_gone(autojump_clock: Any) -> None:
    """A write that tells only afterwards what it passed on: the client has left meanwhile, with all it asked for."""
    exchange = Exchange(RequestHead(b"GET", b"/"), client="192.0.2.1", started=trio.current_time())
    exchange.leave("The client closed the connection.")
    assert exchange.outcome() is Outcome.CLIENT_GONE
    exchange.has_answer()
    record = record_of(exchange)
    assert record.outcome is Outcome.COMPLETED
    assert record.failure is None


async def test_a_client_that_took_the_whole_stream_and_left_counts_as_early(autojump_clock: Any) -> None:
    """The same after the last event of a stream: it has not left before the end, only before we knew of it."""
    exchange = Exchange(RequestHead(b"GET", b"/"), client="192.0.2.1", started=trio.current_time())
    exchange.scanner = EventScanner()
    exchange.scanner.feed(DONE)
    exchange.leave("The client closed the connection.")
    assert exchange.flags == {"left_after_terminal"}
    exchange.has_answer()
    assert record_of(exchange).flags == ()


async def test_a_tunnels_first_bytes_are_not_counted(autojump_clock: Any, handover: bool) -> None:
    """What the client said before the 101 was there is a part of what it said."""

    async def play(upstream: Conversation) -> None:
        await read_request(upstream.stream)
        await trio.sleep(1)
        await upstream.say(SWITCH)
        async for _ in upstream.stream:
            pass
        upstream.stream.close()

    async with world(play, handover=handover) as here:
        here.by_request = False
        client = here.connect()
        await client.send(UPGRADE + b"early")
        assert (await client.final_head()).status == 101
        await client.send(b" and late")
        await client.stream.send_eof()  # type: ignore[attr-defined]  # a simulated stream
        await client.rest()
        assert (await only_record(here)).request_bytes == len(b"early and late")


async def test_http10_a_cut_after_the_last_event_looks_like_an_end(autojump_clock: Any, handover: bool) -> None:
    """It was delivered, so the exchange is complete; the message is not, and only a reset can say so."""

    async def play(upstream: Conversation) -> None:
        await upstream.say(SSE)
        await upstream.chunk(DONE)
        await upstream.say(b"no chunk size\r\n")
        upstream.stream.close()

    async with world(play, handover=handover) as here:
        client = here.connect()
        await client.send(chat(version="1.0"))
        response = await client.response("POST")
        assert response.body == DONE
        assert response.ended_by == "reset"
        record = await only_record(here)
        assert (record.outcome, record.flags) == (Outcome.COMPLETED, ("cut_after_terminal",))




def test_what_an_http_1_0_client_sends_too_late_takes_the_end_of_its_answer_away() -> None:
    """That end is the connection's: a reset, for bytes that meet a closed socket, must not come in its place."""
    assert not check(plan_of(465320484)).complaints


async def test_a_client_that_left_with_its_request_costs_a_generation(autojump_clock: Any) -> None:
    """Request and FIN come as one: an idle upstream connection is there at once, and must not be used for it."""
    async with world(answer_ok, handover=True) as here:
        first = here.connect()
        await first.send(chat())
        assert (await first.response("POST")).status == 200
        client = here.connect()
        await client.send(chat())
        client.stream.close()  # type: ignore[attr-defined]  # a simulated stream
        records = await here.records.wait(2)
        await trio.testing.wait_all_tasks_blocked()
        assert records[1].outcome is Outcome.CLIENT_GONE
        assert [len(upstream.requests) for upstream in here.conversations] == [1]


async def test_a_client_that_leaves_as_its_dial_succeeds_costs_a_generation(autojump_clock: Any) -> None:
    """The task was woken with the connection before the leaving was seen, in one pass: nothing is asked."""
    async with world(answer_ok, handover=True) as here:
        dialling: list[trio.lowlevel.Task] = []

        async def dial(upstream: Upstream) -> Any:
            dialling.append(trio.lowlevel.current_task())
            await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.SUCCEEDED)
            ours, _ = sim_stream_pair()
            here.streams.append(ours)
            return ours

        here.dialer = dial
        client = here.connect()
        await client.send(chat())
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.reschedule(dialling[0])
        client.stream.close()  # type: ignore[attr-defined]  # a simulated stream
        here.streams[0].on_ready()  # the poller's step
        assert (await only_record(here)).outcome is Outcome.CLIENT_GONE
        assert here.streams[1].closed
        assert here.streams[1].outgoing._sent == 0


async def test_a_lease_is_lost_with_the_task_that_was_cancelled_in_its_grant(autojump_clock: Any) -> None:
    """A connection that was there before goes back into the pool; who was not cancelled keeps it."""
    async with world(answer_ok, handover=True) as here:
        client = here.connect()
        await client.send(chat())
        assert (await client.response("POST")).status == 200
        pool = here.gateway.generation.pools["u0"]
        lease = await pool.lease()
        assert isinstance(lease, Lease)
        await lease.unless_cancelled()
        assert pool.statistics().used == 1
        with trio.CancelScope() as scope:
            scope.cancel()
            await lease.unless_cancelled()
        assert scope.cancelled_caught
        assert (pool.statistics().used, pool.statistics().idle) == (0, 1)
        assert not here.streams[1].closed


async def test_a_heartbeat_that_found_the_client_gone_told_nobody(autojump_clock: Any, handover: bool) -> None:
    """Where an EOF is no leaving, the first heartbeat that meets a broken connection closes the upstream."""

    async def play(upstream: Conversation) -> None:
        await upstream.say(SSE)
        await upstream.chunk(b"data: 1\n\n")
        await trio.sleep_forever()

    only = Upstream("u0", "http://upstream.test", heartbeat=2, on_client_eof="finish")
    async with world(play, handover=handover, upstream=only) as here:
        start = trio.current_time()
        client = here.connect()
        await client.send(chat())
        await client.until(b"data: 1\n\n")
        await trio.sleep(1)
        client.stream.close()  # type: ignore[attr-defined]  # a simulated stream
        record = await only_record(here)
        assert record.outcome is Outcome.CLIENT_GONE
        assert trio.current_time() - start == pytest.approx(2, abs=0.01)
        assert here.conversations[0].left == pytest.approx(start + 2, abs=0.01)


def test_a_reset_behind_a_clients_end_leaves_its_tunnel_to_itself() -> None:
    """The slot, both connections and the record wait for the tunnel's idle deadline, unless the kernel tells of it."""
    assert not check(plan_of(535057203)).complaints


@pytest.mark.parametrize("seed", [535051555, 535057159])
def test_an_end_that_was_no_leaving_at_first_must_have_closed_the_upstream(seed: int) -> None:
    """The judge was wrong. `on_client_eof` is each upstream's own: with one that finishes, the end that was seen early
    is no leaving, and its connection lives until its attempt is over; on the way to one that does not, it is."""
    assert not check(plan_of(seed)).complaints


def test_a_request_that_just_fits_the_kernel_on_one_path_meets_another_deadline() -> None:
    """The judge was wrong. A chunked body is passed on in the chunks in which it came, which are others where it was
    read ahead; when its upstream stops reading, the rest of it may fit what the kernel holds, or it may not."""
    assert not check(plan_of(535049808)).complaints


@pytest.mark.parametrize("seed", [700004442, 700004780])
def test_a_drain_in_the_middle_of_the_last_look_refuses_a_new_client(seed: int) -> None:
    """The judge was wrong. All clients had left, and the plan's drain came between two that see whether new ones are
    served: then they are not to be."""
    assert not check(plan_of(seed)).complaints


@pytest.mark.parametrize("seed", [700005747, 535060149])
def test_half_a_heartbeat_is_no_part_of_the_answer(seed: int) -> None:
    """The judge was wrong. A client that stops reading may stop inside of a heartbeat, too."""
    assert not check(plan_of(seed)).complaints


@pytest.mark.parametrize("seed", [700003186, 700021852])
def test_an_upstream_that_leaves_inside_of_a_request_breaks_or_ends_its_connection(seed: int) -> None:
    """The judge was wrong. By what it has not read its close is a reset or an end, for the kernel, and so the answer's
    text, which says what was seen, differs where the pieces do; its kind does not."""
    assert not check(plan_of(seed)).complaints


def test_an_upstream_that_leaves_inside_of_its_early_answer_breaks_or_ends_its_connection() -> None:
    """The judge was wrong. It has read the request so far or it has not, which hangs by the pieces in which that came,
    and so the kernel sends an end or a reset (RFC 9112 9.6): a cut or a reset is what we saw."""
    assert not check(plan_of(535062836)).complaints


def test_a_head_that_comes_slowly_while_nothing_is_read_is_stalling() -> None:
    """The judge was wrong. An upstream that takes no byte of the request has stalled, although it says five bytes of a
    head now and then: design, section 8, counts from the request on to a head that is whole."""
    assert not check(plan_of(535053668)).complaints


def test_a_refusal_in_the_middle_of_an_upload_is_neither_relayed_nor_made_good() -> None:
    """While it was read more of the body was sent on than is held, so nobody else could be asked any more: a 502."""
    assert not check(plan_of(700017814)).complaints


def test_a_tunnel_that_has_both_its_ends_is_closed_before_its_client_leaves() -> None:
    """The judge was wrong. The client's end was passed on, and so was the upstream's, whose connection was over
    then; that the client left before it had read all was seen later."""
    assert not check(plan_of(800015935)).complaints


def test_a_bug_that_strikes_in_a_heartbeat_comes_after_silence() -> None:
    """The judge was wrong. A bug ends an exchange at once, and the bytes at which this one was planted were the
    gateway's own, sent when nothing had moved for a while."""
    assert not check(plan_of(800028070)).complaints


def test_an_upstream_was_asked_for_a_client_that_had_not_taken_the_invitation() -> None:
    """The product was wrong. `100 Continue` could not be written, as the client was gone, and the request went out."""
    assert not check(plan_of(700033761)).complaints


def test_whether_a_refused_upload_leaves_a_connection_hangs_by_how_much_of_it_had_come() -> None:
    """The judge was wrong. Refused for its size while its last bytes come, a request is read to its end or not, and
    only then may the connection go on; which it is may differ between the two paths."""
    assert not check(plan_of(700027688)).complaints


def test_an_idle_connection_that_went_dead_unseen_costs_the_next_one_its_deadline() -> None:
    """The judge was wrong. A link that was cut without a word cannot be told from one that is idle."""
    assert not check(plan_of(700025997)).complaints


def test_an_error_event_that_was_cut_is_still_the_gateways_own() -> None:
    """The judge was wrong. Behind a head before its time comes an error, and a link may cut it."""
    assert not check(plan_of(1_000_000_439)).complaints


def test_who_leaves_before_a_write_tells_that_it_has_all_counts_as_gone() -> None:
    """The judge was wrong. Where a write tells only afterwards what was taken, and the answer would be read on without
    its client, nothing is left that would show that it got the last byte."""
    assert not check(plan_of(1_000_001_553)).complaints


def test_an_upstream_too_far_away_for_the_deadline_serves_nobody() -> None:
    """The judge was wrong. Where the way there and back takes longer than an exchange may, the last client is told so,
    as all before it were."""
    assert not check(plan_of(1_000_051_961)).complaints


def test_a_head_before_its_time_on_one_path_only_is_not_compared() -> None:
    """The judge was wrong. What was pipelined may be here sooner on one path, and the time for an early head begins."""
    assert not check(plan_of(1_000_051_212)).complaints


def test_plans_with_rarer_configurations_have_all_of_them() -> None:
    """Seeds from `RARER` on draw places, deadlines, early heads, held events and reading on; those below none."""
    plans = [plan_of(seed) for seed in range(RARER, RARER + 40)]
    assert {plan.bounds.exchanges for plan in plans} >= {1, 2}
    assert any(plan.deadlines.exchange < 30 for plan in plans)
    assert any(model.on_disconnect is not None for plan in plans for model in plan.models)
    assert any(upstream.early_head_after is not None for plan in plans for upstream in plan.upstreams)
    assert any(plan.holds for plan in plans)
    usual = [plan_of(seed) for seed in range(40)]
    assert not any(plan.holds or plan.bounds.exchanges < 3 for plan in usual)
