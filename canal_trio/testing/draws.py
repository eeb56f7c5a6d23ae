"""Plans drawn from one source of chance: a seed, or Hypothesis (`st.randoms(use_true_random=False)`).

Most of what is drawn is well, so that one fault meets exchanges that must not notice; about half of the plans have
faults, and few have many. Times are drawn from a continuum: two things happen in the same moment only if one follows
from the other. What is slow is small, so that nothing is late but by a fault of the plan.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Final

from canal_trio.settings import Bounds, Deadlines, Drain, Model, Target, Upstream
from canal_trio.testing.plans import Ask, Client, Leave, Plan, Reload, Reply
from canal_trio.testing.simlink import Fault, FaultKind, SimLink

__all__ = ["RARER", "draw_plan", "plan_of"]

RARER: Final = 1_000_000_000
_FINE: Final = "ok"
_KINDS: Final = tuple(FaultKind)
_LAZY: Final = {5: 0.05, 100: 0.3, 4_096: 0.4}  # seconds between two reads, by what a read can get at the most


def plan_of(seed: int) -> Plan:
    """The plan of a seed. Seeds below `RARER` keep the plans that they have had since before there was any of that."""
    return draw_plan(random.Random(seed), rarer=seed >= RARER)


def draw_plan(rng: random.Random, *, rarer: bool = True) -> Plan:
    """A plan; `rarer`: with what few configurations have. `rng` is a `random.Random`, or has its methods."""
    trouble = rng.choice((0.0, 0.0, 0.12, 0.12, 0.35))  # how likely a fault is at each place where one can be
    slow = rng.random() < 0.25  # tiny buffers or late bytes: then all is small
    count = rng.choice((1, 1, 1, 2, 2))
    upstreams = tuple(_upstream(rng, number) for number in range(count))
    models: tuple[Model, ...] = ()
    if rng.random() < (0.8 if rarer else 0.3):
        orders = [tuple(u.name for u in upstreams), tuple(u.name for u in reversed(upstreams))]
        models = tuple(
            Model(f"m{number}", tuple(map(Target, order))) for number, order in enumerate(dict.fromkeys(orders))
        )
    clients = tuple(
        _client(rng, number, trouble, models, slow=slow)
        for number in range(rng.choice((1, 2, 2, 3, 4)))
    )
    drain = rng.uniform(0.0, 6.0) if rng.random() < trouble / 2 else None
    piece = rng.choice((64, 700, 16_384, 16_384))
    plan = Plan(
        order=rng.getrandbits(32),
        clients=clients,
        upstreams=upstreams,
        models=models,
        bounds=_bounds(rng, piece),
        deadlines=_deadlines(rng),
        request_link=_link(rng, slow=slow),
        response_link=_link(rng, slow=slow),
        drain=drain,
        reload=Reload(rng.uniform(0.0, 5.0), rng.choice((64, piece)), rng.choice((12.0, 120.0)))
        if rng.random() < 0.2
        else None,
        bare=rng.random() < 0.5,
    )
    return _with_rarer(rng, plan) if rarer else plan


def _with_rarer(rng: random.Random, plan: Plan) -> Plan:
    """What few configurations have: few places, a deadline for all of an exchange, early heads, first events that are
    held, answers that are read on when the client has left."""
    bounds, deadlines, models = plan.bounds, plan.deadlines, plan.models
    if rng.random() < 0.25:
        bounds = replace(bounds, exchanges=rng.choice((1, 2)))
    if rng.random() < 0.25:
        deadlines = replace(deadlines, exchange=rng.uniform(0.3, 20.0))
    if rng.random() < 0.3:
        limits = Drain(rng.choice((1.0, 30.0)), rng.choice((3, math.inf)), rng.choice((1, 64)))
        models = tuple(replace(model, on_disconnect=limits) for model in models)
    upstreams, clients = plan.upstreams, plan.clients
    if rng.random() < 0.4:
        upstreams = tuple(replace(upstream, early_head_after=rng.uniform(0.05, 1.5)) for upstream in upstreams)
        clients = tuple(
            replace(client, asks=tuple(replace(ask, streams=ask.model is not None) for ask in client.asks))
            for client in clients
        )
    return replace(
        plan,
        bounds=bounds,
        deadlines=deadlines,
        models=models,
        upstreams=upstreams,
        clients=clients,
        holds=rng.random() < 0.4,
    )


def _bounds(rng: random.Random, piece: int) -> Bounds:
    return Bounds(
        piece_bytes=piece,
        capacity=rng.choice((1, 2, 4)),
        handover_bytes=rng.choice((128, 2_000, 32_768, 32_768)),
        held_body_bytes=rng.choice((60_000, 32 << 20)),
        pipelined_bytes=65_536,
    )


def _deadlines(rng: random.Random) -> Deadlines:
    if rng.random() < 0.5:
        return Deadlines()
    return Deadlines(
        request_head=8.0,
        keep_alive=20.0,
        body_idle=15.0,
        lease=rng.choice((2.0, 60.0)),
        connect=3.0,
        first_byte=40.0,
        upstream_idle=12.0,
        tunnel_idle=25.0,
        client_write=18.0,
        drain=rng.choice((0.5, 5.0)),
        upstream_keep_alive=rng.choice((1.5, 60.0)),
    )


def _upstream(rng: random.Random, number: int) -> Upstream:
    return Upstream(
        f"u{number}",
        f"http://u{number}.test/v1",
        retry_sent=rng.random() < 0.2,
        on_client_eof=rng.choice(("abort", "abort", "finish")),
        connections=rng.choice((None, None, None, 1, 2)),
        heartbeat=rng.choice((None, None, None, rng.uniform(0.3, 2.0), rng.uniform(0.05, 0.4))),
    )


def _link(rng: random.Random, *, slow: bool) -> SimLink:
    if not slow:
        return SimLink(rng.choice((4_096, 65_536, 1_000_000)), 0.0)
    buffer = rng.choice((5, 100, 4_096, 65_536))
    return SimLink(buffer, rng.uniform(0.01, 0.3) if buffer >= 4_096 else 0.0)


def _fault(rng: random.Random, *, most: int) -> Fault:
    at = rng.choice((0, rng.randint(0, 300), rng.randint(0, most)))
    return Fault(rng.choice(_KINDS), at, rng.choice((0.7, 3.3, 150.0)))


# -- clients -----------------------------------------------------------------------------------------------------------


def _client(
    rng: random.Random, number: int, trouble: float, models: tuple[Model, ...], *, slow: bool
) -> Client:
    count = rng.choice((1, 1, 2, 3, 4))
    asks = [_ask(rng, f"{number}.{index}", trouble, models, slow=slow) for index in range(count)]
    asks[:-1] = [replace(ask, upgrade=False, close=False) if not ask.upgrade else _plain(ask) for ask in asks[:-1]]
    pipelined = rng.random() < 0.3
    to_client = _link(rng, slow=slow)
    if rng.random() < trouble / 2:
        to_client = replace(to_client, faults=(_fault(rng, most=4_000),))
    lazy = rng.random() < (0.5 if slow else 0.3)
    spaced = rng.random() < 0.2
    return Client(
        asks=tuple(asks),
        start=rng.uniform(0.0, 3.0),
        pipelined=pipelined,
        to_gateway=_link(rng, slow=slow),
        to_client=to_client,
        send=rng.choice((40, 200)) if spaced else 0,
        spacing=rng.uniform(0.001, 0.05) if spaced else 0.0,
        # Slower, and a large answer would be under way for longer than the next request is waited for.
        read=rng.choice((300, 4_096)) if slow else rng.choice((4_096, 65_536)),
        pause=rng.uniform(0.0, _LAZY[min(to_client.buffer, 4_096)] if slow else 0.2) if lazy else 0.0,
        out=_fault(rng, most=rng.choice((400, 400, 3_000))) if rng.random() < trouble / 2 else None,
        leave=_leave(rng) if rng.random() < trouble else None,
        raises=rng.randint(0, 3_000) if rng.random() < trouble / 6 else None,
        waits=rng.random() < 0.1,
    )


def _leave(rng: random.Random) -> Leave:
    how = rng.choice(("close", "reset", "eof", "stall"))
    if rng.random() < 0.5:
        return Leave(how, at=rng.choice((rng.randint(1, 400), rng.randint(1, 20_000))))
    return Leave(how, after=rng.choice((0.0, rng.uniform(0.0, 0.5), rng.uniform(0.0, 12.0))))


def _plain(ask: Ask) -> Ask:
    return Ask(ask.tag, method="GET", pause=ask.pause, replies=(Reply(sizes=(5,)),))


def _ask(rng: random.Random, tag: str, trouble: float, models: tuple[Model, ...], *, slow: bool) -> Ask:
    kind = rng.choice(("stream", "stream", "stream", "plain", "plain", "upload", "get", "head", "upgrade"))
    version = "1.0" if rng.random() < 0.1 and kind != "upgrade" else "1.1"
    body: int | None = None
    if kind in ("stream", "plain"):
        body = rng.randint(0, 200)
    elif kind == "upload":
        body = rng.choice((rng.randint(0, 3_000), rng.randint(0, 1_000 if slow else 100_000)))
    elif kind == "upgrade":
        body = rng.randint(0, 500)
    upload = kind == "upload"
    many = rng.choice((1, 1, 1, 2, 3))
    replies = tuple(_reply(rng, kind, trouble, slow=slow) for _ in range(many))
    dials = [_FINE]
    if rng.random() < trouble / 2:
        dials = [rng.choice((_FINE, "slow", "refused", "dns", "silent")) for _ in range(rng.choice((1, 2, 3)))]
    named = bool(models) and body is not None and kind != "upgrade" and rng.random() < 0.8
    return Ask(
        tag=tag,
        method={"get": "GET", "head": "HEAD", "upgrade": "GET"}.get(kind, "POST"),
        version=version,
        close=version == "1.0" or (kind != "upgrade" and rng.random() < 0.1),
        body=body,
        chunked=version == "1.1" and kind != "upgrade" and body is not None and rng.random() < 0.3,
        expect=upload and version == "1.1" and rng.random() < 0.2,
        upgrade=kind == "upgrade",
        model=rng.choice(models).name if named else None,
        pause=rng.choice((0.0, 0.0, rng.uniform(0.0, 2.0))),
        replies=replies,
        dials=tuple(dials),
    )


# -- replies -----------------------------------------------------------------------------------------------------------


def _reply(rng: random.Random, kind: str, trouble: float, *, slow: bool) -> Reply:
    sse = kind == "stream"
    if kind == "upgrade":
        status = rng.choice((101, 101, 101, 200, 403))
    else:
        status = rng.choice((200,) * 12 + (204, 304, 404, 429, 503, 500)) if not sse else 200
    reply = Reply(
        status=status,
        sse=sse,
        framing=rng.choice(("chunked", "chunked", "chunked", "length", "close")) if sse else _framing(rng),
        sizes=_sizes(rng, sse=sse, slow=slow),
        cut=rng.choice((0, 0, 0, rng.randint(5, 60), rng.randint(60, 5_000))),
        gap=rng.choice((0.0, 0.0, rng.uniform(0.001, 0.05), rng.uniform(0.1, 0.9))),
        wait=rng.choice((0.0, 0.0, rng.uniform(0.0, 1.5))),
        informational=rng.choice((0, 0, 0, 0, 1, 3)),
        done=sse and rng.random() < 0.8,
        error=sse and rng.random() < 0.04,
        early=kind == "upload" and rng.random() < 0.2,
        close=rng.random() < 0.1,
        trailers=rng.random() < 0.1,
        quits=rng.choice((0.0, rng.uniform(0.0, 2.0))) if rng.random() < 0.15 else None,
    )
    if reply.gap > 0.05 or reply.cut < 60:
        reply = replace(reply, cut=0) if sum(reply.sizes) > 2_000 else reply
    return _troubled(rng, reply, trouble)


def _framing(rng: random.Random) -> str:
    return rng.choice(("length", "length", "length", "chunked", "close"))


def _sizes(rng: random.Random, *, sse: bool, slow: bool) -> tuple[int, ...]:
    if sse:
        most = 20 if slow else rng.choice((30, 30, 900))
        return tuple(rng.randint(0, most) for _ in range(rng.choice((0, 1, 3, 5, 9, 20))))
    if rng.random() < 0.15 and not slow:
        return tuple(rng.randint(5_000, 60_000) for _ in range(rng.choice((1, 2, 5))))
    return tuple(rng.randint(1, 300 if slow else 2_000) for _ in range(rng.choice((0, 1, 1, 2, 4))))


def _troubled(rng: random.Random, reply: Reply, trouble: float) -> Reply:
    if rng.random() >= trouble:
        return reply
    said = 250 + sum(reply.sizes) + 40 * len(reply.sizes)
    what = rng.choice(("out", "out", "out", "out", "into", "garbage"))
    if what == "out":
        return replace(reply, out=_fault(rng, most=said))
    if what == "into":
        return replace(reply, into=replace(_fault(rng, most=300), at=rng.choice((0, rng.randint(0, 300)))))
    return replace(reply, garbage=rng.choice(("head", "chunk")) if reply.framing == "chunked" else "head")
